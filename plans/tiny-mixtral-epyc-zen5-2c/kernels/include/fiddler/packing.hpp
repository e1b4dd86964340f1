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

// How the matrices of a checkpoint lie.
//
// rows             [outputs, inputs]: an output's weights follow each other
// columns          [inputs, outputs]: an input's do
// columns_in_turn  the same with gate's and up's outputs in turn: [inputs, 2 * outputs]
// (Gate's and up's rows in turn are rows like others, twice as far from each other.)
enum class Order { kRows, kColumns, kColumnsInTurn };

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

// Pairs `first` to before `last` of `count` lanes from `lane` on, one by one; of an odd number of inputs the last meets a zero.
inline void pack_lanes(const uint16_t* const* outputs, int64_t stride, int64_t inputs, uint32_t* out, int64_t first,
                       int64_t last, int64_t lane, int64_t count) {
  for (int64_t pair = first; pair < last; ++pair) {
    for (int64_t at = lane; at < lane + count; ++at) {
      const uint16_t* output = outputs[at];
      const uint32_t even = output ? output[2 * pair * stride] : 0;
      const uint32_t odd = output && 2 * pair + 1 < inputs ? output[(2 * pair + 1) * stride] : 0;
      out[pair * kLanes + at] = even | odd << 16;
    }
  }
}

// Sixteen rows are read from end to end, side by side, which the hardware prefetches; a packed row gets a whole cache line of
// theirs at a time, past the caches: it is not read before, and nobody needs it soon (docs/runtime.md, Packed caches, has what that gives;
// the same with AVX-512 gave 5 to 10 % more, not worth a variant for each instruction set).
inline int64_t pack_rows(const uint16_t* const* outputs, int64_t inputs, uint32_t* out) {
  const int64_t vectors = inputs / 2 / 4 * 4;
  for (int64_t lane = 0; lane < kLanes; lane += kLineLanes) {
    for (int64_t pair = 0; pair < vectors; pair += 4) {
      __m128i columns[4][4];
      for (int i = 0; i < 4; ++i)
        transpose_in(outputs + lane + 4 * i, pair, &columns[0][i], &columns[1][i], &columns[2][i], &columns[3][i]);
      for (int column = 0; column < 4; ++column)
        for (int i = 0; i < 4; ++i)
          _mm_stream_si128(reinterpret_cast<__m128i*>(out + (pair + column) * kLanes + lane + 4 * i), columns[column][i]);
    }
  }
  return vectors;
}

// Two inputs' weights for 8 outputs that follow each other: 8 lanes.
inline void pack_pair(const uint16_t* even, const uint16_t* odd, uint32_t* out) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(even));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd));
  _mm_stream_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi16(a, b));
  _mm_stream_si128(reinterpret_cast<__m128i*>(out + 4), _mm_unpackhi_epi16(a, b));
}

// The same where gate's (g) and up's (u) take turns: 4 lanes of each.
inline void pack_pair_in_turn(const uint16_t* even, const uint16_t* odd, uint32_t* gate, uint32_t* up) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(even));  // g0 u0 g1 u1 ...
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd));
  const __m128i low = _mm_set1_epi32(0xffff);
  _mm_stream_si128(reinterpret_cast<__m128i*>(gate), _mm_or_si128(_mm_and_si128(a, low), _mm_slli_epi32(b, 16)));
  _mm_stream_si128(reinterpret_cast<__m128i*>(up), _mm_or_si128(_mm_srli_epi32(a, 16), _mm_andnot_si128(low, b)));
}

// Lanes without an output are the last of their sixteen.
template <Order order>
int64_t pack_columns(const uint16_t* const* outputs, int64_t stride, int64_t inputs, uint32_t* out) {
  const int64_t whole = inputs / 2;
  for (int64_t pair = 0; pair < whole; ++pair) {
    const int64_t even = 2 * pair * stride, odd = even + stride;
    uint32_t* row = out + pair * kLanes;
    if constexpr (order == Order::kColumnsInTurn) {
      if (outputs[kGateLanes - 1]) {
        for (int64_t lane = 0; lane < kGateLanes; lane += 4)
          pack_pair_in_turn(outputs[lane] + even, outputs[lane] + odd, row + lane, row + kGateLanes + lane);
      } else {
        pack_lanes(outputs, stride, inputs, out, pair, pair + 1, 0, kLanes);
      }
    } else {
      for (int64_t lane = 0; lane < kLanes; lane += kLineLanes) {
        if (outputs[lane + kLineLanes - 1]) {
          for (int64_t at = lane; at < lane + kLineLanes; at += 8)
            pack_pair(outputs[at] + even, outputs[at] + odd, row + at);
        } else {
          pack_lanes(outputs, stride, inputs, out, pair, pair + 1, lane, kLineLanes);
        }
      }
    }
  }
  return whole;
}

// outputs: each of the 32 outputs' first weight, null where the block has no such output; `stride` between an output's
// weights. out: 16-byte aligned.
template <Order order>
void pack_block(const uint16_t* const* outputs, int64_t stride, int64_t inputs, uint32_t* out) {
  int64_t done = 0;
  if constexpr (order == Order::kRows)
    done = pack_rows(outputs, inputs, out);
  else
    done = pack_columns<order>(outputs, stride, inputs, out);
  pack_lanes(outputs, stride, inputs, out, done, (inputs + 1) / 2, 0, kLanes);
  _mm_sfence();  // before another thread is told that the block is there
}

inline void pack_block(Order order, const uint16_t* const* outputs, int64_t stride, int64_t inputs, uint32_t* out) {
  switch (order) {
    case Order::kRows: return pack_block<Order::kRows>(outputs, stride, inputs, out);
    case Order::kColumns: return pack_block<Order::kColumns>(outputs, stride, inputs, out);
    case Order::kColumnsInTurn: return pack_block<Order::kColumnsInTurn>(outputs, stride, inputs, out);
  }
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

// The first weight of each of the 32 outputs in block `index` of an expert; gate/up blocks come first, then down blocks.
template <class Pointer>
inline void outputs_of_block(int64_t index, Pointer gate, Pointer up, Pointer down, int64_t wide, int64_t narrow,
                             Pointer* outputs) {
  if (index < kGateUpBlocks) {
    for (int64_t lane = 0; lane < kGateLanes; ++lane) {
      const int64_t output = index * kGateLanes + lane;
      outputs[lane] = output < kIntermediate ? gate + output * wide : nullptr;
      outputs[kGateLanes + lane] = output < kIntermediate ? up + output * wide : nullptr;
    }
  } else {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t output = (index - kGateUpBlocks) * kLanes + lane;
      outputs[lane] = output < kHidden ? down + output * narrow : nullptr;
    }
  }
}

// The bias of one lane of block `index`, or null where the block has no such output; gate's and up's are
// `stride` apart.
template <class Pointer>
inline Pointer bias_of_lane(int64_t index, int64_t lane, Pointer gate, Pointer up, Pointer down, int64_t stride) {
  if (index < kGateUpBlocks) {
    const int64_t row = index * kGateLanes + lane % kGateLanes;
    return row < kIntermediate ? (lane < kGateLanes ? gate : up) + row * stride : nullptr;
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
