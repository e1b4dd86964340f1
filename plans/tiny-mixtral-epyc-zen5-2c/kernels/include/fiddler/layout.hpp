// The packed layout of one expert, as constants of the shape (docs/kernels.md draws it).
//
// Included by every translation unit, whatever its instruction set: constants only, no functions.
#pragma once

#include <cstdint>

#include "shape.hpp"

namespace fdl {

constexpr int64_t kLanes = 32;       // 32-bit lanes of a packed row; each holds two consecutive inputs of one output
constexpr int64_t kGateLanes = 16;   // lanes 0..15 of a gate/up row belong to gate, the others to up
constexpr int64_t kRowBytes = kLanes * 4;

constexpr int64_t kHiddenPairs = (kHidden + 1) / 2;
constexpr int64_t kIntermediatePairs = (kIntermediate + 1) / 2;
constexpr int64_t kGateUpBlocks = (kIntermediate + kGateLanes - 1) / kGateLanes;
constexpr int64_t kDownBlocks = (kHidden + kLanes - 1) / kLanes;
constexpr int64_t kGateUpBlockLanes = kHiddenPairs * kLanes;
constexpr int64_t kDownBlockLanes = kIntermediatePairs * kLanes;
constexpr int64_t kDownOffsetLanes = kGateUpBlocks * kGateUpBlockLanes;
constexpr int64_t kAllBlocks = kGateUpBlocks + kDownBlocks;
// Biases follow all matrices: one fp32 per lane and block.
constexpr int64_t kBiasOffsetLanes = kDownOffsetLanes + kDownBlocks * kDownBlockLanes;
constexpr int64_t kPackedBytes = (kBiasOffsetLanes + (kBias ? kAllBlocks * kLanes : 0)) * 4;

}  // namespace fdl
