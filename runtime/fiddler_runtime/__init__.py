"""fiddler_runtime: runs plans that fiddlerc compiled.

    import fiddler_runtime
    plan = fiddler_runtime.load_plan("plans/my-plan")
    engine = fiddler_runtime.Engine(plan, fiddler_runtime.ExpertWeights.load("my-model"))
    out = engine.moe(layer, hidden, topk_ids, topk_weights)

`fiddler_runtime.hf.load` gives a whole transformers model. Names are imported when first used: importing the package
itself costs nothing, and embedding needs torch, numpy and safetensors only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hf as hf
    from .engine import Engine as Engine
    from .errors import FiddlerError as FiddlerError
    from .errors import FiddlerWarning as FiddlerWarning
    from .loading import load_plan as load_plan
    from .plan import Plan as Plan
    from .weights import ExpertWeights as ExpertWeights

_HOME = {
    "Engine": "engine",
    "ExpertWeights": "weights",
    "FiddlerError": "errors",
    "FiddlerWarning": "errors",
    "Plan": "plan",
    "load_plan": "loading",
}
__all__ = ["Engine", "ExpertWeights", "FiddlerError", "FiddlerWarning", "Plan", "hf", "load_plan"]


def __getattr__(name: str) -> Any:
    if name == "hf":
        return import_module(".hf", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
