"""From prompts to completions, a token of every sequence in flight at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedgrpo.engine.rollout.scheduler import Asked, Live, Scheduler, pages_needed
from fusedgrpo.models.head import logits
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.ragged_decode import Prompt, RaggedDecoder

# (logits [M, V] float32, the M completions they are for) -> tokens and their log-probs, [M, 1].
Choose = Callable[[Tensor, Sequence[Live]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Limits:
    """rows: sequences in flight. prompt_tokens: read in one forward pass, 0 for all. most: tokens
    of a completion."""

    rows: int
    prompt_tokens: int
    most: int


@torch.no_grad()
def decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    samples: Mapping[int, Sequence[int]],
    limits: Limits,
    choose: Choose,
    ends: frozenset[int],
    check_interrupt: Callable[[], None] = lambda: None,
) -> Iterator[Live]:
    """Yields each completion as it ends: with a token of ``ends``, or ``limits.most`` tokens.

    samples: for some of the ``prompts``, by their place, which completions. check_interrupt: called
    before each token, and may raise.
    """
    asked = [Asked(i, prompts[i], deque(numbers)) for i, numbers in samples.items() if numbers]
    lengths = [len(group.ids) for group in asked]
    rows = min(limits.rows, sum(len(group.samples) for group in asked))
    decoder = RaggedDecoder(policy, pages_needed(lengths, rows, limits.most), rows, limits.most)
    scheduler = Scheduler(asked, decoder.cache, rows)
    with policy.scoring(), policy.autocast():
        while scheduler.busy:
            check_interrupt()
            for batch in _batches(scheduler.admit(), limits.prompt_tokens):
                decoder.read(batch)
            going = [live for live in scheduler.live if live.row.ids]
            fresh = [live for live in scheduler.live if not live.row.ids]
            states = [decoder.next([live.row for live in going])] if going else []
            states += [_state(live.row.prompt)[None] for live in fresh]
            scores = logits(policy.head, torch.cat(states))
            tokens, logp = choose(scores, [*going, *fresh])
            for live, token, value in zip(
                [*going, *fresh], tokens[:, 0].tolist(), logp[:, 0].tolist(), strict=True
            ):
                live.row.ids.append(token)
                live.logp.append(value)
                if token in ends or len(live.row.ids) == limits.most:
                    scheduler.finish(live)
                    yield live


@torch.no_grad()
def hold(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    n: int,
    limits: Limits,
    choose: Choose,
) -> None:
    """Take, for a moment, the memory of the last token of ``limits.rows`` completions of the
    greatest length, ``n`` for each of ``prompts``, the longest first."""
    chosen = sorted(prompts, key=len, reverse=True)[: -(-limits.rows // n)]
    asked = [Asked(i, ids, deque(range(n))) for i, ids in enumerate(chosen)]
    rows = min(limits.rows, len(asked) * n)
    pages = pages_needed([len(ids) for ids in chosen], rows, limits.most)
    decoder = RaggedDecoder(policy, pages, rows, limits.most)
    scheduler = Scheduler(asked, decoder.cache, rows)
    with policy.scoring(), policy.autocast():
        for batch in _batches(scheduler.admit(), limits.prompt_tokens):
            decoder.read(batch)
        live = scheduler.live
        for one in live:
            decoder.lengthen(one.row, max(limits.most - 1, 1))
        choose(logits(policy.head, decoder.next([one.row for one in live])), live)


def _state(prompt: Prompt) -> Tensor:
    assert prompt.hidden is not None
    return prompt.hidden


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
