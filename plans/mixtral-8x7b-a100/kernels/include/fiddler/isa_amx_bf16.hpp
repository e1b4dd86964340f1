// AMX: TDPBF16PS multiplies tiles of 16 tokens and 32 inputs by 32 inputs and 16 outputs. Few tokens go the way of AVX-512.
//
// 16 rows of half a packed row, 128 bytes apart, are the second operand as the instruction wants it: weights are read as they
// lie. Four tiles hold the sums of two tiles of tokens and a packed row's 32 outputs, two more the inputs, two the weights:
// every product of two loaded tiles is taken.
#pragma once

#include "amx_tiles.hpp"
#include "isa_avx512_bf16.hpp"
#include "kernel.hpp"

namespace {

struct AmxBf16 : Avx512Bf16 {  // what few tokens are multiplied with, and what is done beside the products
  static constexpr bool kTiles = true;
};

template <class Tile>
struct FewTokens : Tile {
  static constexpr int kTokens = Tile::kTilesFrom - 1;
};

constexpr int64_t kStepPairs = fdl::kTileInputs / 2;
constexpr int64_t kStepLanes = kStepPairs * fdl::kLanes;
constexpr int64_t kStepLines = 2 * kStepPairs;
constexpr int64_t kHalfRow = fdl::kLanes / 2;

inline void configure(int64_t rows) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.row_bytes[tile] = 64;
    shapes.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kStepPairs);
  }
  tile_configure(shapes);
}

// Weights that a pass fetches meanwhile: so many cache lines a step, after `until` steps from `then` on.
struct Ahead {
  const char* at;
  int64_t lines;
  int64_t until;
  const char* then;
};

// One or two (M) tiles of `rows` tokens each, and what they are multiplied by. Strides are in bytes.
struct AmxPass {
  const uint16_t* x;
  int64_t x_stride;
  int64_t rows;
  float* sums;  // [M * rows][32], added to unless `fresh`
  bool fresh;
};

template <int M>
inline void multiply_step(const AmxPass& pass, const uint16_t* x, const uint32_t* w) {
  tile_load_passing<6>(w, fdl::kRowBytes);
  tile_load<4>(x, pass.x_stride);
  tile_multiply<0, 4, 6>();
  tile_load_passing<7>(w + kHalfRow, fdl::kRowBytes);
  tile_multiply<1, 4, 7>();
  if constexpr (M == 2) {
    tile_load<5>(reinterpret_cast<const char*>(x) + pass.rows * pass.x_stride, pass.x_stride);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
}

// sums (+)= x * w over `steps` of rows of weights; and if it is given, over `rest`, which is filled up with zeros.
template <int M>
inline void multiply(const AmxPass& pass, const uint32_t* w, int64_t steps, const uint32_t* rest, const Ahead& ahead) {
  float* const low = pass.sums + pass.rows * fdl::kLanes;  // of the second tile of tokens
  if (pass.fresh) {
    tile_zero<0>(), tile_zero<1>();
    if constexpr (M == 2) tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(pass.sums, fdl::kRowBytes), tile_load<1>(pass.sums + kHalfRow, fdl::kRowBytes);
    if constexpr (M == 2) tile_load<2>(low, fdl::kRowBytes), tile_load<3>(low + kHalfRow, fdl::kRowBytes);
  }
  const uint16_t* x = pass.x;
  const char* fetch = ahead.at;
  for (int64_t step = 0; step < steps; ++step, w += kStepLanes, x += fdl::kTileInputs) {
    if (step == ahead.until) fetch = ahead.then;
    for (const char* end = fetch + 64 * ahead.lines; fetch < end; fetch += 64) __builtin_prefetch(fetch, 0, 2);
    multiply_step<M>(pass, x, w);
  }
  if (rest) multiply_step<M>(pass, x, rest);
  tile_store<0>(pass.sums, fdl::kRowBytes), tile_store<1>(pass.sums + kHalfRow, fdl::kRowBytes);
  if constexpr (M == 2) tile_store<2>(low, fdl::kRowBytes), tile_store<3>(low + kHalfRow, fdl::kRowBytes);
}

// At most kTileBlocks blocks; `next_blocks` at `next` are read after them.
//
// One pass reads a block from end to end, fetched a little ahead. For several the depth is cut in chunks: two tiles of tokens
// pass over a chunk of each block in turn, so their inputs stay in the first-level cache, the weights come from the second, and
// meanwhile those of the next chunk come from memory, spread over the passes. All tiles have as many rows: those that the last
// one has too many are whatever lies behind the unit's activations, and nobody reads their sums.
template <class Isa, class Tile>
inline void run_blocks(const fdl::Task& task, int64_t blocks, const uint32_t* next, int64_t next_blocks, int64_t tiles,
                       int64_t rows) {
  constexpr int64_t kAhead = Tile::kFetchBytes / (4 * kStepLanes);
  static_assert(Tile::kDepthPairs % kStepPairs == 0);
  const int64_t passes = (tiles + 1) / 2, lines = (kStepLines + passes - 1) / passes;
  const int64_t stride = task.phase == fdl::Phase::gate_up ? kInputStride<Isa> : kMiddleStride<Isa>;
  const int64_t all = (task.pairs + kStepPairs - 1) / kStepPairs, over = task.pairs % kStepPairs;
  const Parts chunks(all, passes == 1 ? all : Tile::kDepthPairs / kStepPairs);
  alignas(64) uint32_t rest[kStepLanes];
  for (int64_t c = 0; c < chunks.count; ++c) {
    const bool last = c + 1 == chunks.count;
    const int64_t steps = chunks.size(c) - (last && over);
    for (int64_t p = 0; p < passes; ++p) {
      const int64_t token = 2 * p * rows, end = token + 2 * rows < task.tokens ? token + 2 * rows : task.tokens;
      for (int64_t b = 0; b < blocks; ++b) {
        const fdl::Task part = from_block(task, b);
        const uint32_t* w = part.weights + chunks.first(c) * kStepLanes;
        const uint32_t* filled = nullptr;
        if (last && over) {
          __builtin_memcpy(rest, w + steps * kStepLanes, static_cast<size_t>(over * fdl::kRowBytes));
          __builtin_memset(rest + over * fdl::kLanes, 0, static_cast<size_t>((kStepPairs - over) * fdl::kRowBytes));
          filled = rest;
        }
        Ahead ahead{};
        if (passes == 1) {
          const uint32_t* then = b + 1 < blocks ? part.weights + task.weight_stride : next;
          ahead = {reinterpret_cast<const char*>(w + kAhead * kStepLanes), kStepLines, steps - kAhead, nullptr};
          ahead.then = then ? reinterpret_cast<const char*>(then) : ahead.at;
        } else if (const uint32_t* later = !last ? w + steps * kStepLanes : b < next_blocks ? next + b * task.weight_stride : nullptr;
                   later && p * lines < kStepLines) {
          ahead = {reinterpret_cast<const char*>(later) + 64 * lines * steps * p, lines, -1, nullptr};
        }
        const AmxPass pass{static_cast<const uint16_t*>(task.activations) + token * stride + chunks.first(c) * fdl::kTileInputs,
                           stride * 2, rows, task.sums + b * task.sums_stride + token * fdl::kLanes, c == 0};
        if (2 * p + 1 < tiles)
          multiply<2>(pass, w, steps, filled, ahead);
        else
          multiply<1>(pass, w, steps, filled, ahead);
        if (!last) continue;
        if (task.phase == fdl::Phase::gate_up)
          activate_sums<Isa>(part, pass.sums, token, end - token);
        else
          store_sums<Isa>(part, pass.sums, token, end - token);
      }
    }
  }
}

// The thread's tiles are as they were when it returns.
template <class Isa, class Tile>
inline void run_tiles(const fdl::Task& task) {
  if (task.tokens < Tile::kTilesFrom) return run<Isa, FewTokens<Tile>>(task);
  const int64_t tiles = (task.tokens + fdl::kTileRows - 1) / fdl::kTileRows, rows = (task.tokens + tiles - 1) / tiles;
  configure(rows);
  const Parts groups(task.blocks, fdl::kTileBlocks);
  for (int64_t g = 0; g < groups.count; ++g)
    run_blocks<Isa, Tile>(from_block(task, groups.first(g)), groups.size(g),
                          next_block(task, groups.first(g) + groups.size(g) - 1),
                          g + 1 < groups.count ? groups.size(g + 1) : task.next_blocks, tiles, rows);
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
  const AmxPass pass{inputs.numbers, 2 * fdl::kTileInputs, fdl::kTileRows, nullptr, true};
  configure(fdl::kTileRows);
  for (int64_t step = 0; step < steps; ++step)
    multiply_step<2>(pass, inputs.numbers, reinterpret_cast<const uint32_t*>(weights.numbers));
  tile_release();
  return static_cast<double>(steps) * 4 * 2 * fdl::kTileRows * fdl::kTileInputs * kHalfRow;
}

}  // namespace
