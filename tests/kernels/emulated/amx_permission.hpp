// In place of the header of this name: what the emulation in amx_tiles.hpp needs, which any system permits.
#pragma once

#include "cpu.hpp"

namespace fdl {

inline bool has_amx_bf16() { return has_avx2(); }

}  // namespace fdl
