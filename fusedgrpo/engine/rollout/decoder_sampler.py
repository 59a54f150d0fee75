"""Completions from a decoding loop of our own, without padding: see ``decode_loop.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout.checks import check_finite
from fusedgrpo.engine.rollout.completion_text import CompletionText
from fusedgrpo.engine.rollout.decode_loop import How, Limits, Watcher, decode, hold
from fusedgrpo.engine.rollout.next_token import NextToken
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.scheduler import Live
from fusedgrpo.engine.rollout.stop_texts import StopTexts
from fusedgrpo.engine.rollout.structured import Grammar, grammars
from fusedgrpo.engine.rollout.turns import Turns, of_turns
from fusedgrpo.engine.rollout.types import Completion, FinishReason, Group, Verdict
from fusedgrpo.engine.seeding import derive
from fusedgrpo.errors import ConfigError, ModelError
from fusedgrpo.models.adapters.merged_weights import MergedWeights
from fusedgrpo.models.adapters.plain_lora import all_plain
from fusedgrpo.models.adapters.rollout_weights import AdapterWeights, RolloutWeights
from fusedgrpo.models.decoding import TOLERANCE, few_tokens, relative_errors, trained
from fusedgrpo.models.fused_norms import FusedNorms
from fusedgrpo.models.head import Head, logits
from fusedgrpo.models.policy import Policy

log = logging.getLogger("fusedgrpo")


class DecoderSampler(Sampler):
    """The ``Sampler`` on the model's own modules and a paged cache.

    A prompt is read once and its keys and values are there once for its group; completions leave
    as they end and others enter in their place. Arguments as of ``GenerateSampler``.

    rollout_weights: ``"merged"`` samples from a copy of the adapted layers' weights with the
    adapters in it, ``"adapter"`` computes the adapters beside the weights.

    Raises ModelError for a model that cannot be forwarded packed, or that gives other log-probs
    this way than in training; ConfigError for ``"merged"`` where there is nothing that can be.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        eos_ids: Sequence[int],
        *,
        execution: Execution | None = None,
        skip_special_tokens: bool = True,
        rollout_weights: Literal["adapter", "merged"] = "adapter",
    ):
        self.policy = policy
        self.eos_ids = frozenset(eos_ids)
        self.text = CompletionText(tokenizer, eos_ids, skip_special_tokens=skip_special_tokens)
        self.execution = execution or Execution(OOMRetry(tokens=0))
        self.grammar_of = grammars(tokenizer, eos_ids, policy)
        self.how = How.on(policy.device)
        self.weights = _weights(policy, rollout_weights)
        check_packed(policy)
        if self.weights is not None:
            # What the layers share is seen in a first pass.
            check_decoder(policy, dataclasses.replace(self.how, weights=self.weights.learn))
        self.norms = FusedNorms(policy.causal_lm, policy.dtype)
        self.how = dataclasses.replace(self.how, weights=self._active)
        check_decoder(policy, self.how)

    streams = True

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
        wanted = len(prompt_ids)
        return self._sample(prompt_ids, n, params, seed, rows, first, wanted, _teaches)

    def sample_turns(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: int,
        turns: Turns,
        *,
        rows: Sequence[int] | None = None,
        first: int = 0,
    ) -> list[Group]:
        """See ``Sampler``. A completion waits for its answer beside those that go on, and keeps
        what was computed."""
        wanted = len(prompt_ids)
        return self._sample(prompt_ids, n, params, seed, rows, first, wanted, _teaches, turns)

    def sample_until(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: int,
        *,
        wanted: int,
        teaches: Callable[[int, Group], Verdict],
        rows: Sequence[int] | None = None,
        turns: Turns | None = None,
    ) -> list[Group]:
        """See ``Sampler``. When a group is known to teach nothing, the next prompt enters beside
        the completions that are in flight then."""
        return self._sample(prompt_ids, n, params, seed, rows, 0, wanted, teaches, turns)

    def _sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: int,
        rows: Sequence[int] | None,
        first: int,
        wanted: int,
        teaches: Callable[[int, Group], Verdict],
        turns: Turns | None = None,
    ) -> list[Group]:
        """``sample_until``, where the first prompt has the position ``first``."""
        rows = range(len(prompt_ids)) if rows is None else rows
        done: dict[tuple[int, int], Completion] = {}
        groups: dict[int, Group] = {}
        verdicts: dict[int, Verdict] = {}  # those that are open
        in_vain: list[int] = []
        choose = NextToken(self.policy, params)
        stops = StopTexts(self.text.tokenizer, params.stop_strings)
        grammar = self.grammar_of(params.structured_outputs)
        callers = _autocast_now(self.policy.device.type)

        def missing(i: int) -> list[int]:
            return [sample for sample in range(n) if (i, sample) not in done]

        def judge(i: int) -> None:
            own = tuple(done[i, sample] for sample in range(n))
            groups[i] = Group(rows[i], tuple(prompt_ids[i]), own)
            verdicts[i] = teaches(i, groups[i])

        def ask(wait: bool = False) -> bool:
            """Ask of the groups whose verdicts are open, and wait for the first; was there any?"""
            asked = list(verdicts)
            for i in asked:
                with callers:  # rewards are no part of the forward passes that go on around them
                    verdict = verdicts[i](wait)
                wait = False
                if verdict is not None:
                    del verdicts[i]
                    if not verdict:
                        in_vain.append(i)
            return bool(asked)

        def decode_rest() -> None:  # once more after running out of memory: what is done stays
            left = {i: samples for i in range(len(prompt_ids)) if (samples := missing(i))}
            behind = len(groups)

            def allowed() -> int:
                ask()
                return wanted + len(in_vain) - behind

            for live in decode(
                self.policy,
                prompt_ids,
                left,
                dataclasses.replace(self._limits(wanted * n, params), prompts=wanted),
                choose,
                lambda i, sample: derive(seed, first + i, sample),
                self.eos_ids,
                how=self._how(grammar),
                watcher=watcher,
                ended=stops.ended if stops else None,
                allowed=allowed,
                more=lambda: ask(wait=True),
                turns=turns,
                first=first,
                grammar=grammar,
            ):
                i = live.asked.index
                if turns is None:
                    completion = self._completion(live)
                else:
                    spoken = _spoken(live, self.eos_ids)
                    completion = of_turns(spoken, live.given, (first + i, live.sample), turns)
                check_finite(completion, rows[i])
                done[i, live.sample] = completion
                if not missing(i):
                    judge(i)
            while ask(wait=True):  # after running out of memory there may be nothing else left
                pass

        with self.execution.progress() as report:
            watcher = Watcher(self.execution.check_interrupt, report)
            self.execution.oom_retry.sample(decode_rest, wanted * n)
        return [groups[i] for i in sorted(groups)]

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        with self.norms.active():
            if self.weights is None:
                yield
                return
            with self.weights.active():
                yield

    def weights_changed(self) -> None:
        """See ``Sampler``."""
        if self.weights is not None:
            self.weights.changed()

    def warm_up(self, prompt_ids: Sequence[Sequence[int]], n: int, params: SamplingParams) -> bool:
        """See ``Sampler``: reads prompts and decodes the last token of the longest completions."""
        choose = NextToken(self.policy, params)
        grammar = self.grammar_of(params.structured_outputs)
        asked = len(prompt_ids) * n

        def last_tokens() -> None:
            limits = self._limits(asked, params)
            how = self._how(grammar)
            hold(self.policy, prompt_ids, n, limits, choose, how=how, grammar=grammar)

        self.execution.oom_retry.sample(last_tokens, asked)
        return True

    def _how(self, grammar: Grammar | None) -> How:
        """Which tokens match is known when the host has read the last ones."""
        if grammar is None:
            return self.how
        return dataclasses.replace(self.how, behind=0, graphs=None)

    def _limits(self, asked: int, params: SamplingParams) -> Limits:
        oom_retry = self.execution.oom_retry
        return Limits(oom_retry.in_flight or asked, oom_retry.tokens, params.max_new_tokens)

    def _completion(self, live: Live) -> Completion:
        spoken = _spoken(live, self.eos_ids)
        text = self.text(spoken.ids, ended=spoken.ids[-1] in self.eos_ids)
        return dataclasses.replace(spoken, text=text)


def _spoken(live: Live, ends: Collection[int]) -> Completion:
    """A completion that has ended, without its text."""
    reason: FinishReason = "stop" if live.ids[-1] in ends or live.stopped else "length"
    return Completion(tuple(live.ids), "", reason, torch.tensor(live.logp))


def _teaches(i: int, group: Group) -> Verdict:
    """Where nobody asks."""
    return lambda wait: True


def _autocast_now(device_type: str) -> torch.autocast:
    """The setting that is in force now, to be entered where something else is."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
    )


def _weights(policy: Policy, option: str) -> RolloutWeights | None:
    if policy.adapters is None:
        return None
    if option == "adapter":
        return AdapterWeights(policy)
    if not all_plain(policy):
        raise ConfigError(
            "rollout_weights: merged folds LoRA into a copy of the weights, and this model has "
            "adapters of another kind (DoRA and other variants, trained biases, modules_to_save): "
            "leave the option out."
        )
    return MergedWeights(policy)


def check_packed(policy: Policy) -> None:
    """Raise ModelError unless the model can be forwarded packed."""
    if policy.layout == "rows":
        raise ModelError(
            "sampler: decoder needs a model that can be forwarded packed, and "
            f"{type(policy.causal_lm).__name__} cannot: leave it at auto."
        )


class _Forced:
    """Chooses the tokens it is given: ``forced [completions, length]``, where the seed is the
    number of a completion. found: like ``expected``, ``[completions, length, V]`` log-probs."""

    reads_history = False

    def __init__(self, head: Head, forced: Tensor, expected: Tensor):
        self.head = head
        self.forced = forced
        self.found = torch.zeros_like(expected)

    def __call__(
        self,
        hidden: Tensor,
        seeds: Tensor,
        at: Tensor,
        seen: Tensor | None,
        allowed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        self.found[seeds, at] = logits(self.head, hidden).log_softmax(-1)
        tokens = self.forced[seeds, at]
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)


def check_decoder(policy: Policy, how: How) -> None:
    """Force a few tokens on the decoder and compare with training. Raises ModelError."""
    prompts, completions = few_tokens(policy.vocabulary_size)
    pairs = [(p, c[::step]) for p, c in zip(prompts, completions, strict=True) for step in (1, -1)]
    expected = trained(policy, pairs)
    if not expected.isfinite().all():
        return  # weights that are not finite: nothing to compare, and for others to say
    most = len(completions[0])
    tokens = torch.tensor([list(c) for _, c in pairs], device=policy.device)
    choose = _Forced(policy.head, tokens, expected)
    asked = dict.fromkeys(range(len(prompts)), (0, 1))
    # Graphs would be recorded for nothing, and with a choice that is none.
    how = dataclasses.replace(how, graphs=None)
    for _ in decode(
        policy, prompts, asked, Limits(4, 0, most), choose, lambda i, sample: 2 * i + sample,
        frozenset(), how=how,
    ):  # fmt: skip
        pass
    exact, rounded = TOLERANCE[policy.dtype]
    errors = relative_errors(choose.found, expected)
    if not (errors.max() <= exact or errors.mean(1).max() <= rounded):
        kind = type(policy.causal_lm).__name__
        raise ModelError(
            f"sampler: decoder does not give the log-probs of {kind}'s training forward (they are "
            f"off by {errors.mean(1).max():.1e} of their spread): leave it at auto."
        )
