"""Tasks of the package ``reasoning-gym`` as data and as a reward: prompts without end, each with a
verifier. ``dataset: reasoning_gym:NAME`` in a configuration.

A row says which question it is, not what its answer must look like: the verifier makes the question
again, from task, options, seed and index, and judges with all that it knows of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from fusedgrpo.errors import DataError, brief, did_you_mean, reason

PREFIX = "reasoning_gym:"
REWARD = "reasoning_gym"  # by its name in reward_funcs
SIZE, HELD_OUT = 1000, 64  # questions, where nobody says how many
# Question i of the package's seed s is question i - 1 of its seed s + 1: ours are far apart.
APART = 1_000_003
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def is_task(name: Any) -> bool:
    """Whether the name of a data set is that of tasks."""
    return isinstance(name, str) and name.startswith(PREFIX)


@dataclasses.dataclass(frozen=True)
class Share:
    """So many questions of a task. options: of its difficulty."""

    task: str
    size: int
    options: dict[str, Any]


def shares_of(name: str, options: Mapping[str, Any] | None, held_out: bool) -> list[Share]:
    """The tasks of ``reasoning_gym:A*2+B``, a part of the questions for each by its weight.

    options: ``size`` and ``seed``, and by the name of a task the fields of its configuration.
    Raises DataError for a task, or an option, that there is none of.
    """
    known = registered()
    given = dict(options or {})
    size = _whole(given, "held_out_size", HELD_OUT) if held_out else _whole(given, "size", SIZE)
    weights: dict[str, float] = {}
    for part in name.removeprefix(PREFIX).split("+"):
        task, _, weight = (text.strip() for text in part.partition("*"))
        if task not in known:
            raise DataError(
                f"{PREFIX}{task}: there is no such task.{did_you_mean(task, known)} `fusedgrpo "
                "tasks` lists them."
            )
        if task in weights:
            raise DataError(f"{name}: {task} is named twice; give it a weight, as in {task}*2.")
        weights[task] = _weight(part, weight)
    for key in given.keys() - {"size", "held_out_size", "seed"} - weights.keys():
        raise DataError(
            f"task_options: {key!r} is no task of {name}, nor size, held_out_size or seed."
            f"{did_you_mean(str(key), [*weights, 'size', 'seed'])}"
        )
    total = sum(weights.values())
    return [
        Share(task, max(1, round(size * weight / total)), _difficulty(task, given.get(task)))
        for task, weight in weights.items()
    ]


def task_rows(
    name: str, options: Mapping[str, Any] | None, *, held_out: bool, messages: bool
) -> list[dict[str, Any]]:
    """The questions as rows: ``prompt`` (a user's message, or text), ``answer``, ``task``, and what
    the verifier finds the question by. held_out: of other seeds. Raises DataError."""
    seed = (2 * _whole(dict(options or {}), "seed", 0, least=0) + held_out) * APART % 2**31
    rows = []
    for share in shares_of(name, options, held_out):
        source = json.dumps({**share.options, "seed": seed, "size": share.size}, sort_keys=True)
        questions = _questions(share.task, source)
        for index in range(share.size):
            entry = questions[index]
            text = entry["question"]
            rows.append(
                {
                    "prompt": [{"role": "user", "content": text}] if messages else text,
                    "answer": str(entry["answer"]),
                    "task": share.task,
                    "task_index": index,
                    "task_source": source,
                }
            )
    return rows


def verify(
    completions: list[Any],
    task: list[str],
    task_index: list[int],
    task_source: list[str],
    **columns: Any,
) -> list[float]:
    """The verifier's score, 0 to 1, of what stands in the last ``<answer>`` of a completion, or of
    all of it. A reward function in TRL's convention for rows of ``task_rows``."""
    scores = []
    for completion, name, index, source in zip(
        completions, task, task_index, task_source, strict=True
    ):
        questions = _questions(name, source)
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        found = _ANSWER.findall(text)
        answer = (found[-1] if found else text).strip()
        scores.append(float(questions.score_answer(answer, questions[index])))
    return scores


def registered() -> dict[str, Any]:
    """Task -> class of its options. Raises DataError where the package is missing."""
    try:
        import reasoning_gym  # noqa: F401 - it registers them
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"{PREFIX}NAME needs the package reasoning-gym: pip install 'fusedgrpo[tasks]' "
            f"({reason(error)})."
        ) from error
    return {name: options for name, (_, options) in DATASETS.items() if name != "composite"}


def difficulty_of(task: str) -> dict[str, Any]:
    """The options of a task with their defaults. Raises DataError."""
    made = registered()[task]()
    return {
        field.name: getattr(made, field.name)
        for field in dataclasses.fields(made)
        if field.name not in ("seed", "size")
    }


@functools.lru_cache(maxsize=256)
def _questions(task: str, source: str) -> Any:
    """The questions of a task; source: the fields of its configuration as JSON. Raises DataError
    where it does not take them."""
    import reasoning_gym

    try:
        return _Kept(reasoning_gym.create_dataset(task, **json.loads(source)))
    except Exception as error:  # each task checks its own in its own way
        raise DataError(f"{PREFIX}{task} does not take {source}: {reason(error)}.") from error


class _Kept:
    """Questions that were made once; one may take long to make, and has as many completions as a
    group."""

    def __init__(self, questions: Any):
        self._all = questions
        self._one = functools.lru_cache(maxsize=1024)(questions.__getitem__)
        self.score_answer = questions.score_answer

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = self._one(index)
        except Exception as error:  # a generator that finds no question of this difficulty
            raise DataError(f"Question {index} cannot be made: {reason(error)}.") from error
        return entry


def _difficulty(task: str, given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    fields = difficulty_of(task)
    if not isinstance(given, Mapping):
        raise DataError(f"task_options: {task}: expected its options by name, got {brief(given)}.")
    for key in given.keys() - fields.keys():
        raise DataError(
            f"task_options: {task} has no option {key!r}.{did_you_mean(str(key), fields)} It has "
            f"{', '.join(fields)}."
        )
    return dict(given)


def _whole(given: Mapping[str, Any], key: str, default: int, least: int = 1) -> int:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(
            f"task_options: {key}: expected a whole number >= {least}, got {brief(value)}."
        )
    return value


def _weight(part: str, text: str) -> float:
    try:
        weight = float(text or 1)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise DataError(f"{PREFIX}{part.strip()}: expected a weight above 0 after the *.")
    return weight
