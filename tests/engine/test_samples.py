"""Cutting a step into micro-batches, and what counts in its loss."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedgrpo.engine.samples import Sample, concatenated, loss_mask, micro_batches

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 100))
def test_every_sequence_once_within_the_budget_longest_first(
    lengths: list[int], budget: int
) -> None:
    batches = micro_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1
    widths = [max(lengths[i] for i in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_a_batch_is_filled_before_the_next_one_begins() -> None:
    assert micro_batches([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert micro_batches([4, 4, 4, 4], 16) == [[0, 1, 2, 3]]
    assert micro_batches([1, 100, 1], 2) == [[1], [0, 2]]
    assert micro_batches([], 8) == []


def sample(tokens: int, **fields: object) -> Sample:
    return Sample((1, 2), tuple(range(tokens)), advantage=1.0, **fields)  # type: ignore[arg-type]


def test_loss_tokens_are_those_that_the_mask_and_a_finite_weight_leave() -> None:
    weight = torch.tensor([1.0, torch.nan, 0.0, torch.inf])
    assert sample(4).loss_tokens == 4
    assert sample(4, in_loss=False).loss_tokens == 0
    assert sample(4, sampler_weight=weight).loss_tokens == 2
    assert sample(4, sampler_weight=weight, in_loss=False).loss_tokens == 0
    assert sample(4).num_tokens == 6


def test_the_mask_covers_whole_completions() -> None:
    samples = [sample(2), sample(3, in_loss=False), sample(0), sample(1)]
    assert loss_mask(samples, CPU).tolist() == [True, True, False, False, False, True]


def test_a_field_is_concatenated_only_if_all_have_it() -> None:
    with_old = [sample(2, old_logp=torch.tensor([1.0, 2.0])), sample(1, old_logp=torch.ones(1))]
    joined = concatenated(with_old, "old_logp", CPU)
    assert joined is not None and joined.tolist() == [1.0, 2.0, 1.0]
    assert concatenated([*with_old, sample(3)], "old_logp", CPU) is None
