from __future__ import annotations

import pytest

from fusedgrpo.engine.data.formats import (
    AlpacaLayout,
    ConversationLayout,
    PromptLayout,
    guess_layout,
)
from fusedgrpo.engine.data.rows import BadRowError
from fusedgrpo.errors import DataError

USER = {"role": "user", "content": "2+2?"}


def test_columns_tell_the_layout() -> None:
    assert guess_layout(["answer", "prompt"], "x") == PromptLayout()
    assert guess_layout(["instruction", "output"], "x") == AlpacaLayout()


def test_no_prompt_column_shows_the_columns_and_the_nearest() -> None:
    with pytest.raises(DataError, match=r"x\.json: .*'promt', 'answer'\. Did you mean 'promt'"):
        guess_layout(["promt", "answer"], "x.json")


def test_text_prompts_are_taken_verbatim() -> None:
    prompt = PromptLayout().read({"prompt": " 2+2? "})
    assert (prompt.given, prompt.messages, prompt.answer) == (" 2+2? ", None, None)


def test_message_prompts_are_for_the_template_and_the_rewards_alike() -> None:
    prompt = PromptLayout().read({"prompt": [USER]})
    assert prompt.given == prompt.messages == [USER]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "'prompt' is null"),
        ("", "'prompt' is empty"),
        (" \n", "'prompt' is empty"),
        (7, "'prompt' is int '7', expected text or a list of messages"),
        ([], "empty list"),
        (["hi"], r"'prompt'\[0\] is not a message"),
        ([{"content": "hi"}], r"'prompt'\[0\] is not a message"),
        ([USER, {"role": "user", "content": None}], r"content of 'prompt'\[1\] is null"),
    ],
)
def test_unusable_prompts_say_why(value: object, reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        PromptLayout().read({"prompt": value})


def test_alpaca_joins_instruction_and_input() -> None:
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    prompt = AlpacaLayout().read(row)
    assert (prompt.given, prompt.answer) == ("Add.\n2, 2", "4")
    assert prompt.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add.\n2, 2"},
    ]


@pytest.mark.parametrize("query", ["", None])
def test_alpaca_without_input_is_the_instruction(query: str | None) -> None:
    assert AlpacaLayout().read({"instruction": "2+2?", "input": query}).given == "2+2?"


def test_alpaca_history_comes_first() -> None:
    row = {"instruction": "and 3+3?", "history": [["2+2?", "4"]]}
    assert [m["content"] for m in AlpacaLayout().read(row).messages or []] == [
        *("2+2?", "4", "and 3+3?")
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": None}, "'instruction' is null"),
        ({"instruction": "", "input": " "}, "'instruction' is empty"),
        ({"instruction": "a", "input": 3}, "'input' is int"),
        ({"instruction": "a", "history": [["only a question"]]}, "pairs"),
    ],
)
def test_unusable_alpaca_rows_say_why(row: dict[str, object], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        AlpacaLayout().read(row)


def test_columns_can_be_mapped() -> None:
    layout = AlpacaLayout("question", None, "answer", None, None)
    prompt = layout.read({"question": "2+2?", "answer": "4", "input": "not used"})
    assert (prompt.given, prompt.answer) == ("2+2?", "4")


def test_the_last_answer_of_a_conversation_is_the_reference() -> None:
    turns = [
        {"from": "human", "value": "2+2?"},
        {"from": "gpt", "value": "4"},
        {"from": "human", "value": "3+3?"},
        {"from": "gpt", "value": "6"},
    ]
    prompt = ConversationLayout(system="sys").read({"conversations": turns, "sys": "Be brief."})
    assert [m["role"] for m in prompt.messages or []] == ["system", "user", "assistant", "user"]
    assert prompt.given == prompt.messages
    assert prompt.answer == "6"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (None, "is null"),
        ([], "expected a list of turns"),
        ([{"from": "tool", "value": "x"}], "role 'tool', expected system, human, gpt"),
        ([{"from": "gpt", "value": "x"}], "no user turn"),
        ([{"from": "human", "value": None}], "'value' is null"),
    ],
)
def test_unusable_conversations_say_why(turns: object, reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        ConversationLayout().read({"conversations": turns})
