// A token's inputs as kernels read them (task.hpp). Baseline code (SSE2).
#pragma once

#include <emmintrin.h>

#include <cstdint>
#include <cstring>

#include "task.hpp"

namespace fdl {

// `inputs` bf16 as the variant's elements, themselves or each number as fp32, with zeros up to a multiple of kTileInputs.
inline void fill_row(const uint16_t* from, int64_t inputs, int64_t element_bytes, char* to) {
  const int64_t zeros = (inputs + kTileInputs - 1) / kTileInputs * kTileInputs - inputs;
  if (element_bytes == 2) {
    std::memcpy(to, from, static_cast<size_t>(inputs * 2));
  } else {
    const __m128i zero = _mm_setzero_si128();
    const int64_t eights = inputs / 8 * 8;
    for (int64_t i = 0; i < eights; i += 8) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * 4), _mm_unpacklo_epi16(zero, eight));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * 4 + 16), _mm_unpackhi_epi16(zero, eight));
    }
    for (int64_t i = eights; i < inputs; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(to + i * 4, &bits, 4);
    }
  }
  std::memset(to + inputs * element_bytes, 0, static_cast<size_t>(zeros * element_bytes));
}

// `inputs` bf16 as lines of kTileInputs, `stride` bytes apart, with zeros up to the last one's end.
inline void fill_lines(const uint16_t* from, int64_t inputs, int64_t stride, char* to) {
  const int64_t lines = inputs / kTileInputs, over = inputs % kTileInputs;
  for (int64_t line = 0; line < lines; ++line, from += kTileInputs, to += stride) std::memcpy(to, from, kLineBytes);
  if (over == 0) return;
  std::memset(to, 0, kLineBytes);
  std::memcpy(to, from, static_cast<size_t>(over * 2));
}

}  // namespace fdl
