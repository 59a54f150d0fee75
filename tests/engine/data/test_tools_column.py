"""A prompt tells about the tools that its row may use, and about no other."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy as np
import pytest
import tool_chats

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data import encoded
from fusedgrpo.engine.data.chat import ChatTemplate
from fusedgrpo.engine.data.dataset import PromptDataset, load_prompts
from fusedgrpo.errors import DataError

ASK = [{"role": "user", "content": "Hi"}]
ROW: dict[str, Any] = {"prompt": ASK}


def schema(name: str, text: str = "Does it.") -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "integer", "description": "A."}}}
    function = {"name": name, "description": text, "parameters": parameters}
    return {"type": "function", "function": function}


class Toolbox:
    """The tools of a run: ``{environment: names}``."""

    def __init__(self, text: str = "Does it.", **environments: list[str]):
        self.named = environments or {"": ["add", "sub", "find"]}
        self.text = text
        self.environments = tuple(name or None for name in self.named)

    def schemas(self, environment: str | None = None) -> list[dict[str, Any]]:
        return [schema(name, self.text) for name in self.named[environment or ""]]


def load(
    rows: Any, tools: Any = None, template: str = tool_chats.CHATML, **options
) -> PromptDataset:
    return load_prompts(
        rows,
        GRPOConfig(**options),
        tool_chats.tokenizer(tool_chats.CHATML),
        vocab_size=None,
        context_length=None,
        tools=tools,
    )


def told(data: PromptDataset, index: int = 0) -> list[str]:
    """The names of the tools that a prompt tells about."""
    assert data.encoder is not None
    text = data.encoder.tokenizer.decode(data[index].prompt_ids)
    system = text.split("<|im_start|>user")[0].splitlines()[1:-1]
    return [json.loads(line)["function"]["name"] for line in system]


def test_a_prompt_tells_about_all_tools_of_the_run() -> None:
    data = load([ROW], Toolbox())
    assert told(data) == ["add", "sub", "find"]
    read = data[0].read
    assert read is not None and list(read.schemas) == Toolbox().schemas()
    assert read.environment is None
    assert told(load([ROW])) == []


@pytest.mark.parametrize(
    "given",
    [
        ["sub", "add"],
        ("sub", "add"),
        np.array(["sub", "add"]),
        [schema("sub", "Something else."), schema("add")],
        [schema("sub")["function"], "add"],
        '["sub", "add"]',
        json.dumps([schema("sub"), schema("add")]),
    ],
)
def test_a_row_names_its_tools(given: Any) -> None:
    data = load([{**ROW, "tools": given}, ROW], Toolbox())
    assert told(data) == ["sub", "add"] and told(data, 1) == ["add", "sub", "find"]
    read = data[0].read
    assert read is not None and read.schemas == (schema("sub"), schema("add")), "the run's own"


def test_schemas_of_a_data_set_of_the_hub() -> None:
    rows = datasets.Dataset.from_list(
        [{**ROW, "tools": [schema("find")]}, {**ROW, "tools": []}, {**ROW, "tools": None}]
    )
    data = load(rows, Toolbox())
    assert [told(data, i) for i in range(3)] == [["find"], [], ["add", "sub", "find"]]


@pytest.mark.parametrize("given", [None, "", " ", "null"])
def test_a_row_that_names_none_has_all(given: Any) -> None:
    assert told(load([{**ROW, "tools": given}], Toolbox())) == ["add", "sub", "find"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["ad"], r"row 1.*names 'ad', which is none .*: add, sub, find\. Did you mean 'add'\?"),
        ([schema("other")], "row 1.*names 'other'"),
        ("[broken", "row 1.*no JSON"),
        ("7", "row 1.*is int '7', expected a list"),
        ([3], "row 1.*has int '3', expected a name or a schema"),
        ([{}], "row 1.*expected a name or a schema"),
    ],
)
def test_names_of_no_tools_are_the_row_s_fault(given: Any, why: str) -> None:
    rows = [ROW, {**ROW, "tools": given}]
    with pytest.raises(DataError, match=f"(?s){why}"):
        load(rows, Toolbox())
    assert [bad["row"] for bad in load(rows, Toolbox(), on_bad_row="skip").skipped] == [1]


def test_a_run_without_tools_does_not_offer_any() -> None:
    with pytest.raises(DataError, match=r"row 0.*the run has no tools.*remove or rename"):
        load([{**ROW, "tools": ["add"]}], on_bad_row="skip")
    assert told(load([{**ROW, "tools": []}, {**ROW, "tools": None}])) == []


def test_environments_have_their_own_tools() -> None:
    tools = Toolbox(maze=["go", "look"], shop=["buy"])
    rows = [{**ROW, "environment": "shop"}, {**ROW, "environment": "maze", "tools": ["look"]}]
    data = load(rows, tools)
    assert told(data) == ["buy"] and told(data, 1) == ["look"]
    assert [example.read.environment for example in data.examples] == ["shop", "maze"]
    assert data[0].columns["environment"] == "shop", "rewards get it"


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({}, "'environment' is null, expected .*: maze, shop"),
        ({"environment": "shopp"}, "Did you mean 'shop'"),
        ({"environment": 3}, "'environment' is int"),
        ({"environment": "shop", "tools": ["go"]}, "its environment 'shop': buy"),
    ],
)
def test_a_row_has_an_environment_that_there_is(columns: dict, why: str) -> None:
    tools = Toolbox(maze=["go", "look"], shop=["buy"])
    with pytest.raises(DataError, match=why):
        load([{**ROW, **columns}], tools)


def test_environment_is_a_column_like_others_where_environments_have_no_names() -> None:
    data = load([{**ROW, "environment": 3}], Toolbox())
    assert told(data) == ["add", "sub", "find"] and data[0].columns["environment"] == 3


def test_what_tells_of_tools_counts_for_the_limit() -> None:
    assert len(load([ROW], max_prompt_length=100)) == 1
    with pytest.raises(DataError, match="with what tells of its tools, the limit is 100"):
        load([ROW], Toolbox(), max_prompt_length=100)


def test_text_as_it_is_has_no_place_for_tools() -> None:
    with pytest.raises(DataError, match=r"tools need prompts that are messages.*text_as_user_turn"):
        load([{"prompt": "Hi"}], Toolbox())
    assert told(load([{"prompt": "Hi"}], Toolbox(), text_as_user_turn=True)) == [
        "add",
        "sub",
        "find",
    ]


def test_kept_ids_are_those_of_the_same_tools(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(encoded, "LARGE", 4)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    made: list[int] = []
    ids = ChatTemplate.ids

    def counted(self, messages, **options):
        made.append(1)
        return ids(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "ids", counted)
    rows = [{"prompt": [{"role": "user", "content": f"{i}"}]} for i in range(4)]
    first = load(rows, Toolbox())
    assert len(made) == 4
    assert load(rows, Toolbox()).ids_fingerprint == first.ids_fingerprint and len(made) == 4
    for tools in (Toolbox("Does it differently."), None, Toolbox(**{"": ["add"]})):
        made.clear()
        assert load(rows, tools).ids_fingerprint != first.ids_fingerprint and len(made) == 4
    named = [{**row, "tools": ["sub"]} for row in rows]
    assert told(load(named, Toolbox())) == ["sub"]


def test_one_of_several_templates_is_for_tools() -> None:
    tokenizer = tool_chats.tokenizer(tool_chats.CHATML)
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}

    def text(tools: Any) -> str:
        data = load_prompts(
            [ROW], GRPOConfig(), tokenizer, vocab_size=None, context_length=None, tools=tools
        )
        return tokenizer.decode(data[0].prompt_ids)

    assert text(None) == "plain" and text(Toolbox()) == "tools"


def test_a_history_may_have_turns_of_calls_alone() -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    history = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "name": "add", "content": "3"},
    ]
    data = load([{"prompt": history}], Toolbox())
    assert data.encoder is not None
    text = data.encoder.tokenizer.decode(data[0].prompt_ids)
    assert '{"name": "add", "arguments": {"a": 1}}' in text and "<tool_response>3" in text
    with pytest.raises(DataError, match="is null, expected text"):
        load([{"prompt": [*ASK, {"role": "assistant", "content": None, "tool_calls": []}]}])
