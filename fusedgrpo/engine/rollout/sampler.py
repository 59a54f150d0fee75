"""The base class of samplers, and the parameters that they sample with."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.config.structured import StructuredOutputs
from fusedgrpo.engine.rollout.turns import Turns, turn_by_turn
from fusedgrpo.engine.rollout.types import Completion, Group, Verdict
from fusedgrpo.engine.seeding import derive


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample; names and meaning as in transformers. ``max_new_tokens`` is per completion.

    ``greedy`` takes the most likely token instead and ignores temperature, top_p, top_k, min_p.
    ``stop_strings`` end a completion with the token that completes one in its text.
    ``structured_outputs`` is what each turn of it has to match: other tokens are not drawn.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    greedy: bool = False
    stop_strings: tuple[str, ...] = ()
    structured_outputs: StructuredOutputs | None = None

    @classmethod
    def of(cls, config: GRPOConfig) -> SamplingParams:
        """How a run samples to train."""
        return cls(
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop_strings=tuple(config.stop_strings or ()),
            structured_outputs=StructuredOutputs.of(config.structured_outputs),
        )

    @property
    def reads_history(self) -> bool:
        """Whether a token depends on which ones were said before, beside the model."""
        return self.repetition_penalty != 1.0

    @property
    def filters(self) -> bool:
        """Whether an option looks at a row of logits as a whole, or at what was said before."""
        if self.reads_history or self.structured_outputs is not None:
            return True
        return not self.greedy and bool(self.top_k or self.top_p < 1.0 or self.min_p)


class Sampler(abc.ABC):
    """Draws completions from the policy. ``sample`` is all that one has to have.

    What a completion says may depend on weights, prompt, params, seed and its place alone, else a
    resumed run is another run.
    """

    @abc.abstractmethod
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
        """``sample``, where ``turns`` answers the policy, which then goes on, in at most
        ``params.max_new_tokens`` tokens with all answers. Here all first turns are sampled, then
        all second ones after their whole conversations, and so on.
        """

        def further(
            conversations: Sequence[Sequence[int]], number: int, room: int
        ) -> list[Completion]:
            shorter = dataclasses.replace(params, max_new_tokens=room)
            own = derive(seed, "turn", number)
            groups = self.sample(conversations, 1, shorter, own, first=first)
            return [group.completions[0] for group in groups]

        return turn_by_turn(
            self.sample(prompt_ids, n, params, seed, rows=rows, first=first),
            further,
            turns,
            params.max_new_tokens,
            first,
        )

    # A static method (settings, *, rows, prompt, longest) -> bytes, where generate's cache of keys
    # and values is not what decoding takes: on the GPU, beyond the weights, for ``rows``
    # completions at once, of prompts of ``prompt`` tokens, ``longest`` tokens with them. settings:
    # the model's configuration.
    memory: ClassVar[Callable[..., int] | None] = None

    # Whether it has ``sample_until``.
    streams: ClassVar[bool] = False

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
        """The groups of the first prompts, as many as it takes for ``wanted`` of them to teach
        something, or of all. teaches: asked once of each group, by its place, when it is whole; in
        any order. What it finds may come later; where memory runs out while that is asked for, it
        is again. What a group says is what ``sample`` says."""
        raise NotImplementedError

    def weights_changed(self) -> None:  # noqa: B027  most of them keep nothing
        """The policy has other weights than before: called after each update that was applied and
        after a checkpoint was put back. Whoever keeps a copy, or something computed, renews it."""

    def warm_up(self, prompt_ids: Sequence[Sequence[int]], n: int, params: SamplingParams) -> bool:
        """Hold, for a moment, the memory that ``n`` completions of ``params.max_new_tokens`` for
        each prompt will take, so that what does not fit fails before the first step. prompt_ids:
        random tokens, as many prompts as this process samples at once. False: nothing was held.
        """
        return False
