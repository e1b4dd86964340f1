// Which experts of a layer run where: docs/design.md, dispatch. Neither allocates nor blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "abi.h"

namespace fdl {

constexpr int32_t kMostExperts = 1024;

// table[n], or beyond its end the line through its last two entries.
inline double table_at(const float* table, int32_t length, int64_t n) {
  if (n < length) return table[n];
  const double last = table[length - 1];
  const double slope = length > 1 ? last - static_cast<double>(table[length - 2]) : 0.0;
  return last + slope * static_cast<double>(n - (length - 1));
}

inline int32_t dispatch(const fdl_tables& tables, const int64_t* topk_ids, int64_t count, const uint8_t* resident,
                        int32_t num_experts, int32_t* counts, uint8_t* strategy, float* lane_us) {
  std::fill(counts, counts + num_experts, 0);
  for (int64_t i = 0; i < count; ++i)
    if (topk_ids[i] >= 0 && topk_ids[i] < num_experts) ++counts[topk_ids[i]];

  // Misses, most tokens first; among equals the lower index. The key sorts that way by itself.
  uint64_t misses[kMostExperts];
  int32_t missing = 0;
  double resident_us = 0.0;
  bool any_resident = false;
  for (int32_t id = 0; id < num_experts; ++id) {
    strategy[id] = FDL_IDLE;
    if (counts[id] == 0) continue;
    if (resident[id]) {
      strategy[id] = FDL_RESIDENT;
      resident_us += table_at(tables.gpu_us, tables.length, counts[id]);
      any_resident = true;
    } else {
      misses[missing++] = (static_cast<uint64_t>(counts[id]) << 32) | (0xffffffffu - static_cast<uint32_t>(id));
    }
  }
  std::sort(misses, misses + missing, [](uint64_t a, uint64_t b) { return a > b; });
  const auto tokens_of = [&](int32_t i) { return static_cast<int64_t>(misses[i] >> 32); };

  double cpu_from[kMostExperts + 1];  // the CPU's time for misses i, i + 1, ...
  cpu_from[missing] = 0.0;
  for (int32_t i = missing - 1; i >= 0; --i)
    cpu_from[i] = cpu_from[i + 1] + table_at(tables.cpu_us, tables.length, tokens_of(i));

  // k misses are streamed. Copies follow each other, each expert runs after its copy: finish(k) is the last one's end, and
  // streamed_us the work that must also fit behind the resident experts' work.
  int32_t best = 0;
  double best_span = 0.0, best_cpu = 0.0, best_gpu = 0.0;
  double finish = 0.0, streamed_us = 0.0;
  for (int32_t k = 0; k <= missing; ++k) {
    if (k > 0) {
      const double g = table_at(tables.gpu_us, tables.length, tokens_of(k - 1));
      finish = std::max(finish, static_cast<double>(k) * tables.stream_us) + g;
      streamed_us += g;
    }
    const double slow_down = k > 0 ? 1.0 + tables.contention : 1.0;
    const double cpu = k < missing ? tables.cpu_overhead_us + slow_down * cpu_from[k] : 0.0;
    const double gpu = any_resident || k > 0 ? std::max(resident_us + streamed_us, finish) + tables.gpu_overhead_us : 0.0;
    const double span = std::max(cpu, gpu);
    if (k == 0 || span < best_span) {
      best = k;
      best_span = span;
      best_cpu = cpu;
      best_gpu = gpu;
    }
  }
  for (int32_t i = 0; i < missing; ++i) {
    const auto id = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(misses[i]));
    strategy[id] = i < best ? FDL_STREAMED : FDL_CPU;
  }
  lane_us[0] = static_cast<float>(best_cpu);
  lane_us[1] = static_cast<float>(best_gpu);
  return FDL_OK;
}

}  // namespace fdl
