"""Forward passes that decode: one ragged row of whole prompts, or of the last tokens of sequences.

Nothing here knows an architecture. The model's own decoder runs, with positions of each token and
a plan that its attention reads (``cached_attention.py``). What a step needs is on the device before
it begins, the tokens of the step before included, so nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fusedgrpo.models.cached_attention import PromptPlan, TokenPlan
from fusedgrpo.models.decode_graphs import StepGraphs
from fusedgrpo.models.decode_step import DecodeStep, Said
from fusedgrpo.models.kv_cache import PAGE, PagedCache, pages_of, slots_of
from fusedgrpo.models.packed_batch import Segment
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.sending import send_numbers

# Tokens that are read at once after what their rows have.
READ_TOGETHER = 128


@dataclass(eq=False, slots=True)
class Prompt:
    """A prompt in the cache. hidden: ``[H]``, the state of its last token once it was read."""

    ids: Sequence[int]
    pages: list[int]
    hidden: Tensor | None = None


@dataclass(eq=False, slots=True)
class Row:
    """A sequence that is being decoded. place: its row in the decoder's tables. seed: of its noise.
    said: tokens that were asked for so far, the last of which is not in the cache yet."""

    prompt: Prompt
    place: int
    seed: int
    said: int = 0
    pages: list[int] = field(default_factory=list)


class Choose(Protocol):
    """From ``hidden [M, H]`` to tokens and their log-probs, ``[M]`` each, for the token at place
    ``at [M]`` of completions with ``seeds [M]``. seen: ``[M, longest]``, the sequences so far,
    filled up with a token of theirs, where ``reads_history`` says that it is looked at. allowed:
    ``[M, W]`` uint8, a bit for each token that may be chosen; None for all. Must not wait for the
    device."""

    @property
    def reads_history(self) -> bool: ...

    def __call__(
        self,
        hidden: Tensor,
        seeds: Tensor,
        at: Tensor,
        seen: Tensor | None,
        allowed: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...


# Makes ``allowed``. Asked when the forward pass before the choice was launched, so that on a GPU
# the host works beside it.
Allowed = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Room:
    """The room in a decoder: ``pages`` of the cache, ``rows`` sequences of up to ``most`` tokens,
    after prompts of up to ``prompt`` tokens."""

    pages: int
    rows: int
    most: int
    prompt: int


class RaggedDecoder:
    """Reads prompts and tokens into a cache; to be used in ``policy.scoring()`` and its autocast.

    graphs: replays the steps of a number of rows; None runs each one by itself.
    """

    def __init__(
        self, policy: Policy, room: Room, choose: Choose, graphs: StepGraphs | None = None
    ):
        self.policy = policy
        self.choose = choose
        self.graphs = graphs
        self.device = policy.device
        self.dtype = policy.dtype
        self.rows = room.rows
        self.room = room
        self.cache = PagedCache(room.pages + 1)
        # Rows that only fill a graph up write here.
        (self._spare,) = self.cache.take(1)
        width = max(-(-room.most // PAGE), 1)
        self._table = self._zeros(room.rows + 1, width).int()
        self._table[-1] = self._spare
        self._last = self._zeros(room.rows + 1)
        self._history = None
        if choose.reads_history:
            self._history = self._zeros(room.rows + 1, room.prompt + room.most)
        self._members: tuple[Row, ...] = ()
        self._groups: tuple[Tensor, ...] = ()
        self._new_pages: list[tuple[int, int]] = []  # where in the table, and which

    def read(self, prompts: Sequence[Prompt]) -> None:
        """Keep ``prompts``, and set the ``hidden`` of each."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        segments: list[Segment] = []
        for prompt in prompts:
            segments.append(Segment(len(ids), len(prompt.ids)))
            ids += prompt.ids
            positions += range(len(prompt.ids))
            slots += slots_of(prompt.pages, len(prompt.ids))
        plan = PromptPlan(segments, self.cache, self._index(slots))
        hidden = self._forward(self._index(ids), self._index(positions), plan)
        for prompt, segment in zip(prompts, segments, strict=True):
            prompt.hidden = hidden[segment.start + segment.length - 1].clone()

    def first(self, rows: Sequence[Row], allowed: Allowed | None = None) -> Said:
        """The first tokens of ``rows``, whose prompts were read; of those that are ``allowed``."""
        states: list[Tensor] = []
        for row in rows:
            assert row.prompt.hidden is not None
            states.append(row.prompt.hidden)
        if self._history is not None:
            for row in rows:
                self._history[row.place] = row.prompt.ids[0]
                self._history[row.place, : len(row.prompt.ids)] = self._index(row.prompt.ids)
        numbers = [[row.place, len(row.prompt.ids) - 1, row.seed] for row in rows]
        places, positions, seeds = self._index(numbers).T
        zeros = torch.zeros_like(seeds)
        seen = self._seen(places)
        result = self.choose(torch.stack(states), seeds, zeros, seen, allowed and allowed())
        self._note(result[0], places, positions)
        for row in rows:
            row.said = 1
        return Said(*result)

    def next(self, rows: Sequence[Row], allowed: Allowed | None = None) -> Said:
        """The next tokens of ``rows``, whose last ones are kept. Rows of one prompt are
        adjacent. ``allowed`` is for a decoder without graphs."""
        for row in rows:
            self._make_room(row)
        step = self._step(rows)
        if self.graphs is None:
            result = self.advance(step, allowed)
        else:
            assert allowed is None  # a recorded step calls nothing on the host
            result = self.graphs.run(self, step)
        self._note(result[0], step.places, step.positions)
        for row in rows:
            row.said += 1
        return Said(*result)

    def extend(
        self, rows: Sequence[tuple[Row, int, Sequence[int]]], allowed: Allowed | None = None
    ) -> Said:
        """The tokens of ``rows`` after more that they were given: each with how many tokens its
        completion has now, and the last of these, which are read. Rows of one prompt are
        adjacent.

        A token that is read is a row of a step: it sees what is before it because its length says
        so, in whatever steps the tokens of a row are read.
        """
        asked: list[tuple[Row, int, int]] = []  # row, which token of its completion, token
        for row, tokens, ids in rows:
            row.said = tokens
            self._make_room(row)
            first = tokens - len(ids)
            asked += [(row, first + i, token) for i, token in enumerate(ids)]
        at = [tokens for _, tokens, _ in rows]
        ends = dict.fromkeys(((row, tokens - 1) for row, tokens, _ in rows))
        states: dict[tuple[Row, int], Tensor] = {}
        for start in range(0, len(asked), READ_TOGETHER):
            part = asked[start : start + READ_TOGETHER]
            hidden = self._read_after(part)
            for i, (row, token, _) in enumerate(part):
                if (row, token) in ends:
                    states[row, token] = hidden[i]
        numbers = [
            [row.place, len(row.prompt.ids) + tokens - 1, row.seed] for row, tokens, _ in rows
        ]
        places, positions, seeds = self._index(numbers).T
        hidden = torch.stack([states[end] for end in ends])
        seen = self._seen(places)
        result = self.choose(hidden, seeds, self._index(at), seen, allowed and allowed())
        self._note(result[0], places, positions)
        for row, _, _ in rows:
            row.said += 1
        return Said(*result)

    def _read_after(self, asked: Sequence[tuple[Row, int, int]]) -> Tensor:
        """``[M, H]``: the states of tokens that are read after what their rows have."""
        rows = [row for row, _, _ in asked]
        prompt_pages, prompt_lengths, cu_rows, places, _ = self._grouped(rows)
        numbers: list[int] = []
        for row, token, _ in asked:
            slot = row.pages[token // PAGE] * PAGE + token % PAGE
            numbers += (len(row.prompt.ids) + token, slot, token + 1)
        self._flush_pages(self._index([n for pair in self._new_pages for n in pair]))
        positions, slots, lengths = self._index(numbers).view(-1, 3).unbind(1)
        ids = self._index([token for _, _, token in asked])
        if self._history is not None:
            self._history.index_put_((places, positions), ids)
        plan = TokenPlan(
            cache=self.cache,
            slots=slots,
            prompt_pages=prompt_pages,
            prompt_lengths=prompt_lengths,
            cu_rows=cu_rows,
            own_pages=self._table.index_select(0, places)[
                :, : pages_of(max(token for _, token, _ in asked) + 1)
            ],
            own_lengths=lengths.int(),
        )
        return self._forward(ids, positions, plan)

    def blank(self, rows: int) -> DecodeStep:
        """A step of so many rows that nobody has: each reads and writes the spare page alone."""

        def full(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=self.device)

        groups = rows + 1
        width = max(-(-self.room.prompt // PAGE), 1)
        return DecodeStep(
            places=full(self.room.rows, rows),
            seeds=full(0, rows),
            positions=full(0, rows),
            slots=full(self._spare * PAGE, rows),
            at=full(0, rows),
            own_lengths=full(1, rows).int(),
            prompt_pages=full(-1, groups, width).int(),
            prompt_lengths=full(0, groups).int(),
            cu_rows=torch.cat([full(0, 1), full(rows, groups)]).int(),
            pages=self._table.shape[1],
        )

    def lengthen(self, row: Row, tokens: int) -> None:
        """Let ``row`` be as long as ``tokens``, of which nothing is in the cache."""
        row.said = tokens
        self._make_room(row)

    def _make_room(self, row: Row) -> None:
        while len(row.pages) * PAGE < row.said:
            (page,) = self.cache.take(1)
            at = row.place * self._table.shape[1] + len(row.pages)
            self._new_pages.append((at, page))
            row.pages.append(page)

    def _step(self, rows: Sequence[Row]) -> DecodeStep:
        if tuple(rows) != self._members:
            self._members, self._groups = tuple(rows), self._grouped(rows)
        prompt_pages, prompt_lengths, cu_rows, places, seeds = self._groups
        numbers: list[int] = []
        longest = 0
        for row in rows:
            t = row.said - 1
            longest = max(longest, t)
            slot = row.pages[t // PAGE] * PAGE + t % PAGE
            numbers += (len(row.prompt.ids) + t, slot, row.said)
        for pair in self._new_pages:
            numbers += pair
        found = self._index(numbers)
        positions, slots, said = found[: 3 * len(rows)].view(-1, 3).unbind(1)
        self._flush_pages(found[3 * len(rows) :])
        return DecodeStep(
            places=places,
            seeds=seeds,
            positions=positions,
            slots=slots,
            at=said,
            own_lengths=said.int(),
            prompt_pages=prompt_pages,
            prompt_lengths=prompt_lengths,
            cu_rows=cu_rows,
            pages=longest // PAGE + 1,
        )

    def _flush_pages(self, found: Tensor) -> None:
        """Write the new pages into the table, ``found`` as where and which of each in turn."""
        if self._new_pages:
            at, page = found.view(-1, 2).unbind(1)
            self._table.view(-1).index_copy_(0, at, page.int())
            self._new_pages = []

    def _grouped(self, rows: Sequence[Row]) -> tuple[Tensor, ...]:
        """``prompt_pages``, ``prompt_lengths`` and ``cu_rows`` of ``decode_attention``; the rows'
        places and seeds."""
        prompts: list[Prompt] = []
        ends: list[int] = []
        for i, row in enumerate(rows, 1):
            if not prompts or prompts[-1] is not row.prompt:
                prompts.append(row.prompt)
                ends.append(i)
            ends[-1] = i
        width = max(len(prompt.pages) for prompt in prompts)
        pages = [[*p.pages, *[-1] * (width - len(p.pages))] for p in prompts]
        places, seeds = self._index([[row.place, row.seed] for row in rows]).T.contiguous()
        return (
            self._index(pages).int(),
            self._index([len(prompt.ids) for prompt in prompts]).int(),
            self._index([0, *ends]).int(),
            places,
            seeds,
        )

    def advance(self, step: DecodeStep, allowed: Allowed | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs of a step, ``[M]`` each. Done twice, it is the same again."""
        plan = TokenPlan(
            cache=self.cache,
            slots=step.slots,
            prompt_pages=step.prompt_pages,
            prompt_lengths=step.prompt_lengths,
            cu_rows=step.cu_rows,
            own_pages=self._table.index_select(0, step.places)[:, : step.pages],
            own_lengths=step.own_lengths,
        )
        hidden = self._forward(self._last.index_select(0, step.places), step.positions, plan)
        seen = self._seen(step.places)
        return self.choose(hidden, step.seeds, step.at, seen, allowed and allowed())

    def _seen(self, places: Tensor) -> Tensor | None:
        return None if self._history is None else self._history.index_select(0, places)

    def _note(self, tokens: Tensor, places: Tensor, positions: Tensor) -> None:
        self._last.index_copy_(0, places, tokens)
        if self._history is not None:
            self._history.index_put_((places, positions + 1), tokens)

    def _forward(self, ids: Tensor, positions: Tensor, plan: PromptPlan | TokenPlan) -> Tensor:
        decoder = self.policy.causal_lm.get_decoder()
        outputs = decoder(
            input_ids=ids[None],
            position_ids=positions[None],
            # Four dimensions: transformers takes it for a finished mask and builds none.
            attention_mask=torch.zeros(1, 1, 1, 1, device=self.device),
            use_cache=False,
            fusedgrpo_plan=plan,
        )
        hidden: Tensor = outputs.last_hidden_state[0]
        return hidden

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def _index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return send_numbers(values, self.device)
