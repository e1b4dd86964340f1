// One generated variant's register tiles by themselves, for tiles.py: KERNEL is its file, ISA its policy.
#include KERNEL

namespace {

constexpr int64_t kPairs = fdl::kHiddenPairs;
constexpr int64_t kRow = kStride<ISA>;
alignas(64) uint32_t weights[kPairs * fdl::kLanes];
alignas(64) typename ISA::Element inputs[Tile::kTokens * kRow];
alignas(64) float sums[Tile::kTokens * fdl::kLanes];

// All ones: every sum is the number of inputs.
const bool kFilled = [] {
  for (uint32_t& pair : weights) pair = 0x3f803f80;
  for (auto& input : inputs) input = sizeof input == 2 ? 0x3f80 : 1;
  return true;
}();

}  // namespace

extern "C" const float* results() { return sums; }  // [tokens][32], of the last call

// Both return the floating-point operations done.
extern "C" double peak(int64_t steps) { return burn<ISA>(steps); }

extern "C" double tiles(int64_t tokens, int64_t calls) {
  constexpr int kVectors = fdl::kLanes / ISA::kLanes;
  const int64_t passes = kVectors / Tile::vectors(static_cast<int>(tokens));
  for (int64_t call = 0; call < calls; ++call) {
    Block block{weights, kPairs, nullptr, passes, 0};
    tile<ISA, Tile, Tile::kPlaces>(tokens, inputs, block, nullptr, sums);
    asm volatile("" : : : "memory");
  }
  return 4.0 * kPairs * fdl::kLanes * static_cast<double>(tokens * calls);
}
