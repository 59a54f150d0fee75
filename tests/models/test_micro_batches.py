"""Cutting a step into micro-batches: nothing lost, within the budget, prompts counted once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusedgrpo.models.micro_batches import forwarded_tokens, micro_batches
from fusedgrpo.models.packed_batch import PackedBatch

LAYOUTS = st.sampled_from(["shared", "packed", "rows"])
# Three prompts at most, so that most samples share one.
PROMPTS = [(1,), (2,) * 7, (3,) * 20]
PAIRS = st.lists(
    st.tuples(st.sampled_from(PROMPTS), st.integers(0, 30).map(lambda n: tuple(range(n)))),
    max_size=20,
)


@given(PAIRS, st.integers(1, 120), LAYOUTS)
def test_every_sample_once_within_the_budget_largest_first(pairs, budget, layout):
    batches = micro_batches(pairs, budget, layout)
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
    tokens = [forwarded_tokens([pairs[i] for i in batch], layout) for batch in batches]
    for batch, size in zip(batches, tokens, strict=True):
        assert size <= budget or len(batch) == 1
    if layout != "rows":
        assert tokens == sorted(tokens, reverse=True)
    else:
        widths = [max(len(pairs[i][0]) + max(len(pairs[i][1]) - 1, 0) for i in b) for b in batches]
        assert widths == sorted(widths, reverse=True)


@given(PAIRS.filter(bool), st.sampled_from(["shared", "packed"]))
def test_what_is_counted_is_what_is_forwarded(pairs, layout):
    assert forwarded_tokens(pairs, layout) == PackedBatch.build(pairs, "cpu", layout).num_tokens


def test_completions_of_a_prompt_stay_together_and_pay_for_it_once():
    pairs = [((1,) * 10, (0,) * 6), ((2,) * 10, (0,) * 6)] * 4
    assert micro_batches(pairs, 30, "shared") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert micro_batches(pairs, 60, "shared") == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert forwarded_tokens(pairs, "shared") == 60
    assert forwarded_tokens(pairs, "packed") == forwarded_tokens(pairs, "rows") == 120


def test_a_group_that_is_too_large_repeats_its_prompt_once_per_part():
    pairs = [((1,) * 10, (0,) * n) for n in (3, 11, 6, 6)]
    assert micro_batches(pairs, 20, "shared") == [[1], [2, 3], [0]]
    batches = micro_batches(pairs, 22, "shared")
    assert batches == [[0, 2, 3], [1]], "longest first: 10 + 5 + 5 + 2, then 10 + 10"
    assert micro_batches(pairs, 5, "shared") == [[1], [2], [3], [0]], "one pair is the least"


def test_no_samples_are_no_batches():
    assert micro_batches([], 8, "shared") == micro_batches([], 8, "rows") == []
    assert forwarded_tokens([], "rows") == forwarded_tokens([], "shared") == 0
