"""TRL's ``rollout_func``: completions from a function of the user's, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from fusedgrpo.engine.data.dataset import Example
from fusedgrpo.engine.interrupts import Interrupted
from fusedgrpo.engine.rollout.completion_text import CompletionText
from fusedgrpo.engine.rollout.types import Completion, FinishReason, Group
from fusedgrpo.engine.seeding import seeded
from fusedgrpo.errors import FusedGRPOError, SamplerError, brief, reason

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
WHO = "rollout_func"


class RolloutFunction:
    """``function(prompts, trainer)``, where ``prompts`` has each prompt as often as it has
    completions, returns a dict of lists as long:

    - ``prompt_ids``, ``completion_ids``: tokens of both, as they were sampled. Where completions of
      a prompt continue different tokens, those that they do not share are given to the policy.
    - ``logprobs``: of the completions' tokens, under the distribution that was sampled from; the
      list, one of them or single ones may be None.
    - ``env_mask``, if it is there: 1 for tokens that the policy wrote, 0 for what it was given.
    - whatever else: a keyword argument for reward functions.

    trainer: set by the trainer that has it. end_ids: tokens after which a completion is whole.
    most: tokens of a completion. ``sample`` raises SamplerError for anything else.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        text: CompletionText,
        end_ids: Collection[int],
        *,
        most: int,
        vocabulary_size: int,
    ):
        self.function = function
        self.text = text
        self.end_ids = frozenset(end_ids)
        self.most = most
        self.vocabulary_size = vocabulary_size
        self.trainer: Any = None

    def sample(
        self, examples: Sequence[Example], n: int, seed: int
    ) -> tuple[list[Group], dict[str, list[Any]]]:
        """The groups, and the arguments for reward functions, in their flat order."""
        prompts = [example.prompt for example in examples for _ in range(n)]
        try:
            with seeded(seed), torch.no_grad():
                output = self.function(prompts, self.trainer)
        except (FusedGRPOError, Interrupted):
            raise
        except Exception as error:  # other people's code raises anything
            raise SamplerError(f"{WHO} failed: {reason(error)}") from error
        values = _checked(output, len(prompts))
        rows = [
            self._row(index, **{name: values[name][index] for name in (*REQUIRED, "env_mask")})
            for index in range(len(prompts))
        ]
        groups = [
            self._group(example, rows[i * n : (i + 1) * n]) for i, example in enumerate(examples)
        ]
        taken = {*REQUIRED, "env_mask"}
        return groups, {name: values[name] for name in values if name not in taken}

    def _row(
        self, index: int, *, prompt_ids: Any, completion_ids: Any, logprobs: Any, env_mask: Any
    ) -> tuple[list[int], list[int], list[float] | None, list[bool]]:
        where = f"{WHO}: completion {index}"
        prompt = self._ids(prompt_ids, f"{where}: prompt_ids")
        ids = self._ids(completion_ids, f"{where}: completion_ids")
        if len(ids) > self.most:
            raise SamplerError(
                f"{where} has {len(ids)} tokens, and max_completion_length is {self.most}, with "
                "what it was given: raise that, or cut it."
            )
        own = [True] * len(ids) if env_mask is None else [bool(one) for one in _listed(env_mask)]
        logp = None if logprobs is None else [_number(one, where) for one in _listed(logprobs)]
        for name, found in (("env_mask", own), ("logprobs", logp)):
            if found is not None and len(found) != len(ids):
                raise SamplerError(f"{where}: {name} has {len(found)} values for {len(ids)} tokens")
        if not any(own):
            raise SamplerError(f"{where}: env_mask leaves no token that the policy wrote")
        return prompt, ids, logp, own

    def _ids(self, given: Any, where: str) -> list[int]:
        ids = _listed(given)
        if not ids or not set(map(type, ids)) <= {int}:
            raise SamplerError(f"{where} is {brief(given)}, expected a list of token ids")
        if min(ids) < 0 or max(ids) >= self.vocabulary_size:
            raise SamplerError(
                f"{where} has ids from {min(ids)} to {max(ids)}; the vocabulary of the model has "
                f"{self.vocabulary_size}"
            )
        return ids

    def _group(
        self, example: Example, rows: Sequence[tuple[list[int], list[int], Any, list[bool]]]
    ) -> Group:
        prompts = [prompt for prompt, _, _, _ in rows]
        shared = next(
            (i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1),
            min(map(len, prompts)),
        )
        if not shared:
            raise SamplerError(
                f"{WHO}: the completions of data row {example.row} continue prompts that have not "
                "even their first token in common; GRPO compares completions of one prompt"
            )
        completions = [
            self._completion([*prompt[shared:], *ids], logp, [False] * len(prompt[shared:]) + own)
            for prompt, ids, logp, own in rows
        ]
        return Group(example.row, tuple(prompts[0][:shared]), tuple(completions))

    def _completion(self, ids: list[int], logp: list[float] | None, own: list[bool]) -> Completion:
        spans = []
        at = 0
        for wrote, run in groupby(own):
            length = len(list(run))
            if not wrote:
                spans.append((at, at + length))
            at += length
        ended = ids[-1] in self.end_ids
        said: FinishReason = "stop" if ended else "length"
        values = None
        if logp is not None:
            wrote_last = own[len(own) - len(logp) :]
            kept = [value for value, wrote in zip(logp, wrote_last, strict=True) if wrote]
            values = torch.tensor(kept, dtype=torch.float32)
        return Completion(tuple(ids), self.text(ids, ended=ended), said, values, tuple(spans))


def _checked(output: Any, count: int) -> dict[str, list[Any]]:
    if not isinstance(output, Mapping):
        raise SamplerError(f"{WHO} returned a {type(output).__qualname__}, expected a dict")
    if missing := [name for name in REQUIRED if name not in output]:
        raise SamplerError(f"{WHO} must return keys {missing} in its output dict")
    values: dict[str, list[Any]] = {"env_mask": [None] * count}
    for name, given in output.items():
        if given is None and name in ("logprobs", "env_mask"):
            values[name] = [None] * count
            continue
        values[name] = _listed(given)
        if len(values[name]) != count:
            raise SamplerError(
                f"{WHO}: {name!r} has {len(values[name])} values for {count} completions"
            )
    return values


def _listed(given: Any) -> list[Any]:
    """Tensors, arrays and tuples as lists; what is no list as one that nothing fits."""
    given = given.tolist() if hasattr(given, "tolist") else given
    return list(given) if isinstance(given, (list, tuple)) else []


def _number(value: Any, where: str) -> float:
    """A log-prob; vLLM gives each token a list of its candidates, the sampled one first."""
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if value is None:
        return math.nan
    if not isinstance(value, (int, float)):
        raise SamplerError(f"{where}: logprobs has {brief(value)}, expected numbers")
    return float(value)
