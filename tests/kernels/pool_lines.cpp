// Counts what the pool's atomics cost on a machine with many caches: how often a thread touches a 128-byte line that another
// thread has written since it last did. Each such move is a transfer between caches, on whatever machine.
//
//   pool_lines THREADS TASKS   one region: prints "moves LINE COUNT" for each of its lines, then "tasks" and how many ran
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace counting {

constexpr uintptr_t kLine = 128;  // adjacent lines are fetched in pairs

struct Line {
  uint64_t version = 0;
  int64_t moves = 0;
  std::unordered_map<long, uint64_t> seen;
};

inline std::mutex mutex;
inline std::map<uintptr_t, Line> lines;
inline bool counts = false;

inline void touch(const void* where, bool writes) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!counts) return;
  static thread_local const long me = syscall(SYS_gettid);
  Line& line = lines[reinterpret_cast<uintptr_t>(where) / kLine];
  uint64_t& seen = line.seen[me];
  line.moves += seen != line.version;
  if (writes) ++line.version;
  seen = line.version;
}

// std::atomic with its line's traffic on record.
template <class T>
class Atomic {
 public:
  constexpr Atomic() = default;
  constexpr Atomic(T value) : value_(value) {}
  T load(std::memory_order order = std::memory_order_seq_cst) const { return touch(this, false), value_.load(order); }
  void store(T value, std::memory_order order = std::memory_order_seq_cst) { touch(this, true), value_.store(value, order); }
  T exchange(T value, std::memory_order order = std::memory_order_seq_cst) {
    return touch(this, true), value_.exchange(value, order);
  }
  T fetch_add(T value, std::memory_order order = std::memory_order_seq_cst) {
    return touch(this, true), value_.fetch_add(value, order);
  }
  T fetch_sub(T value, std::memory_order order = std::memory_order_seq_cst) {
    return touch(this, true), value_.fetch_sub(value, order);
  }
  T fetch_or(T value, std::memory_order order = std::memory_order_seq_cst) {
    return touch(this, true), value_.fetch_or(value, order);
  }
  T fetch_and(T value, std::memory_order order = std::memory_order_seq_cst) {
    return touch(this, true), value_.fetch_and(value, order);
  }
  bool compare_exchange_weak(T& expected, T value, std::memory_order a = std::memory_order_seq_cst,
                             std::memory_order b = std::memory_order_seq_cst) {
    return touch(this, true), value_.compare_exchange_weak(expected, value, a, b);
  }
  bool compare_exchange_strong(T& expected, T value, std::memory_order a = std::memory_order_seq_cst,
                               std::memory_order b = std::memory_order_seq_cst) {
    return touch(this, true), value_.compare_exchange_strong(expected, value, a, b);
  }

 private:
  std::atomic<T> value_{};
};

}  // namespace counting

namespace std {
template <class T>
using counted_atomic = counting::Atomic<T>;
}

// All headers that the pool includes are above: from here on its std::atomic is the counting one.
#define atomic counted_atomic
#include "pool.hpp"
#include "stage.hpp"
#undef atomic

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const int threads = std::atoi(arguments[1]);
  const int64_t total = std::atoll(arguments[2]);
  fdl::Pool pool(threads);
  if (!pool.start(nullptr, nullptr)) return 1;
  fdl::Stage stage(pool);
  std::atomic<int64_t> ran{0};
  std::atomic<int> inside{0};
  auto job = [&](int thread) {
    // The threads of a large machine work side by side; on this one they have to be told to.
    inside.fetch_add(1);
    while (inside.load() < threads) sched_yield();
    stage.work_off(thread, [&](int64_t, int64_t) {
      ran.fetch_add(1);
      sched_yield();
    });
  };
  stage.begin(threads);
  stage.add_wave(total);
  stage.seal();
  counting::counts = true;
  if (!pool.run(job)) return 1;
  counting::counts = false;
  for (const auto& [line, record] : counting::lines)
    std::printf("moves %lx %lld\n", static_cast<unsigned long>(line), static_cast<long long>(record.moves));
  std::printf("tasks %lld\n", static_cast<long long>(ran.load()));
  return 0;
}
