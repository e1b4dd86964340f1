"""The rest of a step: which steps are timed, and that no expert runs in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runtime_samples import write_sample_plan

from fiddler_runtime.engine import Engine
from fiddlerc import frontend
from fiddlerc.execution import measure_rest

MODEL = Path(__file__).parents[2] / "examples" / "tiny-mixtral"


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", ["simulated", "none"])
def test_steps_without_experts(accelerator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = []
    close = Engine.close

    def counted(engine: Engine) -> None:
        counters.append(engine.counters())
        close(engine)

    monkeypatch.setattr(Engine, "close", counted)
    spec = frontend.load_model(str(MODEL))
    resident = None if accelerator == "simulated" else np.zeros((6, 8), np.bool_)
    plan = write_sample_plan(tmp_path / "plan", spec, resident=resident, accelerator=accelerator)  # type: ignore[arg-type]
    samples = measure_rest(plan, MODEL)
    # The sample plan is for a context of 128: no longer prompts, no longer caches.
    assert [(s.tokens, s.sequences, s.context) for s in samples] == [
        (1, 1, 28), (4, 4, 76), (16, 1, 0), (32, 1, 0), (64, 1, 0),
    ]  # fmt: skip
    assert all(s.median_us > 0 and s.repeats >= 5 and s.model_fingerprint == spec.fingerprint for s in samples)
    assert counters[0]["layers"] > 0
    assert sum(counters[0]["expert_calls"].values()) > 0, "experts run, and their time is subtracted"
