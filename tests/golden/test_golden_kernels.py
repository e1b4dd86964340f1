"""The generated C++ and CMake of Mixtral's expert shape, byte for byte, and the names of kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_type import Golden
from hypothesis import given
from hypothesis import strategies as st

from fiddler_runtime.errors import FiddlerError
from fiddlerc.codegen import KNOWN_ISAS, format_name, format_symbol, generate, parse_name, parse_symbol
from fiddlerc.ir import ACTIVATIONS, ExpertForm

TEMPLATES = Path(__file__).parents[2] / "templates"
sizes = st.integers(1, 1 << 20)


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


forms = st.builds(ExpertForm, sizes, sizes, st.sampled_from(ACTIVATIONS), st.booleans())


@given(forms, st.integers(1, 64), st.integers(1, 8), st.sampled_from(KNOWN_ISAS))
def test_names_can_be_parsed(expert: ExpertForm, tokens: int, vectors: int, isa: str) -> None:
    assert parse_name(format_name(expert)) == expert
    assert parse_symbol(format_symbol(expert, tokens, vectors, isa)) == (expert, tokens, vectors, isa)


def test_what_experts_compute_is_in_the_name() -> None:
    assert format_name(ExpertForm(4096, 14336)) == "fdl_bf16_moe_h4096_i14336"
    assert format_name(ExpertForm(2880, 2880, "gptoss", bias=True)) == "fdl_bf16_moe_h2880_i2880_gptoss_bias"
    assert format_name(ExpertForm(64, 32, "gelu_tanh")) == "fdl_bf16_moe_h64_i32_gelu_tanh"


@pytest.mark.parametrize(
    "symbol", ["", "fdl_bf16_moe_h0_i1_m1n1__avx2", "fdl_bf16_moe_h1_i1_m1n1__sse", "fdl_bf16_moe_h1_i1", "x"]
)
def test_other_text_is_no_symbol(symbol: str) -> None:
    with pytest.raises(FiddlerError, match="not a kernel symbol"):
        parse_symbol(symbol)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (-1, 8), (8, (1 << 20) + 1)])
def test_impossible_sizes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(FiddlerError, match="cannot generate kernels"):
        generate(*shape)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(FiddlerError, match="unknown instruction set: found 'sse9', expected one of amx_bf16, "):
        generate(8, 8, ["sse9"])
