"""The model: a checkpoint's, or a built-in model's shapes with random weights that exist in memory alone."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fiddler_runtime import hf
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import ModelSpec
from fiddler_runtime.weights import ExpertWeights
from fiddlerc import frontend
from fiddlerc.frontend import zoo

SEED = 0
_NOISE = 1 << 23  # 16 MiB of bf16: beyond second-level caches, drawn in a moment
_STRIDE = 999_983  # a prime: every matrix begins elsewhere in the noise


@dataclass(frozen=True)
class Model:
    """What is run.

    full    the whole model's spec: `spec` has fewer layers where --layers asked for that
    source  what the compiler reads: a directory with a config.json, with weights or without
    """

    spec: ModelSpec
    full: ModelSpec
    source: Path
    random: bool

    def weights(self) -> ExpertWeights:
        """The routed experts, which have passed their check."""
        weights = NoiseWeights() if self.random else ExpertWeights.load(self.source)
        weights.check(self.spec)
        return weights

    def without_experts(self) -> Any:
        """The transformers model in bf16 on the CPU, with hf.PlannedExperts whose `engine` is to be set."""
        if not self.random:
            return hf.load_without_experts(self.source, self.spec, torch.bfloat16)
        import transformers

        base = getattr(transformers, self.spec.architecture)
        config = base.config_class.from_pretrained(self.source)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            # On the meta device first: experts that transformers would make, and initialise, take all the memory.
            with torch.device("meta"):
                model = hf._without_experts(base, self.spec)(config)
            model.to_empty(device="cpu")
            torch.manual_seed(SEED)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                model.init_weights()
        finally:
            torch.set_default_dtype(default)
        return model.eval()

    def their_experts(self) -> Any:
        """transformers' own module for the experts of one layer, on the meta device."""
        import transformers

        base = getattr(transformers, self.spec.architecture)
        with torch.device("meta"):
            whole = base(base.config_class.from_pretrained(self.source))
        return next(module for module in whole.modules() if hasattr(module, "is_concatenated"))


def open_model(name: str, folder: Path, *, random: bool, layers: int | None) -> Model:
    """A built-in name with random weights, or a directory with real ones.

    folder  where a random model's config.json is written. Raises FiddlerError for other combinations.
    """
    if not random:
        if not Path(name).is_dir() or layers is not None:
            raise FiddlerError(
                "a model is run with its own weights, or with random ones",
                found=f"--model {name}" + (f" --layers {layers}" if layers is not None else ""),
                expected="a Hugging Face directory, or a built-in name with --random-weights",
                hint="--model mixtral --random-weights",
            )
        spec = frontend.load_model(name)
        return Model(spec, spec, Path(name), random=False)
    full = zoo.find(name)
    if full is None:
        raise FiddlerError(
            "random weights are for built-in models",
            found=repr(name),
            expected="one of " + ", ".join(zoo.zoo_names()),
            hint="--model mixtral --random-weights",
        )
    if layers is not None and not 1 <= layers <= full.num_layers:
        raise FiddlerError("--layers is out of range", found=layers, expected=f"1 to {full.num_layers}")
    short = next(short for short in zoo.zoo_names() if name in (short, zoo.entry_of(short)["name"]))
    config = _cut(zoo.entry_of(short)["config"], full.num_layers, layers or full.num_layers)
    return _written(config, full, folder / (full.name if layers is None else f"{full.name}-{layers}-layers"))


def _written(config: dict[str, Any], full: ModelSpec, folder: Path) -> Model:
    text = json.dumps(config, indent=1, sort_keys=True) + "\n"
    path = folder / "config.json"
    if not path.exists() or path.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path.write_text(text)
    return Model(frontend.load_model(str(folder)), full, folder, random=True)


def _cut(config: dict[str, Any], full: int, layers: int) -> dict[str, Any]:
    """The same with fewer layers; lists with an entry for each layer are cut as well."""
    values = {
        key: value[:layers] if isinstance(value, list) and len(value) == full else value
        for key, value in config.items()
    }
    return {**values, "num_hidden_layers": layers}


class NoiseWeights(ExpertWeights):
    """Normal weights scaled by 1/sqrt(inputs), as ExpertWeights.random has them, at the speed of memory.

    Each matrix is the same 16 MiB of noise over and over, from a place of its own: 93 GB of fresh random numbers would
    take longer to draw than everything else.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self._noise = torch.empty(_NOISE).normal_(generator=generator).bfloat16()
        self._scaled: dict[int, torch.Tensor] = {}

    def check(self, spec: ModelSpec) -> None:
        """Nothing can be missing."""

    def read(
        self,
        layer: int,
        expert: int,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        biases: Sequence[torch.Tensor] = (),
    ) -> None:
        for part, out in enumerate((gate, up, down, *biases)):
            columns = out.shape[1] if out.dim() == 2 else 1
            if columns not in self._scaled:
                self._scaled[columns] = (self._noise.float() * columns**-0.5).bfloat16()
            noise, target = self._scaled[columns], out.contiguous()  # a copy only where gate and up interleave
            flat = target.view(-1)
            at = (layer * 4099 + expert * 7 + part) * _STRIDE % _NOISE
            first = min(_NOISE - at, flat.numel())
            flat[:first] = noise[at : at + first]
            for start in range(first, flat.numel(), _NOISE):
                piece = flat[start : start + _NOISE]
                piece.copy_(noise[: piece.numel()])
            if target is not out:
                out.copy_(target)
