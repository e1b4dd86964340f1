// AMX: TDPBF16PS multiplies tiles of 16 tokens and 32 inputs by 32 inputs and 16 outputs. Few tokens go the way of AVX-512.
// Only ever run in an emulation (docs/kernels.md, AMX).
//
// 16 rows of half a packed row, 128 bytes apart, are the second operand as the instruction wants it: weights are read as they
// lie. Four tiles hold the sums of two tiles of tokens and a packed row's 32 outputs, two more the
// inputs, two the weights: every product of two loaded tiles is taken.
#pragma once

#include "amx_tiles.hpp"
#include "isa_avx512_bf16.hpp"
#include "kernel.hpp"

namespace {

struct AmxBf16 : Avx512Bf16 {};  // what few tokens are multiplied with

template <class Tile>
struct FewTokens : Tile {
  static constexpr int kTokens = Tile::kTilesFrom - 1;
};

constexpr int64_t kStepPairs = fdl::kTileInputs / 2;
constexpr int64_t kHalfRow = fdl::kLanes / 2;

inline void configure(int64_t rows) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.row_bytes[tile] = 64;
    shapes.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kStepPairs);
  }
  tile_configure(shapes);
}

// One or two (M) tiles of `rows` tokens each, and what they are multiplied by. Strides are in bytes.
struct AmxPass {
  const uint16_t* x;
  int64_t x_stride;
  int64_t rows;
  float* sums;        // [M * rows][32], added to unless `fresh`
  bool fresh;
  const char* next;   // weights to fetch meanwhile,
  int64_t lines;      // so many cache lines a step
};

template <int M>
inline void multiply_step(const AmxPass& pass, const uint16_t* x, const uint32_t* w) {
  tile_load<6>(w, fdl::kRowBytes);
  tile_load<4>(x, pass.x_stride);
  tile_multiply<0, 4, 6>();
  tile_load<7>(w + kHalfRow, fdl::kRowBytes);
  tile_multiply<1, 4, 7>();
  if constexpr (M == 2) {
    tile_load<5>(reinterpret_cast<const char*>(x) + pass.rows * pass.x_stride, pass.x_stride);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
}

// sums (+)= x * w over `pairs` rows of weights, the last of which that make no whole step are in `rest`, filled up with zeros.
template <int M>
inline void multiply(const AmxPass& pass, const uint32_t* w, int64_t pairs, const uint32_t* rest) {
  float* const low = pass.sums + pass.rows * fdl::kLanes;  // of the second tile of tokens
  if (pass.fresh) {
    tile_zero<0>(), tile_zero<1>();
    if constexpr (M == 2) tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(pass.sums, fdl::kRowBytes), tile_load<1>(pass.sums + kHalfRow, fdl::kRowBytes);
    if constexpr (M == 2) tile_load<2>(low, fdl::kRowBytes), tile_load<3>(low + kHalfRow, fdl::kRowBytes);
  }
  const uint16_t* x = pass.x;
  const char* next = pass.next;
  for (; pairs >= kStepPairs; pairs -= kStepPairs, w += kStepPairs * fdl::kLanes, x += fdl::kTileInputs) {
    for (int64_t line = 0; line < pass.lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    multiply_step<M>(pass, x, w);
  }
  if (pairs) multiply_step<M>(pass, x, rest);
  tile_store<0>(pass.sums, fdl::kRowBytes), tile_store<1>(pass.sums + kHalfRow, fdl::kRowBytes);
  if constexpr (M == 2) tile_store<2>(low, fdl::kRowBytes), tile_store<3>(low + kHalfRow, fdl::kRowBytes);
}

// As run_block() in kernel.hpp, with a pass for every two tiles of tokens. All tiles have as many rows: those that the last one
// has too many are whatever lies behind the unit's activations, and nobody reads their sums.
template <class Isa, class Tile>
inline void multiply_block(const fdl::Task& task, const uint32_t* following, int64_t tiles, int64_t rows) {
  const int64_t passes = (tiles + 1) / 2;
  AmxPass pass{};
  pass.rows = rows;
  const int64_t stride = task.phase == fdl::Phase::gate_up ? kInputStride<Isa> : kMiddleStride<Isa>;
  pass.x_stride = stride * 2;
  const int64_t step = passes == 1 ? task.pairs : Tile::kDepthPairs;
  static_assert(Tile::kDepthPairs % kStepPairs == 0);
  for (int64_t first = 0; first < task.pairs; first += step) {
    const bool last = first + step >= task.pairs;
    const int64_t pairs = last ? task.pairs - first : step, over = pairs % kStepPairs;
    const uint32_t* w = task.weights + first * fdl::kLanes;
    alignas(64) uint32_t rest[kStepPairs * fdl::kLanes] = {};
    if (over) __builtin_memcpy(rest, w + (pairs - over) * fdl::kLanes, static_cast<size_t>(over * fdl::kRowBytes));
    const uint32_t* next = passes == 1 ? w + Tile::kFetchBytes / 4 : last ? following : w + step * fdl::kLanes;
    pass.fresh = first == 0;
    for (int64_t p = 0; p < passes; ++p) {
      const int64_t token = 2 * p * rows;
      pass.x = static_cast<const uint16_t*>(task.activations) + token * stride + 2 * first;
      pass.sums = task.sums + token * fdl::kLanes;
      // One pass fetches ahead of itself; of several the first two fetch one half each of the next block.
      pass.lines = !next || p > 1 ? 0 : passes == 1 ? 2 * kStepPairs : kStepPairs;
      pass.next = reinterpret_cast<const char*>(next) + (passes == 1 ? 0 : 64 * pairs * p);
      if (2 * p + 1 < tiles)
        multiply<2>(pass, w, pairs, rest);
      else
        multiply<1>(pass, w, pairs, rest);
    }
  }
}

// The thread's tiles are as they were when it returns.
template <class Isa, class Tile>
inline void run_tiles(const fdl::Task& task) {
  if (task.tokens < Tile::kTilesFrom) return run<Isa, FewTokens<Tile>>(task);
  const int64_t tiles = (task.tokens + fdl::kTileRows - 1) / fdl::kTileRows, rows = (task.tokens + tiles - 1) / tiles;
  configure(rows);
  for (int64_t block = 0; block < task.blocks; ++block) {
    const fdl::Task part = from_block(task, block);
    multiply_block<Isa, Tile>(part, next_block(task, block), tiles, rows);
    if (task.phase == fdl::Phase::gate_up)
      activate_sums<Isa>(part, part.sums, 0, part.tokens);
    else
      store_sums<Isa>(part, part.sums, 0, part.tokens);
  }
  tile_release();
}

// The peak probe: four independent sums, as above.
template <class Isa>
inline double burn_tiles(int64_t steps) {
  configure(fdl::kTileRows);
  for (int64_t step = 0; step < steps; ++step) {
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  tile_release();
  return static_cast<double>(steps) * 4 * 2 * fdl::kTileRows * fdl::kTileInputs * kHalfRow;
}

}  // namespace
