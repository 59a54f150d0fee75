"""The order of prompts: each once per epoch, a function of seed and cursor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedgrpo.engine.data.dataset import Example, PromptDataset
from fusedgrpo.engine.data.stream import PromptStream


def stream(size: int, *, seed: int = 0, shuffle: bool = True) -> PromptStream:
    examples = [Example(row=i, prompt=str(i), prompt_ids=(i,), columns={}) for i in range(size)]
    data = PromptDataset(examples, column_names=[], conversational=False, source="test")
    return PromptStream(data, seed=seed, shuffle=shuffle)


def take(prompts: PromptStream, count: int) -> list[int]:
    rows = [example.row for example in prompts.peek(count)]
    prompts.cursor += count
    return rows


@given(
    size=st.integers(1, 12),
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    shuffle=st.booleans(),
)
def test_every_prompt_comes_once_in_each_epoch(size: int, counts: list[int], shuffle: bool) -> None:
    prompts = stream(size, shuffle=shuffle)
    rows = [row for count in counts for row in take(prompts, count)]
    assert len(rows) == sum(counts) == prompts.cursor
    for start in range(0, len(rows) - size + 1, size):
        assert sorted(rows[start : start + size]) == list(range(size))
    assert prompts.epoch == pytest.approx(len(rows) / size)


def test_looking_ahead_does_not_move_the_cursor() -> None:
    prompts = stream(5)
    assert prompts.peek(7) == prompts.peek(7)
    assert prompts.cursor == 0


def test_a_cursor_alone_resumes_the_order_across_epochs() -> None:
    whole = take(stream(7, seed=3), 30)
    for cursor in range(30):
        resumed = stream(7, seed=3)
        resumed.cursor = cursor
        assert take(resumed, 30 - cursor) == whole[cursor:]


def test_epochs_and_seeds_differ_and_shuffling_can_be_off() -> None:
    rows = take(stream(20, seed=1), 40)
    assert rows[:20] != rows[20:]
    assert rows[:20] != take(stream(20, seed=2), 20)
    assert take(stream(4, shuffle=False), 8) == [0, 1, 2, 3, 0, 1, 2, 3]
