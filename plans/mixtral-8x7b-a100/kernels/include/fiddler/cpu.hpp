// What this CPU and its operating system allow. Baseline code: it must run anywhere.
#pragma once

#include <cpuid.h>
#include <sched.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>

namespace fdl {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

inline Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  // Returns 0 and leaves r untouched where the CPU does not have the leaf.
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

inline bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

// Register state that the operating system saves: XCR0, or 0 where XGETBV does not exist.
inline uint64_t saved_state() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

inline bool has_avx2() {
  constexpr uint64_t kYmm = 0x6;  // SSE and AVX state
  return bit(cpuid(1, 0).ecx, 12) && bit(cpuid(7, 0).ebx, 5) && (saved_state() & kYmm) == kYmm;  // FMA, AVX2
}

inline bool has_avx512f() {
  constexpr uint64_t kZmm = 0xe6;  // and mask registers, upper zmm halves, zmm16..31
  const uint32_t ebx = cpuid(7, 0).ebx;
  return bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31) && (saved_state() & kZmm) == kZmm;  // F DQ BW VL
}

inline bool has_avx512_bf16() { return has_avx512f() && cpuid(7, 0).eax >= 1 && bit(cpuid(7, 1).eax, 5); }

inline bool always() { return true; }

// CPUs this process may be scheduled on.
inline int usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1024;  // more than cpu_set_t holds: not a small machine
  return CPU_COUNT(&set);
}

// The memory node of a CPU; 0 where the system does not say.
inline int node_of(int cpu) {
  constexpr int kMostNodes = 64;
  for (int node = 0; node < kMostNodes; ++node) {
    char path[96];
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/node%d", cpu, node);
    if (access(path, F_OK) == 0) return node;
  }
  return 0;
}

// Memory nodes under threads that run on `cpus`, if the threads of each are neighbours and equally many; otherwise 1.
inline int nodes_of(const int32_t* cpus, int threads) {
  int nodes = 1;
  for (int t = 1; t < threads; ++t) nodes += node_of(cpus[t]) != node_of(cpus[t - 1]);
  if (threads % nodes != 0) return 1;
  const int each = threads / nodes;
  for (int t = 0; t < threads; ++t)
    if (node_of(cpus[t]) != node_of(cpus[t - t % each])) return 1;
  return nodes;
}

}  // namespace fdl
