"""GRPOLoss: padded tensors in, the same numbers as one completion at a time."""

from __future__ import annotations

import pytest
import torch

import fusedgrpo
from fusedgrpo.kernels import LossOptions
from fusedgrpo.kernels.reference import reference_linear_logprob, reference_policy_loss

B, T, H, V = 3, 5, 8, 31
LENGTHS = [5, 2, 4]


def make(kernel):
    torch.manual_seed(0)
    made = {
        "hidden": torch.randn(B, T, H),
        "weight": torch.randn(V, H),
        "bias": torch.randn(V),
        "completion_ids": torch.randint(0, V, (B, T)),
        "completion_mask": (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long(),
        "advantages": torch.randn(B),
        "old_logps": torch.randn(B, T) - 3,
        "ref_logps": torch.randn(B, T) - 3,
    }
    padding = made["completion_mask"] == 0
    made["completion_ids"][padding] = -100
    made["old_logps"][padding] = torch.nan
    made["hidden"][padding] = torch.nan
    return {name: x.to(kernel.device) for name, x in made.items()}


def expected(tensors, options, **head):
    """Loss and gradients from float64, without the padding."""
    keep = tensors["completion_mask"].bool()
    hidden = tensors["hidden"][keep].double().requires_grad_()
    weight = tensors["weight"].double().requires_grad_()
    logp, _ = reference_linear_logprob(
        hidden, weight, tensors["completion_ids"][keep], bias=tensors["bias"].double(), **head
    )
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    loss = reference_policy_loss(
        logp,
        tensors["advantages"].double(),
        ends,
        options=options,
        old_logp=tensors["old_logps"][keep].double(),
        ref_logp=tensors["ref_logps"][keep].double(),
    )
    loss.backward()
    return loss, hidden.grad, weight.grad


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_it_equals_the_reference_without_padding(kernel, loss_type):
    tensors = make(kernel)
    options = {"loss_type": loss_type, "beta": 0.1, "max_completion_length": 7}
    loss_fn = fusedgrpo.GRPOLoss(temperature=0.7, softcap=9.0, backend=kernel.backend, **options)
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    loss, metrics = loss_fn(**tensors)
    loss.backward()
    want = expected(
        {k: x.detach() for k, x in tensors.items()},
        LossOptions(**options),
        temperature=0.7,
        softcap=9.0,
    )
    keep = tensors["completion_mask"].bool()
    torch.testing.assert_close(loss.double(), want[0].detach(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad[keep].double(), want[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), want[2], rtol=1e-4, atol=1e-6)
    assert torch.equal(hidden.grad[~keep], torch.zeros_like(hidden.grad[~keep]))
    assert metrics["kl"] > 0


def test_split_into_calls_with_the_steps_denominators_it_adds_up(kernel):
    tensors = make(kernel)
    bias = tensors.pop("bias")
    loss_fn = fusedgrpo.GRPOLoss(backend=kernel.backend)
    weight = tensors.pop("weight")
    whole, _ = loss_fn(weight=weight, bias=bias, **tensors)
    parts = [
        loss_fn(
            weight=weight,
            bias=bias,
            num_items=sum(LENGTHS),
            **{k: x[i : i + 1] for k, x in tensors.items()},
        )[0]
        for i in range(B)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_advantages_may_be_a_column_and_other_shapes_are_named(kernel):
    tensors = make(kernel)
    loss_fn = fusedgrpo.GRPOLoss(backend=kernel.backend)
    column = {**tensors, "advantages": tensors["advantages"][:, None]}
    assert torch.equal(loss_fn(**tensors)[0], loss_fn(**column)[0])
    with pytest.raises(ValueError, match="advantages has shape"):
        loss_fn(**{**tensors, "advantages": torch.randn(B, T)})
    with pytest.raises(ValueError, match=r"old_logps has shape \(3, 4\)"):
        loss_fn(**{**tensors, "old_logps": tensors["old_logps"][:, 1:]})
    with pytest.raises(ValueError, match="hidden has shape"):
        loss_fn(**{**tensors, "completion_ids": tensors["completion_ids"][:, 1:]})
    with pytest.raises(ValueError, match="loss_type='ppo'"):
        fusedgrpo.GRPOLoss(loss_type="ppo")
