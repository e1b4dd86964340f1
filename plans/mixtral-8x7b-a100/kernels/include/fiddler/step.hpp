// The CPU lane of a decode step that a stream of the accelerator enters by itself, layer after layer (docs/runtime.md,
// captured steps): the program starts a step and looks again when it is over.
//
// Two ways in. Flags: the stream writes `asked`, a thread here that polls it serves the layer and writes `answered`, for which
// the stream waits. Host function: the stream calls fdl_step_serve. Neither way may hang: a watchdog gives a step up that makes
// no progress, and opens `answered` for good, so that the stream runs on to its end.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "abi.h"
#include "dispatch.hpp"
#include "pool.hpp"

namespace fdl {

// The flags are plain memory, which an accelerator writes and reads as well.
inline uint32_t flag_load(const uint32_t* flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
inline void flag_store(uint32_t* flag, uint32_t value) { __atomic_store_n(flag, value, __ATOMIC_SEQ_CST); }

// As the accelerators' streams compare: a cyclic greater-or-equal.
inline bool flag_reached(const uint32_t* flag, uint32_t value) {
  return static_cast<int32_t>(flag_load(flag) - value) >= 0;
}

// Looks until done(): at first without a pause, soon offering the CPU to other threads.
template <class Done>
void look_until(Done done) {
  constexpr int kPauses = 2000;  // some 50 us
  for (int looks = 0; !done(); ++looks) {
    if (looks < kPauses)
      __builtin_ia32_pause();
    else
      sched_yield();
  }
}

}  // namespace fdl

struct fdl_step {
 public:
  // Throws std::bad_alloc, std::system_error.
  fdl_step(fdl_kernels* kernels, const fdl_step_setup& setup) : kernels_(kernels), setup_(setup) {
    for (int32_t row = 0; row < setup.layers; ++row) layers_.push_back({this, row});
    try {
      if (setup.polled) poller_ = std::thread([this] { poll(); });
      watchdog_ = std::thread([this] { watch(); });
    } catch (...) {
      stop();
      throw;
    }
  }
  fdl_step(const fdl_step&) = delete;
  fdl_step& operator=(const fdl_step&) = delete;
  ~fdl_step() { stop(); }

  struct Layer {
    fdl_step* step;
    int32_t row;
  };
  Layer* layer(int32_t row) { return row >= 0 && row < setup_.layers ? &layers_[static_cast<size_t>(row)] : nullptr; }
  // Whether the step's threads exist: in a forked child they do not.
  bool alive() const { return process_ == getpid(); }
  bool takes(int64_t tokens) const { return tokens > 0 && tokens <= setup_.most_tokens; }

  int32_t status() const { return status_.load(); }

  int32_t begin(int64_t tokens) {
    if (status() != FDL_OK) return status();
    if (!alive()) return FDL_E_THREAD;
    tokens_ = tokens;
    served_.store(0);
    steps_.fetch_add(1);
    fdl::flag_store(setup_.asked, 0);  // of a step that was broken off
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      active_.store(true);
    }
    wake_.notify_all();
    begun_.advance();
    return FDL_OK;
  }

  int32_t end(int32_t layers) {
    if (!alive()) return FDL_E_THREAD;  // the mutex may be held by a thread that was not forked
    const std::lock_guard<std::mutex> lock(mutex_);
    active_.store(false);
    if (served_.load() < layers) give_up(FDL_E_STALL);
    return status();
  }

  // Decides a layer and computes the CPU's share of it, from the mailbox to the mailbox.
  void serve(int32_t row) {
    if (status() != FDL_OK) return;
    const auto at = static_cast<int64_t>(row);
    const auto experts = static_cast<int64_t>(setup_.num_experts);
    int32_t split[2];
    uint8_t* strategy = setup_.strategy + at * experts;
    int32_t status = fdl_dispatch(setup_.tables, setup_.topk_ids, tokens_ * setup_.top_k, setup_.resident + at * experts,
                                  setup_.num_experts, setup_.counts + at * experts, strategy, split, setup_.lane_us + 2 * at);
    const int64_t begin = fdl::now_ns();
    if (status == FDL_OK) {
      const fdl_moe_call call{setup_.hidden, setup_.hidden_size, setup_.topk_ids, setup_.topk_weights, strategy,
                              setup_.experts[at], setup_.out, tokens_, setup_.top_k, setup_.num_experts, 0};
      status = fdl_moe(kernels_, &call);
    }
    setup_.cpu_ns[at] = fdl::now_ns() - begin;
    if (status != FDL_OK) return give_up(status);
    served_.fetch_add(1);
  }

 private:
  static constexpr uint32_t kOpen = 0x7fffffff;  // whatever a stream waits for, this is not less
  static constexpr int64_t kIdleSpinNs = 2'000'000;  // between two steps there is sampling, some tenths of a millisecond
  static constexpr std::chrono::milliseconds kTick{20};

  void give_up(int32_t status) {
    int32_t before = FDL_OK;
    status_.compare_exchange_strong(before, status);
    fdl::flag_store(setup_.answered, kOpen);
  }

  void poll() {
    for (uint32_t seen = 0;;) {
      begun_.wait_while(seen, kIdleSpinNs);
      if (stopping_.load()) return;
      seen = begun_.value();
      for (int32_t served = 0; served < setup_.layers && active_.load(); ++served) {
        fdl::look_until([this] { return fdl::flag_load(setup_.asked) != 0 || !active_.load() || status() != FDL_OK; });
        const uint32_t asked = fdl::flag_load(setup_.asked);
        if (asked == 0 || status() != FDL_OK) break;
        if (asked > static_cast<uint32_t>(setup_.layers)) {
          give_up(FDL_E_ARGUMENT);
          break;
        }
        fdl::flag_store(setup_.asked, 0);
        serve(static_cast<int32_t>(asked) - 1);
        if (status() == FDL_OK) fdl::flag_store(setup_.answered, asked);
      }
    }
  }

  // Progress is a layer that was served: a step whose layers take longer than stall_ms each is given up too. Time is counted
  // in ticks of this thread's own: while the whole process is stopped none goes by.
  void watch() {
    uint64_t step = 0;
    int32_t served = 0;
    int64_t ticks = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopping_.load()) {
      if (!active_.load()) {
        wake_.wait(lock);
        continue;
      }
      if (step != steps_.load() || served != served_.load()) {
        step = steps_.load();
        served = served_.load();
        ticks = 0;
      }
      // Again and again: a stream that is late would close the flag after it was opened.
      if (status() != FDL_OK || ticks * kTick.count() >= setup_.stall_ms) give_up(FDL_E_STALL);
      if (wake_.wait_for(lock, kTick) == std::cv_status::timeout) ++ticks;
    }
  }

  void stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_.store(true);
      active_.store(false);
    }
    wake_.notify_all();
    begun_.advance();
    if (poller_.joinable()) poller_.join();
    if (watchdog_.joinable()) watchdog_.join();
  }

  const pid_t process_ = getpid();
  fdl_kernels* const kernels_;
  const fdl_step_setup setup_;
  std::vector<Layer> layers_;
  int64_t tokens_ = 0;
  std::atomic<int32_t> status_{FDL_OK};
  std::atomic<uint64_t> steps_{0};  // begun
  std::atomic<int32_t> served_{0};  // layers of the last one
  std::atomic<bool> stopping_{false};
  fdl::Event begun_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> active_{false};  // between begin() and end()
  std::thread poller_, watchdog_;
};

namespace fdl {

inline bool valid(const fdl_step_setup& setup) {
  return setup.tables && setup.resident && setup.experts && setup.hidden && setup.topk_ids && setup.topk_weights &&
         setup.out && setup.asked && setup.answered && setup.strategy && setup.counts && setup.lane_us && setup.cpu_ns &&
         setup.layers > 0 && setup.layers < (1 << 16) && setup.num_experts > 0 && setup.num_experts <= kMostExperts &&
         setup.top_k > 0 && setup.most_tokens > 0 && setup.stall_ms > 0;
}

}  // namespace fdl
