// In place of the header of this name: any system permits the emulation in amx_tiles.hpp.
#pragma once

#include "cpu.hpp"

namespace fdl {

inline bool has_amx_bf16() { return true; }

}  // namespace fdl
