// What the baseline code hands to a kernel variant: plain data, so that nothing compiled for an instruction set is shared
// with code that must run without it.
#pragma once

#include <cstdint>

namespace fdl {

enum class Phase : int32_t {
  gate_up,  // intermediate = bf16(activation(x Wgate + b, x Wup + b)), for one block of 32 intermediate columns
  down,     // y = intermediate Wdown + b, for one block of 64 output columns
};

// One block of outputs for some of one expert's tokens.
// Activations are the variant's elements: bf16, or fp32 holding bf16 values for variants without a bf16 multiply.
struct Task {
  Phase phase;
  int64_t tokens;
  int64_t pairs;             // depth: inputs of the block, in pairs
  const uint32_t* weights;   // the block: [pairs][64] lanes
  const float* bias;         // of the block's 64 lanes; null where experts have none
  const uint32_t* next;      // the block that this thread works on next, worth fetching; or null
  const void* activations;   // [rows][stride] elements; an odd depth is followed by a zero
  int64_t activation_stride; // elements
  const int32_t* rows;       // [tokens], which activation row each token reads; null: 0, 1, 2, ...
  float* sums;               // gate_up: scratch [tokens][64]. down: the result, rows sum_stride apart
  int64_t sum_stride;
  void* intermediate;        // gate_up: the result's first column, elements
  int64_t intermediate_stride;
  int64_t columns;           // gate_up: how many of the 32 columns exist
};

// A kernel variant and what the host has to know to call it.
struct Variant {
  const char* isa;
  const char* symbol;
  bool (*usable)();                        // baseline code: asks the CPU and the operating system
  int32_t element_bytes;                   // of an activation: 2 or 4
  void (*run)(const Task&);
  double (*burn)(int64_t steps);           // keeps the multiply units busy; returns the floating-point operations done
  void (*read)(const void*, int64_t);      // reads so many bytes
};

}  // namespace fdl
