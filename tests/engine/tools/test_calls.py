"""A turn becomes a message with the calls that a policy wrote, whatever it wrote."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import pytest
import tool_chats

from fusedgrpo.engine.tools.calls import Turn, TurnParser
from fusedgrpo.engine.tools.types import ToolCall
from fusedgrpo.errors import ConfigError

SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"type": "number"},
                    "note": {"type": "string"},
                    "flag": {"type": "boolean"},
                    "many": {"type": "array"},
                    "more": {"type": "object"},
                    "maybe": {"type": "integer", "nullable": True},
                },
            },
        },
    }
]


def parsed(text: str, chat: Any = None, prefix: str = "", schemas: Any = SCHEMAS) -> Turn:
    chat = chat or tool_chats.chat()
    ids = tool_chats.ids(chat, text)
    return TurnParser(chat).parse(ids, tool_chats.ids(chat, prefix), schemas)


def hermes(name: str = "add", **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_a_turn_without_a_call_is_its_text() -> None:
    turn = parsed(" 2 + 2 = 4 \n<|im_end|>")
    assert turn == Turn({"role": "assistant", "content": " 2 + 2 = 4 \n"})


def test_a_call_is_a_part_of_its_message() -> None:
    turn = parsed(f"Let me see. {hermes(a=1, b=2)}<|im_end|>")
    function = {"name": "add", "arguments": {"a": 1, "b": 2}}
    assert turn.message == {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert turn.calls == (ToolCall("add", {"a": 1, "b": 2}),) and turn.problem is None


def test_calls_keep_their_order() -> None:
    turn = parsed(hermes(a=1) + "\n" + hermes("sub", a=2) + hermes(a=3))
    assert [(call.name, call.arguments["a"]) for call in turn.calls] == [
        ("add", 1),
        ("sub", 2),
        ("add", 3),
    ]


def test_what_looks_like_the_end_of_a_call_may_be_in_its_text() -> None:
    note = 'a } brace, {"name": "x"}, </tool_call>, <tool_call>, <think> and "quotes"\n'
    turn = parsed(hermes(note=note))
    assert turn.calls == (ToolCall("add", {"note": note}),)


@pytest.mark.parametrize("thought", ["plain", hermes(a=1), "<tool_call>{broken", "{}[]"])
def test_nothing_in_reasoning_is_a_call(thought: str) -> None:
    turn = parsed(f"<think>\n{thought}\n</think>\n\n{hermes(a=2)}<|im_end|>")
    assert [call.arguments for call in turn.calls] == [{"a": 2}]
    assert turn.message["reasoning_content"] == thought
    assert turn.message["content"] == ""


@pytest.mark.parametrize("before", ["<|im_start|>assistant\n<think>\n", "Let me <think>"])
def test_reasoning_may_have_begun_before_the_turn(before: str) -> None:
    turn = parsed(f"{hermes(a=1)}</think>{hermes(a=2)}", prefix=before)
    assert [call.arguments for call in turn.calls] == [{"a": 2}]
    only = parsed(f"{hermes(a=1)}", prefix=before)
    assert not only.calls and only.message["reasoning_content"] == hermes(a=1)


def test_reasoning_stays_in_the_text_where_the_template_has_none() -> None:
    """Rewards look for its tags there."""
    source = tool_chats.CHATML.replace("<think>", "").replace("</think>", "")
    turn = parsed(f"<think>{hermes(a=1)}</think> so {hermes(a=2)}", tool_chats.chat(source))
    assert [call.arguments for call in turn.calls] == [{"a": 2}]
    assert turn.message["content"] == f"<think>{hermes(a=1)}</think> so"
    assert "reasoning_content" not in turn.message
    assert not parsed(f"<think>{hermes(a=1)}", tool_chats.chat(source)).calls


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<tool_call>", "not valid JSON"),
        ("<tool_call>\n</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', "not valid JSON"),
        ('<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "NaN"),
        ('<tool_call>{"name": "add", "arguments": {}} and</tool_call>', "</tool_call> behind"),
        ('<tool_call>{"arguments": {}}</tool_call>', "no name"),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "no name"),
        ('<tool_call>{"name": " ", "arguments": {}}</tool_call>', "no name"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "'add' are list"),
        ('<tool_call>{"name": "add", "arguments": "{}"}</tool_call>', "'add' are str"),
        ("<tool_call>[]</tool_call>", "not a JSON object"),
        (hermes(a=1) + "<tool_call>{", "not valid JSON"),
        ("<tool_call>" + "[" * 100_000, "nested too deeply"),
        ("<tool_call>" + '{"a":' * 100_000, "nested too deeply"),
        (hermes(more=json.loads('{"a":' * 200 + "1" + "}" * 200)), "nested too deeply"),
        ('<tool_call>{"name": "add", "arguments": {"note": "\\ud800"}}</tool_call>', "surrogate"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1' + "0" * 5000 + "}}", "not valid JSON"),
        ('<tool_call>{"name": "add", "arguments": {"b": 1e999}}</tool_call>', "no JSON"),
    ],
)
def test_a_call_that_cannot_be_read_is_a_problem_and_no_call(text: str, why: str) -> None:
    turn = parsed(text + "<|im_end|>")
    assert turn.problem is not None and why in turn.problem
    assert turn.message == {"role": "assistant", "content": text} and not turn.calls


@pytest.mark.parametrize("arguments", ["null", "{}", None])
def test_a_call_without_arguments_has_an_empty_mapping_of_them(arguments: str | None) -> None:
    given = "" if arguments is None else f', "arguments": {arguments}'
    turn = parsed(f'<tool_call>{{"name": "add"{given}}}</tool_call>')
    assert turn.calls == (ToolCall("add", {}),)


def test_a_call_is_complete_without_its_closing_mark() -> None:
    assert parsed(hermes(a=1).removesuffix("</tool_call>") + "<|im_end|>").calls


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"a": "7"}, {"a": 7}),
        ({"a": "7.0"}, {"a": 7}),
        ({"a": "7.5"}, {"a": "7.5"}),
        ({"a": "seven"}, {"a": "seven"}),
        ({"b": "7"}, {"b": 7}),
        ({"b": "1e-3"}, {"b": 0.001}),
        ({"note": "7"}, {"note": "7"}),
        ({"flag": "True"}, {"flag": True}),
        ({"flag": "false"}, {"flag": False}),
        ({"flag": "yes"}, {"flag": "yes"}),
        ({"many": "[1, 2]"}, {"many": [1, 2]}),
        ({"more": '{"x": 1}'}, {"more": {"x": 1}}),
        ({"more": "[1]"}, {"more": "[1]"}),
        ({"maybe": "None"}, {"maybe": None}),
        ({"a": "null"}, {"a": "null"}),
        ({"unknown": "7"}, {"unknown": "7"}),
    ],
)
def test_text_becomes_what_the_schema_says(written: dict, read: dict) -> None:
    (call,) = parsed(hermes(**written)).calls
    assert call.arguments == read
    assert [type(value) for value in call.arguments.values()] == [type(v) for v in read.values()]
    assert parsed(hermes(**written), schemas=()).calls[0].arguments == written


def test_a_template_that_writes_no_calls_is_refused() -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="response_template"):
        TurnParser(tool_chats.chat(plain))
    strange = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "CALL {{ c.function.name }}({{ c.function.arguments.text }}){% endfor %}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"not known: .*CALL probe_tool.*response_template"):
        TurnParser(tool_chats.chat(strange))


RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


@pytest.fixture
def described():
    """A chat whose tokenizer describes its turns."""
    chat = tool_chats.chat()
    chat.tokenizer.response_template = copy.deepcopy(RESPONSES)
    if "prefix" not in inspect.signature(chat.tokenizer.parse_response).parameters:
        pytest.skip("this transformers knows no response_template")
    return chat


def test_a_response_template_is_what_reads_turns(described) -> None:
    described.tokenizer.response_template["fields"]["thoughts"] = {"open": "(", "close": ")"}
    turn = parsed(f"(Hm.) So {hermes(a='1', note='7')}<|im_end|>", described)
    assert turn.calls == (ToolCall("add", {"a": 1, "note": "7"}),)
    assert turn.message["thoughts"] == "Hm." and turn.message["content"] == "So"
    assert turn.message["tool_calls"][0]["function"]["arguments"] == {"a": 1, "note": "7"}
    assert parsed("", described).message == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{broken</tool_call>",
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        "<tool_call>7</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
    ],
)
def test_what_a_response_template_cannot_read_is_a_problem(described, text) -> None:
    turn = parsed(text, described)
    assert turn.problem and turn.message == {"role": "assistant", "content": text}
    assert not turn.calls


def test_a_response_template_has_to_read_what_the_chat_template_writes(described) -> None:
    TurnParser(described)
    described.tokenizer.response_template["fields"]["tool_calls"]["open"] = "<call>"
    with pytest.raises(ConfigError, match="does not read the call"):
        TurnParser(described)


def test_a_response_template_does_for_a_chat_template_that_writes_no_calls(described) -> None:
    described.source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert parsed(hermes(a=1), described).calls
