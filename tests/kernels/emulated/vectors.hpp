// Sixteen lanes as two vectors of AVX2 with FMA, whether or not there is AVX-512.
//
// Products are not inlined, and there is no immintrin.h: tiles that registers do not hold take long enough to compile.
#pragma once

#include <xmmintrin.h>

#include <cstdint>
#include <cstring>

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));

// sum += a b, rounded once. asm, and volatile, so that the control register is what it is set to (amx_tiles.hpp).
[[gnu::noinline]] inline void add_product(Floats& sum, const Floats& a, const Floats& b) {
  typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));
  auto* sums = reinterpret_cast<Half*>(&sum);
  const auto *as = reinterpret_cast<const Half*>(&a), *bs = reinterpret_cast<const Half*>(&b);
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sums[0]) : "x"(as[0]), "m"(bs[0]));
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sums[1]) : "x"(as[1]), "m"(bs[1]));
}

// One of each pair of bf16: 0 the even ones, 1 the odd ones.
[[gnu::always_inline]] inline Floats numbers(Bits pairs, int step) { return (Floats)(step == 0 ? pairs << 16 : pairs & 0xffff0000u); }

inline void store_past_caches(float* to, Floats results) {
  __m128 parts[4];
  std::memcpy(parts, &results, sizeof parts);
  for (int part = 0; part < 4; ++part) _mm_stream_ps(to + 4 * part, parts[part]);
}

}  // namespace
