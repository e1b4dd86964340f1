"""The architecture's arrows: who may import whom (docs/design.md). Walks the source, imports nothing."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, RUNTIME = ROOT / "fiddlerc", ROOT / "runtime" / "fiddler_runtime"
STAGES = sorted(p.name for p in COMPILER.iterdir() if (p / "__init__.py").exists())
RUNTIME_EXTERNAL = {"numpy", "torch", "safetensors", "fiddler_runtime"}


def imports(path: Path) -> set[str]:
    """Absolute dotted names of all modules that a file imports, wherever in it."""
    package = path.relative_to(COMPILER.parent if COMPILER in path.parents else RUNTIME.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


@pytest.mark.parametrize("path", sources(RUNTIME), ids=names(sources(RUNTIME)))
def test_runtime_imports_only_what_embedding_installs(path: Path) -> None:
    allowed = RUNTIME_EXTERNAL | set(sys.stdlib_module_names)
    if path.name == "hf.py":
        allowed |= {"transformers"}
    if path.name == "triton_experts.py":  # imported where a kernel of it runs, and chosen only where triton is there
        allowed |= {"triton"}
    assert {name.partition(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", sources(COMPILER), ids=names(sources(COMPILER)))
def test_stages_do_not_import_each_other(path: Path) -> None:
    inside = {name for name in imports(path) if name.partition(".")[0] == "fiddlerc"}
    parts = path.relative_to(COMPILER).parts
    if path.name == "pipeline.py":
        assert sorted({name.split(".")[1] for name in inside} & set(STAGES)) == STAGES, "pipeline names every stage"
        return
    if path.name == "cli.py":
        assert inside <= {"fiddlerc.pipeline", "fiddlerc.__version__"}
        return
    if path.name == "__main__.py":
        assert inside <= {"fiddlerc.cli.run_command_line"}
        return
    own = f"fiddlerc.{parts[0]}" if len(parts) > 1 else "fiddlerc.ir"
    assert all(name.startswith((own, "fiddlerc.ir")) for name in inside), inside


def test_only_latency_imports_scikit_learn() -> None:
    users = {
        p.relative_to(ROOT).parts[1] for p in sources(COMPILER) if any(n.startswith("sklearn") for n in imports(p))
    }
    assert users <= {"latency"}


def test_only_the_onnx_frontend_and_export_import_onnx() -> None:
    users = {
        p.relative_to(COMPILER).parts[0]
        for p in sources(COMPILER)
        if any(n.partition(".")[0] in ("onnx", "onnxscript") for n in imports(p))
    }
    assert users <= {"frontend", "export"}


def test_only_build_starts_processes() -> None:
    users = {p.name for p in [*sources(COMPILER), *sources(RUNTIME)] if "subprocess" in imports(p)}
    assert users <= {"build.py"}
