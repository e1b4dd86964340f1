// In place of the header of this name: VDPBF16PS as two fused multiply-adds, the odd inputs' first, which keep denormals.
#pragma once

#include "activation.hpp"
#include "vectors.hpp"

namespace {

struct Avx512Bf16 {
  using Element = uint16_t;
  using Vector = Floats;
  using Weights = Bits;
  using Inputs = Bits;
  static constexpr int kLanes = 16;
  static constexpr int kSteps = 1;
  static constexpr int kPairsAtOnce = 1;
  static constexpr int kBurnSums = 4;
  static constexpr double kFlops = 4.0 * kLanes;

  template <int>
  [[gnu::always_inline]] static inline void load(const uint32_t* from, Weights& weights) { std::memcpy(&weights, from, sizeof weights); }
  template <int>
  [[gnu::always_inline]] static inline Inputs broadcast(const Element* pair) {
    uint32_t both;
    std::memcpy(&both, pair, sizeof both);
    return Bits{} + both;
  }
  [[gnu::always_inline]] static inline Vector multiply_add(Vector sum, const Weights& weights, const Inputs& inputs) {
    for (int step = 1; step >= 0; --step) add_product(sum, numbers(weights, step), numbers(inputs, step));
    return sum;
  }
  [[gnu::always_inline]] static inline void store_bf16(Element* to, Vector results) {
    const auto rounded = round_bf16<kLanes>(results);
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<Element>(rounded[lane] >> 16);
  }
  [[gnu::always_inline]] static inline void store_past_caches(float* to, Vector results) { ::store_past_caches(to, results); }
};

}  // namespace
