"""The longest case of a run: what a memory plan is made for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.fake_layers import Batch

# A prompt's limit where neither the options nor the data say one.
PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Asked:
    """The options as given, None for what is to be chosen. merged: a copy of the weights with the
    adapter in it is there for rollouts."""

    config: GRPOConfig
    prompt_tokens: int | None
    offloading: bool | None
    merged: bool = False

    @property
    def prompt(self) -> int:
        config = self.config
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        if config.max_prompt_length is not None:
            return config.max_prompt_length
        if config.max_length is not None:
            return max(config.max_length - config.max_completion_length, 1)
        return PROMPT_TOKENS

    @property
    def longest(self) -> int:
        return self.prompt + self.config.max_completion_length

    def batch(self, tokens: int) -> Batch:
        """A micro-batch of ``tokens``, filled with completions of full length."""
        P, own = self.prompt, max(self.config.max_completion_length - 1, 1)
        if self.config.shared_prompt == "off":
            completions = max(tokens // (P + own), 1)
            return Batch(tokens, tokens, tokens - completions * (P - 1), completions)
        group = P + self.config.num_generations * own
        groups, rest = divmod(tokens, group)
        prompts = groups + (rest >= P + own)
        completions = groups * self.config.num_generations + max((rest - P) // own, 0)
        prompts, completions = max(prompts, 1), max(completions, 1)
        scored = max(tokens - prompts * P, 0) + completions
        return Batch(tokens, tokens + completions * P, scored, prompts + completions)

    def changed(self, **options: Any) -> Asked:
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **options))


def paged(config: GRPOConfig) -> bool:
    return config.optim.startswith("paged")
