// AVX2 with FMA: as AVX-512F, on half the width and half the registers.
//
// All sixteen hold something in a tile of 6 x 2 or 3 x 4. Left to itself GCC 12 keeps the mask in one, loads early, or
// writes a sum to another register than its own: each is a sum too many, and costs a quarter of the speed. Hence the asm.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

alignas(32) constexpr uint32_t kUpperHalves[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                  0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};

struct Avx2 {
  using Element = float;
  using Vector = __m256;
  using Weights = __m256;
  using Inputs = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kSteps = 2;  // the even input, then the odd one
  static constexpr int kBurnSums = 12;
  static constexpr double kFlops = 2.0 * kLanes;

  template <int kStep, int kTaken>
  static inline Weights load(const uint32_t* from) {
    typedef Weights Stored __attribute__((aligned(4), may_alias));
    const Stored& both = *reinterpret_cast<const Stored*>(from);
    const Weights& mask = reinterpret_cast<const Weights&>(kUpperHalves);
    Weights weights;
    if constexpr (kStep == 1 && kTaken < 15) {  // with sixteen GCC 12 moves sums
      asm volatile("vpand %2, %1, %0" : "=x"(weights) : "x"(mask), "m"(both));
    } else {
      weights = both;
      if constexpr (kStep == 0)
        asm volatile("vpslld $16, %0, %0" : "+x"(weights));
      else
        asm volatile("vpand %1, %0, %0" : "+x"(weights) : "m"(mask));
    }
    return weights;
  }
  template <int kStep>
  static inline Inputs broadcast(const Element* pair) {
    Inputs inputs = _mm256_set1_ps(pair[kStep]);
    asm volatile("" : "+x"(inputs));
    return inputs;
  }
  static inline Vector multiply_add(Vector sum, Weights weights, Inputs inputs) {
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(inputs));
    return sum;
  }
  static inline void store_past_caches(float* to, Vector results) { _mm256_stream_ps(to, results); }
};

}  // namespace
