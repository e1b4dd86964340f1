"""A thread with a queue: one device's own line of work."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_Item = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Worker:
    """Runs what is submitted, in order, in a daemon thread of its own.

    The thread ends at `close`, when the Worker is collected, and at the interpreter's exit: it never keeps the process
    alive. It holds no reference to the Worker.
    """

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._queue,), name=name, daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, self._queue.put, None)

    def submit(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Queues fn(*args); the future carries its result or its exception. Keyword arguments are not taken."""
        if kwargs:
            raise TypeError("Worker.submit takes positional arguments only")
        if not self._stop.alive:
            raise RuntimeError(f"the thread {self._thread.name} is closed")
        future: Future[R] = Future()
        self._queue.put((future, fn, args))
        return future

    def close(self) -> None:
        """Finishes what is queued and ends the thread. Calling it again does nothing."""
        self._stop()
        if self._thread is not threading.current_thread():
            self._thread.join()


def _serve(queue: SimpleQueue[_Item | None]) -> None:
    while True:
        item = queue.get()
        if item is None:
            return
        future, fn, args = item
        try:
            future.set_result(fn(*args))
        except BaseException as error:  # whoever waits for the future raises it
            future.set_exception(error)
        # An idle thread must not keep the last call's tensors alive.
        del item, future, fn, args
