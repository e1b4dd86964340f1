// Counts what the pool's atomics cost on a machine with many caches: how often a thread touches a 128-byte line that another
// thread has written since it last did. Each such move is a transfer between caches, on whatever machine.
//
//   pool_lines THREADS TASKS   one region of four stages with so many tasks each, as a layer's, entered while all sleep: prints
//                              "moves LINE COUNT" for each of its lines, then "tasks" and how many ran, "calls" and how many
//                              calls to the system the thread that began it made to wake others
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
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

inline std::atomic<int> asleep{0};
inline thread_local int wakes = 0;

// The calls that the pool makes: to sleep and to wake.
template <class... Rest>
long system_call(long number, uint32_t* where, int operation, Rest... rest) {
  const bool sleeps = operation == FUTEX_WAIT_PRIVATE;
  sleeps ? static_cast<void>(asleep.fetch_add(1)) : static_cast<void>(++wakes);
  const long result = syscall(number, where, operation, rest...);
  if (sleeps) asleep.fetch_sub(1);
  return result;
}

}  // namespace counting

namespace std {
template <class T>
using counted_atomic = counting::Atomic<T>;
}

// All headers that the pool includes are above: from here on its std::atomic is the counting one, and so are its calls.
#define atomic counted_atomic
#define syscall counting::system_call
#include "pool.hpp"
#include "stage.hpp"
#undef atomic
#undef syscall

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const int threads = std::atoi(arguments[1]);
  const int64_t total = std::atoll(arguments[2]);
  fdl::Pool pool(threads);
  if (!pool.start(nullptr, 1, nullptr)) return 1;
  std::vector<std::unique_ptr<fdl::Stage>> stages;
  for (int i = 0; i < 4; ++i) {
    stages.push_back(std::make_unique<fdl::Stage>(pool));
    stages.back()->begin(threads);
    stages.back()->add_wave(total);
    stages.back()->seal();
  }
  std::atomic<int64_t> ran{0};
  std::atomic<int> inside{0};
  auto job = [&](int thread) {
    // The threads of a large machine work side by side; on this one they have to be told to.
    inside.fetch_add(1);
    while (inside.load() < threads) sched_yield();
    for (auto& stage : stages)
      stage->work_off(thread, [&](int64_t, int64_t) {
        ran.fetch_add(1);
        sched_yield();
      });
  };
  while (counting::asleep.load() < threads - 1) sched_yield();
  usleep(10'000);  // until the last one does not only call
  counting::counts = true;
  pool.run(job);
  counting::counts = false;
  for (const auto& [line, record] : counting::lines)
    std::printf("moves %lx %lld\n", static_cast<unsigned long>(line), static_cast<long long>(record.moves));
  std::printf("tasks %lld\n", static_cast<long long>(ran.load()));
  std::printf("calls %d\n", counting::wakes);
  return 0;
}
