"""The generated library under AddressSanitizer with UBSan, and under ThreadSanitizer: `make test-sanitizers`."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import cmake
import pytest
from kernel_samples import emulated

from fiddler_runtime.machine import KNOWN_ISAS, missing_flags
from fiddlerc.codegen import generate
from fiddlerc.ir import Blocking

DRIVER = Path(__file__).with_name("driver.cpp")
TEAM = Path(__file__).parents[1] / "kernels"
# Tails in both sizes, whole lines of results, more than one block, and small enough to be quick without optimisation.
SHAPE = (80, 200)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_nothing_is_found(sanitizer: str, tmp_path: Path) -> None:
    # Everything that experts may have; tiles emulated, whether or not this CPU has them, AVX-512 if it has not.
    shallow = {"amx_bf16": Blocking(48, 2, (), 64, 1, 4096)}  # several chunks of either depth
    sources = emulated(generate(*SHAPE, activation="gptoss", bias=True, blockings=shallow))
    # The sources' own -O3 comes after all other flags.
    text = sources.files["CMakeLists.txt"].replace("-O3 ", "")
    kernels = replace(sources, files={**sources.files, "CMakeLists.txt": text}).write(tmp_path / "kernels")
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-O1"]
    build = tmp_path / "build"
    program = str(Path(cmake.CMAKE_BIN_DIR, "cmake"))
    configure = [program, "-S", str(kernels), "-B", str(build), f"-DCMAKE_CXX_FLAGS={' '.join(flags)}"]
    for command in (
        # The linker script hides what the sanitizer's runtime looks for; everything is linked shared for its sake.
        [*configure, "-DFIDDLER_STATIC_RUNTIME=OFF", "-DCMAKE_BUILD_TYPE=None"],
        [program, "--build", str(build), "--parallel", "2"],
        ["c++", "-std=c++17", *flags, str(DRIVER), f"-I{kernels}", f"-I{kernels}/include", f"-I{TEAM}",
         "-o", str(build / "driver"), f"-L{build}", f"-l{sources.spec.name}", f"-Wl,-rpath,{build}", "-pthread"],
        [str(build / "driver")],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert ran == (["scalar"] if missing_flags("avx2") else list(KNOWN_ISAS))
    print(done.stdout)
