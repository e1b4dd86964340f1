// A pool of threads for short parallel regions: they spin briefly between regions, then sleep.
//
// The caller of run() is worker 0. The others join a region if they wake in time: work is handed out as tasks, so a thread
// that the system runs late delays nobody. Nothing here allocates after construction. After a fork the child starts threads
// of its own at its next region.
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
  // How long a worker waits for its next region before it sleeps, and a member of a region for the others.
  static constexpr int64_t kIdleSpinNs = 30'000;
  static constexpr int64_t kRegionSpinNs = 200'000;

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

  // Calls job(0) here and job(i) on the workers that come before it has returned; returns when all that came are done.
  // `job` takes its work from shared counters and must not throw. One caller at a time.
  template <class Job>
  bool run(Job& job) {
    if (threads_ > 1 && (process_ != getpid() ? !restart_after_fork() : started_ != threads_)) return false;
    if (threads_ == 1) {
      job(0);
      return true;
    }
    call_ = [](void* context, int worker) { (*static_cast<Job*>(context))(worker); };
    context_ = &job;
    members_.fetch_and(~kClosed);
    start_.advance();
    job(0);
    members_.fetch_or(kClosed);
    for (;;) {
      const uint32_t seen = left_.value();
      if ((members_.load() & ~kClosed) == 0) return true;
      left_.wait_while(seen, region_spin());
    }
  }

  int64_t region_spin() const { return spin(kRegionSpinNs); }

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
    for (uint32_t seen = 0;;) {
      start_.wait_while(seen, spin(kIdleSpinNs));
      seen = start_.value();
      if (stopping_.load(std::memory_order_acquire)) return;
      // Whoever comes after the region was closed has no business with it; the count is right either way.
      if ((members_.fetch_add(1) & kClosed) == 0) call_(context_, index);
      if (members_.fetch_sub(1) == (kClosed | 1)) left_.advance();
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

  // The parent's threads do not exist in a child, and its counters may have been caught in the middle of a region.
  bool restart_after_fork() {
    new (&start_) Event;
    new (&left_) Event;
    members_.store(kClosed);
    return launch();
  }

  const int threads_;
  int started_ = 1;
  pid_t process_ = 0;
  bool oversubscribed_ = false;
  std::unique_ptr<Worker[]> workers_;
  void (*call_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stopping_{false};
  static constexpr uint32_t kClosed = 1u << 31;
  // Apart, so that waiting on one does not slow writes to another.
  alignas(64) Event start_;
  alignas(64) std::atomic<uint32_t> members_{kClosed};  // in the region now; kClosed: none may begin
  alignas(64) Event left_;
};

// Numbered tasks that the members of a region take, and the wait until all are done.
class Tasks {
 public:
  // Between regions only.
  void reset(int64_t total) {
    total_ = total;
    next_.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
  }

  int64_t total() const { return total_; }

  // A task of its own for the caller, or a number from total() on if there is none left.
  int64_t claim() { return next_.fetch_add(1, std::memory_order_relaxed); }

  void complete() {
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == total_) all_done_.advance();
  }

  // Does tasks until none is left, then waits for those that others took.
  template <class Work>
  void work_off(const Pool& pool, Work work) {
    for (int64_t task; (task = claim()) < total_;) {
      work(task);
      complete();
    }
    wait(pool);
  }

  void wait(const Pool& pool) {
    for (;;) {
      const uint32_t seen = all_done_.value();
      if (done_.load(std::memory_order_acquire) == total_) return;
      all_done_.wait_while(seen, pool.region_spin());
    }
  }

 private:
  int64_t total_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  Event all_done_;
};

}  // namespace fdl
