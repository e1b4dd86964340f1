"""The pool on a machine with many caches: which of its cache lines travel between threads, and how often.

A 2 x 64-core machine is modelled, not had (docs/kernels.md, Threads on larger machines). What is measured here are the
counts that the model needs, with as many threads as that machine has cores.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fiddler_runtime.build import find_toolchain

HEADERS = Path(__file__).parents[2] / "templates" / "include" / "fiddler"
SOURCE = Path(__file__).with_name("pool_lines.cpp")

# The model's machine: 2 x 64 cores, 24 channels of DDR5-4800, of whose 921 GB/s about 800 can be had.
THREADS = 128
BANDWIDTH_GBPS = 800.0
TASK_BYTES = 96 * 1024  # moe.hpp, kTaskBytes
TRANSFER_NS = 197.0  # of a line between sockets, the worst case (EPYC 7R13, github.com/nviennot/core-to-core-latency)
BUSY = 0.25  # of the time that memory needs for the tasks; what wants a line that is busier waits in a queue


STAGES = 4  # of a region


Run = Callable[[int, int], tuple[list[int], int, int]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(threads, tasks of a stage): moves of every line of one region, how many tasks ran, and the caller's wakes."""
    driver = tmp_path_factory.mktemp("pool") / "pool_lines"
    command = [str(find_toolchain().compiler), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([*command, f"-I{HEADERS}", str(SOURCE), "-o", str(driver)], check=True)

    def region(threads: int, tasks: int) -> tuple[list[int], int, int]:
        done = subprocess.run(
            [driver, str(threads), str(tasks)], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split("\n")
        moves = [int(line.split()[2]) for line in done if line.startswith("moves ")]
        ran, calls = (int(line.split()[1]) for line in done if line.startswith(("tasks ", "calls ")))
        return moves, ran, calls

    return region


@pytest.mark.parametrize(
    ("threads", "tasks"), [(1, 5), (2, 0), (2, 1), (2, 131), (9, 100), (9, 4), (128, 128), (128, 1000)]
)
def test_every_task_runs_once(run: Run, threads: int, tasks: int) -> None:
    assert run(threads, tasks)[1] == STAGES * tasks


def test_no_line_is_hot(run: Run) -> None:
    tasks = 64 * THREADS // STAGES
    moves, _, _ = run(THREADS, tasks)
    memory_ns = STAGES * tasks * TASK_BYTES / BANDWIDTH_GBPS
    assert max(moves) * TRANSFER_NS <= BUSY * memory_ns, f"{max(moves) / tasks / STAGES:.2f} moves of a line a task"


@pytest.mark.parametrize("threads", [2, 16, 128])
def test_a_region_costs_few_transfers_a_thread(run: Run, threads: int) -> None:
    moves, _, _ = run(threads, 0)
    assert sum(moves) <= 8 * threads + 16


@pytest.mark.parametrize("threads", [2, 16, 128])
def test_the_caller_wakes_one_thread_of_each_group(run: Run, threads: int) -> None:
    """Those wake the others: every one came, or the region would not have ended."""
    assert run(threads, 0)[2] == -(-threads // 16)
