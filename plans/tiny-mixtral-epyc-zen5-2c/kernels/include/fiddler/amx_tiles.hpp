// The tile instructions of AMX, and nothing else: tests put an emulation in this header's place.
//
// As bytes, because assemblers know their names only from binutils 2.35 on, and no compiler flag is needed for them. A tile's
// number is part of the instruction, so it is a template parameter; memory operands are always (%rax, %rcx).
#pragma once

#include <cstdint>

namespace {

// The operand of LDTILECFG: rows and bytes of a row of each tile; those of no tile are 0.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// ldtilecfg: all tiles are zero afterwards.
inline void tile_configure(const TileShapes& shapes) {
  asm volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0x00" : : "a"(&shapes) : "memory");
}

// tilerelease: the thread's tiles are in their initial state, which a context switch need not save.
inline void tile_release() { asm volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0" : : : "memory"); }

// tilezero
template <int T>
inline void tile_zero() {
  asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x49, %c0" : : "i"(0xc0 | T << 3));
}

// tileloadd: the tile's rows are `stride` bytes apart.
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, %c0, 0x08" : : "i"(0x04 | T << 3), "a"(from), "c"(stride) : "memory");
}

// tileloaddt1: the same for what is not read again soon. It leaves the first-level cache as it is.
template <int T>
inline void tile_load_passing(const void* from, int64_t stride) {
  asm volatile(".byte 0xc4, 0xe2, 0x79, 0x4b, %c0, 0x08" : : "i"(0x04 | T << 3), "a"(from), "c"(stride) : "memory");
}

// tilestored
template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile(".byte 0xc4, 0xe2, 0x7a, 0x4b, %c0, 0x08" : : "i"(0x04 | T << 3), "a"(to), "c"(stride) : "memory");
}

// tdpbf16ps: Sums[m][n] += sum over pairs k of Inputs[m][k] . Weights[k][n], bf16 pairs.
template <int Sums, int Inputs, int Weights>
inline void tile_multiply() {
  asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" : : "i"((~Weights & 15) << 3 | 2), "i"(0xc0 | Sums << 3 | Inputs));
}

}  // namespace
