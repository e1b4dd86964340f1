"""What importing the runtime costs, and what embedding it needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FORBIDDEN = ("fiddlerc", "sklearn", "jinja2", "onnx", "transformers", "matplotlib", "scipy", "triton")
# Milliseconds that importing the package adds to torch, numpy being there already; and the modules found afterwards.
IMPORT = """
import json, sys, time
import torch
started = time.perf_counter()
import fiddler_runtime
{use}
elapsed = time.perf_counter() - started
print(json.dumps([1e3 * elapsed, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def run(use: str) -> tuple[float, set[str]]:
    done = subprocess.run([sys.executable, "-c", IMPORT.format(use=use)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    elapsed, modules = json.loads(done.stdout)
    return elapsed, set(modules)


@pytest.mark.slow
def test_import_adds_under_150_ms_to_torch():
    assert min(run("")[0] for _ in range(2)) < 150
    names = "fiddler_runtime.load_plan, fiddler_runtime.Engine, fiddler_runtime.ExpertWeights"
    assert min(run(names)[0] for _ in range(2)) < 150, "and so does all that embedding uses"


@pytest.mark.slow
def test_embedding_needs_none_of_the_compilers_packages():
    _, modules = run("fiddler_runtime.load_plan, fiddler_runtime.Engine, fiddler_runtime.ExpertWeights")
    assert not modules & set(FORBIDDEN)


@pytest.mark.slow
def test_the_hf_module_loads_transformers_only_when_a_model_is_loaded():
    _, modules = run("fiddler_runtime.hf.load")
    assert not modules & set(FORBIDDEN)


def test_public_names_are_there_and_others_are_not():
    import fiddler_runtime

    for name in fiddler_runtime.__all__:
        assert getattr(fiddler_runtime, name) is not None
    assert set(dir(fiddler_runtime)) == set(fiddler_runtime.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        _ = fiddler_runtime.load_model
