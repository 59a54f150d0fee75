"""Texts of tokens, joined, are the text of the completion."""

from __future__ import annotations

import pytest

from fusedgrpo.engine.rollout.token_texts import token_texts


def as_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def spaces_but_the_first(ids: list[int]) -> str:
    """As SentencePiece does: a word begins with a space, but not at the beginning of a text."""
    return "".join(f" w{i}" for i in ids)[1:]


@pytest.mark.parametrize("text", ["", "plain", "naïve €5 👍🏽 計算", "👍"])
def test_a_character_of_several_tokens_is_the_last_ones(text: str) -> None:
    ids = list(text.encode())
    texts = token_texts(as_bytes, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert all(len(each) <= 1 for each in texts)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    assert token_texts(as_bytes, list("a€".encode()[:-1])) == ["a", "", "\ufffd"]


def test_spaces_between_words_are_kept() -> None:
    assert token_texts(spaces_but_the_first, [3, 4, 5]) == ["w3", " w4", " w5"]
