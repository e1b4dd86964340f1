"""Hugging Face models whose experts run through a plan. The only module that imports transformers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from . import strategies as rules
from .captured.forward import CapturedForward
from .checkpoint import check_identity, read_config
from .engine import Engine
from .errors import FiddlerError, FiddlerWarning, install
from .kernels import require_variant
from .loading import load_plan, open_library
from .packed_cache import PackedCache
from .plan import ModelSpec, Plan
from .preflight import Preflight, survey
from .progress import Progress
from .strategies import DeviceChoice
from .weights import ExpertWeights

OLDEST = "5.20"
"""The oldest release of transformers that has what is used of it here."""

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_EXPERT_KEYS = r"\.experts\.(gate_up_proj|down_proj)(_bias)?$"


def load(
    model_dir: str | Path,
    plan: Plan | str | Path,
    *,
    experts: str | Path | None = None,
    device: DeviceChoice = "auto",
    dtype: torch.dtype = torch.bfloat16,
    strategies: Sequence[str] | None = None,
    threads: int | None = None,
    isa: str | None = None,
    attn_implementation: str | None = None,
    packed_cache: bool | str | Path = False,
    capture: bool = False,
    progress: Progress | None = None,
    on_preflight: Callable[[Preflight], None] | None = None,
) -> Any:
    """An ordinary transformers model: generate() greedy, sampling, streaming and with beams.

    transformers reads everything but the routed experts, in `dtype`; those go from the shards to where the plan wants
    them, in bf16. `model.fiddler` is the Engine: its counters, and `close()` when the model is no longer needed.

    experts       the ONNX file that has them, for a plan compiled from one: only the rest is read from model_dir
    capture       decode steps of up to 16 tokens (a batch, its beams) are captured and run without Python between their
                  layers, on a static cache (docs/runtime.md): `model.captured.steps` counts them. Steps that cannot be
                  captured run as ever, with a warning. Experts are then resident or on the CPU, never streamed
    on_preflight  is told what is needed before anything large begins
    The other arguments are the Engine's. Raises FiddlerError, among others for a model that is not the plan's, a
    checkpoint that lacks a tensor, too little memory.
    """
    import_transformers()
    model_dir = Path(model_dir)
    if not isinstance(plan, Plan):
        plan = load_plan(plan)
    spec = plan.header.model
    # What can fail fast comes first: the wrong model, half a checkpoint, wrong arguments, too little memory or disk,
    # kernels that do not compile.
    weights = ExpertWeights.load(model_dir if experts is None else experts)
    weights.check(spec)
    if experts is not None:
        check_identity(spec, model_dir)
    setup = rules.decide(plan, device, strategies, gpu=torch.cuda.is_available())
    if isa is not None:
        require_variant(plan.header.kernels, isa)  # before anything takes long
    cache = PackedCache.open(packed_cache, spec, weights)
    needs = survey(plan.header, setup, cache, whole_model=True)
    if on_preflight is not None:
        on_preflight(needs)
    needs.check()
    open_library(plan, progress=progress)

    # Before the experts: while it loads, transformers holds some tensors twice.
    model = load_without_experts(model_dir, spec, dtype, attn_implementation)
    if setup.kind == "cuda":
        # Before the experts, too: what is left of the accelerator's memory is then theirs.
        model.to(torch.device("cuda", torch.cuda.current_device()))
    engine = Engine(
        plan,
        weights,
        device=device,
        isa=isa,
        threads=threads,
        strategies=strategies,
        packed_cache=cache,
        whole_model=True,
        progress=progress,
    )
    for module in model.modules():
        if isinstance(module, PlannedExperts):
            module.engine = engine
    model.register_forward_pre_hook(_note_phase, with_kwargs=True)
    model.fiddler = engine
    model.captured = capture_steps(model, engine) if capture else None
    return model


def capture_steps(model: Any, engine: Engine) -> CapturedForward | None:
    """Has decode steps captured from now on. Warns (FiddlerWarning) and returns None where nothing can be."""
    try:
        with engine.captured():
            model.forward = CapturedForward(model, engine)
    except FiddlerError as error:
        warnings.warn(f"decode steps are not captured: {error}", FiddlerWarning, stacklevel=3)
        return None
    captured: CapturedForward = model.forward
    return captured


class PlannedExperts(nn.Module):
    """Stands where a model's experts module stood: no parameters, one call of the engine."""

    engine: Engine

    def __init__(self, layer: int, num_experts: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_experts = num_experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k], top_k_weights [T, k] -> [T, H], as transformers' own."""
        return self.engine.moe(self.layer, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, experts={self.num_experts}"


def load_without_experts(
    model_dir: Path, spec: ModelSpec, dtype: torch.dtype, attn_implementation: str | None = None
) -> Any:
    """The transformers model with PlannedExperts for experts, whose `engine` is still to be set.

    Raises FiddlerError for a class that transformers does not have, and for a checkpoint that lacks a tensor.
    """
    transformers = import_transformers()
    # An ONNX file does not name the class.
    name = str((read_config(model_dir).get("architectures") or [""])[0]) if spec.from_onnx else spec.architecture
    base = getattr(transformers, name, None)
    if base is None:
        raise FiddlerError(
            f"this transformers does not know {name}",
            found=f"transformers {transformers.__version__}",
            expected="a release that has it",
            hint="pip install --upgrade transformers",
        )
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with silenced(transformers):
        model, info = _without_experts(base, spec).from_pretrained(
            model_dir,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            # Reported in `info` like what is missing, so that both are told our way.
            ignore_mismatched_sizes=True,
            **options,
        )
    wrong = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        raise FiddlerError(
            f"the checkpoint {model_dir} lacks tensors, or has them in another shape",
            found=f"{len(wrong)} such: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}",
            expected="every tensor of the model",
            hint="download the model again",
        )
    return model


def _without_experts(base: Any, spec: ModelSpec) -> Any:
    """A subclass of the transformers class that has PlannedExperts for experts, and looks like it otherwise."""

    class WithoutExperts(base):  # type: ignore[misc]
        # The checkpoint has experts and the model does not: that is not worth a report.
        _keys_to_ignore_on_load_unexpected = (*(base._keys_to_ignore_on_load_unexpected or ()), _EXPERT_KEYS)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Runs on the meta device: the experts that are made here and dropped take no memory.
            super().__init__(*args, **kwargs)
            _replace_experts(self, spec)

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            if (
                getattr(self, "captured", None) is not None
                and kwargs.get("past_key_values") is None
                and kwargs.get("use_cache", True)
            ):
                # Compiling would take the capture's place.
                kwargs = {"cache_implementation": "static", "disable_compile": True, **kwargs}
            return super().generate(*args, **kwargs)

        def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise FiddlerError(
                "this model cannot be saved: its experts live in the plan's engine",
                found="save_pretrained()",
                expected="a copy of the model's own directory",
            )

    WithoutExperts.__name__ = base.__name__
    WithoutExperts.__qualname__ = base.__qualname__
    WithoutExperts.__module__ = base.__module__
    return WithoutExperts


def layer_of(name: str) -> int | None:
    """The decoder layer that a module or a tensor of that name belongs to; None: to none."""
    match = _LAYER.search(f".{name}")
    return None if match is None else int(match.group(1))


def experts_modules(model: nn.Module, spec: ModelSpec) -> list[tuple[str, Any]]:
    """Names and modules of the experts in the order of spec.moe_layers, however the family calls them.

    Raises FiddlerError if the model has them in other layers, or two in one.
    """
    found = []
    for name, module in model.named_modules():
        layer = layer_of(name)
        # Set by transformers' experts registry on every experts class: these are called with (hidden, ids, weights).
        if layer is not None and (hasattr(module, "is_concatenated") or isinstance(module, PlannedExperts)):
            found.append((layer, name, module))
    found.sort(key=lambda experts: experts[0])
    if tuple(layer for layer, _, _ in found) != spec.moe_layers:
        raise FiddlerError(
            f"this transformers builds {spec.architecture} with experts in other layers",
            found=f"layers {[layer for layer, _, _ in found]}",
            expected=f"layers {list(spec.moe_layers)}",
            hint=f"pip install 'transformers>={OLDEST}'",
        )
    return [(name, module) for _, name, module in found]


def _replace_experts(model: nn.Module, spec: ModelSpec) -> None:
    for layer, (name, module) in zip(spec.moe_layers, experts_modules(model, spec), strict=True):
        if module.num_experts != spec.num_experts:
            raise FiddlerError(
                f"the experts are not those of {type(model).__name__}",
                found=f"{spec.num_experts} in the plan",
                expected=f"{module.num_experts} in layer {layer}",
            )
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, PlannedExperts(layer, spec.num_experts))


def _note_phase(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """More than one new position per sequence is counted as prefill."""
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds", args[0] if args else None)
    if tokens is not None:
        module.fiddler.set_phase("prefill" if tokens.shape[1] > 1 else "decode")


@contextmanager
def silenced(transformers: Any) -> Iterator[None]:
    """Without transformers' loading bar and report, which would speak of the experts; both are set back after."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_tokenizer(model_dir: Path) -> Any:
    """The directory's tokenizer. Raises FiddlerError without transformers, and if there is none or a broken one."""
    transformers = import_transformers()
    read_config(model_dir)  # says it better than transformers if there is no such directory
    try:
        return transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # it reads config.json, too, and raises whatever its values make it raise
        hint = "download the whole model, e.g. hf download ORGANISATION/MODEL --local-dir DIR"
        if not any((model_dir / name).exists() for name in _TOKENIZER_FILES):
            raise FiddlerError(
                f"no tokenizer in {model_dir}",
                found="none of " + ", ".join(_TOKENIZER_FILES),
                expected="the model's tokenizer beside its weights",
                hint=hint,
            ) from None
        raise FiddlerError(
            f"cannot load the tokenizer in {model_dir}",
            found=(str(error).strip() or type(error).__name__).splitlines()[0][:200],
            expected="a whole tokenizer, beside a config.json that transformers can read",
            hint=hint,
        ) from None


def import_transformers() -> Any:
    """The module. Raises FiddlerError without it."""
    try:
        import transformers
    except ImportError as error:
        raise FiddlerError(
            "cannot import transformers",
            found=str(error),
            expected=f"transformers {OLDEST} or later",
            hint=install("hf"),
        ) from None
    return transformers
