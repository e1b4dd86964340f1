// In place of the header of this name: the tile instructions as Intel's manual (volume 2, LDTILECFG to TDPBF16PS) has them,
// on an array of each thread's. What would be an exception there, and what leaves tiles behind, aborts.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "vectors.hpp"

namespace {

struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct alignas(64) EmulatedTiles {
  float data[8][16][16];
  TileShapes shapes;
  bool configured;
};
thread_local EmulatedTiles tiles;

inline void require_tiles(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline void tile_configure(const TileShapes& shapes) {
  require_tiles(!tiles.configured, "configured again before a release");
  require_tiles(shapes.palette == 1 && shapes.start_row == 0, "palette and first row");
  for (int t = 0; t < 16; ++t) {
    require_tiles(shapes.rows[t] <= 16 && shapes.row_bytes[t] <= 64 && (t < 8 || shapes.rows[t] == 0), "a tile too large");
    require_tiles((shapes.rows[t] == 0) == (shapes.row_bytes[t] == 0), "a tile of nothing");
  }
  std::memset(tiles.data, 0, sizeof tiles.data);
  tiles.shapes = shapes;
  tiles.configured = true;
}

inline void tile_release() { std::memset(&tiles, 0, sizeof tiles); }

inline void require_shape(int t) { require_tiles(tiles.configured && tiles.shapes.rows[t] > 0, "a tile without a shape"); }

template <int T>
inline void tile_zero() {
  require_shape(T);
  std::memset(tiles.data[T], 0, sizeof tiles.data[T]);
}

template <int T>
inline void tile_load(const void* from, int64_t stride) {
  tile_zero<T>();
  for (int row = 0; row < tiles.shapes.rows[T]; ++row)
    std::memcpy(tiles.data[T][row], static_cast<const char*>(from) + row * stride, tiles.shapes.row_bytes[T]);
}

template <int T>
inline void tile_load_passing(const void* from, int64_t stride) { tile_load<T>(from, stride); }

template <int T>
inline void tile_store(void* to, int64_t stride) {
  require_shape(T);
  for (int row = 0; row < tiles.shapes.rows[T]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles.data[T][row], tiles.shapes.row_bytes[T]);
}

// Even and odd products are summed apart over the whole depth, then together, then added to what was there: fused, to nearest,
// denormals zero on the way in and out.
template <int Sums, int Inputs, int Weights>
inline void tile_multiply() {
  static_assert(Sums != Inputs && Sums != Weights && Inputs != Weights);
  require_shape(Sums), require_shape(Inputs), require_shape(Weights);
  const TileShapes& s = tiles.shapes;
  require_tiles(s.row_bytes[Inputs] % 4 == 0 && s.row_bytes[Inputs] / 4 == s.rows[Weights], "depths differ");
  require_tiles(s.rows[Sums] == s.rows[Inputs] && s.row_bytes[Sums] == s.row_bytes[Weights], "sizes of the sums differ");
  const unsigned control = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // FTZ, DAZ, no exceptions, to nearest
  asm volatile("" : : : "memory");
  Floats weights[2][16];
  for (int k = 0; k < s.rows[Weights]; ++k) {
    Bits pairs;
    std::memcpy(&pairs, tiles.data[Weights][k], sizeof pairs);
    for (int step = 0; step < 2; ++step) weights[step][k] = numbers(pairs, step);
  }
  for (int m = 0; m < s.rows[Sums]; ++m) {
    Floats both[2]{}, sums;
    for (int k = 0; k < s.rows[Weights]; ++k) {
      uint32_t pair;
      std::memcpy(&pair, &tiles.data[Inputs][m][k], sizeof pair);
      for (int step = 0; step < 2; ++step) add_product(both[step], weights[step][k], numbers(Bits{} + pair, step));
    }
    // Columns beyond the weights' are zeros, and so their sums.
    std::memcpy(&sums, tiles.data[Sums][m], sizeof sums);
    sums += both[0] + both[1];
    std::memcpy(tiles.data[Sums][m], &sums, sizeof sums);
  }
  asm volatile("" : : : "memory");
  _mm_setcsr(control);
}

}  // namespace
