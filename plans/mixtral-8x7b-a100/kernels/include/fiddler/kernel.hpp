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
//   kTokens             most tokens of a register tile
//   vectors(tokens)     of outputs beside each other in a tile of so many tokens
//   kDepthPairs         depth block of several passes: its weights and the next one's stay in the second-level cache
//   kFetchTokens        from so many tokens on one pass fetches the weights ahead of itself
//   kFetchBytes         how far ahead
#pragma once

#include "activation.hpp"
#include "layout.hpp"
#include "task.hpp"

namespace {

// sums = x[pairs][M] * w[pairs][N vectors of a row], added to `from` if that is given, all sums in registers.
// Fetches `kFetch` cache lines a pair from `next` on.
template <class Isa, int M, int N, int kFetch>
inline void strip(const typename Isa::Element* x, const uint32_t* w, int64_t pairs, const float* from, float* to,
                  int64_t to_stride, const char* next) {
  using Vector = typename Isa::Vector;
  Vector acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      acc[m][n] = Vector{};
      if (from) __builtin_memcpy(&acc[m][n], from + m * fdl::kLanes + n * Isa::kLanes, sizeof(Vector));
    }
  }
  for (int64_t p = 0; p < pairs; ++p, w += fdl::kLanes, x += 2 * M) {
#pragma GCC unroll 2
    for (int line = 0; line < kFetch; ++line) __builtin_prefetch(next + 64 * (kFetch * p + line), 0, 2);
    typename Isa::Weights wide[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) wide[n] = Isa::load(w + n * Isa::kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const typename Isa::Inputs inputs = Isa::broadcast(x + 2 * m);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[m][n] = Isa::multiply_add(acc[m][n], wide[n], inputs);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) __builtin_memcpy(to + m * to_stride + n * Isa::kLanes, &acc[m][n], sizeof(Vector));
  }
}

// One depth block of one block of outputs.
struct Block {
  const uint32_t* weights;
  int64_t pairs;
  const uint32_t* next;  // what to fetch meanwhile, as much as this block; or null
  int64_t passes;        // over these weights, in all
  int64_t pass;          // made so far: if there are several, the first two fetch one half of `next` each
};

template <class Isa, class Tile, int M>
inline void tile(int64_t tokens, const typename Isa::Element* x, Block& block, const float* from, float* to,
                 int64_t to_stride) {
  if constexpr (M > 1) {
    if (tokens < M) return tile<Isa, Tile, M - 1>(tokens, x, block, from, to, to_stride);
  }
  constexpr int N = Tile::vectors(M);
  for (int column = 0; column < fdl::kLanes; column += Isa::kLanes * N, ++block.pass) {
    const uint32_t* w = block.weights + column;
    const float* begin = from ? from + column : nullptr;
    const auto* next = reinterpret_cast<const char*>(block.next);
    if (!next || block.pass > 1)
      strip<Isa, M, N, 0>(x, w, block.pairs, begin, to + column, to_stride, nullptr);
    else if (block.passes == 1)
      strip<Isa, M, N, 2>(x, w, block.pairs, begin, to + column, to_stride, next);
    else
      strip<Isa, M, N, 1>(x, w, block.pairs, begin, to + column, to_stride, next + 64 * block.pairs * block.pass);
  }
}

// The activation of one tile's sums, laid into the intermediate's tile of M tokens.
template <class Isa>
inline void activate_tile(const fdl::Task& task, int64_t first, int64_t tokens) {
  using Element = typename Isa::Element;
  constexpr int kWidth = Isa::kLanes < fdl::kGateLanes ? Isa::kLanes : fdl::kGateLanes;
  auto* out = static_cast<Element*>(task.intermediate) + first * task.intermediate_stride +
              2 * task.intermediate_pair * tokens;
  for (int64_t m = 0; m < tokens; ++m) {
    const float* sums = task.sums + (first + m) * fdl::kLanes;
    Element row[fdl::kGateLanes];
    for (int column = 0; column < fdl::kGateLanes; column += kWidth)
      activate<kWidth>(sums + column, fdl::kBias ? task.bias + column : nullptr, row + column);
    // Infinite inputs make NaN of the padding's 0 * inf; an odd depth's partner must be zero whatever the inputs.
    for (int64_t column = task.columns; column < fdl::kGateLanes; ++column) row[column] = 0;
    for (int64_t pair = 0; pair < fdl::kGateLanes / 2; ++pair)
      __builtin_memcpy(out + 2 * (pair * tokens + m), row + 2 * pair, 2 * sizeof(Element));
  }
}

template <int L>
inline void add_bias(const fdl::Task& task, int64_t first, int64_t tokens) {
  for (int64_t token = first; token < first + tokens; ++token) {
    float* row = task.results + token * task.result_stride;
    for (int column = 0; column < fdl::kLanes; column += L) {
      const auto sum = load<L>(row + column) + load<L>(task.bias + column);
      __builtin_memcpy(row + column, &sum, sizeof sum);
    }
  }
}

// Tokens of one tile read the weights once, straight through. While there are few of them, the hardware's own prefetching is
// best; with more, the multiplications hold it up, and the weights are fetched explicitly. Several tiles cut the depth in
// blocks that they pass over in turn, while the next block is fetched: memory and multiply units work at the same time.
template <class Isa, class Tile>
inline void run(const fdl::Task& task) {
  using Element = typename Isa::Element;
  constexpr int64_t kAheadRows = Tile::kFetchBytes / fdl::kRowBytes;
  const Tiles tiles(task.tokens, Tile::kTokens);
  const int64_t passes = tiles.count * fdl::kLanes / (Isa::kLanes * Tile::vectors(static_cast<int>(tiles.most())));
  const int64_t step = passes == 1 ? task.pairs : Tile::kDepthPairs;
  const auto* activations = static_cast<const Element*>(task.activations);
  for (int64_t first = 0; first < task.pairs; first += step) {
    const bool last = first + step >= task.pairs;
    Block block{};
    block.weights = task.weights + first * fdl::kLanes;
    block.pairs = last ? task.pairs - first : step;
    block.passes = passes;
    if (passes > 1)
      block.next = last ? task.next : block.weights + step * fdl::kLanes;
    else if (task.tokens >= Tile::kFetchTokens)
      block.next = block.weights + kAheadRows * fdl::kLanes;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t token = tiles.first(t), tokens = tiles.tokens(t);
      const Element* x = activations + token * task.activation_stride + 2 * (task.first_pair + first) * tokens;
      float* sums = task.sums + token * fdl::kLanes;
      const bool result = last && task.phase == fdl::Phase::down;
      tile<Isa, Tile, Tile::kTokens>(tokens, x, block, first ? sums : nullptr,
                                     result ? task.results + token * task.result_stride : sums,
                                     result ? task.result_stride : fdl::kLanes);
      if (!last) continue;
      if (!result)
        activate_tile<Isa>(task, token, tokens);
      else if constexpr (fdl::kBias)
        add_bias<Isa::kLanes>(task, token, tokens);
    }
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
