"""The model families, one row each: which config.json keys hold the sizes, and what the tensors are called on disk.

A row describes everything in the model, not the experts alone: the memory that is left for experts depends on the rest.
Adding a family that differs only in names and sizes is adding a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fiddlerc.ir import ExpertTensors


@dataclass(frozen=True)
class Architecture:
    """One family.

    model_type          config.json's name of it
    class_name          the transformers class
    other_class_names   what published config.json files also say under "architectures"
    num_experts         config.json key of the number of experts per layer
    intermediate_size   config.json key of an expert's intermediate size
    moe                 on disk, the module below model.layers.N that holds router and experts
    expert              names of an expert's gate, up and down projection
    qk_norm             norms of queries and keys: none, one weight per head element, or one per projected element
    attention_bias      whether config.json's attention_bias gives the four attention projections biases
    norm_bias           whether the norms have biases (LayerNorm, not RMSNorm)
    lm_head_bias        whether config.json's lm_head_bias gives the output projection a bias
    sparse_step         whether decoder_sparse_step and mlp_only_layers say which layers have experts; else all have
    """

    model_type: str
    class_name: str
    other_class_names: tuple[str, ...]
    num_experts: str
    intermediate_size: str
    moe: str
    expert: tuple[str, str, str]
    qk_norm: Literal["none", "head", "full"]
    attention_bias: bool
    norm_bias: bool
    lm_head_bias: bool
    sparse_step: bool

    @property
    def expert_tensors(self) -> ExpertTensors:
        """Checkpoint names of one expert's matrices."""
        gate, up, down = (f"model.layers.{{layer}}.{self.moe}.experts.{{expert}}.{n}.weight" for n in self.expert)
        return ExpertTensors(gate, up, down)


ARCHITECTURES = (
    Architecture(
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        other_class_names=(),
        num_experts="num_local_experts",
        intermediate_size="intermediate_size",
        moe="block_sparse_moe",
        expert=("w1", "w3", "w2"),
        qk_norm="none",
        attention_bias=False,
        norm_bias=False,
        lm_head_bias=False,
        sparse_step=False,
    ),
    Architecture(
        model_type="phimoe",
        class_name="PhimoeForCausalLM",
        # Microsoft's own modelling code spells it so, and so does the published config.json.
        other_class_names=("PhiMoEForCausalLM",),
        num_experts="num_local_experts",
        intermediate_size="intermediate_size",
        moe="block_sparse_moe",
        expert=("w1", "w3", "w2"),
        qk_norm="none",
        attention_bias=True,
        norm_bias=True,
        lm_head_bias=True,
        sparse_step=False,
    ),
    Architecture(
        model_type="olmoe",
        class_name="OlmoeForCausalLM",
        other_class_names=(),
        num_experts="num_experts",
        intermediate_size="intermediate_size",
        moe="mlp",
        expert=("gate_proj", "up_proj", "down_proj"),
        qk_norm="full",
        attention_bias=True,
        norm_bias=False,
        lm_head_bias=False,
        sparse_step=False,
    ),
    Architecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        other_class_names=(),
        num_experts="num_experts",
        intermediate_size="moe_intermediate_size",
        moe="mlp",
        expert=("gate_proj", "up_proj", "down_proj"),
        qk_norm="head",
        attention_bias=True,
        norm_bias=False,
        lm_head_bias=False,
        sparse_step=True,
    ),
)
