"""Packed experts lie on the memory nodes whose threads read them: asked of the system, page by page.

Needs a machine with several memory nodes; `make test-nodes` emulates one (tests/nodes.sh).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kernel_samples import library, random_expert

from fiddler_runtime import arena
from fiddler_runtime.kernels import Kernels
from fiddler_runtime.machine import NodeCpus, lane_cpus, refuses_placement, usable_cores
from fiddlerc.ir import Activation

PAGE = 4096
ISAS = ("avx2", "scalar")  # what emulation has
FORMS: tuple[tuple[int, int, tuple[str, ...], Activation, bool], ...] = (
    (512, 256, ISAS, "silu", False),  # an expert smaller than a huge page
    (2048, 768, ISAS, "silu", False),  # Qwen3's
    (1440, 752, ISAS, "gptoss", True),  # with biases, and of no whole number of pages
    (64, 128, ISAS, "gptoss", True),  # whose parts are smaller than a page
)
_MOVE_PAGES = 279  # of x86-64: with no nodes to move to it tells where pages are


def nodes_of(memory: torch.Tensor) -> npt.NDArray[np.int32]:
    """The node of every page of it."""
    first = memory.data_ptr() // PAGE * PAGE
    pages = np.arange(first, memory.data_ptr() + memory.nbytes, PAGE, dtype=np.uint64)
    memory.view(torch.int16)[:: PAGE // 2].sum()  # a page that the system is about to look at counts as absent
    status = np.empty(len(pages), np.int32)
    syscall = ctypes.CDLL(None).syscall
    assert syscall(_MOVE_PAGES, 0, ctypes.c_ulong(len(pages)), ctypes.c_void_p(pages.ctypes.data), None,
                   ctypes.c_void_p(status.ctypes.data), 0) == 0  # fmt: skip
    return status


def node_of_thread(cpus: tuple[NodeCpus, ...], thread: int) -> int:
    return [of.node for of in cpus for _ in of.cpus][thread]


def share_near(kernels: Kernels, cpus: tuple[NodeCpus, ...], packed: torch.Tensor) -> float:
    """Of one expert's pages with weights, those that are on the node of the thread that reads their first byte."""
    spec = kernels.library.spec
    wanted = []  # by byte of the blocks, which lie one after another
    for blocks, nbytes in (
        (-(-spec.intermediate_size // 16), -(-spec.hidden_size // 2) * 128),
        (-(-spec.hidden_size // 32), -(-spec.intermediate_size // 2) * 128),
    ):
        threads = np.arange(kernels.threads + 1)
        share = np.diff(blocks * threads // kernels.threads)  # thread t has the blocks from blocks * t / threads on
        of_thread = np.array([node_of_thread(cpus, thread) for thread in threads[:-1]], np.int8)
        wanted.append(np.repeat(of_thread, share * nbytes))
    nodes = np.concatenate(wanted)
    # A page that begins before belongs to what lies there.
    begins = np.arange(-packed.data_ptr() % PAGE, len(nodes), PAGE)
    found = nodes_of(packed)[1 if begins[0] else 0 :]
    return float((found[: len(begins)] == nodes[begins]).mean())


@pytest.fixture(params=["all", "one less", "one of each node"])
def cpus(request: pytest.FixtureRequest) -> tuple[NodeCpus, ...]:
    """Of several nodes, as the engine takes them."""
    every = lane_cpus(usable_cores()) or ()
    threads = {"all": usable_cores(), "one less": usable_cores() - 1, "one of each node": len(every)}[request.param]
    found = lane_cpus(threads)
    if "FIDDLER_MEMORY_NODES" in os.environ:
        assert found is not None and len(found) == int(os.environ["FIDDLER_MEMORY_NODES"]) and not refuses_placement()
    if found is None:
        pytest.skip("one memory node, or too few cores on one")
    if refuses_placement():
        pytest.skip(f"mbind is refused: {refuses_placement()}")
    return found


@pytest.fixture(params=FORMS, ids=str)
def kernels(request: pytest.FixtureRequest, cpus: tuple[NodeCpus, ...]) -> Iterator[Kernels]:
    built = library(*request.param)
    with built.open(None, sum(len(of.cpus) for of in cpus), cpus=cpus) as opened:
        yield opened


def test_packed_experts_lie_near(kernels: Kernels, cpus: tuple[NodeCpus, ...]) -> None:
    spec = kernels.library.spec
    expert = random_expert((spec.hidden_size, spec.intermediate_size), torch.Generator().manual_seed(1), spec.bias)
    experts = arena.allocate(6 * kernels.library.packed_bytes).view(6, -1)
    for packed in experts:
        assert kernels.settle(packed)
        kernels.pack(expert.gate, expert.up, expert.down, packed, expert.biases)
    assert [share_near(kernels, cpus, packed) for packed in experts] == [1.0] * 6


def test_a_mapped_file_is_brought_near(kernels: Kernels, cpus: tuple[NodeCpus, ...], tmp_path: Path) -> None:
    size = kernels.library.packed_bytes
    file = tmp_path / "experts"
    content = np.random.default_rng(1).integers(0, 256, 6 * size, np.uint8)
    content.tofile(file)  # by one thread: where that one ran
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        experts = torch.frombuffer(memory, dtype=torch.bfloat16).view(6, -1)
    before = [share_near(kernels, cpus, packed) for packed in experts]
    assert all(kernels.settle(packed, present=True) for packed in experts)
    after = [share_near(kernels, cpus, packed) for packed in experts]
    assert min(before) < 0.9, "no node has all of the page cache"
    assert after == [1.0] * 6
    assert np.array_equal(np.frombuffer(memory, np.uint8), content)


def test_what_the_bandwidth_is_measured_with_lies_near(kernels: Kernels, cpus: tuple[NodeCpus, ...]) -> None:
    data = arena.allocate(32 << 20).fill_(1)
    assert kernels.settle_probed(data)
    wanted = [node_of_thread(cpus, next(t for t in range(kernels.threads) if piece < 32 * (t + 1) // kernels.threads))
              for piece in range(32)]  # fmt: skip
    far = (nodes_of(data).reshape(32, -1) != np.array(wanted)[:, None]).mean(axis=1)  # a piece is 1 MiB
    assert far.sum() <= 2 * (len(cpus) - 1), "at each border a huge page that was there"


def test_many_experts_are_one_mapping(kernels: Kernels) -> None:
    """Linux gives a process 65,530 of them."""
    experts = arena.allocate(16 * kernels.library.packed_bytes).view(16, -1)
    before = len(Path("/proc/self/maps").read_text().splitlines())
    assert all(kernels.settle(packed) for packed in experts)
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= before + 4


if __name__ == "__main__":  # has the kernels built
    for form in FORMS:
        library(*form)
