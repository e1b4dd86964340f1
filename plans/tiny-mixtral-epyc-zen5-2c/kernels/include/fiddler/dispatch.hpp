// Which experts of a layer run where: docs/design.md, dispatch. Neither allocates nor blocks.
//
// The same rule as fiddler_runtime/makespan.py, which says what is searched; here each search over how many of the sorted
// misses to stream is a bisection, as the CPU's time falls with every one and the accelerator's grows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "abi.h"

namespace fdl {

constexpr int32_t kMostExperts = 1024;
constexpr int32_t kExactMisses = 12;  // up to so many, every subset is tried
constexpr int32_t kTopMisses = 6;     // beyond, every subset of so many, with every prefix and every suffix of the others
constexpr int32_t kBlockRows = 64;    // an expert is split between whole blocks of so many intermediate rows

// table[n], or beyond its end the line through its last two entries.
inline double table_at(const float* table, int32_t length, int64_t n) {
  if (n < length) return table[n];
  const double last = table[length - 1];
  const double slope = length > 1 ? last - static_cast<double>(table[length - 2]) : 0.0;
  return last + slope * static_cast<double>(n - (length - 1));
}

// A candidate: the misses in `mask`, and those of ranks [first, last), are streamed; of rank `last` the first `rows` rows.
struct Choice {
  double cpu_us, accelerator_us;
  int32_t streamed, mask, first, last, rows;
  double span() const { return std::max(cpu_us, accelerator_us); }
};

// One layer's misses by rank, the one with most tokens first, and the search for what to stream of them.
class Layer {
 public:
  Layer(const fdl_tables& tables, bool any_resident, double resident_us)
      : tables_(tables), any_resident_(any_resident), resident_us_(resident_us) {}

  void add(int64_t tokens) {
    c_[misses_] = table_at(tables_.cpu_us, tables_.length, tokens);
    g_[misses_++] = table_at(tables_.gpu_us, tables_.length, tokens);
  }

  Choice solve() {
    cpu_from_[misses_] = 0.0;
    for (int32_t rank = misses_; rank-- > 0;) cpu_from_[rank] = cpu_from_[rank + 1] + c_[rank];
    best_.cpu_us = misses_ > 0 ? tables_.cpu_overhead_us + cpu_from_[0] : 0.0;
    best_.accelerator_us = any_resident_ ? tables_.gpu_overhead_us + resident_us_ : 0.0;
    best_.streamed = best_.mask = best_.first = best_.last = best_.rows = 0;
    if (misses_ == 0) return best_;
    const int32_t top = misses_ <= kExactMisses ? misses_ : kTopMisses;
    tabulate_subsets(top);
    search_subsets<false>(top);
    if (misses_ > top) search_subsets<true>(top);
    if (tables_.rows > kBlockRows) search_split();
    return best_;
  }

 private:
  void take(const Choice& choice) {
    const double span = choice.span(), best = best_.span();
    if (span < best || (span == best && choice.streamed < best_.streamed)) best_ = choice;
  }

  double cpu_time(double work) const { return tables_.cpu_overhead_us + (1.0 + tables_.contention) * work; }

  // For every subset of the first `top` ranks: its copies, when it is computed behind the residents, its time on the CPU.
  void tabulate_subsets(int32_t top) {
    finish_[0] = resident_us_;
    subset_cpu_[0] = 0.0;
    copies_[0] = 0;
    for (int32_t rank = 0; rank < top; ++rank) {
      const int32_t half = 1 << rank;
      for (int32_t mask = 0; mask < half; ++mask) {
        copies_[half + mask] = static_cast<uint8_t>(copies_[mask] + 1);
        finish_[half + mask] = std::max(finish_[mask], copies_[half + mask] * stream()) + g_[rank];
        subset_cpu_[half + mask] = subset_cpu_[mask] + c_[rank];
      }
    }
  }

  // k of the other ranks: work_[k] on the accelerator, left_[k] for the CPU; and if one of their copies is the last that the
  // computing waits for, they are done wait_[k] after the copies before theirs.
  template <bool suffix>
  void tabulate_rest(int32_t top) {
    const int32_t rest = misses_ - top;
    work_[0] = 0.0;
    wait_[0] = -1e300;
    left_[suffix ? rest : 0] = suffix ? 0.0 : cpu_from_[top];
    double latest = -1e300;
    for (int32_t k = 1; k <= rest; ++k) {
      const int32_t rank = suffix ? misses_ - k : top + k - 1;
      work_[k] = work_[k - 1] + g_[rank];
      if constexpr (suffix) {
        left_[rest - k] = left_[rest - k + 1] + c_[top + k - 1];
        latest = std::max(latest, (rest - k + 1) * stream() + work_[k]);
        wait_[k] = latest - (rest - k) * stream();
      } else {
        left_[k] = cpu_from_[top + k];
        latest = std::max(latest, k * stream() - work_[k - 1]);
        wait_[k] = latest + work_[k];
      }
    }
  }

  template <bool suffix>
  void search_subsets(int32_t top) {
    tabulate_rest<suffix>(top);
    const int32_t rest = misses_ - top, full = (1 << top) - 1;
    for (int32_t mask = 0; mask <= full; ++mask) {
      const auto at = [&](int32_t k) {
        Choice choice;
        const bool all = mask == full && k == rest;
        choice.cpu_us = all ? 0.0 : cpu_time(subset_cpu_[full ^ mask] + left_[k]);
        choice.accelerator_us = tables_.gpu_overhead_us + std::max(finish_[mask] + work_[k], copies_[mask] * stream() + wait_[k]);
        choice.streamed = copies_[mask] + k;
        choice.mask = mask;
        choice.first = suffix ? misses_ - k : top;
        choice.last = suffix ? misses_ : top + k;
        choice.rows = 0;
        return choice;
      };
      bisect(mask == 0 ? 1 : 0, rest, at);
    }
  }

  // The first k ranks whole, and of the next one some blocks, copied last. The split expert takes the accelerator as long as
  // a whole one (launches do not shrink), the CPU and the copy in proportion to its rows.
  void search_split() {
    const int32_t blocks = (tables_.rows + kBlockRows - 1) / kBlockRows;
    work_[0] = resident_us_;  // here: when the first k are computed
    for (int32_t k = 0; k < misses_; ++k) work_[k + 1] = std::max(work_[k], (k + 1) * stream()) + g_[k];
    bisect(1, misses_ * blocks, [&](int32_t at) {
      const int32_t k = at / blocks, block = at % blocks;
      const double share = static_cast<double>(block) * kBlockRows / tables_.rows;
      Choice choice{};
      choice.cpu_us = k < misses_ ? cpu_time(cpu_from_[k + 1] + (1.0 - share) * c_[k]) : 0.0;
      choice.accelerator_us =
          tables_.gpu_overhead_us + (block > 0 ? std::max(work_[k], (k + share) * stream()) + g_[k] : work_[k]);
      choice.streamed = k + (block > 0);
      choice.last = k;
      choice.rows = block * kBlockRows;
      return choice;
    });
  }

  // Takes the better of the two candidates in [low, high] between which the CPU's time falls to the accelerator's.
  template <class At>
  void bisect(int32_t low, int32_t high, At at) {
    if (low > high) return;
    const int32_t least = low;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      const Choice choice = at(middle);
      if (choice.cpu_us <= choice.accelerator_us) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    if (low > least) take(at(low - 1));
    take(at(low));
  }

  double stream() const { return tables_.stream_us; }

  const fdl_tables& tables_;
  const bool any_resident_;
  const double resident_us_;
  int32_t misses_ = 0;
  Choice best_;
  double c_[kMostExperts], g_[kMostExperts], cpu_from_[kMostExperts + 1];
  double work_[kMostExperts + 1], left_[kMostExperts + 1], wait_[kMostExperts + 1];
  double finish_[1 << kExactMisses], subset_cpu_[1 << kExactMisses];
  uint8_t copies_[1 << kExactMisses];
};

inline int32_t dispatch(const fdl_tables& tables, const int64_t* topk_ids, int64_t count, const uint8_t* resident,
                        int32_t num_experts, int32_t* counts, uint8_t* strategy, int32_t* split, float* lane_us) {
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

  Layer layer(tables, any_resident, resident_us);
  for (int32_t rank = 0; rank < missing; ++rank) layer.add(static_cast<int64_t>(misses[rank] >> 32));
  const Choice best = layer.solve();
  split[0] = -1;
  split[1] = 0;
  for (int32_t rank = 0; rank < missing; ++rank) {
    const auto id = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(misses[rank]));
    const bool whole = (rank < kExactMisses && (best.mask >> rank & 1)) || (rank >= best.first && rank < best.last);
    strategy[id] = whole ? FDL_STREAMED : FDL_CPU;
    if (best.rows > 0 && rank == best.last) {
      strategy[id] = FDL_SPLIT;
      split[0] = id;
      split[1] = best.rows;
    }
  }
  lane_us[0] = static_cast<float>(best.cpu_us);
  lane_us[1] = static_cast<float>(best.accelerator_us);
  return FDL_OK;
}

}  // namespace fdl
