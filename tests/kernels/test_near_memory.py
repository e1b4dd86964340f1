"""Threads read their own node's part of the weights, counted.

On a machine with one node the nodes are only said. Where pages lie where there are several: test_memory_nodes.py.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_samples import ISAS, Expert, library, open_isa, random_expert, run_moe

from fiddler_runtime import arena
from fiddler_runtime.build import find_toolchain
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import NodeCpus, refuses_placement
from fiddler_runtime.makespan import CPU, SPLIT
from fiddlerc.codegen import generate

SOURCE = Path(__file__).with_name("near_memory.cpp")
SHAPES = {"small": (256, 256), "large": (512, 2048)}  # an expert of few tasks, dealt out with others; one of many


def nodes_of(cpus: list[list[int]]) -> tuple[NodeCpus, ...]:
    """CPUs as if those of each list were on a node of their own; the memory of all is node 0's."""
    return tuple(NodeCpus(0, tuple(of_node)) for of_node in cpus)


placed = pytest.mark.skipif(bool(refuses_placement()), reason=f"mbind is refused: {refuses_placement()}")


def taken(memory: torch.Tensor) -> bool:
    """Whether all pages of it, which begins at one, are there."""
    pages = (ctypes.c_ubyte * (-(-memory.nbytes // 4096)))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes), pages) == 0
    return all(page & 1 for page in pages)


Run = Callable[[int, int, int], tuple[int, int]]


@pytest.fixture(scope="module", params=SHAPES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(tokens, nodes, readers): blocks that are read by threads of the node of their part, and others."""
    folder = tmp_path_factory.mktemp("near")
    generate(*SHAPES[request.param], ("scalar",)).write(folder)
    driver = folder / "near_memory"
    command = [str(find_toolchain().compiler), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(
        [*command, f"-I{folder}", f"-I{folder / 'include'}", str(SOURCE), "-o", str(driver)], check=True, timeout=300
    )

    def counts(tokens: int, nodes: int, readers: int) -> tuple[int, int]:
        command = [str(driver), str(tokens), str(nodes), str(readers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
        near, far = (int(line.split()[1]) for line in done.stdout.splitlines())
        return near, far

    return counts


@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("tokens", [8, 64, 2400])
def test_blocks_are_read_where_they_lie(run: Run, tokens: int, nodes: int) -> None:
    """But for some at the borders between threads, and what a thread that was early did for another."""
    near, far = run(tokens, nodes, nodes)
    print(f"far: {far / (near + far):.1%}")
    assert far <= 0.2 * (near + far), (near, far)


@pytest.mark.parametrize("run", ["small"], indirect=True)
def test_without_nodes_they_are_not(run: Run) -> None:
    """Small experts go to one thread after the other then, wherever they lie."""
    near, far = run(64, 2, 1)
    assert far >= 0.3 * (near + far), (near, far)


@pytest.mark.parametrize("isa", ISAS)
def test_nodes_change_no_bit(isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (256, 1408)
    experts: list[Expert | None] = [random_expert(shape, generator) for _ in range(3)]
    hidden = torch.randn(300, shape[0], generator=generator).bfloat16()
    ids = torch.tensor([0, 0, 0, 1, 2])[torch.randint(5, (300, 2), generator=generator)]  # the first's take two units
    weights = torch.rand(300, 2, generator=generator)
    strategy = np.array([CPU, SPLIT, CPU], np.uint8)
    with open_isa(shape, isa, threads=1) as alone:
        expected = {
            (tokens, rows): run_moe(alone, experts, hidden[:tokens], ids[:tokens], weights[:tokens], strategy, rows)
            for tokens in (1, 40, 300)
            for rows in (0, 320)
        }
        isa_library = alone.library
    for cpus in ([[0, 1]], [[0], [1]], [[0], [1, 0]], [[0, 1], [0, 1]], [[0], [1], [0], [1]]):
        with isa_library.open(isa, sum(map(len, cpus)), cpus=nodes_of(cpus)) as kernels:
            for (tokens, rows), result in expected.items():
                part = hidden[:tokens], ids[:tokens], weights[:tokens]
                assert torch.equal(run_moe(kernels, experts, *part, strategy, rows), result), (cpus, tokens, rows)


def test_threads_run_where_they_are_told_to() -> None:
    here = sorted(os.sched_getaffinity(0))
    first, last = here[0], here[-1]
    built, before = library(8, 24), os.listdir("/proc/self/task")
    with built.open(threads=4, cpus=nodes_of([[first, first], [last, last]])):
        patience = time.monotonic() + 10
        while True:  # a thread pins itself when it has started
            workers = sorted(set(os.listdir("/proc/self/task")) - set(before), key=int)
            allowed = [sorted(os.sched_getaffinity(int(worker))) for worker in workers]
            if sorted(allowed) == sorted([[first], [last], [last]]) or time.monotonic() > patience:
                break
            time.sleep(0.01)
        assert sorted(os.sched_getaffinity(0)) == here, "the caller's thread is its own business"
    assert allowed == [[first], [last], [last]]


def test_uneven_nodes_are_refused() -> None:
    for cpus in ([[0, 1], [0]], [[0]], [[0, 1], [0, 1]], [[], [0, 1, 0]], []):
        with pytest.raises(FiddlerError, match=r"cannot pin the kernel's threads.*of each node as many"):
            library(8, 24).open(threads=3, cpus=nodes_of(cpus))


@placed
def test_settling_changes_nothing_else() -> None:
    """Two nodes that are the same one: as on any machine whose system takes advice."""
    shape = SHAPES["small"]
    with library(*shape).open(None, 2, cpus=nodes_of([[0], [0]])) as kernels:
        fresh = arena.allocate(16 * kernels.library.packed_bytes).view(16, -1)
        assert not taken(fresh)
        assert all(kernels.settle(packed) for packed in fresh)
        assert taken(fresh), "by whatever compiler's code"
        assert not fresh.view(torch.int16).any()
        fresh.view(torch.int16).random_(generator=torch.Generator().manual_seed(1))
        kept = fresh.clone()
        assert all(kernels.settle(packed, present=True) for packed in fresh)
        assert kernels.settle_probed(fresh)
        assert torch.equal(fresh.view(torch.int16), kept.view(torch.int16))


def test_a_team_need_not_come_as_a_whole() -> None:
    """OMP_THREAD_LIMIT, OMP_DYNAMIC and a region around this one make it smaller than it was asked to be."""
    code = (
        "import torch; from kernel_samples import library; from fiddler_runtime import arena, machine as m;"
        "torch.set_num_threads(3); cpus = (m.NodeCpus(0, (0,)), m.NodeCpus(1023, (0, 0)));"
        "kernels = library(256, 256).open(None, 3, cpus=cpus, beside_torch=True);"
        "kernels.settle(arena.allocate(kernels.library.packed_bytes)); print(kernels.whose_threads)"
    )
    library(256, 256)
    environment = os.environ | {"OMP_THREAD_LIMIT": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    if done.stdout != "torch's\n":
        pytest.skip("this torch's threads are not to be had")


def test_only_an_expert_is_settled() -> None:
    with library(*SHAPES["small"]).open(None, 2, cpus=nodes_of([[0], [0]])) as kernels:
        half = arena.allocate(kernels.library.packed_bytes // 2)
        with pytest.raises(FiddlerError, match="wrong packed expert"):
            kernels.settle(half)
        with pytest.raises(FiddlerError, match="wrong buffer to read"):
            kernels.settle_probed(half[:100])


def test_a_node_that_is_not_there_is_told() -> None:
    with library(*SHAPES["small"]).open(None, 2, cpus=(NodeCpus(0, (0,)), NodeCpus(1023, (0,)))) as kernels:
        packed = arena.allocate(kernels.library.packed_bytes)
        assert not kernels.settle(packed)
        assert not kernels.settle(packed, present=True)
        assert not packed.view(torch.int16).any(), "it is there all the same"


def test_on_one_node_nothing_is_placed() -> None:
    with library(*SHAPES["small"]).open(None, 2) as kernels:
        assert kernels.nodes == ()
        assert kernels.settle(arena.allocate(kernels.library.packed_bytes))
