// The computing half of a kernel: one Task on the instruction set `Isa`, with register tiles as `Tile` says.
//
// Compiled once per instruction set with that set's flags. Everything here has internal linkage, and no library header with
// inline functions is included: the linker must never find an AVX-512 copy of a function that baseline code also uses.
//
// An Isa provides
//   Element             of the activations: uint16_t (bf16) or float
//   kLanes              outputs per vector
//   kSteps              multiply_adds that it takes for a pair of inputs
//   kPairsAtOnce        pairs of one step of a loop: its own instructions weigh where the multiplies of a pair are few
//   Vector              kLanes fp32 sums
//   void load<step>(const uint32_t*, Weights&)  of a pair of inputs for kLanes outputs, what that step multiplies; the
//                       second step finds there what a first one left, of whichever outputs
//   Inputs broadcast<step>(const Element*)     of one token's pair of inputs, to all lanes
//   Vector multiply_add(Vector, Weights, Inputs)
//   void store_past_caches(float*, Vector)     to a multiple of its size
//   void store_bf16(Element*, Vector)          if Element is bf16: the nearest ones, ties to even; denormals may be zero
//   kFlops              floating-point operations of one multiply_add
//   kBurnSums           independent sums that keep the multiply units busy
// A Tile provides
//   kTokens             most tokens of a register tile
//   kLastTokens         of the last of several, where the others can be so few all the same; or 0
//   vectors(tokens)     of outputs beside each other in a tile of so many tokens
//   kPlaces             of a block's depth that one pass reads in turn: several streams from memory
//   kDepthPairs         depth block of several tiles: its weights and the next one's stay in the second-level cache; a single
//                       tile's is half as deep
//   kFetchTokens        from so many tokens on one pass fetches the weights ahead of itself
//   kFetchBytes         how far ahead, of all places together
//   kFetchLevel         into which cache, 1 or 2
#pragma once

#include "activation.hpp"
#include "layout.hpp"
#include "task.hpp"

namespace {

// Elements from a token's activations to the next one's. A constant, so that one register holds all addresses of a register tile's.
template <class Isa>
constexpr int64_t kStride = row_bytes(sizeof(typename Isa::Element)) / sizeof(typename Isa::Element);

// One depth block of one block of outputs.
struct Block {
  const uint32_t* weights;
  int64_t pairs;
  const uint32_t* next;  // what to fetch meanwhile: several passes the next depth block, one pass the next block; or null
  int64_t passes;        // over these weights, in all
  int64_t pass;          // made so far: several fetch `next` as evenly as they can
};

// Where a strip fetches: from `at` on, so many bytes further with each pair; after `pairs` of them from `then` on. One of
// two passes: from `then` on as well.
struct Fetch {
  const char* at;
  int64_t pairs;
  const char* then;
};

// One step of a pair of inputs. A step holds its own weights alone, or, if that is less, its own inputs: the registers are
// the sums'. `weights`: what a first step left.
template <class Isa, int kStep, int M, int N>
[[gnu::always_inline]] inline void multiply(typename Isa::Vector (&acc)[M][N], typename Isa::Weights (&weights)[N],
                                            const typename Isa::Element* x, const uint32_t* w) {
  if constexpr (M < N) {
    typename Isa::Inputs inputs[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) inputs[m] = Isa::template broadcast<kStep>(x + m * kStride<Isa>);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      Isa::template load<kStep>(w + n * Isa::kLanes, weights[0]);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[m][n] = Isa::multiply_add(acc[m][n], weights[0], inputs[m]);
    }
  } else {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) Isa::template load<kStep>(w + n * Isa::kLanes, weights[n]);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const typename Isa::Inputs inputs = Isa::template broadcast<kStep>(x + m * kStride<Isa>);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[m][n] = Isa::multiply_add(acc[m][n], weights[n], inputs);
    }
  }
}

// What a strip fetches is kFetch: rows that it soon reads itself, with each pair, into the first- (-1) or second-level cache
// (-2); or, for later passes, so many cache lines with each step of kPairsAtOnce pairs, into the second. Two passes ask for
// each line twice: a core drops a part of what it is asked for so fast.
template <class Isa, int kFetch>
constexpr bool kTwice = kFetch > 1 && kFetch == Isa::kPairsAtOnce;

// A pair of inputs at each of kPlaces places, `pairs` from one to the next, and on to the next one. `at`: which of a step's.
template <class Isa, int kPlaces, int kFetch, int M, int N>
[[gnu::always_inline]] inline void add_pair(typename Isa::Vector (&acc)[M][N], const typename Isa::Element*& x,
                                            const uint32_t*& w, int64_t pairs, const char*& fetch, int64_t again,
                                            int at) {
  if constexpr (kFetch < 0) {
    constexpr int kLocality = 4 + kFetch;  // as GCC counts: 3 is the first level
#pragma GCC unroll 4
    for (int place = 0; place < kPlaces; ++place) {
      __builtin_prefetch(fetch + place * pairs * fdl::kRowBytes, 0, kLocality);
      __builtin_prefetch(fetch + place * pairs * fdl::kRowBytes + 64, 0, kLocality);
    }
    fetch += fdl::kRowBytes;
  } else if (at * kFetch % Isa::kPairsAtOnce < kFetch) {
    __builtin_prefetch(fetch, 0, 2);
    if constexpr (kTwice<Isa, kFetch>) __builtin_prefetch(fetch + again, 0, 2);
    fetch += 64;
  }
#pragma GCC unroll 4
  for (int place = 0; place < kPlaces; ++place) {
    const typename Isa::Element* x_at = x + 2 * place * pairs;
    const uint32_t* w_at = w + place * pairs * fdl::kLanes;
    if (place) asm("" : "+r"(x_at), "+r"(w_at));  // or GCC 12 adds each vector's offset by itself
    typename Isa::Weights weights[N];
    multiply<Isa, 0>(acc, weights, x_at, w_at);
    if constexpr (Isa::kSteps == 2) multiply<Isa, 1>(acc, weights, x_at, w_at);
  }
  w += fdl::kLanes;
  x += 2;
}

// Sums of M tokens' rows by N vectors of a block's rows, added to `from` if that is given; all sums in registers. `pairs` at
// each of kPlaces places.
template <class Isa, int kPlaces, int M, int N, int kFetch>
[[gnu::always_inline]] inline void sum_strip(const typename Isa::Element* x, const uint32_t* w, int64_t pairs,
                                             const float* from, float* to, Fetch fetch) {
  using Vector = typename Isa::Vector;
  // Sums in memory. Not memcpy, which takes the address of a sum: GCC 12 then keeps some on the stack.
  typedef Vector Stored __attribute__((aligned(4), may_alias));
  constexpr int kAtOnce = kPlaces > 1 ? 1 : Isa::kPairsAtOnce;
  Vector acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
      acc[m][n] = from ? *reinterpret_cast<const Stored*>(from + m * fdl::kLanes + n * Isa::kLanes) : Vector{};
  }
  const int64_t again = fetch.then - fetch.at;
  int64_t p = 0, end = kFetch < 0 ? fetch.pairs : pairs;
  for (int part = 0; part < 1 + (kFetch < 0); ++part, end = pairs, fetch.at = fetch.then) {
    for (; p + kAtOnce <= end; p += kAtOnce) {
#pragma GCC unroll 4
      for (int pair = 0; pair < kAtOnce; ++pair)
        add_pair<Isa, kPlaces, kFetch>(acc, x, w, pairs, fetch.at, again, pair);
    }
#pragma GCC unroll 1  // or GCC 12 writes it out again, twice as much code
    for (; kAtOnce > 1 && p < end; ++p) add_pair<Isa, kPlaces, kFetch>(acc, x, w, pairs, fetch.at, again, 0);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
      *reinterpret_cast<Stored*>(to + m * fdl::kLanes + n * Isa::kLanes) = acc[m][n];
  }
}

// The same as a function of its own: where two steps share the registers, GCC 12 keeps sums on the stack if it is inlined.
template <class Isa, int kPlaces, int M, int N, int kFetch>
[[gnu::noinline]] void sum_strip_apart(const typename Isa::Element* x, const uint32_t* w, int64_t pairs,
                                       const float* from, float* to, Fetch fetch) {
  sum_strip<Isa, kPlaces, M, N, kFetch>(x, w, pairs, from, to, fetch);
}

template <class Isa, int kPlaces, int M, int N, int kFetch>
inline void strip(const typename Isa::Element* x, const uint32_t* w, int64_t pairs, const float* from, float* to,
                  Fetch fetch) {
  if constexpr (Isa::kSteps == 2)
    sum_strip_apart<Isa, kPlaces, M, N, kFetch>(x, w, pairs, from, to, fetch);
  else
    sum_strip<Isa, kPlaces, M, N, kFetch>(x, w, pairs, from, to, fetch);
}

// One of several passes, which fetches `lines` cache lines with each step.
template <class Isa, int M, int N, int kLines = Isa::kPairsAtOnce>
inline void pass_strip(int64_t lines, const typename Isa::Element* x, const uint32_t* w, int64_t pairs, const float* from,
                       float* to, const char* at, const char* again) {
  if constexpr (kLines > 0) {
    if (lines < kLines) return pass_strip<Isa, M, N, kLines - 1>(lines, x, w, pairs, from, to, at, again);
  }
  strip<Isa, 1, M, N, kLines>(x, w, pairs, from, to, {at, pairs, again});
}

template <class Isa, class Tile, int kPlaces, int M = Tile::kTokens>
inline void tile(int64_t tokens, const typename Isa::Element* x, Block& block, const float* from, float* to) {
  if constexpr (M > 1) {
    if (tokens < M) return tile<Isa, Tile, kPlaces, M - 1>(tokens, x, block, from, to);
  }
  constexpr int N = Tile::vectors(M), kVectors = fdl::kLanes / Isa::kLanes;
  for (int column = 0; column < fdl::kLanes; column += Isa::kLanes * N, ++block.pass) {
    const uint32_t* w = block.weights + column;
    const float* begin = from ? from + column : nullptr;
    const auto* next = reinterpret_cast<const char*>(block.next);
    if (N == kVectors && block.passes == 1) {
      // Ahead in this block, and over its end into the next one.
      constexpr int64_t kAhead = Tile::kFetchBytes / fdl::kRowBytes / kPlaces;
      const int64_t pairs = block.pairs / kPlaces, most = pairs < kAhead ? 0 : pairs - kAhead;
      const auto* ahead = reinterpret_cast<const char*>(w + kAhead * fdl::kLanes);
      const Fetch fetch{ahead, most, next ? next : ahead + most * fdl::kRowBytes};
      strip<Isa, kPlaces, M, N, M >= Tile::kFetchTokens ? -Tile::kFetchLevel : 0>(x, w, pairs, begin, to + column, fetch);
    } else if constexpr (N < kVectors || 2 * M >= Tile::kTokens) {  // of several tiles none is smaller
      // Spread over the passes: what a core is asked for sooner than memory answers it drops.
      constexpr int64_t kStep = Isa::kPairsAtOnce;
      const int64_t lines = (2 * kStep + block.passes - 1) / block.passes;
      const bool asked = !next || block.pass * lines >= 2 * kStep;
      // Of two passes the first asks for the later half of this block again, the second for the first half of the next.
      const char* again = block.pass ? next : reinterpret_cast<const char*>(block.weights) + 64 * block.pairs;
      pass_strip<Isa, M, N>(asked ? 0 : lines, x, w, block.pairs, begin, to + column,
                            asked ? nullptr : next + 64 * block.pairs * lines / kStep * block.pass, again);
    }
  }
}

// The same task from a later block on.
inline fdl::Task from_block(fdl::Task task, int64_t block) {
  task.weights += block * task.weight_stride;
  if (task.bias) task.bias += block * fdl::kLanes;
  task.result_column += block * fdl::kLanes;
  task.intermediate_column += block * fdl::kGateLanes;
  task.columns -= block * (task.phase == fdl::Phase::gate_up ? fdl::kGateLanes : fdl::kLanes);
  return task;
}

// What is read after a block.
inline const uint32_t* next_block(const fdl::Task& task, int64_t block) {
  return block + 1 < task.blocks ? task.weights + (block + 1) * task.weight_stride : task.next;
}

// The activation of one token's sums.
template <class Isa>
[[gnu::always_inline]] inline void activate_row(const fdl::Task& task, const float* sums, typename Isa::Element* out) {
  constexpr int kWidth = Isa::kLanes < fdl::kGateLanes ? Isa::kLanes : fdl::kGateLanes;
  for (int column = 0; column < fdl::kGateLanes; column += kWidth)
    activate<Isa, kWidth>(sums + column, fdl::kBias ? task.bias + column : nullptr, out + column);
}

// The last block's rows, `stride` elements apart, are filled up with zeros: infinite inputs make NaN of the padding's 0 * inf,
// and an odd depth's partner must be zero whatever the inputs. Apart from activations, which with GCC 12's call of memset in
// their loop take half as long again (docs/kernels.md, AMX).
template <class Isa>
inline void fill_up(const fdl::Task& task, int64_t tokens, typename Isa::Element* out, int64_t stride) {
  constexpr int64_t kLast = (fdl::kGateUpBlocks - 1) * fdl::kGateLanes;
  const int64_t end = task.intermediate_column == kLast ? row_inputs(fdl::kIntermediate) - kLast : fdl::kGateLanes;
  if (task.columns >= end) return;
  for (int64_t m = 0; m < tokens; ++m, out += stride) {
    for (int64_t column = task.columns; column < end; ++column) out[column] = 0;
  }
}

// The results of some tokens' sums.
template <class Isa>
inline void store_sums(const fdl::Task& task, const float* sums, int64_t first, int64_t tokens) {
  constexpr int L = Isa::kLanes;
  for (int64_t m = 0; m < tokens; ++m, sums += fdl::kLanes) {
    float* const to = task.results[first + m] + task.result_column;
    const float scale = task.scales[first + m];
    const bool whole = task.columns >= fdl::kLanes;
    float row[fdl::kLanes];
    for (int column = 0; column < fdl::kLanes; column += L) {
      auto result = load<L>(sums + column);
      if constexpr (fdl::kBias) result += load<L>(task.bias + column);
      result *= scale;
      if (task.past_caches && whole)
        Isa::store_past_caches(to + column, (typename Isa::Vector)result);
      else
        __builtin_memcpy((whole ? to : row) + column, &result, sizeof result);
    }
    for (int64_t column = 0; !whole && column < task.columns; ++column) to[column] = row[column];
  }
}

// One block. `next` is worth fetching after it; or null.
//
// What one pass is enough for reads the weights once, fetched a little ahead or at several places. Several passes cut the
// depth in blocks that they take in turn, while the next one is fetched: memory and multiply units work at the same time.
template <class Isa, class Tile, fdl::Phase kPhase>
inline void run_block(const fdl::Task& task, const uint32_t* next) {
  using Element = typename Isa::Element;
  constexpr bool kGateUp = kPhase == fdl::Phase::gate_up;
  // A depth that these do not part equally is read at one place. (A split leaves out rows that they do part.)
  constexpr int64_t kPairs = kGateUp ? fdl::kHiddenPairs : fdl::kIntermediatePairs;
  constexpr int kPlaces = kPairs % Tile::kPlaces == 0 ? Tile::kPlaces : 1;
  const Parts tiles(task.tokens, Tile::kTokens, Tile::kLastTokens);
  const auto passes_of = [](int64_t tokens) { return fdl::kLanes / Isa::kLanes / Tile::vectors(static_cast<int>(tokens)); };
  const int64_t passes = tiles.equal_count() * passes_of(tiles.largest()) + (tiles.last ? passes_of(tiles.last) : 0);
  // Equal ones: as long as a block, so long takes what is fetched meanwhile. One tile moves few sums, and
  // AVX2's of 4 and 5 tokens are faster with shorter ones.
  const Parts depths(task.pairs, passes == 1 ? task.pairs : tiles.count == 1 ? Tile::kDepthPairs / 2 : Tile::kDepthPairs);
  for (int64_t d = 0; d < depths.count; ++d) {
    const int64_t first = depths.first(d);
    const bool last = d + 1 == depths.count;
    Block block{};
    block.weights = task.weights + first * fdl::kLanes;
    block.pairs = depths.size(d);
    block.passes = passes;
    block.next = last ? next : block.weights + block.pairs * fdl::kLanes;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t token = tiles.first(t), tokens = tiles.size(t);
      const Element* x = static_cast<const Element*>(task.activations) + token * kStride<Isa> + 2 * first;
      float* sums = task.sums + token * fdl::kLanes;
      if (!kGateUp && last && !task.past_caches) {  // memory lets go of a line about as fast as a tile is computed
        for (int64_t m = token; m < token + tokens; ++m)
          for (int64_t line = 0; line < fdl::kRowBytes / 64; ++line)
            __builtin_prefetch(task.results[m] + task.result_column + 16 * line, 1);
      }
      tile<Isa, Tile, kPlaces>(tokens, x, block, first ? sums : nullptr, sums);
      if (!last) continue;
      if constexpr (kGateUp) {
        auto* const out = static_cast<Element*>(task.intermediate) + token * kStride<Isa> + task.intermediate_column;
        for (int64_t m = 0; m < tokens; ++m)
          activate_row<Isa>(task, sums + m * fdl::kLanes, out + m * kStride<Isa>);
        fill_up<Isa>(task, tokens, out, kStride<Isa>);
      } else {
        store_sums<Isa>(task, sums, token, tokens);
      }
    }
  }
}

template <class Isa, class Tile, fdl::Phase kPhase>
inline void run_phase(const fdl::Task& task) {
  for (int64_t block = 0; block < task.blocks; ++block)
    run_block<Isa, Tile, kPhase>(from_block(task, block), next_block(task, block));
}

template <class Isa, class Tile>
inline void run(const fdl::Task& task) {
  if (task.phase == fdl::Phase::gate_up)
    run_phase<Isa, Tile, fdl::Phase::gate_up>(task);
  else
    run_phase<Isa, Tile, fdl::Phase::down>(task);
}

// The peak probe: as many independent sums as it takes for latency not to show. Returns the operations done.
template <class Isa>
inline double burn(int64_t steps) {
  constexpr int kSums = Isa::kBurnSums;
  typename Isa::Vector acc[kSums] = {};
  typename Isa::Element one[2] = {};
  uint32_t lanes[Isa::kLanes] = {};
  asm volatile("" : : "r"(one), "r"(lanes) : "memory");
  typename Isa::Weights weights;
  Isa::template load<0>(lanes, weights);
  typename Isa::Inputs inputs = Isa::template broadcast<0>(one);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) acc[i] = Isa::multiply_add(acc[i], weights, inputs);
  }
  for (int i = 0; i < kSums; ++i) asm volatile("" : : "m"(acc[i]));
  return static_cast<double>(steps) * kSums * Isa::kFlops;
}

// The bandwidth probe: reads with the variant's loads, at as many places in turn, all packed rows that these part equally.
template <class Isa, class Tile>
inline void read(const void* data, int64_t bytes) {
  typedef uint32_t Bits __attribute__((vector_size(Isa::kLanes * 4)));
  constexpr int kVectors = fdl::kLanes / Isa::kLanes;
  Bits sums[kVectors] = {};
  const auto* row = static_cast<const char*>(data);
  const int64_t apart = bytes / fdl::kRowBytes / Tile::kPlaces;
  for (int64_t i = 0; i < apart; ++i, row += fdl::kRowBytes) {
#pragma GCC unroll 4
    for (int place = 0; place < Tile::kPlaces; ++place) {
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) {
        Bits bits;
        __builtin_memcpy(&bits, row + place * apart * fdl::kRowBytes + n * sizeof(Bits), sizeof bits);
        sums[n] ^= bits;
      }
    }
  }
  for (int n = 0; n < kVectors; ++n) asm volatile("" : : "m"(sums[n]));
}

}  // namespace
