"""Running a compiled plan: generating text, and comparing that with transformers' own implementation."""

from .compare import BenchRequest, BenchResult, ScenarioResult, bench
from .generate import RunRequest, RunResult, run
from .loading import check_model, read_text

__all__ = [
    "BenchRequest",
    "BenchResult",
    "RunRequest",
    "RunResult",
    "ScenarioResult",
    "bench",
    "check_model",
    "read_text",
    "run",
]
