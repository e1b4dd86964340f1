// AVX-512 without bf16 arithmetic: a bf16 weight becomes fp32 by a shift, then two fused multiply-adds.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx512f {
  using Element = float;
  using Vector = __m512;
  using Weights = __m512;
  using Inputs = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kSteps = 2;  // the even input, then the odd one
  static constexpr int kPairsAtOnce = 1;
  static constexpr int kBurnSums = 24;
  static constexpr double kFlops = 2.0 * kLanes;

  template <int kStep>
  static inline void load(const uint32_t* from, Weights& weights) {
    // Vector operators, not intrinsics: GCC 12 warns about its own _mm512_slli_epi32 (GCC bug 105593).
    typedef uint32_t Bits __attribute__((vector_size(64)));
    Bits both;
    __builtin_memcpy(&both, from, sizeof both);
    weights = (__m512)(kStep == 0 ? both << 16 : both & 0xffff0000u);
  }
  template <int kStep>
  static inline Inputs broadcast(const Element* pair) {
    Inputs inputs = _mm512_set1_ps(pair[kStep]);
    asm volatile("" : "+v"(inputs));  // one after the other: GCC 12 loads so many early that sums leave the registers
    return inputs;
  }
  static inline Vector multiply_add(Vector sum, Weights weights, Inputs inputs) {
    asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
    return sum;
  }
  static inline void store_past_caches(float* to, Vector results) { _mm512_stream_ps(to, results); }
};

}  // namespace
