"""Any plan that can be written is read back the same, and has the same bytes if written twice."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_samples import FILES, sample_header, sample_model, sample_tables

from fiddler_runtime.plan import Blocking, KernelSpec, KernelVariant, PlacementSummary, Tables, read_plan, write_plan
from fiddler_runtime.plan.tensors import decode_tables, encode_tables

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def random_tables(seed: int, layers: int, experts: int, top_k: int, grid: int) -> Tables:
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.ones(experts), size=layers)

    def curve() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return np.concatenate([[0], np.cumsum(rng.exponential(10 ** rng.uniform(-3, 5), grid))]).astype(np.float32)

    return sample_tables(
        tokens=np.concatenate([[0], np.cumsum(rng.integers(1, 500, grid))]).astype(np.int32),
        cpu_us=np.cumsum([curve(), curve()], axis=0, dtype=np.float32),
        regime_shares=np.array([0.75, 0.25], np.float32),
        gpu_us=curve(),
        rest_us=curve(),
        prefetch=rng.integers(-1, experts, (layers, experts, 2)).astype(np.int16),
        scalars_us=rng.exponential(1e3, 3).astype(np.float32),
        contention=rng.random(1).astype(np.float32),
        decode_streams=rng.integers(0, np.arange(top_k + 1) + 1).astype(np.int32),
        resident=(rng.random((layers, experts)) < 0.5).astype(np.uint8),
        popularity=popularity.astype(np.float32),
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 70), st.integers(1, 60), texts, st.data())
def test_plans_survive(seed: int, layers: int, experts: int, grid: int, text: str, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, min(experts, 8)))
    hidden, intermediate = data.draw(st.integers(1, 9000)), data.draw(st.integers(1, 20000))
    tables = random_tables(seed, layers, experts, top_k, grid)
    model = sample_model(
        name=text,
        num_layers=layers + 1,
        moe_layers=tuple(range(1, layers + 1)),
        num_experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=intermediate,
        identity=data.draw(st.dictionaries(texts, texts | st.booleans() | st.floats(-1e9, 1e9), max_size=4)),
    )
    residents = int(tables.resident.sum())
    header = sample_header(
        model=model,
        kernels=KernelSpec(
            "k",
            hidden,
            intermediate,
            "silu",
            False,
            (KernelVariant("scalar", "k_scalar", Blocking(1, 1, (), 1, 1, 1), ()),),
            None,
        ),
        memory=(),
        placement=PlacementSummary(
            text, "popularity", residents, layers * experts, data.draw(st.floats(0, 1)), 0.5, {}
        ),
        assumptions=tuple(data.draw(st.lists(texts, max_size=3))),
    )
    with tempfile.TemporaryDirectory() as folder:
        first = write_plan(Path(folder, "a"), header, tables, FILES)
        second = write_plan(Path(folder, "b"), header, tables, FILES)
        read = read_plan(Path(folder, "a"))
    assert first.header == second.header == read.header
    for name, array in vars(tables).items():
        np.testing.assert_array_equal(getattr(read.tables, name), array)


@given(st.integers(0, 2**32 - 1), st.integers(0, 200), st.integers(0, 7))
def test_no_flipped_bit_of_the_tables_goes_unseen_or_crashes(seed: int, position: int, bit: int) -> None:
    """Without the hash: a flip is refused by the decoder, or shows in the values."""
    data = encode_tables(sample_tables())
    where = (position * 7 + seed) % len(data)
    damaged = bytearray(data)
    damaged[where] ^= 1 << bit
    try:
        tables = decode_tables(bytes(damaged), "tables")
    except Exception as error:
        assert type(error).__name__ == "FiddlerError"
        return
    assert encode_tables(tables) == bytes(damaged) != data
