"""Completions from the policy with transformers' generate: one prefill per prompt, own sampling.

generate() runs the decoding loop; the token is chosen here, by inverting the cumulative
distribution at a uniform number that each completion draws from its own generator. What a
completion says therefore depends on its seed and its prompt alone: not on how many others are in
flight, and not on when somebody else used the global generator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout.completion_text import CompletionText
from fusedgrpo.engine.rollout.types import Completion, FinishReason, Group
from fusedgrpo.engine.seeding import derive
from fusedgrpo.errors import NonFiniteError
from fusedgrpo.models import decoding
from fusedgrpo.models.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample; names and meaning as in transformers. ``max_new_tokens`` is per completion.

    ``greedy`` takes the most likely token instead and ignores temperature, top_p, top_k, min_p.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    greedy: bool = False


class Sampler(Protocol):
    """The methods of a sampler that the trainer calls."""

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
        """One group of ``n`` completions for each prompt, in order; ``rows`` label the groups.

        Each completion draws from a seed of its own, derived from ``seed`` and the position of its
        prompt; ``first`` is that of the first prompt, where these are part of a rollout.
        """
        ...


class GenerateSampler:
    """The ``Sampler`` on ``model.generate``.

    policy: sampled in eval mode (no dropout, no gradient checkpointing) and in its own precision.
    tokenizer: decodes. eos_ids: every id that ends a completion. execution: says how
    many completions are decoded together (``in_flight``, which shrinks where memory runs out), and
    is looked at before each token, so that a signal need not wait for the end of a rollout.
    skip_special_tokens: in the text of the completions.

    Raises ModelError for a model whose generate is another policy than the one that trains.
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
        self.tokenizer = tokenizer
        self.eos_ids = list(eos_ids)
        self.text = CompletionText(tokenizer, eos_ids, skip_special_tokens=skip_special_tokens)
        self.execution = execution or Execution(OOMRetry(tokens=0))
        self.route = decoding.choose_route(policy)

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
        if not self.route.padded:
            asked.sort(key=lambda which: len(prompt_ids[which[0]]))  # stable: groups stay whole
        done: list[Completion] = []

        def wave() -> list[Completion]:
            # Whole groups if they fit, so that no prompt is prefilled twice.
            size = 1 if self.route.alone else self.execution.oom_retry.in_flight or len(asked)
            ahead = asked[len(done) : len(done) + (size - size % n or size)]
            if not self.route.padded:
                width = len(prompt_ids[ahead[0][0]])
                ahead = [which for which in ahead if len(prompt_ids[which[0]]) == width]
            seeds = [derive(seed, first + i, sample) for i, sample in ahead]
            own = list(dict.fromkeys(i for i, _ in ahead))
            prompts = [prompt_ids[i] for i in own]
            return self._wave(prompts, [own.index(i) for i, _ in ahead], params, seeds)

        while len(done) < len(asked):
            new = self.execution.oom_retry.sample(wave, len(asked) - len(done))
            for (i, _), completion in zip(asked[len(done) :], new, strict=False):
                _check_finite(completion, rows[i])
            done += new
        by_place = dict(zip(asked, done, strict=True))
        return [
            Group(rows[i], tuple(prompt), tuple(by_place[i, sample] for sample in range(n)))
            for i, prompt in enumerate(prompt_ids)
        ]

    def warm_up(self, prompt_ids: Sequence[Sequence[int]], n: int, params: SamplingParams) -> None:
        """Hold the memory that the last token of completions of the greatest length takes: as many
        of ``n`` for each prompt as are decoded together."""
        prompts = sorted(prompt_ids, key=len, reverse=True)
        if not self.route.padded:  # the worst case of prompts of one length
            prompts = [[*p, *[p[-1]] * (len(prompts[0]) - len(p))] for p in prompts]
        asked = [(i, sample) for i in range(len(prompts)) for sample in range(n)]

        def last_tokens() -> None:
            ahead = asked[
                : 1 if self.route.alone else self.execution.oom_retry.in_flight or len(asked)
            ]
            own = prompts[: ahead[-1][0] + 1]
            few = dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, 2))
            seeds = [derive(0, *which) for which in ahead]
            skipped = params.max_new_tokens - few.max_new_tokens
            self._wave(own, [i for i, _ in ahead], few, seeds, skipped=skipped)

        self.execution.oom_retry.sample(last_tokens, len(asked))

    def _wave(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_of: list[int],
        params: SamplingParams,
        seeds: list[int],
        skipped: int = 0,
    ) -> list[Completion]:
        """One completion for each of ``prompt_of`` (indices of ``prompts``), decoded together.

        skipped: positions of the cache that are there and hold nothing, as if so many tokens had
        been decoded already.
        """
        chooser = _Chooser(params, seeds, self.policy.device, self.execution.check_interrupt)
        tokens = decoding.decode(
            self.policy,
            self.route,
            prompts,
            prompt_of,
            self._generation_config(params),
            _processors(params, chooser),
            skipped,
        )
        return self._cut(tokens, torch.stack(chooser.logp, 1).cpu())

    def _generation_config(self, params: SamplingParams) -> Any:
        from transformers import GenerationConfig

        # Follows a completion that has ended; any token will do that the model can read.
        pad = self.tokenizer.pad_token_id or 0
        return GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=pad if pad < self.policy.vocabulary_size else 0,
            do_sample=False,
            use_cache=True,
        )

    def _cut(self, tokens: Tensor, logp: Tensor) -> list[Completion]:
        """Each row up to and with its first EOS."""
        completions = []
        for row, row_logp in zip(tokens.tolist(), logp, strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in self.eos_ids), None)
            ids = tuple(row[:end])
            text = self.text(ids, ended=end is not None)
            reason: FinishReason = "length" if end is None else "stop"
            completions.append(Completion(ids, text, reason, row_logp[: len(ids)].clone()))
        return completions


def _check_finite(completion: Completion, row: int) -> None:
    """A token was drawn from NaN or infinite logits: then it means nothing."""
    assert completion.logp is not None
    bad = ~completion.logp.isfinite()
    if bad.any():
        raise NonFiniteError(
            f"While sampling for data row {row}, token {int(bad.nonzero()[0]) + 1} of a completion "
            "had logits that are no distribution (NaN or infinity): the weights, or what the model "
            "computes from this prompt, are not finite."
        )


class SharedSampler:
    """A ``Sampler`` that leaves each process its share of the prompts; all get all groups."""

    def __init__(self, sampler: Sampler, processes: Processes):
        self.sampler = sampler
        self.processes = processes

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
        """See ``Sampler``."""
        rows = range(len(prompt_ids)) if rows is None else rows
        own = self.processes.share(len(prompt_ids))
        mine = slice(own.start, own.stop)

        def sample() -> list[Group]:
            if not own:
                return []
            return self.sampler.sample(
                prompt_ids[mine], n, params, seed, rows=rows[mine], first=first + own.start
            )

        return [group for part in self.processes.together(sample) for group in part]


def _processors(params: SamplingParams, chooser: _Chooser) -> Any:
    """The chain that turns logits into the distribution to sample from, and last the choice."""
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if not params.greedy:
        if params.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            chain.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            chain.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            chain.append(MinPLogitsWarper(params.min_p))
    chain.append(chooser)
    return chain


class _Chooser:
    """Last in the chain: picks a token per row and leaves it the only one that is possible."""

    def __init__(
        self,
        params: SamplingParams,
        seeds: Sequence[int],
        device: torch.device,
        poll: Callable[[], None],
    ):
        self.greedy = params.greedy
        self.poll = poll
        self.logp: list[Tensor] = []
        self.step = 0
        draws = [
            torch.rand(
                params.max_new_tokens,
                generator=torch.Generator().manual_seed(seed),
                dtype=torch.float64,
            )
            for seed in seeds
        ]
        self.uniform_BT = torch.stack(draws).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.poll()
        logp = torch.log_softmax(scores.float(), dim=-1)
        if self.greedy:
            token = logp.argmax(-1, keepdim=True)
        else:
            # float64: the tail of a large vocabulary would drown in float32's rounding.
            cumulative = logp.double().exp().cumsum(-1)
            point = self.uniform_BT[:, self.step, None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, point, right=True)
            token = token.clamp(max=scores.shape[-1] - 1)
        self.logp.append(logp.gather(1, token)[:, 0])
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
