"""The loop that only reads and multiplies: each weight is read once, and multiplied as often as the tokens need."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from bench.kernels import both

from fiddler_runtime.build import find_toolchain
from fiddlerc.codegen import generate

COUNTING = """
#include <cstdint>
#define PLACES {places}
#define AHEAD {ahead}
#define LEVEL 1
#include "fiddler/isa_scalar.hpp"
#include "fiddler/kernel.hpp"
#include "both.hpp"
namespace {{
uint64_t added;
struct Counting : Scalar {{  // adds the weights up instead
  static inline Vector multiply_add(Vector sum, Weights weights, Inputs) {{
    uint32_t pairs[kLanes];
    __builtin_memcpy(pairs, &weights, sizeof pairs);
    for (uint32_t pair : pairs) added += pair;
    return sum;
  }}
}};
}}
extern "C" uint64_t total(int64_t tokens, int64_t pairs, int64_t blocks, const uint32_t* weights) {{
  fdl::Task task{{}};
  task.tokens = tokens, task.pairs = pairs, task.blocks = blocks, task.weights = weights;
  task.weight_stride = pairs * fdl::kLanes;
  added = 0;
  both<Counting, void>(task);
  return added;
}}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("places", "ahead"), sorted({loop[:2] for loop in both.LOOPS.values()}))
def test_each_weight_is_multiplied_as_often_as_tokens_need(places: int, ahead: int, tmp_path: Path) -> None:
    generate(128, 72, ("scalar",)).write(tmp_path)
    source, library = tmp_path / "counting.cpp", tmp_path / "counting.so"
    source.write_text(COUNTING.format(places=places, ahead=ahead))
    flags = ["-std=c++17", "-O2", "-Wno-psabi", "-shared", "-fPIC", f"-I{tmp_path}", f"-I{tmp_path / 'include'}"]
    flags += [f"-I{Path(both.__file__).parent}", str(source), "-o", str(library)]
    subprocess.run([str(find_toolchain().compiler), *flags], check=True)
    total = ctypes.CDLL(str(library)).total
    total.restype, total.argtypes = ctypes.c_uint64, (ctypes.c_int64,) * 3 + (ctypes.c_void_p,)
    for pairs in (36, 37):  # parted by four places, and not
        weights = np.random.default_rng(pairs).integers(0, 1 << 32, (3, pairs, 32), dtype=np.uint32)
        for tokens, multiplied in ((1, 1), (5, 5), (8, 8), (17, 18), (40, 40)):
            expected = int(weights.sum(dtype=np.uint64)) * 2 * multiplied  # the even inputs, then the odd ones
            assert total(tokens, pairs, 3, weights.ctypes.data) == expected
