"""Texts to sequences, with a tokenizer of one token per character."""

from __future__ import annotations

import pytest

from fiddler_runtime.errors import FiddlerError
from fiddlerc.trace.sequences import cut, describe


class Characters:
    """Knows what `cut` asks of a tokenizer. With a BOS of 1 it begins a text so, and ends it with 2."""

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(c) for c in text]
        return {"input_ids": [self.bos_token_id, *ids, 2] if add_special_tokens and self.bos_token_id else ids}


def cuts(*texts: str, bos: int | None = None, size: int = 4, prompt: int = 2, most: int | None = None) -> list[str]:
    found = cut(Characters(bos), texts, sequence_tokens=size, prompt_tokens=prompt, max_tokens=most)
    return ["".join("^" if i == 1 else chr(i) for i in ids) for ids in found]


def test_pieces_and_the_last_one() -> None:
    assert cuts("abcdefgh") == ["abcd", "efgh"]
    assert cuts("abcdefg") == ["abcd", "efg"]
    assert cuts("abcdef") == ["abcd"], "two tokens are no more than a prompt"


def test_every_piece_begins_as_a_text_does() -> None:
    assert cuts("abcdef", bos=1) == ["^abc", "^def"]


def test_texts_take_turns() -> None:
    assert cuts("abcdefghijkl", "ABCD") == ["abcd", "ABCD", "efgh", "ijkl"]
    assert cuts("abcdefghijkl", "ABCD", most=8) == ["abcd", "ABCD"]
    assert cuts("abcdefghijkl", "ABCD", most=11) == ["abcd", "ABCD", "efg"]
    assert cuts("abcdefghijkl", "ABCD", most=10) == ["abcd", "ABCD"]


def test_nothing_left() -> None:
    with pytest.raises(FiddlerError, match="too few tokens"):
        cuts("abcdefgh", most=2)
    with pytest.raises(FiddlerError, match="text 2 of 2 is too short"):
        cuts("abcdefgh", "ab")
    with pytest.raises(FiddlerError, match="no text"):
        cuts()


def test_texts_are_named_by_content() -> None:
    assert describe(["a"]).startswith("1 text (sha256 ")
    assert describe(["a", "b"]) != describe(["ab"])
