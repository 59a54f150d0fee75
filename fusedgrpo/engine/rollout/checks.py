"""Whether what somebody else's sampler returned is a rollout, before anything trains on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch

from fusedgrpo.engine.rollout.types import Completion, FinishReason, Group
from fusedgrpo.errors import NonFiniteError, SamplerError, brief


def check_groups(
    groups: Any,
    prompt_ids: Sequence[Sequence[int]],
    n: int,
    rows: Sequence[int],
    *,
    max_new_tokens: int,
    vocabulary_size: int,
    who: str,
) -> list[Group]:
    """``groups`` as a list. Raises SamplerError, which names ``who``, unless they are ``n``
    completions for each prompt, in order."""
    if not isinstance(groups, (list, tuple)):
        raise SamplerError(f"{who}: sample returned {_kind(groups)}, expected a list of Group.")
    if len(groups) != len(prompt_ids):
        raise SamplerError(
            f"{who}: sample returned {len(groups)} groups for {len(prompt_ids)} prompts."
        )
    for i, (group, prompt, row) in enumerate(zip(groups, prompt_ids, rows, strict=True)):
        problems = _of_group(group, prompt, row, n, max_new_tokens, vocabulary_size)
        if problem := next(problems, None):
            raise SamplerError(f"{who}: group {i} of {len(groups)} (data row {row}) {problem}.")
    return list(groups)


# These say what is wrong; they are asked for the first thing alone, and rely on it.
def _of_group(
    group: Any, prompt: Sequence[int], row: int, n: int, limit: int, vocabulary: int
) -> Iterator[str]:
    if not isinstance(group, Group):
        yield f"is {_kind(group)}, expected a Group"
    if group.row != row or list(group.prompt_ids) != list(prompt):
        yield (
            f"has row {group.row} and the prompt {brief(list(group.prompt_ids))}, expected those "
            f"that were asked for, in order: row {row}, {brief(list(prompt))}"
        )
    if len(group.completions) != n:
        yield f"has {len(group.completions)} completions, expected {n}"
    for k, completion in enumerate(group.completions):
        for problem in _of_completion(completion, limit, vocabulary):
            yield f"has a completion ({k}) that {problem}"


def _of_completion(completion: Any, limit: int, vocabulary: int) -> Iterator[str]:
    if not isinstance(completion, Completion):
        yield f"is {_kind(completion)}, expected a Completion"
    ids, logp = completion.ids, completion.logp
    if not isinstance(ids, (list, tuple)) or not set(map(type, ids)) <= {int}:
        yield f"has ids that are no tuple of int: {brief(ids)}"
    if not ids:
        yield "has no token; the end token counts as one"
    if len(ids) > limit:
        yield f"has {len(ids)} tokens, and max_new_tokens is {limit}"
    if min(ids) < 0 or max(ids) >= vocabulary:
        wrong = next(token for token in ids if not 0 <= token < vocabulary)
        yield f"has the token {wrong}; the vocabulary of the model has {vocabulary}"
    if completion.finish_reason not in get_args(FinishReason):
        expected = " or ".join(map(repr, get_args(FinishReason)))
        yield f"has finish_reason {completion.finish_reason!r}, expected {expected}"
    if not isinstance(completion.text, str):
        yield f"has a text that is {_kind(completion.text)}"
    yield from _of_given(completion.given, len(ids))
    if logp is None:
        return
    own = completion.own_tokens
    if not isinstance(logp, torch.Tensor):
        yield f"has logp that is {_kind(logp)}, expected a float32 tensor or None"
    if logp.dtype != torch.float32 or logp.shape != (own,) or logp.device.type != "cpu":
        yield (
            f"has logp {str(logp.dtype).removeprefix('torch.')} {list(logp.shape)} on "
            f"{logp.device.type}, expected float32 [{own}] on cpu"
        )


def _of_given(given: Any, tokens: int) -> Iterator[str]:
    if not isinstance(given, tuple) or not all(
        isinstance(span, tuple) and set(map(type, span)) == {int} and len(span) == 2
        for span in given
    ):
        yield f"has given that is no tuple of pairs of int: {brief(given)}"
    borders = [border for span in given for border in span]
    if borders != sorted(set(borders)) or (borders and not 0 <= borders[0] < borders[-1] <= tokens):
        yield (
            f"has given {brief(given)}, expected spans (start, stop) that are apart, ascending and "
            f"inside of its {tokens} tokens"
        )


def _kind(value: Any) -> str:
    return f"a {type(value).__qualname__}"


def check_finite(completion: Completion, row: int) -> None:
    """A token was drawn from NaN or infinite logits: then it means nothing."""
    assert completion.logp is not None
    bad = ~completion.logp.isfinite()
    if bad.any():
        raise NonFiniteError(
            f"While sampling for data row {row}, token {int(bad.nonzero()[0]) + 1} of a completion "
            "had logits that are no distribution (NaN or infinity): the weights, or what the model "
            "computes from this prompt, are not finite."
        )
