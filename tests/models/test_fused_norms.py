"""Which norms of a model are taken for RMSNorms, and that sampling is the same with them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.models import fused_norms
from fusedgrpo.models.fused_norms import FusedNorms
from fusedgrpo.models.policy import Policy


@pytest.fixture(autouse=True)
def _torch_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing would be taken."""
    monkeypatch.setattr(fused_norms, "resolve_backend", lambda *_: "triton")


def test_where_torch_would_compute_it_the_module_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norms, "resolve_backend", lambda *_: "torch")
    assert len(FusedNorms(tiny.model(), torch.float32)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "family,count",
    [("Llama", 5), ("Qwen3", 9), ("Gemma2", 9), ("Gemma3", 13), ("Cohere", 0), ("Granite", 5)],
)
def test_the_norms_of_a_family_are_found_and_give_the_same(
    family: str, count: int, dtype: torch.dtype
) -> None:
    model = tiny.model(family).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.7, 0.3)
    norms = FusedNorms(model, dtype)
    assert len(norms) == count
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        want = model(ids).logits.double()
        with norms.active():
            got = model(ids).logits.double()
        again = model(ids).logits.double()
    assert torch.equal(want, again), "nothing is left behind"
    assert (got - want).norm() <= (1e-5 if dtype == torch.float32 else 1e-3) * want.norm()


class Other(nn.Module):
    """Looks like one and is none."""

    def __init__(self, how: str):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))
        self.eps = 1e-5
        self.how = how

    def forward(self, x: torch.Tensor) -> Any:
        if self.how == "centred":
            return nn.functional.layer_norm(x, (16,), self.weight, eps=self.eps)
        if self.how == "tuple":
            return (x,)
        if self.how == "refuses":
            raise RuntimeError("two arguments, please")
        size = x.abs().mean(-1, keepdim=True)  # not the root of the mean square
        return x / (size + self.eps) * self.weight


@pytest.mark.parametrize("how", ["centred", "tuple", "refuses", "mean"])
def test_what_computes_something_else_is_left_alone(how: str) -> None:
    assert len(FusedNorms(nn.ModuleList([Other(how)]), torch.float32)) == 0


def test_a_module_that_somebody_has_patched_is_left_alone() -> None:
    model = tiny.model()
    norm = model.model.norm
    norm.forward = own = lambda x: x
    norms = FusedNorms(model, torch.float32)
    assert len(norms) == 4
    with norms.active():
        assert norm.forward is own
    assert norm.forward is own


def test_completions_are_the_same_with_them() -> None:
    policy = Policy(tiny.model("Qwen3"))
    found = []
    for fused in (False, True):
        sampler = DecoderSampler(policy, tiny.tokenizer(), [tiny.EOS])
        assert len(sampler.norms) == 9
        if not fused:
            sampler.norms._fused.clear()
        groups = sampler.sample([[5, 6, 7], [9]], 3, SamplingParams(max_new_tokens=12), seed=1)
        found.append([c for group in groups for c in group.completions])
    for plain, fused in zip(*found, strict=True):
        assert plain.ids == fused.ids
        torch.testing.assert_close(plain.logp, fused.logp, rtol=0, atol=1e-5)
