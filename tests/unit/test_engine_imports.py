"""What importing the runtime costs, and what embedding it needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FORBIDDEN = {"fiddlerc", "sklearn", "jinja2", "onnx", "transformers", "matplotlib", "scipy", "triton"}
EMBEDDING = "fiddler_runtime.load_plan, fiddler_runtime.Engine, fiddler_runtime.ExpertWeights"
# The modules that importing the package adds to torch's.
IMPORT = """
import json, sys
import torch
before = set(sys.modules)
import fiddler_runtime
{use}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def added(use: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", IMPORT.format(use=use)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.mark.slow
def test_embedding_adds_a_few_files_to_torch():
    """What an import takes its time for, without a clock: how many modules, and whose."""
    assert len(added("")) < 10, "the package by itself loads next to nothing"
    modules = added(EMBEDDING)
    assert len(modules) < 90
    others = packages(modules) - set(sys.stdlib_module_names)
    assert others <= {"fiddler_runtime", "numpy", "safetensors"}


@pytest.mark.slow
def test_the_hf_module_loads_transformers_only_when_a_model_is_loaded():
    assert not packages(added("fiddler_runtime.hf.load")) & FORBIDDEN


def test_public_names_are_there_and_others_are_not():
    import fiddler_runtime

    for name in fiddler_runtime.__all__:
        assert getattr(fiddler_runtime, name) is not None
    assert set(dir(fiddler_runtime)) == set(fiddler_runtime.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        _ = fiddler_runtime.load_model
