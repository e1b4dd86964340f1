"""The model families, one row each: which config.json keys hold the sizes, and what the tensors are called on disk.

A row describes everything in the model, not the experts alone: the memory that is left for experts depends on the rest.
Adding a family that differs only in names, sizes and known parts is adding a row. Families without a row are read
through transformers (discovery.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fiddlerc.ir import ExpertTensors

Tensors = Mapping[str, str]
"""Name -> shape, as names of sizes (sizes.py, `_dimensions`)."""

NORMS = {"input_layernorm.weight": "hidden", "post_attention_layernorm.weight": "hidden"}
NORM_BIASES = {"input_layernorm.bias": "hidden", "post_attention_layernorm.bias": "hidden"}
GQA = {
    "self_attn.q_proj.weight": "query hidden",
    "self_attn.k_proj.weight": "key_value hidden",
    "self_attn.v_proj.weight": "key_value hidden",
    "self_attn.o_proj.weight": "hidden query",
}
QKV_BIASES = {
    "self_attn.q_proj.bias": "query",
    "self_attn.k_proj.bias": "key_value",
    "self_attn.v_proj.bias": "key_value",
}
O_BIAS = {"self_attn.o_proj.bias": "hidden"}
HEAD_NORMS = {"self_attn.q_norm.weight": "head_dim", "self_attn.k_norm.weight": "head_dim"}
FULL_NORMS = {"self_attn.q_norm.weight": "query", "self_attn.k_norm.weight": "key_value"}
MLA = {
    "self_attn.kv_a_proj_with_mqa.weight": "latent hidden",
    "self_attn.kv_a_layernorm.weight": "kv_lora_rank",
    "self_attn.kv_b_proj.weight": "expanded kv_lora_rank",
    "self_attn.o_proj.weight": "hidden value",
}
MLA_QUERY = {"self_attn.q_proj.weight": "query hidden"}
MLA_LOW_RANK_QUERY = {
    "self_attn.q_a_proj.weight": "q_lora_rank hidden",
    "self_attn.q_a_layernorm.weight": "q_lora_rank",
    "self_attn.q_b_proj.weight": "query q_lora_rank",
}
MLA_BIASES = {"self_attn.kv_a_proj_with_mqa.bias": "latent", "self_attn.o_proj.bias": "hidden"}
MLA_LOW_RANK_QUERY_BIAS = {"self_attn.q_a_proj.bias": "q_lora_rank"}
EMBEDDINGS = {"model.embed_tokens.weight": "vocab hidden", "model.norm.weight": "hidden"}
HEAD = {"lm_head.weight": "vocab hidden"}


def _swiglu(module: str, size: str) -> dict[str, str]:
    """A gated MLP of that intermediate size."""
    wide, narrow = f"{size} hidden", f"hidden {size}"
    return {f"{module}.gate_proj.weight": wide, f"{module}.up_proj.weight": wide, f"{module}.down_proj.weight": narrow}


def _each(module: str, gate: str, up: str, down: str) -> ExpertTensors:
    """Experts with matrices of their own, [outputs, inputs]."""
    gate, up, down = (f"model.layers.{{layer}}.{module}.experts.{{expert}}.{part}.weight" for part in (gate, up, down))
    return ExpertTensors(gate, up, down)


W123 = _each("block_sparse_moe", "w1", "w3", "w2")
PROJ = _each("mlp", "gate_proj", "up_proj", "down_proj")
DENSE = _swiglu("mlp", "dense")
SPARSE_ROUTER = {"block_sparse_moe.gate.weight": "experts hidden"}
ROUTER = {"mlp.gate.weight": "experts hidden"}
CORRECTION = {"mlp.gate.e_score_correction_bias": "experts"}
SHARED = _swiglu("mlp.shared_experts", "shared")


@dataclass(frozen=True)
class Architecture:
    """One family.

    title           its name, for people
    model_types     config.json's names of it; the first is transformers'
    class_names     of the model, as config.json's "architectures" has it; the first is transformers'
    experts, intermediate  config.json keys: experts per layer, an expert's intermediate size
    tensors         where an expert's numbers are
    routing         how experts are chosen, for people
    layer           other tensors of every layer, below model.layers.N
    moe, dense      and of a layer with, and one without experts
    optional        further ones of every layer, of MoE layers and of the model where config.json's keys (all of them)
                    are true, or false after a "!": (keys, layer, moe, model)
    model           tensors outside the layers
    activation      hidden_act is config.json's key; anything else is what experts always compute
    attention       gqa keeps keys and values; mla one latent vector and one rotary key
    dense_layers    which layers have no experts: none, as decoder_sparse_step and mlp_only_layers say, or the first
                    first_k_dense_replace
    window          which layers attend to sliding_window tokens only, if config.json has no layer_types
    shared          config.json key whose value is the shared experts' intermediate size, or their number
    defaults        values of keys that published files leave out
    fixed           keys that must have these values where they are present
    """

    title: str
    model_types: tuple[str, ...]
    class_names: tuple[str, ...]
    experts: str
    intermediate: str
    tensors: ExpertTensors
    routing: str
    layer: Tensors
    moe: Tensors
    dense: Tensors
    optional: tuple[tuple[str, Tensors, Tensors, Tensors], ...] = ()
    model: Tensors = field(default_factory=lambda: EMBEDDINGS)
    activation: Literal["hidden_act", "gptoss"] = "hidden_act"
    attention: Literal["gqa", "mla"] = "gqa"
    dense_layers: Literal["none", "sparse_step", "first_k"] = "none"
    window: Literal["none", "all", "alternate"] = "none"
    shared: str = ""
    defaults: Mapping[str, object] = field(default_factory=dict)
    fixed: Mapping[str, object] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """transformers' name of it."""
        return self.model_types[0]

    @property
    def class_name(self) -> str:
        """The transformers class."""
        return self.class_names[0]


UNTIED: tuple[str, Tensors, Tensors, Tensors] = ("!tie_word_embeddings", {}, {}, HEAD)

ARCHITECTURES = (
    Architecture(
        title="Mixtral",
        model_types=("mixtral",),
        class_names=("MixtralForCausalLM",),
        experts="num_local_experts",
        intermediate="intermediate_size",
        tensors=W123,
        routing="softmax, top-k, renormalised",
        layer=NORMS | GQA,
        moe=SPARSE_ROUTER,
        dense={},
        optional=(UNTIED,),
        window="all",
    ),
    Architecture(
        title="Phi-3.5-MoE",
        model_types=("phimoe",),
        # Microsoft's own modelling code spells it in the second way, and so does the published config.json.
        class_names=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
        experts="num_local_experts",
        intermediate="intermediate_size",
        tensors=W123,
        routing="sparsemixer, two experts one after the other",
        layer=NORMS | NORM_BIASES | GQA,
        moe=SPARSE_ROUTER,
        dense={},
        optional=(
            UNTIED,
            ("attention_bias", QKV_BIASES | O_BIAS, {}, {}),
            ("lm_head_bias", {}, {}, {"lm_head.bias": "vocab"}),
        ),
        model=EMBEDDINGS | {"model.norm.bias": "hidden"},
        window="all",
    ),
    Architecture(
        title="OLMoE",
        model_types=("olmoe",),
        class_names=("OlmoeForCausalLM",),
        experts="num_experts",
        intermediate="intermediate_size",
        tensors=PROJ,
        routing="softmax, top-k, renormalised if norm_topk_prob",
        layer=NORMS | GQA | FULL_NORMS,
        moe=ROUTER,
        dense={},
        optional=(UNTIED, ("attention_bias", QKV_BIASES | O_BIAS, {}, {})),
    ),
    Architecture(
        title="Qwen2-MoE",
        model_types=("qwen2_moe",),
        class_names=("Qwen2MoeForCausalLM",),
        experts="num_experts",
        intermediate="moe_intermediate_size",
        tensors=PROJ,
        routing="softmax, top-k, renormalised if norm_topk_prob",
        layer=NORMS | GQA,
        moe=ROUTER | _swiglu("mlp.shared_expert", "shared") | {"mlp.shared_expert_gate.weight": "one hidden"},
        dense=DENSE,
        optional=(UNTIED, ("qkv_bias", QKV_BIASES, {}, {})),
        dense_layers="sparse_step",
        window="alternate",
        shared="shared_expert_intermediate_size",
        defaults={"qkv_bias": True, "use_sliding_window": False},
    ),
    Architecture(
        title="Qwen3-MoE",
        model_types=("qwen3_moe",),
        class_names=("Qwen3MoeForCausalLM",),
        experts="num_experts",
        intermediate="moe_intermediate_size",
        tensors=PROJ,
        routing="softmax, top-k, renormalised if norm_topk_prob",
        layer=NORMS | GQA | HEAD_NORMS,
        moe=ROUTER,
        dense=DENSE,
        optional=(UNTIED, ("attention_bias", QKV_BIASES | O_BIAS, {}, {})),
        dense_layers="sparse_step",
        window="all",
        defaults={"use_sliding_window": False},
    ),
    Architecture(
        title="DeepSeek-V2",
        model_types=("deepseek_v2",),
        class_names=("DeepseekV2ForCausalLM",),
        experts="n_routed_experts",
        intermediate="moe_intermediate_size",
        tensors=PROJ,
        routing="softmax, top-k (in groups), scaled",
        layer=NORMS | MLA,
        moe=ROUTER,
        dense=DENSE,
        optional=(
            UNTIED,
            ("q_lora_rank", MLA_LOW_RANK_QUERY, {}, {}),
            ("!q_lora_rank", MLA_QUERY, {}, {}),
            ("attention_bias", MLA_BIASES, {}, {}),
            ("attention_bias q_lora_rank", MLA_LOW_RANK_QUERY_BIAS, {}, {}),
            ("n_shared_experts", {}, SHARED, {}),
        ),
        attention="mla",
        dense_layers="first_k",
        shared="n_shared_experts",
        fixed={"moe_layer_freq": 1},
    ),
    Architecture(
        title="DeepSeek-V3, DeepSeek-R1, Kimi-K2",
        model_types=("deepseek_v3", "kimi_k2"),
        class_names=("DeepseekV3ForCausalLM",),
        experts="n_routed_experts",
        intermediate="moe_intermediate_size",
        tensors=PROJ,
        routing="sigmoid, corrected for the choice, top-k in groups, renormalised, scaled",
        layer=NORMS | MLA,
        moe=ROUTER | CORRECTION | SHARED,
        dense=DENSE,
        optional=(
            UNTIED,
            ("q_lora_rank", MLA_LOW_RANK_QUERY, {}, {}),
            ("!q_lora_rank", MLA_QUERY, {}, {}),
            ("attention_bias", MLA_BIASES, {}, {}),
            ("attention_bias q_lora_rank", MLA_LOW_RANK_QUERY_BIAS, {}, {}),
        ),
        attention="mla",
        dense_layers="first_k",
        shared="n_shared_experts",
        fixed={"moe_layer_freq": 1},
    ),
    Architecture(
        title="gpt-oss",
        model_types=("gpt_oss",),
        class_names=("GptOssForCausalLM",),
        experts="num_local_experts",
        intermediate="intermediate_size",
        tensors=ExpertTensors(
            gate="model.layers.{layer}.mlp.experts.gate_up_proj",
            up="model.layers.{layer}.mlp.experts.gate_up_proj",
            down="model.layers.{layer}.mlp.experts.down_proj",
            gate_bias="model.layers.{layer}.mlp.experts.gate_up_proj_bias",
            up_bias="model.layers.{layer}.mlp.experts.gate_up_proj_bias",
            down_bias="model.layers.{layer}.mlp.experts.down_proj_bias",
            transposed=True,
            interleaved=True,
        ),
        routing="top-k of the logits, softmax over those",
        layer=NORMS | GQA | {"self_attn.sinks": "heads"},
        moe={"mlp.router.weight": "experts hidden", "mlp.router.bias": "experts"},
        dense={},
        optional=(UNTIED, ("attention_bias", QKV_BIASES | O_BIAS, {}, {})),
        activation="gptoss",
        window="alternate",
        defaults={"attention_bias": True},
        fixed={"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    ),
    Architecture(
        title="Granite-MoE",
        model_types=("granitemoe",),
        class_names=("GraniteMoeForCausalLM",),
        experts="num_local_experts",
        intermediate="intermediate_size",
        tensors=ExpertTensors(
            gate="model.layers.{layer}.block_sparse_moe.input_linear.weight",
            up="model.layers.{layer}.block_sparse_moe.input_linear.weight",
            down="model.layers.{layer}.block_sparse_moe.output_linear.weight",
        ),
        routing="top-k of the logits, softmax over those",
        layer=NORMS | GQA,
        moe={"block_sparse_moe.router.layer.weight": "experts hidden"},
        dense={},
        optional=(UNTIED, ("attention_bias", QKV_BIASES | O_BIAS, {}, {})),
    ),
    Architecture(
        title="GLM-4.5-MoE",
        model_types=("glm4_moe",),
        class_names=("Glm4MoeForCausalLM",),
        experts="n_routed_experts",
        intermediate="moe_intermediate_size",
        tensors=PROJ,
        routing="sigmoid, corrected for the choice, top-k in groups, renormalised, scaled",
        layer=NORMS | GQA,
        moe=ROUTER | CORRECTION | SHARED,
        dense=DENSE,
        optional=(UNTIED, ("attention_bias", QKV_BIASES, {}, {}), ("use_qk_norm", HEAD_NORMS, {}, {})),
        dense_layers="first_k",
        shared="n_shared_experts",
    ),
    Architecture(
        title="MiniMax-M2",
        model_types=("minimax_m2",),
        class_names=("MiniMaxM2ForCausalLM",),
        experts="num_local_experts",
        intermediate="intermediate_size",
        tensors=W123,
        routing="sigmoid, corrected for the choice, top-k, renormalised",
        layer=NORMS | GQA | FULL_NORMS,
        moe=SPARSE_ROUTER | {"block_sparse_moe.e_score_correction_bias": "experts"},
        dense={},
        optional=(UNTIED,),
    ),
)
