"""What one step trains on, and what counts in its loss."""

from __future__ import annotations

import torch

from fusedgrpo.engine.rollout.training_sample import (
    TrainingSample,
    concatenated,
    has_gradient,
    loss_mask,
)
from fusedgrpo.kernels import LossOptions
from fusedgrpo.models.packed_batch import Pair

CPU = torch.device("cpu")


def sample(tokens: int, **fields: object) -> TrainingSample:
    return TrainingSample((1, 2), tuple(range(tokens)), advantage=1.0, **fields)  # type: ignore[arg-type]


def test_loss_tokens_are_those_that_the_mask_and_a_finite_weight_leave() -> None:
    weight = torch.tensor([1.0, torch.nan, 0.0, torch.inf])
    assert sample(4).loss_tokens == 4
    assert sample(4, in_loss=False).loss_tokens == 0
    assert sample(4, sampler_weight=weight).loss_tokens == 2
    assert sample(4, sampler_weight=weight, in_loss=False).loss_tokens == 0
    assert sample(2).pair == Pair((1, 2), (0, 1))


def test_what_was_given_is_in_no_count() -> None:
    weight = torch.tensor([1.0, torch.nan, 0.0])
    given = ((1, 2), (4, 6))
    assert sample(6, given=given).own_tokens == sample(6, given=given).loss_tokens == 3
    assert sample(6, given=given, sampler_weight=weight).loss_tokens == 2
    assert sample(6, given=given, sampler_weight=weight).dropped_tokens == 1
    assert sample(6, given=((0, 6),)).loss_tokens == 0
    assert sample(2, given=((0, 1),)).pair == Pair((1, 2), (0, 1), ((0, 1),))
    assert len(loss_mask([sample(6, given=given), sample(2)], CPU)) == 5


def test_the_mask_covers_whole_completions() -> None:
    samples = [sample(2), sample(3, in_loss=False), sample(0), sample(1)]
    assert loss_mask(samples, CPU).tolist() == [True, True, False, False, False, True]


def test_a_field_is_concatenated_only_if_all_have_it() -> None:
    with_old = [sample(2, old_logp=torch.tensor([1.0, 2.0])), sample(1, old_logp=torch.ones(1))]
    joined = concatenated(with_old, "old_logp", CPU)
    assert joined is not None and joined.tolist() == [1.0, 2.0, 1.0]
    assert concatenated([*with_old, sample(3)], "old_logp", CPU) is None


def test_a_gradient_that_is_exactly_zero_is_known_beforehand() -> None:
    plain, kl = LossOptions(), LossOptions(beta=0.1)
    flat = TrainingSample((1,), (2, 3), advantage=0.0)
    assert has_gradient(sample(2), plain, 0.0)
    assert not has_gradient(flat, plain, 0.0)
    assert has_gradient(flat, kl, 0.0) and has_gradient(flat, plain, 0.1)
    assert not has_gradient(sample(2, in_loss=False), kl, 0.1), "nothing in the loss at all"
    assert not has_gradient(sample(0), kl, 0.1)
