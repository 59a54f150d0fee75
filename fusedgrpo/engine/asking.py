"""How the prompts of a run are asked: by its sampler alone, in conversations with tools, or by a
function of the user's."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusedgrpo.engine.data.dataset import Example
from fusedgrpo.engine.data.encoder import PromptEncoder
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.rollout.completion_text import CompletionText
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.turns import Place
from fusedgrpo.engine.rollout.types import Group
from fusedgrpo.engine.rollout_function import WHO, RolloutFunction
from fusedgrpo.engine.seeding import derive
from fusedgrpo.engine.tools.conversations import Conversations
from fusedgrpo.engine.tools.environment_reward import Acted
from fusedgrpo.engine.tools.spec import ToolSet
from fusedgrpo.engine.tools.use import ToolUse


@dataclass
class Questions:
    """Examples that are asked, while their completions are sampled and scored.

    examples: with what their environments say first. seed: of the rollout, ``first`` the place of
    the first example in it. conversations: with tools, None without. function: what completions
    come from, None for the sampler. columns: what it said beside them for reward functions, by name
    and place.
    """

    examples: Sequence[Example]
    seed: int
    first: int = 0
    conversations: Conversations | None = None
    function: RolloutFunction | None = None
    columns: dict[str, dict[Place, Any]] = field(default_factory=dict)

    @property
    def turns(self) -> dict[str, Conversations]:
        """As an argument of ``Sampler.sample_until``."""
        return {} if self.conversations is None else {"turns": self.conversations}

    def acted(self, places: Sequence[Place]) -> list[Acted] | None:
        """Where the completions at these places of the rollout have acted; None where there are no
        environments."""
        talk = self.conversations
        if talk is None or any(topic.reset is None for topic in talk.topics):
            return None
        return [Acted(talk.key(place), talk.topic(place).environment) for place in places]


class Asking:
    """Asks the examples of a run.

    tools: how its policy acts, None where it only speaks. function: what completions come from,
    None for the run's sampler. most: tokens of a completion.
    """

    def __init__(
        self,
        tools: ToolUse | None,
        tokenizer: Any,
        eos_ids: Collection[int],
        *,
        most: int,
        processes: Processes,
        function: RolloutFunction | None = None,
    ):
        self.tools = tools
        self.function = function
        self.processes = processes
        self.most = most
        # Special tokens are what parts the turns.
        self._text = CompletionText(tokenizer, eos_ids, skip_special_tokens=False)
        self._eos_ids = frozenset(eos_ids)

    @contextlib.contextmanager
    def begun(
        self, examples: Sequence[Example], seed: int, encoder: PromptEncoder | None, first: int = 0
    ) -> Iterator[Questions]:
        """Inside, ``examples`` are asked and what they get is scored: environments live as long.
        For all processes together."""
        if self.tools is None:
            yield Questions(examples, seed, first, function=self.function)
            return
        tools, own = self.tools, self.processes.share(len(examples))
        tool_seed = derive(seed, "tools")
        assert encoder is not None  # data without one is not asked with tools

        def begin() -> list[tuple[Example, Any]]:
            mine = examples[own.start : own.stop]
            return tools.begun(mine, tool_seed, encoder, first + own.start)

        parts = self.processes.run_everywhere(begin)
        spoken = [each for part in parts for each in part]
        talk = tools.conversations(
            examples, spoken, tool_seed, self._said, most=self.most, first=first
        )
        with talk:
            yield Questions([example for example, _ in spoken], seed, first, talk)

    @property
    def tool_set(self) -> ToolSet | None:
        """The tools that prompts are told of."""
        return None if self.tools is None else self.tools.tools

    def describe(self) -> str:
        """How completions come about, where they do not come from the policy alone."""
        if self.function is not None:
            return "completions by rollout_func"
        return "" if self.tools is None else self.tools.describe()

    def close(self) -> None:
        """End the processes of tools."""
        if self.tools is not None:
            self.tools.close()

    def _said(self, ids: Sequence[int]) -> str:
        return self._text(ids, ended=bool(ids) and ids[-1] in self._eos_ids)

    def sample(
        self, sampler: Sampler, questions: Questions, n: int, params: SamplingParams
    ) -> list[Group]:
        """``n`` completions for each example. For all processes together."""
        if questions.function is None:
            return _sampled(sampler, questions, n, params)
        function, own = questions.function, self.processes.share(len(questions.examples))

        def sample_own() -> list[Group]:
            if not own:
                return []
            first = questions.first + own.start
            groups, said = function.sample(
                questions.examples[own.start : own.stop], n, derive(questions.seed, WHO, first)
            )
            places = [(first + i, k) for i in range(len(own)) for k in range(n)]
            for name, values in said.items():
                questions.columns[name] = dict(zip(places, values, strict=True))
            return groups

        parts = self.processes.run_everywhere(sample_own)
        return [group for part in parts for group in part]


def _sampled(sampler: Sampler, questions: Questions, n: int, params: SamplingParams) -> list[Group]:
    examples = questions.examples
    options: dict[str, Any] = {"rows": [example.row for example in examples]}
    if questions.first:
        options["first"] = questions.first
    prompts = [example.prompt_ids for example in examples]
    if questions.conversations is None:
        return sampler.sample(prompts, n, params, questions.seed, **options)
    return sampler.sample_turns(
        prompts, n, params, questions.seed, questions.conversations, **options
    )
