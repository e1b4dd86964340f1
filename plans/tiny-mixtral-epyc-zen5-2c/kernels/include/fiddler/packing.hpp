// Checkpoint order to the packed layout and back. Baseline code (SSE2); the work is bound by memory.
#pragma once

#include <emmintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "layout.hpp"

namespace fdl {

// Both directions treat two consecutive bf16 inputs as one 32-bit value, so that packing a block is a transpose of
// [32 outputs][pairs] to [pairs][32 lanes].
constexpr int64_t kPairStep = 32;   // unpacking: two cache lines of every one of the 32 rows, and 4 KiB of the block, at a time
constexpr int64_t kLineLanes = 16;  // packing: a cache line, half a packed row

// Columns 0..3 of a 4 x 4 transpose of 4 pairs of each of 4 rows; a null row counts as zeros.
inline void transpose_in(const uint16_t* const* rows, int64_t pair, __m128i* column0, __m128i* column1, __m128i* column2,
                         __m128i* column3) {
  __m128i r[4];
  for (int i = 0; i < 4; ++i)
    r[i] = rows[i] ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + 2 * pair)) : _mm_setzero_si128();
  const __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpacklo_epi32(r[2], r[3]);
  const __m128i c = _mm_unpackhi_epi32(r[0], r[1]), d = _mm_unpackhi_epi32(r[2], r[3]);
  *column0 = _mm_unpacklo_epi64(a, b);
  *column1 = _mm_unpackhi_epi64(a, b);
  *column2 = _mm_unpacklo_epi64(c, d);
  *column3 = _mm_unpackhi_epi64(c, d);
}

inline void transpose_out(const uint32_t* in, uint16_t* const* rows, int64_t pair) {
  __m128i r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * kLanes));
  const __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpacklo_epi32(r[2], r[3]);
  const __m128i c = _mm_unpackhi_epi32(r[0], r[1]), d = _mm_unpackhi_epi32(r[2], r[3]);
  const __m128i out[4] = {_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b), _mm_unpacklo_epi64(c, d),
                          _mm_unpackhi_epi64(c, d)};
  for (int i = 0; i < 4; ++i)
    if (rows[i]) _mm_storeu_si128(reinterpret_cast<__m128i*>(rows[i] + 2 * pair), out[i]);
}

// rows: 32 outputs' weights, [inputs] each, null where the block has no such output. out: 16-byte aligned.
//
// Sixteen rows are read from end to end, side by side, which the hardware prefetches; a packed row gets a whole cache line of
// theirs at a time, past the caches: it is not read before, and nobody needs it soon (docs/kernels.md has what that gives;
// the same with AVX-512 gave 5 to 10 % more, not worth a variant for each instruction set).
inline void pack_block(const uint16_t* const* rows, int64_t inputs, uint32_t* out) {
  const int64_t whole = inputs / 2;
  const int64_t pairs = (inputs + 1) / 2;
  const int64_t vectors = whole / 4 * 4;
  for (int64_t lane = 0; lane < kLanes; lane += kLineLanes) {
    for (int64_t pair = 0; pair < vectors; pair += 4) {
      __m128i columns[4][4];
      for (int i = 0; i < 4; ++i)
        transpose_in(rows + lane + 4 * i, pair, &columns[0][i], &columns[1][i], &columns[2][i], &columns[3][i]);
      for (int column = 0; column < 4; ++column)
        for (int i = 0; i < 4; ++i)
          _mm_stream_si128(reinterpret_cast<__m128i*>(out + (pair + column) * kLanes + lane + 4 * i), columns[column][i]);
    }
  }
  for (int64_t pair = vectors; pair < pairs; ++pair) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const uint16_t* row = rows[lane];
      const uint32_t even = row ? row[2 * pair] : 0;
      const uint32_t odd = row && pair < whole ? row[2 * pair + 1] : 0;
      out[pair * kLanes + lane] = even | odd << 16;
    }
  }
  _mm_sfence();  // before another thread is told that the block is there
}

inline void unpack_block(const uint32_t* in, int64_t inputs, uint16_t* const* rows) {
  const int64_t whole = inputs / 2;
  const int64_t pairs = (inputs + 1) / 2;
  const int64_t vectors = whole / 4 * 4;
  for (int64_t first = 0; first < vectors; first += kPairStep) {
    const int64_t last = std::min(first + kPairStep, vectors);
    for (int64_t lane = 0; lane < kLanes; lane += 4)
      for (int64_t pair = first; pair < last; pair += 4) transpose_out(in + pair * kLanes + lane, rows + lane, pair);
  }
  for (int64_t pair = vectors; pair < pairs; ++pair) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (!rows[lane]) continue;
      const uint32_t both = in[pair * kLanes + lane];
      rows[lane][2 * pair] = static_cast<uint16_t>(both);
      if (pair < whole) rows[lane][2 * pair + 1] = static_cast<uint16_t>(both >> 16);
    }
  }
}

// The 32 rows that block `index` of an expert holds; gate/up blocks come first, then down blocks.
template <class Pointer>
inline void rows_of_block(int64_t index, Pointer gate, Pointer up, Pointer down, Pointer* rows) {
  if (index < kGateUpBlocks) {
    for (int64_t lane = 0; lane < kGateLanes; ++lane) {
      const int64_t row = index * kGateLanes + lane;
      rows[lane] = row < kIntermediate ? gate + row * kHidden : nullptr;
      rows[kGateLanes + lane] = row < kIntermediate ? up + row * kHidden : nullptr;
    }
  } else {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t row = (index - kGateUpBlocks) * kLanes + lane;
      rows[lane] = row < kHidden ? down + row * kIntermediate : nullptr;
    }
  }
}

// The bias of one lane of block `index`, or null where the block has no such output.
template <class Pointer>
inline Pointer bias_of_lane(int64_t index, int64_t lane, Pointer gate, Pointer up, Pointer down) {
  if (index < kGateUpBlocks) {
    const int64_t row = index * kGateLanes + lane % kGateLanes;
    return row < kIntermediate ? (lane < kGateLanes ? gate : up) + row : nullptr;
  }
  const int64_t row = (index - kGateUpBlocks) * kLanes + lane;
  return row < kHidden ? down + row : nullptr;
}

// Lanes before block `index`, before its biases, and its inputs.
inline int64_t block_offset(int64_t index) {
  return index < kGateUpBlocks ? index * kGateUpBlockLanes
                               : kDownOffsetLanes + (index - kGateUpBlocks) * kDownBlockLanes;
}
inline int64_t bias_offset(int64_t index) { return kBiasOffsetLanes + index * kLanes; }
inline int64_t block_inputs(int64_t index) { return index < kGateUpBlocks ? kHidden : kIntermediate; }

}  // namespace fdl
