"""`fiddlerc run`: text through a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.progress import Progress
from fiddler_runtime.strategies import DeviceChoice

from .clock import StepClock, Timing
from .loading import OnPreflight, load_model


@dataclass(frozen=True)
class RunRequest:
    """What `fiddlerc run` was asked. temperature 0 is greedy; experts: an ONNX file to take them from."""

    model_dir: Path
    prompt: str
    experts: Path | None = None
    max_new_tokens: int = 64
    beams: int = 1
    temperature: float = 0.0
    seed: int = 0
    device: DeviceChoice = "auto"
    isa: str | None = None
    threads: int | None = None
    strategies: tuple[str, ...] | None = None
    trust_binaries: bool = False
    packed_cache: bool | Path = False
    capture: bool = False


@dataclass(frozen=True)
class RunResult:
    """The generated continuation, its timing, what each strategy did, and what ran it.

    captured  decode steps that were captured, replayed, and run as ever; None unless it was asked for
    """

    text: str
    timing: Timing
    counters: dict[str, Any]
    engine: dict[str, Any]
    captured: dict[str, int] | None


def run(
    plan: Path,
    request: RunRequest,
    *,
    on_text: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    on_preflight: OnPreflight | None = None,
) -> RunResult:
    """Generates once. `on_text` receives the continuation piece by piece (not with beams, whose text is only final)."""
    import torch

    from fiddler_runtime import hf

    transformers = hf.import_transformers()
    if on_text is not None and request.beams > 1:
        raise FiddlerError(
            "beams cannot be streamed: the best one is known only at the end",
            found=f"--stream with --beams {request.beams}",
            hint="leave out --stream",
        )
    tokenizer = hf.load_tokenizer(request.model_dir)
    inputs = tokenizer(request.prompt, return_tensors="pt", return_token_type_ids=False)
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise FiddlerError("the prompt is empty", found="no tokens", hint="--prompt 'Some text'")
    model = load_model(
        plan,
        request.model_dir,
        device=request.device,
        isa=request.isa,
        threads=request.threads,
        strategies=request.strategies,
        trust_binaries=request.trust_binaries,
        packed_cache=request.packed_cache,
        capture=request.capture,
        progress=progress,
        experts=request.experts,
        on_preflight=on_preflight,
    )
    try:
        limit = model.config.max_position_embeddings
        if prompt_tokens + request.max_new_tokens > limit:
            raise FiddlerError(
                "prompt and answer do not fit the model's context",
                found=f"{prompt_tokens} + {request.max_new_tokens} tokens",
                expected=f"at most {limit}",
                hint=f"--max-new-tokens {max(1, limit - prompt_tokens)}",
            )
        if request.temperature > 0:
            transformers.set_seed(request.seed)
        clock = StepClock()
        with torch.inference_mode():
            output = model.generate(
                **inputs.to(model.device),
                max_new_tokens=request.max_new_tokens,
                num_beams=request.beams,
                do_sample=request.temperature > 0,
                temperature=request.temperature or None,
                pad_token_id=_pad_token(tokenizer),
                logits_processor=[clock],
                streamer=None if on_text is None else _streamer(tokenizer, on_text),
            )
        timing = clock.timing(prompt_tokens)
        text = tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
        captured = None if model.captured is None else dict(model.captured.steps)
        return RunResult(text, timing, model.fiddler.counters(), model.fiddler.describe(), captured)
    finally:
        model.fiddler.close()


def _pad_token(tokenizer: Any) -> int:
    """transformers warns without one; for a single unpadded prompt any id will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
