// The read bandwidth of some memory: several plain read loops, of which the bench takes the fastest (docs/kernels-measured.md).
//
// It stands apart from the kernel library, so that a change to the kernels never changes what they are measured by.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kPiece = 1 << 20;  // what a thread takes at a time

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// `Streams` places at once, 4 vectors at each, every line of a place fetched `ahead` bytes early into the second-level cache.
#define READ_LOOP(name, isa, Vector, bytes)                                                     \
  template <int Streams, int ahead>                                                             \
  __attribute__((target(isa))) void name(const char* data, int64_t length) {                    \
    typedef long long Bits __attribute__((vector_size(bytes), aligned(1)));                     \
    Bits sums[Streams * 4] = {};                                                                \
    const int64_t part = length / Streams / (4 * bytes) * (4 * bytes);                          \
    for (int64_t at = 0; at < part; at += 4 * bytes) {                                          \
      _Pragma("GCC unroll 8") for (int s = 0; s < Streams; ++s) {                               \
        const char* place = data + s * part + at;                                               \
        _Pragma("GCC unroll 8") for (int v = 0; v < 4; ++v) {                                   \
          if (ahead > 0 && v * bytes % 64 == 0)                                                 \
            __builtin_prefetch(place + v * bytes + ahead, 0, 2);                                \
          sums[4 * s + v] ^= *reinterpret_cast<const Bits*>(place + v * bytes);                 \
        }                                                                                       \
      }                                                                                         \
    }                                                                                           \
    for (auto& sum : sums) asm volatile("" : : "m"(sum));                                       \
  }
READ_LOOP(read64, "avx512f", __m512i, 64)
READ_LOOP(read32, "avx2", __m256i, 32)
READ_LOOP(read16, "sse2", __m128i, 16)
#undef READ_LOOP

struct Loop {
  const char* name;
  void (*read[3])(const char*, int64_t);  // with 64, 32 and 16 bytes a load
};

#define LOOP(streams, ahead) {read64<streams, ahead>, read32<streams, ahead>, read16<streams, ahead>}
const Loop kLoops[] = {
    {"1 stream", LOOP(1, 0)},
    {"4 streams", LOOP(4, 0)},
    {"1 stream, 1 KiB ahead", LOOP(1, 1024)},
    {"1 stream, 4 KiB ahead", LOOP(1, 4096)},
    {"4 streams, 1 KiB ahead", LOOP(4, 1024)},
};

int width() {
  if (__builtin_cpu_supports("avx512f")) return 0;
  return __builtin_cpu_supports("avx2") ? 1 : 2;
}

}  // namespace

extern "C" {

int32_t limits_loops() { return sizeof kLoops / sizeof *kLoops; }

const char* limits_loop_name(int32_t loop) { return kLoops[loop].name; }

// Seconds from when the first of `threads` threads begins to read the regions until the last one ends. Threads are begun
// before and wait for each other, so that starting them does not count.
double limits_read(int32_t loop, const char* const* regions, const int64_t* bytes, int32_t count, int32_t threads) {
  const auto read = kLoops[loop].read[width()];
  std::vector<std::pair<const char*, int64_t>> pieces;
  for (int32_t i = 0; i < count; ++i)
    for (int64_t at = 0; at < bytes[i]; at += kPiece) pieces.push_back({regions[i] + at, std::min(kPiece, bytes[i] - at)});
  std::atomic<size_t> next{0};
  std::atomic<int32_t> arrived{0};
  std::vector<double> begin(threads), end(threads);
  const auto job = [&](int32_t thread) {
    arrived.fetch_add(1);
    while (arrived.load() < threads) __builtin_ia32_pause();
    begin[thread] = now();
    for (size_t i; (i = next.fetch_add(1)) < pieces.size();) read(pieces[i].first, pieces[i].second);
    end[thread] = now();
  };
  std::vector<std::thread> others;
  for (int32_t i = 1; i < threads; ++i) others.emplace_back(job, i);
  job(0);
  for (auto& thread : others) thread.join();
  return *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
}

}  // extern "C"
