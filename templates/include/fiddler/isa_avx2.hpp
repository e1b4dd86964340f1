// AVX2 with FMA: as AVX-512F, on half the width and half the registers.
//
// A tile of 3 x 4 takes all sixteen, one of 6 x 2 fifteen. Instructions beside the multiplies count: a core takes six a
// cycle, and half of that where another thread has it too. So odd inputs' weights are blended from memory into the even ones',
// without a mask, and all is asm: left to itself GCC 12 loads early or writes a sum to another register than its own.
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
  static constexpr int kPairsAtOnce = 4;
  static constexpr int kBurnSums = 12;
  static constexpr double kFlops = 2.0 * kLanes;

  template <int kStep>
  static inline void load(const uint32_t* from, Weights& weights) {
    typedef Weights Stored __attribute__((aligned(4), may_alias));
    const Stored& both = *reinterpret_cast<const Stored*>(from);
    if constexpr (kStep == 0)
      asm volatile("vmovups %1, %0\n\tvpslld $16, %0, %0" : "=x"(weights) : "m"(both));
    else  // what is there has zeros in the lower halves
      asm volatile("vpblendw $0xaa, %1, %0, %0" : "+x"(weights) : "m"(both));
  }
  template <int kStep>
  static inline Inputs broadcast(const Element* pair) {
    Inputs inputs;
    asm volatile("vbroadcastss %1, %0" : "=x"(inputs) : "m"(pair[kStep]));
    return inputs;
  }
  static inline Vector multiply_add(Vector sum, Weights weights, Inputs inputs) {
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(inputs));
    return sum;
  }
  static inline void store_past_caches(float* to, Vector results) { _mm256_stream_ps(to, results); }
};

}  // namespace
