// The tasks of one stage of a layer, dealt out to threads in advance.
//
// Every thread has its own share and a counter of its own for it; who is through helps the others, so a thread that the
// system runs late delays nobody. A thread's share of an expert's blocks is the same in every call, so that they can
// lie on its memory node (near_memory.hpp).
//
// No cache line is written by more than kGroup threads: claims are per thread, completions are counted per group of threads,
// then groups (docs/kernels.md has the model).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "pool.hpp"

namespace fdl {

class Stage {
 public:
  // Consecutive tasks that are dealt out together: thread t of T gets those from n t / T to n (t + 1) / T.
  struct Wave {
    int64_t first, tasks;
  };

  // Throws std::bad_alloc.
  explicit Stage(const Pool& pool)
      : pool_(pool), claims_(new Line[static_cast<size_t>(pool.threads())]),
        groups_(new Line[static_cast<size_t>((pool.threads() + kGroup - 1) / kGroup)]) {}

  // Between regions only: waves for so many threads are added one after another, then the stage is sealed.
  void begin(int threads) {
    threads_ = threads;
    waves_.clear();
    total_ = 0;
  }
  void add_wave(int64_t tasks) {
    waves_.push_back({total_, tasks});
    total_ += tasks;
  }
  void seal() {
    needed_ = 0;
    for (int t = 0; t < threads_; ++t) claims_[t].value.store(0, std::memory_order_relaxed);
    for (int g = 0; g * kGroup < threads_; ++g) {
      groups_[g].value.store(share_of(g * kGroup, last_of(g)), std::memory_order_relaxed);
      needed_ += groups_[g].value.load(std::memory_order_relaxed) > 0;
    }
    done_.value.store(0, std::memory_order_relaxed);
  }

  int64_t total() const { return total_; }

  // Does the thread's share, then helps others, if it may, and returns when every task of the stage is done.
  // work(task, next): next is the task that this thread does after it, or -1 if that is not known.
  template <class Work>
  void work_off(int thread, Work work, bool helps = true) {
    const auto call = [](void* context, int64_t task, int64_t next) { (*static_cast<Work*>(context))(task, next); };
    work_off(thread, call, &work, helps);
  }

 private:
  static constexpr int kGroup = Pool::kGroup;

  struct alignas(128) Line {  // two lines: the one beside it is fetched too
    std::atomic<int64_t> value{0};
  };
  struct Place {  // in a thread's share: the wave of a task and how many of the share came before that wave
    size_t wave;
    int64_t before;
  };

  // Not inlined, as Pool::run_call().
  [[gnu::noinline]] void work_off(int thread, void (*work)(void*, int64_t, int64_t), void* context, bool helps) {
    const int64_t mine = share_of(thread, thread + 1);
    int64_t done = 0;
    Place place{};
    for (int64_t i; (i = claim(thread)) < mine; ++done) {
      const int64_t task = locate(thread, i, place);
      Place after = place;
      work(context, task, i + 1 < mine ? locate(thread, i + 1, after) : -1);
    }
    complete(thread, done);
    for (int other = next(thread); helps && other != thread && !finished(); other = next(other)) {
      const int64_t share = share_of(other, other + 1);
      Place theirs{};
      while (claims_[other].value.load(std::memory_order_relaxed) < share) {
        const int64_t i = claim(other);
        if (i >= share) break;
        work(context, locate(other, i, theirs), -1);
        complete(other, 1);
      }
    }
    pool_.wait_until([&] { return finished(); });
  }

  int next(int thread) const { return thread + 1 < threads_ ? thread + 1 : 0; }
  int last_of(int group) const { return (group + 1) * kGroup < threads_ ? (group + 1) * kGroup : threads_; }
  int64_t begin_of(const Wave& wave, int thread) const { return wave.tasks * thread / threads_; }

  // Tasks of threads [first, last).
  int64_t share_of(int first, int last) const {
    int64_t share = 0;
    for (const Wave& wave : waves_) share += begin_of(wave, last) - begin_of(wave, first);
    return share;
  }

  int64_t claim(int thread) { return claims_[thread].value.fetch_add(1, std::memory_order_relaxed); }

  // The number of a thread's task i, which is not before the one that `place` was last used for.
  int64_t locate(int thread, int64_t i, Place& place) const {
    for (;; ++place.wave) {
      const Wave& wave = waves_[place.wave];
      const int64_t begin = begin_of(wave, thread), share = begin_of(wave, thread + 1) - begin;
      if (i < place.before + share) return wave.first + begin + i - place.before;
      place.before += share;
    }
  }

  // Counts tasks of a thread's share as done, whoever did them.
  void complete(int thread, int64_t tasks) {
    if (tasks > 0 && groups_[thread / kGroup].value.fetch_sub(tasks, std::memory_order_acq_rel) == tasks)
      done_.value.fetch_add(1, std::memory_order_acq_rel);
  }

  bool finished() const { return done_.value.load(std::memory_order_acquire) == needed_; }

  const Pool& pool_;
  int threads_ = 1;
  int64_t total_ = 0, needed_ = 0;
  std::vector<Wave> waves_;
  std::unique_ptr<Line[]> claims_, groups_;
  Line done_;
};

}  // namespace fdl
