"""What refuses a plan on a machine, what only warns, and the words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_samples import sample_header, sample_machine

from fiddler_runtime import compat
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import Accelerator, Machine
from fiddler_runtime.plan import ABI_VERSION, HardwareSummary, Header, MemoryItem, Options

GPU = Accelerator("cuda", "Made-up GPU", 24 << 30, "600.1, CUDA 13.0")


def header_for(machine: Machine, provenance: str = "measured") -> Header:
    summary = HardwareSummary("made-up", provenance, "tests", machine)  # type: ignore[arg-type]
    return sample_header(hardware=summary)


def test_the_machine_it_was_compiled_for() -> None:
    assert compat.check(sample_header(), sample_machine()) == ()


def test_no_kernel_for_this_cpu() -> None:
    old = sample_machine(cpu="Old CPU", isa=("scalar",))
    with pytest.raises(FiddlerError) as raised:
        compat.check(sample_header(), old)
    error = raised.value
    assert error.what == "no kernel of the plan runs on this CPU"
    assert error.found == "Old CPU, which runs scalar"
    assert error.expected == "one of avx512_bf16, avx2 (avx2 needs avx2, fma of the CPU and the operating system)"
    assert error.hint == "compile it for this CPU: fiddlerc compile ... --isa scalar"


def test_a_lesser_kernel_runs_and_says_so() -> None:
    (warning,) = compat.check(sample_header(), sample_machine(isa=("avx2", "scalar")))
    assert warning.startswith("compiled for avx512_bf16 kernels, running avx2: no avx512_bf16 here")


def test_another_abi() -> None:
    with pytest.raises(FiddlerError, match="another interface"):
        compat.check(sample_header(abi=ABI_VERSION + 1), sample_machine())


MEND = "decisions may be off; hint: fiddlerc calibrate -o hw.json, then compile again with --hw hw.json"


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (sample_machine(cpu="Other CPU"), "CPU Made-up CPU, here Other CPU"),
        (sample_machine(cores=2), "8 cores, here 2"),
        (sample_machine(memory_bytes=8 << 30), "64.0 GiB of memory, here 8.0 GiB"),
        (sample_machine(accelerator=GPU), "a simulated accelerator, here is the GPU Made-up GPU"),
        (sample_machine(accelerator=replace(GPU, kind="none")), "a simulated accelerator, here is no accelerator"),
        (sample_machine(cpu="Other CPU", cores=2), "CPU Made-up CPU, here Other CPU; 8 cores, here 2"),
    ],
)
def test_differences_that_make_latencies_stale(here: Machine, words: str) -> None:
    assert compat.check(sample_header(), here) == (f"compiled for another machine: {words}; {MEND}",)


def test_another_gpu_and_another_driver() -> None:
    planned = header_for(sample_machine(accelerator=GPU))
    (warning,) = compat.check(planned, sample_machine(accelerator=replace(GPU, name="Other GPU")))
    assert "the GPU Made-up GPU, here is the GPU Other GPU" in warning
    (warning,) = compat.check(planned, sample_machine(accelerator=replace(GPU, driver="601")))
    assert "driver 600.1, CUDA 13.0, here 601" in warning


def test_latencies_that_nobody_measured() -> None:
    assert compat.check(header_for(sample_machine(), "data sheet"), sample_machine()) == (
        f"latencies come from a data sheet, not from a measurement; {MEND}",
    )


def test_memory_that_differs_a_little_is_the_same_machine() -> None:
    assert compat.check(sample_header(), sample_machine(memory_bytes=62 << 30)) == ()


def test_a_gpu_too_small_for_the_plan() -> None:
    big = replace(
        header_for(sample_machine(accelerator=GPU)),
        memory=(MemoryItem("non-expert weights", 20 << 30),),
        options=Options("decode", 128, 1, 24 << 30),
    )
    small = sample_machine(accelerator=replace(GPU, name="Small GPU", memory_bytes=8 << 30))
    (told,) = (message for message in compat.check(big, small) if "popular" in message)
    assert "Small GPU has 8.0 GiB: the least popular resident experts will be given up" in told
    assert told.endswith("hint: fiddlerc compile ... --gpu-memory 8192MiB")
    # Without a GPU the plan runs on the CPU and fills no GPU memory.
    assert compat.check(big, sample_machine())
