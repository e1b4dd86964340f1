// What an expert does between its two multiplications, and the rounding to bf16, on vectors of any width.
//
// Only IEEE operations that round once (no fused multiply-add, see -ffp-contract=off), in one order: every instruction set
// gives the same bits, but for denormals where an Isa's own rounding takes them for zero.
#pragma once

#include <cstdint>

#include "layout.hpp"

namespace {

template <int L>
struct Lanes {
  typedef float Float __attribute__((vector_size(L * 4)));
  typedef uint32_t Bits __attribute__((vector_size(L * 4)));
};

template <class To, class From>
inline To bits_of(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  __builtin_memcpy(&out, &value, sizeof out);
  return out;
}

template <int L>
inline typename Lanes<L>::Float load(const float* from) {
  typename Lanes<L>::Float out;
  __builtin_memcpy(&out, from, sizeof out);
  return out;
}

// e^t to 2 ulp; above the largest float's logarithm infinity, below -87 about e^-87 (too little to matter). NaN stays NaN.
// Range reduction and polynomial: Cephes expf (S. L. Moshier).
template <int L>
inline typename Lanes<L>::Float exponential(typename Lanes<L>::Float t) {
  using Float = typename Lanes<L>::Float;
  using Bits = typename Lanes<L>::Bits;
  constexpr float kLargest = 88.7228317f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  const Float zero = {};
  const auto overflow = t > kLargest;
  t = t < -87.0f ? zero - 87.0f : t;
  const Float shifted = t * 1.44269504088896341f + kRound;
  const Float n = shifted - kRound;
  const Float r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
  Float y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  y = bits_of<Float>(bits_of<Bits>(y) + (bits_of<Bits>(shifted) << 23));
  return overflow ? zero + __builtin_inff() : y;
}

// fp32 bits of the nearest bf16, ties to even; NaN becomes a quiet NaN.
template <int L>
inline typename Lanes<L>::Bits round_bf16(typename Lanes<L>::Float value) {
  using Bits = typename Lanes<L>::Bits;
  const Bits bits = bits_of<Bits>(value);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits kept = (bits & 0x7fffffffu) > 0x7f800000u ? (bits | 0x00400000u) : rounded;
  return kept & 0xffff0000u;
}

// x / (1 + e^-y): silu where y is x.
template <int L>
inline typename Lanes<L>::Float times_sigmoid(typename Lanes<L>::Float x, typename Lanes<L>::Float y) {
  const typename Lanes<L>::Float zero = {};
  return x / (exponential<L>(zero - y) + 1.0f);
}

// x times the normal distribution function: the exact GELU. Phi(-a) = e^(-a^2/2) t S(t) with t = 1 / (1 + 0.3 a), where S
// was fitted to scipy's erfcx for a <= 13.5 (largest relative error in fp32 4.6e-7); smaller results do not matter.
template <int L>
inline typename Lanes<L>::Float gelu(typename Lanes<L>::Float x) {
  using Float = typename Lanes<L>::Float;
  const Float zero = {};
  const Float a = x < 0.0f ? zero - x : x;
  const Float t = 1.0f / (a * 0.3f + 1.0f);
  Float s = t * 3.593173623e-02f - 1.582760066e-01f;
  s = s * t + 2.082066238e-01f;
  s = s * t - 5.539385602e-02f;
  s = s * t + 1.294692010e-01f;
  s = s * t + 9.963749349e-02f;
  s = s * t + 1.207983568e-01f;
  s = s * t + 1.196263880e-01f;
  const Float tail = exponential<L>(a * a * -0.5f) * (s * t);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// One expert's nonlinearity in fp32: gate and up to what is multiplied by down.
template <fdl::Activation activation, int L>
inline typename Lanes<L>::Float gated(typename Lanes<L>::Float gate, typename Lanes<L>::Float up) {
  using fdl::Activation;
  if constexpr (activation == Activation::silu) {
    return times_sigmoid<L>(gate, gate) * up;
  } else if constexpr (activation == Activation::gptoss) {
    // Comparisons are false for NaN, which therefore stays.
    const typename Lanes<L>::Float limit = typename Lanes<L>::Float{} + 7.0f;
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return times_sigmoid<L>(gate, gate * 1.702f) * (up + 1.0f);
  } else if constexpr (activation == Activation::gelu) {
    return gelu<L>(gate) * up;
  } else {
    static_assert(activation == Activation::gelu_tanh);
    // (1 + tanh y) / 2 = 1 / (1 + e^-2y), with y = sqrt(2 / pi) (x + 0.044715 x^3).
    const auto cubic = gate + gate * gate * gate * 0.044715f;
    return times_sigmoid<L>(gate, cubic * 1.5957691216057308f) * up;
  }
}

// L columns of an expert's intermediate as bf16, stored as the Isa's elements: bf16 or fp32. bias: of the gate columns, with
// those of the up columns kGateLanes further; not read where experts have none.
template <class Isa, int L>
inline void activate(const float* sums, const float* bias, typename Isa::Element* out) {
  auto gate = load<L>(sums), up = load<L>(sums + fdl::kGateLanes);
  if constexpr (fdl::kBias) {
    gate += load<L>(bias);
    up += load<L>(bias + fdl::kGateLanes);
  }
  const auto value = gated<fdl::kActivation, L>(gate, up);
  if constexpr (sizeof(typename Isa::Element) == 2) {
    Isa::store_bf16(out, (typename Isa::Vector)value);
  } else {
    const auto rounded = round_bf16<L>(value);
    __builtin_memcpy(out, &rounded, sizeof rounded);
  }
}

}  // namespace
