// silu(gate) * up and the rounding to bf16, on vectors of any width.
//
// Only IEEE operations that round once (no fused multiply-add, see -ffp-contract=off), in one order: every instruction set
// gives the same bits.
#pragma once

#include <cstdint>

namespace {

template <int L>
struct Lanes {
  typedef float Float __attribute__((vector_size(L * 4)));
  typedef uint32_t Bits __attribute__((vector_size(L * 4)));
  typedef int32_t Mask __attribute__((vector_size(L * 4)));
  typedef uint16_t Half __attribute__((vector_size(L * 2)));
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

// e^t to 2 ulp; above the largest float's logarithm infinity, below -87 about e^-87 (it is added to 1). NaN stays NaN.
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

// L columns of silu(gate) * up as bf16, stored as bf16 or as fp32.
template <int L, class Element>
inline void activate(const float* gate, const float* up, Element* out) {
  using Float = typename Lanes<L>::Float;
  const Float g = load<L>(gate);
  const Float zero = {};
  const Float silu = g / (exponential<L>(zero - g) + 1.0f);
  const auto rounded = round_bf16<L>(silu * load<L>(up));
  if constexpr (sizeof(Element) == 2) {
    const auto half = __builtin_convertvector(rounded >> 16, typename Lanes<L>::Half);
    __builtin_memcpy(out, &half, sizeof half);
  } else {
    __builtin_memcpy(out, &rounded, sizeof rounded);
  }
}

}  // namespace
