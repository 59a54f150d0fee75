"""The templates of real families: a call that one writes is read back, an answer is its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tool_chats

from fusedgrpo.engine.data.chat import ChatTemplate
from fusedgrpo.engine.tools.calls import TurnParser
from fusedgrpo.engine.tools.probes import common_start
from fusedgrpo.engine.tools.rendering import ToolTurns
from fusedgrpo.engine.tools.types import ToolCall
from fusedgrpo.errors import ConfigError

pytestmark = pytest.mark.peer

KINDS = [
    ("text", "string"),
    ("count", "integer"),
    ("share", "number"),
    ("sure", "boolean"),
    ("items", "array"),
    ("table", "object"),
]
SCHEMA = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up.",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": kind, "description": "."} for name, kind in KINDS},
            "required": ["text"],
        },
    },
}
PLAIN = {"text": "two words", "count": 7}
ALL = {
    "text": 'äö "quoted" \\ <b> {x: 1} [y], 12',
    "count": -3,
    "share": 0.25,
    "sure": True,
    "items": [1, "two", [3.5, False]],
    "table": {"a": {"b": "c d"}, "e": [1]},
}
LINES = {"text": "line 1\n  line 2\n\nline 4"}
NUMBER = {"text": "0012"}  # text all the same

# The end of a turn with calls, and whether a template writes several calls of a turn.
FAMILIES: dict[str, tuple[str, bool]] = {
    "qwen2_5": ("<|im_end|>", True),
    "qwen3": ("<|im_end|>", True),
    "qwen3_instruct_2507": ("<|im_end|>", True),
    "qwen3_vl": ("<|im_end|>", True),
    "qwen3_5_think": ("<|im_end|>", True),
    "qwen3_5_nothink": ("<|im_end|>", True),
    "qwen3_6": ("<|im_end|>", True),
    "qwen3_8": ("<|im_end|>", True),
    "nemotron_3_nano": ("<|im_end|>", True),
    "nemotron_3_super": ("<|im_end|>", True),
    "nemotron_3_ultra": ("<|im_end|>", True),
    "llama3_1": ("<|eot_id|>", False),
    "llama3_2": ("<|eot_id|>", False),
    "glm4moe": ("<|observation|>", True),
    "deepseekv3": ("<｜end▁of▁sentence｜>", True),
    "gemma4": ("<|tool_response>", True),
    "gemma4_v2": ("<turn|>", True),
    "gemma4_v5": ("<|tool_response>", True),
    "gptoss": ("<|call|>", False),
    "lfm2_v2": ("<|im_end|>", True),
    "lfm2_2_5": ("<|im_end|>", True),
}
# LFM2 writes text between quotes as it is, so that what it writes is not always what it says.
UNQUOTED = {"lfm2_v2", "lfm2_2_5"}


def message(family: str, *arguments: dict[str, Any]) -> dict[str, Any]:
    wanted = json.dumps if family == "deepseekv3" else dict
    functions = [{"name": "look_up", "arguments": wanted(given)} for given in arguments]
    calls = [{"type": "function", "id": "call00000", "function": f} for f in functions]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def turn_of(
    chat: ChatTemplate, turn: dict[str, Any], question: str = "Hi"
) -> tuple[list[int], list[int]]:
    """Tokens before a turn, as far as the prompt has them, and of the turn."""
    ask = {"role": "user", "content": question}
    prompt = chat.ids([ask], schemas=[SCHEMA])
    whole = chat.ids([ask, turn], generation_prompt=False, schemas=[SCHEMA])
    start = common_start(prompt, whole)
    return whole[:start], whole[start:]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("given", [PLAIN, ALL, LINES, NUMBER, {}], ids=str)
def test_a_call_is_read_as_it_is_written(family: str, given: dict[str, Any]) -> None:
    if family in UNQUOTED and given is LINES:
        pytest.skip("its text is between quotes that end with the line")
    if family in UNQUOTED and given is ALL:
        given = {**ALL, "text": 'äö "quoted" <b> {x: 1} [y], 12'}
    chat = tool_chats.chat(tool_chats.peer(family))
    before, turn = turn_of(chat, message(family, given))
    parsed = TurnParser(chat).parse(turn, before, [SCHEMA])
    assert parsed.problem is None
    assert parsed.calls == (ToolCall("look_up", given),)
    assert parsed.message["content"] == ""


@pytest.mark.parametrize("family", [name for name, (_, several) in FAMILIES.items() if several])
def test_several_calls_are_read(family: str) -> None:
    chat = tool_chats.chat(tool_chats.peer(family))
    before, turn = turn_of(chat, message(family, PLAIN, {"text": "other"}))
    calls = TurnParser(chat).parse(turn, before, [SCHEMA]).calls
    assert calls == (ToolCall("look_up", PLAIN), ToolCall("look_up", {"text": "other"}))


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_no_call(family: str) -> None:
    chat = tool_chats.chat(tool_chats.peer(family))
    before, _ = turn_of(chat, message(family, PLAIN))
    for text in ("It is 3.", '{"answer": 3}', "call: look_up(text='3')", "", "a < b > {c} [d]"):
        turn = TurnParser(chat).parse(tool_chats.ids(chat, text), before, [SCHEMA])
        assert not turn.calls and turn.problem is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2])
def test_an_answer_is_what_the_template_writes(family: str, count: int) -> None:
    end, several = FAMILIES[family]
    chat = tool_chats.chat(tool_chats.peer(family))
    eos = tool_chats.token(chat, end)
    calls = message(family, *([{"text": "x"}] * (count if several else 1)))
    answers = [
        {"role": "tool", "name": "look_up", "content": f"It says {i}.", "tool_call_id": "call00000"}
        for i in range(count)
    ]
    whole = chat.ids([{"role": "user", "content": "Hi"}, calls, *answers])
    suffix = ToolTurns(chat, [eos]).suffix(answers, eos)
    assert tuple(whole[-len(suffix) :]) == suffix and whole[-len(suffix) - 1] == eos
    text = chat.tokenizer.decode(list(suffix))
    assert all(f"It says {i}." in text for i in range(count)) and "?" not in text


@pytest.mark.parametrize("family", ["cohere2", "gemma3", "llama3", "phi3_5", "qwen2_5_vl"])
def test_a_family_without_calls_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="response_template"):
        TurnParser(tool_chats.chat(tool_chats.peer(family)))


@pytest.mark.parametrize("family", ["cohere2", "gemma3", "phi3_5"])
def test_a_family_without_answers_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="role `tool`"):
        ToolTurns(tool_chats.chat(tool_chats.peer(family)), [])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "llama3_2", "gptoss", "lfm2_2_5"])
def test_response_templates_of_trl_read_the_same(family: str) -> None:
    from trl.chat_template_utils import add_response_schema

    chat = tool_chats.chat(tool_chats.peer(family))
    before, turn = turn_of(chat, message(family, PLAIN))
    own = TurnParser(chat).parse(turn, before, [SCHEMA])
    add_response_schema(chat.tokenizer)
    theirs = TurnParser(chat).parse(turn, before, [SCHEMA])
    assert theirs.calls == own.calls and theirs.message == own.message


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "nemotron_3_nano"])
def test_turns_that_a_template_would_write_differently_stay_as_they_were_sampled(family) -> None:
    """Reasoning that the template drops once there is another question, and odd white space."""
    chat = tool_chats.chat(tool_chats.peer(family), eos_token="<|im_end|>")
    eos = chat.tokenizer.eos_token_id
    parser, turns = TurnParser(chat), ToolTurns(chat, [eos])
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
    before = chat.ids(messages, schemas=[SCHEMA])
    opened = chat.tokenizer.decode(before).rstrip().endswith("<think>")
    sequence, given = list(before), []
    for number in range(3):
        _, call = turn_of(chat, message(family, {"text": str(number)}))
        written = chat.tokenizer.decode(call).split("<tool_call>", 1)[1]
        thought = f"  Hm {number}.   "
        text = f"{'' if opened else '<think>'}{thought}</think>\n\n\n <tool_call>{written.strip()}"
        sampled = tool_chats.ids(chat, text)
        turn = parser.parse(sampled, before, [SCHEMA])
        assert turn.calls == (ToolCall("look_up", {"text": str(number)}),)
        assert turn.message["reasoning_content"] == thought.strip()
        answers = [{"role": "tool", "name": "look_up", "content": f"It says {number}."}]
        before = list(turns.suffix(answers, sampled[-1]))
        given.append(before)
        sequence += [*sampled, *before]
        messages += [turn.message, *answers]
    whole = chat.tokenizer.decode(chat.ids(messages, schemas=[SCHEMA]))
    assert chat.tokenizer.decode(sequence) != whole, "or there is nothing to see here"
    assert all(chat.tokenizer.decode(part) in whole for part in given)


def test_variables_of_the_template_are_those_of_the_run() -> None:
    chat = tool_chats.chat(tool_chats.peer("qwen3"), {"enable_thinking": False})
    suffix = ToolTurns(chat, []).suffix([{"role": "tool", "name": "f", "content": "3"}], None)
    assert chat.tokenizer.decode(list(suffix)).endswith("assistant\n<think>\n\n</think>\n\n")
