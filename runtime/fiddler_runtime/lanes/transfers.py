"""A layer's tensors on their way between the accelerator and the host: small copies that nobody waits for too early."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch


def send_numbers(numbers: npt.ArrayLike, device: torch.device) -> torch.Tensor:
    """A small int64 table on a device, in the current stream. Without waiting for that stream, as a copy from memory
    that is not locked may."""
    here = torch.from_numpy(np.asarray(numbers, np.int64))
    if device.type == "cuda":
        here = here.pin_memory()  # from torch's own, which it uses again only once the copy is past
    return here.to(device, non_blocking=True)


class HostBuffers:
    """Host memory that is kept, by name: locked for an accelerator's copies, it is too dear to be made for each layer.

    make(nbytes)  uint8 [nbytes]
    """

    def __init__(self, make: Callable[[int], torch.Tensor]) -> None:
        self._make = make
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Room for a tensor, uninitialised: the memory of the last one of that name, which is not needed any more."""
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            # With room to grow: a longer prompt is often followed by one that is longer still.
            buffer = self._buffers[name] = self._make(nbytes + nbytes // 4 + 64)
        return buffer[:nbytes].view(dtype).view(shape)
