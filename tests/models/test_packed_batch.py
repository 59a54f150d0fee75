"""Packing: every completion token is scored once, from the position before it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgrpo.models.packed_batch import PackedBatch, Pair, Segment

TOKENS = st.integers(0, 99)
PROMPTS = st.sampled_from([[7], [1, 2, 3], [4, 5, 6, 7, 8]])
PAIRS = st.lists(
    st.tuples(PROMPTS, st.lists(TOKENS, max_size=6)),
    min_size=1,
    max_size=6,
)
LAYOUTS = st.sampled_from(["shared", "packed", "rows"])


def sequence(packed: PackedBatch, place: int) -> list[int]:
    """The tokens that the one at ``place`` of T sees, itself last; positions are 0, 1, ..."""
    [segment] = [s for s in packed.segments if s.start <= place < s.start + s.length]
    start, length = segment.prefix_start, segment.prefix_length
    seen = [*range(start, start + length), *range(segment.start, place + 1)]
    assert packed.position_ids[seen].tolist() == list(range(len(seen)))
    return packed.input_ids[seen].tolist()


@given(PAIRS, LAYOUTS)
@settings(max_examples=80, deadline=None)
def test_each_token_is_predicted_from_all_that_came_before_it(pairs: list, layout: str) -> None:
    packed = PackedBatch.build(pairs, "cpu", layout)  # type: ignore[arg-type]
    scored = packed.cu_completions.tolist()
    assert scored[-1] == len(packed.targets) == len(packed.predictors)
    for i, (prompt, completion) in enumerate(pairs):
        rows = slice(scored[i], scored[i + 1])
        assert packed.targets[rows].tolist() == completion
        for k, place in enumerate(packed.predictors[rows].tolist()):
            assert sequence(packed, place) == prompt + completion[:k]


@given(PAIRS, LAYOUTS, st.booleans(), st.data())
@settings(max_examples=80, deadline=None)
def test_what_was_given_is_seen_and_not_scored(
    pairs: list, layout: str, whole: bool, data: st.DataObject
) -> None:
    conversations = []
    for prompt, completion in pairs:
        borders = st.lists(st.integers(0, len(completion)), max_size=4, unique=True)
        cut = sorted(data.draw(borders))
        spans = list(zip(cut[::2], cut[1::2], strict=False))
        conversations.append(Pair(prompt, completion, spans))
    packed = PackedBatch.build(conversations, "cpu", layout, whole=whole)  # type: ignore[arg-type]
    plain = PackedBatch.build(pairs, "cpu", layout, whole=whole)  # type: ignore[arg-type]
    assert packed.input_ids.tolist() == plain.input_ids.tolist()
    assert packed.segments == plain.segments
    scored = packed.cu_completions.tolist()
    for i, (prompt, completion, spans) in enumerate(conversations):
        own = [k for k in range(len(completion)) if not any(a <= k < b for a, b in spans)]
        rows = slice(scored[i], scored[i + 1])
        assert packed.targets[rows].tolist() == [completion[k] for k in own]
        for k, place in zip(own, packed.predictors[rows].tolist(), strict=True):
            assert sequence(packed, place) == prompt + completion[:k]


@given(PAIRS, LAYOUTS)
@settings(max_examples=40, deadline=None)
def test_segments_tile_the_tokens_and_prompts_are_there_as_often_as_the_layout_says(
    pairs: list, layout: str
) -> None:
    packed = PackedBatch.build(pairs, "cpu", layout)  # type: ignore[arg-type]
    covered = sorted(t for s in packed.segments for t in range(s.start, s.start + s.length))
    assert covered == list(range(packed.num_tokens))
    prompts = {tuple(p) for p, _ in pairs} if layout == "shared" else [p for p, _ in pairs]
    completions = sum(max(len(c) - 1, 0) for _, c in pairs)
    assert packed.num_tokens == sum(map(len, prompts)) + completions


def test_two_completions_of_one_prompt() -> None:
    packed = PackedBatch.build([([5, 6], [7, 8, 9]), ([5, 6], [4])], "cpu")
    assert packed.input_ids.tolist() == [5, 6, 7, 8]
    assert packed.position_ids.tolist() == [0, 1, 2, 3]
    assert packed.predictors.tolist() == [1, 2, 3, 1], "both start from the prompt's last token"
    assert packed.segments == (Segment(0, 2), Segment(2, 2, 0, 2))


def test_rows_are_padded_on_the_right() -> None:
    packed = PackedBatch.build([([5, 6], [7, 8]), ([4], [3])], "cpu", "rows")
    ids, mask, places = packed.padded_rows()
    assert ids.tolist() == [[5, 6, 7], [4, 0, 0]]
    assert torch.equal(mask, torch.tensor([[True, True, True], [True, False, False]]))
    assert places.tolist() == [0, 1, 2, 3]
    empty = PackedBatch.build([], "cpu", "rows").padded_rows()
    assert [part.numel() for part in empty] == [0, 0, 0]


def test_targets_are_looked_at_on_the_host() -> None:
    packed = PackedBatch.build([([5, 6], [7, 2]), ([4], [9])], "cpu")
    assert packed.target_range == (2, 9)
    packed.check_targets(10)
    with pytest.raises(IndexError, match="target id 9 is outside the vocabulary of 9"):
        packed.check_targets(9)
    PackedBatch.build([([5], [])], "cpu").check_targets(1)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt without tokens"):
        PackedBatch.build([([1], [2]), ([], [3])], "cpu")
