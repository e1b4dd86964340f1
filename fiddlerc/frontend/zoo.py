"""Built-in models: the sizes in zoo/*.json, which are as good as a directory without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fiddler_runtime import strict
from fiddlerc.ir import ModelSpec

from .huggingface import describe

_FOLDER = Path(__file__).parent / "zoo"


def zoo_names() -> tuple[str, ...]:
    """The built-in names, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def find(name: str) -> ModelSpec | None:
    """The built-in model of that name, be it the short one (mixtral) or the model's own (Mixtral-8x7B), in any case."""
    for short in zoo_names():
        entry = entry_of(short)
        if name.lower() in (short, entry["name"]):
            return describe(entry["config"], name=entry["name"], where=f"the built-in model {short}")[0]
    return None


def entry_of(short: str) -> dict[str, Any]:
    """The data file: name, source (where the numbers come from) and config (keys as in config.json)."""
    path = _FOLDER / f"{short}.json"
    entry: dict[str, Any] = strict.load(path, f"the built-in model {short}")
    return entry
