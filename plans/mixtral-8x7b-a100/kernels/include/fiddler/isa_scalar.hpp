// Baseline x86-64 without intrinsics: slow, simple, and what the others are compared with.
//
// The empty asm statements keep what they name in a register and in this order: left to itself GCC 12 loads so much early
// that sums leave the registers.
#pragma once

#include <cstdint>

namespace {

struct Scalar {
  using Element = float;
  typedef float Vector __attribute__((vector_size(16)));
  using Weights = Vector;
  using Inputs = Vector;
  static constexpr int kLanes = 4;
  static constexpr int kSteps = 2;  // the even input, then the odd one
  static constexpr int kPairsAtOnce = 1;
  static constexpr int kBurnSums = 8;
  static constexpr double kFlops = 2.0 * kLanes;

  template <int kStep>
  static inline void load(const uint32_t* from, Weights& weights) {
    typedef uint32_t Bits __attribute__((vector_size(16)));
    Bits both;
    __builtin_memcpy(&both, from, sizeof both);
    weights = (Vector)(kStep == 0 ? both << 16 : both & 0xffff0000u);
    asm volatile("" : "+x"(weights));
  }
  template <int kStep>
  static inline Inputs broadcast(const Element* pair) {
    Inputs inputs = {pair[kStep], pair[kStep], pair[kStep], pair[kStep]};
    asm volatile("" : "+x"(inputs));
    return inputs;
  }
  static inline Vector multiply_add(Vector sum, Weights weights, Inputs inputs) {
    Vector product = weights;
    asm volatile("" : "+x"(product));
    product *= inputs;
    asm volatile("" : "+x"(product));
    sum += product;
    asm volatile("" : "+x"(sum));
    return sum;
  }
  // Not past them: there is no such store without intrinsics.
  static inline void store_past_caches(float* to, Vector results) { __builtin_memcpy(to, &results, sizeof results); }
};

}  // namespace
