"""The text of a completion, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # how a decoder shows bytes that are no character yet


def token_texts(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """A text for each of ``ids``; joined they are what all of them decode to, as far as what a
    token says does not change what was said before it.

    A character that several tokens make is the last one's, and those before it are empty. Each
    token is decoded behind the one that spoke last, for at the beginning of a text a decoder may
    leave out its space.
    """
    texts = []
    start = said = 0  # of what spoke last, and the end of it
    for end in range(1, len(ids) + 1):
        behind, now = decode(list(ids[start:said])), decode(list(ids[start:end]))
        if now.endswith(_INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(behind) :])
        start, said = said, end
    return texts
