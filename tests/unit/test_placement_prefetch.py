"""What follows what in a trace, and what to fetch ahead because of it."""

from __future__ import annotations

import numpy as np
from plan_samples import sample_model

from fiddlerc.ir import Trace
from fiddlerc.placement import make_prefetch
from fiddlerc.trace import successors

SPEC = sample_model(num_experts=4, top_k=2)


def test_pairs_by_hand() -> None:
    # Two sequences; token by token the choices in layer 0 and in layer 1.
    experts = np.array([[[0, 1], [2, 3]], [[0, 2], [2, 1]], [[3, 1], [0, 1]]], np.uint16)
    trace = Trace(
        SPEC.fingerprint, "sample", "made up", np.zeros((2, 2, 4), np.int64), experts,
        np.array([0, 0, 1], np.int32), np.array([0, 1, 0], np.int32), np.zeros(3, np.uint8),
    )  # fmt: skip
    follows = successors(trace, SPEC)
    assert follows is not None
    assert follows[0].tolist() == [[0, 1, 2, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    # From the last layer to the next token's first, within a sequence.
    assert follows[1].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    nobody = np.zeros((2, 4), bool)
    table = make_prefetch(follows, nobody)
    assert table[0].tolist() == [[2, 1], [-1, -1], [-1, -1], [0, 1]]
    assert table[1].tolist() == [[-1, -1], [-1, -1], [0, 2], [-1, -1]]
    # A resident expert needs no fetching.
    home = nobody.copy()
    home[1, 2] = True
    assert make_prefetch(follows, home)[0].tolist() == [[1, 3], [-1, -1], [-1, -1], [0, 1]]


def test_nothing_known_nothing_fetched() -> None:
    assert successors(None, SPEC) is None
    assert (make_prefetch(None, np.zeros((2, 4), bool)) == -1).all()
    one = np.zeros((1, 1, 1), np.int32)
    assert make_prefetch(one, np.zeros((1, 1), bool)).tolist() == [[[-1, -1]]]
