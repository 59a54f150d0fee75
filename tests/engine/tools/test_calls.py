"""A turn becomes a message with the calls that a policy wrote, whatever it wrote."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import pytest
import tool_chats
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgrpo.engine.tools.calls import Turn, TurnParser, split_turn
from fusedgrpo.engine.tools.formats import FORMATS, CallFormat, UnreadableCallError
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


def test_reasoning_may_be_empty() -> None:
    message = {"role": "assistant", "content": "It is 3."}
    assert parsed("<think>\n\n</think>\n\nIt is 3.<|im_end|>").message == message


@pytest.mark.parametrize("before", ["<|im_start|>assistant\n<think>\n", "Let me <think>"])
def test_reasoning_may_have_begun_before_the_turn(before: str) -> None:
    turn = parsed(f"{hermes(a=1)}</think>{hermes(a=2)}", prefix=before)
    assert [call.arguments for call in turn.calls] == [{"a": 2}]
    only = parsed(f"{hermes(a=1)}", prefix=before)
    assert not only.calls and only.message["reasoning_content"] == hermes(a=1)


def test_reasoning_that_is_closed_had_begun() -> None:
    """A prompt may end in the middle of it."""
    turn = parsed("so 3</think>\n\nIt is 3.", prefix="<|im_start|>assistant\n<think>\nOne and two,")
    assert turn.message["reasoning_content"] == "so 3" and turn.message["content"] == "It is 3."
    call = hermes(note="</think>")
    assert parsed(f"Now {call}").calls == (ToolCall("add", {"note": "</think>"}),)


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


def test_a_problem_is_said_in_few_words() -> None:
    turn = parsed(f'<tool_call>{{"name": "{"x" * 5000}", "arguments": []}}</tool_call>')
    assert turn.problem is not None and len(turn.problem) == 500


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
        ({"b": "NaN"}, {"b": "NaN"}),
        ({"b": "1e999"}, {"b": "1e999"}),
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
    assert parsed("", described) == Turn({"role": "assistant", "content": ""})


def test_the_end_of_a_turn_is_no_content(described) -> None:
    del described.tokenizer.response_template["fields"]["content"]["close_pattern"]
    assert parsed("It is 3.<eos>", described).message["content"] == "It is 3."


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


def found(form: str, text: str) -> tuple[ToolCall, ...] | str:
    """The calls that a format reads in a text, or what it says of one that it cannot read."""
    (chosen,) = (each for each in FORMATS if each.name == form)
    calls: list[ToolCall] = []
    at = 0
    try:
        while opened := chosen.opening.search(text, at):
            some, at = chosen.read(opened)
            calls += some
    except UnreadableCallError as problem:
        return str(problem)
    return tuple(calls)


F, G = ToolCall("f", {"a": 1}), ToolCall("g", {})


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("Llama", '{"name": "f", "parameters": {"a": 1}}', (F,)),
        ("Llama", '<|python_tag|>{"name": "f", "arguments": {"a": 1}}', (F,)),
        ("Llama", '{"name": "f", "parameters": {"a": 1}}; {"name": "g"}', (F, G)),
        ("Llama", '{"name": "g", "parameters": {}};\n', (G,)),
        ("Llama", 'Well: {"name": "f", "parameters": {"a": 1}}', ()),
        ("Llama", '{"name": "f"}', ()),
        ("Llama", '<|python_tag|>f.call(a="1")', "not valid JSON"),
        ("Llama", '{"name": "f", "parameters": {"a": 1}', "not valid JSON"),
        ("Llama", '{"name": "f", "parameters": {"a": 1}} I hope', "text follows"),
        ("Mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]', (F, G)),
        ("Mistral", '[TOOL_CALLS] {"name": "f", "arguments": {"a": 1}}', (F,)),
        ("Mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]a1[ARGS]{}', (F, G)),
        ("Mistral", "[TOOL_CALLS]f[ARGS]", "not valid JSON"),
        ("Mistral", "[TOOL_CALLS][1]", "not a JSON object"),
        (
            "DeepSeek",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
            '{"a": 1}<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
            "<｜tool▁calls▁end｜>",
            (F, G),
        ),
        ("DeepSeek", "<｜tool▁call▁begin｜>function", "expected the name"),
        ("DeepSeek", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{", "not valid JSON"),
        (
            "GPT-OSS",
            "<|channel|>analysis<|message|>Use f.<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
            (F,),
        ),
        ("GPT-OSS", "<|channel|>final<|message|>to=functions.f {}<|return|>", ()),
        ("GPT-OSS", "<|channel|>commentary to=functions.f <|message|>{a}<|call|>", "valid JSON"),
        ("GPT-OSS", " to=functions.f<|message|>[]<|call|>", "are list"),
        ("Gemma", "<|tool_call>call:f{a:1}<tool_call|><|tool_call>call:g{}<tool_call|>", (F, G)),
        ("Gemma", "<|tool_call>call:f{ a : 1 }", (F,)),
        ("Gemma", "<|tool_call>call:f{a:one}<tool_call|>", "around text"),
        ("Gemma", '<|tool_call>call:f{a:<|"|>one}<tool_call|>', "not closed"),
        ("Gemma", "<|tool_call>call:f{a:1 b:2}<tool_call|>", "expected , or }"),
        ("Gemma", "<|tool_call>call:f{1}<tool_call|>", "expected key:value"),
        ("Gemma", "<|tool_call>call:f{a:[1,}<tool_call|>", "expected a value"),
        ("Gemma", "<|tool_call>f{}<tool_call|>", "expected call:name"),
        ("Gemma", "<|tool_call>call:f{a:" + "[" * 9999, "too deeply"),
        ("Gemma", "<|tool_call>call:f{a:" + "1" * 9999, "expected a value"),
        ("LFM2", "<|tool_call_start|>[f(a=1), g()]<|tool_call_end|>", (F, G)),
        ("LFM2", "<|tool_call_start|>f(a=1)", (F,)),
        ("LFM2", "<|tool_call_start|>[f(1)]<|tool_call_end|>", "need their names"),
        ("LFM2", "<|tool_call_start|>[f(**{})]<|tool_call_end|>", "need their names"),
        ("LFM2", "<|tool_call_start|>[f(a=b)]<|tool_call_end|>", "b is no value"),
        ("LFM2", "<|tool_call_start|>[f(a=open('x'))]<|tool_call_end|>", "open is no value"),
        ("LFM2", "<|tool_call_start|>[f(a=\0)]<|tool_call_end|>", "null bytes"),
        ("LFM2", "<|tool_call_start|>f" + "()" * 50_000, "not valid"),
        ("LFM2", "<|tool_call_start|>[f(a=" + "-" * 50_000 + "1)]", "not valid"),
        ("LFM2", "<|tool_call_start|>[f(a=" + "[" * 50_000 + ")]", "not valid"),
        ("LFM2", "<|tool_call_start|>[f(a=" + "1+" * 50_000 + "1)]", "not valid"),
        ("LFM2", "<|tool_call_start|>1", "expected a list of calls"),
        ("Qwen3-Coder", "<function=f>\n<parameter=a>\n1\n</parameter></function>", "1"),
        ("Qwen3-Coder", "<tool_call><function=g></function></tool_call>", (G,)),
        (
            "Qwen3-Coder",
            "<function=f><parameter=a>\n</parameter> \n</parameter></function></tool_call>",
            (ToolCall("f", {"a": "</parameter> "}),),
        ),
        ("Qwen3-Coder", "<tool_call>g</tool_call>", "expected <function="),
        ("Qwen3-Coder", "<function=f><parameter=a>1</function>", "expected </function>"),
        ("GLM", "<tool_call>g\n</tool_call><tool_call>g", (G, G)),
        ("GLM", "<tool_call>{}</tool_call>", "expected the name"),
        ("GLM", "<tool_call>f<arg_key>a</arg_key>1</tool_call>", "expected </tool_call>"),
    ],
)
def test_a_format_reads_its_calls(form: str, text: str, calls: tuple[ToolCall, ...] | str) -> None:
    said = found(form, text)
    if calls == "1":  # a format of text alone
        assert said == (ToolCall("f", {"a": "1"}),)
    elif isinstance(calls, str):
        assert isinstance(said, str) and calls in said
    else:
        assert said == calls


def test_reasoning_of_gpt_oss_is_a_channel() -> None:
    (harmony,) = (each for each in FORMATS if each.name == "GPT-OSS")
    assert harmony.thoughts is not None
    text = (
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>It is 3.<|return|>"
    )
    assert harmony.thoughts(text) == ("One.", "I look.It is 3.")
    assert harmony.thoughts("Just text.") == ("", "Just text.")


TAGS = ("<think>", "</think>")
PIECES = st.sampled_from(
    [
        *(mark for form in FORMATS for mark in form.marks),
        *("<think>", "</think>", "<function=f>", "<parameter=a>", "</parameter>", "</function>"),
        *('{"name": "f", "arguments": {"a": ', '{"name": "f", "parameters": ', "}", "[", "f", ","),
        *("to=functions.f", "call:f{", "call:f{a:1}", "f(a=1)", "1", '"', "\n", "\ufffd", "\\"),
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=60))
def test_no_text_raises(text: str) -> None:
    for form in FORMATS:
        for opened in (False, True):
            try:
                content, thoughts, calls = split_turn(text, form, TAGS, opened, True)
            except UnreadableCallError as problem:
                assert str(problem)
                continue
            if form.thoughts is not None:
                form.thoughts(content)
            assert len(content) + len(thoughts) <= len(text)
            assert all(isinstance(call.arguments, dict) and call.name for call in calls)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), VALUES))
def test_a_call_in_json_is_what_it_says(arguments: dict[str, Any]) -> None:
    written = json.dumps({"name": "f", "arguments": arguments})
    assert found("Hermes", f"<tool_call>{written}</tool_call>") == (ToolCall("f", arguments),)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_long_texts_are_read_or_are_a_problem(form: CallFormat) -> None:
    for piece in (
        "<think></think>",
        "</think>",
        "</parameter>",
        "<arg_key></arg_key>",
        *form.marks,
    ):
        text = piece * 10_000
        try:
            content, _, calls = split_turn(text, form, TAGS, False, True)
        except UnreadableCallError as problem:
            assert len(str(problem)) < 500
        else:
            assert not calls and len(content) <= len(text)
