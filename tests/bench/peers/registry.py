"""The peers by name. Each is one module with a class `Peer`, imported only if it is asked for.

python -m tests.bench.peers.registry    which of them this environment has
"""

from __future__ import annotations

import importlib

from fiddler_runtime.errors import FiddlerError

from ..kernels.contender import Contender

PEERS = {
    "torch": "torch_eager",
    "onednn": "onednn",
    "zentorch": "zentorch_moe",
    "sglang": "sglang_cpu",
    "vllm": "vllm_cpu",
    "ggml": "ggml_bf16",
    "transformers": "transformers_moe",
}
"""Name to module. All but torch, onednn and transformers come with tests/bench/peers/make_env.sh."""


def load_peer(name: str) -> Contender:
    """Raises FiddlerError if there is no such peer, ImportError or OSError if it is not installed here."""
    if name not in PEERS:
        raise FiddlerError("unknown peer", found=repr(name), expected=f"{', '.join(PEERS)}, all or none")
    peer: Contender = importlib.import_module(f"{__package__}.{PEERS[name]}").Peer()
    return peer


def main() -> None:
    for name in PEERS:
        try:
            load_peer(name)
            print(f"{name:13} present")
        except (ImportError, OSError) as error:
            print(f"{name:13} missing: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
