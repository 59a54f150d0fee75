"""Completions from the policy with transformers' generate: one prefill per prompt, own sampling.

generate() runs the decoding loop; which token it is, is decided in ``models/token_chooser.py``. A
completion therefore depends on its seed and its prompt alone: not on how many others are in
flight, and not on when somebody else used the global generator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.batch_plan import decoded_together
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout.checks import check_finite
from fusedgrpo.engine.rollout.completion_text import CompletionText
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.stop_texts import StopTexts
from fusedgrpo.engine.rollout.structured import MatchingTokens, grammars
from fusedgrpo.engine.rollout.types import Completion, FinishReason, Group
from fusedgrpo.engine.rollout.warpers import warpers
from fusedgrpo.engine.seeding import derive
from fusedgrpo.models import decoding
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.token_chooser import TokenChooser


class GenerateSampler(Sampler):
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
        self.grammar_of = grammars(tokenizer, eos_ids, policy)
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

        def decode_next() -> list[Completion]:
            ahead = asked[len(done) : len(done) + self._together(len(asked), n)]
            if not self.route.padded:
                width = len(prompt_ids[ahead[0][0]])
                ahead = [which for which in ahead if len(prompt_ids[which[0]]) == width]
            seeds = [derive(seed, first + i, sample) for i, sample in ahead]
            own = list(dict.fromkeys(i for i, _ in ahead))
            prompts = [prompt_ids[i] for i in own]
            prompt_of = [own.index(i) for i, _ in ahead]
            waiting = len(asked) - len(done) - len(ahead)

            def progress(tokens: Tensor, live: Tensor) -> None:
                report(tokens, live, waiting)

            return self._decode(prompts, prompt_of, params, seeds, 0, progress)

        with self.execution.progress() as report:
            while len(done) < len(asked):
                new = self.execution.oom_retry.sample(decode_next, len(asked) - len(done))
                for (i, _), completion in zip(asked[len(done) :], new, strict=False):
                    check_finite(completion, rows[i])
                done += new
        by_place = dict(zip(asked, done, strict=True))
        return [
            Group(rows[i], tuple(prompt), tuple(by_place[i, sample] for sample in range(n)))
            for i, prompt in enumerate(prompt_ids)
        ]

    def warm_up(self, prompt_ids: Sequence[Sequence[int]], n: int, params: SamplingParams) -> bool:
        """See ``Sampler``: decodes the last token of completions of the greatest length, as many of
        ``n`` for each prompt as are decoded together."""
        prompts = sorted(prompt_ids, key=len, reverse=True)
        if not self.route.padded:  # the worst case of prompts of one length
            prompts = [[*p, *[p[-1]] * (len(prompts[0]) - len(p))] for p in prompts]
        asked = [(i, sample) for i in range(len(prompts)) for sample in range(n)]

        def last_tokens() -> None:
            ahead = asked[: self._together(len(asked), n)]
            own = prompts[: ahead[-1][0] + 1]
            few = dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, 2))
            seeds = [derive(0, *which) for which in ahead]
            skipped = params.max_new_tokens - few.max_new_tokens
            self._decode(own, [i for i, _ in ahead], few, seeds, skipped=skipped)

        self.execution.oom_retry.sample(last_tokens, len(asked))
        return True

    def _together(self, asked: int, n: int) -> int:
        """How many of ``asked`` completions are one decode batch."""
        if self.route.alone:
            return 1
        return decoded_together(self.execution.oom_retry.in_flight or asked, n)

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_of: list[int],
        params: SamplingParams,
        seeds: list[int],
        skipped: int = 0,
        progress: Callable[[Tensor, Tensor], None] | None = None,
    ) -> list[Completion]:
        """One completion for each of ``prompt_of`` (indices of ``prompts``), decoded together.

        skipped: positions of the cache that are there and hold nothing, as if so many tokens had
        been decoded already. progress: as of ``TokenChooser``.
        """
        chooser = TokenChooser(
            seeds,
            params.max_new_tokens,
            self.policy.device,
            greedy=params.greedy,
            check_interrupt=self.execution.check_interrupt,
            progress=progress,
            ends=self.eos_ids,
        )
        stops = StopTexts(self.tokenizer, params.stop_strings)

        def stopped(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            said = input_ids[:, -chooser.step :].tolist()
            return torch.tensor(
                [stops.cut(ids) is not None for ids in said], device=input_ids.device
            )

        def over(ids: Sequence[int]) -> bool:
            return ids[-1] in self.eos_ids or (bool(stops) and stops.ended(ids))

        chain = warpers(params)
        if (grammar := self.grammar_of(params.structured_outputs)) is not None:
            chain.insert(0, MatchingTokens(grammar, len(seeds), over))
        chain.append(chooser)
        tokens = decoding.decode(
            self.policy,
            self.route,
            prompts,
            prompt_of,
            self._generation_config(params),
            chain,
            skipped,
            [stopped] if stops else None,
        )
        return self._cut(tokens, torch.stack(chooser.logp, 1).cpu(), stops)

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

    def _cut(self, tokens: Tensor, logp: Tensor, stops: StopTexts) -> list[Completion]:
        """Each row up to and with its first EOS, or the token that completes a text to stop at."""
        completions = []
        for row, row_logp in zip(tokens.tolist(), logp, strict=True):
            eos = next((i + 1 for i, token in enumerate(row) if token in self.eos_ids), None)
            end = stops.cut(row[:eos]) or eos
            ids = tuple(row[:end])
            text = self.text(ids, ended=ids[-1] in self.eos_ids)
            reason: FinishReason = "length" if end is None else "stop"
            completions.append(Completion(ids, text, reason, row_logp[: len(ids)].clone()))
        return completions
