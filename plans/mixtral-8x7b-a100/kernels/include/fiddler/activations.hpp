// A layer's inputs laid into the tiles that kernels read (task.hpp). Baseline code (SSE2).
#pragma once

#include <emmintrin.h>

#include <cstdint>
#include <cstring>

#include "task.hpp"

namespace fdl {

// Four pairs of bf16 as the variant's elements: themselves, or each number as fp32.
template <int kElementBytes>
inline void store_pairs(__m128i pairs, char* to) {
  if constexpr (kElementBytes == 2) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pairs);
  } else {
    const __m128i even = _mm_slli_epi32(pairs, 16), odd = _mm_and_si128(pairs, _mm_set1_epi32(-65536));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(even, odd));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi32(even, odd));
  }
}

template <int kElementBytes>
inline void store_pair(uint32_t pair, char* to) {
  if constexpr (kElementBytes == 2) {
    std::memcpy(to, &pair, 4);
  } else {
    const uint64_t wide = (static_cast<uint64_t>(pair & 0xffff0000u) << 32) | (static_cast<uint64_t>(pair & 0xffffu) << 16);
    std::memcpy(to, &wide, 8);
  }
}

// rows: the inputs of the tile's tokens, `inputs` bf16 each. to: [ceil(inputs / 2)][tokens][2] elements.
template <int kElementBytes>
inline void fill_tile(const uint16_t* const* rows, int64_t tokens, int64_t inputs, char* to) {
  constexpr int64_t kPair = 2 * kElementBytes;
  const int64_t whole = inputs / 2, quads = whole / 4 * 4;
  for (int64_t p = 0; p < quads; p += 4) {
    int64_t m = 0;
    for (; m + 4 <= tokens; m += 4) {
      __m128i r[4];
      for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[m + i] + 2 * p));
      const __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpacklo_epi32(r[2], r[3]);
      const __m128i c = _mm_unpackhi_epi32(r[0], r[1]), d = _mm_unpackhi_epi32(r[2], r[3]);
      char* out = to + (p * tokens + m) * kPair;
      store_pairs<kElementBytes>(_mm_unpacklo_epi64(a, b), out);
      store_pairs<kElementBytes>(_mm_unpackhi_epi64(a, b), out + tokens * kPair);
      store_pairs<kElementBytes>(_mm_unpacklo_epi64(c, d), out + 2 * tokens * kPair);
      store_pairs<kElementBytes>(_mm_unpackhi_epi64(c, d), out + 3 * tokens * kPair);
    }
    for (; m < tokens; ++m) {
      uint32_t quad[4];
      std::memcpy(quad, rows[m] + 2 * p, sizeof quad);
      for (int64_t i = 0; i < 4; ++i) store_pair<kElementBytes>(quad[i], to + ((p + i) * tokens + m) * kPair);
    }
  }
  for (int64_t p = quads; p < (inputs + 1) / 2; ++p) {
    for (int64_t m = 0; m < tokens; ++m) {
      const uint32_t odd = p < whole ? rows[m][2 * p + 1] : 0;  // a lone last input meets a zero
      store_pair<kElementBytes>(rows[m][2 * p] | odd << 16, to + (p * tokens + m) * kPair);
    }
  }
}

// The same by rows, `stride` bf16 apart, with zeros up to whole steps.
inline void fill_rows(const uint16_t* const* rows, int64_t tokens, int64_t inputs, int64_t stride, char* to) {
  const int64_t zeros = (inputs + kTileInputs - 1) / kTileInputs * kTileInputs - inputs;
  for (int64_t m = 0; m < tokens; ++m) {
    char* const row = to + m * stride * 2;
    std::memcpy(row, rows[m], static_cast<size_t>(inputs * 2));
    std::memset(row + inputs * 2, 0, static_cast<size_t>(zeros * 2));
  }
}

}  // namespace fdl
