"""Families without a row of their own: what transformers' model classes tell about experts, sizes and caches.

Works for every causal language model whose experts go through transformers' experts registry. The model is built on the
meta device: shapes without memory. Needs transformers; raises FiddlerError naming what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fiddler_runtime.checkpoint import config_value
from fiddler_runtime.errors import FiddlerError, install
from fiddler_runtime.hf import layer_of
from fiddler_runtime.lanes.expert import activate
from fiddlerc.ir import ACTIVATIONS, Activation, ExpertTensors, ModelSpec

_BF16 = 2
# Sizes that another model would differ in, as far as config.json has them: what a plan is bound to.
_IDENTITY = (
    "model_type", "hidden_act", "hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size",
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "num_experts_per_tok", "moe_topk", "moe_k",
)  # fmt: skip


def discover(model_dir: Path, values: Mapping[str, Any], *, name: str) -> ModelSpec:
    """A directory's config.json, whose values are `values`, to a ModelSpec, through transformers.

    Raises FiddlerError: no transformers, an architecture that it does not know or whose experts it does not register,
    experts that compute or are stored in a way that the kernels do not know.
    """
    transformers = _import_transformers(values)
    with _quiet(transformers):
        model = _build(transformers, values, model_dir)
        experts = _experts_of(model)
        layers = tuple(sorted(experts))
        first = experts[layers[0]]
        _check_form(model, list(experts.values()))
        tensors = _where_on_disk(model, first)
        expert_parameters = {id(p) for module in experts.values() for p in module.parameters()}
        everything = [*model.parameters(), *_persistent_buffers(model)]
        others = sum(t.numel() for t in everything if id(t) not in expert_parameters)
        rows, width = _sizes(first)
        activation = _activation_of(model, first)
        biases, num_experts = bool(first.has_bias), int(first.gate_up_proj.shape[0])
        run = _run(model, experts)
    config = model.config
    return ModelSpec(
        name=name,
        architecture=type(model).__name__,
        num_layers=config.num_hidden_layers,
        moe_layers=layers,
        num_experts=num_experts,
        top_k=run.top_k,
        hidden_size=width,
        intermediate_size=rows,
        activation=activation,
        expert_bias=biases,
        vocab_size=config.vocab_size,
        max_context=getattr(config, "max_position_embeddings", None) or 1 << 20,
        expert_tensors=tensors,
        identity={
            key: found for key in _IDENTITY if isinstance(found := config_value(values, key), (str, int, float, bool))
        },
        non_expert_bytes=_BF16 * others,
        kv_bytes_per_token=run.kv_bytes_per_token,
        workspace_bytes_per_token=_workspace(model, run.top_k, num_experts, rows, width),
        window=run.window,
        window_kv_bytes_per_token=run.window_kv_bytes_per_token,
        state_bytes=run.state_bytes,
        expanded_bytes_per_token=_expanded(model),
    )


def _import_transformers(values: Mapping[str, Any]) -> Any:
    try:
        import transformers
    except ImportError:
        raise FiddlerError(
            "this architecture is not built in and cannot be looked up",
            found=f"model_type {values.get('model_type')}, and no transformers",
            expected="transformers, which knows more architectures",
            hint=install("hf"),
        ) from None
    return transformers


def _build(transformers: Any, values: Mapping[str, Any], model_dir: Path) -> Any:
    """The model on the meta device, in bf16."""
    model_type = values.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise FiddlerError(
            f"unknown architecture in {model_dir / 'config.json'}",
            found=f"model_type {model_type}",
            expected="a model type that fiddlerc or the installed transformers knows",
            hint="docs/models.md lists what is supported; a newer transformers may know it",
        )
    what = f"model_type {model_type}"
    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise _refused(what, "writes no text, or not from text alone", "a causal language model")
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="eager"
            ).eval()
    except FiddlerError:
        raise
    except Exception as error:  # whatever a configuration's or a model's code raises
        found = f"cannot be built by transformers ({type(error).__name__}: {str(error)[:200]})"
        raise _refused(what, found, "a whole config.json") from None


def _experts_of(model: Any) -> dict[int, Any]:
    """Layer -> the module that transformers' experts registry decorates."""
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if not hasattr(module, "is_concatenated"):
            continue
        layer = layer_of(name)
        if layer is None or layer in found:
            raise _refused(type(model).__name__, f"has experts at {name}", "one experts module in each of its layers")
        found[layer] = module
    if not found:
        raise _refused(
            type(model).__name__,
            "has no experts that go through transformers' experts registry",
            "a Mixture-of-Experts model whose experts do",
        )
    return found


def _check_form(model: Any, modules: list[Any]) -> None:
    """Raises FiddlerError for experts whose form the kernels do not have."""
    what, first = type(model).__name__, modules[0]
    if not first.has_gate:
        raise _refused(
            what, "has experts without a gate (up and down projections only)", "experts with gate, up and down"
        )
    if getattr(first, "has_post_expert_norm", False):
        raise _refused(what, "norms the result of each expert", "experts that end with the down projection")
    shapes = {tuple((name, tuple(p.shape)) for name, p in module.named_parameters()) for module in modules}
    wanted = {"gate_up_proj", "down_proj"} | ({"gate_up_proj_bias", "down_proj_bias"} if first.has_bias else set())
    names = {name for name, _ in next(iter(shapes))}
    if len(shapes) > 1:
        raise _refused(what, "has experts of several sizes", "experts of one size in all layers")
    if names != wanted:
        raise _refused(what, f"has experts with {', '.join(sorted(names))}", ", ".join(sorted(wanted)))


def _sizes(experts: Any) -> tuple[int, int]:
    """(intermediate size, hidden size)."""
    _, a, b = experts.down_proj.shape
    return (a, b) if experts.is_transposed else (b, a)


def _activation_of(model: Any, experts: Any) -> Activation:
    """Which of ours the module computes, found out by computing: a class may override the registry's _apply_gate."""
    # Beyond any limit that a class may set.
    points = torch.cat([torch.linspace(-9, 9, 37), torch.tensor([12.0, 25.0, 60.0, 300.0, 3000.0])])
    gate, up = torch.cartesian_prod(torch.cat([points, -points]), torch.cat([points, -points])).T
    both = torch.cat([gate, up]) if experts.is_concatenated else torch.stack([gate, up], dim=1).flatten()
    with torch.no_grad():
        found = experts._apply_gate(both)
    for activation in ACTIVATIONS:
        # Two ways of writing one formula in fp32.
        if found.shape == gate.shape and torch.allclose(found, activate(activation, gate, up), rtol=1e-5, atol=1e-5):
            return activation
    raise _refused(
        type(model).__name__, "has experts with an activation of its own", "one of " + ", ".join(ACTIVATIONS)
    )


def _where_on_disk(model: Any, experts: Any) -> ExpertTensors:
    """Names and order of the experts' tensors in a checkpoint.

    Numbered elements go through the conversion that transformers applies when it saves a model; where each number comes
    out tells the order.
    """
    from transformers.core_model_loading import revert_weight_conversion

    prefix = next(name for name, module in model.named_modules() if module is experts)
    own_layer = f".layers.{layer_of(prefix)}."
    count, rows, width = int(experts.gate_up_proj.shape[0]), 2, 3
    number = torch.arange(count * 3 * rows * width, dtype=torch.float64).view(count, 3, rows, width)
    gate, up, down = number[:, 0], number[:, 1], number[:, 2].transpose(1, 2)
    bias = -1 - torch.arange(count * (2 * rows + width), dtype=torch.float64).view(count, -1)
    gate_bias, up_bias, down_bias = bias[:, :rows], bias[:, rows : 2 * rows], bias[:, 2 * rows :]

    def both(a: torch.Tensor, b: torch.Tensor, concatenated: bool) -> torch.Tensor:
        return torch.cat([a, b], dim=1) if concatenated else torch.stack([a, b], dim=2).flatten(1, 2)

    def turned(matrix: torch.Tensor, transposed: bool) -> torch.Tensor:
        return (matrix.transpose(1, 2) if transposed else matrix).contiguous()

    state = {
        f"{prefix}.gate_up_proj": turned(both(gate, up, experts.is_concatenated), experts.is_transposed),
        f"{prefix}.down_proj": turned(down, experts.is_transposed),
    }
    if experts.has_bias:
        state[f"{prefix}.gate_up_proj_bias"] = both(gate_bias, up_bias, experts.is_concatenated)
        state[f"{prefix}.down_proj_bias"] = down_bias.contiguous()
    saved = revert_weight_conversion(model, state)

    def pattern(wanted: torch.Tensor) -> str | None:
        """The name of the tensor that holds all of `wanted` [experts, ...], or of those that hold one expert each."""
        named = [_name_of(saved, part) for part in (wanted, *wanted[:2])]
        whole, zeroth, other = named
        if whole is not None:
            return whole.replace(own_layer, ".layers.{layer}.")
        if zeroth is None or (count > 1 and other is None):
            return None
        layered = zeroth.replace(own_layer, ".layers.{layer}.")
        parts = layered.split(".")
        if count > 1:
            others = other.replace(own_layer, ".layers.{layer}.").split(".")  # type: ignore[union-attr]
            places = [i for i, (a, b) in enumerate(zip(parts, others, strict=True)) if (a, b) == ("0", "1")]
        else:
            places = [i for i, part in enumerate(parts) if part == "0"]
        return ".".join("{expert}" if i == places[0] else part for i, part in enumerate(parts)) if places else None

    for transposed in (False, True):
        down_name = pattern(turned(down, transposed))
        if down_name is None:
            continue
        biases = ("", "", "")
        for interleaved in (None, False, True):  # None: gate and up apart
            if interleaved is None:
                gate_name, up_name = pattern(turned(gate, transposed)), pattern(turned(up, transposed))
            else:
                gate_name = up_name = pattern(turned(both(gate, up, not interleaved), transposed))
            if gate_name is None or up_name is None:
                continue
            if experts.has_bias:
                joined = None if interleaved is None else pattern(both(gate_bias, up_bias, not interleaved))
                names = (joined or pattern(gate_bias), joined or pattern(up_bias), pattern(down_bias))
                if None in names or (joined is None) != (interleaved is None):
                    continue
                biases = tuple(str(part) for part in names)  # type: ignore[assignment]
            return ExpertTensors(gate_name, up_name, down_name, *biases, transposed, bool(interleaved))
    listed = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(saved.items())[:3])
    raise _refused(type(model).__name__, f"keeps its experts in an unknown order on disk: {listed}", "docs/models.md")


def _name_of(saved: Mapping[str, torch.Tensor], wanted: torch.Tensor) -> str | None:
    return next((n for n, t in saved.items() if t.shape == wanted.shape and torch.equal(t, wanted)), None)


def _persistent_buffers(model: Any) -> Iterator[torch.Tensor]:
    names = set(model.state_dict())
    return (buffer for name, buffer in model.named_buffers() if name in names)


def _workspace(model: Any, top_k: int, num_experts: int, rows: int, width: int) -> int:
    """Bytes of activations that live at once while a token is processed: frontend.sizes has the terms.

    Attention is bounded by the outputs of all of a layer's linear modules.
    """
    outputs: dict[int, int] = {}
    for name, module in model.named_modules():
        layer = layer_of(name)
        if layer is not None and isinstance(module, nn.Linear):
            outputs[layer] = outputs.get(layer, 0) + module.out_features
    attention = 2 * _BF16 * max(outputs.values(), default=0)
    router = 8 * num_experts + 12 * top_k
    vocabulary = int(model.config.vocab_size)
    return 10 * width + attention + router + 6 * (width + rows) + 6 * vocabulary


def _expanded(model: Any) -> int:
    """Latent attention (the classes that have expand_kv) makes keys and values anew of every cached vector."""
    sizes = [
        module.num_heads * (module.qk_head_dim + module.v_head_dim)
        for module in model.modules()
        if hasattr(module, "expand_kv")
    ]
    return int(_BF16 * max(sizes, default=0))


class _Run:
    """What a forward pass on the meta device shows: how many experts are chosen, and transformers' own cache."""

    def __init__(self, top_k: int, layers: list[Any], sizes: list[tuple[int, int]]) -> None:
        self.top_k = top_k
        self.kv_bytes_per_token = self.window_kv_bytes_per_token = self.state_bytes = self.window = 0
        for layer, (two, three) in zip(layers, sizes, strict=True):
            per_token = three - two
            self.state_bytes += two - 2 * per_token
            if getattr(layer, "is_sliding", False) and per_token:
                self.window = max(self.window, int(layer.sliding_window))
                self.window_kv_bytes_per_token += per_token
            else:
                self.kv_bytes_per_token += per_token


class _Recorder(nn.Module):
    """Stands where experts stood, and notes how many a token chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 0

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.top_k = top_k_index.shape[-1]
        return torch.zeros_like(hidden_states)


def _run(model: Any, experts: Mapping[int, Any]) -> _Run:
    """Two forward passes, of two and three tokens; `model` has no experts afterwards."""
    recorder = _Recorder()
    for name, module in list(model.named_modules()):
        if any(module is found for found in experts.values()):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, recorder)
    sizes: list[list[int]] = []
    layers: list[Any] = []
    try:
        for tokens in (2, 3):
            with torch.no_grad():
                out = model(torch.zeros(1, tokens, dtype=torch.int64, device="meta"), use_cache=True)
            cache = dict(vars(out.past_key_values))
            layers = [*cache.pop("layers"), cache]  # some models keep their states beside the layers
            sizes.append([_bytes(layer if isinstance(layer, dict) else vars(layer)) for layer in layers])
    except Exception as error:  # whatever a model's code raises on the meta device
        raise _refused(
            type(model).__name__,
            f"cannot be run without weights to see its cache ({type(error).__name__}: {str(error)[:200]})",
            "a model whose forward pass depends on shapes alone",
        ) from None
    if recorder.top_k == 0:
        raise _refused(type(model).__name__, "never called its experts", "experts that each token chooses from")
    return _Run(recorder.top_k, layers, list(zip(*sizes, strict=True)))


def _bytes(value: Any) -> int:
    """Of all floating tensors in it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.is_floating_point() else 0
    if isinstance(value, dict):
        return sum(_bytes(item) for item in value.values())
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _refused(what: str, found: str, expected: str) -> FiddlerError:
    return FiddlerError(
        f"{what} is not supported",
        found=found,
        expected=expected,
        hint="docs/models.md lists what is supported",
    )
