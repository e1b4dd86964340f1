"""The generated C++ and CMake of Mixtral's expert shape, byte for byte, and the names of kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_type import Golden

from fiddler_runtime.errors import FiddlerError
from fiddlerc.codegen import format_name, generate
from fiddlerc.ir import ExpertForm

TEMPLATES = Path(__file__).parents[2] / "templates"


def test_generated_text_is_the_golden_text(golden: Golden) -> None:
    sources = generate(4096, 14336)
    for name, text in sources.files.items():
        if name.startswith("include/") or name == "exports.map":
            assert text == (TEMPLATES / name).read_text(), name
        else:
            golden(f"kernels/{name}", text)


def test_a_second_run_gives_the_same_text() -> None:
    assert generate(4096, 14336) == generate(4096, 14336)


def test_only_the_instruction_sets_asked_for() -> None:
    sources = generate(64, 64, ["avx2"])
    assert [variant.isa for variant in sources.spec.variants] == ["avx2"]
    text = "".join(sources.files.values())
    assert "avx512f" not in sources.files["CMakeLists.txt"]
    assert "isa_avx512" not in text
    assert generate(64, 64, ["scalar", "avx2"]) == generate(64, 64, ["avx2", "scalar"]), "the best comes first"


def test_what_experts_compute_is_in_the_name() -> None:
    assert format_name(ExpertForm(4096, 14336)) == "fdl_bf16_moe_h4096_i14336"
    assert format_name(ExpertForm(2880, 2880, "gptoss", bias=True)) == "fdl_bf16_moe_h2880_i2880_gptoss_bias"
    assert format_name(ExpertForm(64, 32, "gelu_tanh")) == "fdl_bf16_moe_h64_i32_gelu_tanh"


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (-1, 8), (8, (1 << 20) + 1)])
def test_impossible_sizes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(FiddlerError, match="cannot generate kernels"):
        generate(*shape)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(FiddlerError, match="unknown instruction set: found 'sse9', expected one of amx_bf16, "):
        generate(8, 8, ["sse9"])
