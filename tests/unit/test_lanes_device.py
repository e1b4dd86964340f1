"""The accelerator's queues, and the mathematics of one expert on them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.lanes.device import Device, UnpackedExpert, open_device, run_expert, unpack_expert
from fiddler_runtime.lanes.worker import Worker
from fiddler_runtime.plan import ExpertForm, packed_bytes


@pytest.fixture
def device():
    with open_device("simulated") as opened:
        yield opened


def pack_by_definition(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The packed layout, element by element, as docs/kernels.md words it."""
    intermediate, hidden = gate.shape
    bits = [t.view(torch.int16).numpy() for t in (gate, up, down)]
    packed = np.zeros(packed_bytes(hidden, intermediate) // 2, np.int16)
    pairs, at = -(-hidden // 2), 0
    for block in range(-(-intermediate // 16)):
        for pair in range(pairs):
            for lane in range(32):
                row = 16 * block + lane % 16
                for j in range(2):
                    if row < intermediate and 2 * pair + j < hidden:
                        packed[at] = bits[lane // 16][row, 2 * pair + j]
                    at += 1
    for block in range(-(-hidden // 32)):
        for pair in range(-(-intermediate // 2)):
            for lane in range(32):
                row = 32 * block + lane
                for j in range(2):
                    if row < hidden and 2 * pair + j < intermediate:
                        packed[at] = bits[2][row, 2 * pair + j]
                    at += 1
    assert at == packed.size
    return torch.from_numpy(packed).view(torch.bfloat16)


@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 32), (128, 96), (40, 24), (65, 33), (7, 5), (72, 130)])
def test_unpack_inverts_the_packed_layout(hidden: int, intermediate: int):
    generator = torch.Generator().manual_seed(hidden)
    gate, up = (torch.randn(intermediate, hidden, generator=generator).bfloat16() for _ in range(2))
    down = torch.randn(hidden, intermediate, generator=generator).bfloat16()
    found = unpack_expert(pack_by_definition(gate, up, down), ExpertForm(hidden, intermediate))
    assert torch.equal(found.gate_up, torch.cat([gate, up]))
    assert torch.equal(found.down, down)
    assert found.gate_up.is_contiguous()
    assert found.down.is_contiguous()
    assert found.biases == ()


def test_unpack_refuses_another_shapes_bytes():
    with pytest.raises(ValueError, match="not those of 64 x 64"):
        unpack_expert(torch.zeros(10, dtype=torch.bfloat16), ExpertForm(64, 64))


def test_run_expert_equals_float64_within_bf16_rounding():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 64, generator=generator).bfloat16()
    gate_up = (torch.randn(96, 64, generator=generator) / 8).bfloat16()
    down = (torch.randn(64, 48, generator=generator) / 7).bfloat16()
    rows = torch.tensor([7, 0, 3])
    weights = torch.rand(3, generator=generator)
    out = torch.ones(9, 64)
    run_expert(hidden, rows, weights, UnpackedExpert("silu", gate_up, down), out)
    gate, up = (hidden[rows].double() @ gate_up.double().T).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    expected = torch.ones(9, 64, dtype=torch.float64)
    expected[rows] += weights.double()[:, None] * (inner @ down.double().T)
    # Four bf16 roundings (2^-9 each) of terms no larger than sum |inner| |down|; over 50 seeds at most 0.70 of it.
    bound = 4 * 2.0**-9 * (inner.abs() @ down.double().abs().T) * weights.double()[:, None]
    assert ((out.double() - expected)[rows].abs() <= bound).all()
    untouched = [r for r in range(9) if r not in rows.tolist()]
    assert torch.equal(out[untouched], torch.ones(len(untouched), 64))


def test_submitted_work_runs_in_order_in_one_other_thread(device: Device):
    seen: list[tuple[int, int, int]] = []
    futures = [
        device.submit(lambda i: seen.append((i, threading.get_ident(), torch.get_num_threads())), i) for i in range(5)
    ]
    for future in futures:
        device.join(future)
    assert [i for i, _, _ in seen] == list(range(5))
    assert len({thread for _, thread, _ in seen}) == 1
    assert seen[0][1] != threading.get_ident()
    assert {threads for _, _, threads in seen} == {1}, "the simulated accelerator is one core"


def test_opening_a_simulated_device_leaves_torchs_thread_count_alone():
    before = torch.get_num_threads()
    with open_device("simulated"):
        assert torch.get_num_threads() == before
        inside = Worker("test-other-thread")
        assert inside.submit(torch.get_num_threads).result() == before, "later threads get the process's default too"
        inside.close()


def test_exceptions_reach_whoever_waits(device: Device):
    def fail() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        device.join(device.submit(fail))
    with pytest.raises(KeyError, match="broken"):
        device.join(device.submit(lambda: device.wait(device.on_copy_engine(fail))))
    assert device.join(device.submit(lambda: 3)) == 3, "the queue goes on after an error"


def test_copies_run_beside_computation(device: Device):
    gate = threading.Event()

    def compute(dst: torch.Tensor, src: torch.Tensor) -> float:
        ticket = device.copy(dst, src)
        device.wait(ticket)
        return float(dst.sum())

    blocked = device.on_copy_engine(lambda: None if gate.wait(5) else pytest.fail("the copy engine blocked the caller"))
    started = time.monotonic()
    result = device.submit(compute, torch.zeros(4), torch.ones(4))
    assert time.monotonic() - started < 1
    gate.set()
    assert device.join(result) == 4
    device.submit(device.wait, blocked).result()
    device.synchronize()


def test_no_device_refuses_work():
    with open_device("none") as device, pytest.raises(FiddlerError, match="no accelerator"):
        device.submit(print)


def test_unknown_device_names_the_known_ones():
    with pytest.raises(FiddlerError, match="auto, cuda, simulated or none"):
        open_device("tpu")  # type: ignore[arg-type]


def test_cuda_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without an NVIDIA GPU")
    with pytest.raises(FiddlerError, match="no CUDA device"):
        open_device("cuda")


def test_a_closed_device_refuses_work_and_closes_again():
    device = open_device("simulated")
    device.close()
    device.close()
    with pytest.raises(RuntimeError, match="closed"):
        device.submit(print)


@pytest.mark.slow
def test_an_open_device_does_not_keep_the_process_alive():
    code = "from fiddler_runtime.lanes import device as d; d.open_device('simulated').submit(print, 'ran').result()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ran\n"
    assert done.stderr == ""
