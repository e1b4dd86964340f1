// Whether AMX's tiles may be used. Baseline code: it must run anywhere.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "cpu.hpp"

namespace fdl {

// <asm/prctl.h> of Linux 5.16, which is the first that hands tiles out; older ones refuse both.
constexpr int kSupportedComponents = 0x1021, kRequestComponent = 0x1023;  // ARCH_GET_XCOMP_SUPP, ARCH_REQ_XCOMP_PERM
constexpr int kTileData = 18;

// The CPU has the instructions, and the system saves their registers and would hand them out. Changes nothing.
inline bool has_amx_bf16() {
  constexpr uint64_t kTiles = uint64_t{3} << 17;  // XTILECFG, XTILEDATA
  const uint32_t edx = cpuid(7, 0).edx;
  if (!has_avx512_bf16() || !bit(edx, 24) || !bit(edx, 22) || (saved_state() & kTiles) != kTiles) return false;
  uint64_t supported = 0;
  return syscall(SYS_arch_prctl, kSupportedComponents, &supported) == 0 && (supported >> kTileData & 1) != 0;
}

// Asks for the registers, for all threads of this process. Refused where a thread's signal stack is too small for them.
inline bool permit_tiles() { return syscall(SYS_arch_prctl, kRequestComponent, kTileData) == 0; }

}  // namespace fdl
