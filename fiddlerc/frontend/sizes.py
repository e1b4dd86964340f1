"""Sizes read from config.json, and what follows from them: tensor shapes and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fiddler_runtime.errors import FiddlerError
from fiddlerc.ir import Activation

from .architectures import Architecture, Tensors
from .config import Config

_BF16 = 2
_FP32 = 4
ACTIVATION_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""transformers' names of activation functions (hidden_act) to ours."""


@dataclass(frozen=True)
class Cache:
    """A sequence's cache, in bytes: of each token in layers that keep all, and in those that keep a window of them."""

    bytes_per_token: int
    window: int
    window_bytes_per_token: int


@dataclass(frozen=True)
class Sizes:
    """A model's numbers. dimensions: what the names of the row's shapes stand for."""

    row: Architecture
    config: Config
    activation: Activation
    layers: int
    moe_layers: tuple[int, ...]
    window_layers: tuple[int, ...]
    window: int
    top_k: int
    max_context: int
    dimensions: dict[str, int]

    def __getitem__(self, name: str) -> int:
        return self.dimensions[name]

    @property
    def cache(self) -> Cache:
        """bf16, as transformers keeps it."""
        latent = self.row.attention == "mla"
        layer = _BF16 * (self["latent"] if latent else 2 * self["key_value"])
        windowed = len(self.window_layers)
        return Cache((self.layers - windowed) * layer, self.window, windowed * layer)

    @property
    def expanded_bytes_per_token(self) -> int:
        """Keys and values that attention makes anew of every cached latent vector, one layer at a time."""
        return _BF16 * (self["query"] + self["value"]) if self.row.attention == "mla" else 0

    @property
    def workspace_bytes_per_token(self) -> int:
        """An upper bound of the activations that live at once while one token is processed.

        The residual stream, its normed copy and the layer's result (bf16, and fp32 where experts are summed): 10 H.
        Attention's queries, keys, values and result: 2 (2 Q + 2 KV). Router logits and probabilities in fp32, ids and
        weights: 8 E + 12 k. One expert with the token at a time (gathered input, gate and up, their product, output in
        fp32): 6 H + 6 I; a dense layer or the shared experts likewise. The logits in bf16 and fp32: 6 V.
        """
        d = self.dimensions
        attention = _BF16 * (2 * d["query"] + 2 * d["key_value"])
        router = 2 * _FP32 * d["experts"] + 12 * self.top_k
        expert = 6 * d["hidden"] + 6 * max(d["intermediate"], d["dense"], d["shared"])
        return 10 * d["hidden"] + attention + router + expert + 6 * d["vocab"]

    @property
    def non_expert_bytes(self) -> int:
        """Everything but the routed experts, bf16; tied embeddings once."""
        return _BF16 * sum(math.prod(shape) for shape in self.non_expert_tensors().values())

    def non_expert_tensors(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint name -> shape of every tensor that is not a routed expert's."""
        shapes = dict(self._shapes("", self.row.model, *(model for _, _, model in self._optional())))
        for layer in range(self.layers):
            sparse = layer in self.moe_layers
            parts = [self.row.layer, self.row.moe if sparse else self.row.dense]
            for of_layer, of_moe, _ in self._optional():
                parts += [of_layer, of_moe] if sparse else [of_layer]
            shapes |= self._shapes(f"model.layers.{layer}.", *parts)
        return shapes

    def _optional(self) -> Iterator[tuple[Tensors, Tensors, Tensors]]:
        """The optional tensors that config.json switches on."""
        for condition, *tensors in self.row.optional:
            if all(bool(self.config.given(key.lstrip("!"))) != key.startswith("!") for key in condition.split()):
                yield tensors[0], tensors[1], tensors[2]

    def _shapes(self, prefix: str, *parts: Tensors) -> Iterator[tuple[str, tuple[int, ...]]]:
        for tensors in parts:
            for name, shape in tensors.items():
                yield prefix + name, tuple(self.dimensions[size] for size in shape.split())


def read_sizes(row: Architecture, config: Config) -> Sizes:
    """Raises FiddlerError for a key that is missing, of another type, or at odds with the others."""
    config = config.with_defaults(row.defaults)
    for key, value in row.fixed.items():
        if config.given(key) not in (None, value):
            raise config.wrong(key, config.given(key), f"{value}, the only value that is supported")
    for key in {key.lstrip("!") for condition, *_ in row.optional for key in condition.split()} - _NUMBERS:
        config.flag(key)
    layers = config.size("num_hidden_layers")
    experts, top_k = config.size(row.experts), config.size("num_experts_per_tok")
    if top_k > experts:
        raise config.wrong("num_experts_per_tok", top_k, f"at most {row.experts} = {experts}")
    moe_layers = _moe_layers(row, config, layers)
    window_layers = _window_layers(row, config, layers)
    return Sizes(
        row=row,
        config=config,
        activation=_activation(row, config),
        layers=layers,
        moe_layers=moe_layers,
        window_layers=window_layers,
        window=config.size("sliding_window") if window_layers else 0,
        top_k=top_k,
        max_context=config.size("max_position_embeddings"),
        dimensions=_dimensions(row, config, experts, dense=len(moe_layers) < layers),
    )


_NUMBERS = {"q_lora_rank", "n_shared_experts"}


def _dimensions(row: Architecture, config: Config, experts: int, *, dense: bool) -> dict[str, int]:
    """What the sizes in a row's shapes stand for."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    intermediate = config.size(row.intermediate)
    found = {
        "one": 1,
        "vocab": config.size("vocab_size"),
        "hidden": hidden,
        "heads": heads,
        "experts": experts,
        "intermediate": intermediate,
        "dense": config.size("intermediate_size") if dense else 0,
        "shared": _shared(row, config, intermediate),
    }
    if row.attention == "mla":
        nope, rope, value = (config.size(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        rank = config.size("kv_lora_rank")
        found |= {
            "query": heads * (nope + rope),  # of all heads
            "value": heads * value,
            "key_value": heads * (nope + rope),
            "q_lora_rank": config.size("q_lora_rank") if config.given("q_lora_rank") is not None else 0,
            "kv_lora_rank": rank,
            "latent": rank + rope,
            "expanded": heads * (nope + value),
        }
    else:
        if config.given("head_dim") is None and hidden % heads:
            raise config.wrong("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}, or head_dim")
        head_dim = config.size("head_dim", default=hidden // heads)
        # Absent is an error, since every family has another default; null means one per query head.
        kv_heads = heads if config.is_null("num_key_value_heads") else config.size("num_key_value_heads")
        found |= {"head_dim": head_dim, "query": heads * head_dim, "key_value": kv_heads * head_dim}
    return found


def _shared(row: Architecture, config: Config, intermediate: int) -> int:
    """The shared experts' intermediate size, all of them together; 0 without."""
    if not row.shared or config.given(row.shared) in (None, 0):
        return 0
    value = config.size(row.shared)
    return value * intermediate if row.shared == "n_shared_experts" else value


def _activation(row: Architecture, config: Config) -> Activation:
    name = config.text("hidden_act")
    if row.activation != "hidden_act":
        return row.activation
    if name not in ACTIVATION_NAMES:
        raise FiddlerError(
            f"an activation that is not supported in {config.where}",
            found=f"hidden_act = {name}",
            expected="one of " + ", ".join(ACTIVATION_NAMES),
        )
    return ACTIVATION_NAMES[name]


def _moe_layers(row: Architecture, config: Config, layers: int) -> tuple[int, ...]:
    if row.dense_layers == "none":
        return tuple(range(layers))
    if row.dense_layers == "first_k":
        first = config.count("first_k_dense_replace")
        if first >= layers:
            raise config.wrong("first_k_dense_replace", first, f"less than num_hidden_layers = {layers}")
        return tuple(range(first, layers))
    step, dense = config.size("decoder_sparse_step", default=1), config.layers("mlp_only_layers")
    chosen = tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
    if not chosen:
        raise config.wrong("mlp_only_layers", list(dense), "at least one layer with experts")
    return chosen


def _window_layers(row: Architecture, config: Config, layers: int) -> tuple[int, ...]:
    """Layers that attend to the last sliding_window tokens only."""
    if row.window == "none" or config.given("sliding_window") in (None, 0):
        return ()
    if config.given("use_sliding_window") is False:
        return ()
    types = config.given("layer_types")
    if types is None:
        step = 1 if row.window == "all" else 2
        most = config.size("max_window_layers", default=layers)
        return tuple(range(0, min(layers, most), step))
    if not isinstance(types, list) or len(types) != layers:
        raise config.wrong("layer_types", types, f"a list of {layers}")
    return tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")
