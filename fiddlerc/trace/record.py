"""Runs a transformers model over text and records which experts its routers choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fiddler_runtime import hf
from fiddler_runtime.checkpoint import Checkpoint, check_identity
from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.plan import Plan
from fiddler_runtime.progress import Progress
from fiddlerc.ir import ModelSpec, Trace

from .check import DECODE, MAX_EXPERTS, PREFILL, check, count
from .sequences import cut, describe


def record(
    model_dir: Path,
    spec: ModelSpec,
    texts: Sequence[str],
    *,
    sequence_tokens: int = 256,
    prompt_tokens: int = 64,
    batch: int = 4,
    generate_tokens: int = 0,
    num_beams: int = 1,
    max_tokens: int | None = None,
    plan: Plan | None = None,
    packed_cache: bool | Path = False,
    progress: Progress | None = None,
) -> Trace:
    """Teacher-forced: the text itself is what the model "decodes".

    Each text is cut into sequences; a sequence's first `prompt_tokens` positions are prefill, the others decode. One
    forward pass over the sequence is enough for both: the model is causal, so a position is routed by what precedes it,
    just as if it had been decoded step by step. Sequences run `batch` at a time, padded on the left and masked; pads
    are not recorded. The model runs in bf16, as it will with a plan.

    With a plan, its kernels compute the experts, on the CPU, where they are held once, or mapped from a packed cache.
    Sums are rounded otherwise than by transformers, so a router may choose otherwise where two experts nearly tie.

    With generate_tokens > 0 the model also continues every prompt itself, by greedy or beam search; these tokens are
    decode rows of sequences of their own, numbered after the text's. Each step counts once, with the routing of its
    best beam. Prompts run one at a time there, so that there are no pads and no rows of sequences that have ended; they
    are not recorded again.

    Raises FiddlerError: another model than `spec`, no tokenizer, no or too little text, more tokens than the context.
    """
    _check_arguments(spec, sequence_tokens, prompt_tokens, generate_tokens)
    check_identity(spec, model_dir)
    Checkpoint.open(model_dir).check_experts(spec)
    transformers = hf.import_transformers()
    with hf.silenced(transformers):
        tokenizer = hf.load_tokenizer(model_dir)
        sequences = cut(
            tokenizer,
            texts,
            sequence_tokens=sequence_tokens,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
        )
        if progress is not None:
            progress("loading the model", 0, 1)
        if plan is None:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=torch.bfloat16, local_files_only=True
            ).eval()
        else:
            model = hf.load(model_dir, plan, device="none", packed_cache=packed_cache, progress=progress)
        if progress is not None:
            progress("loading the model", 1, 1)
        recorder = _Recorder(model, spec)
        engine = nullcontext() if plan is None else model.fiddler
        with engine, torch.inference_mode(), recorder:
            rows = _Rows()
            _force(model, recorder, sequences, prompt_tokens, batch, rows, progress)
            if generate_tokens:
                prompts = [sequence[:prompt_tokens] for sequence in sequences]
                _generate(model, recorder, prompts, generate_tokens, num_beams, rows, progress)
    generated = f", then {generate_tokens} written after each prompt" if generate_tokens else ""
    total = sum(map(len, sequences))
    source = f"{describe(texts)}, {total} tokens in {len(sequences)} sequences, prompts of {prompt_tokens}{generated}"
    trace = rows.trace(spec, source)
    check(trace, spec, "the recorded trace")
    return trace


class _Rows:
    """The trace as it grows: one row per token."""

    def __init__(self) -> None:
        self._experts: list[npt.NDArray[np.uint16]] = []
        self._sequence: list[npt.NDArray[np.int32]] = []
        self._position: list[npt.NDArray[np.int32]] = []
        self._phase: list[npt.NDArray[np.uint8]] = []

    def add(self, experts: npt.NDArray[np.uint16], sequence: int, first: int, prompt_tokens: int) -> None:
        """experts [n, layers, top_k] of positions first … of a sequence whose prompt has prompt_tokens."""
        position = np.arange(first, first + len(experts), dtype=np.int32)
        self._experts.append(experts)
        self._sequence.append(np.full(len(experts), sequence, np.int32))
        self._position.append(position)
        self._phase.append(np.where(position < prompt_tokens, PREFILL, DECODE).astype(np.uint8))

    def trace(self, spec: ModelSpec, source: str) -> Trace:
        experts, phase = np.concatenate(self._experts), np.concatenate(self._phase)
        return Trace(
            model_fingerprint=spec.fingerprint,
            model_name=spec.name,
            source=source,
            counts=count(experts, phase, spec.num_experts),
            experts=experts,
            sequence=np.concatenate(self._sequence),
            position=np.concatenate(self._position),
            phase=phase,
        )


class _Recorder:
    """Hooks on the experts modules: keeps the ids that each was last called with. A context manager."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        self._top_k = spec.top_k
        self._modules = [module for _, module in hf.experts_modules(model, spec)]
        self._latest: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Recorder:
        for index, module in enumerate(self._modules):
            self._handles.append(module.register_forward_pre_hook(self._hook(index), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._latest[index] = args[1] if len(args) > 1 else kwargs["top_k_index"]

        return keep

    def take(self, batch: int) -> npt.NDArray[np.uint16]:
        """The ids of the last forward pass, uint16 [batch, tokens, layers, top_k]; forgets them."""
        layers = [self._latest.pop(index).reshape(batch, -1, self._top_k) for index in range(len(self._modules))]
        return torch.stack(layers, dim=2).cpu().numpy().astype(np.uint16)


def _force(
    model: Any,
    recorder: _Recorder,
    sequences: Sequence[list[int]],
    prompt_tokens: int,
    batch: int,
    rows: _Rows,
    progress: Progress | None,
) -> None:
    done, total = 0, sum(map(len, sequences))
    for begin in range(0, len(sequences), batch):
        part = sequences[begin : begin + batch]
        length = max(map(len, part))
        ids = torch.zeros(len(part), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(part):
            ids[row, length - len(sequence) :] = torch.tensor(sequence)
            mask[row, length - len(sequence) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # Logits of one position only: all of them would be the largest array of the run.
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
        experts = recorder.take(len(part))
        for row, sequence in enumerate(part):
            rows.add(experts[row, length - len(sequence) :], begin + row, 0, prompt_tokens)
            done += len(sequence)
        if progress is not None:
            progress("tracing", done, total)


def _generate(
    model: Any,
    recorder: _Recorder,
    prompts: Sequence[list[int]],
    tokens: int,
    num_beams: int,
    rows: _Rows,
    progress: Progress | None,
) -> None:
    steps: list[npt.NDArray[np.uint16]] = []

    def after(_module: Any, _args: object, kwargs: dict[str, Any], _output: object) -> None:
        # Row 0 of a step is the best beam that is still being written.
        steps.append(recorder.take(len(kwargs["input_ids"]))[0])

    handle = model.register_forward_hook(after, with_kwargs=True)
    # Set one by one where they differ: a model's own generation settings may ask for sampling.
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    try:
        for number, prompt in enumerate(prompts):
            steps.clear()
            ids = torch.tensor([prompt])
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                num_beams=num_beams,
                pad_token_id=0,
                **options,
            )
            # The first pass is the prompt, which the text's own sequence has recorded.
            written = steps[1:]
            if written:
                rows.add(np.concatenate(written), len(prompts) + number, len(prompt), len(prompt))
            if progress is not None:
                progress("writing", number + 1, len(prompts))
    finally:
        handle.remove()


def _check_arguments(spec: ModelSpec, sequence_tokens: int, prompt_tokens: int, generate_tokens: int) -> None:
    if not 0 < prompt_tokens < sequence_tokens:
        raise FiddlerError(
            "the prompt leaves nothing to decode",
            found=f"a prompt of {prompt_tokens} in sequences of {sequence_tokens} tokens",
            expected="a prompt of at least 1 token, shorter than the sequence",
            hint="give --prompt-tokens below --sequence-tokens",
        )
    longest = max(sequence_tokens, prompt_tokens + generate_tokens)
    if longest > spec.max_context:
        raise FiddlerError(
            f"sequences longer than the context of {spec.name}",
            found=f"{longest} tokens",
            expected=f"at most {spec.max_context}",
            hint=f"give --sequence-tokens {min(256, spec.max_context)}"
            if longest == sequence_tokens
            else f"give --generate-tokens {max(0, spec.max_context - prompt_tokens)}, or fewer --prompt-tokens",
        )
    if spec.num_experts > MAX_EXPERTS:
        raise FiddlerError("too many experts for a trace", found=spec.num_experts, expected=f"at most {MAX_EXPERTS}")
