"""How a stream enters the CPU lane: three ways, one contract.

Within captured work `start` comes first; then for each layer `ask`, once its tokens are in the mailbox, and `answer`,
before what the CPU lane left there is read. What the stream is given between the two runs beside the CPU lane.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from ..lanes.driver import Driver
from ..lanes.recording import perform
from .native import Mailbox, NativeStep


class Entry(ABC):
    """A way into the CPU lane.

    name    for people
    polled  whether it needs the library's polling thread
    """

    name: str
    polled: bool

    def prepare(self, mailbox: Mailbox) -> None:  # noqa: B027
        """Makes the mailbox accessible to the stream. Raises FiddlerError if that is refused."""

    def attach(self, step: NativeStep) -> None:  # noqa: B027
        """Says which step the stream will enter."""

    @abstractmethod
    def start(self) -> None:
        """The step begins."""

    @abstractmethod
    def ask(self, row: int) -> None:
        """The row's tokens are in the mailbox."""

    @abstractmethod
    def answer(self, row: int) -> None:
        """What follows needs the CPU lane's share of the row."""

    def close(self) -> None:  # noqa: B027
        """Undoes `prepare`; after the last step."""


class ThreadFlags(Entry):
    """Flags, for a stream that is a thread of this CPU: the simulated accelerator's."""

    name = "flags of a simulated stream"
    polled = True

    def attach(self, step: NativeStep) -> None:
        self._step = step

    def start(self) -> None:
        perform(self._step.write_flag, self._step.mailbox.answered, 0)

    def ask(self, row: int) -> None:
        perform(self._step.write_flag, self._step.mailbox.asked, row + 1)

    def answer(self, row: int) -> None:
        perform(self._step.wait_flag, self._step.mailbox.answered, row + 1)


class _OnStream(Entry):
    """Through the driver, on a stream of its device.

    stream  gives the handle of the stream to use, each time
    """

    def __init__(self, driver: Driver, stream: Callable[[], int]) -> None:
        self._driver = driver
        self._stream = stream
        self._registered: int | None = None

    def prepare(self, mailbox: Mailbox) -> None:
        host = mailbox.memory.data_ptr()
        there = self._driver.register(host, mailbox.memory.nbytes)
        self._registered = host
        self._asked, self._answered = mailbox.asked - host + there, mailbox.answered - host + there

    def close(self) -> None:
        registered, self._registered = self._registered, None
        if registered is not None:
            self._driver.unregister(registered)


class StreamFlags(_OnStream):
    """Flags that the stream writes and waits for by itself: some microseconds a layer."""

    name = "stream memory operations"
    polled = True

    def start(self) -> None:
        perform(self._driver.write_value, self._stream(), self._answered, 0)

    def ask(self, row: int) -> None:
        perform(self._driver.write_value, self._stream(), self._asked, row + 1)

    def answer(self, row: int) -> None:
        perform(self._driver.wait_value, self._stream(), self._answered, row + 1)


class HostFunction(_OnStream):
    """The driver calls the library, from a thread of its own: 30 to 50 us a layer before it does (KTransformers and
    FreeToken, arXiv 2608.16157).

    stream  one beside the captured stream
    fork    makes what that stream is given next come after what the captured stream was given so far
    merge   makes the captured stream wait for it
    """

    name = "host functions"
    polled = False

    def __init__(
        self, driver: Driver, stream: Callable[[], int], fork: Callable[[], None], merge: Callable[[], None]
    ) -> None:
        super().__init__(driver, stream)
        self._fork = fork
        self._merge = merge

    def attach(self, step: NativeStep) -> None:
        self._step = step

    def start(self) -> None:
        """Nothing to do: the streams' order is all there is."""

    def ask(self, row: int) -> None:
        self._fork()
        function, layer = self._step.serve_address, self._step.layer_address(row)
        perform(self._driver.launch_host_function, self._stream(), function, layer)

    def answer(self, row: int) -> None:
        self._merge()
