"""Latency fits of made-up machines whose law is known, and of machines that only have limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import packed_bytes
from fiddlerc import latency
from fiddlerc.hardware import catalog_names, load_hardware
from fiddlerc.ir import Accelerator, Calibration, ExpertTensors, Limits, Machine, ModelSpec, Sample, StepSample
from fiddlerc.latency.heldout import folds
from fiddlerc.latency.model import MAX_TOKENS, NEVER_US, token_grid
from fiddlerc.latency.rest import fit_rest

pytestmark = pytest.mark.slow

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SHAPE = (2048, 768)
LIMITS = Limits(
    cpu_threads=2,
    cpu_read_gbps=40.0,
    cpu_read_slow_gbps=0.0,
    cpu_slow_share=0.0,
    cpu_peak_gflops=400.0,
    gpu_read_gbps=1000.0,
    gpu_peak_gflops=100000.0,
    host_to_device_gbps=20.0,
    device_to_host_gbps=20.0,
    cpu_entry_us=5.0,
    gpu_entry_us=20.0,
)
Law = Callable[[int, int, int], float]


def spec(hidden: int = SHAPE[0], intermediate: int = SHAPE[1]) -> ModelSpec:
    return ModelSpec(
        name="m",
        architecture="A",
        num_layers=1,
        moe_layers=(0,),
        num_experts=8,
        top_k=2,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation="silu",
        expert_bias=False,
        vocab_size=10,
        max_context=10,
        expert_tensors=ExpertTensors("g", "u", "d"),
        identity={},
        non_expert_bytes=1,
        kv_bytes_per_token=1,
        workspace_bytes_per_token=1,
    )


def bound(hidden: int, intermediate: int, tokens: int, gbps: float, gflops: float) -> tuple[float, float]:
    """(microseconds of reading, microseconds of arithmetic) of an expert."""
    weights = 3 * hidden * intermediate
    return 2 * weights / (gbps * 1e3), 2 * weights * tokens / (gflops * 1e3)


def cpu_law(hidden: int, intermediate: int, tokens: int) -> float:
    read, compute = bound(hidden, intermediate, tokens, 40.0, 400.0)
    return max(1.05 * read, 1.15 * compute)


def gpu_law(hidden: int, intermediate: int, tokens: int) -> float:
    read, compute = bound(hidden, intermediate, tokens, 1000.0, 100000.0)
    return 25.0 + max(read, 2.0 * compute)


def calibration(
    *,
    shapes: tuple[tuple[int, int], ...] = (SHAPE,),
    tokens: tuple[int, ...] = TOKENS,
    cpu: Law = cpu_law,
    gpu: Law = gpu_law,
    noise: float = 0.0,
    contention: float = 0.25,
    accelerator: bool = True,
) -> Calibration:
    random = np.random.default_rng(7)

    def sample(quantity: str, shape: tuple[int, int], n: int, nbytes: int, us: float) -> Sample:
        noisy = us * float(np.exp(noise * random.standard_normal()))
        return Sample(quantity, *shape, n, nbytes, 2, "avx2", noisy, 0.0, 5, "fast")  # type: ignore[arg-type]

    samples = []
    for shape in shapes:
        for n in tokens:
            nbytes = packed_bytes(*shape)
            samples.append(sample("cpu_expert", shape, n, nbytes, LIMITS.cpu_entry_us + cpu(*shape, n)))
            if accelerator:
                samples.append(sample("gpu_expert", shape, n, nbytes, gpu(*shape, n)))
        for n in tokens[:3] if accelerator else ():
            us = (LIMITS.cpu_entry_us + cpu(*shape, n)) * (1 + contention)
            samples.append(sample("cpu_expert_while_copying", shape, n, packed_bytes(*shape), us))
    if accelerator:
        for power in range(16, 28, 2):
            samples.append(sample("host_to_device", (0, 0), 0, 1 << power, 8.0 + (1 << power) / 20e3))
    kind = Accelerator("cuda", "g", 1 << 34, "") if accelerator else Accelerator("none", "none", 0, "")
    machine = Machine("c", 2, ("avx2", "scalar"), 1, 1, 1, 1, 1 << 34, kind)
    limits = LIMITS
    if not accelerator:
        limits = replace(
            LIMITS,
            gpu_read_gbps=0.0,
            gpu_peak_gflops=0.0,
            host_to_device_gbps=0.0,
            device_to_host_gbps=0.0,
            gpu_entry_us=0.0,
        )
    return Calibration("fiddlerc-hw/2", "made up", "measured", "a law", machine, limits, tuple(samples), ())


def expected(law: Law, shape: tuple[int, int], tokens: np.ndarray) -> np.ndarray:
    return np.array([law(*shape, int(n)) for n in tokens[1:]])


def relative(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.abs(found[1:] / wanted - 1)


def test_grid() -> None:
    grid = token_grid()
    assert grid.dtype == np.int32 and list(grid[:65]) == list(range(65))
    assert grid[-1] == MAX_TOKENS and (np.diff(grid) > 0).all()
    assert (grid[65:] / grid[64:-1] < 1.1).all()


def test_a_law_without_noise_is_recovered_far_beyond_the_samples() -> None:
    model = latency.fit(calibration(), spec())
    assert relative(model.cpu_us[0], expected(cpu_law, SHAPE, model.tokens)).max() < 0.05
    assert relative(model.gpu_us, expected(gpu_law, SHAPE, model.tokens)).max() < 0.10
    assert model.stream_us == pytest.approx(8.0 + packed_bytes(*SHAPE) / 20e3, rel=1e-3)
    assert model.contention == pytest.approx(0.25, abs=1e-3)
    assert (model.cpu_overhead_us, model.gpu_overhead_us) == (5.0, 20.0)


def test_noise_of_five_percent_is_averaged_and_reported() -> None:
    model = latency.fit(calibration(noise=0.05), spec())
    measured = model.tokens <= max(TOKENS)
    wanted = np.concatenate([[0.0], expected(cpu_law, SHAPE, model.tokens)])
    assert relative(model.cpu_us[0][measured], wanted[measured][1:]).max() < 0.12
    cpu, gpu, copy, _ = model.curves
    assert (cpu.quantity, gpu.quantity, copy.quantity) == ("cpu_expert", "gpu_expert", "host_to_device")
    for curve in (cpu, gpu, copy):
        assert curve.interval_low < 1 < curve.interval_high < 1.3
        assert 0.005 < curve.heldout_median_error < 0.10
        assert curve.heldout_median_error <= curve.heldout_max_error
        assert curve.interpolated and curve.formula
        assert curve.candidates[curve.model] <= 1.3 * min(curve.candidates.values())
    assert cpu.samples == len(TOKENS)


def test_fiddlers_models_are_among_the_candidates_and_win_where_they_are_right() -> None:
    law = calibration(cpu=lambda h, i, n: 100.0 + 3.0 * n, gpu=lambda h, i, n: 70.0)
    cpu, gpu, *_ = latency.fit(law, spec()).curves
    assert (cpu.model, cpu.candidates["linear"]) == ("linear", 0.0)
    assert (gpu.model, gpu.candidates["constant"]) == ("constant", 0.0)
    assert gpu.formula == "70 us"


def test_fiddlers_models_lose_on_a_roofline() -> None:
    cpu = latency.fit(calibration(noise=0.02), spec()).curves[0]
    assert cpu.candidates["constant"] > 5 * cpu.candidates[cpu.model]
    assert cpu.candidates["linear"] > 2 * cpu.candidates[cpu.model]


def test_steps_at_the_token_tile_are_found() -> None:
    def stepped(hidden: int, intermediate: int, tokens: int) -> float:
        read, _ = bound(hidden, intermediate, tokens, 40.0, 400.0)
        return read * (0.8 + 0.3 * -(-tokens // 6))

    model = latency.fit(calibration(cpu=stepped), spec())
    assert model.curves[0].model == "roofline sum with token tiles"
    assert relative(model.cpu_us[0], expected(stepped, SHAPE, model.tokens)).max() < 0.02


def test_a_shape_that_was_not_measured_is_extrapolated_and_says_so() -> None:
    known = calibration(shapes=((4096, 14336), (1024, 512)))
    model = latency.fit(known, spec())
    assert [curve.interpolated for curve in model.curves] == [False, False, True, False]
    assert relative(model.cpu_us[0], expected(cpu_law, SHAPE, model.tokens)).max() < 0.10
    assert "piecewise linear" not in model.curves[0].candidates


def test_one_other_shape_is_enough_to_extrapolate_from() -> None:
    model = latency.fit(calibration(shapes=((4096, 14336),)), spec())
    assert relative(model.cpu_us[0], expected(cpu_law, SHAPE, model.tokens)).max() < 0.10
    assert not model.curves[0].interpolated


def test_samples_of_the_models_own_shape_come_first() -> None:
    slow = calibration(shapes=((4096, 14336),), cpu=lambda h, i, n: 50 * cpu_law(h, i, n))
    own = calibration()
    both = replace(own, samples=own.samples + slow.samples)
    assert (latency.fit(both, spec()).cpu_us == latency.fit(own, spec()).cpu_us).all()


def test_a_machine_without_an_accelerator_never_streams() -> None:
    model = latency.fit(calibration(accelerator=False), spec())
    assert model.stream_us == NEVER_US and np.isfinite(np.float32(model.stream_us))
    assert not model.gpu_us.any() and model.contention == 0
    assert [curve.quantity for curve in model.curves] == ["cpu_expert", "rest_of_step"]


def test_two_regimes_of_the_memory_are_two_curves() -> None:
    """Half the bandwidth where memory is the limit, the same peak where arithmetic is; not their mean."""

    def slow_law(hidden: int, intermediate: int, tokens: int) -> float:
        read, compute = bound(hidden, intermediate, tokens, 20.0, 400.0)
        return max(1.05 * read, 1.15 * compute)

    fast = calibration()
    slow = calibration(cpu=slow_law)
    limits = replace(LIMITS, cpu_read_slow_gbps=20.0, cpu_slow_share=0.7)
    others = tuple(replace(s, regime="slow") for s in slow.samples if s.quantity == "cpu_expert")
    for seen in (others, others[:3]):  # also where too little was seen of one: then its bandwidth tells
        model = latency.fit(replace(fast, limits=limits, samples=fast.samples + seen), spec())
        assert model.regime_shares.tolist() == [0.3, 0.7]
        assert relative(model.cpu_us[0], expected(cpu_law, SHAPE, model.tokens)).max() < 0.06
        assert relative(model.cpu_us[1], expected(slow_law, SHAPE, model.tokens)).max() < 0.06
        assert (model.prevailing_us == model.cpu_us[1]).all()


def test_a_shape_that_never_was_in_the_slow_regime_has_one_curve() -> None:
    limits = replace(LIMITS, cpu_read_slow_gbps=20.0, cpu_slow_share=0.7)
    model = latency.fit(replace(calibration(), limits=limits), spec())
    assert model.regime_shares.tolist() == [1.0]
    assert relative(model.cpu_us[0], expected(cpu_law, SHAPE, model.tokens)).max() < 0.06


def test_a_simulated_accelerator_is_described_in_the_regime_seen_more() -> None:
    def slow_law(hidden: int, intermediate: int, tokens: int) -> float:
        return 2 * gpu_law(hidden, intermediate, tokens)

    slow = tuple(replace(s, regime="slow") for s in calibration(cpu=lambda *of: 2 * cpu_law(*of), gpu=slow_law).samples)
    for share, law in ((0.7, slow_law), (0.3, gpu_law)):
        limits = replace(LIMITS, cpu_read_slow_gbps=20.0, cpu_slow_share=share)
        model = latency.fit(replace(calibration(), limits=limits, samples=calibration().samples + slow), spec())
        assert relative(model.gpu_us, expected(law, SHAPE, model.tokens)).max() < 0.06


def rest_steps(law: Callable[[int, int], float], **model: int) -> tuple[StepSample, ...]:
    points = [(1, 1, 28), (1, 1, 140), (1, 1, 524), (4, 4, 76), *((n, 1, 0) for n in (16, 32, 64, 128, 256, 512))]
    fields = {"num_layers": 1, "non_expert_bytes": 1, "kv_bytes_per_token": 1} | model
    return tuple(
        StepSample("m", spec().fingerprint, tokens=n, sequences=s, context=c, median_us=law(n, s * c), spread_us=0.0,
                   repeats=5, **fields)  # type: ignore[arg-type]
        for n, s, c in points
    )  # fmt: skip


def test_the_rest_of_a_step_of_the_model_itself() -> None:
    steps = rest_steps(lambda n, kv: 3000.0 + 12.0 * n + 0.5 * kv)
    model = latency.fit(replace(calibration(), steps=steps), spec())
    assert model.rest_kv_us == pytest.approx(0.5, rel=1e-6)
    np.testing.assert_allclose(model.rest_us[1:], 3000.0 + 12.0 * model.tokens[1:], rtol=0.02)
    rest = model.curves[-1]
    assert (rest.quantity, rest.interpolated, rest.samples) == ("rest_of_step", True, 10)
    assert rest.heldout_median_error < 0.02


def test_the_rest_of_another_model_goes_by_layers_bytes_and_operations() -> None:
    def law(layers: int, nbytes: int, n: int) -> float:
        return 500.0 * layers + nbytes / 40e3 + 1.5 * nbytes * n / 400e3

    steps = tuple(
        replace(step, model_fingerprint="another")
        for layers, nbytes in ((6, 10**7), (16, 10**8))
        for step in rest_steps(
            lambda n, kv, layers=layers, nbytes=nbytes: law(layers, nbytes, n) + 0.02 * kv,  # type: ignore[misc]
            num_layers=layers,
            non_expert_bytes=nbytes,
            kv_bytes_per_token=1000,
        )
    )
    wanted = replace(spec(), num_layers=32, non_expert_bytes=10**9, kv_bytes_per_token=4000)
    model = latency.fit(replace(calibration(accelerator=False), steps=steps), wanted)
    grid = model.tokens[1:]
    np.testing.assert_allclose(model.rest_us[1:], [law(32, 10**9, int(n)) for n in grid], rtol=0.02)
    assert model.rest_kv_us == pytest.approx(0.08, rel=0.05)
    assert not model.curves[-1].interpolated


def test_a_cached_token_of_models_that_take_longer_with_less_in_the_cache() -> None:
    """One line through the steps of both would fall."""
    steps = (
        *(replace(step, model_fingerprint="slow") for step in rest_steps(lambda n, kv: 20e3 + n + 0.5 * kv)),
        *(
            replace(step, model_fingerprint="fast", context=step.context + 4000, median_us=step.median_us + 2000)
            for step in rest_steps(lambda n, kv: 1e3 + n + 0.5 * kv)
        ),
    )
    wanted = replace(spec(), kv_bytes_per_token=3)
    assert latency.fit(replace(calibration(), steps=steps), wanted).rest_kv_us == pytest.approx(1.5, rel=1e-3)


def test_errors_of_predicting_other_shapes() -> None:
    shapes = ((4096, 14336), (2048, 768), (2048, 1024), (4096, 6400))
    known = calibration(shapes=shapes, noise=0.03)
    errors = latency.transfer_errors(known, shapes[:2], shapes[2:])
    assert set(errors) == {("cpu_expert", *shape) for shape in shapes[2:]} | {("gpu_expert", *s) for s in shapes[2:]}
    for median, worst in errors.values():
        assert 0 < median < 0.06 and median <= worst


def test_a_slow_down_below_zero_counts_as_none() -> None:
    assert latency.fit(calibration(contention=-0.2), spec()).contention == 0


@pytest.mark.parametrize("quantity", ["cpu_expert", "gpu_expert", "host_to_device"])
def test_too_few_samples_are_refused(quantity: str) -> None:
    full = calibration()
    kept = [s for s in full.samples if s.quantity != quantity] + [s for s in full.samples if s.quantity == quantity][:3]
    with pytest.raises(FiddlerError, match=f"too few {quantity} samples") as caught:
        latency.fit(replace(full, samples=tuple(kept)), spec())
    assert caught.value.hint is not None and "fiddlerc calibrate" in caught.value.hint


@pytest.mark.parametrize("name", catalog_names())
def test_a_data_sheet_gives_the_roofline_of_its_limits(name: str) -> None:
    sheet = replace(load_hardware(name), samples=(), steps=())
    model = latency.fit(sheet, spec(4096, 14336))
    for curve in model.curves:
        assert curve.model == "roofline of the limits"
        assert (curve.samples, curve.heldout_median_error, curve.heldout_max_error) == (0, 0.0, 0.0)
        assert not curve.interpolated and curve.candidates == {}
    nbytes = 3 * 4096 * 14336 * 2
    assert model.cpu_us[0][1] == pytest.approx(nbytes / (0.8e3 * sheet.limits.cpu_read_gbps), rel=1e-3)
    assert model.cpu_us[0][-1] == pytest.approx(nbytes * MAX_TOKENS / (0.6e3 * sheet.limits.cpu_peak_gflops), rel=1e-3)
    assert model.stream_us == pytest.approx(nbytes / (0.8e3 * sheet.limits.host_to_device_gbps), rel=1e-3)
    assert 0 < model.contention <= 1


def test_biases_are_copied_too() -> None:
    """An fp32 for each lane of each block: 8 gate/up blocks and 4 down blocks of 32 lanes."""
    sheet = replace(load_hardware("a100"), samples=(), steps=())
    without = spec(128, 128)
    more = latency.fit(sheet, replace(without, expert_bias=True)).stream_us / latency.fit(sheet, without).stream_us
    assert more == pytest.approx(1 + 12 * 32 * 4 / (3 * 128 * 128 * 2), rel=1e-4)
    measured = latency.fit(calibration(shapes=((128, 128),)), replace(without, expert_bias=True))
    assert measured.stream_us == pytest.approx(8.0 + packed_bytes(128, 128, True) / 20e3, rel=1e-3)


def test_data_sheet_copies_agree_with_the_published_ones() -> None:
    # 13.98 ms over PCIe 4.0 and 26.7 ms over PCIe 3.0 for one Mixtral expert (arXiv 2509.23638).
    mixtral = spec(4096, 14336)
    assert latency.fit(load_hardware("a100"), mixtral).stream_us == pytest.approx(13980, rel=0.01)
    assert latency.fit(load_hardware("fiddler-env1"), mixtral).stream_us == pytest.approx(26700, rel=0.06)


def test_a_gpus_step_is_no_shorter_than_launching_it_takes() -> None:
    """Twenty operations a layer: of 5 us each, or of what giving its queue one was measured to take."""
    sheet, tokens = replace(load_hardware("a100"), samples=(), steps=()), np.array([1], np.int32)
    small = spec(64, 64)
    launch = Sample("launch", 0, 0, 0, 4, 1, "", 12.5, 0.1, 100, "fast")
    for samples, operation_us in (((), 5.0), ((launch,), 12.5)):
        rest = fit_rest(replace(sheet, samples=samples), small, tokens)
        assert rest.us[0] == 20 * operation_us * small.num_layers


def test_every_size_is_held_out_once() -> None:
    sizes = np.array([1.0, 1.0, 2.0, 4.0, 8.0, 16.0])
    masks = list(folds(sizes))
    assert (np.sum(masks, axis=0) == 1).all()
    assert list(masks[-1]) == [False] * 4 + [True] * 2
