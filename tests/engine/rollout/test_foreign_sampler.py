"""Somebody else's sampler: what it returns is a rollout, or the error says what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.rollout.foreign_sampler import ForeignSampler
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.shared_sampler import SharedSampler
from fusedgrpo.engine.rollout.types import Completion, Group
from fusedgrpo.errors import ConfigError, SamplerError

PROMPTS, ROWS, LIMIT, VOCABULARY = [[5, 6], [7]], [3, 9], 4, 40
PARAMS = SamplingParams(max_new_tokens=LIMIT)
GOOD = Completion((8, 2), "w8", "stop", torch.tensor([-1.0, float("nan")]))


class Fixed:
    """Only what a sampler has to have."""

    def __init__(self, change: Callable[[list[Any]], Any] = lambda groups: groups):
        self.change = change
        self.asked: list[Any] = []

    def sample(
        self, prompt_ids: Any, n: int, params: Any, seed: int, *, rows: Any, first: int = 0
    ) -> Any:
        self.asked.append((n, params, seed, list(rows), first))
        pairs = zip(rows, prompt_ids, strict=True)
        return self.change([Group(row, tuple(prompt), (GOOD,) * n) for row, prompt in pairs])


def foreign(sampler: Any) -> ForeignSampler:
    return ForeignSampler(sampler, VOCABULARY, "sampler (Fixed)")


def with_completion(**changes: Any) -> Callable[[list[Group]], list[Group]]:
    """The second completion of the second group is another one."""
    bad = dataclasses.replace(GOOD, **changes)
    return lambda groups: [groups[0], dataclasses.replace(groups[1], completions=(GOOD, bad))]


def second_group(**changes: Any) -> Callable[[list[Group]], list[Group]]:
    return lambda groups: [groups[0], dataclasses.replace(groups[1], **changes)]


def test_what_is_right_is_passed_on() -> None:
    sampler = Fixed()
    groups = foreign(sampler).sample(PROMPTS, 2, PARAMS, 7, rows=ROWS, first=5)
    assert [(g.row, g.prompt_ids, len(g.completions)) for g in groups] == [
        (3, (5, 6), 2), (9, (7,), 2),
    ]  # fmt: skip
    assert sampler.asked == [(2, PARAMS, 7, ROWS, 5)]
    assert [group.row for group in foreign(sampler).sample(PROMPTS, 1, PARAMS, 0)] == [0, 1]
    assert foreign(sampler).sample([], 2, PARAMS, 7) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": [8, 2]},
        {"ids": (39,) * LIMIT, "logp": None, "finish_reason": "length"},
        {"ids": (8, 9, 2), "given": ((0, 1),), "logp": torch.zeros(2)},
    ],
    ids=["a list of ids", "at the limits, without logp", "given tokens"],
)
def test_what_is_allowed(changes: dict[str, Any]) -> None:
    groups = foreign(Fixed(with_completion(**changes))).sample(PROMPTS, 2, PARAMS, 0, rows=ROWS)
    assert groups[1].completions[1].ids == changes["ids"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda groups: None, r"sample returned a NoneType, expected a list of Group"),
        (lambda groups: groups[:1], r"sample returned 1 groups for 2 prompts"),
        (lambda groups: [groups[0], "x"], r"group 1 of 2 \(data row 9\) is a str"),
        (lambda groups: groups[::-1], r"group 0 .* has row 9 and the prompt \[7\].*row 3, \[5, 6"),
        (second_group(row=4), r"group 1 of 2 .*has row 4 .*row 9"),
        (second_group(prompt_ids=(8,)), r"the prompt \[8\], expected .*\[7\]"),
        (second_group(completions=(GOOD,)), r"has 1 completions, expected 2"),
        (second_group(completions=(GOOD, (8, 2))), r"a completion \(1\) that is a tuple"),
        (with_completion(ids=()), r"has no token"),
        (with_completion(ids=(1,) * (LIMIT + 1)), r"has 5 tokens, and max_new_tokens is 4"),
        (with_completion(ids=(8, VOCABULARY)), r"the token 40; the vocabulary .* has 40"),
        (with_completion(ids=(-1, 2)), r"the token -1"),
        (with_completion(ids=(8, 2.0)), r"no tuple of int"),
        (with_completion(ids=torch.tensor([8, 2])), r"no tuple of int"),
        (with_completion(finish_reason="eos"), r"finish_reason 'eos', expected 'stop' or 'length'"),
        (with_completion(text=None), r"a text that is a NoneType"),
        (with_completion(given=[(0, 1)]), r"no tuple of pairs of int"),
        (with_completion(given=((0, 1, 2),)), r"no tuple of pairs of int"),
        (with_completion(given=((1, 3),)), r"inside of its 2 tokens"),
        (with_completion(given=((1, 1),)), r"expected spans"),
        (with_completion(given=((1, 2),), logp=torch.zeros(2)), r"expected float32 \[1\]"),
        (with_completion(logp=[-1.0, -1.0]), r"logp that is a list"),
        (with_completion(logp=torch.zeros(2).double()), r"logp float64 \[2\] on cpu, expected fl"),
        (with_completion(logp=torch.zeros(3)), r"logp float32 \[3\].*expected float32 \[2\]"),
        (with_completion(logp=torch.zeros(2, device="meta")), r"on meta, expected .*on cpu"),
    ],
)
def test_what_is_no_rollout_is_refused(change: Any, problem: str) -> None:
    with pytest.raises(SamplerError, match=rf"sampler \(Fixed\).*{problem}"):
        foreign(Fixed(change)).sample(PROMPTS, 2, PARAMS, 0, rows=ROWS)


@pytest.mark.parametrize("given", [object(), Fixed, type("NoMethod", (), {"sample": 3})()])
def test_an_object_that_cannot_sample_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"sampler \(Fixed\): expected"):
        foreign(given)


def test_the_other_methods_are_called_where_there_are_any() -> None:
    plain = foreign(Fixed())
    plain.weights_changed()
    assert plain.warm_up(PROMPTS, 2, PARAMS) is False

    class Told(Fixed):
        told = 0

        def weights_changed(self) -> None:
            self.told += 1

        def warm_up(self, prompt_ids: Any, n: int, params: Any) -> bool:
            self.warm = prompt_ids, n, params
            return True

    told = Told()
    shared = SharedSampler(foreign(told), Processes())
    shared.weights_changed()
    assert told.told == 1 and shared.warm_up(PROMPTS, 2, PARAMS) is True
    assert told.warm == (PROMPTS, 2, PARAMS)


def test_the_base_class_has_all_but_sample() -> None:
    with pytest.raises(TypeError, match="sample"):
        Sampler()  # type: ignore[abstract]

    class Least(Sampler):
        def sample(self, *args: Any, **kwargs: Any) -> list[Group]:
            return []

    least = Least()
    least.weights_changed()
    assert least.warm_up(PROMPTS, 2, PARAMS) is False
