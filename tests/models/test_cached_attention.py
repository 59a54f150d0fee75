"""The plan of a decode step: what it makes of the tables once, and what each layer gets from it."""

from __future__ import annotations

import pytest
import torch
from paged import Paged, paged
from torch import nn

from fusedgrpo.kernels import decode_attention
from fusedgrpo.models import cached_attention
from fusedgrpo.models.cached_attention import TokenPlan
from fusedgrpo.models.kv_cache import PAGE, PagedCache


def plan_of(case: Paged, layers: list[nn.Module]) -> tuple[TokenPlan, torch.Tensor, torch.Tensor]:
    """A plan whose cache holds the pools of ``case`` in each layer, but not the last tokens; and
    keys and values of those, ``[1, h_kv, M, d]``."""
    cache = PagedCache(len(case.keys))
    for layer in layers:
        cache.write(
            layer,
            case.keys.flatten(0, 1),
            case.values.flatten(0, 1),
            torch.arange(case.keys[..., 0, 0].numel()),
        )
    last = case.own_lengths.long() - 1
    page = case.own_pages.gather(1, (last // PAGE)[:, None])[:, 0]
    slots = page * PAGE + last % PAGE
    key, value = (x.flatten(0, 1)[slots].transpose(0, 1)[None] for x in (case.keys, case.values))
    return TokenPlan(cache, slots, *list(case)[3:]), key, value


CASE = {"prompts": [20, 3], "own": [[1, 30, 17], [40]], "page": PAGE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_two_windows_get_what_the_operator_gives_from_one_layout_each(monkeypatch, dtype):
    case = paged(**CASE).to(dtype)
    layers = [nn.Identity() for _ in range(4)]
    plan, key, value = plan_of(case, layers)
    plain, made = cached_attention.layout_for, []
    monkeypatch.setattr(cached_attention, "layout_for", lambda *a: made.append(a[-1]) or plain(*a))
    for layer, window in zip(layers, (None, 9, 9, None), strict=True):
        query = torch.randn_like(case.query)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got = plan.attend(
                layer, query.transpose(0, 1)[None], key, value, window=window, softcap=3.0
            )
        want = decode_attention(query, *list(case)[1:], window=window, softcap=3.0)
        assert got.shape == (1, *want.shape) and torch.equal(got[0], want)
    assert made == [None, 9]


def test_a_gradient_is_refused():
    case = paged(**CASE)
    layer = nn.Identity()
    plan, key, value = plan_of(case, [layer])
    query = case.query.transpose(0, 1)[None].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        plan.attend(layer, query, key, value)
