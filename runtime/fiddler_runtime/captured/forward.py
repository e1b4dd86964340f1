"""A model's decode steps, captured: what stands for its `forward`. Knows transformers' caches by their attributes."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..engine import Engine
from ..errors import FiddlerError, FiddlerWarning
from ..lanes.device import CannotCapture
from .layers import MOST_TOKENS, Captured, CapturedLayers

_KEPT = 4
"""Captured steps of different shapes kept at a time; the one that was used least recently goes."""
_CACHE = "past_key_values"

_Key = tuple[Any, ...]


class CapturedForward:
    """Calls of a causal model's forward: decode steps on a static cache are captured and replayed.

    All other calls run as ever. Of a shape the first step runs the plain path, which warms everything up; the second is
    captured; the others are replays: their inputs are copied to where the captured step reads them, and the cache's
    tensors are the captured ones. So a text's cache is overwritten by the next text of the same shape.

    steps   {"captured": captures, "replayed": replays, "plain": decode steps that ran the plain path}
    reasons why they did; a warning (FiddlerWarning) told each once
    """

    def __init__(self, model: Any, engine: Engine) -> None:
        self._model = model
        self._forward = model.forward
        self._engine = engine
        self._captured: dict[_Key, _Step] = {}
        self._warm: set[_Key] = set()
        self._impossible: dict[_Key, str] = {}
        self._broken: str | None = None
        self.steps: Counter[str] = Counter(captured=0, replayed=0, plain=0)
        self.reasons: Counter[str] = Counter()
        functools.update_wrapper(self, model.forward)  # generate() looks at its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        tokens = kwargs.get("input_ids")
        if args or not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.shape[1] != 1:
            self._lend_memory(tokens, kwargs.get(_CACHE))
            return self._forward(*args, **kwargs)
        call = _Call(kwargs)
        reason = self._broken or call.obstacle() or self._impossible.get(call.key)
        if reason is not None:
            return self._plain(kwargs, reason)
        if call.key not in self._captured and call.key not in self._warm:
            self._warm.add(call.key)
            self.steps["plain"] += 1
            return self._forward(**kwargs)
        try:
            with self._engine.captured() as layers:
                return self._step(layers, call)
        except CannotCapture as error:
            self._impossible[call.key] = error.line
            return self._plain(kwargs, error.line)

    def undo(self) -> None:
        """The model's own forward again; after the last step."""
        del self._model.forward

    def _step(self, layers: CapturedLayers, call: _Call) -> Any:
        # Steps of before residents were given up: no longer right, and memory that is wanted.
        self._captured = {key: step for key, step in self._captured.items() if step.layers is layers}
        step = self._captured.pop(call.key, None)
        try:
            return _copied(self._capture(layers, call) if step is None else self._replay(step, call), call.cache)
        except CannotCapture:
            raise
        except FiddlerError as error:
            # What the step left behind is not known: this text ends here, and the next one takes the plain path.
            self._broken = error.line
            raise

    def _replay(self, step: _Step, call: _Call) -> Any:
        self._captured[call.key] = step  # now the most recently used
        with torch.inference_mode():
            step.take(call)
        result = step.layers.replay(step.captured)
        self.steps["replayed"] += 1
        return result

    def _plain(self, kwargs: dict[str, Any], reason: str) -> Any:
        if reason not in self.reasons:
            warnings.warn(f"decode steps are not captured: {reason}", FiddlerWarning, stacklevel=5)
        self.reasons[reason] += 1
        self.steps["plain"] += 1
        return self._forward(**kwargs)

    def _capture(self, layers: CapturedLayers, call: _Call) -> Any:
        """Captures the step, which is its first run too, and returns its result.

        Raises CannotCapture, with nothing changed.
        """
        # The step reads its inputs and the cache where they lie now.
        inputs = [tensor.clone() for tensor in call.tensors]
        forward = functools.partial(self._forward, **call.with_tensors(inputs))
        before = _CacheState(call.cache)
        # A GPU carries nothing out while it captures, and may have no room for the cache a second time.
        saved = before.saved() if self._engine.device.type == "cpu" else None
        try:
            captured = layers.capture(inputs[call.ids_at].shape[0], forward)
        except CannotCapture:
            with torch.inference_mode():
                before.restore(saved)
            raise
        self.steps["captured"] += 1
        after = _CacheState(call.cache)
        changed = before.python_changes(after)
        if changed:
            # This run is right; a replay would not repeat what Python did.
            self._impossible[call.key] = f"the cache counts in Python ({', '.join(changed)})"
        else:
            self._captured[call.key] = _Step(layers, captured, inputs, after)
            while len(self._captured) > _KEPT:
                del self._captured[next(iter(self._captured))]
        return captured.graph.result

    def _lend_memory(self, tokens: Any, cache: Any) -> None:
        """Gives a new cache the memory of a captured step of its shape: the two would not fit beside each other."""
        if isinstance(tokens, torch.Tensor) and tokens.dim() == 2 and getattr(cache, "is_compileable", False):
            for step in reversed(self._captured.values()):
                if step.cache.lend(cache, tokens.shape[0]):
                    return


@dataclass(frozen=True)
class _Step:
    """A captured step, where it reads its inputs, and its cache's tensors."""

    layers: CapturedLayers
    captured: Captured[Any]
    inputs: list[torch.Tensor]
    cache: _CacheState

    def take(self, call: _Call) -> None:
        """Copies a call's inputs, and the cache's tensors if they are others: a new cache, or reordered beams."""
        for mine, given in zip(self.inputs, call.tensors, strict=True):
            mine.copy_(given)
        self.cache.adopt(call.cache)


class _Call:
    """A decode step's arguments, parted into tensors and the rest, which with all shapes is the key."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.cache: Any = kwargs.get(_CACHE)
        self._plain_tuple = kwargs.get("return_dict") is False
        others = {name: value for name, value in sorted(kwargs.items()) if name != _CACHE}
        leaves, self._structure = pytree.tree_flatten(others)
        self._leaves = leaves
        self._at = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = [leaves[at] for at in self._at]
        self.ids_at = next(i for i, tensor in enumerate(self.tensors) if tensor is kwargs["input_ids"])
        constants = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor))
        state = () if self.obstacle() is not None else _CacheState(self.cache).key
        self.key: _Key = (str(self._structure), constants, *map(_shape, self.tensors), state)

    def obstacle(self) -> str | None:
        """Why such a call cannot be captured, if it cannot."""
        tokens = self.tensors[self.ids_at].shape[0]
        if tokens > MOST_TOKENS:
            return f"{tokens} tokens a step, of at most {MOST_TOKENS}"
        if not getattr(self.cache, "is_compileable", False):
            kind = type(self.cache).__name__
            return f"the cache is a {kind}, and not a static one (cache_implementation='static')"
        if not all(getattr(layer, "is_initialized", True) for layer in self.cache.layers):
            return "nothing is in the cache yet"
        if self._plain_tuple:
            return "return_dict=False"
        wide = [t for t in self.tensors if t.dim() == 2 and t.shape[1] > 1]
        if wide:
            return "the attention mask grows with every step: call generate(), or give a mask of four dimensions"
        return None

    def with_tensors(self, tensors: list[torch.Tensor]) -> dict[str, Any]:
        """The keyword arguments with other tensors."""
        leaves = list(self._leaves)
        for at, tensor in zip(self._at, tensors, strict=True):
            leaves[at] = tensor
        return {**pytree.tree_unflatten(leaves, self._structure), _CACHE: self.cache}


class _CacheState:
    """A cache's layers as they are now: their tensors, and what they keep beside them."""

    def __init__(self, cache: Any) -> None:
        self._layers = list(cache.layers)
        self._states = [dict(vars(layer)) for layer in self._layers]

    @property
    def key(self) -> _Key:
        """Shapes and dtypes of all tensors."""
        return tuple((index, name, _shape(tensor)) for index, name, tensor in self._tensors())

    def _tensors(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        for index, state in enumerate(self._states):
            for name, value in sorted(state.items()):
                if isinstance(value, torch.Tensor):
                    yield index, name, value

    def adopt(self, cache: Any) -> None:
        """Gives another cache (or the same, whose tensors were replaced) these tensors, with its own contents."""
        for index, name, mine in self._tensors():
            layer = cache.layers[index]
            theirs = getattr(layer, name)
            if theirs is not mine:
                mine.copy_(theirs)
                setattr(layer, name, mine)

    def lend(self, cache: Any, batch: int) -> bool:
        """Makes an unused cache of the same layers initialised with these tensors, zeroed. False if it is another's."""
        fits = len(cache.layers) == len(self._layers) and all(
            type(new) is type(old)
            and not getattr(new, "is_initialized", True)
            and getattr(new, "max_cache_len", None) == getattr(old, "max_cache_len", None)
            and state.get("batch_size") == batch
            and all(_usable(value) for value in state.values())
            for new, old, state in zip(cache.layers, self._layers, self._states, strict=True)
        )
        if fits:
            for layer, state in zip(cache.layers, self._states, strict=True):
                for name, value in state.items():
                    setattr(layer, name, value.zero_() if isinstance(value, torch.Tensor) else value)
        return fits

    def saved(self) -> list[torch.Tensor]:
        """Copies of all tensors."""
        return [tensor.clone() for _, _, tensor in self._tensors()]

    def restore(self, saved: list[torch.Tensor] | None) -> None:
        """Sets the layers back to this state, and its tensors to their copies, if they were changed."""
        if saved is not None:
            for (_, _, tensor), copy in zip(self._tensors(), saved, strict=True):
                tensor.copy_(copy)
        for layer, state in zip(self._layers, self._states, strict=True):
            vars(layer).clear()
            vars(layer).update(state)

    def python_changes(self, after: _CacheState) -> list[str]:
        """Names of what changed that a replay would not change: everything that is no tensor, and tensors replaced."""
        changed = set()
        for old, new in zip(self._states, after._states, strict=True):
            for name in old.keys() | new.keys():
                a, b = old.get(name), new.get(name)
                if a is not b and (isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or a != b):
                    changed.add(name)
        return sorted(changed)


def _shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.is_inference()


def _usable(value: object) -> bool:
    """Whether the caller may write to it: outside inference mode torch refuses tensors that were made within."""
    return not isinstance(value, torch.Tensor) or value.is_inference() == torch.is_inference_mode_enabled()


def _copied(result: Any, cache: Any) -> Any:
    """The result with copies of its tensors, which the next step overwrites, and the cache of this call."""
    values = {
        name: cache if name == _CACHE else pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, value)
        for name, value in result.items()
    }
    return type(result)(**values)
