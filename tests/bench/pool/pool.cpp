// Times of the kernels' thread pool with nothing to do.
#include "pool.hpp"

#include <atomic>
#include <cstdint>

extern "C" {

fdl::Pool* pool_open(int32_t threads) {
  auto* pool = new fdl::Pool(threads);
  return pool->start(nullptr, 1, nullptr) ? pool : nullptr;
}

void pool_close(fdl::Pool* pool) { delete pool; }

// ns[i]: one region that does nothing, begun gap_ns after the one before. Whoever comes late is not waited for.
void pool_empty(fdl::Pool* pool, int64_t gap_ns, int64_t count, int64_t* ns) {
  auto job = [](int) {};
  for (int64_t i = 0; i < count; ++i) {
    for (const int64_t begin = fdl::now_ns(); fdl::now_ns() - begin < gap_ns;) __builtin_ia32_pause();
    const int64_t begin = fdl::now_ns();
    pool->run(job);
    ns[i] = fdl::now_ns() - begin;
  }
}

// The same with a region that ends when every thread has been in it.
void pool_meet(fdl::Pool* pool, int64_t gap_ns, int64_t count, int64_t* ns) {
  alignas(128) std::atomic<int> here{0};
  const int all = pool->threads();
  auto job = [&](int) {
    here.fetch_add(1);
    while (here.load() < all) __builtin_ia32_pause();
  };
  for (int64_t i = 0; i < count; ++i) {
    here.store(0);
    for (const int64_t begin = fdl::now_ns(); fdl::now_ns() - begin < gap_ns;) __builtin_ia32_pause();
    const int64_t begin = fdl::now_ns();
    pool->run(job);
    ns[i] = fdl::now_ns() - begin;
  }
}

}  // extern "C"
