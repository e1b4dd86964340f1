// Multiplies on registers that ask for a cache line now and then, for prefetch.py. Needs AVX2 and FMA.
#include <immintrin.h>

#include <chrono>
#include <cstdint>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Eight independent sums, as many as hide a multiply's latency.
inline void multiply_eight(__m256 (&sums)[8], __m256 factor) {
#pragma GCC unroll 8
  for (__m256& sum : sums) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(sum) : "x"(factor));
}

template <int kEights, bool kFetch>
double multiply(const char* from, int64_t bytes) {
  __m256 sums[8] = {}, factor = {};
  const double started = now();
  for (int64_t at = 0; at < bytes; at += 64) {
    if (kFetch) __builtin_prefetch(from + at, 0, 2);
#pragma GCC unroll 8
    for (int i = 0; i < kEights; ++i) multiply_eight(sums, factor);
  }
  return now() - started;
}

double read(const char* from, int64_t bytes) {
  const double started = now();
  uint64_t sum = 0;
  for (int64_t at = 0; at < bytes; at += 64) sum += *reinterpret_cast<const volatile uint64_t*>(from + at);
  asm volatile("" : : "r"(sum));
  return now() - started;
}

template <int kEights>
void all(const char* data, int64_t bytes, int64_t block, double* seconds) {
  for (const char* at = data; at + block <= data + bytes; at += block) {
    seconds[0] += multiply<kEights, true>(at, block);
    seconds[1] += read(at, block);  // what was fetched, and the rest
    seconds[2] += read(at, block);  // all from the cache
  }
  for (const char* at = data; at + block <= data + bytes; at += block) {
    seconds[3] += multiply<kEights, false>(at, block);
    seconds[4] += read(at, block);  // nothing was fetched
  }
}

}  // namespace

// Seconds of: multiplies that fetch, reading then, reading again; multiplies alone, reading then. 8, 16 ... multiplies a line.
extern "C" void measure(const char* data, int64_t bytes, int64_t block, int64_t eights, double* seconds) {
  switch (eights) {
    case 1: return all<1>(data, bytes, block, seconds);
    case 2: return all<2>(data, bytes, block, seconds);
    case 3: return all<3>(data, bytes, block, seconds);
    case 4: return all<4>(data, bytes, block, seconds);
    case 6: return all<6>(data, bytes, block, seconds);
    case 8: return all<8>(data, bytes, block, seconds);
  }
}
