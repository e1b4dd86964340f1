"""Opening a plan together with its model directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddler_runtime
from fiddler_runtime import checkpoint
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import Plan
from fiddler_runtime.preflight import Preflight
from fiddler_runtime.progress import Progress
from fiddler_runtime.strategies import DeviceChoice

OnPreflight = Callable[[Preflight], None]


def check_model(plan: Plan, model_dir: Path) -> None:
    """Raises FiddlerError if the model in the directory (or ONNX file) is not the plan's, or weights are not whole."""
    if model_dir.suffix == ".onnx":
        fiddler_runtime.ExpertWeights.load(model_dir).check(plan.header.model)
        return
    checkpoint.check_identity(plan.header.model, model_dir)
    if checkpoint.has_weights(model_dir) and not plan.header.model.from_onnx:
        fiddler_runtime.ExpertWeights.load(model_dir).check(plan.header.model)


def load_model(
    path: Path,
    model_dir: Path,
    *,
    device: DeviceChoice,
    isa: str | None,
    threads: int | None,
    strategies: tuple[str, ...] | None,
    trust_binaries: bool,
    packed_cache: bool | Path = False,
    capture: bool = False,
    progress: Progress | None = None,
    on_preflight: OnPreflight | None = None,
    experts: Path | None = None,
) -> Any:
    """A transformers model whose experts run through the plan; `.fiddler` is its engine."""
    from fiddler_runtime import hf

    plan = fiddler_runtime.load_plan(path, trust_binaries=trust_binaries)
    return hf.load(
        model_dir,
        plan,
        experts=experts,
        device=device,
        isa=isa,
        threads=threads,
        strategies=strategies,
        packed_cache=packed_cache,
        capture=capture,
        progress=progress,
        on_preflight=on_preflight,
    )


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises FiddlerError if it cannot be read as such."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FiddlerError(
            f"cannot read the text file {path}",
            found=error.strerror,
            expected="a UTF-8 text file",
            hint=f"--text FILE; ls {path.parent}   shows what is there",
        ) from None
    except UnicodeDecodeError:
        raise FiddlerError(
            f"cannot read the text file {path}",
            found="bytes that are not UTF-8",
            expected="a UTF-8 text file",
            hint=f"iconv -f latin1 -t UTF-8 {path} > OTHER_FILE",
        ) from None
