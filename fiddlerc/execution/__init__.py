"""Running a compiled plan: generating text, and comparing that with transformers' own implementation."""

from .compare import BenchRequest, BenchResult, ScenarioResult, bench
from .generate import RunRequest, RunResult, run
from .loading import check_model, read_text
from .packing import PackRequest, PackResult, pack
from .rest import measure_rest

__all__ = [
    "BenchRequest",
    "BenchResult",
    "PackRequest",
    "PackResult",
    "RunRequest",
    "RunResult",
    "ScenarioResult",
    "bench",
    "check_model",
    "measure_rest",
    "pack",
    "read_text",
    "run",
]
