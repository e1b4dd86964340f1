// A pool of threads for short parallel regions: they spin briefly between regions, then sleep.
//
// The caller of run() is worker 0. The others join a region if they wake in time: work is handed out as tasks (stage.hpp), so a
// thread that the system runs late delays nobody. Nothing here allocates after the start. A pool belongs to the process that
// started it: a child's has to be another (library.hpp).
//
// Or the regions run on a team that is there already: torch's OpenMP threads spin for milliseconds after each of torch's regions,
// on the CPUs that threads of our own would need, and begin a region of ours at once.
#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>

#include "abi.h"
#include "cpu.hpp"

namespace fdl {

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

// A counter to wait on: spinning for a while, then asleep in the kernel.
class Event {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  // Wakes one sleeper, who wakes two more, and so on: to wake many one after another would take the caller long.
  void advance() {
    value_.fetch_add(1);
    // Both sides are sequentially consistent: either the sleeper is seen here or it sees the new value.
    if (sleepers_.load() > 0) futex(FUTEX_WAKE_PRIVATE, 1);
  }

  // Spins for at most spin_ns before sleeping; soon it offers its CPU to other threads between looks: the one waited for may
  // need it.
  void wait_while(uint32_t old, int64_t spin_ns) {
    if (value() != old) return;
    if (spin_ns > 0) {
      constexpr int64_t kPauseNs = 4'000;
      const int64_t begin = now_ns();
      int64_t spent = 0;
      do {
        for (int i = 0; i < 16; ++i) {
          if (value() != old) return;
          __builtin_ia32_pause();
        }
        if (spent > kPauseNs) sched_yield();
        spent = now_ns() - begin;
      } while (spent < spin_ns);
    }
    sleepers_.fetch_add(1);
    while (value_.load() == old) futex(FUTEX_WAIT_PRIVATE, old);
    if (sleepers_.fetch_sub(1) > 1) futex(FUTEX_WAKE_PRIVATE, 2);
  }

 private:
  void futex(int operation, uint32_t argument) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value_), operation, argument, nullptr, nullptr, 0);
  }

  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

class Pool {
 public:
  // How long a worker waits for its next region before it sleeps: as long as having a sleeping one back takes, but for
  // one time in a hundred (docs/kernels.md, Threads).
  static constexpr int64_t kIdleSpinNs = 50'000;
  // Threads that share a cache line which they write. More would wait for each other on machines with many cores.
  static constexpr int kGroup = 16;

  explicit Pool(int threads) : threads_(threads) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() { stop(); }

  int threads() const { return threads_; }
  // Whether regions run on the team given at the start.
  bool beside_torch() const { return team_.parallel != nullptr; }
  // Memory nodes that the threads are spread over, as evenly as it goes.
  int nodes() const { return nodes_; }
  // Of tasks that are dealt out to the threads alike, the first of those on a node. node = nodes(): their number.
  int64_t border(int64_t tasks, int node) const { return tasks * (threads_ * node / nodes_) / threads_; }

  // Starts the workers, or takes the team's, pinned to cpus[1 ..] unless null. False if a thread could not be started; then
  // none runs. Once. Throws std::bad_alloc.
  bool start(const int32_t* cpus, int nodes, const fdl_team* team) {
    workers_ = std::make_unique<Worker[]>(static_cast<size_t>(threads_));
    gates_ = std::make_unique<Gate[]>(static_cast<size_t>(divide_up(threads_, kGroup)));
    for (int i = 1; i < threads_; ++i) {
      workers_[i].pool = this;
      workers_[i].index = i;
      workers_[i].cpu = cpus ? cpus[i] : -1;
    }
    nodes_ = nodes;
    if (!team) return launch();
    team_ = *team;
    if (cpus) {
      auto pin_worker = [&](int worker) { pin(workers_[worker]); };
      run(pin_worker);
    }
    return true;
  }

  // Calls job(0) here and job(i) on the workers that come before it has returned; returns when all that came are done.
  // `job` takes its work from shared counters and must not throw. One caller at a time.
  template <class Job>
  void run(Job& job) {
    call_ = [](void* context, int worker) { (*static_cast<Job*>(context))(worker); };
    context_ = &job;
    run_call();
  }

  // Returns when done() is true, which another thread makes it soon. Offers this CPU to others meanwhile: that thread may
  // need it.
  template <class Done>
  void wait_until(Done done) const {
    constexpr int kPauses = 100;
    for (int looks = 0; !done(); ++looks) {
      if (looks < kPauses && !oversubscribed_)
        __builtin_ia32_pause();
      else
        sched_yield();
    }
  }

 private:
  struct Worker {
    Pool* pool = nullptr;
    int index = 0;
    int cpu = -1;
    pthread_t thread{};
  };
  // Where a group of threads waits for regions, and how many of them are in one.
  struct Gate {
    alignas(128) Event start;
    alignas(128) std::atomic<uint32_t> members{kClosed};
  };
  static constexpr uint32_t kClosed = 1u << 31;  // none may begin

  // Not inlined: each kind of job would have its own, a third of the library's code and of the time to compile it.
  [[gnu::noinline]] void run_call() {
    if (threads_ == 1) return call_(context_, 0);
    if (team_.parallel) {
      auto enter = [](void* pool) {
        auto& here = *static_cast<Pool*>(pool);
        here.call_(here.context_, here.team_.thread_num());
      };
      return team_.parallel(enter, this, static_cast<unsigned>(threads_), 0);
    }
    for (Gate* gate = gates_.get(); gate != gates_end(); ++gate) {
      gate->members.fetch_and(~kClosed);
      gate->start.advance();
    }
    call_(context_, 0);
    for (Gate* gate = gates_.get(); gate != gates_end(); ++gate) gate->members.fetch_or(kClosed);
    for (Gate* gate = gates_.get(); gate != gates_end(); ++gate)
      wait_until([gate] { return gate->members.load() == kClosed; });
  }

  static int divide_up(int a, int b) { return (a + b - 1) / b; }
  Gate* gates_end() const { return gates_.get() + divide_up(threads_, kGroup); }

  bool launch() {
    oversubscribed_ = threads_ > usable_cpus();
    for (started_ = 1; started_ < threads_; ++started_) {
      Worker& worker = workers_[started_];
      if (pthread_create(&worker.thread, nullptr, &Pool::enter, &worker) != 0) {
        stop();
        return false;
      }
    }
    return true;
  }

  static void* enter(void* argument) {
    const Worker& worker = *static_cast<Worker*>(argument);
    pin(worker);
    worker.pool->serve(worker.index);
    return nullptr;
  }

  // Called by the worker's thread.
  static void pin(const Worker& worker) {
    if (worker.cpu < 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(static_cast<size_t>(worker.cpu), &set);
    // A CPU outside this process's affinity is refused; the worker then stays where the system puts it.
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  }

  void serve(int index) {
    Gate& gate = gates_[index / kGroup];
    for (uint32_t seen = 0;;) {
      // Spinning takes the CPU from a thread that has work when there are more threads than CPUs.
      gate.start.wait_while(seen, oversubscribed_ ? 0 : kIdleSpinNs);
      seen = gate.start.value();
      if (stopping_.load(std::memory_order_acquire)) return;
      // Whoever comes after the region was closed has no business with it; the count is right either way.
      if ((gate.members.fetch_add(1) & kClosed) == 0) call_(context_, index);
      gate.members.fetch_sub(1);
    }
  }

  void stop() {
    if (started_ > 1) {
      stopping_.store(true, std::memory_order_release);
      for (Gate* gate = gates_.get(); gate != gates_end(); ++gate) gate->start.advance();
      for (int i = 1; i < started_; ++i) pthread_join(workers_[i].thread, nullptr);
    }
    started_ = 1;
  }

  const int threads_;
  fdl_team team_{};
  int nodes_ = 1;
  int started_ = 1;
  bool oversubscribed_ = false;
  std::unique_ptr<Worker[]> workers_;
  std::unique_ptr<Gate[]> gates_;
  void (*call_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stopping_{false};
};

}  // namespace fdl
