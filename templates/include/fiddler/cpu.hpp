// What this CPU and its operating system allow. Baseline code: it must run anywhere.
#pragma once

#include <cpuid.h>
#include <sched.h>

#include <cstdint>

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

}  // namespace fdl
