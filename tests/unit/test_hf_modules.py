"""Which modules of a transformers model are its experts; what is said where they, or a tokenizer, are not there."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fiddler_runtime import hf
from fiddler_runtime.errors import FiddlerError
from fiddlerc.frontend import load_model

TINY_MIXTRAL = Path(__file__).parents[2] / "examples/tiny-mixtral"
SPEC = replace(load_model(str(TINY_MIXTRAL)), moe_layers=(1, 2))


class Registered(nn.Module):
    """What transformers' experts registry marks."""

    is_concatenated = True
    num_experts = SPEC.num_experts


def model(*blocks: dict[str, nn.Module]) -> Any:
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict(block) for block in blocks)})


def test_experts_come_in_the_order_of_their_layers() -> None:
    ours = hf.PlannedExperts(2, SPEC.num_experts)
    built = model({"mlp": nn.Linear(1, 1)}, {"moe": Registered()}, {"block_sparse": ours})
    names, modules = zip(*hf.experts_modules(built, SPEC), strict=True)
    assert names == ("layers.1.moe", "layers.2.block_sparse") and modules[1] is ours


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ([{"a": Registered()}, {"a": Registered()}], "layers [0, 1]"),
        ([{}, {"a": Registered(), "b": Registered()}, {"a": Registered()}], "layers [1, 1, 2]"),
        ([{}, {}, {}], "layers []"),
    ],
)
def test_experts_in_other_layers_are_refused(blocks: list[dict[str, nn.Module]], found: str) -> None:
    with pytest.raises(FiddlerError, match="experts in other layers") as refused:
        hf.experts_modules(model(*blocks), SPEC)
    assert (refused.value.found, refused.value.expected) == (found, "layers [1, 2]")


def test_layers_are_numbered_by_name() -> None:
    assert hf.layer_of("model.layers.17.mlp.experts.gate_up_proj") == hf.layer_of("layers.17.mlp") == 17
    assert hf.layer_of("lm_head.weight") is hf.layer_of("model.players.3.x") is None


def test_tokenizers_that_are_missing_or_broken(tmp_path: Path) -> None:
    shutil.copy(TINY_MIXTRAL / "config.json", tmp_path)
    for what in ("no tokenizer in", "cannot load the tokenizer in"):
        with pytest.raises(FiddlerError, match=what):
            hf.load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
