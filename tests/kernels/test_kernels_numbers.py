"""What the kernels compute, against three oracles: exact integers, a rigorous bound around float64, and themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from kernel_samples import (
    ISAS,
    SHAPES,
    Expert,
    library,
    one_expert,
    open_isa,
    orders,
    random_expert,
    reference,
    run_moe,
)

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.kernels import Kernels, make_pointers
from fiddler_runtime.machine import KNOWN_ISAS, refused, this_machine
from fiddler_runtime.makespan import CPU, IDLE, RESIDENT, SPLIT, STREAMED
from fiddlerc.codegen.selection import most_of_one_pass
from fiddlerc.codegen.targets import TARGETS

SMALL = (129, 40)
LARGE = (256, 1408)  # with some hundred tokens more than one thread is given to itself


def token_counts(kernels: Kernels) -> tuple[int, ...]:
    """None, one, where another order of sums begins, around the register tile, several tiles, several units."""
    variant = next(v for v in kernels.library.spec.variants if v.isa == kernels.isa)
    tile = variant.blocking.tile_tokens
    turns = {rows - below for rows in orders(kernels) for below in (0, 1)}
    return tuple(sorted({*turns, tile - 1, tile, tile + 1, 2 * tile + 1, 33, 300}))


def integers(shape: tuple[int, int], tokens: int, generator: torch.Generator) -> tuple[Expert, torch.Tensor]:
    """Small integers that stay exact in fp32: gates of at least 64, where silu(g) = g, and few inputs other than 0."""
    hidden, intermediate = shape

    def pick(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high + 1, size, generator=generator)

    gate, up, down = (
        pick(0, 1, intermediate, hidden),
        pick(-1, 1, intermediate, hidden),
        pick(-1, 1, hidden, intermediate),
    )
    gate[:, 0], up[:, 0] = 8, 1
    x = torch.zeros(tokens, hidden, dtype=torch.int64)
    for row in x:
        row[pick(0, hidden - 1, 4)] = pick(1, 2, 4)
    x[:, 0] = 8
    return Expert(gate.bfloat16(), up.bfloat16(), down.bfloat16()), x.bfloat16()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"h{s[0]}_i{s[1]}")
def test_integers_are_exact(shape: tuple[int, int], isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    with open_isa(shape, isa) as kernels, open_isa(shape, "scalar", 1) as scalar:
        for tokens in token_counts(kernels):
            expert, hidden = integers(shape, tokens, generator)
            out = one_expert(kernels, expert, hidden)
            g, u = hidden.double() @ expert.gate.double().T, hidden.double() @ expert.up.double().T
            expected = (g * u).bfloat16().double() @ expert.down.double().T
            assert torch.equal(out.double(), expected), tokens
            assert torch.equal(out, one_expert(scalar, expert, hidden)), tokens


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"h{s[0]}_i{s[1]}")
def test_random_numbers_are_within_the_bound(shape: tuple[int, int], isa: str) -> None:
    generator = torch.Generator().manual_seed(2)
    expert = random_expert(shape, generator)
    with open_isa(shape, isa) as kernels:
        for tokens in token_counts(kernels):
            hidden = torch.randn(tokens, shape[0], generator=generator).bfloat16()
            out = one_expert(kernels, expert, hidden)
            expected, bound = reference(expert, hidden)
            excess = (out.double() - expected).abs() - bound
            assert (excess <= 0).all(), (tokens, excess.max())


@pytest.mark.parametrize("isa", ISAS)
def test_result_does_not_depend_on_threads_or_other_tokens(isa: str) -> None:
    generator = torch.Generator().manual_seed(3)
    expert = random_expert(LARGE, generator)
    hidden = torch.randn(301, LARGE[0], generator=generator).bfloat16()
    with open_isa(LARGE, isa, threads=1) as kernels:
        together = one_expert(kernels, expert, hidden)
        for few, above in pairwise((*orders(kernels), len(hidden) + 1)):
            most = one_expert(kernels, expert, hidden[: above - 1])
            for first in range(0, above - few, 1 + (above - few) // 9):
                rows = slice(first, first + few)
                assert torch.equal(one_expert(kernels, expert, hidden[rows]), most[rows]), (few, above, first)
    for threads in (2, 3, 5):
        with open_isa(LARGE, isa, threads) as kernels:
            for _ in range(3):
                assert torch.equal(together, one_expert(kernels, expert, hidden))


NO_AMX = tuple(isa for isa in KNOWN_ISAS if isa != "amx_bf16")


def cut_for(shape: tuple[int, int], isa: str, cpu: str, isas: tuple[str, ...]) -> Kernels:
    """That variant as it is cut for a CPU of that name with all of `isas`."""
    return open_isa(shape, isa, machine=replace(this_machine("none"), cpu=cpu, isa=isas))


@pytest.mark.parametrize("isa", ["avx2", "scalar"])
@pytest.mark.parametrize("shape", [SMALL, LARGE, (768, 33)])  # depths that steps of four pairs do and do not divide
def test_cut_for_amds_avx512_few_tokens_are_summed_as_many_are(shape: tuple[int, int], isa: str) -> None:
    """Which reads one place faster than four (docs/kernels-measured.md). Both cuts are correct everywhere."""
    generator = torch.Generator().manual_seed(15)
    expert = random_expert(shape, generator)
    hidden = torch.randn(9, shape[0], generator=generator).bfloat16()
    expected, bound = reference(expert, hidden)
    with cut_for(shape, isa, "AMD EPYC 9354", NO_AMX) as kernels:
        together = one_expert(kernels, expert, hidden)
        assert ((together - expected).abs() <= bound).all()
        for tokens in range(1, 5):
            assert torch.equal(one_expert(kernels, expert, hidden[:tokens]), together[:tokens])


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512f", "avx2", "scalar"])
@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize(("cpu", "isas"), [("one with AMX", KNOWN_ISAS), ("Intel(R) Xeon(R) Gold 6126", NO_AMX)])
def test_cut_for_intels_cpus_one_pass_reads_four_places(
    cpu: str, isas: tuple[str, ...], shape: tuple[int, int], isa: str
) -> None:
    """Up to 14 tokens with AVX-512: another order of sums, in which a row is the same alone and beside others."""
    generator = torch.Generator().manual_seed(16)
    expert = random_expert(shape, generator)
    hidden = torch.randn(17, shape[0], generator=generator).bfloat16()
    expected, bound = reference(expert, hidden)
    with cut_for(shape, isa, cpu, isas) as kernels:
        (cut,) = (variant.blocking for variant in kernels.library.spec.variants)
        most = most_of_one_pass(TARGETS[isa], cut)
        for tokens in (1, 2, most, most + 1, 17):
            found = one_expert(kernels, expert, hidden[:tokens])
            assert ((found - expected[:tokens]).abs() <= bound[:tokens]).all()
            if tokens == most:
                assert torch.equal(found[:1], one_expert(kernels, expert, hidden[:1]))


@pytest.mark.parametrize("tokens", [287, 288, 289, 576])
def test_tiles_in_large_tasks_and_full_units(tokens: int) -> None:
    """Inputs of more than 1.25 MiB a unit, three chunks of the depth: a task takes more blocks, if enough are left."""
    shape = (2570, 512)
    generator = torch.Generator().manual_seed(17)
    expert = random_expert(shape, generator)
    hidden = torch.randn(tokens, shape[0], generator=generator).bfloat16()
    expected, bound = reference(expert, hidden[[0, -1]])
    found = []
    for threads in (1, 3):
        with open_isa(shape, "amx_bf16", threads) as kernels:
            found.append(one_expert(kernels, expert, hidden))
            alone = one_expert(kernels, expert, hidden[-60:])
    assert torch.equal(*found) and torch.equal(found[0][-60:], alone)
    assert ((found[0][[0, -1]] - expected).abs() <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_results_that_go_past_the_caches_are_the_same(isa: str, top_k: int) -> None:
    """From 2 MiB on, to memory whose lines are whole; tiles' from 512 KiB on, those too that are added up."""
    generator = torch.Generator().manual_seed(13)
    expert = random_expert(LARGE, generator)
    hidden = torch.randn(2**21 // (4 * LARGE[0]) + 5, LARGE[0], generator=generator).bfloat16()
    ids, weights = torch.arange(top_k).expand(len(hidden), top_k).contiguous(), torch.ones(len(hidden), top_k)
    with open_isa(LARGE, isa) as kernels:
        packed = expert.packed(kernels)
        found = []
        for offset in (0, 1):  # of floats from a line's beginning
            out = torch.full((hidden.numel() + offset,), float("nan"))[offset:].view(hidden.shape)
            kernels.moe(hidden, ids, weights, make_pointers([packed.data_ptr()] * top_k), out)
            assert (out.data_ptr() % 64 == 0) == (offset == 0), "the second cannot go past the caches"
            found.append(out)
        assert torch.equal(*found)
        for first in range(0, len(hidden), 500):  # of each less
            part = hidden[first : first + 500]
            assert len(part) < orders(kernels)[-1] or torch.equal(
                found[0][first : first + 500], top_k * one_expert(kernels, expert, part)
            )


@pytest.mark.parametrize("isa", ["amx_bf16", "avx512f"])
@pytest.mark.parametrize("tokens", [1, 16, 40, 60])
def test_an_emulation_is_what_a_cpu_does(isa: str, tokens: int) -> None:
    """To the bit: the order of sums and the rounding, denormals and what is no number included.

    Not VDPBF16PS: its emulation keeps denormals.
    """
    if reason := refused(isa):
        pytest.skip(f"{isa} cannot run here: {reason}")
    generator = torch.Generator().manual_seed(13)
    expert = random_expert(LARGE, generator)
    expert.down[::7] *= 2.0**-130  # sums of denormals
    hidden = torch.randn(tokens, LARGE[0], generator=generator).bfloat16()
    hidden[:, ::5] *= 2.0**-127
    hidden[-1, 3] = float("inf")
    real, emulated = (library(*LARGE, (isa,), emulate=emulate) for emulate in (None, (isa,)))
    with real.open(isa) as here, emulated.open(isa) as there:
        found, expected = (one_expert(kernels, expert, hidden) for kernels in (here, there))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found[0].isfinite().all() == (tokens > 1) and (found != 0).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 7, 500])
def test_layer_is_the_weighted_sum_of_its_experts(isa: str, tokens: int) -> None:
    """Bit for bit: weights are applied in fp32, in the order of the top-k; unknown and masked experts add nothing."""
    generator = torch.Generator().manual_seed(4)
    experts = [random_expert(SMALL, generator) for _ in range(5)]
    hidden = torch.randn(tokens, SMALL[0], generator=generator).bfloat16()
    # -1 and 5 are sentinels; skewed, so that some experts have many tokens and one has none.
    ids = torch.tensor([-1, 0, 0, 0, 0, 1, 2, 4, 5])[torch.randint(0, 9, (tokens, 3), generator=generator)]
    weights = torch.rand(tokens, 3, generator=generator)
    with open_isa(SMALL, isa) as kernels:
        single = torch.full((5, tokens, SMALL[0]), float("nan"))
        for index, expert in enumerate(experts):
            rows = (ids == index).nonzero()[:, 0]  # as many as in the layer
            single[index, rows] = one_expert(kernels, expert, hidden[rows])
        for strategy in (None, np.array([CPU, RESIDENT, CPU, IDLE, STREAMED], dtype=np.uint8)):
            chosen = range(5) if strategy is None else np.flatnonzero(strategy == CPU)
            expected = torch.zeros(tokens, SMALL[0])
            for k in range(3):
                for expert in chosen:
                    rows = ids[:, k] == int(expert)
                    expected[rows] += weights[rows, k, None] * single[expert][rows]
            held = [expert if index in chosen else None for index, expert in enumerate(experts)]
            out = run_moe(kernels, held, hidden, ids, weights, strategy)  # type: ignore[arg-type]
            assert torch.equal(out, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("shape", "rows"), [((41, 2880), 64), ((41, 2880), 2816), ((2880, 129), 128), (LARGE, 704)])
def test_part_of_an_expert(shape: tuple[int, int], rows: int, isa: str) -> None:
    """What the expert gives whose other rows add nothing; the one beside it stays whole. Exact in any order."""
    generator = torch.Generator().manual_seed(11)
    (whole, _), (split, hidden) = integers(shape, 300, generator), integers(shape, 300, generator)
    rest = Expert(split.gate.clone(), split.up, split.down)
    rest.gate[:rows] = 0
    ids = torch.tensor([[0, 1], [1, -1], [-1, 0]])[torch.randint(0, 3, (300,), generator=generator)]
    weights = torch.randint(1, 4, (300, 2), generator=generator).float()
    with open_isa(shape, isa) as kernels:
        for tokens in (1, 7, 300):
            part = (hidden[:tokens], ids[:tokens], weights[:tokens])
            expected = run_moe(kernels, [whole, rest], *part)
            strategy = np.array([CPU, SPLIT], np.uint8)
            assert torch.equal(run_moe(kernels, [whole, split], *part, strategy, rows), expected)


@pytest.mark.parametrize("rows", [-64, 32, 1408, 1472])
def test_parts_that_cannot_be(rows: int) -> None:
    with library(*LARGE).open(None, 1) as kernels, pytest.raises(FiddlerError, match="out of range"):
        one = torch.ones(1, 1)
        run_moe(kernels, [None], torch.ones(1, LARGE[0]).bfloat16(), one.long(), one, np.array([SPLIT], np.uint8), rows)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_an_expert_are_zero(isa: str) -> None:
    generator = torch.Generator().manual_seed(5)
    experts: list[Expert | None] = [random_expert(SMALL, generator)]
    hidden = torch.full((3, SMALL[0]), float("nan")).bfloat16()
    with open_isa(SMALL, isa) as kernels:
        nobody = run_moe(kernels, experts, hidden, torch.full((3, 2), -1), torch.ones(3, 2))
        assert torch.equal(nobody, torch.zeros(3, SMALL[0]))
        one = run_moe(kernels, experts, hidden.nan_to_num(1), torch.tensor([[-1], [0], [1]]), torch.ones(3, 1))
        assert one[1].abs().sum() > 0
        assert torch.equal(one[[0, 2]], torch.zeros(2, SMALL[0]))


@pytest.mark.parametrize("isa", ISAS)
def test_an_expert_chosen_twice_counts_twice(isa: str) -> None:
    generator = torch.Generator().manual_seed(6)
    expert = random_expert(SMALL, generator)
    with open_isa(SMALL, isa) as kernels:
        rows = max(7, orders(kernels)[-1])
        hidden = torch.randn(rows, SMALL[0], generator=generator).bfloat16()
        once = one_expert(kernels, expert, hidden)
        twice = run_moe(kernels, [expert], hidden, torch.zeros(rows, 2, dtype=torch.int64), torch.full((rows, 2), 0.5))
    assert torch.equal(twice, 0.5 * once + 0.5 * once)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_hidden_may_be_apart(isa: str) -> None:
    generator = torch.Generator().manual_seed(7)
    expert = random_expert(SMALL, generator)
    wide = torch.randn(9, SMALL[0] + 11, generator=generator).bfloat16()
    with open_isa(SMALL, isa) as kernels:
        strided = one_expert(kernels, expert, wide[:, 3 : 3 + SMALL[0]])
        assert torch.equal(strided, one_expert(kernels, expert, wide[:, 3 : 3 + SMALL[0]].contiguous()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(129, 41), (8, 24)], ids=["odd", "even"])
def test_nan_and_infinity_spread_as_in_torch(shape: tuple[int, int], isa: str) -> None:
    """Each row alone: a NaN stays in its row, and an infinity never reaches a neighbour through the padding."""
    generator = torch.Generator().manual_seed(8)
    expert = random_expert(shape, generator)
    hidden = torch.randn(6, shape[0], generator=generator).bfloat16()
    hidden[1, -1], hidden[2, 0], hidden[3, -1], hidden[4] = float("nan"), float("inf"), float("-inf"), 3e38
    with open_isa(shape, isa) as kernels:
        out = one_expert(kernels, expert, hidden)
    g, u = hidden.float() @ expert.gate.float().T, hidden.float() @ expert.up.float().T
    expected = (torch.nn.functional.silu(g) * u).bfloat16().float() @ expert.down.float().T
    finite = expected.isfinite().all(1)
    assert finite.tolist() == [True, False, False, False, False, True]
    assert torch.equal(out.isfinite().all(1), finite)
    assert out[1].isnan().all()
    assert torch.allclose(out[finite], expected[finite], rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("isa", ISAS)
def test_infinite_weights_stay_in_their_output(isa: str) -> None:
    expert = random_expert(SMALL, torch.Generator().manual_seed(9))
    expert.down[-1, -1] = float("inf")
    with open_isa(SMALL, isa) as kernels:
        out = one_expert(kernels, expert, torch.ones(3, SMALL[0]).bfloat16())
    assert out[:, :-1].isfinite().all()
    assert not out[:, -1].isfinite().any()
