"""The library around the numbers: which variant runs, threads, forks, errors, and that baseline code stays baseline."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_samples import ISAS, library, one_expert, open_isa, random_expert, run_moe

from fiddler_runtime import kernels as wrapper
from fiddler_runtime.build import find_toolchain
from fiddler_runtime.captured import native
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.kernels import KernelLibrary, Kernels, TablesStruct, empty_packed, make_pointers
from fiddler_runtime.machine import NodeCpus, cpu_isas, missing_flags
from fiddler_runtime.openmp import TeamStruct, torch_team

SHAPE = (129, 40)
LARGE = (256, 1408)  # with some tokens more than one thread is given to itself


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_library_says_what_it_is() -> None:
    built = library(*SHAPE)
    assert built.isas == ISAS
    assert built.packed_bytes == built.spec.packed_bytes


def test_detection_agrees_with_the_kernel_of_the_system() -> None:
    built = library(*SHAPE)
    assert tuple(isa for isa in ISAS if built.usable(isa)) == cpu_isas()
    assert not built.usable("avx10")


@pytest.mark.parametrize("isa", ISAS)
def test_the_variant_asked_for_runs(isa: str) -> None:
    with open_isa(SHAPE, isa, threads=1) as kernels:
        assert kernels.isa == isa
        assert kernels.threads == 1


def test_the_best_usable_variant_is_the_default() -> None:
    with library(*SHAPE).open(threads=1) as kernels:
        assert kernels.isa == cpu_isas()[0]


def test_a_library_without_vector_variants_runs_everything() -> None:
    built = library(*SHAPE, ("scalar",))
    assert built.isas == ("scalar",)
    assert [isa for isa in ISAS if built.usable(isa)] == ["scalar"]
    expert = random_expert(SHAPE, torch.Generator().manual_seed(1))
    with built.open(threads=2) as kernels:
        assert kernels.isa == "scalar"
        assert one_expert(kernels, expert, torch.ones(2, SHAPE[0]).bfloat16()).isfinite().all()
        assert kernels.peak_gflops(1.0) > 0
        assert kernels.read_gbps(torch.zeros(1 << 20)) > 0
    table = np.array([0, 1, 2], dtype=np.float32)
    tables = TablesStruct(table.ctypes.data, table.ctypes.data, 3, 0, 0, 1, 0, 0)
    ids = np.array([0, 1, 1, 7], dtype=np.int64)
    counts, strategy, lanes = np.empty(2, np.int32), np.empty(2, np.uint8), np.empty(2, np.float32)
    split = np.empty(2, np.int32)
    status = built.native.fdl_dispatch(
        tables, ids.ctypes.data, 4, np.zeros(2, np.uint8).ctypes.data, 2,
        counts.ctypes.data, strategy.ctypes.data, split.ctypes.data, lanes.ctypes.data,
    )  # fmt: skip
    assert status == 0
    assert counts.tolist() == [1, 2]
    with pytest.raises(FiddlerError, match="no avx2 kernels were generated"):
        built.open("avx2")


def test_an_instruction_set_that_the_cpu_lacks_is_refused() -> None:
    lacking = [isa for isa in ISAS if missing_flags(isa)]
    if not lacking:
        pytest.skip("this CPU has every instruction set that there are kernels for")
    for isa in lacking:
        with pytest.raises(
            FiddlerError, match=f"this CPU cannot run {isa} kernels: found no .*{missing_flags(isa)[-1]}"
        ):
            library(*SHAPE).open(isa)


def test_what_does_not_run_is_told_with_the_reason() -> None:
    with library(*SHAPE).open("scalar", threads=1) as kernels:
        others = kernels.library.others("scalar")
    assert others.keys() == set(ISAS) - {"scalar"}
    for isa, why in others.items():
        assert all(flag in why for flag in missing_flags(isa))
    if not missing_flags("avx512_bf16"):
        with open_isa(SHAPE, "avx512_bf16") as kernels:
            assert kernels.library.others(kernels.isa)["scalar"] == "avx512_bf16 was preferred"


def test_only_variants_contain_vector_instructions() -> None:
    """No function that baseline code may call was compiled with an instruction set's flags."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", str(library(*SHAPE).path)], capture_output=True, text=True, check=True
    ).stdout
    wide: set[str] = set()
    functions: set[str] = set()
    for section in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        name = re.match(r"[0-9a-f]+ <([^>]+)>:", section)
        if name:
            functions.add(name[1])
            if re.search(r"%[yzt]mm\d|%k[1-7]\b|\tv[a-z]+ ", section):
                wide.add(name[1])
    variants = {name for name in functions if re.search("__a[vm]x|A[vm]x", name)}
    assert {"fdl_moe", "fdl_open", "fdl_isa_usable"} <= functions
    assert wide, "the disassembly was not understood"
    assert wide <= variants


def test_tile_instructions_are_what_they_are_called() -> None:
    """They are written as bytes (amx_tiles.hpp)."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", "-M", "intel", str(library(*SHAPE).path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = set(
        re.findall(r"\t((?:ldtilecfg|tilerelease|tilezero|tileloaddt?1?|tilestored|tdpbf16ps)\b.*?) *$", listing, re.M)
    )
    if not found:
        pytest.skip("this objdump does not know the instructions of AMX")
    memory = "[rax+rcx*1]"
    expected = {"ldtilecfg [rax]", "tilerelease"}
    expected |= {
        f"{name} tmm{t}{rest}" for t in range(6) for name, rest in (("tilezero", ""), ("tileloadd", "," + memory))
    }
    expected |= {f"{name} tmm{t},{memory}" for t in (6, 7) for name in ("tileloadd", "tileloaddt1")}
    expected |= {f"tilestored {memory},tmm{t}" for t in range(6)}
    expected |= {f"tdpbf16ps tmm{t},tmm6,tmm7" for t in range(6)} | {f"tdpbf16ps tmm{t},tmm5,tmm7" for t in (2, 3)}
    assert {re.sub(r"\s+", " ", line) for line in found} == expected


def test_only_the_interface_is_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    lines = subprocess.run(
        [nm, "-D", "--defined-only", str(library(*SHAPE).path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    header = (Path(__file__).parents[2] / "templates/include/fiddler/abi.h").read_text()
    declared = set(re.findall(r"^(?:int32_t|int64_t|void\*?|const char\*) (fdl_\w+)\(", header, re.MULTILINE))
    assert {line.split()[-1] for line in lines} == declared


def test_structs_lie_in_memory_as_the_interface_says(tmp_path: Path) -> None:
    """Every field's offset and each struct's size, by the compiler and here."""
    packed: str = wrapper._PACK_MOE_CALL.__self__.format  # type: ignore[attr-defined]
    here = {"sizeof(fdl_moe_call)": struct.calcsize(packed)}
    include = Path(__file__).parents[2] / "templates/include"
    declared = re.search(r"struct fdl_moe_call \{(.*?)\}", (include / "fiddler/abi.h").read_text(), re.DOTALL)
    assert declared is not None
    names = re.findall(r"(\w+);", declared[1])
    for at, (name, code) in enumerate(zip(names, packed.removeprefix("@").removesuffix("4x"), strict=True)):
        here[f"offsetof(fdl_moe_call, {name})"] = struct.calcsize(packed[: at + 2]) - struct.calcsize(code)
    structs: dict[str, type[ctypes.Structure]] = {
        "fdl_tables": TablesStruct,
        "fdl_expert": wrapper._Expert,
        "fdl_team": TeamStruct,
        "fdl_step_setup": native._Setup,
    }
    for name, fields in structs.items():
        here[f"sizeof({name})"] = ctypes.sizeof(fields)
        here |= {f"offsetof({name}, {field})": getattr(fields, field).offset for field, *_ in fields._fields_}
    source, program = tmp_path / "structs.cpp", tmp_path / "structs"
    lines = "".join(f'std::printf("%zu\\n", {what});\n' for what in here)
    source.write_text(f'#include <cstddef>\n#include <cstdio>\n#include "fiddler/abi.h"\nint main() {{\n{lines}}}\n')
    subprocess.run([find_toolchain().compiler, "-I", include, source, "-o", program], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert dict(zip(here, map(int, printed.split()), strict=True)) == here


def test_calls_from_several_threads_wait_for_each_other() -> None:
    generator = torch.Generator().manual_seed(2)
    expert = random_expert(LARGE, generator)
    inputs = [torch.randn(n, LARGE[0], generator=generator).bfloat16() for n in (1, 300, 90)]
    with library(*LARGE).open(threads=2) as kernels:
        expected = [one_expert(kernels, expert, hidden) for hidden in inputs]
        wrong: list[int] = []

        def work(index: int) -> None:
            for _ in range(20):
                if not torch.equal(one_expert(kernels, expert, inputs[index]), expected[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_two_engines_beside_each_other_compute_the_same() -> None:
    generator = torch.Generator().manual_seed(3)
    calls = [
        (random_expert(LARGE, generator), torch.randn(n, LARGE[0], generator=generator).bfloat16()) for n in (40, 300)
    ]
    with library(*LARGE).open(threads=1) as kernels:
        expected = [one_expert(kernels, *call) for call in calls]
    same: list[bool] = []

    def work(kernels: Kernels, i: int) -> None:
        same.extend(torch.equal(one_expert(kernels, *calls[i]), expected[i]) for _ in range(20))

    with library(*LARGE).open(threads=2) as first, library(*LARGE).open(threads=3) as second:
        threads = [threading.Thread(target=work, args=call) for call in ((first, 0), (second, 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert same == [True] * 40


def test_idle_threads_sleep() -> None:
    expert = random_expert(LARGE, torch.Generator().manual_seed(1))
    with library(*LARGE).open(threads=2) as kernels:
        one_expert(kernels, expert, torch.ones(40, LARGE[0]).bfloat16())
        time.sleep(0.2)  # torch's threads too have gone to sleep
        before = time.process_time()
        time.sleep(1)
        assert time.process_time() - before < 0.1, "seconds of CPU time within a second"


FORK = """
import os, sys, torch
sys.path[:0] = {path!r}
from kernel_samples import library, one_expert, random_expert
expert = random_expert((256, 1408), torch.Generator().manual_seed(1))
hidden = torch.ones(50, 256).bfloat16()
torch.set_num_threads(3)
kernels = library(256, 1408).open(threads=3, beside_torch={beside_torch})
torch.set_num_threads(1)  # threads of GNU OpenMP, which torch uses, do not survive a fork
expected = one_expert(kernels, expert, hidden)
child = os.fork()
if child == 0:
    same = all(torch.equal(one_expert(kernels, expert, hidden), expected) for _ in range(3))
    kernels.close()
    os._exit(0 if same else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(one_expert(kernels, expert, hidden), expected)
kernels.close()
"""


FORK_WHILE_BUSY = """
import os, signal, sys, threading, numpy, torch
sys.path[:0] = {path!r}
from kernel_samples import library, make_pointers, random_expert
generator = torch.Generator().manual_seed(1)
expert = random_expert((256, 1408), generator)
kernels = library(256, 1408).open(threads=3)
packed = expert.packed(kernels)
pointers = make_pointers([packed.data_ptr()])
class Call:  # nothing of torch is called after the fork: its own threads do not survive it
    def __init__(self, tokens):
        self.hidden = torch.randn(tokens, 256, generator=generator).bfloat16()
        self.ids, self.weights = torch.zeros(tokens, 1).long(), torch.ones(tokens, 1)
        self.out = torch.empty(tokens, 256)
        self.expected = self.run().copy()
    def run(self):
        self.out.numpy().fill(numpy.nan)
        kernels.moe(self.hidden, self.ids, self.weights, pointers, self.out)
        return self.out.numpy()
    def again(self):
        while not stop.is_set():
            self.check()
    def check(self):
        same.append(numpy.array_equal(self.run(), self.expected))
same, stop = [], threading.Event()
def at_once(work, calls):
    threads = [threading.Thread(target=getattr(call, work)) for call in calls]
    for thread in threads:
        thread.start()
    return threads
parents, childs = [Call(50), Call(60)], [Call(50), Call(400)]
workers = at_once("again", parents)
statuses = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        same.clear()
        for thread in at_once("check", childs):  # one of the two makes what the other uses too
            thread.join()
        kernels.close()
        os._exit(0 if same == [True, True] else 3)
    statuses.append(os.waitpid(child, 0)[1])
stop.set()
for worker in workers:
    worker.join()
kernels.close()
assert all(same)
assert not any(statuses), statuses
"""


@pytest.mark.slow
def test_a_child_that_was_forked_during_calls_computes_the_same() -> None:
    """The parent's lock was taken then, its buffers were written to, and its threads are gone."""
    script = FORK_WHILE_BUSY.format(path=sys.path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("beside_torch", [False, True])
def test_a_forked_child_computes_the_same(beside_torch: bool) -> None:
    script = FORK.format(path=sys.path, beside_torch=beside_torch)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_torchs_threads_compute_the_same(torch_threads: Callable[[int], None]) -> None:
    expert = random_expert(LARGE, torch.Generator().manual_seed(1))
    hidden = torch.randn(40, LARGE[0]).bfloat16()
    with library(*LARGE).open(threads=1) as kernels:
        expected = one_expert(kernels, expert, hidden)
    torch_threads(3)
    if torch_team(3) is None:
        pytest.skip("this torch has no OpenMP runtime with the GNU interface")
    with library(*LARGE).open(threads=3, cpus=(NodeCpus(0, (0, 1, 1000)),), beside_torch=True) as kernels:
        assert kernels.whose_threads == "torch's"
        for _ in range(20):
            assert torch.equal(one_expert(kernels, expert, hidden), expected)


def test_another_number_of_threads_than_torchs_needs_threads_of_our_own(torch_threads: Callable[[int], None]) -> None:
    torch_threads(2)
    for threads in (1, 3):
        with library(*SHAPE).open(threads=threads, beside_torch=True) as kernels:
            assert kernels.whose_threads == "own"


def test_pinned_threads_work_even_outside_the_affinity() -> None:
    expert = random_expert(LARGE, torch.Generator().manual_seed(1))
    hidden = torch.ones(20, LARGE[0]).bfloat16()
    with library(*LARGE).open(threads=1) as kernels:
        expected = one_expert(kernels, expert, hidden)
    with library(*LARGE).open(threads=3, cpus=(NodeCpus(0, (0, 1, 1000)),)) as kernels:
        assert torch.equal(one_expert(kernels, expert, hidden), expected)


def test_many_more_threads_than_cpus_still_finish() -> None:
    expert = random_expert(LARGE, torch.Generator().manual_seed(1))
    hidden = torch.ones(20, LARGE[0]).bfloat16()
    with library(*LARGE).open(threads=40) as kernels:
        for _ in range(20):
            one_expert(kernels, expert, hidden)


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_senseless_thread_counts_are_refused(threads: int) -> None:
    with pytest.raises(FiddlerError, match="1 to 1024 threads"):
        library(*SHAPE).open(threads=threads)


def test_wrong_tensors_are_refused() -> None:
    good = {
        "hidden": torch.zeros(2, 129).bfloat16(),
        "topk_ids": torch.zeros(2, 1, dtype=torch.int64),
        "topk_weights": torch.zeros(2, 1),
        "out": torch.zeros(2, 129),
    }
    bad = [
        ("hidden", torch.zeros(2, 129), "wrong hidden states"),
        ("hidden", torch.zeros(2, 128).bfloat16(), "wrong hidden states"),
        ("hidden", torch.zeros(129, 2).bfloat16().T, "wrong hidden states"),
        ("topk_ids", torch.zeros(2, 1, dtype=torch.int32), "wrong top-k ids"),
        ("topk_weights", torch.zeros(2, 1).bfloat16(), "wrong top-k weights"),
        ("topk_weights", torch.zeros(2, 2), "wrong top-k weights"),
        ("topk_weights", torch.zeros(2, 3)[:, :1], "wrong top-k weights"),
        ("hidden", torch.zeros(2, 129, dtype=torch.bfloat16, device="meta"), "wrong hidden states.*meta"),
        ("out", torch.zeros(2, 129).bfloat16(), "wrong output"),
        ("out", torch.zeros(129, 2).T, "wrong output"),
        ("out", torch.zeros(3, 129), "wrong output"),
    ]
    with library(*SHAPE).open(threads=1) as kernels:
        packed = empty_packed(kernels.library.packed_bytes)
        for name, tensor, message in bad:
            with pytest.raises(FiddlerError, match=message):
                kernels.moe(**{**good, name: tensor}, experts=make_pointers([packed.data_ptr()]))
        with pytest.raises(FiddlerError, match="wrong strategy"):
            kernels.moe(**good, experts=make_pointers([None]), strategy=np.zeros(3, np.uint8))
        with pytest.raises(FiddlerError, match="pointer is null"):
            kernels.moe(**good, experts=make_pointers([None]))
        shifted = torch.empty(kernels.library.packed_bytes // 2 + 40, dtype=torch.bfloat16)
        start = (-shifted.data_ptr() % 64) // 2 + 1
        weights = (torch.zeros(40, 129).bfloat16(), torch.zeros(40, 129).bfloat16(), torch.zeros(129, 40).bfloat16())
        with pytest.raises(FiddlerError, match="64-byte alignment"):
            kernels.pack(*weights, shifted[start : start + kernels.library.packed_bytes // 2])
        with pytest.raises(FiddlerError, match="wrong gate weights"):
            kernels.pack(weights[2], weights[1], weights[2], packed)
        with pytest.raises(FiddlerError, match="wrong buffer"):
            kernels.read_gbps(torch.zeros(1))


def test_the_stride_of_a_single_row_means_nothing() -> None:
    hidden, weights = torch.ones(1, 129).bfloat16(), torch.ones(1, 1)
    ids, out = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 129)
    with library(*SHAPE).open(threads=1) as kernels:
        experts = make_pointers([None])
        kernels.moe(
            hidden.as_strided((1, 129), (7, 1)),
            ids.as_strided((1, 1), (9, 3)) - 1,  # no expert
            weights.as_strided((1, 1), (2, 5)),
            experts,
            out.as_strided((1, 129), (3, 1)),
        )
    assert not out.any()


def test_closed_kernels_say_so() -> None:
    kernels = library(*SHAPE).open(threads=2)
    kernels.close()
    kernels.close()
    with pytest.raises(FiddlerError, match="closed"):
        kernels.peak_gflops(1.0)


def test_no_tokens_is_no_work() -> None:
    with library(*SHAPE).open(threads=2) as kernels:
        out = run_moe(kernels, [None], torch.empty(0, 129).bfloat16(), torch.empty(0, 2).long(), torch.empty(0, 2))
        assert out.shape == (0, 129)


def test_a_library_of_another_plan_is_refused(tmp_path: Path) -> None:
    built = library(*SHAPE)
    with pytest.raises(FiddlerError, match="its name differs"):
        KernelLibrary(built.path, dataclasses.replace(built.spec, name="fdl_bf16_moe_h8_i24"))
    with pytest.raises(FiddlerError, match="bytes per packed expert differs"):
        KernelLibrary(built.path, dataclasses.replace(built.spec, hidden_size=999))
    with pytest.raises(FiddlerError, match="its instruction sets differs"):
        KernelLibrary(built.path, dataclasses.replace(built.spec, variants=built.spec.variants[1:]))
    broken = tmp_path / "libx.so"
    for data in (built.path.read_bytes()[:-1], built.path.read_bytes()[:1000], b"", b"text" * 100):
        broken.write_bytes(data)
        with pytest.raises(FiddlerError, match=r"cannot load the kernel library libx\.so"):
            KernelLibrary(broken, built.spec)
    with pytest.raises(FiddlerError, match="cannot load the kernel library"):
        KernelLibrary(tmp_path / "none.so", built.spec)
