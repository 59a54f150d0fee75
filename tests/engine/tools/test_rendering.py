"""Answers of tools become the tokens that the chat template writes, and nothing else changes."""

from __future__ import annotations

import pytest
import tool_chats

from fusedgrpo.engine.tools.rendering import ToolTurns
from fusedgrpo.errors import ConfigError

QUESTION = {"role": "user", "content": "What is 1 + 2?"}


def answer(content: str = "3", name: str = "add") -> dict[str, str]:
    return {"role": "tool", "name": name, "content": content}


def called(count: int = 1, content: str = "") -> dict:
    calls = [
        {"type": "function", "function": {"name": "add", "arguments": {"a": i}}}
        for i in range(count)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


@pytest.fixture
def chat():
    return tool_chats.chat(eos_token="<|im_end|>")


@pytest.fixture
def turns(chat):
    return ToolTurns(chat, [chat.tokenizer.eos_token_id])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_suffix_continues_the_template_s_own_conversation(chat, turns, count) -> None:
    answers = [answer(f"value {i}") for i in range(count)]
    before = chat.ids([QUESTION, called(count)], generation_prompt=False)
    end = len(before) - before[::-1].index(chat.tokenizer.eos_token_id)
    whole = chat.ids([QUESTION, called(count), *answers])
    assert [*before[:end], *turns.suffix(answers, chat.tokenizer.eos_token_id)] == whole


def test_a_turn_that_a_stop_text_ended_gets_its_end(chat, turns) -> None:
    eos = chat.tokenizer.eos_token_id
    after = turns.suffix([answer()], eos)
    for last in (None, 65, tool_chats.token(chat, "</tool_call>")):
        assert turns.suffix([answer()], last) == (eos, *after)


def test_an_end_that_the_template_does_not_write_is_not_taken_for_its_own(chat) -> None:
    other = tool_chats.token(chat, "<eos>")
    suffix = ToolTurns(chat, [other]).suffix([answer()], other)
    assert suffix[0] == tool_chats.token(chat, "<|im_end|>")


def test_answers_are_told_apart(turns) -> None:
    assert turns.suffix([answer("3")], None) != turns.suffix([answer("4")], None)
    assert turns.suffix([answer("3")], None) == turns.suffix([answer("3")], None)


def test_half_a_character_of_an_answer_is_replaced(turns) -> None:
    assert turns.suffix([answer("\ud800")], None) == turns.suffix([answer("?")], None)


def test_the_conversation_is_never_rendered(chat, turns, monkeypatch) -> None:
    """The cost of an answer is that of the answer, and is not paid twice."""
    rendered: list[int] = []
    ids = type(chat).ids

    def counted(self, messages, **options):
        rendered.append(len(messages))
        return ids(self, messages, **options)

    monkeypatch.setattr(type(chat), "ids", counted)
    for i in range(50):
        turns.suffix([answer(str(i % 10))], None)
    assert len(rendered) <= 10 + 4 and max(rendered) == 3


TEXT = """
{%- for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}
CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{{ '\\n' }}
{%- endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def test_a_template_without_special_tokens() -> None:
    chat = tool_chats.chat(TEXT)
    eos = chat.tokenizer.eos_token_id
    turns = ToolTurns(chat, [eos])
    suffix = turns.suffix([answer("3"), answer("4")], eos)
    assert chat.tokenizer.decode(list(suffix)) == "tool: 3\ntool: 4\nassistant: "
    for last in (None, suffix[0]):  # a character of the policy's own
        assert turns.suffix([answer("3"), answer("4")], last) == suffix


def test_the_end_of_an_answer_is_not_that_of_the_turn() -> None:
    ended = "{{ m.content }}{% if m.role == 'tool' %}<|end|>{% endif %}"
    chat = tool_chats.chat(TEXT.replace("{{ m.content }}", ended))
    suffix = ToolTurns(chat, [tool_chats.token(chat, "<|end|>")]).suffix([answer()], None)
    assert chat.tokenizer.decode(list(suffix)) == "tool: 3<|end|>\nassistant: "


def test_where_a_turn_ends_has_to_be_seen() -> None:
    """Without a token that ends it, and written in another way when it is not the last."""
    late = TEXT.replace("{{ m.role }}:", "{{ m.role }}{% if loop.last %} (last){% endif %}:")
    with pytest.raises(ConfigError, match="where a turn with calls ends"):
        ToolTurns(tool_chats.chat(late), [])


@pytest.mark.parametrize("name", ["", "a b", "<|im_end|>", "x" * 5000, "ä"])
def test_a_policy_may_have_called_anything(chat, turns, name) -> None:
    """A template may look at the names of tools, and write them."""
    refused = (
        "{% if not m.name or m.name | length > 100 or ' ' in m.name or '<' in m.name or "
        "'ä' in m.name %}{{ raise_exception('a name') }}{% endif %}"
    )
    source = tool_chats.CHATML.replace(
        "{%- if m.role == 'tool' %}", "{%- if m.role == 'tool' %}" + refused
    )
    strict = ToolTurns(tool_chats.chat(source, eos_token="<|im_end|>"), [])
    eos = chat.tokenizer.eos_token_id
    assert strict.suffix([answer(name=name)], eos) == turns.suffix([answer()], eos)


@pytest.mark.parametrize("kind", ["left out", "refused"])
def test_a_template_without_answers_is_refused(kind) -> None:
    guard = "" if kind == "left out" else "{{ raise_exception('no tools here') }}"
    source = tool_chats.CHATML.replace(
        "{%- for m in messages %}",
        "{%- for m in messages %}{% if m.role == 'tool' %}" + guard + "{% else %}",
        1,
    ).replace(
        "{% endif %}\n{%- endfor %}\n{%- if add",
        "{% endif %}{% endif %}\n{%- endfor %}\n{%- if add",
    )
    with pytest.raises(ConfigError, match="role `tool`") as error:
        ToolTurns(tool_chats.chat(source), [])
    assert ("no tools here" if guard else "leaves them out") in str(error.value)
