// AMX: TDPBF16PS multiplies tiles of 16 tokens and 32 inputs by 32 inputs and 16 outputs. Few tokens go the way of AVX-512.
//
// 16 rows of half a packed row, 128 bytes apart, are the second operand as the instruction wants it: weights are read as they
// lie. Six tiles hold the sums of three tiles of tokens and a packed row's 32 outputs; two are left for what is multiplied.
#pragma once

#include "amx_tiles.hpp"
#include "isa_avx512_bf16.hpp"
#include "kernel.hpp"

namespace {

template <class Tile>
struct FewTokens : Tile {
  static constexpr int kTokens = Tile::kTilesFrom - 1;
};

constexpr int64_t kStepPairs = fdl::kTileInputs / 2;
constexpr int64_t kStepLanes = kStepPairs * fdl::kLanes;
constexpr int64_t kStepLines = kStepLanes / 16;
constexpr int64_t kHalfRow = fdl::kLanes / 2;
constexpr int64_t kPassSums = fdl::kPassTiles * fdl::kTileRows * fdl::kLanes;

inline void configure(int64_t rows) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.row_bytes[tile] = fdl::kLineBytes;
    shapes.rows[tile] = static_cast<uint8_t>(tile < 7 ? rows : kStepPairs);
  }
  tile_configure(shapes);
}

// The sums of M tiles of `rows` tokens each: [M * rows][32].
template <int M, int kTile = 0>
inline void zero_sums() {
  tile_zero<2 * kTile>(), tile_zero<2 * kTile + 1>();
  if constexpr (kTile + 1 < M) zero_sums<M, kTile + 1>();
}

template <int M, int kTile = 0>
inline void load_sums(const float* from, int64_t rows) {
  tile_load<2 * kTile>(from, fdl::kRowBytes), tile_load<2 * kTile + 1>(from + kHalfRow, fdl::kRowBytes);
  if constexpr (kTile + 1 < M) load_sums<M, kTile + 1>(from + rows * fdl::kLanes, rows);
}

template <int M, int kTile = 0>
inline void keep_sums(float* to, int64_t rows) {
  tile_store<2 * kTile>(to, fdl::kRowBytes), tile_store<2 * kTile + 1>(to + kHalfRow, fdl::kRowBytes);
  if constexpr (kTile + 1 < M) keep_sums<M, kTile + 1>(to + rows * fdl::kLanes, rows);
}

// One step of M tiles of tokens, `tile` elements from one to the next. `fetch(0)` to `fetch(3)` are called in between. What is
// not read again so soon passes the first-level cache by: of three tiles the tokens, else the weights.
template <int M, class Fetch>
[[gnu::always_inline]] inline void multiply_step(const uint16_t* x, int64_t tile, const uint32_t* w, Fetch fetch) {
  fetch(0);
  if constexpr (M < 3) {
    tile_load<6>(x, fdl::kLineBytes);
    fetch(1);
    tile_load_passing<7>(w, fdl::kRowBytes);
    tile_multiply<0, 6, 7>();
    if constexpr (M == 2) {
      tile_load<5>(x + tile, fdl::kLineBytes);
      tile_multiply<2, 5, 7>();
    }
    fetch(2);
    tile_load_passing<7>(w + kHalfRow, fdl::kRowBytes);
    tile_multiply<1, 6, 7>();
    if constexpr (M == 2) tile_multiply<3, 5, 7>();
    fetch(3);
  } else {
    tile_load_passing<6>(x, fdl::kLineBytes);
    tile_load<7>(w, fdl::kRowBytes);
    tile_multiply<0, 6, 7>();
    fetch(1);
    tile_load<7>(w + kHalfRow, fdl::kRowBytes);
    tile_multiply<1, 6, 7>();
    fetch(2);
    tile_load_passing<6>(x + tile, fdl::kLineBytes);
    tile_multiply<3, 6, 7>();
    tile_load<7>(w, fdl::kRowBytes);
    tile_multiply<2, 6, 7>();
    fetch(3);
    tile_load_passing<6>(x + 2 * tile, fdl::kLineBytes);
    tile_multiply<4, 6, 7>();
    tile_load<7>(w + kHalfRow, fdl::kRowBytes);
    tile_multiply<5, 6, 7>();
  }
}

// What is made of a pass's sums: beside the next pass's products, soon, while they are in the first-level cache.
template <class Isa, fdl::Phase kPhase>
class Finish {
 public:
  Finish() = default;
  Finish(const fdl::Task& task, const float* sums, int64_t token, int64_t end, int64_t steps)
      : task_(task), sums_(sums), token_(token), end_(end), tokens_(end - token), each_(tokens_ / (steps + 1)) {
    if constexpr (kPhase == fdl::Phase::gate_up) {
      const int64_t line = task.intermediate_column / fdl::kTileInputs, column = task.intermediate_column % fdl::kTileInputs;
      out_ = static_cast<uint16_t*>(task.intermediate) + (line * task.tokens + token) * fdl::kTileInputs + column;
    }
  }

  // Activations hold a step's products up least among them; results, which wait for memory, after them.
  [[gnu::always_inline]] void amid() {
    if constexpr (kPhase == fdl::Phase::gate_up) some(1 + each_);
  }
  [[gnu::always_inline]] void after() {
    if constexpr (kPhase == fdl::Phase::down) some(1 + 2 * each_);
  }
  void all() {
    some(tokens_);
    if constexpr (kPhase == fdl::Phase::gate_up) fill_up<Isa>(task_, tokens_, out_ - tokens_ * fdl::kTileInputs, fdl::kTileInputs);
  }

 private:
  [[gnu::always_inline]] void some(int64_t tokens) {
    for (; tokens > 0 && token_ < end_; --tokens, ++token_, sums_ += fdl::kLanes) {
      if constexpr (kPhase == fdl::Phase::gate_up) {
        activate_row<Isa>(task_, sums_, out_);
        out_ += fdl::kTileInputs;
      } else {
        store_sums<Isa>(task_, sums_, token_, 1);
      }
    }
  }

  fdl::Task task_ = {};
  const float* sums_ = nullptr;
  int64_t token_ = 0, end_ = 0, tokens_ = 0;
  int64_t each_ = 0;         // tokens that each step has to finish, rounded down
  uint16_t* out_ = nullptr;  // gate_up: the next token's
};

// Tiles of `rows` tokens each over some steps of a block.
struct Pass {
  const uint16_t* x;  // the first step's lines
  int64_t x_step;     // elements to the next one's
  int64_t rows;
  const uint32_t* weights;
  int64_t steps;
  const uint32_t* rest;  // one more step, filled up with zeros; or null
  float* sums;
};

template <int M, class Fetch>
[[gnu::always_inline]] inline void multiply_step(const Pass& pass, int64_t step, Fetch fetch) {
  multiply_step<M>(pass.x + step * pass.x_step, pass.rows * fdl::kTileInputs, pass.weights + step * kStepLanes, fetch);
}

template <int M>
inline void multiply_rest(const Pass& pass) {
  if (pass.rest)
    multiply_step<M>(pass.x + pass.steps * pass.x_step, pass.rows * fdl::kTileInputs, pass.rest, [](int) {});
}

// The only pass over a block, from memory: its depth is read at several places in turn, steps that these do not part equally
// at the end. One step further at each, and then of `next`, is fetched into the first-level cache.
template <int M, int kPlaces, class Isa, fdl::Phase kPhase>
inline void multiply_once(const Pass& pass, const uint32_t* next, Finish<Isa, kPhase>& finish) {
  constexpr int64_t kPart = kStepLanes / kPlaces, kLines = kStepLines / (4 * kPlaces);
  static_assert(kLines * 4 * kPlaces == kStepLines);
  const int64_t apart = pass.steps / kPlaces, parted = apart * kPlaces;
  zero_sums<M>();
  for (int64_t turn = 0; turn < pass.steps; ++turn) {
    const int64_t soon = turn + kPlaces;
    const bool of_parts = soon < parted || soon >= pass.steps;
    const uint32_t* at = soon < parted        ? pass.weights + soon / kPlaces * kStepLanes + soon % kPlaces * kPart
                         : soon < pass.steps ? pass.weights + soon * kStepLanes
                         : next              ? next + (soon - pass.steps) * kPart
                                             : pass.weights;
    const int64_t distance = of_parts ? apart * kStepLanes : kPart;
    multiply_step<M>(pass, turn < parted ? turn % kPlaces * apart + turn / kPlaces : turn, [&](int part) {
      if (part == 2) finish.amid();
#pragma GCC unroll 8
      for (int64_t line = 0; line < kLines; ++line) {
#pragma GCC unroll 4
        for (int64_t place = 0; place < kPlaces; ++place) __builtin_prefetch(at + place * distance + line * 16, 0, 3);
      }
      at += kLines * 16;
    });
    finish.after();
  }
  multiply_rest<M>(pass);
  keep_sums<M>(pass.sums, pass.rows);
}

// What one of several passes fetches from memory: cache lines of several places in turn, from `line` on so many a step.
struct Later {
  const uint32_t* weights;
  int64_t line, lines;
};

// One of several passes over a block, which is in the second-level cache. Added to the sums unless they are `fresh`.
template <int M, int kPlaces, class Isa, fdl::Phase kPhase>
inline void multiply_again(const Pass& pass, bool fresh, Later later, Finish<Isa, kPhase>& finish) {
  const int64_t apart = pass.steps * kStepLanes / kPlaces;
  if (fresh)
    zero_sums<M>();
  else
    load_sums<M>(pass.sums, pass.rows);
  for (int64_t step = 0; step < pass.steps; ++step) {
    multiply_step<M>(pass, step, [&](int part) {
      if (part == 2) finish.amid();
      for (const int64_t end = later.line + (later.lines + part) / 4; later.line < end; ++later.line)
        __builtin_prefetch(later.weights + later.line % kPlaces * apart + later.line / kPlaces * 16, 0, 2);
    });
    finish.after();
  }
  multiply_rest<M>(pass);
  keep_sums<M>(pass.sums, pass.rows);
}

// At most kTileBlocks blocks; `next` is read after them.
//
// Up to kPassTiles tiles of tokens take one pass over each block. More take several, and the depth is cut in chunks: a unit's
// activations of one, the sums of all blocks, a block's weights and the next one's are in the second-level cache then, and
// the passes fetch that next one as evenly as they can. All tiles have as many rows: those that the last one has too many are
// whatever lies behind the unit's last token, and nobody reads their sums.
template <class Isa, class Tile, fdl::Phase kPhase>
inline void run_blocks(const fdl::Task& task, int64_t blocks, const uint32_t* next, int64_t tiles, int64_t rows) {
  static_assert(Tile::kDepthPairs % kStepPairs == 0);
  const Parts passes(tiles, fdl::kPassTiles);
  const int64_t all = (task.pairs + kStepPairs - 1) / kStepPairs, over = task.pairs % kStepPairs;
  const Parts chunks(all, passes.count == 1 ? all : Tile::kDepthPairs / kStepPairs);
  alignas(64) uint32_t rest[kStepLanes];
  Finish<Isa, kPhase> finish;
  for (int64_t c = 0; c < chunks.count; ++c) {
    const bool last = c + 1 == chunks.count;
    Pass pass{};
    pass.x_step = task.tokens * fdl::kTileInputs;
    pass.rows = rows;
    pass.steps = chunks.size(c) - (last && over);
    for (int64_t b = 0; b < blocks; ++b) {
      const fdl::Task part = from_block(task, b);
      pass.weights = part.weights + chunks.first(c) * kStepLanes;
      if (last && over) {
        __builtin_memcpy(rest, pass.weights + pass.steps * kStepLanes, static_cast<size_t>(over * fdl::kRowBytes));
        __builtin_memset(rest + over * fdl::kLanes, 0, static_cast<size_t>((kStepPairs - over) * fdl::kRowBytes));
        pass.rest = rest;
      }
      const uint32_t* const then = b + 1 < blocks ? pass.weights + task.weight_stride
                                   : last         ? next
                                                  : task.weights + chunks.first(c + 1) * kStepLanes;
      for (int64_t p = 0; p < passes.count; ++p) {
        const int64_t token = passes.first(p) * rows, size = passes.size(p);
        const int64_t end = token + size * rows < task.tokens ? token + size * rows : task.tokens;
        pass.x = static_cast<const uint16_t*>(task.activations) + chunks.first(c) * pass.x_step + token * fdl::kTileInputs;
        // Sums of the only chunk are finished beside the next pass: two passes' are enough.
        pass.sums = task.sums + (chunks.count == 1 ? (b * passes.count + p) % 2 * kPassSums
                                                   : b * task.sums_stride + token * fdl::kLanes);
        if (passes.count > 1) {  // of two tiles or three
          const int64_t first = kStepLines * p / passes.count, lines = kStepLines * (p + 1) / passes.count - first;
          const Later later{then, first * pass.steps, then ? lines : 0};
          size == 3 ? multiply_again<3, Tile::kPlaces>(pass, c == 0, later, finish)
                    : multiply_again<2, Tile::kPlaces>(pass, c == 0, later, finish);
        } else {
          size == 3   ? multiply_once<3, Tile::kPlaces>(pass, then, finish)
          : size == 2 ? multiply_once<2, Tile::kPlaces>(pass, then, finish)
                      : multiply_once<1, Tile::kPlaces>(pass, then, finish);
        }
        finish.all();
        if (last) finish = {part, pass.sums, token, end, pass.steps};
      }
    }
  }
  finish.all();
}

// The thread's tiles are as they were when it returns.
template <class Isa, class Tile>
inline void run_tiles(const fdl::Task& task) {
  if (task.tokens < Tile::kTilesFrom) return run<Isa, FewTokens<Tile>>(task);
  const int64_t tiles = (task.tokens + fdl::kTileRows - 1) / fdl::kTileRows, rows = (task.tokens + tiles - 1) / tiles;
  configure(rows);
  const Parts groups(task.blocks, fdl::kTileBlocks);
  for (int64_t g = 0; g < groups.count; ++g) {
    const fdl::Task part = from_block(task, groups.first(g));
    const uint32_t* const next = next_block(task, groups.first(g) + groups.size(g) - 1);
    task.phase == fdl::Phase::gate_up ? run_blocks<Isa, Tile, fdl::Phase::gate_up>(part, groups.size(g), next, tiles, rows)
                                      : run_blocks<Isa, Tile, fdl::Phase::down>(part, groups.size(g), next, tiles, rows);
  }
  tile_release();
}

// bf16 numbers of either sign between 1 and 2 in size, with changing bits.
struct Operands {
  static constexpr int kCount = 2 * kStepLanes;
  constexpr Operands() : numbers() {
    uint32_t state = 1;
    for (uint16_t& number : numbers) {
      state = state * 1664525u + 1013904223u;
      number = static_cast<uint16_t>(0x3f80u | (state >> 16 & 0x807fu));
    }
  }
  alignas(64) uint16_t numbers[kCount];
};

// The peak probe: the steps of above, with operands from the first-level cache, of changing bits. Without the loads it would
// not notice that another thread of the core takes most of them, and zeros let the clock run a fifth faster than anybody's
// weights do (Emerald Rapids).
template <class Isa>
inline double burn_tiles(int64_t steps) {
  static constexpr Operands weights, inputs;
  configure(fdl::kTileRows);
  zero_sums<2>();
  for (int64_t step = 0; step < steps; ++step)
    multiply_step<2>(inputs.numbers, fdl::kTileRows * fdl::kTileInputs, reinterpret_cast<const uint32_t*>(weights.numbers), [](int) {});
  tile_release();
  return static_cast<double>(steps) * 4 * 2 * fdl::kTileRows * fdl::kTileInputs * kHalfRow;
}

}  // namespace
