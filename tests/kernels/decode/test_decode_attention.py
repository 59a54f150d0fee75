"""decode_attention against one softmax per row, in double precision, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged import Paged, paged
from torch.nn.functional import scaled_dot_product_attention

from fusedgrpo.kernels import backend, decode_attention
from fusedgrpo.kernels.backend import interpreted
from fusedgrpo.kernels.decode import layout
from fusedgrpo.kernels.launch import decode_launch
from fusedgrpo.kernels.reference import reference_decode_attention

# Prompts that end within a page, at its end and just after it; completions likewise.
PROMPTS = [5, 8, 17]
OWN = [[1, 3, 9], [4], [5, 12]]


def run(kernel, case: Paged, **options):
    out = decode_attention(*case.to(kernel.device), backend=kernel.backend, **options)
    assert out.dtype == case.values.dtype and out.device.type == kernel.device.type
    return out.cpu()


def assert_right(kernel, case: Paged, **options):
    got = run(kernel, case, **options)
    want = reference_decode_attention(*case.to(torch.float64), **options)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def named(options) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "plain"


OPTIONS = [
    {},
    {"scaling": 0.4},
    {"softcap": 1.5},
    {"window": 1},
    {"window": 2},  # within what most rows said
    {"window": 7},  # into some prompts
    {"window": 7, "softcap": 1.5, "scaling": 0.5},
    {"window": 40},  # more than there is
]


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("scattered", [True, False])
def test_it_equals_the_reference(kernel, scattered, options):
    assert_right(kernel, paged(PROMPTS, OWN, scattered=scattered), **options)


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (6, 2), (8, 1), (9, 3), (24, 3)])
@pytest.mark.parametrize("options", [{}, {"window": 7}], ids=named)
def test_heads_that_share_keys(kernel, heads, kv_heads, options):
    assert_right(kernel, paged(PROMPTS, OWN, heads=heads, kv_heads=kv_heads), **options)


@pytest.mark.parametrize("d,d_values", [(16, 8), (8, 24), (80, 80), (96, 16), (256, 256)])
def test_head_dimensions_and_values_of_another_one(kernel, d, d_values):
    assert_right(kernel, paged([6], [[2, 5]], d=d, d_values=d_values, heads=2, kv_heads=1))


@pytest.mark.parametrize("page", [1, 3, 16])
def test_pages_of_any_size(kernel, page):
    assert_right(kernel, paged(PROMPTS, OWN, page=page), window=6)


def test_one_row_with_one_token(kernel):
    assert_right(kernel, paged([1], [[1]]))


def test_one_row_without_company(kernel):
    assert_right(kernel, paged([9], [[6]]))


@pytest.mark.parametrize("options", [{}, {"window": 3}], ids=named)
def test_groups_and_prompts_may_be_empty(kernel, options):
    assert_right(kernel, paged([0, 6, 3], [[2, 9], [], [1]]), **options)


@pytest.mark.parametrize("window", [None, 100, 170])
def test_many_keys_and_many_rows(kernel, window):
    """More than a block of keys, a split and a tile of queries."""
    own = [[1, 2, 70], [3] * 5]
    assert_right(kernel, paged([150, 290], own, heads=6, kv_heads=1, page=16, d=16), window=window)


@pytest.mark.parametrize("options", [{}, {"window": 12}], ids=named)
def test_rows_of_very_different_lengths(kernel, options):
    """Own keys are gathered apart, and the rows come back in their order."""
    assert_right(kernel, paged([3, 4], [[1, 160, 9], [150, 2, 161]]), **options)


def test_without_queries_the_result_is_empty(kernel):
    case = paged([3], [[1]], d_values=8)
    empty = case.replace(
        query=case.query[:0],
        prompt_pages=case.prompt_pages[:0],
        prompt_lengths=case.prompt_lengths[:0],
        cu_rows=case.cu_rows[:1],
        own_pages=case.own_pages[:0],
        own_lengths=case.own_lengths[:0],
    )
    assert run(kernel, empty).shape == (0, 4, 8)


@settings(
    max_examples=15 if interpreted() else 100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    groups=st.lists(
        st.tuples(st.integers(0, 19), st.lists(st.integers(1, 40), max_size=4)),
        min_size=1,
        max_size=4,
    ).filter(lambda groups: any(own for _, own in groups)),
    rep=st.sampled_from([1, 3]),
    window=st.none() | st.integers(1, 50),
    softcap=st.sampled_from([None, 2.0]),
    scattered=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ragged_groups_equal_the_reference(kernel, groups, rep, window, softcap, scattered, seed):
    prompts, own = map(list, zip(*groups, strict=True))
    case = paged(prompts, own, heads=2 * rep, scattered=scattered, seed=seed, d=8)
    assert_right(kernel, case, window=window, softcap=softcap)


@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 3.0}], ids=named)
def test_a_row_alone_equals_the_row_in_company(kernel, options, monkeypatch):
    if interpreted():
        # BLAS sums some rows of a product in another order than others; a GPU's tile does not.
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[..., None] * b).sum(1))
    case = paged([37, 20, 70], [[1, 30, 9, 12], [70, 3], [5, 64]], heads=6)
    together = run(kernel, case, **options)
    for wanted in [(0,), (3,), (5,), (1, 6), (2, 3, 4)]:
        alone = run(kernel, case.rows(*wanted), **options)
        if kernel.backend == "triton":
            assert torch.equal(alone, together[list(wanted)])
        else:
            torch.testing.assert_close(alone, together[list(wanted)], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("device", "capability", "turing"),
    [
        ("cuda", (7, 5), True),
        ("cuda", (8, 0), False),
        ("cuda", None, False),
        ("cpu", (7, 5), False),
    ],
)
def test_turing_is_told_by_the_compute_capability(monkeypatch, device, capability, turing):
    monkeypatch.setattr(backend, "_capability", lambda device: capability)  # None: AMD
    assert backend.is_turing(torch.device(device)) is turing


@pytest.mark.skipif(not interpreted(), reason="launches are Triton's")
def test_turings_launches_compute_the_same(kernel, monkeypatch):
    if kernel.backend != "triton":
        pytest.skip("launches are Triton's")
    from fusedgrpo.kernels.decode import attention_triton

    asked = []

    def noting(*sizes, **how):
        asked.append(how["turing"])
        return decode_launch(*sizes, **how)

    monkeypatch.setattr(attention_triton, "is_turing", lambda device: True)
    monkeypatch.setattr(attention_triton, "decode_launch", noting)
    case = paged(PROMPTS, OWN).to(torch.float16)
    want = reference_decode_attention(*case.to(torch.float64))
    assert (run(kernel, case).double() - want).abs().max() < 2e-3
    assert asked == [True, True]


def test_twice_the_same_bits_and_inputs_as_they_were(kernel):
    case = paged(PROMPTS, OWN)
    before = [x.clone() for x in case]
    first = run(kernel, case, window=5, softcap=2.0)
    assert torch.equal(first, run(kernel, case, window=5, softcap=2.0))
    for x, y in zip(case, before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharp", [1.0, 6.0])
def test_16_bit_errs_at_most_twice_as_much_as_plain_torch(kernel, dtype, sharp):
    case = paged([40, 23], [[30, 7, 1], [18, 2]], d=64, d_values=64, sharp=sharp).to(dtype)
    exact = reference_decode_attention(*case.to(torch.float64))
    plain = torch.stack([_plain(case, m) for m in range(len(case.query))])
    got = run(kernel, case)
    ours, theirs = ((x.double() - exact).abs() for x in (got, plain))
    assert ours.max() <= 2 * theirs.max() and ours.mean() <= 2 * theirs.mean()


def _plain(case: Paged, m: int) -> torch.Tensor:
    """Row ``m`` by torch's own attention in the dtype of the inputs."""
    one = case.rows(m)
    page = case.keys.shape[1]
    parts = (one.prompt_pages[0], one.prompt_lengths), (one.own_pages[0], one.own_lengths)
    places = torch.cat(
        [
            (pages[: -(-int(n) // page)].repeat_interleave(page) * page).view(-1, page)
            .add(torch.arange(page)).flatten()[: int(n)]
            for pages, n in parts
        ]
    )  # fmt: skip
    k, v = (x.flatten(0, 1)[places].transpose(0, 1)[None] for x in (case.keys, case.values))
    return scaled_dot_product_attention(one.query[:, :, None], k, v, enable_gqa=True)[0, :, 0]


def test_pools_may_be_slices_and_the_query_transposed(kernel):
    case = paged(PROMPTS, OWN).to(kernel.device)
    both = torch.stack([case.keys, case.values], 1)  # [pages, 2, page, h_kv, d]
    query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    got = decode_attention(query, both[:, 0], both[:, 1], *list(case)[3:], backend=kernel.backend)
    assert torch.equal(got, decode_attention(*case, backend=kernel.backend))


def test_tables_may_be_int64(kernel):
    case = paged(PROMPTS, OWN)
    wide = Paged(*(x if x.is_floating_point() else x.long() for x in case))
    assert torch.equal(run(kernel, wide), run(kernel, case))


def test_under_autocast_nothing_changes(kernel):
    case = paged(PROMPTS, OWN)
    with torch.autocast(kernel.device.type, torch.bfloat16):
        got = run(kernel, case)
    assert torch.equal(got, run(kernel, case))


# --- torch alone -----------------------------------------------------------------------------


def test_double_precision_stays_double():
    case = paged(PROMPTS, OWN).to(torch.float64)
    got = decode_attention(*case, backend="torch", window=6)
    torch.testing.assert_close(got, reference_decode_attention(*case, window=6), atol=1e-12, rtol=0)


@pytest.mark.parametrize("most", [1, 2000])
def test_own_keys_are_gathered_piece_by_piece(monkeypatch, most):
    monkeypatch.setattr(layout, "GATHERED", most)
    case = paged([5, 3], [[1, 30, 7, 7], [29, 2, 31]])
    want = reference_decode_attention(*case.to(torch.float64))
    torch.testing.assert_close(
        decode_attention(*case, backend="torch").double(), want, rtol=1e-5, atol=1e-5
    )


def test_a_gradient_is_refused():
    case = paged(PROMPTS, OWN)
    case.query.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        decode_attention(*case)
    with torch.no_grad():
        assert not decode_attention(*case).requires_grad


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"query": torch.zeros(6, 4, 8)}, ValueError, "query has shape"),
        ({"query": torch.zeros(6, 3, 16)}, ValueError, "3 heads are no multiple of 2"),
        ({"query": torch.zeros(6, 4, 16).half()}, TypeError, "one floating dtype"),
        ({"values": torch.zeros(2, 4, 2, 16)}, ValueError, "the same pages"),
        ({"own_lengths": torch.ones(6)}, ValueError, "own_lengths has"),
        ({"cu_rows": torch.tensor([0, 6])}, ValueError, "cu_rows has"),
        ({"cu_rows": torch.tensor([0, 3, 4, 5])}, ValueError, "from 0 to the 6 queries"),
        ({"own_lengths": torch.tensor([1, 3, 0, 4, 5, 12])}, ValueError, "own_lengths="),
        ({"own_lengths": torch.tensor([1, 3, 99, 4, 5, 12])}, ValueError, "own_lengths="),
        ({"prompt_lengths": torch.tensor([5, 99, 17])}, ValueError, "prompt_lengths="),
        ({"prompt_pages": torch.full((3, 7), -1)}, IndexError, "has pages"),
        ({"own_pages": torch.full((6, 5), 999)}, IndexError, "out of range"),
    ],
)
def test_what_does_not_fit_is_an_error(change, error, message):
    case = paged(PROMPTS, OWN).replace(**change)
    with pytest.raises(error, match=message):
        decode_attention(*case, backend="torch")


@pytest.mark.parametrize(
    "option,message",
    [({"window": 0}, "window=0"), ({"softcap": 0.0}, "softcap"), ({"scaling": torch.inf}, "scal")],
)
def test_options_without_a_meaning_are_an_error(option, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(*paged(PROMPTS, OWN), **option)
