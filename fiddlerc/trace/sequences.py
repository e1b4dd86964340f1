"""Texts to token sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from fiddler_runtime.errors import FiddlerError


def cut(
    tokenizer: Any, texts: Sequence[str], *, sequence_tokens: int, prompt_tokens: int, max_tokens: int | None
) -> list[list[int]]:
    """Cuts each text into sequences of `sequence_tokens`, each beginning as the tokenizer begins a text (its BOS).

    A last piece is kept if it is longer than a prompt. Texts take turns, so that `max_tokens` in all is a sample of
    every text. Raises FiddlerError if there is no text, or one is too short for a single sequence.
    """
    if not any(text.strip() for text in texts):
        raise FiddlerError(
            "there is no text to trace",
            found="only empty files" if texts else "no files",
            expected="text that the model will see in use",
            hint="fiddlerc trace MODEL_DIR --text FILE -o trace.safetensors",
        )
    begin = _beginning(tokenizer)
    pieces = []
    for number, text in enumerate(texts, start=1):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        step = sequence_tokens - len(begin)
        cuts = [begin + ids[at : at + step] for at in range(0, len(ids), step)]
        cuts = [piece for piece in cuts if len(piece) > prompt_tokens]
        if not cuts:
            raise FiddlerError(
                f"text {number} of {len(texts)} is too short to trace",
                found=f"{len(begin) + len(ids)} tokens",
                expected=f"more than the {prompt_tokens} of a prompt",
                hint=f"give longer text, or --prompt-tokens below {max(len(begin) + len(ids), 2)}",
            )
        pieces.append(cuts)
    taken = [piece for piece in chain.from_iterable(zip_longest(*pieces)) if piece is not None]
    return taken if max_tokens is None else _first(taken, max_tokens, prompt_tokens)


def describe(texts: Sequence[str]) -> str:
    """Identifies the texts by content, without their names."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    return f"{len(texts)} text{'s' if len(texts) > 1 else ''} (sha256 {digest})"


def _beginning(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _first(sequences: list[list[int]], max_tokens: int, prompt_tokens: int) -> list[list[int]]:
    """As many as fit in `max_tokens`; the last one shortened, or dropped if no more than a prompt is left of it."""
    kept: list[list[int]] = []
    left = max_tokens
    for sequence in sequences:
        piece = sequence[:left]
        if len(piece) <= prompt_tokens:
            break
        kept.append(piece)
        left -= len(piece)
    if not kept:
        raise FiddlerError(
            "too few tokens to trace",
            found=f"at most {max_tokens}",
            expected=f"more than the {prompt_tokens} of a prompt",
            hint=f"give --max-tokens above {prompt_tokens}",
        )
    return kept
