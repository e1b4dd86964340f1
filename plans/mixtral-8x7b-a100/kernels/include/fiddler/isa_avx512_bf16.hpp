// AVX-512 with VDPBF16PS: two bf16 products and a sum per lane and instruction. It flushes denormals to zero.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx512Bf16 {
  using Element = uint16_t;
  using Vector = __m512;
  using Weights = __m512i;
  using Inputs = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kSteps = 1;
  static constexpr int kPairsAtOnce = 1;
  static constexpr int kBurnSums = 24;
  static constexpr double kFlops = 4.0 * kLanes;

  template <int>
  static inline void load(const uint32_t* from, Weights& weights) {
    weights = _mm512_loadu_si512(from);
    asm("" : "+v"(weights));  // in a register: GCC 12 loads them again for every token
  }
  template <int>
  static inline Inputs broadcast(const Element* pair) {
    int32_t both;
    __builtin_memcpy(&both, pair, sizeof both);
    return _mm512_set1_epi32(both);
  }
  static inline Vector multiply_add(Vector sum, Weights weights, Inputs inputs) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)inputs);
  }
  // Takes denormals for zero, as the multiplies would.
  static inline void store_bf16(Element* to, Vector results) {
    const __m256bh rounded = _mm512_cvtneps_pbh(results);
    __builtin_memcpy(to, &rounded, sizeof rounded);
  }
  static inline void store_past_caches(float* to, Vector results) { _mm512_stream_ps(to, results); }
};

}  // namespace
