// AVX2 with FMA: as AVX-512F, on half the width and half the registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx2 {
  using Element = float;
  using Vector = __m256;
  using Weights = __m256;
  using Inputs = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kSteps = 2;  // the even input, then the odd one
  static constexpr int kBurnSums = 12;
  static constexpr double kFlops = 2.0 * kLanes;

  template <int kStep>
  static inline Weights load(const uint32_t* from) {
    typedef uint32_t Bits __attribute__((vector_size(32)));
    Bits both;
    __builtin_memcpy(&both, from, sizeof both);
    return (__m256)(kStep == 0 ? both << 16 : both & 0xffff0000u);
  }
  template <int kStep>
  static inline Inputs broadcast(const Element* pair) {
    Inputs inputs = _mm256_set1_ps(pair[kStep]);
    asm volatile("" : "+x"(inputs));  // one after the other: GCC 12 loads so many early that sums leave the registers
    return inputs;
  }
  static inline Vector multiply_add(Vector sum, Weights weights, Inputs inputs) {
    return _mm256_fmadd_ps(weights, inputs, sum);
  }
};

}  // namespace
