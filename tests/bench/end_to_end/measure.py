"""One strategy's generations, timed token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from fiddler_runtime import hf
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import ModelSpec

from .configurations import Configuration
from .replay import Replay, Routed, drawn

CHECK_TOKENS = 24
_CHECK_ROWS, _CHECK_COLUMNS = 8, 32
WARM_UP = Configuration("decode", CHECK_TOKENS, 4)


OnToken = Callable[[float, Any], None]
"""Is told when the next token's scores are there, in seconds since the prompt went in, and all ids before it."""


class Clock:
    """A logits processor that tells when each token's scores are there."""

    def __init__(self, device: torch.device, on_token: OnToken) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._on_token = on_token
        self._start = time.perf_counter()

    def __call__(self, ids: Any, scores: Any) -> Any:
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
        self._on_token(time.perf_counter() - self._start, ids)
        return scores


@contextmanager
def attached(model: Any, experts: Any, replay: Replay | None, *, capture: bool = False) -> Iterator[None]:
    """Every layer's experts are computed by `experts`, which has moe() as an Engine.

    capture: decode steps are captured, with an Engine for experts. Warns (FiddlerWarning) where they cannot be.
    """
    planned = [module for module in model.modules() if isinstance(module, hf.PlannedExperts)]
    with ExitStack() as undo:
        for module in planned:
            module.engine = Routed(experts, replay)
            undo.callback(delattr, module, "engine")  # so that their weights can go
        if replay is not None:
            begins = model.register_forward_pre_hook(
                lambda _, args, kwargs: replay.step((args[0] if args else kwargs["input_ids"]).numel()),
                with_kwargs=True,
            )
            undo.callback(begins.remove)
        model.captured = hf.capture_steps(model, experts) if capture else None
        undo.callback(setattr, model, "captured", None)
        if model.captured is not None:
            undo.callback(model.captured.undo)
        yield


def generate(model: Any, ids: torch.Tensor, wanted: Configuration, on_token: OnToken, after: Sequence[int] = ()) -> Any:
    """Exactly wanted.new tokens, greedily or by beams: the ids, the prompt's included. after: the first ones of them,
    which are given with the prompt."""
    given = torch.tensor([list(after)], dtype=ids.dtype)
    prompt = torch.cat([ids[:, : wanted.prompt], given], dim=1).to(model.device)
    new = wanted.new - len(after)
    with torch.no_grad():
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            num_beams=wanted.beams,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[Clock(model.device, on_token)],
        )


def logits(model: Any, experts: Any, ids: torch.Tensor, spec: ModelSpec) -> list[float]:
    """Some logits of a fixed prompt. Which experts compute it is fixed too, so that rounding tips no choice."""
    tokens = ids[:, :CHECK_TOKENS].to(model.device)
    replay = Replay(drawn(tokens.shape[1], spec), spec, model.device)
    replay.begin(tokens.shape[1], 1)
    with torch.no_grad(), attached(model, experts, replay):
        found = model(tokens, use_cache=False).logits[0].float().cpu()
    rows = np.linspace(0, found.shape[0] - 1, _CHECK_ROWS).astype(int)
    columns = np.linspace(0, found.shape[1] - 1, _CHECK_COLUMNS).astype(int)
    return [round(float(value), 6) for value in found[rows][:, columns].flatten()]


def compare(name: str, found: list[float], others: dict[str, list[float]], spec: ModelSpec) -> None:
    """Raises FiddlerError if a strategy computes another model than those before it."""
    for other, expected in others.items():
        error = distance(found, expected)
        if error > tolerance(spec):
            raise FiddlerError(
                f"the strategy {name} computes something else than {other}",
                found=f"logits {error:.2e} apart (root mean square, relative)",
                expected=f"at most {tolerance(spec):.2e}, what rounding to bf16 explains",
                hint=f"--only {name},{other} --output OTHER_FOLDER, and report it",
            )


def distance(found: list[float], expected: list[float]) -> float:
    """Root mean square of the differences over that of the expected values."""
    return math.dist(found, expected) / math.sqrt(math.fsum(value * value for value in expected))


def tolerance(spec: ModelSpec) -> float:
    """Two bf16 runs round alike but for the experts: 2^-9 for each of some four roundings a layer, independent."""
    return 2.0**-9 * math.sqrt(4 * (len(spec.moe_layers) + 1)) * 2
