// Baseline x86-64 without intrinsics: slow, simple, and what the others are compared with.
#pragma once

#include <cstdint>

namespace {

struct Scalar {
  using Element = float;
  typedef float Vector __attribute__((vector_size(16)));
  struct Weights {
    Vector even, odd;
  };
  struct Inputs {
    float even, odd;
  };
  static constexpr int kLanes = 4;
  static constexpr int kBurnSums = 8;
  static constexpr double kFlops = 4.0 * kLanes;

  static inline Weights load(const uint32_t* from) {
    typedef uint32_t Bits __attribute__((vector_size(16)));
    Bits both;
    __builtin_memcpy(&both, from, sizeof both);
    return {(Vector)(both << 16), (Vector)(both & 0xffff0000u)};
  }
  static inline Inputs broadcast(const Element* pair) { return {pair[0], pair[1]}; }
  static inline Vector multiply_add(Vector sum, const Weights& weights, const Inputs& inputs) {
    sum += weights.even * inputs.even;
    return sum + weights.odd * inputs.odd;
  }
};

}  // namespace
