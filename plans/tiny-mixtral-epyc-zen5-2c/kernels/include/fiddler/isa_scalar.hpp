// Baseline x86-64 without intrinsics: slow, simple, and what the others are compared with.
#pragma once

#include <cstdint>

namespace {

struct Scalar {
  using Element = float;
  typedef float Vector __attribute__((vector_size(16)));
  using Weights = Vector;
  using Inputs = float;
  static constexpr int kLanes = 4;
  static constexpr int kSteps = 2;  // the even input, then the odd one
  static constexpr int kBurnSums = 8;
  static constexpr double kFlops = 2.0 * kLanes;

  template <int kStep>
  static inline Weights load(const uint32_t* from) {
    typedef uint32_t Bits __attribute__((vector_size(16)));
    Bits both;
    __builtin_memcpy(&both, from, sizeof both);
    return (Vector)(kStep == 0 ? both << 16 : both & 0xffff0000u);
  }
  template <int kStep>
  static inline Inputs broadcast(const Element* pair) {
    return pair[kStep];
  }
  static inline Vector multiply_add(Vector sum, Weights weights, Inputs inputs) { return sum + weights * inputs; }
  // Not past them: there is no such store without intrinsics.
  static inline void store_past_caches(float* to, Vector results) { __builtin_memcpy(to, &results, sizeof results); }
};

}  // namespace
