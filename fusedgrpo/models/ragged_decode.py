"""Forward passes that decode: one ragged row of whole prompts, or of the last tokens of sequences.

Nothing here knows an architecture. The model's own decoder runs, with positions of each token and
a plan that its attention reads (``cached_attention.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusedgrpo.models.cached_attention import PromptPlan, TokenPlan
from fusedgrpo.models.kv_cache import PAGE, PagedCache, slots_of
from fusedgrpo.models.packed_batch import Segment
from fusedgrpo.models.policy import Policy


@dataclass(eq=False, slots=True)
class Prompt:
    """A prompt in the cache. hidden: ``[H]``, the state of its last token once it was read."""

    ids: Sequence[int]
    pages: list[int]
    hidden: Tensor | None = None


@dataclass(eq=False, slots=True)
class Row:
    """A sequence that is being decoded. ids: what it has said, the last of which is not in the
    cache yet. place: its row in the table of pages."""

    prompt: Prompt
    place: int
    ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class RaggedDecoder:
    """Reads prompts and tokens into a cache of ``pages`` pages, for up to ``rows`` sequences of up
    to ``most`` tokens; to be used in ``policy.scoring()`` and its autocast."""

    def __init__(self, policy: Policy, pages: int, rows: int, most: int):
        self.policy = policy
        self.cache = PagedCache(pages)
        self.device = policy.device
        width = max(-(-most // PAGE), 1)
        self._table = torch.zeros(rows, width, dtype=torch.int32, device=self.device)
        self._members: tuple[Row, ...] = ()
        self._groups: tuple[Tensor, ...] = ()

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

    def next(self, rows: Sequence[Row]) -> Tensor:
        """``[M, H]``: the states of the rows' last tokens, which are kept. Rows of one prompt are
        adjacent."""
        for row in rows:
            self._room(row)
        if tuple(rows) != self._members:
            self._members, self._groups = tuple(rows), self._grouped(rows)
        prompt_pages, prompt_lengths, cu_rows, places = self._groups
        last = [len(row.ids) - 1 for row in rows]
        slots = [row.pages[t // PAGE] * PAGE + t % PAGE for row, t in zip(rows, last, strict=True)]
        positions = [len(row.prompt.ids) + t for row, t in zip(rows, last, strict=True)]
        plan = TokenPlan(
            cache=self.cache,
            slots=self._index(slots),
            prompt_pages=prompt_pages,
            prompt_lengths=prompt_lengths,
            cu_rows=cu_rows,
            own_pages=self._table.index_select(0, places)[:, : max(last) // PAGE + 1],
            own_lengths=self._index([t + 1 for t in last]).int(),
        )
        ids = self._index([row.ids[-1] for row in rows])
        return self._forward(ids, self._index(positions), plan)

    def lengthen(self, row: Row, tokens: int) -> None:
        """Let ``row`` be as long as ``tokens``, of which nothing is in the cache."""
        row.ids = [row.prompt.ids[0]] * tokens
        self._room(row)

    def _room(self, row: Row) -> None:
        while len(row.pages) * PAGE < len(row.ids):
            (page,) = self.cache.take(1)
            self._table[row.place, len(row.pages)] = page
            row.pages.append(page)

    def _grouped(self, rows: Sequence[Row]) -> tuple[Tensor, ...]:
        """``prompt_pages``, ``prompt_lengths`` and ``cu_rows`` of ``decode_attention``; the rows'
        places."""
        prompts: list[Prompt] = []
        ends: list[int] = []
        for i, row in enumerate(rows, 1):
            if not prompts or prompts[-1] is not row.prompt:
                prompts.append(row.prompt)
                ends.append(i)
            ends[-1] = i
        width = max(len(prompt.pages) for prompt in prompts)
        pages = [[*p.pages, *[-1] * (width - len(p.pages))] for p in prompts]
        return (
            self._index(pages).int(),
            self._index([len(prompt.ids) for prompt in prompts]).int(),
            self._index([0, *ends]).int(),
            self._index([row.place for row in rows]),
        )

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
        return outputs.last_hidden_state[0]

    def _index(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
