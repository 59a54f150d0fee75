"""The built-in reward functions, under TRL's calling convention.

Where TRL 1.16 has the function, ours returns the same values. All take completions as strings
and as message lists. :data:`FUNCTIONS` are used as they are; :data:`FACTORIES` make a function
from the arguments in ``reward_kwargs``.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from fusedgrpo.engine.columns import ANSWER, CONVENTION
from fusedgrpo.engine.rewards.math_answer import is_correct, latex_verdict, text_of
from fusedgrpo.errors import RewardError
from fusedgrpo.tasks import verify

Completions = list[Any]
Rewards = list[float | None]
LogExtra = Callable[[str, list[Any]], None]

REFERENCE_COLUMNS = (
    ANSWER,
    "references",
    "reference",
    "answer",
    "output",
    "ground_truth",
    "label",
    "target",
)

_FORMAT_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def accuracy(
    completions: Completions, log_extra: LogExtra | None = None, **columns: Any
) -> Rewards:
    """1 if the completion gives the reference answer, else 0; None for a row without one.

    Three rules, one of which is enough: what stands between ``<answer>`` and ``</answer>`` is
    the reference to the letter; it is mathematically equal to it by math-verify (without the
    tags, the last expression of the completion is taken); without the tags, the completion is
    the reference to the letter. What precedes ``</think>`` never counts, save inside the tags.
    The reference is the first of the columns :data:`REFERENCE_COLUMNS` that the data has.

    Raises :class:`RewardError` if the data has none of them.
    """
    name = next((name for name in REFERENCE_COLUMNS if name in columns), None)
    if name is None:
        present = sorted(columns.keys() - set(CONVENTION))
        raise RewardError(
            "reward function 'accuracy' needs a column with the reference answer, one of "
            f"{', '.join(REFERENCE_COLUMNS)}; the data has: {', '.join(present) or 'no column'}"
        )
    references = [_as_text(name, reference) for reference in columns[name]]
    if log_extra is not None:
        log_extra("reference", references)
    return [
        float(is_correct(text_of(completion), reference)) if reference else None
        for completion, reference in zip(completions, references, strict=True)
    ]


def _as_text(column: str, reference: Any) -> str | None:
    if getattr(reference, "ndim", None) == 0:  # a scalar of NumPy or torch
        reference = reference.item()
    if reference is None:
        return None
    if isinstance(reference, str):
        return reference
    if isinstance(reference, numbers.Number) and not isinstance(reference, bool):
        return None if reference != reference else str(reference)  # NaN: an empty cell of a table
    raise RewardError(
        f"reward function 'accuracy': column {column!r} holds {reference!r} "
        f"({type(reference).__name__}), expected a string or a number"
    )


def format(completions: Completions, **kwargs: Any) -> Rewards:
    """1 if the completion has one ``<think>...</think>`` and, after it, one
    ``<answer>...</answer>``; other text may stand around the two blocks."""
    return [float(_has_format(text_of(completion))) for completion in completions]


def _has_format(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in _FORMAT_TAGS):
        return False
    places = [text.index(tag) for tag in _FORMAT_TAGS]
    return places == sorted(places)


def think_format_reward(completions: Completions, **kwargs: Any) -> Rewards:
    """1 if the completion opens with its only ``<think>`` and closes it, else 0."""
    texts = [text_of(completion) for completion in completions]
    return [
        float(text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text)
        for text in texts
    ]


def accuracy_reward(
    completions: Completions,
    solution: list[str],
    log_extra: LogExtra | None = None,
    **kwargs: Any,
) -> Rewards:
    """1 if the LaTeX in the completion equals ``solution``, else 0; None if that is no math."""
    verdicts = [
        latex_verdict(gold, text_of(completion))
        for completion, gold in zip(completions, solution, strict=True)
    ]
    return _rewards(verdicts, solution, log_extra)


def reasoning_accuracy_reward(
    completions: Completions,
    solution: list[str],
    reasoning_delimiters: list[str] | None = None,
    log_extra: LogExtra | None = None,
    **kwargs: Any,
) -> Rewards:
    """:func:`accuracy_reward` of what follows the reasoning; 0 for reasoning that never ends.

    reasoning_delimiters: what ends the reasoning, the first one that occurs (``</think>``).
    """
    delimiters = ["</think>"] if reasoning_delimiters is None else reasoning_delimiters
    verdicts: list[tuple[float | None, str, str]] = []
    for completion, gold in zip(completions, solution, strict=True):
        text = text_of(completion)
        end = next((delimiter for delimiter in delimiters if delimiter in text), None)
        if end is None:
            verdicts.append((0.0, "[incomplete reasoning]", "[incomplete reasoning]"))
        else:
            verdicts.append(latex_verdict(gold, text.rsplit(end, 1)[-1]))
    return _rewards(verdicts, solution, log_extra)


def _rewards(
    verdicts: list[tuple[float | None, str, str]], solution: list[str], log_extra: LogExtra | None
) -> Rewards:
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", [gold for _, gold, _ in verdicts])
        log_extra("answer_parsed", [answer for _, _, answer in verdicts])
    return [reward for reward, _, _ in verdicts]


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., Rewards]:
    """Correctness scaled by length along half a cosine (arXiv 2502.03373, C.1).

    A right completion earns ``max_value_correct`` at length 0 and ``min_value_correct`` from
    ``max_len`` tokens on; a wrong one ``min_value_wrong`` and ``max_value_wrong``. Right is what
    :func:`accuracy_reward` says; None where that is None.
    """
    if max_len <= 0:
        raise RewardError(f"cosine_scaled: max_len is {max_len}, expected a number of tokens > 0")

    def cosine_scaled_reward(
        completions: Completions,
        solution: list[str],
        completion_ids: list[list[int]],
        **kwargs: Any,
    ) -> Rewards:
        rewards: Rewards = []
        for right, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            if right is None:
                rewards.append(None)
                continue
            if right:
                short, long = max_value_correct, min_value_correct
            else:
                short, long = min_value_wrong, max_value_wrong
            share = (1.0 + math.cos(math.pi * min(len(ids) / max_len, 1.0))) / 2.0
            rewards.append(long + (short - long) * share)
        return rewards

    return cosine_scaled_reward


def get_repetition_penalty_reward(
    ngram_size: int = 3, max_penalty: float = -1.0
) -> Callable[..., Rewards]:
    """``max_penalty`` times the share of token n-grams that repeat (arXiv 2502.03373, C.2)."""
    if ngram_size < 1:
        raise RewardError(f"repetition_penalty: ngram_size is {ngram_size}, expected at least 1")
    if max_penalty > 0:
        raise RewardError(f"repetition_penalty: max_penalty is {max_penalty}, expected <= 0")

    def repetition_penalty_reward(completion_ids: list[list[int]], **kwargs: Any) -> Rewards:
        rewards: Rewards = []
        for ids in completion_ids:
            total = len(ids) - ngram_size + 1
            unique = len({tuple(ids[i : i + ngram_size]) for i in range(total)})
            rewards.append(max_penalty * (1 - unique / total) if total > unique else 0.0)
        return rewards

    return repetition_penalty_reward


def get_soft_overlong_punishment(
    max_completion_len: int, soft_punish_cache: int
) -> Callable[..., Rewards]:
    """0 up to ``max_completion_len - soft_punish_cache`` tokens, then down to -1 (DAPO, eq. 13).

    The fall is linear and ends at ``max_completion_len``; -1 beyond.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise RewardError(
            f"soft_overlong_punishment: soft_punish_cache is {soft_punish_cache}, expected 0 to "
            f"max_completion_len ({max_completion_len})"
        )

    def soft_overlong_punishment_reward(completion_ids: list[list[int]], **kwargs: Any) -> Rewards:
        rewards: Rewards = []
        for ids in completion_ids:
            over = len(ids) - (max_completion_len - soft_punish_cache)
            if over <= 0:
                rewards.append(0.0)
            elif len(ids) <= max_completion_len:
                rewards.append(-over / soft_punish_cache)
            else:
                rewards.append(-1.0)
        return rewards

    return soft_overlong_punishment_reward


def reasoning_gym(
    completions: Completions, task_index: list[int] | None = None, **columns: Any
) -> Rewards:
    """The score of the task's own verifier (``fusedgrpo.tasks.verify``). Raises
    :class:`RewardError` for other data than ``dataset: reasoning_gym:NAME``."""
    if task_index is None:
        raise RewardError(
            "reward function 'reasoning_gym' is the verifier of dataset: reasoning_gym:NAME, and "
            "the data has no task."
        )
    return list(verify(completions, task_index=task_index, **columns))


FUNCTIONS: dict[str, Callable[..., Rewards]] = {
    "accuracy": accuracy,
    "format": format,
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "reasoning_gym": reasoning_gym,
}

FACTORIES: dict[str, Callable[..., Callable[..., Rewards]]] = {
    "cosine_scaled": get_cosine_scaled_reward,
    "get_cosine_scaled": get_cosine_scaled_reward,
    "get_cosine_scaled_reward": get_cosine_scaled_reward,
    "repetition_penalty": get_repetition_penalty_reward,
    "get_repetition_penalty": get_repetition_penalty_reward,
    "get_repetition_penalty_reward": get_repetition_penalty_reward,
    "soft_overlong_punishment": get_soft_overlong_punishment,
    "get_soft_overlong_punishment": get_soft_overlong_punishment,
}
