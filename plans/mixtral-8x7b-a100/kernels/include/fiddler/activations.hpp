// A token's inputs as kernels read them (task.hpp). Baseline code (SSE2).
#pragma once

#include <emmintrin.h>

#include <cstdint>
#include <cstring>

#include "task.hpp"

namespace fdl {

// `inputs` bf16 as the variant's elements, themselves or each number as fp32, with zeros up to a multiple of kTileInputs.
inline void fill_row(const uint16_t* from, int64_t inputs, int64_t element_bytes, char* to) {
  const int64_t zeros = row_inputs(inputs) - inputs;
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

// The `inputs` bf16 at `from(row)`, of rows [first, last), as lines of kTileInputs, zeros up to the last one's end: the rows'
// first lines behind each other, `stride` bytes further their second ones.
template <class From>
void fill_lines(From from, int64_t first, int64_t last, int64_t inputs, int64_t stride, char* to) {
  const int64_t over = inputs % kTileInputs;
  for (int64_t input = 0; input < inputs - over; input += kTileInputs, to += stride)
    for (int64_t row = first; row < last; ++row) std::memcpy(to + (row - first) * kLineBytes, from(row) + input, kLineBytes);
  for (int64_t row = first; over > 0 && row < last; ++row) {
    char* const line = to + (row - first) * kLineBytes;
    std::memset(line, 0, kLineBytes);
    std::memcpy(line, from(row) + inputs - over, static_cast<size_t>(over * 2));
  }
}

}  // namespace fdl
