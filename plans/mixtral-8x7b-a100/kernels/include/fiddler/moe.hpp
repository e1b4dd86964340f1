// One MoE layer's CPU share in one parallel region of four stages: inputs sorted by expert; gate and up; down
// and weights; sum per token.
//
// The result does not depend on the number of threads: every sum is made by one task in a fixed order, and a token's experts
// are added in the order of its top-k.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "abi.h"
#include "activations.hpp"
#include "layout.hpp"
#include "pool.hpp"
#include "stage.hpp"
#include "task.hpp"

namespace fdl {

// Grown when a call needs more, then reused: a step of a model that ran before does not allocate.
class Workspace {
 public:
  explicit Workspace(bool huge_pages = false) : huge_pages_(huge_pages) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  // Room for `bytes`, with its old contents gone; throws std::bad_alloc.
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      const int64_t page = huge_pages_ && bytes >= kHugePage / 2 ? kHugePage : 4096;
      const int64_t wanted = (bytes + bytes / 4 + page - 1) / page * page;
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(wanted)));
      if (!data_) throw std::bad_alloc();
      if (page == kHugePage) madvise(data_, static_cast<size_t>(wanted), MADV_HUGEPAGE);  // refused: as it was
      size_ = wanted;
    }
    return data_;
  }

 private:
  static constexpr int64_t kHugePage = 2 * 1024 * 1024;

  const bool huge_pages_;
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
  // Throws std::bad_alloc.
  MoeLayer(const Variant& variant, Pool& pool)
      : variant_(variant),
        pool_(pool),
        input_bytes_(input_bytes(variant.element_bytes)),
        row_bytes_(row_bytes(variant.element_bytes)),
        unit_tokens_(variant.tiles_from ? kTileUnitTokens : kUnitTokens),
        large_(variant.tiles_from > 0),  // a pass of tiles reads lines of many pages
        filling_(pool), computing_{Stage(pool), Stage(pool)}, combining_(pool) {}

  // Throws std::bad_alloc.
  int32_t run(const fdl_moe_call& call) {
    if (!count_rows(call)) return FDL_E_ARGUMENT;
    if (rows_ == 0) {
      std::fill(call.out, call.out + call.tokens * kHidden, 0.0f);
      return FDL_OK;
    }
    sort_rows(call);
    const bool alone = active_ * kPackedBytes + rows_ * kRowCost < (pool_.beside_torch() ? kAloneOnTeam : kAloneCost);
    deal(call, alone ? 1 : pool_.threads());
    if (filling_.total() == 0) fill(call, 0, rows_);
    auto region = [&](int worker) {
      filling_.work_off(worker, [&](int64_t i, int64_t) {
        fill(call, i * kRowStep, std::min((i + 1) * kRowStep, rows_));
      });
      computing_[0].work_off(worker, [&](int64_t i, int64_t next) { compute(Phase::gate_up, i, next, worker); });
      computing_[1].work_off(worker, [&](int64_t i, int64_t next) { compute(Phase::down, i, next, worker); });
      combining_.work_off(worker, [&](int64_t i, int64_t) {
        combine(call, i * kTokenStep, std::min((i + 1) * kTokenStep, call.tokens));
      });
    };
    if (alone)
      region(0);
    else
      pool_.run(region);
    if (combining_.total() == 0) combine(call, 0, call.tokens);
    return FDL_OK;
  }

 private:
  // Below so many elements one thread copies or adds sooner than several agree to.
  static constexpr int64_t kSerialElements = 32768;
  // Tokens added up, and rows copied (some 16 KiB), by one task.
  static constexpr int64_t kTokenStep = 16, kRowStep = std::max<int64_t>(8192 / kHidden, 1);
  // A layer that reads fewer bytes of weights than this takes one thread some 50 us from memory, less from the cache; another
  // thread has to wake first. One of torch's is awake. Computing on a row takes time as well: about that of reading a 32nd of
  // the weights.
  static constexpr int64_t kAloneCost = 2 * 1024 * 1024;
  static constexpr int64_t kAloneOnTeam = kAloneCost / 8;
  static constexpr int64_t kRowCost = kPackedBytes / 32;
  // Weights of one task, about: what a thread streams in some microseconds.
  static constexpr int64_t kTaskBytes = 96 * 1024;
  // Results of so many bytes push weights and inputs out of the second-level caches. They are written past them, unless many
  // are read again here, to be added up. Those of tiles, which take all their inputs from there, sooner and in any case.
  static constexpr int64_t kPastCaches = 2 * 1024 * 1024, kTilesPastCaches = 512 * 1024;
  // Units are dealt out together until every thread has so many tasks of them.
  static constexpr int64_t kWaveTasks = 4;
  // Blocks of a task of tiles: its last sums are finished beside no products, so some more than kGroups. Many, where the
  // second-level cache does not hold a unit's inputs: they are read for all of a task's blocks at once.
  static constexpr int64_t kResidentInputs = 1280 * 1024, kFewBlocks = 4;

  // Rows of one expert that pass over its weights together.
  struct Unit {
    const uint32_t* packed;
    int64_t first_row, rows;
    int64_t first_block;  // of gate/up: those before are left to the accelerator
  };
  // Blocks of a unit's weights on one memory node, and the first of the tasks they make.
  struct Run {
    const Unit* unit;
    int64_t first_block, last_block;
    int64_t first_task;
    int64_t group;  // blocks of a task
  };

  // A token's results after the first, kResultStride apart; a count of -1: it has not even a first.
  struct Further {
    const float* results;
    int32_t count;
  };

  static constexpr int64_t kBlocks[2] = {kGateUpBlocks, kDownBlocks};
  // Blocks that one task takes at least, by phase: an even number of gate/up's fills whole cache lines of the intermediate.
  static constexpr int64_t kGroups[2] = {std::max<int64_t>(kTaskBytes / (kGateUpBlockLanes * 8), 1) * 2,
                                         std::max<int64_t>(kTaskBytes / (kDownBlockLanes * 8), 1) * 2};
  // Room that keeps consecutive rows out of the same cache sets when the sizes are powers of two.
  static constexpr int64_t kResultStride = kDownBlocks * kLanes + 16;

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  bool wanted(const fdl_moe_call& call, int64_t id) const {
    return id >= 0 && id < call.num_experts &&
           (!call.strategy || call.strategy[id] == FDL_CPU || call.strategy[id] == FDL_SPLIT);
  }

  // Counts the (token, choice) rows of each expert and those that are a token's first, and parts them into units. False if an expert that is needed has no
  // weights.
  bool count_rows(const fdl_moe_call& call) {
    const int64_t choices = call.tokens * call.top_k;
    const int64_t most_units = std::min<int64_t>(choices, call.num_experts) + choices / unit_tokens_;
    auto carve = [&](Carver carver) {
      counts_ = carver.take<int32_t>(call.num_experts);
      units_ = carver.take<Unit>(most_units);
      for (Run*& runs : runs_) runs = carver.take<Run>(most_units * pool_.nodes());
      return carver.used();
    };
    carve(Carver(small_.reserve(carve(Carver(nullptr)))));
    std::fill(counts_, counts_ + call.num_experts, 0);
    first_rows_ = 0;
    for (int64_t i = 0; i < choices;) {
      bool any = false;
      for (int32_t k = 0; k < call.top_k; ++k, ++i) {
        if (!wanted(call, call.topk_ids[i])) continue;
        ++counts_[call.topk_ids[i]];
        any = true;
      }
      first_rows_ += any;
    }
    rows_ = active_ = count_ = 0;
    for (int32_t id = 0; id < call.num_experts; ++id) {
      const int64_t rows = counts_[id];
      if (rows == 0) continue;
      if (!call.experts[id]) return false;
      const bool split = call.strategy && call.strategy[id] == FDL_SPLIT;
      const int64_t first_block = split ? call.split_rows / kGateLanes : 0;
      const Parts units(rows, unit_tokens_);
      for (int64_t i = 0; i < units.count; ++i) {
        units_[count_++] = {reinterpret_cast<const uint32_t*>(call.experts[id]), rows_ + units.first(i),
                            units.size(i), first_block};
      }
      counts_[id] = static_cast<int32_t>(rows_);  // from here on: the expert's next row
      rows_ += rows;
      ++active_;
    }
    return true;
  }

  // Places the buffers of this call, and orders its rows by expert, then token. A token's first result goes to `out`, the others
  // behind each other to where combine() takes them from.
  void sort_rows(const fdl_moe_call& call) {
    auto carve = [&](Carver carver) {
      row_tokens_ = carver.take<int32_t>(rows_);
      row_results_ = carver.take<float*>(rows_);
      row_scales_ = carver.take<float>(rows_);
      further_ = carver.take<Further>(call.tokens);
      activations_ = carver.take<char>(rows_ * row_bytes_ + kTileRows * kLineBytes);
      results_ = carver.take<float>((rows_ - first_rows_) * kResultStride);
      sums_ = carver.take<float>(pool_.threads() * thread_sums());
      return carver.used();
    };
    carve(Carver(large_.reserve(carve(Carver(nullptr)))));
    int64_t of_tiles = 0;
    for (const Unit* unit = units_; unit != units_ + count_; ++unit) of_tiles += in_lines(*unit) ? unit->rows : 0;
    constexpr int64_t kBytes = kHidden * 4;
    const bool many = of_tiles * kBytes >= kTilesPastCaches || (rows_ * kBytes >= kPastCaches && (rows_ - first_rows_) * 4 <= rows_);
    past_caches_ = many && kHidden % 16 == 0 && reinterpret_cast<uintptr_t>(call.out) % 64 == 0;
    int64_t choice = 0;
    float* further = results_;
    for (int64_t token = 0; token < call.tokens; ++token) {
      further_[token] = {further, -1};
      for (int32_t k = 0; k < call.top_k; ++k, ++choice) {
        const int64_t id = call.topk_ids[choice];
        if (!wanted(call, id)) continue;
        const int32_t row = counts_[id]++;
        row_tokens_[row] = static_cast<int32_t>(token);
        row_scales_[row] = call.topk_weights[choice];
        row_results_[row] = ++further_[token].count ? further : call.out + token * kHidden;
        if (further_[token].count) further += kResultStride;
      }
    }
  }

  // Deals this call's tasks out to so many threads.
  void deal(const fdl_moe_call& call, int threads) {
    filling_.begin(threads);
    if (rows_ * kHidden >= kSerialElements) filling_.add_wave(divide_up(rows_, kRowStep));
    filling_.seal();
    for (int index = 0; index < 2; ++index) {
      Stage& stage = computing_[index];
      stage.begin(threads);
      Run* run = runs_[index];
      int64_t blocks_each = 0;
      for (const Unit* unit = units_; unit != units_ + count_; ++unit) blocks_each += kBlocks[index] - first_block(*unit, index);
      blocks_each /= kWaveTasks * threads;
      for (int64_t first = 0, last = 0; first < count_; first = last) {
        int64_t tasks = 0;
        for (; last < count_ && tasks < kWaveTasks * threads; ++last)
          tasks += divide_up(kBlocks[index] - first_block(units_[last], index), group(units_[last], index, blocks_each));
        const int64_t before = stage.total();
        tasks = 0;
        for (int node = 0; node < pool_.nodes(); ++node) {
          for (const Unit* unit = units_ + first; unit != units_ + last; ++unit) {
            const int64_t begin = first_block(*unit, index), blocks = kBlocks[index] - begin;
            *run = {unit, begin + pool_.border(blocks, node), begin + pool_.border(blocks, node + 1), before + tasks,
                    group(*unit, index, blocks_each)};
            tasks += divide_up(run->last_block - run->first_block, run->group);
            ++run;
          }
        }
        stage.add_wave(tasks);
      }
      stage.seal();
      run_counts_[index] = run - runs_[index];
    }
    combining_.begin(threads);
    const int64_t left = rows_ - first_rows_ + call.tokens - first_rows_;  // results to add, and tokens without any
    if (left * kHidden >= kSerialElements) combining_.add_wave(divide_up(call.tokens, kTokenStep));
    combining_.seal();
  }

  static int64_t first_block(const Unit& unit, int index) { return index == 0 ? unit.first_block : 0; }

  // Blocks of a task; `each` leave enough tasks for all threads.
  int64_t group(const Unit& unit, int index, int64_t each) const {
    if (!in_lines(unit)) return kGroups[index];
    const int64_t inputs = unit.rows * (index == 0 ? kHidden : kIntermediate) * variant_.element_bytes;
    return std::max(kGroups[index], std::min(each / 2 * 2, inputs < kResidentInputs ? kFewBlocks : kTileBlocks));
  }

  int64_t thread_sums() const { return unit_tokens_ * kLanes * (variant_.tiles_from ? kTileBlocks : 1); }

  char* row_at(int64_t number) const { return activations_ + number * row_bytes_; }

  bool in_lines(const Unit& unit) const { return variant_.tiles_from && unit.rows >= variant_.tiles_from; }

  // Copies the inputs of rows [first, last).
  void fill(const fdl_moe_call& call, int64_t first, int64_t last) const {
    const Unit* unit = std::upper_bound(units_, units_ + count_, first,
                                        [](int64_t row, const Unit& unit) { return row < unit.first_row; }) - 1;
    for (int64_t end; first < last; first = end, ++unit) {
      end = std::min(last, unit->first_row + unit->rows);
      const auto from = [&](int64_t row) { return call.hidden + row_tokens_[row] * call.hidden_stride; };
      if (in_lines(*unit))
        fill_lines(from, first, end, kHidden, unit->rows * kLineBytes,
                   row_at(unit->first_row) + (first - unit->first_row) * kLineBytes);
      else
        for (; first < end; ++first) fill_row(from(first), kHidden, variant_.element_bytes, row_at(first));
    }
  }

  static const uint32_t* weights_of(const Unit& unit, Phase which, int64_t block) {
    return which == Phase::gate_up ? unit.packed + block * kGateUpBlockLanes
                                   : unit.packed + kDownOffsetLanes + block * kDownBlockLanes +
                                         unit.first_block * kGateLanes / 2 * kLanes;
  }

  // Of an expert that is split, the down biases are added here: the packed half on the accelerator has none.
  static const float* bias_of(const Unit& unit, Phase which, int64_t block) {
    return reinterpret_cast<const float*>(unit.packed + kBiasOffsetLanes) +
           (which == Phase::gate_up ? block : kGateUpBlocks + block) * kLanes;
  }

  const Run& run_of(int index, int64_t task) const {
    return *(std::upper_bound(runs_[index], runs_[index] + run_counts_[index], task,
                              [](int64_t t, const Run& run) { return t < run.first_task; }) - 1);
  }

  // One task: some blocks of one unit. `following` is this thread's next one, worth fetching ahead, or -1.
  void compute(Phase which, int64_t task, int64_t following, int worker) const {
    const int index = which == Phase::gate_up ? 0 : 1;
    const auto first_of = [](const Run& run, int64_t number) {
      return run.first_block + (number - run.first_task) * run.group;
    };
    const Run& run = run_of(index, task);
    const uint32_t* after = nullptr;
    if (following >= 0) {
      const Run& then = run_of(index, following);
      after = weights_of(*then.unit, which, first_of(then, following));
    }
    compute_blocks(*run.unit, which, first_of(run, task), std::min(first_of(run, task) + run.group, run.last_block), after,
                   worker);
  }

  void compute_blocks(const Unit& unit, Phase which, int64_t block, int64_t last, const uint32_t* next, int worker) const {
    Task task{};
    task.phase = which;
    task.tokens = unit.rows;
    task.blocks = last - block;
    task.weights = weights_of(unit, which, block);
    task.weight_stride = which == Phase::gate_up ? kGateUpBlockLanes : kDownBlockLanes;
    if constexpr (kBias) task.bias = bias_of(unit, which, block);
    task.next = next;
    task.sums = sums_ + worker * thread_sums();
    task.sums_stride = kTileUnitTokens * kLanes;
    char* const inputs = row_at(unit.first_row);
    const int64_t in_turn = in_lines(unit) ? unit.rows : 1;  // tokens whose lines take turns
    char* const middle = inputs + input_bytes_ * in_turn;
    if (which == Phase::gate_up) {
      task.pairs = kHiddenPairs;
      task.activations = inputs;
      task.intermediate = middle;
      task.intermediate_column = block * kGateLanes;
      task.columns = kIntermediate - block * kGateLanes;
    } else {
      task.pairs = kIntermediatePairs - unit.first_block * kGateLanes / 2;
      task.activations = middle + unit.first_block * kGateLanes * variant_.element_bytes * in_turn;
      task.results = row_results_ + unit.first_row;
      task.scales = row_scales_ + unit.first_row;
      task.result_column = block * kLanes;
      task.past_caches = past_caches_;
      task.columns = kHidden - block * kLanes;
    }
    variant_.run(task);
    if (task.past_caches) __builtin_ia32_sfence();  // before whoever waits for this task reads them
  }

  // Adds a token's further results to its first one, for tokens [first, last).
  void combine(const fdl_moe_call& call, int64_t first, int64_t last) const {
    for (int64_t token = first; token < last; ++token) {
      float* out = call.out + token * kHidden;
      const auto [results, count] = further_[token];
      for (int32_t i = 0; i < count; ++i)
        for (int64_t h = 0; h < kHidden; ++h) out[h] += results[i * kResultStride + h];
      if (count < 0) std::fill(out, out + kHidden, 0.0f);
    }
  }

  const Variant& variant_;
  Pool& pool_;
  const int64_t input_bytes_, row_bytes_;  // of a row, from its inputs to those of down and to the next row
  const int64_t unit_tokens_;
  Workspace small_, large_;

  // Of the call in progress.
  int64_t rows_ = 0, first_rows_ = 0, active_ = 0, count_ = 0;
  int64_t run_counts_[2] = {0, 0};
  int32_t* counts_ = nullptr;
  Unit* units_ = nullptr;
  Run* runs_[2] = {nullptr, nullptr};
  int32_t* row_tokens_ = nullptr;
  float** row_results_ = nullptr;
  float* row_scales_ = nullptr;
  Further* further_ = nullptr;
  bool past_caches_ = false;
  char* activations_ = nullptr;
  float* results_ = nullptr;
  float* sums_ = nullptr;
  Stage filling_, computing_[2], combining_;
};

}  // namespace fdl
