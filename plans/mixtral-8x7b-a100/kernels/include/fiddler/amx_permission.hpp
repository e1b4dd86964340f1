// Whether AMX's tiles may be used. Baseline code: it must run anywhere.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "cpu.hpp"

namespace fdl {

// <asm/prctl.h> of Linux 5.16, which is the first that hands tiles out; older ones refuse.
constexpr int kRequestComponent = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM

// The CPU has the instructions, the system saves their registers and hands them out to all threads of this process, which it is
// asked for here. Refused where a thread's signal stack is too small for them.
inline bool has_amx_bf16() {
  constexpr uint64_t kTiles = uint64_t{3} << 17;  // XTILECFG, XTILEDATA
  const uint32_t edx = cpuid(7, 0).edx;
  return has_avx512_bf16() && bit(edx, 24) && bit(edx, 22) && (saved_state() & kTiles) == kTiles &&
         syscall(SYS_arch_prctl, kRequestComponent, kTileData) == 0;
}

}  // namespace fdl
