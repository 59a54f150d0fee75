"""Completions from a decoding loop of our own, without padding: see ``decode_loop.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout.checks import check_finite
from fusedgrpo.engine.rollout.completion_text import CompletionText
from fusedgrpo.engine.rollout.decode_loop import Limits, decode, hold
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.scheduler import Live
from fusedgrpo.engine.rollout.types import Completion, Group
from fusedgrpo.engine.rollout.warpers import warpers
from fusedgrpo.engine.seeding import derive
from fusedgrpo.errors import ModelError
from fusedgrpo.models.decoding import TOLERANCE, few_tokens, relative_errors, trained
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.token_chooser import choose, draws


class DecoderSampler(Sampler):
    """The ``Sampler`` on the model's own modules and a paged cache.

    A prompt is read once and its keys and values are there once for its group; completions leave
    as they end and others enter in their place. Tokens are chosen as ``GenerateSampler`` chooses
    them, by the same random numbers. Arguments as there.

    Raises ModelError for a model that cannot be forwarded packed, or that gives other log-probs
    this way than in training.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        eos_ids: Sequence[int],
        *,
        execution: Execution | None = None,
        skip_special_tokens: bool = True,
    ):
        self.policy = policy
        self.eos_ids = frozenset(eos_ids)
        self.text = CompletionText(tokenizer, eos_ids, skip_special_tokens=skip_special_tokens)
        self.execution = execution or Execution(OOMRetry(tokens=0))
        check_decoder(policy)

    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: int,
        *,
        rows: Sequence[int] | None = None,
        first: int = 0,
    ) -> list[Group]:
        """See ``Sampler``. Deterministic in (weights, prompt, seed, position of the prompt)."""
        rows = range(len(prompt_ids)) if rows is None else rows
        asked = [(i, sample) for i in range(len(prompt_ids)) for sample in range(n)]
        done: dict[tuple[int, int], Completion] = {}
        choice = Choice(params, lambda i, sample: derive(seed, first + i, sample))

        def decode_rest() -> None:  # once more after running out of memory: what is done stays
            left: dict[int, list[int]] = {}
            for i, sample in asked:
                if (i, sample) not in done:
                    left.setdefault(i, []).append(sample)
            for live in decode(
                self.policy,
                prompt_ids,
                left,
                self._limits(len(asked), params),
                choice,
                self.eos_ids,
                self.execution.check_interrupt,
            ):
                completion = self._completion(live)
                check_finite(completion, rows[live.asked.index])
                done[live.asked.index, live.sample] = completion

        self.execution.oom_retry.sample(decode_rest, len(asked))
        return [
            Group(rows[i], tuple(prompt), tuple(done[i, sample] for sample in range(n)))
            for i, prompt in enumerate(prompt_ids)
        ]

    def warm_up(self, prompt_ids: Sequence[Sequence[int]], n: int, params: SamplingParams) -> bool:
        """See ``Sampler``: reads prompts and decodes the last token of the longest completions."""
        choice = Choice(params, lambda i, sample: derive(0, i, sample))
        asked = len(prompt_ids) * n

        def last_tokens() -> None:
            hold(self.policy, prompt_ids, n, self._limits(asked, params), choice)

        self.execution.oom_retry.sample(last_tokens, asked)
        return True

    def _limits(self, asked: int, params: SamplingParams) -> Limits:
        oom_retry = self.execution.oom_retry
        return Limits(oom_retry.in_flight or asked, oom_retry.tokens, params.max_new_tokens)

    def _completion(self, live: Live) -> Completion:
        ids = tuple(live.row.ids)
        ended = ids[-1] in self.eos_ids
        text = self.text(ids, ended=ended)
        return Completion(ids, text, "stop" if ended else "length", torch.tensor(live.logp))


class Choice:
    """Chooses the next token of each completion by the next of its own random numbers.

    seed_of: of a completion, by the place of its prompt and its number.
    """

    def __init__(self, params: SamplingParams, seed_of: Any):
        self.params = params
        self.seed_of = seed_of
        self.chain = warpers(params)
        self._draws: dict[tuple[int, int], Tensor] = {}

    def __call__(self, scores: Tensor, live: Sequence[Live]) -> tuple[Tensor, Tensor]:
        seen = torch.empty(len(live), 0, dtype=torch.int64, device=scores.device)
        if self.params.repetition_penalty != 1.0:
            seen = _said(live, scores.device)
        scores = self.chain(seen, scores)
        if self.params.greedy:
            return choose(scores, None)
        uniform = torch.stack([self._next(one) for one in live])[:, None]
        return choose(scores, uniform.to(scores.device))

    def _next(self, live: Live) -> Tensor:
        which = live.asked.index, live.sample
        if which not in self._draws:
            self._draws[which] = draws(self.seed_of(*which), self.params.max_new_tokens)
        return self._draws[which][len(live.row.ids)]


def _said(live: Sequence[Live], device: torch.device) -> Tensor:
    """``[M, longest]``: prompt and completion so far, filled up with the prompt's own first token,
    which to a repetition penalty is nothing new."""
    rows = [[*one.asked.ids, *one.row.ids] for one in live]
    longest = max(map(len, rows))
    rows = [[row[0]] * (longest - len(row)) + row for row in rows]
    return torch.tensor(rows, device=device)


def check_decoder(policy: Policy) -> None:
    """Force a few tokens on the decoder and compare with training. Raises ModelError."""
    kind = type(policy.causal_lm).__name__
    if policy.layout == "rows":
        raise ModelError(
            f"sampler: decoder needs a model that can be forwarded packed, and {kind} cannot: "
            "leave it at auto."
        )
    prompts, completions = few_tokens(policy.vocabulary_size)
    pairs = [(p, c[::step]) for p, c in zip(prompts, completions, strict=True) for step in (1, -1)]
    expected = trained(policy, pairs)
    if not expected.isfinite().all():
        return  # weights that are not finite: nothing to compare, and for others to say
    most = len(completions[0])
    found = torch.zeros_like(expected)

    def force(scores: Tensor, live: Sequence[Live]) -> tuple[Tensor, Tensor]:
        tokens = []
        for one, row in zip(live, scores.log_softmax(-1), strict=True):
            pair, at = 2 * one.asked.index + one.sample, len(one.row.ids)
            found[pair, at] = row
            tokens.append([pairs[pair][1][at]])
        chosen = torch.tensor(tokens, device=scores.device)
        return chosen, torch.zeros_like(chosen, dtype=torch.float32)

    asked = dict.fromkeys(range(len(prompts)), (0, 1))
    for _ in decode(policy, prompts, asked, Limits(4, 0, most), force, frozenset()):
        pass
    exact, rounded = TOLERANCE[policy.dtype]
    errors = relative_errors(found, expected)
    if not (errors.max() <= exact or errors.mean(1).max() <= rounded):
        raise ModelError(
            f"sampler: decoder does not give the log-probs of {kind}'s training forward (they are "
            f"off by {errors.mean(1).max():.1e} of their spread): leave it at auto."
        )
