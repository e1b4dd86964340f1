"""The expert shapes of models, from the JSON files in tests/bench/shapes, and how a layer's routing is drawn."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fiddler_runtime.errors import FiddlerError

FOLDER = Path(__file__).parents[1] / "shapes"


@dataclass(frozen=True)
class Shape:
    """One model's MoE layer: num_experts experts of hidden_size x intermediate_size, top_k of them per token."""

    name: str
    model: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    source: str

    @property
    def expert_bytes(self) -> int:
        """Of the three bf16 matrices."""
        return 3 * self.hidden_size * self.intermediate_size * 2

    @property
    def row_flops(self) -> int:
        """Of one expert on one token."""
        return 6 * self.hidden_size * self.intermediate_size


def load_shape(name: str) -> Shape:
    """A model's shape by its file's name, or any `HIDDENxINTERMEDIATE` (one expert).

    Raises FiddlerError for an unknown name and for a file that does not hold exactly the fields of Shape.
    """
    hidden, cross, intermediate = name.partition("x")
    if cross and hidden.isdigit() and intermediate.isdigit():
        return Shape(name, name, int(hidden), int(intermediate), 1, 1, "the command line")
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise FiddlerError("unknown shape", found=repr(name), expected=f"{known}, or HIDDENxINTERMEDIATE")
    fields = json.loads(path.read_text(encoding="utf-8"))
    try:
        shape = Shape(name=name, **fields)
    except TypeError as error:
        raise FiddlerError(f"wrong fields in {path.name}", found=str(error)) from None
    sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
    if not all(type(size) is int and size > 0 for size in sizes) or shape.top_k > shape.num_experts:
        raise FiddlerError(
            f"wrong sizes in {path.name}", found=sizes, expected="positive integers, top_k <= num_experts"
        )
    return shape


def rotation(expert_bytes: int, cache_bytes: int, budget_bytes: int, layouts: int) -> int:
    """How many copies of an expert to rotate: four times the last-level cache and at least three, if `layouts` sets of
    them fit the budget; otherwise as many as do.

    Raises FiddlerError if what fits is not four times the cache.
    """
    least = max(1, math.ceil(4 * cache_bytes / expert_bytes))
    most = budget_bytes // (expert_bytes * layouts)
    if most < least:
        raise too_large(expert_bytes * least * layouts, budget_bytes)
    return min(max(3, least), most)


def too_large(needed_bytes: int, budget_bytes: int) -> FiddlerError:
    """The refusal of a measurement whose weights do not fit."""
    return FiddlerError(
        "the weights of this measurement do not fit",
        found=f"{needed_bytes / 2**30:.1f} GiB needed",
        expected=f"at most {budget_bytes / 2**30:.1f} GiB",
        hint=f"--memory {math.ceil(needed_bytes / 2**30)}, fewer --peers, or for a layer fewer --experts",
    )


def draw_routings(shape: Shape, tokens: int, count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """`count` routings of so many tokens, int64 [tokens, top_k]: each token's experts drawn uniformly, none twice.

    While few experts are active, a routing has none of those of the one before: their weights may be in the cache.
    """
    routings = []
    free = torch.arange(shape.num_experts)
    for _ in range(count):
        order = torch.rand(tokens, len(free), generator=generator)
        routings.append(free[order.topk(shape.top_k, dim=1).indices].contiguous())
        if 2 * tokens * shape.top_k <= shape.num_experts:
            used = torch.zeros(shape.num_experts, dtype=torch.bool)
            used[routings[-1].flatten()] = True
            free = torch.arange(shape.num_experts)[~used]
    return routings
