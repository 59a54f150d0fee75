"""The tools and environments of a run: who loads them, tells of them, runs them and rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from fusedgrpo import stages
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data.chat import ChatTemplate
from fusedgrpo.engine.data.dataset import Example
from fusedgrpo.engine.data.encoder import PromptEncoder
from fusedgrpo.engine.data.formats import Messages
from fusedgrpo.engine.data.rows import BadRowError
from fusedgrpo.engine.tools.calls import TurnParser
from fusedgrpo.engine.tools.conversations import Conversations, Topic, beginning_seed
from fusedgrpo.engine.tools.environment_reward import EnvironmentReward
from fusedgrpo.engine.tools.processes import ToolProcesses
from fusedgrpo.engine.tools.rendering import ToolTurns
from fusedgrpo.engine.tools.spec import ToolSet, build_tools
from fusedgrpo.errors import ToolError


def build_tool_use(
    config: GRPOConfig,
    tools: Any,
    environment_factory: Any,
    folders: Sequence[Path],
    chat: ChatTemplate,
    check_interrupt: Callable[[], None],
) -> ToolUse | None:
    """All that a run with these tools needs; None without any. Raises ConfigError, ToolError."""
    if tools is None and environment_factory is None:
        return None
    with stages.stage("starting the tools"):
        found = build_tools(tools, environment_factory, folders, check_interrupt=check_interrupt)
        return None if found is None else ToolUse(found, config, chat, check_interrupt)


class ToolUse:
    """Everything between the policy of a run and its tools; close it. Raises ConfigError for a chat
    template that cannot tell of tools, or whose calls cannot be read; ToolError for tools that
    cannot be loaded.

    rewards: of environments that reward what is done in them, as reward functions.
    """

    def __init__(
        self,
        tools: ToolSet,
        config: GRPOConfig,
        chat: ChatTemplate,
        check_interrupt: Callable[[], None],
    ):
        self.tools = tools
        self.config = config
        self.parser = TurnParser(chat)
        self.turns = ToolTurns(chat, [chat.tokenizer.eos_token_id])
        self.processes = ToolProcesses(
            tools,
            timeout=config.tool_timeout,
            output_limit=config.tool_output_limit,
            check_interrupt=check_interrupt,
            on_error=config.on_tool_error,
        )
        self.rewards = [
            EnvironmentReward(name, tools.reward_name, self.processes.rewards)
            for name in tools.reward_names
        ]

    def describe(self) -> str:
        """The tools, and in how many kinds of environments they act."""
        environments = self.tools.environments
        every = environments or (None,)
        names = dict.fromkeys(name for each in every for name in self.tools.names(each))
        text = f"tools: {', '.join(names) or 'none'}"
        return text + (f" in {len(environments)} environments" if len(environments) > 1 else "")

    def close(self) -> None:
        self.processes.close()

    def environments(self, acted: Sequence[Any]) -> list[Any]:
        """The environments themselves, of ``Acted``, as copies."""
        return self.processes.environments([one.key for one in acted])

    def conversations(
        self,
        examples: Sequence[Example],
        begun: Sequence[tuple[Example, Any]],
        seed: int,
        text: Callable[[Sequence[int]], str],
        *,
        most: int,
        first: int = 0,
    ) -> Conversations:
        """The ``Conversations`` of a rollout that asks ``examples``, which have ``begun`` so."""
        return Conversations(
            [
                self._topic(row, example, words)
                for row, (example, words) in zip(examples, begun, strict=True)
            ],
            self.processes,
            self.parser.parse,
            self.turns.suffix,
            text,
            most=most,
            seed=seed,
            first=first,
            most_rounds=self.config.max_tool_calling_iterations,
        )

    def _topic(self, row: Example, example: Example, words: Any) -> Topic:
        """row: the example as it is in the data, of which the environment is told."""
        assert example.read is not None
        read = example.read
        reset = self._columns(row) if self.tools.environments else None
        return Topic(example.prompt_ids, read.schemas, read.environment, reset, words)

    def _columns(self, example: Example) -> dict[str, Any]:
        """The arguments of an environment's ``reset``: the row, without the name of the environment
        where the rows name it."""
        assert example.read is not None
        row = dict(example.columns)
        if example.read.is_in_row:
            row = {"prompt": example.prompt, **row}
        if self.tools.environments != (None,):
            row.pop("environment", None)
        return row

    def begun(
        self, examples: Sequence[Example], seed: int, encoder: PromptEncoder, first: int = 0
    ) -> list[tuple[Example, Any]]:
        """Each example, with what its environment has to say first at the end of its last message,
        and these words; None for nothing.

        All completions of a prompt begin alike: their environments are reset from one seed. Raises
        ToolError for an environment that cannot be made or reset, or whose first words do not fit.
        """
        if not self.tools.environments:
            return [(example, None) for example in examples]
        keys: list[Hashable] = []
        try:
            for i, example in enumerate(examples):
                assert example.read is not None
                key: Hashable = ("first words", seed, first + i)
                self.processes.open(
                    key,
                    example.read.environment,
                    self._columns(example),
                    beginning_seed(seed, first + i),
                )
                keys.append(key)
            said = self.processes.observations(keys)
        finally:
            for opened in keys:
                self.processes.close_key(opened)
        return [
            (example if words is None else _with_words(example, words, encoder), words)
            for example, words in zip(examples, said, strict=True)
        ]


def _with_words(example: Example, words: Any, encoder: PromptEncoder) -> Example:
    read = example.read
    assert read is not None
    if not isinstance(read.given, list) or not read.given:
        raise ToolError(
            f"The environment's reset returned {str(words)[:80]!r} for data row {example.row}, to "
            "be added to the last message of the prompt, which is plain text. Give prompts as "
            "messages, or set text_as_user_turn: true."
        )
    prompt = dataclasses.replace(
        read,
        given=_added(read.given, words),
        messages=None if read.messages is None else _added(read.messages, words),
    )
    try:
        ids = encoder.encode(prompt)
    except BadRowError as problem:
        raise ToolError(
            f"With what the environment's reset returned for data row {example.row}, {problem}. "
            "Let it say less, or raise the limit."
        ) from problem
    return dataclasses.replace(example, prompt=prompt.given, prompt_ids=ids, read=prompt)


def _added(messages: Messages, words: Any) -> Messages:
    """``messages`` with ``words``, text or parts, at the end of the last one."""
    *before, last = messages
    content = last["content"]
    if isinstance(words, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif isinstance(content, list) and not isinstance(words, list):
        words = [{"type": "text", "text": str(words)}]
    elif not isinstance(words, list):
        words = str(words)
    return [*before, {**last, "content": content + words}]
