// In place of the header of this name: the same on two vectors of AVX2.
#pragma once

#include "vectors.hpp"

namespace {

struct Avx512f {
  using Element = float;
  using Vector = Floats;
  using Weights = Floats;
  using Inputs = Floats;
  static constexpr int kLanes = 16;
  static constexpr int kSteps = 2;
  static constexpr int kPairsAtOnce = 1;
  static constexpr int kBurnSums = 4;
  static constexpr double kFlops = 2.0 * kLanes;

  template <int kStep>
  [[gnu::always_inline]] static inline void load(const uint32_t* from, Weights& weights) {
    Bits pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    weights = numbers(pairs, kStep);
  }
  template <int kStep>
  [[gnu::always_inline]] static inline Inputs broadcast(const Element* pair) { return Floats{} + pair[kStep]; }
  [[gnu::always_inline]] static inline Vector multiply_add(Vector sum, const Weights& weights, const Inputs& inputs) {
    add_product(sum, weights, inputs);
    return sum;
  }
  [[gnu::always_inline]] static inline void store_past_caches(float* to, Vector results) { ::store_past_caches(to, results); }
};

}  // namespace
