"""One entry for everything a model can be given as."""

from __future__ import annotations

from pathlib import Path

from fiddler_runtime.errors import FiddlerError
from fiddlerc.ir import ModelSpec

from . import zoo
from .huggingface import load_directory


def load_model(source: str) -> ModelSpec:
    """A Hugging Face directory or a built-in name; a directory that exists wins.

    Raises FiddlerError if it is neither, and for what `load_directory` raises.
    """
    path = Path(source)
    if path.is_dir():
        return load_directory(path)
    names = ", ".join(zoo.zoo_names())
    if path.suffix == ".onnx" or path.is_file():
        raise FiddlerError(
            f"cannot read the model {source}",
            found="an ONNX file" if path.suffix == ".onnx" else "a file",
            expected=f"a Hugging Face directory (config.json, *.safetensors) or a built-in name: {names}",
            hint=f"fiddlerc compile {path.parent} --hw HW -o PLAN" if (path.parent / "config.json").is_file() else None,
        )
    spec = zoo.find(source)
    if spec is None:
        raise FiddlerError(
            "no such model directory or built-in name",
            found=repr(source),
            expected=f"a Hugging Face directory or one of {names}",
            hint="fiddlerc compile mixtral --hw a100 -o PLAN",
        )
    return spec
