"""llama.cpp's ggml on bf16 weights as they are in the file: `ggml_mul_mat`, and `ggml_mul_mat_id` for a layer."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

from ..kernels.contender import Contender, Weights
from ..kernels.shapes import Shape

_LIBRARY = Path(sys.prefix).parent / "peers-ggml" / "build" / "libggml_peer.so"  # beside the environment


class Peer(Contender):
    name = "ggml"
    packs = False

    def __init__(self) -> None:
        native: Any = ctypes.CDLL(str(_LIBRARY))
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        native.ggml_peer_open.argtypes = (long, long, long, long, long, ctypes.c_int)
        native.ggml_peer_open.restype = pointer
        native.ggml_peer_close.argtypes = (pointer,)
        native.ggml_peer_run.argtypes = (*[pointer] * 4, long, long, *[pointer] * 3)
        native.ggml_peer_run.restype = pointer
        self._native = native
        self._graphs: dict[tuple[int, int], int] = {}
        self._threads = 1

    def prepare(self, weights: Weights, shape: Shape, layer: bool) -> None:
        super().prepare(weights, shape, layer)
        self._inputs: dict[int, torch.Tensor] = {}

    def set_threads(self, threads: int) -> None:
        super().set_threads(threads)
        self._drop_graphs()
        self._threads = threads

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        return self._run(x, e, None, None)

    def layer(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return self._run(x, 0, ids.int(), topk_weights)

    def _run(self, x: torch.Tensor, e: int, ids: torch.Tensor | None, gates: torch.Tensor | None) -> torch.Tensor:
        tokens, hidden = x.shape
        gate_up, down = self.weights.gate_up[e], self.weights.down[e]
        top_k = 0 if ids is None else ids.shape[1]
        key = (tokens, top_k)
        if key not in self._graphs:
            self._drop_graphs()
            size = self.weights.intermediate_size
            self._graphs[key] = self._native.ggml_peer_open(
                hidden, size, self.weights.count, top_k, tokens, self._threads
            )
            self._inputs = {tokens: x.float()}  # its activations are fp32: converted once, not in every call
        up = gate_up[self.weights.intermediate_size :]
        y = self._native.ggml_peer_run(
            self._graphs[key], gate_up.data_ptr(), up.data_ptr(), down.data_ptr(), gate_up.nbytes, down.nbytes,
            self._inputs[tokens].data_ptr(), None if ids is None else ids.data_ptr(),
            None if gates is None else gates.data_ptr(),
        )  # fmt: skip
        floats = ctypes.cast(y, ctypes.POINTER(ctypes.c_float * (tokens * hidden))).contents
        return torch.frombuffer(floats, dtype=torch.float32).view(tokens, hidden)

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            self._native.ggml_peer_close(graph)
        self._graphs = {}

    def close(self) -> None:
        super().close()
        self._drop_graphs()
