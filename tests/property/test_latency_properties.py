"""What holds for the latency model of any samples, however odd."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler_runtime import strict
from fiddlerc import latency
from fiddlerc.ir import Accelerator, Calibration, ExpertTensors, Limits, Machine, ModelSpec, Sample

POSITIVE = st.floats(min_value=0.01, max_value=1e7)
RATES = st.floats(min_value=0.1, max_value=1e6)


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    """Any limits, and samples of any times at four to nine sizes, of one or two shapes."""
    samples: list[Sample] = []
    shapes = draw(st.lists(st.sampled_from([(64, 32), (128, 256), (2048, 768)]), min_size=1, max_size=2, unique=True))
    for hidden, intermediate in shapes:
        for quantity in ("cpu_expert", "gpu_expert"):
            for tokens in draw(st.lists(st.integers(1, 2048), min_size=4, max_size=9, unique=True)):
                shape = (hidden, intermediate, tokens, 6 * hidden * intermediate)
                samples.append(Sample(quantity, *shape, 1, "avx2", draw(POSITIVE), 0.0, 3, "fast"))  # type: ignore[arg-type]
    for nbytes in draw(st.lists(st.integers(1, 1 << 30), min_size=4, max_size=6, unique=True)):
        samples.append(Sample("host_to_device", 0, 0, 0, nbytes, 1, "", draw(POSITIVE), 0.0, 3, "fast"))
    rates = [draw(RATES) for _ in range(6)]
    entries = [draw(st.floats(0, 1e4)) for _ in range(2)]
    limits = Limits(1, rates[0], 0.0, 0.0, *rates[1:], *entries)
    machine = Machine("c", 1, ("scalar",), 0, 0, 0, 1, 1 << 30, Accelerator("simulated", "s", 1 << 28, ""))
    return Calibration("fiddlerc-hw/2", "any", "measured", "any", machine, limits, tuple(samples), ())


def spec() -> ModelSpec:
    names = ExpertTensors("g", "u", "d")
    return ModelSpec("m", "A", 1, (0,), 8, 2, 128, 256, "silu", False, 10, 10, names, {}, 1, 1, 1)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(calibrations())
def test_curves_are_positive_and_monotone_and_the_same_each_time(calibration: Calibration) -> None:
    model = latency.fit(calibration, spec())
    for curve in (*model.cpu_us, model.gpu_us, model.rest_us):
        assert curve[0] == 0 and (curve[1:] > 0).all()
        assert np.isfinite(curve).all() and (np.diff(curve) >= 0).all()
    assert model.stream_us > 0 and model.contention >= 0
    for summary in model.curves:
        assert summary.model in summary.candidates or summary.samples == 0
        assert 0 < summary.interval_low <= summary.interval_high
        assert 0 <= summary.heldout_median_error <= summary.heldout_max_error
    again = latency.fit(calibration, spec())
    assert strict.dump(again.curves) == strict.dump(model.curves)
    assert (again.cpu_us == model.cpu_us).all() and (again.gpu_us == model.gpu_us).all()
