// Where packing puts an expert's blocks and where a layer reads them, by memory node: near_memory TOKENS NODES READERS
//
// A library whose variant only notes who reads which weights, on four threads that this program numbers itself. Packing takes its
// threads to be on NODES nodes, the layer on READERS: the same, or another for comparison. Prints "near COUNT" and "far COUNT":
// blocks read on the node that packed them, and on another.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "fiddler/packing.hpp"
#include "team.hpp"

namespace {

constexpr int kThreads = 4;
std::mutex mutex;
using Notes = std::multimap<const void*, int>;  // a block's address, a thread's number
Notes packed, computed;

// Who is early waits a little, so that nobody helps another with his share.
void note(Notes& notes, const void* block) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    notes.emplace(block, team::number);
  }
  std::this_thread::sleep_for(std::chrono::microseconds(500));
}

}  // namespace

namespace fdl {
inline void noted_pack_block(Order, const uint16_t* const*, int64_t, int64_t, uint32_t* out) { note(packed, out); }
}  // namespace fdl

// From here on packing is noted, not done.
#define pack_block noted_pack_block
#include "fiddler/library.hpp"
#undef pack_block

namespace fdl {

void compute(const Task& task) {
  for (int64_t block = 0; block < task.blocks; ++block) note(computed, task.weights + block * task.weight_stride);
}
const Variant kVariants[] = {{"noting", "", always, 2, 0, compute, nullptr, nullptr}};
const int kVariantCount = 1;
const char kDescription[] = "";

}  // namespace fdl

namespace {

constexpr int32_t kNodes[] = {0, 0, 0, 0};  // nothing is placed here, only counted

fdl_kernels* open(int nodes) {
  fdl_kernels* kernels = nullptr;
  if (fdl_open(nullptr, kThreads, nullptr, kNodes, nodes, &team::kTeam, &kernels) != FDL_OK) std::exit(1);
  return kernels;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const int64_t tokens = std::atoll(arguments[1]);
  const int nodes = std::atoi(arguments[2]), readers = std::atoi(arguments[3]);
  constexpr int kExperts = 8;
  fdl_kernels* packing = open(nodes);
  fdl_kernels* layer = open(readers);
  std::vector<uint16_t> weights(static_cast<size_t>(fdl::kHidden * fdl::kIntermediate));
  const fdl_expert expert{weights.data(), weights.data(), weights.data(), nullptr, nullptr, nullptr,
                          {fdl::kHidden, 1}, {fdl::kIntermediate, 1}, 1};
  std::vector<void*> memory;
  const uint16_t* experts[kExperts];
  for (auto& of : experts) {
    memory.push_back(std::aligned_alloc(64, static_cast<size_t>(fdl::kPackedBytes)));
    auto* to = static_cast<uint16_t*>(memory.back());
    if (fdl_pack(packing, &expert, to) != FDL_OK) return 1;
    of = to;
  }
  std::vector<uint16_t> hidden(static_cast<size_t>(tokens * fdl::kHidden));
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < tokens; ++i) ids.push_back(i % kExperts);
  const std::vector<float> scales(ids.size(), 1.0f);
  std::vector<float> out(hidden.size());
  const fdl_moe_call call{hidden.data(), fdl::kHidden, ids.data(), scales.data(), nullptr, experts, out.data(), tokens, 1, kExperts, 0};
  if (fdl_moe(layer, &call) != FDL_OK) return 1;
  int near = 0, far = 0;
  for (const auto& [block, thread] : computed) {
    const auto found = packed.find(block);
    if (found == packed.end()) return 1;
    ++(found->second * nodes / kThreads == thread * nodes / kThreads ? near : far);
  }
  std::printf("near %d\nfar %d\n", near, far);
  fdl_close(packing);
  fdl_close(layer);
  for (void* of : memory) std::free(of);
  return 0;
}
