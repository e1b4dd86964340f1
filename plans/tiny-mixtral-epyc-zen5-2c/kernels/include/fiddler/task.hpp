// What the baseline code hands to a kernel variant: plain data, so that nothing compiled for an instruction set is shared
// with code that must run without it.
#pragma once

#include <cstdint>

#include "layout.hpp"

namespace fdl {

enum class Phase : int32_t {
  gate_up,  // intermediate = bf16(activation(x Wgate + b, x Wup + b)), for one block of 16 intermediate columns
  down,     // y = scale * (intermediate Wdown + b), for one block of 32 output columns
};

// A tile of tokens and inputs, for variants that multiply such; the most tiles of tokens that one pass multiplies; and the
// most blocks of outputs that passes take in turns.
constexpr int64_t kTileRows = 16, kTileInputs = 32, kPassTiles = 3, kTileBlocks = 16;
constexpr int64_t kLineBytes = kTileInputs * 2;  // a row of such a tile, bf16

// Consecutive blocks of outputs for some of one expert's tokens.
//
// Activations are the variant's elements: bf16, or fp32 holding bf16 values for variants without a bf16 multiply. Each token's
// are filled up with zeros to a multiple of kTileInputs. They lie row by row, row_bytes() apart; or, for tiles, kTileInputs of
// each token after another, a line, then the next kTileInputs. Fewer such lines behind them than there are tiles may be read,
// whatever they hold, and as many rows of sums behind theirs written.
struct Task {
  Phase phase;
  int64_t tokens;
  int64_t pairs;              // depth: inputs of the block, in pairs
  int64_t blocks;
  const uint32_t* weights;    // the first block: [pairs][32] lanes
  int64_t weight_stride;      // lanes from one block to the next
  const float* bias;          // of the first block's 32 lanes, the others' behind; null where experts have none
  const uint32_t* next;       // the block that this thread works on after these, worth fetching; or null
  const void* activations;    // gate_up: of kHidden inputs; down: of kIntermediate
  float* sums;                // scratch, [tokens][32]; of tiles for each of kTileBlocks blocks, sums_stride apart
  int64_t sums_stride;
  float* const* results;      // down: each token's row
  const float* scales;        // down: what each token's results are multiplied by
  int64_t result_column;      // where in the rows the first block's begin
  bool past_caches;           // down: results are written past the caches; their lines are whole and aligned
  void* intermediate;         // gate_up: the result, as down reads it
  int64_t intermediate_column;  // where among a token's the first block's begin
  int64_t columns;            // how many there are of outputs from the first block's on
};

// A kernel variant and what the host has to know to call it.
struct Variant {
  const char* isa;
  const char* symbol;
  bool (*usable)();                        // baseline code: asks the CPU, and the operating system for the registers
  int32_t element_bytes;                   // of an activation: 2 or 4
  int32_t tiles_from;                      // multiplies so many tokens and more as tiles; 0: none
  void (*run)(const Task&);
  double (*burn)(int64_t steps);           // keeps the multiply units busy; returns the floating-point operations done
  void (*read)(const void*, int64_t);      // reads so many bytes
};

}  // namespace fdl

namespace {  // internal linkage: this header is compiled for every instruction set

// Elements of a row of activations, with the zeros behind it.
constexpr int64_t row_inputs(int64_t inputs) { return (inputs + fdl::kTileInputs - 1) / fdl::kTileInputs * fdl::kTileInputs; }

// A token's row: its inputs of gate and up, then those of down, so that the same code, made for one distance of rows, reads both.
// Between them is a line: tiles read fewer than one a token behind their inputs, while down's are written.
constexpr int64_t input_bytes(int64_t element_bytes) { return row_inputs(fdl::kHidden) * element_bytes + 64; }
// The next 33 modulo 64 cache lines: a register tile's rows never share a set of the first-level cache (an odd number is enough for
// that), and a unit's rows of a depth block, 32 lines each, fill all sets of the second-level one nearly alike.
constexpr int64_t row_bytes(int64_t element_bytes) {
  const int64_t lines = (input_bytes(element_bytes) + row_inputs(fdl::kIntermediate) * element_bytes) / 64;
  return ((lines + 30) / 64 * 64 + 33) * 64;
}

// Parts of something: as few as possible, none larger than `most` or more than one larger than another. Given `last`, the
// last part is that, if the others can be so few all the same.
struct Parts {
  Parts(int64_t total, int64_t most, int64_t last = 0) : count((total + most - 1) / most), last(0) {
    if (count > 1 && total - last <= (count - 1) * most) this->last = last;
    const int64_t equal = equal_count();
    least = equal ? (total - this->last) / equal : 0;
    larger = equal ? (total - this->last) % equal : 0;
  }
  int64_t equal_count() const { return count - (last > 0); }
  int64_t first(int64_t part) const { return part * least + (part < larger ? part : larger); }
  int64_t size(int64_t part) const { return part < equal_count() ? least + (part < larger) : last; }
  int64_t largest() const { return least + (larger > 0); }

  int64_t count, last, least, larger;
};

}  // namespace
