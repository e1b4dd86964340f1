"""docs/models.md from the table, the built-in models and the tests' results: python -m tests.models_document."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jinja2

sys.path.insert(0, str(Path(__file__).parent))
from tiny_families import DISCOVERED

from fiddler_runtime.text import format_bytes
from fiddlerc.frontend import load_model, zoo_names
from fiddlerc.frontend.architectures import ARCHITECTURES, Architecture

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "models.md"
RESULTS = Path(__file__).parent / "golden" / "families"
LANES = ["cpu", "mixed", "resident", "split", "streamed"]
TRANSFORMERS = "5.23"


def status(name: str) -> str:
    """What the last run of tests/unit/test_hf_families.py noted about the family."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "not tested"
    passed = json.loads(path.read_text())
    complete = sorted(passed) == ["cache", "compiled", "layers", "text"]
    if complete and sorted(passed["layers"]) == sorted(passed["text"]) == LANES:
        return "all lanes"
    return "in part: " + ", ".join(sorted(passed))


def describe(row: Architecture) -> dict[str, str]:
    """A line of the table."""
    names = row.tensors
    prefix = "model.layers.{layer}."

    def short(name: str) -> str:
        return name.removeprefix(prefix).replace("{expert}", "E")

    if names.gate == names.up:
        order = ("[E, 2I, H]", "[E, H, I]") if not names.transposed else ("[E, H, 2I]", "[E, I, H]")
        mixed = ", gate and up interleaved" if names.interleaved else ""
        tensors = f"`{short(names.gate)}` {order[0]}{mixed}; `{short(names.down)}` {order[1]}"
    else:
        gate, up, down = (short(name).rsplit(".", 2) for name in (names.gate, names.up, names.down))
        tensors = f"`{gate[0]}.{{{gate[1]},{up[1]},{down[1]}}}.{gate[2]}`"
    rest = [
        "latent attention" * (row.attention == "mla"),
        "shared experts" * bool(row.shared),
        {"none": "", "first_k": "first layers dense", "sparse_step": "some layers dense"}[row.dense_layers],
        {"none": "", "all": "window if sliding_window", "alternate": "window in every second layer"}[row.window],
    ]
    computes = "gpt-oss's SwiGLU" if row.activation == "gptoss" else "SwiGLU or GELU, by `hidden_act`"
    return {
        "title": row.title,
        "model_types": ", ".join(f"`{name}`" for name in row.model_types),
        "tensors": tensors,
        "computes": computes + ", biases" * bool(names.gate_bias),
        "routing": row.routing,
        "rest": ", ".join(filter(None, rest)) or "-",
        "status": status(row.model_type),
    }


def built_in(name: str) -> dict[str, Any]:
    """A line of the table of names."""
    spec = load_model(name)
    experts = spec.total_experts * spec.expert_bytes
    row = next(row for row in ARCHITECTURES if row.class_name == spec.architecture)
    own = "" if spec.name == name else f" ({spec.name})"
    return {
        "name": f"`{name}`{own}",
        "family": row.title.partition(",")[0],
        "parameters": f"{(spec.non_expert_bytes + experts) / 2e9:,.1f} x 10^9",
        "experts": f"{spec.num_experts}, {spec.top_k}",
        "layers": f"{len(spec.moe_layers)} of {spec.num_layers}",
        "expert": f"{spec.hidden_size} x {spec.intermediate_size}, {format_bytes(spec.expert_bytes)}",
        "cache": format_bytes(spec.cache_bytes(4096)),
    }


def render() -> str:
    """The document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template("models.md.j2").render(
        transformers=TRANSFORMERS,
        rows=[describe(row) for row in ARCHITECTURES],
        discovered=[{"name": name, "status": status(name)} for name in sorted(DISCOVERED)],
        zoo=[built_in(name) for name in zoo_names()],
    )


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
    print(DOCUMENT.relative_to(ROOT))
