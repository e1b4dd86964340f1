"""The peers by name. Each is one module with a class `Peer`; it is imported only if it is asked for."""

from __future__ import annotations

import importlib

from fiddler_runtime.errors import FiddlerError

from ..kernels.contender import Contender

MODULES = {
    "torch": "torch_eager",
    "onednn": "onednn",
}


def load_peer(name: str) -> Contender:
    """Raises FiddlerError if there is no such peer, ImportError or OSError if it is not installed here."""
    if name not in MODULES:
        raise FiddlerError("unknown peer", found=repr(name), expected=", ".join(MODULES))
    peer: Contender = importlib.import_module(f"{__package__}.{MODULES[name]}").Peer()
    return peer
