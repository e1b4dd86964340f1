// One MoE layer's CPU share: tokens sorted by expert, two phases of tasks in one parallel region, weighted sum per token.
//
// The result does not depend on the number of threads: every sum is made by one task in a fixed order, and a token's experts
// are added in the order of its top-k.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "abi.h"
#include "layout.hpp"
#include "pool.hpp"
#include "task.hpp"

namespace fdl {

// Grown when a call needs more, then reused: a step of a model that ran before does not allocate.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  // Room for `bytes`, with its old contents gone; throws std::bad_alloc.
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      const int64_t wanted = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(wanted)));
      if (!data_) throw std::bad_alloc();
      size_ = wanted;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// Lays arrays one after another, 64-byte aligned: first counting with no base, then handing out.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* out = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return out;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

class MoeLayer {
 public:
  MoeLayer(const Variant& variant, Pool& pool) : variant_(variant), pool_(pool) {}

  int32_t run(const fdl_moe_call& call) {
    if (!count_rows(call)) return FDL_E_ARGUMENT;
    if (rows_ == 0) {
      std::fill(call.out, call.out + call.tokens * kHidden, 0.0f);
      return FDL_OK;
    }
    arrange();
    sort_rows(call);
    const bool alone = active_ * kPackedBytes + rows_ * kRowCost < kAloneCost;
    gathering_.reset(gathered_ * kHidden < kSerialElements ? 0 : divide_up(gathered_, kTokenStep));
    combining_.reset(call.tokens * kHidden < kSerialElements ? 0 : divide_up(call.tokens, kTokenStep));
    if (gathering_.total() == 0) gather(call, 0, gathered_);
    auto region = [&](int worker) {
      gathering_.work_off(pool_, [&](int64_t i) {
        gather(call, i * kTokenStep, std::min((i + 1) * kTokenStep, gathered_));
      });
      phase(call, Phase::gate_up, worker);
      phase(call, Phase::down, worker);
      combining_.work_off(pool_, [&](int64_t i) {
        combine(call, i * kTokenStep, std::min((i + 1) * kTokenStep, call.tokens));
      });
    };
    if (alone) {
      region(0);
    } else if (!pool_.run(region)) {
      return FDL_E_THREAD;
    }
    if (combining_.total() == 0) combine(call, 0, call.tokens);
    return FDL_OK;
  }

 private:
  // Tokens of an expert that one task takes: their sums stay in the second-level cache.
  static constexpr int64_t kTokenChunk = 256;
  // Below so many elements one thread copies or adds sooner than several agree to.
  static constexpr int64_t kSerialElements = 32768;
  // Tokens copied or added up by one task.
  static constexpr int64_t kTokenStep = 16;
  // A layer that reads fewer bytes of weights than this takes one thread some 50 us from memory, less from the cache. Another
  // thread has to wake first, and may find its CPU taken by a thread of torch's that spins after a parallel region. Computing
  // on a row takes time as well: about that of reading a 32nd of the weights.
  static constexpr int64_t kAloneCost = 2 * 1024 * 1024;
  static constexpr int64_t kRowCost = kPackedBytes / 32;
  // Weights of one task, at least: what a thread streams in some microseconds.
  static constexpr int64_t kTaskBytes = 128 * 1024;
  // Room that keeps consecutive rows out of the same cache sets when the sizes are powers of two.
  static constexpr int64_t kRowSkewBytes = 64;

  struct Expert {
    int32_t id;
    int32_t rows;
    int64_t first_row;
    int64_t first_task[2];
    int64_t first_block;  // of gate/up: those before are left to the accelerator
  };

  static constexpr int64_t kBlocks[2] = {kGateUpBlocks, kDownBlocks};
  // Blocks that one task takes of one expert, by phase.
  static constexpr int64_t kGroups[2] = {
      std::min((kTaskBytes + kGateUpBlockLanes * 4 - 1) / (kGateUpBlockLanes * 4), kGateUpBlocks),
      std::min((kTaskBytes + kDownBlockLanes * 4 - 1) / (kDownBlockLanes * 4), kDownBlocks)};

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  bool wanted(const fdl_moe_call& call, int64_t id) const {
    return id >= 0 && id < call.num_experts &&
           (!call.strategy || call.strategy[id] == FDL_CPU || call.strategy[id] == FDL_SPLIT);
  }

  // Counts the (token, choice) rows of each expert. False if one that is needed has no weights.
  bool count_rows(const fdl_moe_call& call) {
    choices_ = call.tokens * call.top_k;
    tokens_ = call.tokens;
    auto carve = [&](Carver carver) {
      counts_ = carver.take<int32_t>(call.num_experts);
      experts_ = carver.take<Expert>(call.num_experts);
      return carver.used();
    };
    carve(Carver(small_.reserve(carve(Carver(nullptr)))));
    std::fill(counts_, counts_ + call.num_experts, 0);
    for (int64_t i = 0; i < choices_; ++i)
      if (wanted(call, call.topk_ids[i])) ++counts_[call.topk_ids[i]];
    rows_ = 0;
    active_ = 0;
    int64_t tasks[2] = {0, 0};
    for (int32_t id = 0; id < call.num_experts; ++id) {
      if (counts_[id] == 0) continue;
      if (!call.experts[id]) return false;
      const bool split = call.strategy && call.strategy[id] == FDL_SPLIT;
      const int64_t first_block = split ? call.split_rows / kGateLanes : 0;
      experts_[active_++] = {id, counts_[id], rows_, {tasks[0], tasks[1]}, first_block};
      rows_ += counts_[id];
      const int64_t chunks = divide_up(counts_[id], kTokenChunk);
      tasks[0] += divide_up(kGateUpBlocks - first_block, kGroups[0]) * chunks;
      tasks[1] += divide_up(kDownBlocks, kGroups[1]) * chunks;
    }
    for (int phase = 0; phase < 2; ++phase) computing_[phase].reset(tasks[phase]);
    return true;
  }

  // Places all buffers of this call.
  void arrange() {
    const int64_t skew = kRowSkewBytes / variant_.element_bytes;
    input_stride_ = divide_up(kHidden, 64) * 64 + skew;
    middle_stride_ = divide_up(kIntermediate, 64) * 64 + skew;
    result_stride_ = divide_up(kHidden, kLanes) * kLanes + kRowSkewBytes / static_cast<int64_t>(sizeof(float));
    const int64_t most_inputs = std::min(tokens_, rows_);
    auto carve = [&](Carver carver) {
      gathered_tokens_ = carver.take<int32_t>(most_inputs);
      row_inputs_ = carver.take<int32_t>(rows_);
      choice_rows_ = carver.take<int32_t>(choices_);
      inputs_ = carver.take<char>(most_inputs * input_stride_ * variant_.element_bytes);
      middle_ = carver.take<char>(rows_ * middle_stride_ * variant_.element_bytes);
      results_ = carver.take<float>(rows_ * result_stride_);
      sums_ = carver.take<float>(pool_.threads() * kTokenChunk * kLanes);
      return carver.used();
    };
    carve(Carver(large_.reserve(carve(Carver(nullptr)))));
  }

  // Rows in the order of experts, then tokens; inputs that any row needs get a slot.
  void sort_rows(const fdl_moe_call& call) {
    for (int32_t i = 0; i < active_; ++i) counts_[experts_[i].id] = static_cast<int32_t>(experts_[i].first_row);
    gathered_ = 0;
    int64_t choice = 0;
    for (int64_t token = 0; token < call.tokens; ++token) {
      bool any = false;
      for (int32_t k = 0; k < call.top_k; ++k, ++choice) {
        const int64_t id = call.topk_ids[choice];
        choice_rows_[choice] = -1;
        if (!wanted(call, id)) continue;
        any = true;
        const int32_t row = counts_[id]++;
        row_inputs_[row] = static_cast<int32_t>(gathered_);
        choice_rows_[choice] = row;
      }
      if (any) gathered_tokens_[gathered_++] = static_cast<int32_t>(token);
    }
  }

  // Copies inputs [first, last) to rows of the variant's elements with a zero after an odd end.
  void gather(const fdl_moe_call& call, int64_t first, int64_t last) const {
    for (int64_t slot = first; slot < last; ++slot) {
      const uint16_t* from = call.hidden + gathered_tokens_[slot] * call.hidden_stride;
      char* to = inputs_ + slot * input_stride_ * variant_.element_bytes;
      if (variant_.element_bytes == 2) {
        std::memcpy(to, from, kHidden * 2);
      } else {
        uint32_t* wide = reinterpret_cast<uint32_t*>(to);
        for (int64_t i = 0; i < kHidden; ++i) wide[i] = static_cast<uint32_t>(from[i]) << 16;
      }
      std::memset(to + kHidden * variant_.element_bytes, 0, variant_.element_bytes);
    }
  }

  // One task: some blocks of one expert's weights for some of its rows.
  struct Place {
    const uint32_t* packed;
    int64_t first_block, last_block, first_row, last_row;
    int64_t first_pair;  // of the intermediate columns that are computed here
  };

  // Where a task of phase `index` is; `at` is an expert at or before its own, and becomes it.
  Place locate(const fdl_moe_call& call, int index, int64_t task, int32_t& at) const {
    while (at + 1 < active_ && experts_[at + 1].first_task[index] <= task) ++at;
    const Expert& expert = experts_[at];
    // Chunks of tokens of the same weights follow each other: the second finds them in the shared cache.
    const int64_t chunks = divide_up(expert.rows, kTokenChunk);
    const int64_t group = (task - expert.first_task[index]) / chunks;
    const int64_t chunk = (task - expert.first_task[index]) % chunks;
    Place place;
    place.packed = reinterpret_cast<const uint32_t*>(call.experts[expert.id]);
    place.first_block = (index == 0 ? expert.first_block : 0) + group * kGroups[index];
    place.first_pair = expert.first_block * kGateLanes / 2;
    place.last_block = std::min(place.first_block + kGroups[index], kBlocks[index]);
    place.first_row = expert.first_row + expert.rows * chunk / chunks;
    place.last_row = expert.first_row + expert.rows * (chunk + 1) / chunks;
    return place;
  }

  static const uint32_t* weights_of(const Place& place, Phase which, int64_t block) {
    return which == Phase::gate_up
               ? place.packed + block * kGateUpBlockLanes
               : place.packed + kDownOffsetLanes + block * kDownBlockLanes + place.first_pair * kLanes;
  }

  // Of an expert that is split, the down biases are added here: the packed half on the accelerator has none.
  static const float* bias_of(const Place& place, Phase which, int64_t block) {
    return reinterpret_cast<const float*>(place.packed + kBiasOffsetLanes) +
           (which == Phase::gate_up ? block : kGateUpBlocks + block) * kLanes;
  }

  // Takes tasks of a phase until none is left. While many are left a thread claims its next one early, to fetch the weights;
  // near the end it does not, so that no thread waits for a task that another holds but has not begun.
  void phase(const fdl_moe_call& call, Phase which, int worker) {
    const int index = which == Phase::gate_up ? 0 : 1;
    Tasks& tasks = computing_[index];
    int32_t at = 0;
    int64_t task = tasks.claim();
    while (task < tasks.total()) {
      const Place place = locate(call, index, task, at);
      const bool early = task + 4 * pool_.threads() < tasks.total();
      const int64_t following = early ? tasks.claim() : tasks.total();
      const uint32_t* after = nullptr;
      if (following < tasks.total()) {
        const Place then = locate(call, index, following, at);
        after = weights_of(then, which, then.first_block);
      }
      for (int64_t block = place.first_block; block < place.last_block; ++block) {
        const uint32_t* next = block + 1 < place.last_block ? weights_of(place, which, block + 1) : after;
        run_block(place, which, block, next, worker);
      }
      tasks.complete();
      task = early ? following : tasks.claim();
    }
    tasks.wait(pool_);
  }

  void run_block(const Place& place, Phase which, int64_t block, const uint32_t* next, int worker) const {
    Task task{};
    task.phase = which;
    task.tokens = place.last_row - place.first_row;
    task.weights = weights_of(place, which, block);
    if constexpr (kBias) task.bias = bias_of(place, which, block);
    task.next = next;
    if (which == Phase::gate_up) {
      task.pairs = kHiddenPairs;
      task.activations = inputs_;
      task.activation_stride = input_stride_;
      task.rows = row_inputs_ + place.first_row;
      task.sums = sums_ + worker * kTokenChunk * kLanes;
      task.sum_stride = kLanes;
      task.intermediate = middle_ + (place.first_row * middle_stride_ + block * kGateLanes) * variant_.element_bytes;
      task.intermediate_stride = middle_stride_;
      task.columns = std::min(kGateLanes, kIntermediate - block * kGateLanes);
    } else {
      task.pairs = kIntermediatePairs - place.first_pair;
      task.activations =
          middle_ + (place.first_row * middle_stride_ + 2 * place.first_pair) * variant_.element_bytes;
      task.activation_stride = middle_stride_;
      task.sums = results_ + place.first_row * result_stride_ + block * kLanes;
      task.sum_stride = result_stride_;
    }
    variant_.run(task);
  }

  // out[token] = sum over its choices of weight * result, for tokens [first, last).
  void combine(const fdl_moe_call& call, int64_t first, int64_t last) const {
    for (int64_t token = first; token < last; ++token) {
      float* out = call.out + token * kHidden;
      bool any = false;
      for (int32_t k = 0; k < call.top_k; ++k) {
        const int64_t choice = token * call.top_k + k;
        if (choice_rows_[choice] < 0) continue;
        const float weight = call.topk_weights[choice];
        const float* result = results_ + choice_rows_[choice] * result_stride_;
        if (any) {
          for (int64_t i = 0; i < kHidden; ++i) out[i] += weight * result[i];
        } else {
          for (int64_t i = 0; i < kHidden; ++i) out[i] = weight * result[i];
        }
        any = true;
      }
      if (!any) std::fill(out, out + kHidden, 0.0f);
    }
  }

  const Variant& variant_;
  Pool& pool_;
  Workspace small_, large_;

  // Of the call in progress.
  int64_t tokens_ = 0, choices_ = 0, rows_ = 0, gathered_ = 0;
  int32_t active_ = 0;
  int32_t* counts_ = nullptr;
  Expert* experts_ = nullptr;
  int32_t* gathered_tokens_ = nullptr;
  int32_t* row_inputs_ = nullptr;
  int32_t* choice_rows_ = nullptr;
  int64_t input_stride_ = 0, middle_stride_ = 0, result_stride_ = 0;
  char* inputs_ = nullptr;
  char* middle_ = nullptr;
  float* results_ = nullptr;
  float* sums_ = nullptr;
  Tasks gathering_, computing_[2], combining_;
};

}  // namespace fdl
