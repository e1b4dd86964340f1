"""Experts on their way from a source to where they will live: the next one is read while the last is packed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from .lanes.expert import UnpackedExpert
from .orders import StoredExpert
from .plan import ModelSpec
from .weights import ExpertWeights

BUFFERS = 2
Room = StoredExpert | UnpackedExpert


def read_ahead(
    weights: ExpertWeights, order: Sequence[tuple[int, int]], room: Callable[[int, int], Room]
) -> Generator[tuple[int, int, Room]]:
    """(decoder layer, expert, its numbers) in that order; the numbers are the caller's until it asks for the next.

    room(layer, expert) says where to read to, from a thread of its own, while the caller still has the expert before.
    """

    def read(layer: int, expert: int) -> tuple[int, int, Room]:
        out = room(layer, expert)
        weights.read(layer, expert, *out.matrices, out.biases)
        return layer, expert, out

    with ThreadPoolExecutor(1, "fiddler-reader") as reader:
        coming: Future[tuple[int, int, Room]] | None = None
        for item in order:
            last, coming = coming, reader.submit(read, *item)
            if last is not None:
                yield last.result()
        if coming is not None:
            yield coming.result()


def buffers(spec: ModelSpec) -> Callable[[int, int], StoredExpert]:
    """Room for `read_ahead` in the checkpoint's order: BUFFERS experts, used in turn."""
    turn = [StoredExpert.empty(spec.expert, spec.expert_tensors) for _ in range(BUFFERS)]

    def next_buffer(_layer: int, _expert: int) -> StoredExpert:
        turn.append(turn.pop(0))
        return turn[-1]

    return next_buffer
