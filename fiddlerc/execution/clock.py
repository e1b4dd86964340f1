"""Time stamps of a generation, step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """One generation. ttft_s: prompt in to first token chosen. decode_tokens_per_s: all further steps.

    With beams a step yields one token of the answer, whatever the number of beams.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tokens_per_s: float
    total_s: float


class StepClock:
    """A logits processor that leaves the scores alone and notes when each step's scores arrived.

    Works for greedy, sampling and beams alike, unlike a streamer, which transformers refuses with beams.
    """

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.start = time.perf_counter()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.stamps.append(time.perf_counter())
        return scores

    def timing(self, prompt_tokens: int) -> Timing:
        """Summary; call when generate() has returned."""
        end = time.perf_counter()
        steps = len(self.stamps)
        if steps == 0:
            return Timing(prompt_tokens, 0, 0.0, 0.0, end - self.start)
        decode_s = self.stamps[-1] - self.stamps[0]
        rate = (steps - 1) / decode_s if steps > 1 else 0.0
        return Timing(prompt_tokens, steps, self.stamps[0] - self.start, rate, end - self.start)
