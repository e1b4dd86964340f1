"""What is measured: the configurations of the Fiddler paper, or others that were asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fiddler_runtime.errors import FiddlerError
from fiddlerc.simulate.workload import BEAM_INPUT, BEAM_OUTPUT

PUBLISHED = Path(__file__).parents[2] / "data" / "fiddler_published.json"
SCENARIOS = ("decode", "prefill", "beam")


@dataclass(frozen=True)
class Configuration:
    """So many tokens in and out, with so many beams. prefill: one token out, and its time is what counts."""

    scenario: str
    prompt: int
    new: int
    beams: int = 1

    @property
    def label(self) -> str:
        """As --only takes it."""
        amount = {"decode": f"{self.prompt}/{self.new}", "prefill": self.prompt, "beam": self.beams}[self.scenario]
        return f"{self.scenario}:{amount}"

    @property
    def generation(self) -> str:
        """What has to run for it. The first steps of a longer greedy answer are a shorter one's: one run has both."""
        return f"decode:{self.prompt}" if self.scenario == "decode" else self.label


def paper() -> tuple[Configuration, ...]:
    """All of the paper's."""
    published = json.loads(PUBLISHED.read_text())
    decode = published["decode_configurations"]
    return (
        *(Configuration("decode", i, o) for i in decode["input_tokens"] for o in decode["output_tokens"]),
        *(Configuration("prefill", tokens, 1) for tokens in published["prefill_lengths"]),
        *(Configuration("beam", BEAM_INPUT, BEAM_OUTPUT, width) for width in published["beam_widths"]),
    )


def select(only: Sequence[str], strategies: Sequence[str]) -> tuple[tuple[str, ...], tuple[Configuration, ...]]:
    """Which strategies, in the order of `strategies`, and which configurations `--only` names; all if it names none.

    Items are strategies, scenarios (decode, prefill, beam) and configurations, the paper's or not (decode:32/64,
    prefill:512, beam:4). Raises FiddlerError for others.
    """
    names: set[str] = set()
    chosen: list[Configuration] = []
    for item in only:
        if item in strategies:
            names.add(item)
        elif item in SCENARIOS:
            chosen += [c for c in paper() if c.scenario == item]
        elif (found := re.fullmatch(r"decode:(\d+)/(\d+)", item)) and all(int(n) for n in found.groups()):
            chosen.append(Configuration("decode", int(found[1]), int(found[2])))
        elif (found := re.fullmatch(r"prefill:(\d+)", item)) and int(found[1]):
            chosen.append(Configuration("prefill", int(found[1]), 1))
        elif (found := re.fullmatch(r"beam:(\d+)", item)) and int(found[1]) > 1:
            chosen.append(Configuration("beam", BEAM_INPUT, BEAM_OUTPUT, int(found[1])))
        else:
            raise FiddlerError(
                "--only names nothing that is measured",
                found=repr(item),
                expected=f"{', '.join(strategies)}; {', '.join(SCENARIOS)}; decode:IN/OUT, prefill:TOKENS, beam:WIDTH",
                hint="--only ours,cpu,decode:32/64",
            )
    order = tuple(name for name in strategies if name in names or not names)
    return order, tuple(dict.fromkeys(chosen)) or paper()
