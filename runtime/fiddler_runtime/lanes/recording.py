"""What a CUDA graph is on a GPU, for torch on the CPU: operations recorded once, replayed on the same memory.

The same rules hold, so that what cannot be captured on a GPU is refused here too: shapes and addresses are those of the
recording, Python between the operations is not repeated, and nothing may look at a value that is still to be computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import FiddlerError

R = TypeVar("R")


class CannotCapture(FiddlerError):
    """Something that a capture forbids was asked for within one; without a capture it works."""


_Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[torch.Tensor | None]]
"""A function, its arguments, and where each tensor that it returns is kept; None for one that is an argument again."""

# What hands a value to the program without torch's tags that say so.
_LOOKS = ("item", "is_nonzero", "allclose", "nonzero_numpy")
_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_MAKES_ROOM = ("empty", "new_empty")

_thread = threading.local()


class Recording(Generic[R]):
    """fn() has been run once, in this thread; `replay` repeats its operations.

    result  what fn returned; each replay overwrites its tensors

    Every intermediate result keeps its memory. Raises CannotCapture where fn does what a GPU's capture forbids.
    """

    def __init__(self, fn: Callable[[], R]) -> None:
        self._operations: list[_Operation] = []
        _thread.operations = self._operations
        try:
            with torch.inference_mode(), _Recorder():  # type: ignore[no-untyped-call]
                self.result = fn()
        finally:
            _thread.operations = None

    def replay(self) -> None:
        """Repeats the operations, in whichever thread."""
        with torch.inference_mode():
            for function, args, kwargs, targets in self._operations:
                results = function(*args, **kwargs)
                if targets:
                    for target, result in zip(targets, pytree.tree_leaves(results), strict=True):
                        if target is not None:
                            target.copy_(result)


def perform(fn: Callable[..., None], *args: Any) -> None:
    """Calls fn(*args), which uses no torch; within a recording it becomes one of its operations."""
    operations: list[_Operation] | None = getattr(_thread, "operations", None)
    if operations is not None:
        operations.append((fn, args, {}, []))
    fn(*args)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends every operation of its thread to the thread's recording."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _LOOKS or any(tag in func.tags for tag in _TAGS):
            raise CannotCapture(
                "this cannot be captured: it looks at a value that is still to be computed",
                found=f"aten::{name}",
                expected="operations whose shapes and order do not depend on values",
            )
        result = func(*args, **kwargs)
        if name.startswith(_MAKES_ROOM):
            return result
        # What lies in an argument's memory is a view, or the argument itself. By its memory and not by the schema: a
        # reshape is either.
        given = {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        targets = [
            leaf if _is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given else None
            for leaf in pytree.tree_leaves(result)
        ]
        made = any(target is not None for target in targets)
        if made or func._schema.is_mutable:
            _thread.operations.append((func, args, kwargs, targets if made else []))
        return result


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)
