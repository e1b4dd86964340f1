"""One entry for everything a model can be given as."""

from __future__ import annotations

import difflib
from pathlib import Path

from fiddler_runtime.errors import FiddlerError
from fiddlerc.ir import ModelSpec

from . import zoo
from .huggingface import load_directory
from .onnx import load_file


def load_model(source: str) -> ModelSpec:
    """A Hugging Face directory, an ONNX file or a built-in name; a directory that exists wins.

    Raises FiddlerError if it is neither, and for what `load_directory` raises.
    """
    path = Path(source)
    if path.is_dir():
        return load_directory(path)
    if path.suffix == ".onnx":
        return load_file(path)
    names = ", ".join(zoo.zoo_names())
    if path.is_file():
        raise FiddlerError(
            f"cannot read the model {source}",
            found="a file",
            expected=f"a Hugging Face directory (config.json, *.safetensors), *.onnx or a built-in name: {names}",
            hint=f"fiddlerc compile {path.parent} --hw HW -o PLAN" if (path.parent / "config.json").is_file() else None,
        )
    spec = zoo.find(source)
    if spec is None:
        near = difflib.get_close_matches(source.lower(), zoo.zoo_names(), 1) or ["mixtral"]
        raise FiddlerError(
            "no such model directory or built-in name",
            found=repr(source),
            expected=f"a Hugging Face directory, an ONNX file or one of {names}",
            hint=f"ls shows what directories there are; a built-in name is, for example, {near[0]}",
        )
    return spec
