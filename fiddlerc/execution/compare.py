"""`fiddlerc bench`: a plan against transformers' own implementation, interleaved in one process."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fiddler_runtime.checkpoint import Checkpoint
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.machine import Machine, this_machine
from fiddler_runtime.preflight import Need, Preflight
from fiddler_runtime.progress import Progress
from fiddler_runtime.strategies import DeviceChoice

from .clock import StepClock
from .loading import OnPreflight, load_model, read_text

SCENARIOS = ("decode", "prefill", "beam")
OUR_TEXT = Path(__file__).with_name("text.txt")


@dataclass(frozen=True)
class BenchRequest:
    """What `fiddlerc bench` was asked. Prompts are cut from real text, so that routing is real: `text`, or our own."""

    model_dir: Path
    text: Path | None = None
    prompt_tokens: int = 32
    new_tokens: int = 64
    prefill_tokens: int = 512
    beams: int = 4
    rounds: int = 5
    scenarios: tuple[str, ...] = SCENARIOS
    device: DeviceChoice = "auto"
    isa: str | None = None
    threads: int | None = None
    trust_binaries: bool = False
    packed_cache: bool | Path = False
    capture: bool = False


@dataclass(frozen=True)
class ScenarioResult:
    """One scenario. The unit is tokens/s: decoded ones for decode and beam, prompt ones for prefill.

    ratio_* is ours over transformers', taken round by round: median, and the lowest and highest round.
    """

    name: str
    setting: str
    ours_tokens_per_s: float
    transformers_tokens_per_s: float
    ratio_median: float
    ratio_low: float
    ratio_high: float
    expert_calls: dict[str, int]


@dataclass(frozen=True)
class BenchResult:
    """All scenarios on this machine."""

    plan: str
    machine: Machine
    engine: dict[str, Any]
    rounds: int
    scenarios: tuple[ScenarioResult, ...]


def bench(
    plan: Path,
    request: BenchRequest,
    *,
    progress: Progress | None = None,
    on_preflight: OnPreflight | None = None,
) -> BenchResult:
    """Times both models on the same prompts, in turn, `rounds` times after one warm-up each.

    Both get this machine's usable cores: ours through its lanes, transformers through torch's threads; the other model
    is idle meanwhile. Raises FiddlerError if the text is too short for the prompts asked for.
    """
    from fiddler_runtime import hf

    transformers = hf.import_transformers()
    for name in request.scenarios:
        if name not in SCENARIOS:
            raise FiddlerError(
                "unknown scenario",
                found=repr(name),
                expected="one or more of " + ", ".join(SCENARIOS),
                hint="--scenarios " + ",".join(SCENARIOS),
            )
    tokenizer = hf.load_tokenizer(request.model_dir)
    ids = tokenizer(read_text(request.text or OUR_TEXT), return_tensors="pt")["input_ids"]
    longest = max(request.prompt_tokens, request.prefill_tokens if "prefill" in request.scenarios else 0)
    if ids.shape[1] < longest:
        raise FiddlerError(
            "the text is too short for the prompts",
            found=f"{ids.shape[1]} tokens",
            expected=f"at least {longest}",
            hint="--text LONGER_FILE, or a smaller --prefill-tokens",
        )

    def check(needs: Preflight) -> None:
        theirs = sum(tensor.nbytes for tensor in Checkpoint.open(request.model_dir).tensors.values())
        both = replace(needs, needs=(*needs.needs, Need("host memory", "transformers' own model", theirs)))
        if on_preflight is not None:
            on_preflight(both)
        both.check()

    ours = load_model(
        plan,
        request.model_dir,
        device=request.device,
        isa=request.isa,
        threads=request.threads,
        strategies=None,
        trust_binaries=request.trust_binaries,
        packed_cache=request.packed_cache,
        capture=request.capture,
        progress=progress,
        on_preflight=check,
    )
    try:
        with hf.silenced(transformers):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                request.model_dir, dtype=ours.dtype, local_files_only=True
            ).eval()
        results = []
        for index, name in enumerate(request.scenarios):
            results.append(_scenario(name, request, ours, theirs, ids))
            if progress is not None:
                progress("benchmarking", index + 1, len(request.scenarios))
        return BenchResult(str(plan), this_machine(), ours.fiddler.describe(), request.rounds, tuple(results))
    finally:
        ours.fiddler.close()


def _scenario(name: str, request: BenchRequest, ours: Any, theirs: Any, ids: Any) -> ScenarioResult:
    prompt, new, beams, setting = {
        "decode": (
            request.prompt_tokens,
            request.new_tokens,
            1,
            f"batch 1, {request.prompt_tokens} prompt + {request.new_tokens} new tokens",
        ),
        "prefill": (request.prefill_tokens, 1, 1, f"{request.prefill_tokens} prompt tokens"),
        "beam": (
            request.prompt_tokens,
            request.new_tokens,
            request.beams,
            f"{request.beams} beams, {request.prompt_tokens} prompt + {request.new_tokens} new tokens",
        ),
    }[name]

    def rate(model: Any) -> float:
        timing = timed(model, ids[:, :prompt].to(model.device), new, beams).timing(prompt)
        return timing.prompt_tokens / timing.ttft_s if name == "prefill" else timing.decode_tokens_per_s

    rate(ours)
    rate(theirs)
    ours.fiddler.reset_counters()
    pairs = [(rate(ours), rate(theirs)) for _ in range(request.rounds)]
    ratios = [a / b for a, b in pairs]
    calls = ours.fiddler.counters()["expert_calls"]
    return ScenarioResult(
        name,
        setting,
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        {strategy: int(count) for strategy, count in calls.items()},
    )


def timed(model: Any, inputs: Any, new_tokens: int, beams: int) -> StepClock:
    """One generation of exactly that many tokens: the clock of its steps."""
    import torch

    clock = StepClock()
    with torch.inference_mode():
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,  # the same work for both, whatever they would say
            num_beams=beams,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[clock],
        )
    return clock
