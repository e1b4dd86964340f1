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
//   kBurnSums           independent sums that keep the multiply units busy
// A Tile provides
//   kTokens             of a full register tile
//   vectors(tokens)     of outputs beside each other in a tile of so many tokens
//   kNearPairs          depth block in the first-level cache, for a few passes over the weights
//   kFarPairs           depth block in the second-level cache, for many
#pragma once

#include "activation.hpp"
#include "layout.hpp"
#include "task.hpp"

namespace {

// Where the weights of the next depth block are fetched to while this one is worked on.
enum class Ahead { nothing, near, far };

// From so many passes on, storing and loading the sums after every near block costs more than fetching from further away.
constexpr int64_t kManyPasses = 9;

// sums[M][N vectors] (+)= x[M][pairs] * w[pairs][N vectors], all sums in registers. Fetches 128 bytes a pair ahead.
template <class Isa, int M, int N, Ahead ahead>
inline void strip(const typename Isa::Element* const* x, const uint32_t* w, int64_t pairs, float* sums,
                  int64_t sum_stride, bool add, const char* next) {
  using Vector = typename Isa::Vector;
  Vector acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      acc[m][n] = Vector{};
      if (add) __builtin_memcpy(&acc[m][n], sums + m * sum_stride + n * Isa::kLanes, sizeof(Vector));
    }
  }
  const typename Isa::Element* row[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) row[m] = x[m];
  for (int64_t p = 0; p < pairs; ++p, w += fdl::kLanes) {
    if constexpr (ahead != Ahead::nothing) {
      constexpr int kLevel = ahead == Ahead::near ? 3 : 2;
      __builtin_prefetch(next + 128 * p, 0, kLevel);
      __builtin_prefetch(next + 128 * p + 64, 0, kLevel);
    }
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
      __builtin_memcpy(sums + m * sum_stride + n * Isa::kLanes, &acc[m][n], sizeof(Vector));
  }
}

// One depth block of one block of outputs.
struct Block {
  const uint32_t* weights;
  int64_t pairs;
  bool add;                  // to the sums of earlier depth blocks
  Ahead ahead;
  const uint32_t* next;      // what to fetch ahead, as much as this block
  int64_t passes;            // made over these weights so far: the first two fetch one half of `next` each
};

template <class Isa, class Tile, int M>
inline void tile(int64_t tokens, const typename Isa::Element* const* x, Block& block, float* sums, int64_t stride) {
  if constexpr (M > 1) {
    if (tokens < M) return tile<Isa, Tile, M - 1>(tokens, x, block, sums, stride);
  }
  constexpr int N = Tile::vectors(M);
  for (int column = 0; column < fdl::kLanes; column += Isa::kLanes * N, ++block.passes) {
    const uint32_t* w = block.weights + column;
    const Ahead ahead = block.passes < 2 ? block.ahead : Ahead::nothing;
    const char* next = reinterpret_cast<const char*>(block.next) + 128 * block.pairs * block.passes;
    if (ahead == Ahead::near)
      strip<Isa, M, N, Ahead::near>(x, w, block.pairs, sums + column, stride, block.add, next);
    else if (ahead == Ahead::far)
      strip<Isa, M, N, Ahead::far>(x, w, block.pairs, sums + column, stride, block.add, next);
    else
      strip<Isa, M, N, Ahead::nothing>(x, w, block.pairs, sums + column, stride, block.add, nullptr);
  }
}

// sums[tokens][64] = activations * weights over the whole depth.
//
// When one pass over the weights does for all tokens they are read once, straight through: the hardware's own prefetching is
// best at that. Otherwise the depth is cut in blocks that stay in a cache while the tiles pass over them, and the next
// block is fetched meanwhile: memory and multiply units work at the same time.
template <class Isa, class Tile>
inline void multiply(const fdl::Task& task) {
  using Element = typename Isa::Element;
  const int64_t pairs = task.pairs;
  const int64_t tiles = (task.tokens + Tile::kTokens - 1) / Tile::kTokens;
  const int64_t least = task.tokens / tiles;
  const int64_t larger = task.tokens % tiles;  // so many tiles have one token more: no tile is nearly empty
  const int64_t passes = tiles * fdl::kLanes / (Isa::kLanes * Tile::vectors(static_cast<int>(least + (larger > 0))));
  const bool far = passes >= kManyPasses;
  const int64_t step = passes == 1 ? pairs : far ? Tile::kFarPairs : Tile::kNearPairs;
  const auto* activations = static_cast<const Element*>(task.activations);
  for (int64_t first = 0; first < pairs; first += step) {
    Block block{};
    block.weights = task.weights + first * fdl::kLanes;
    block.pairs = pairs - first < step ? pairs - first : step;
    block.add = first > 0;
    block.next = first + step < pairs ? block.weights + step * fdl::kLanes : task.next;
    block.ahead = passes == 1 || !block.next ? Ahead::nothing : far ? Ahead::far : Ahead::near;
    int64_t token = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t count = least + (t < larger);
      const Element* x[Tile::kTokens];
      for (int64_t m = 0; m < count; ++m) {
        const int64_t row = task.rows ? task.rows[token + m] : token + m;
        x[m] = activations + row * task.activation_stride + 2 * first;
      }
      tile<Isa, Tile, Tile::kTokens>(count, x, block, task.sums + token * task.sum_stride, task.sum_stride);
      token += count;
    }
  }
}

template <int L>
inline void add_bias(const fdl::Task& task) {
  for (int64_t token = 0; token < task.tokens; ++token) {
    float* row = task.sums + token * task.sum_stride;
    for (int column = 0; column < fdl::kLanes; column += L) {
      const auto sum = load<L>(row + column) + load<L>(task.bias + column);
      __builtin_memcpy(row + column, &sum, sizeof sum);
    }
  }
}

template <class Isa, class Tile>
inline void run(const fdl::Task& task) {
  using Element = typename Isa::Element;
  multiply<Isa, Tile>(task);
  if (task.phase == fdl::Phase::down) {
    if constexpr (fdl::kBias) add_bias<Isa::kLanes>(task);
    return;
  }
  constexpr int kWidth = Isa::kLanes < fdl::kGateLanes ? Isa::kLanes : fdl::kGateLanes;
  for (int64_t token = 0; token < task.tokens; ++token) {
    const float* sums = task.sums + token * task.sum_stride;
    Element* out = static_cast<Element*>(task.intermediate) + token * task.intermediate_stride;
    for (int column = 0; column < fdl::kGateLanes; column += kWidth)
      activate<kWidth>(sums + column, fdl::kBias ? task.bias + column : nullptr, out + column);
    // Infinite inputs make NaN of the padding's 0 * inf; an odd depth's partner must be zero whatever the inputs.
    for (int64_t column = task.columns; column < fdl::kGateLanes; ++column) out[column] = 0;
  }
}

// The peak probe: as many independent sums as it takes for latency not to show. Returns the operations done.
template <class Isa>
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

// The bandwidth probe: reads with the variant's loads, as many bytes as are whole packed rows.
template <class Isa>
inline void read(const void* data, int64_t bytes) {
  typedef uint32_t Bits __attribute__((vector_size(Isa::kLanes * 4)));
  constexpr int kVectors = fdl::kLanes / Isa::kLanes;
  Bits sums[kVectors] = {};
  const auto* row = static_cast<const char*>(data);
  for (int64_t i = 0; i < bytes / fdl::kRowBytes; ++i, row += fdl::kRowBytes) {
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) {
      Bits bits;
      __builtin_memcpy(&bits, row + n * sizeof(Bits), sizeof bits);
      sums[n] ^= bits;
    }
  }
  for (int n = 0; n < kVectors; ++n) asm volatile("" : : "m"(sums[n]));
}

}  // namespace
