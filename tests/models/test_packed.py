"""Packing: every completion token is scored once, from the position before it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgrpo.models.packed import PackedBatch

TOKENS = st.integers(0, 99)
PAIRS = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=6), st.lists(TOKENS, max_size=6)),
    min_size=1,
    max_size=5,
)


@given(PAIRS)
@settings(max_examples=60, deadline=None)
def test_sequences_and_targets_come_back_from_the_offsets(pairs: list) -> None:
    packed = PackedBatch.build(pairs, "cpu")
    ids, ends, scored = (
        x.tolist() for x in (packed.input_ids, packed.cu_seqlens, packed.cu_completions)
    )
    for i, (prompt, completion) in enumerate(pairs):
        assert ids[ends[i] : ends[i + 1]] == prompt + completion
        rows = slice(scored[i], scored[i + 1])
        assert packed.targets[rows].tolist() == completion
        first = ends[i] + len(prompt) - 1
        expected = list(range(first, first + len(completion)))
        assert packed.predictors[rows].tolist() == expected
    assert packed.max_length == max(len(p) + len(c) for p, c in pairs)
    assert scored[-1] == len(packed.predictors)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt without tokens"):
        PackedBatch.build([([1], [2]), ([], [3])], "cpu")
