// The computing half of a kernel: one Task on the instruction set `Isa`, with register tiles as `Tile` says.
//
// Compiled once per instruction set with that set's flags. Everything here has internal linkage, and no library header with
// inline functions is included: the linker must never find an AVX-512 copy of a function that baseline code also uses.
//
// An Isa provides
//   Element             of the activations: uint16_t (bf16) or float
//   kLanes              outputs per vector
//   Vector              kLanes fp32 sums
//   Weights load(const uint32_t*)              two inputs' weights for kLanes outputs
//   Inputs broadcast(const Element*)           two inputs of one token, to all lanes
//   Vector multiply_add(Vector, Weights, Inputs)
//   kFlops              floating-point operations of one multiply_add
// A Tile provides kTokens, kVectors (by tokens) and kPairs, the depth block.
#pragma once

#include "activation.hpp"
#include "layout.hpp"
#include "task.hpp"

namespace {

// sums[M][64] (+)= x[M][pairs] * w[pairs][64], N vectors of outputs at a time.
template <class Isa, int M, int N>
inline void tile(const typename Isa::Element* const* x, const uint32_t* weights, int64_t pairs, float* sums,
                 int64_t sum_stride, bool add) {
  using Vector = typename Isa::Vector;
  constexpr int kWidth = Isa::kLanes * N;
  for (int column = 0; column < fdl::kLanes; column += kWidth) {
    Vector acc[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        acc[m][n] = Vector{};
        if (add) __builtin_memcpy(&acc[m][n], sums + m * sum_stride + column + n * Isa::kLanes, sizeof(Vector));
      }
    }
    const typename Isa::Element* row[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) row[m] = x[m];
    const uint32_t* w = weights + column;
    for (int64_t p = 0; p < pairs; ++p, w += fdl::kLanes) {
      typename Isa::Weights wide[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) wide[n] = Isa::load(w + n * Isa::kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const typename Isa::Inputs inputs = Isa::broadcast(row[m] + 2 * p);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) acc[m][n] = Isa::multiply_add(acc[m][n], wide[n], inputs);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n)
        __builtin_memcpy(sums + m * sum_stride + column + n * Isa::kLanes, &acc[m][n], sizeof(Vector));
    }
  }
}

template <class Isa, class Tile, int M>
inline void tile_of(int64_t tokens, const typename Isa::Element* const* x, const uint32_t* w, int64_t pairs,
                    float* sums, int64_t stride, bool add) {
  if constexpr (M > 1) {
    if (tokens < M) return tile_of<Isa, Tile, M - 1>(tokens, x, w, pairs, sums, stride, add);
  }
  tile<Isa, M, Tile::vectors(M)>(x, w, pairs, sums, stride, add);
}

// sums[tokens][64] = activations * weights over the whole depth. The weights of a depth block stay in the cache while the
// tokens' tiles pass over them; when one tile holds all tokens the weights are read once, straight through.
template <class Isa, class Tile>
inline void multiply(const fdl::Task& task, int64_t pairs) {
  using Element = typename Isa::Element;
  const int64_t tiles = (task.tokens + Tile::kTokens - 1) / Tile::kTokens;
  const int64_t least = task.tokens / tiles;
  const int64_t larger = task.tokens % tiles;  // so many tiles have one token more: no tile is nearly empty
  const int64_t step = tiles == 1 ? pairs : Tile::kPairs;
  const auto* activations = static_cast<const Element*>(task.activations);
  for (int64_t first = 0; first < pairs; first += step) {
    const int64_t depth = pairs - first < step ? pairs - first : step;
    int64_t token = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t count = least + (t < larger);
      const Element* x[Tile::kTokens];
      for (int64_t m = 0; m < count; ++m) {
        const int64_t row = task.rows ? task.rows[token + m] : token + m;
        x[m] = activations + row * task.activation_stride + 2 * first;
      }
      tile_of<Isa, Tile, Tile::kTokens>(count, x, task.weights + first * fdl::kLanes, depth,
                                        task.sums + token * task.sum_stride, task.sum_stride, first > 0);
      token += count;
    }
  }
}

template <class Isa, class Tile>
inline void run(const fdl::Task& task) {
  using Element = typename Isa::Element;
  if (task.phase == fdl::Phase::down) return multiply<Isa, Tile>(task, fdl::kIntermediatePairs);
  multiply<Isa, Tile>(task, fdl::kHiddenPairs);
  constexpr int kWidth = Isa::kLanes < fdl::kGateLanes ? Isa::kLanes : fdl::kGateLanes;
  for (int64_t token = 0; token < task.tokens; ++token) {
    const float* gate = task.sums + token * task.sum_stride;
    Element* out = static_cast<Element*>(task.intermediate) + token * task.intermediate_stride;
    for (int column = 0; column < fdl::kGateLanes; column += kWidth)
      activate<kWidth>(gate + column, gate + fdl::kGateLanes + column, out + column);
    // Infinite inputs make NaN of the padding's 0 * inf; an odd depth's partner must be zero whatever the inputs.
    for (int64_t column = task.columns; column < fdl::kGateLanes; ++column) out[column] = 0;
  }
}

// As many independent sums as the registers hold, so that latency does not show.
template <class Isa, class Tile>
inline double burn(int64_t steps) {
  constexpr int kSums = Isa::kBurnSums;
  typename Isa::Vector acc[kSums] = {};
  typename Isa::Element one[2] = {};
  uint32_t lanes[Isa::kLanes] = {};
  asm volatile("" : : "r"(one), "r"(lanes) : "memory");
  typename Isa::Weights weights = Isa::load(lanes);
  typename Isa::Inputs inputs = Isa::broadcast(one);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) acc[i] = Isa::multiply_add(acc[i], weights, inputs);
  }
  for (int i = 0; i < kSums; ++i) asm volatile("" : : "m"(acc[i]));
  return static_cast<double>(steps) * kSums * Isa::kFlops;
}

}  // namespace
