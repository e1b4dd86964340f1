// Whose blocks a layer's threads read, by memory node: near_memory TOKENS NODES READERS
//
// A library whose variant only notes who reads which weights, on four threads that this program numbers itself. An expert's blocks
// are taken to lie in NODES parts, as fdl_settle brings them there, and the threads to be on READERS nodes: the same, or another
// number for comparison. Prints "near COUNT" and "far COUNT": blocks read by threads of the node of their part, and by others.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "fiddler/library.hpp"
#include "team.hpp"

namespace {

constexpr int kThreads = 4;
std::mutex mutex;
std::vector<std::pair<const uint32_t*, int>> reads;  // a block's address, a thread's number

// Of the part that a block of an expert lies in.
int node_of(int64_t lane, int nodes) {
  const bool wide = lane < fdl::kDownOffsetLanes;
  const int64_t block = wide ? lane / fdl::kGateUpBlockLanes : (lane - fdl::kDownOffsetLanes) / fdl::kDownBlockLanes;
  int node = nodes - 1;
  while ((wide ? fdl::kGateUpBlocks : fdl::kDownBlocks) * node / nodes > block) --node;
  return node;
}

}  // namespace

namespace fdl {

void compute(const Task& task) {
  for (int64_t block = 0; block < task.blocks; ++block) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      reads.emplace_back(task.weights + block * task.weight_stride, team::number);
    }
    // Who is early waits a little, so that nobody helps another with his share.
    std::this_thread::sleep_for(std::chrono::microseconds(500));
  }
}
const Variant kVariants[] = {{"noting", "", always, 2, 0, compute, nullptr, nullptr}};
const int kVariantCount = 1;
const char kDescription[] = "";

}  // namespace fdl

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const int64_t tokens = std::atoll(arguments[1]);
  const int nodes = std::atoi(arguments[2]), readers = std::atoi(arguments[3]);
  constexpr int kExperts = 8;
  constexpr int32_t kNodes[kThreads] = {};  // nothing is placed here, only counted
  fdl_kernels* layer = nullptr;
  if (fdl_open(nullptr, kThreads, nullptr, kNodes, readers, &team::kTeam, &layer) != FDL_OK) return 1;
  std::vector<uint32_t> weights(static_cast<size_t>(kExperts * fdl::kPackedBytes / 4));  // read by nobody
  const uint16_t* experts[kExperts];
  for (int64_t e = 0; e < kExperts; ++e)
    experts[e] = reinterpret_cast<const uint16_t*>(weights.data()) + e * fdl::kPackedBytes / 2;
  std::vector<uint16_t> hidden(static_cast<size_t>(tokens * fdl::kHidden));
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < tokens; ++i) ids.push_back(i % kExperts);
  const std::vector<float> scales(ids.size(), 1.0f);
  std::vector<float> out(hidden.size());
  const fdl_moe_call call{hidden.data(), fdl::kHidden, ids.data(), scales.data(), nullptr, experts, out.data(), tokens, 1, kExperts, 0};
  if (fdl_moe(layer, &call) != FDL_OK) return 1;
  int near = 0, far = 0;
  for (const auto& [block, thread] : reads) {
    const int64_t lane = (block - weights.data()) % (fdl::kPackedBytes / 4);
    ++(node_of(lane, nodes) == thread * nodes / kThreads ? near : far);
  }
  std::printf("near %d\nfar %d\n", near, far);
  fdl_close(layer);
  return 0;
}
