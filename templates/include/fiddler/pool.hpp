// A pool of threads for short parallel regions: they spin briefly between regions, then sleep.
//
// The caller of run() is worker 0. Nothing here allocates after construction. After a fork the child starts threads of its
// own at its next region.
#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <memory>
#include <new>

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

  void advance() {
    value_.fetch_add(1);
    // Both sides are sequentially consistent: either the sleeper is seen here or it sees the new value.
    if (sleepers_.load() > 0) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
  }

  void wait_while(uint32_t old, int64_t spin_ns) {
    if (value() != old) return;
    if (spin_ns > 0) {
      const int64_t end = now_ns() + spin_ns;
      do {
        for (int i = 0; i < 16; ++i) {
          if (value() != old) return;
          __builtin_ia32_pause();
        }
      } while (now_ns() < end);
    }
    sleepers_.fetch_add(1);
    while (value_.load() == old) futex(FUTEX_WAIT_PRIVATE, old);
    sleepers_.fetch_sub(1);
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
  // A worker waits for its next region this long before it sleeps, and for the others at a barrier that long.
  static constexpr int64_t kIdleSpinNs = 30'000;
  static constexpr int64_t kBarrierSpinNs = 200'000;

  explicit Pool(int threads) : threads_(threads) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() { stop(); }

  int threads() const { return threads_; }

  // Starts the workers, pinned to cpus[1 ..] unless null. False if a thread could not be started; then none runs.
  bool start(const int32_t* cpus) {
    workers_.reset(new (std::nothrow) Worker[threads_]);
    if (!workers_) return false;
    for (int i = 1; i < threads_; ++i) {
      workers_[i].pool = this;
      workers_[i].index = i;
      workers_[i].cpu = cpus ? cpus[i] : -1;
    }
    return launch();
  }

  // Calls job(worker) on every worker and returns when all are done. `job` must not throw. One caller at a time.
  template <class Job>
  bool run(Job& job) {
    if (threads_ == 1) {
      job(0);
      return true;
    }
    if (process_ != getpid() ? !restart_after_fork() : started_ != threads_) return false;
    call_ = [](void* context, int worker) { (*static_cast<Job*>(context))(worker); };
    context_ = &job;
    start_.advance();
    job(0);
    barrier();
    return true;
  }

  // Inside a region: returns when every worker has arrived.
  void barrier() {
    if (threads_ == 1) return;
    const uint32_t phase = arrived_all_.value();
    if (arrived_.fetch_add(1) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      arrived_all_.advance();
    } else {
      arrived_all_.wait_while(phase, spin(kBarrierSpinNs));
    }
  }

 private:
  struct Worker {
    Pool* pool = nullptr;
    int index = 0;
    int cpu = -1;
    pthread_t thread{};
  };

  // Spinning takes the CPU from a thread that has work when there are more threads than CPUs.
  int64_t spin(int64_t ns) const { return oversubscribed_ ? 0 : ns; }

  bool launch() {
    process_ = getpid();
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
    if (worker.cpu >= 0) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(static_cast<size_t>(worker.cpu), &set);
      // A CPU outside this process's affinity is refused; the worker then stays where the system puts it.
      pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    }
    worker.pool->serve(worker.index);
    return nullptr;
  }

  void serve(int index) {
    // Threads are only started between regions, so the first region is the first change seen.
    for (uint32_t seen = first_;; ++seen) {
      start_.wait_while(seen, spin(kIdleSpinNs));
      if (stopping_.load(std::memory_order_acquire)) return;
      call_(context_, index);
      barrier();
    }
  }

  void stop() {
    if (process_ == getpid() && started_ > 1) {
      stopping_.store(true, std::memory_order_release);
      start_.advance();
      for (int i = 1; i < started_; ++i) pthread_join(workers_[i].thread, nullptr);
    }
    started_ = 1;
  }

  // The parent's threads do not exist in a child. Its counters may have been caught in the middle of a region.
  bool restart_after_fork() {
    new (&start_) Event;
    new (&arrived_all_) Event;
    arrived_.store(0);
    return launch();
  }

  const int threads_;
  int started_ = 1;
  pid_t process_ = 0;
  bool oversubscribed_ = false;
  std::unique_ptr<Worker[]> workers_;
  void (*call_)(void*, int) = nullptr;
  void* context_ = nullptr;
  static constexpr uint32_t first_ = 0;
  std::atomic<bool> stopping_{false};
  // Apart, so that waiting on one does not slow writes to another.
  alignas(64) Event start_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) Event arrived_all_;
};

}  // namespace fdl
