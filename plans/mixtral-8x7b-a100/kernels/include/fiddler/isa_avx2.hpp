// AVX2 with FMA: as AVX-512F, on half the width and half the registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx2 {
  using Element = float;
  using Vector = __m256;
  struct Weights {
    __m256 even, odd;
  };
  struct Inputs {
    __m256 even, odd;
  };
  static constexpr int kLanes = 8;
  static constexpr int kBurnSums = 12;
  static constexpr double kFlops = 4.0 * kLanes;

  static inline Weights load(const uint32_t* from) {
    typedef uint32_t Bits __attribute__((vector_size(32)));
    Bits both;
    __builtin_memcpy(&both, from, sizeof both);
    return {(__m256)(both << 16), (__m256)(both & 0xffff0000u)};
  }
  static inline Inputs broadcast(const Element* pair) { return {_mm256_set1_ps(pair[0]), _mm256_set1_ps(pair[1])}; }
  static inline Vector multiply_add(Vector sum, const Weights& weights, const Inputs& inputs) {
    return _mm256_fmadd_ps(weights.odd, inputs.odd, _mm256_fmadd_ps(weights.even, inputs.even, sum));
  }
};

}  // namespace
