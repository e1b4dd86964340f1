"""Sizes read from config.json, and what follows from them: tensor shapes and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fiddler_runtime.errors import FiddlerError

from .architectures import Architecture
from .config import Config

_BF16 = 2
_FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """A model's numbers, in the field's usual names. dense_size is the intermediate size of layers without experts."""

    row: Architecture
    vocab: int
    hidden: int
    layers: int
    moe_layers: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    intermediate: int
    dense_size: int
    max_context: int
    tied_embeddings: bool
    attention_bias: bool
    lm_head_bias: bool

    @property
    def query(self) -> int:
        """Elements of all query heads."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Elements of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, bf16."""
        return 2 * self.layers * self.key_value * _BF16

    @property
    def workspace_bytes_per_token(self) -> int:
        """An upper bound of the activations that live at once while one token is processed.

        The residual stream, its normed copy and the layer's result (bf16, and fp32 where experts are summed): 10 H.
        Attention's queries, keys, values and result: 2 (2 Q + 2 KV). Router logits and probabilities in fp32, ids and
        weights: 8 E + 12 k. One expert with the token at a time (gathered input, gate and up, their product, output in
        fp32): 6 H + 6 I; a dense layer likewise. The logits in bf16 and fp32: 6 V.
        """
        attention = _BF16 * (2 * self.query + 2 * self.key_value)
        router = 2 * _FP32 * self.experts + 12 * self.top_k
        expert = 6 * self.hidden + 6 * max(self.intermediate, self.dense_size)
        return 10 * self.hidden + attention + router + expert + 6 * self.vocab

    @property
    def non_expert_bytes(self) -> int:
        """Everything but the routed experts, bf16; tied embeddings once."""
        return _BF16 * sum(math.prod(shape) for shape in self.non_expert_tensors().values())

    def non_expert_tensors(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint name -> shape of every tensor that is not a routed expert's."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer(layer).items()}
        shapes |= self._norm("model.norm")
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        if self.lm_head_bias:
            shapes["lm_head.bias"] = (self.vocab,)
        return shapes

    def _layer(self, layer: int) -> dict[str, tuple[int, ...]]:
        shapes = self._norm("input_layernorm") | self._norm("post_attention_layernorm")
        outputs = {"q": self.query, "k": self.key_value, "v": self.key_value, "o": self.hidden}
        for name, size in outputs.items():
            shapes[f"self_attn.{name}_proj.weight"] = (size, self.query if name == "o" else self.hidden)
            if self.attention_bias:
                shapes[f"self_attn.{name}_proj.bias"] = (size,)
        if self.row.qk_norm != "none":
            full = self.row.qk_norm == "full"
            shapes["self_attn.q_norm.weight"] = (self.query if full else self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.key_value if full else self.head_dim,)
        if layer in self.moe_layers:
            shapes[f"{self.row.moe}.gate.weight"] = (self.experts, self.hidden)
        else:
            shapes["mlp.gate_proj.weight"] = (self.dense_size, self.hidden)
            shapes["mlp.up_proj.weight"] = (self.dense_size, self.hidden)
            shapes["mlp.down_proj.weight"] = (self.hidden, self.dense_size)
        return shapes

    def _norm(self, name: str) -> dict[str, tuple[int, ...]]:
        parts = ("weight", "bias") if self.row.norm_bias else ("weight",)
        return {f"{name}.{part}": (self.hidden,) for part in parts}


def read_sizes(row: Architecture, config: Config) -> Sizes:
    """Raises FiddlerError for a key that is missing, of another type, or at odds with the others."""
    activation = config.text("hidden_act")
    if activation != "silu":
        raise FiddlerError(
            f"an activation that is not supported in {config.where}",
            found=f"hidden_act = {activation}",
            expected="silu",
        )
    hidden, heads, layers = (config.size(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if config.values.get("head_dim") is None and hidden % heads:
        raise config.wrong("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}, or head_dim")
    head_dim = config.size("head_dim", default=hidden // heads)
    # Absent is an error, since every family has another default; null means one per query head.
    kv_heads = heads if _is_null(config, "num_key_value_heads") else config.size("num_key_value_heads")
    experts, top_k = config.size(row.num_experts), config.size("num_experts_per_tok")
    if top_k > experts:
        raise config.wrong("num_experts_per_tok", top_k, f"at most {row.num_experts} = {experts}")
    moe_layers = _moe_layers(row, config, layers)
    return Sizes(
        row=row,
        vocab=config.size("vocab_size"),
        hidden=hidden,
        layers=layers,
        moe_layers=moe_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=experts,
        top_k=top_k,
        intermediate=config.size(row.intermediate_size),
        dense_size=config.size("intermediate_size") if len(moe_layers) < layers else 0,
        max_context=config.size("max_position_embeddings"),
        tied_embeddings=config.flag("tie_word_embeddings"),
        attention_bias=row.attention_bias and config.flag("attention_bias"),
        lm_head_bias=row.lm_head_bias and config.flag("lm_head_bias"),
    )


def _moe_layers(row: Architecture, config: Config, layers: int) -> tuple[int, ...]:
    if not row.sparse_step:
        return tuple(range(layers))
    step, dense = config.size("decoder_sparse_step", default=1), config.layers("mlp_only_layers")
    chosen = tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
    if not chosen:
        raise config.wrong("mlp_only_layers", list(dense), "at least one layer with experts")
    return chosen


def _is_null(config: Config, key: str) -> bool:
    return key in config.values and config.values[key] is None
