"""Prompts and completions laid end to end: what one forward pass sees.

T tokens of a batch, N scored tokens (those of completions that the policy wrote), B completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fusedgrpo.kernels.custom_op import check_target_range
from fusedgrpo.models.sending import send_numbers

Ids = Sequence[int]
# Half-open ranges of a completion's tokens.
Spans = Sequence[tuple[int, int]]


class Pair(NamedTuple):
    """prompt, completion: token ids. given: the parts of the completion that the policy did not
    write, such as answers of tools: they are read, and not scored."""

    prompt: Ids
    completion: Ids
    given: Spans = ()


def own_places(length: int, given: Spans) -> list[int]:
    """The places of ``length`` tokens that are in none of the ``given`` spans."""
    if not given:
        return list(range(length))
    inside = {place for start, stop in given for place in range(start, stop)}
    return [place for place in range(length) if place not in inside]


# How a batch goes through the model, from the least work to the most compatible:
# each prompt once for all its completions; each completion after a prompt of its own; the same,
# one sequence per row of a padded batch.
Layout = Literal["shared", "packed", "rows"]


class Segment(NamedTuple):
    """Tokens ``start : start + length`` of T, which see themselves, causally, and before
    themselves the ``prefix_length`` tokens from ``prefix_start``."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B sequences "prompt + completion" without padding.

    A completion's last token predicts nothing and is not forwarded, unless the batch is ``whole``,
    for a model whose router has a loss over all tokens. In layout ``"shared"`` a prompt
    is one segment, and each of its completions another one with the prompt as its prefix; in the
    other layouts a segment is a whole sequence.

    input_ids, position_ids: ``[T]`` int64; positions of a completion go on from its prompt's.
    targets: ``[N]`` int64, the scored tokens, completion after completion in the order given.
    predictors: ``[N]`` int64, where in T the hidden state sits that predicts each of them.
    cu_completions: ``[B+1]`` int64, completion i is ``targets[cu_completions[i]:...[i+1]]``.
    target_range: the least and the greatest of the targets, which the host can look at; None where
    there are none.
    copies: ``[T]`` int64 in a whole batch, in how many of the B sequences a token is.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    predictors: Tensor
    cu_completions: Tensor
    segments: tuple[Segment, ...]
    layout: Layout
    target_range: tuple[int, int] | None
    copies: Tensor | None = None

    @classmethod
    def build(
        cls,
        pairs: Sequence[tuple[Ids, Ids] | Pair],
        device: torch.device | str,
        layout: Layout = "shared",
        *,
        whole: bool = False,
        counted: Sequence[bool] | None = None,
    ) -> PackedBatch:
        """Pack prompts with their completions. Every prompt needs a token.

        Prompts that are equal are one prompt in layout ``"shared"``, wherever their pairs stand.
        counted: the completions whose tokens have copies, by default all.
        """
        asked = [Pair(*pair) for pair in pairs]
        if any(not pair.prompt for pair in asked):
            raise ValueError("A prompt without tokens has nothing to predict from.")
        ids: list[int] = []
        positions: list[int] = []
        copies: list[int] = []
        segments: list[Segment] = []
        # Per pair, in the order of T: where the prompt's last token went, and the completion's
        # first one.
        last: list[int] = [0] * len(asked)
        first: list[int] = [0] * len(asked)
        for prompt, members in _families(asked, layout):
            start = len(ids)
            ids.extend(prompt)
            positions.extend(range(len(prompt)))
            copies.extend([len(members)] * len(prompt))
            if layout == "shared":
                segments.append(Segment(start, len(prompt)))
            for i in members:
                forwarded = asked[i].completion if whole else asked[i].completion[:-1]
                last[i], first[i] = start + len(prompt) - 1, len(ids)
                ids.extend(forwarded)
                positions.extend(range(len(prompt), len(prompt) + len(forwarded)))
                copies.extend([int(counted is None or counted[i])] * len(forwarded))
                if layout != "shared":
                    segments.append(Segment(start, len(prompt) + len(forwarded)))
                elif forwarded:
                    segments.append(Segment(first[i], len(forwarded), start, len(prompt)))

        predictors: list[int] = []
        targets: list[int] = []
        ends = [0]
        for i, (_, completion, given) in enumerate(asked):
            own = own_places(len(completion), given)
            predictors.extend(first[i] + place - 1 if place else last[i] for place in own)
            targets.extend(completion[place] for place in own)
            ends.append(len(targets))

        return cls(
            input_ids=send_numbers(ids, device),
            position_ids=send_numbers(positions, device),
            targets=send_numbers(targets, device),
            predictors=send_numbers(predictors, device),
            cu_completions=send_numbers(ends, device),
            segments=tuple(segments),
            layout=layout,
            target_range=(min(targets), max(targets)) if targets else None,
            copies=send_numbers(copies, device) if whole else None,
        )

    def padded_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Segments as rows, padded on the right: ids and mask, ``[segments, longest]``, and where
        in the rows end to end each of the T tokens is, ``[T]``. For layout ``"rows"``."""
        longest = max((s.length for s in self.segments), default=0)
        starts = range(0, longest * len(self.segments), longest or 1)
        places = send_numbers(
            [at + i for at, s in zip(starts, self.segments, strict=True) for i in range(s.length)],
            self.input_ids.device,
        )
        ids = self.input_ids.new_zeros(longest * len(self.segments))
        mask = torch.zeros_like(ids, dtype=torch.bool).index_fill(0, places, True)
        ids.index_copy_(0, places, self.input_ids)
        shape = len(self.segments), longest
        return ids.view(shape), mask.view(shape), places

    def check_targets(self, vocabulary: int) -> None:
        """IndexError for a target that is not of the vocabulary; the host knows them."""
        if self.target_range is not None:
            check_target_range(*self.target_range, vocabulary)

    @property
    def num_tokens(self) -> int:
        """T: what is forwarded, padding of rows aside."""
        return len(self.input_ids)


def _families(pairs: Sequence[Pair], layout: Layout) -> list[tuple[Ids, list[int]]]:
    """Prompts with the pairs that share them; one pair each where prompts are not shared."""
    if layout != "shared":
        return [(pair.prompt, [i]) for i, pair in enumerate(pairs)]
    families: dict[tuple[int, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        families.setdefault(tuple(pair.prompt), []).append(i)
    return list(families.items())
