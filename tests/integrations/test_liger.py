"""FusedLinearGRPOLoss against the class of Liger 0.8.5 whose signature it has."""

from __future__ import annotations

import inspect

import pytest
import torch

from fusedgrpo.integrations.liger import FusedLinearGRPOLoss
from fusedgrpo.kernels import LOSS_TYPES

liger = pytest.importorskip("liger_kernel.chunked_loss", reason="needs liger-kernel")
pytestmark = pytest.mark.peer

B, T, H, V = 4, 6, 8, 37


def inputs():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    lengths = torch.tensor([6, 3, 1, 4])
    return {
        "_input": normal(B, T, H),
        "lin_weight": normal(V, H),
        "selected_token_ids": torch.randint(0, V, (B, T), generator=g),
        "attention_mask": (torch.arange(T) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.0, -0.5, 0.0, 0.7]),
        "bias": normal(V),
        "ref_per_token_logps": normal(B, T) * 0.4 - 3,
        "old_per_token_logps": normal(B, T) * 0.4 - 3,
    }


def results(cls, options, tensors):
    trained = {k: tensors[k].clone().requires_grad_() for k in ("_input", "lin_weight", "bias")}
    loss, metrics = cls(**options)(**(tensors | trained))
    loss.backward()
    return loss.detach(), [m.detach() for m in metrics], [x.grad for x in trained.values()]


def assert_same(options, tensors, *, metrics=True):
    want = results(liger.LigerFusedLinearGRPOLoss, options | {"compiled": False}, tensors)
    got = results(FusedLinearGRPOLoss, options, tensors)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    if metrics:
        torch.testing.assert_close(got[1], [m.float() for m in want[1]], rtol=1e-5, atol=1e-6)
    for a, b in zip(got[2], want[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_signatures_are_liger_0_8_5s():
    for method in ("__init__", "forward"):
        ours, theirs = (
            {n: p.default for n, p in inspect.signature(getattr(cls, method)).parameters.items()}
            for cls in (FusedLinearGRPOLoss, liger.LigerFusedLinearGRPOLoss)
        )
        assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "luspo"])
def test_every_loss_type(loss_type, beta):
    assert_same({"loss_type": loss_type, "beta": beta, "max_completion_length": 9}, inputs())


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_sequence_level(loss_type):
    options = {"loss_type": loss_type, "importance_sampling_level": "sequence", "beta": 0.04,
               "max_completion_length": 9}  # fmt: skip
    assert_same(options, inputs(), metrics=False)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"use_bias_correction_kl": True},
        {"epsilon_low": 0.1, "epsilon_high": 0.4},
    ],
    ids=str,
)
def test_options(options):
    assert_same(options, inputs())


def test_what_may_be_left_out_and_added():
    tensors = inputs()
    assert_same({}, {k: v for k, v in tensors.items() if "old" not in k})
    assert_same({"delta": 1.1}, tensors, metrics=False)
    alone = {k: v for k, v in tensors.items() if "ref" not in k}
    assert_same({"beta": 0.0, "use_ref_model": False}, alone)
    assert_same({"use_ref_model": False}, alone)
    for shape in ((B, T), (B, 1)):
        assert_same({}, tensors | {"vllm_is_ratio": 0.5 + torch.rand(*shape)})
    assert_same({}, tensors | {"num_items_in_batch": torch.tensor(40)})
    del tensors["ref_per_token_logps"]
    reference = {"ref_input": torch.randn(B, T, H), "ref_weight": torch.randn(V, H)}
    assert_same({}, tensors | reference)


def test_a_kl_without_a_reference_is_refused():
    tensors = {k: v for k, v in inputs().items() if "ref" not in k}
    with pytest.raises(ValueError, match="needs ref_per_token_logps"):
        FusedLinearGRPOLoss(beta=0.1)(**tensors)
