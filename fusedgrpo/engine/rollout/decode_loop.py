"""From prompts to completions, a token of every sequence in flight at a time.

On a GPU the host stays a step behind: it launches the next step before it has read the tokens of
the last one. A sequence that has ended by then is decoded once more, and that token is dropped.
Where completions have to match something it is not: what may be next depends on what was said.

A sequence whose turn ends with a question to somebody else waits, with its keys and values and its
place, while the others go on; the answer is read after what it has said, and it goes on as well.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fusedgrpo.engine.rollout.scheduler import Asked, Live, Scheduler, SeedOf, pages_needed
from fusedgrpo.engine.rollout.structured import Grammar
from fusedgrpo.engine.rollout.turns import Place, Turns
from fusedgrpo.models.decode_graphs import StepGraphs
from fusedgrpo.models.decode_step import Said
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.ragged_decode import Allowed, Choose, Prompt, RaggedDecoder, Room


@dataclass(frozen=True, slots=True)
class Limits:
    """rows: sequences in flight. prompt_tokens: read in one forward pass, 0 for all. most: tokens
    of a completion. prompts: at once, None for as many as there are."""

    rows: int
    prompt_tokens: int
    most: int
    prompts: int | None = None


@dataclass(frozen=True, slots=True)
class How:
    """How a rollout is carried out.

    behind: steps that are launched and not yet read when the next one is. graphs: makes what
    replays steps, None to run each by itself. weights: what to enter around all forward passes.
    """

    behind: int = 0
    graphs: Callable[[], StepGraphs] | None = None
    weights: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @classmethod
    def on(cls, device: torch.device) -> How:
        """The fastest way on ``device``."""
        return cls(behind=1, graphs=StepGraphs) if device.type == "cuda" else cls()


@dataclass(frozen=True, slots=True)
class Watcher:
    """check_interrupt: called before each token, and may raise. progress: called after each with
    the tokens that came, and how many completions are live and waiting."""

    check_interrupt: Callable[[], None] = lambda: None
    progress: Callable[[int, int, int], None] = lambda tokens, live, waiting: None


class _Decoding:
    """One run of the loop."""

    def __init__(
        self,
        policy: Policy,
        asked: Sequence[Asked],
        limits: Limits,
        choose: Choose,
        seed_of: SeedOf,
        ends: frozenset[int],
        how: How,
        watcher: Watcher,
        ended: Callable[[Sequence[int]], bool] | None = None,
        allowed: Callable[[], int] | None = None,
        turns: Turns | None = None,
        first: int = 0,
        grammar: Grammar | None = None,
    ):
        lengths = [len(group.ids) for group in asked]
        rows = min(limits.rows, sum(len(group.samples) for group in asked))
        pages = pages_needed(lengths, rows, limits.most, limits.prompts)
        room = Room(pages, rows, limits.most, max(lengths))
        graphs = None if how.graphs is None else how.graphs()
        self.decoder = RaggedDecoder(policy, room, choose, graphs)
        self.scheduler = Scheduler(asked, self.decoder.cache, rows, seed_of, allowed)
        self.limits = limits
        self.ends = ends
        self.watcher = watcher
        self.ended = ended
        self.turns = turns
        self.first = first
        self.grammar = grammar
        self.waiting: dict[Place, Live] = {}
        # With the turns of those rows when it was launched.
        self.launched: deque[tuple[list[tuple[Live, int]], Said]] = deque()

    def admit(self) -> bool:
        """Let completions enter, and launch their first tokens."""
        unread, new = self.scheduler.admit()
        for batch in _batches(unread, self.limits.prompt_tokens):
            self.decoder.read(batch)
        if new:
            if self.turns is not None:
                for live in new:
                    self.turns.begin(self._place(live))
            self._begin_turns(new)
            said = self.decoder.first([live.row for live in new], self._allowed(new))
            self._launched(new, said)
        return bool(new)

    def go_on(self) -> Iterator[Live]:
        """Launch the first tokens after the answers that have come, waiting for one where there is
        nothing else to do; yields the completions that are over without."""
        if self.turns is None or not self.waiting:
            return
        idle = not self.launched and not self.scheduler.live
        going: list[tuple[Live, Sequence[int]]] = []
        for place, answer in self.turns.answers(wait=idle):
            live = self.waiting.pop(place)
            live.waits = False
            if answer is None:
                self.scheduler.finish(live)
                yield live
                continue
            going.append((live, [live.ids[-1], *answer]))
            live.given.append((len(live.ids), len(live.ids) + len(answer)))
            live.ids += answer
        if going:
            going.sort(key=lambda each: self._place(each[0]))  # rows of one prompt side by side
            # One of the last launch may have said a word too many.
            rows = [live for live, _ in going]
            self._begin_turns(rows)
            said = self.decoder.extend(
                [(live.row, len(live.ids), new) for live, new in going], self._allowed(rows)
            )
            self._launched(rows, said)

    def _begin_turns(self, rows: Sequence[Live]) -> None:
        if self.grammar is not None:
            for live in rows:
                live.matcher = self.grammar.matcher()

    def _allowed(self, rows: Sequence[Live]) -> Allowed | None:
        """The tokens that each may say next, to be asked once all that they said was read."""
        if self.grammar is None:
            return None
        matchers = [live.matcher for live in rows]
        return functools.partial(self.grammar.allowed, matchers, self.decoder.device)

    def _launched(self, rows: Sequence[Live], said: Said) -> None:
        self.launched.append(([(live, live.turn) for live in rows], said))

    def step(self) -> bool:
        """Launch the next token of all that are not known to have ended."""
        going = [live for live in self.scheduler.live if live.row.said < self.limits.most]
        if going:
            said = self.decoder.next([live.row for live in going], self._allowed(going))
            self._launched(going, said)
        return bool(going)

    def settle(self, behind: int) -> Iterator[Live]:
        """Read all steps but the last ``behind``; yields the completions that ended."""
        while len(self.launched) > behind:
            rows, said = self.launched.popleft()
            ended = []
            tokens = 0
            for (live, turn), token, logp in zip(rows, *said.read(), strict=True):
                # It was not known to have ended when this was launched.
                if live.finished or live.turn != turn:
                    continue
                live.ids.append(token)
                live.logp.append(logp)
                tokens += 1
                # What was drawn from no distribution may be any token; that is said at the end.
                if self.grammar is not None and math.isfinite(logp):
                    self.grammar.said(live.matcher, token)
                if not self._has_ended(live):
                    continue
                if self._asks(live):
                    live.waits, live.turn = True, live.turn + 1
                    self.waiting[self._place(live)] = live
                else:
                    self.scheduler.finish(live)
                    ended.append(live)
            yield from ended
            self.watcher.progress(tokens, len(self.scheduler.live), self.scheduler.unstarted)

    def _has_ended(self, live: Live) -> bool:
        if live.ids[-1] in self.ends:
            return True
        live.stopped = self.ended is not None and self.ended(live.turn_ids)
        return live.stopped or len(live.ids) == self.limits.most

    def _asks(self, live: Live) -> bool:
        """Whether an answer comes, and there is room for one."""
        if self.turns is None or len(live.ids) == self.limits.most:
            return False
        return self.turns.ended(self._place(live), live.ids)

    def _place(self, live: Live) -> Place:
        return self.first + live.asked.index, live.sample


@torch.no_grad()
def decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    samples: Mapping[int, Sequence[int]],
    limits: Limits,
    choose: Choose,
    seed_of: SeedOf,
    ends: frozenset[int],
    *,
    how: How | None = None,
    watcher: Watcher | None = None,
    ended: Callable[[Sequence[int]], bool] | None = None,
    allowed: Callable[[], int] | None = None,
    more: Callable[[], bool] = lambda: False,
    turns: Turns | None = None,
    first: int = 0,
    grammar: Grammar | None = None,
) -> Iterator[Live]:
    """Yields each completion as it ends: with a token of ``ends``, ``limits.most`` tokens, or where
    ``ended`` says so of the tokens of its turn. turns: answers the policy, which then goes on;
    first: the place of the first prompt to it. grammar: what each turn has to match, for a ``how``
    with no step behind and no graphs.

    samples: for some of the ``prompts``, by their place, which completions. seed_of: the seed of a
    completion's noise. allowed: how many of ``samples`` may have begun, None for all of them; it
    may grow with the completions that end. more: asked where nothing else is left to do, whether it
    may have grown; it waits for that.
    """
    how = how or How.on(policy.device)
    watcher = watcher or Watcher()
    asked = [Asked(i, prompts[i], deque(numbers)) for i, numbers in samples.items() if numbers]
    if not asked:
        return
    with policy.scoring(), policy.autocast(), how.weights():
        loop = _Decoding(
            *(policy, asked, limits, choose, seed_of, ends, how, watcher, ended, allowed),
            turns=turns,
            first=first,
            grammar=grammar,
        )
        while loop.scheduler.busy or more():
            watcher.check_interrupt()
            launched = loop.admit()
            before = len(loop.launched)
            yield from loop.go_on()
            launched |= len(loop.launched) > before
            yield from loop.settle(how.behind)
            launched |= loop.step()
            yield from loop.settle(how.behind if launched else 0)


@torch.no_grad()
def hold(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    n: int,
    limits: Limits,
    choose: Choose,
    *,
    how: How | None = None,
    grammar: Grammar | None = None,
) -> None:
    """Take, for a moment, the memory of the last token of ``limits.rows`` completions of the
    greatest length, ``n`` for each of ``prompts``, the longest first."""
    how = how or How.on(policy.device)
    chosen = sorted(prompts, key=len, reverse=True)[: -(-limits.rows // n)]
    asked = [Asked(i, ids, deque(range(n))) for i, ids in enumerate(chosen)]
    with policy.scoring(), policy.autocast(), how.weights():
        loop = _Decoding(
            *(policy, asked, limits, choose, lambda i, sample: 0, frozenset(), how, Watcher()),
            grammar=grammar,
        )
        loop.admit()
        for live in loop.scheduler.live:
            loop.decoder.lengthen(live.row, max(limits.most - 1, 1))
        loop.step()
        for _, said in loop.launched:
            said.read()


def _batches(prompts: Sequence[Prompt], most: int) -> Iterator[list[Prompt]]:
    """``prompts`` in parts of at most ``most`` tokens, or of one."""
    batch: list[Prompt] = []
    tokens = 0
    for prompt in prompts:
        if batch and most and tokens + len(prompt.ids) > most:
            yield batch
            batch, tokens = [], 0
        batch.append(prompt)
        tokens += len(prompt.ids)
    if batch:
        yield batch
