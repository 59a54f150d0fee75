from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data.dataset import PromptDataset, load_prompts
from fusedgrpo.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALPACA = [
    {"instruction": "计算 (3 + 5) × 2 = ?", "input": "", "output": "16"},
    {"instruction": "求解方程 2x + 3 = 11", "input": "", "output": "x = 4"},
]
GOOD = {"prompt": "2+2?", "answer": "4"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHATML)


def load(source: Any, tokenizer: Any, **options: Any) -> PromptDataset:
    return load_prompts(
        source,
        GRPOConfig(**options),
        tokenizer,
        vocab_size=256,
        context_length=None,
    )


def test_the_recipes_alpaca_file(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "my_math_data.json"
    path.write_text(json.dumps(ALPACA, ensure_ascii=False), encoding="utf-8")
    data = load("my_math_data", tokenizer, dataset_dir=str(tmp_path), template="qwen")
    first = data[0]
    assert first.prompt == "计算 (3 + 5) × 2 = ?"
    assert tokenizer.decode(first.prompt_ids) == (
        "<|im_start|>user\n计算 (3 + 5) × 2 = ?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first.columns == {**ALPACA[0], "solution": "16"}
    assert data.column_names == ["instruction", "input", "output", "solution"]
    assert not data.conversational
    assert (len(data), data.source, data.skipped) == (2, str(path), [])


def test_a_solution_column_of_the_source_is_kept(tokenizer: Any) -> None:
    data = load([{"instruction": "2+2?", "output": "long", "solution": "4"}], tokenizer)
    assert data[0].columns["solution"] == "4"


def test_columns_are_complete_and_without_what_rewards_get_anyway(tokenizer: Any) -> None:
    rows = [{**GOOD, "completion": "x", "completion_ids": [1]}, {"prompt": "3+3?", "level": 2}]
    data = load(rows, tokenizer)
    assert [e.columns for e in data.examples] == [
        {"answer": "4", "level": None},
        {"answer": None, "level": 2},
    ]


@pytest.mark.parametrize("name", ["completions", "trainer_state"])
def test_columns_that_clash_with_reward_arguments_are_refused(tokenizer: Any, name: str) -> None:
    with pytest.raises(DataError, match=f"{name!r}; rename the column"):
        load([{**GOOD, name: 1}], tokenizer)


def test_messages_make_a_conversational_data_set(tokenizer: Any) -> None:
    prompt = [{"role": "user", "content": "2+2?"}]
    data = load(datasets.Dataset.from_list([{"prompt": prompt, "answer": "4"}]), tokenizer)
    assert data.conversational
    assert data[0].prompt == prompt
    assert data.column_names == ["answer"]


def test_several_sources_are_read_one_after_the_other(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    data = load("a, b", tokenizer, dataset_dir=str(tmp_path), max_samples=1)
    assert [(e.row, e.columns["answer"]) for e in data.examples] == [(0, None), (1, "4")]


BAD_LINES = '{"prompt": "2+2?"}\n{"prompt": null}\n{"prompt": \n{"prompt": ""}\n{"prompt": 7}\n'


def test_bad_rows_stop_the_run_by_default_and_are_located(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD_LINES)
    with pytest.raises(DataError) as caught:
        load(path, tokenizer)
    text = str(caught.value)
    assert "4 of 5 rows cannot be used" in text and "on_bad_row: skip" in text
    for line, reason in ((2, "is null"), (3, "not valid JSON"), (4, "is empty"), (5, "is int")):
        assert f"bad.jsonl:{line}: " in text and reason in text


def test_skipped_rows_are_counted_and_listed(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD_LINES)
    with caplog.at_level(logging.WARNING, logger="fusedgrpo"):
        data = load(path, tokenizer, on_bad_row="skip")
    assert [e.row for e in data.examples] == [0]
    assert "skipped 4 of 5 rows" in caplog.text
    assert [bad["row"] for bad in data.skipped] == [1, 2, 3, 4]
    first = data.skipped[0]
    assert first == {"row": 1, "where": f"{path}:2", "reason": first["reason"]}


def test_prompts_over_the_limit_are_bad_rows(tokenizer: Any) -> None:
    rows = [GOOD, {"prompt": "x" * 20, "answer": ""}]
    data = load(rows, tokenizer, max_prompt_length=10, on_bad_row="skip")
    assert len(data) == 1
    assert "20 tokens, the limit is 10 (max_prompt_length)" in data.skipped[0]["reason"]


def test_text_and_messages_cannot_be_mixed(tokenizer: Any) -> None:
    rows = [GOOD, {"prompt": [{"role": "user", "content": "2+2?"}]}]
    with pytest.raises(DataError, match="row 1: it mixes text prompts and messages"):
        load(rows, tokenizer)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "list: no rows"),
        ([{"prompt": ""}], "1 rows, none of them a usable prompt"),
        ([{"promt": "x", "answer": 1}], "no column 'prompt' .*Did you mean 'promt'"),
        ([3], "1 rows, none of them a usable prompt"),
    ],
)
def test_nothing_to_train_on_is_refused(rows: list[Any], said: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=said):
        load(rows, tokenizer, on_bad_row="skip")


def test_a_mapped_column_that_is_not_there_is_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps([GOOD]))
    entry = {"file_name": "a.json", "columns": {"prompt": "question"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"qa": entry}))
    with pytest.raises(DataError, match="no column 'question'; the columns are 'prompt', 'answer'"):
        load("qa", tokenizer, dataset_dir=str(tmp_path))


def test_a_foreign_tokenizer_is_refused_with_the_row(tokenizer: Any) -> None:
    config = GRPOConfig(on_bad_row="skip")
    with pytest.raises(DataError, match=r"row 0: .*do not belong together"):
        load_prompts([GOOD], config, tokenizer, vocab_size=3, context_length=None)


def test_a_token_that_the_model_has_not_is_the_fault_of_the_rows_that_have_it(
    tokenizer: Any,
) -> None:
    (last,) = tokenizer("z")["input_ids"]
    rows, limit = [{"prompt": "a"}, {"prompt": "az"}], {"vocab_size": last, "context_length": None}
    config = GRPOConfig(on_bad_row="skip")
    assert len(load_prompts(rows, config, tokenizer, **limit)) == 1
    with pytest.raises(DataError, match="row 1: the tokenizer gives token id"):
        load_prompts(rows, GRPOConfig(), tokenizer, **limit)


def test_the_fingerprint_is_that_of_the_training_data(tokenizer: Any) -> None:
    base = load([GOOD], tokenizer).fingerprint
    assert len(base) == 64
    assert load(datasets.Dataset.from_list([GOOD]), tokenizer).fingerprint == base
    assert load([{**GOOD, "answer": "5"}], tokenizer).fingerprint != base
    assert load([{**GOOD, "prompt": "2+3?"}], tokenizer).fingerprint != base


@pytest.mark.parametrize(("val_size", "count"), [(0.25, 3), (4, 4), (0.01, 1)])
def test_the_held_out_part_is_disjoint_and_repeats(
    tokenizer: Any, val_size: float, count: int
) -> None:
    data = load([{"prompt": f"{i}+1?"} for i in range(12)], tokenizer)
    train, held_out = data.split(val_size, seed=1)
    rows = [e.row for e in train.examples], [e.row for e in held_out.examples]
    assert len(rows[1]) == count
    assert sorted(rows[0] + rows[1]) == list(range(12))
    assert [e.row for e in data.split(val_size, seed=1)[1].examples] == rows[1]
    assert train.fingerprint != data.fingerprint


def test_holding_out_everything_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="val_size 1 leaves none of 1 prompts"):
        load([GOOD], tokenizer).split(1, seed=0)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "half \ud83d of it"}, "half a character"),
        ({"prompt": None}, "'prompt' is null"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": []}, "an empty list of messages"),
        ({"prompt": 10**5000}, "'prompt' is int 'an integer of 16610 bits'"),
        ({"prompt": [{"content": "no role"}]}, "is not a message with a role"),
        ({"prompt": [{"role": ["a"], "content": "x"}]}, "is not a message with a role"),
        ({"prompt": [{"role": "user", "content": None}]}, "the content of .* is null"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "expected text|'image'"),
        ({"prompt": "x", "deep": nested(5000)}, "nested more than 100 levels deep"),
        ({"prompt": "x", 3: "y"}, "has a column named int '3'"),
        ({"prompt": "x", "image": "cat.png"}, "its column 'image' holds what image belongs"),
        ({"prompt": "x", "images": [PIL.Image.new("RGB", (2, 2))]}, "'images' holds a picture"),
        ({"prompt": "x", "scan": {"page": PIL.Image.new("L", (2, 2))}}, "'scan' holds a picture"),
        ({"prompt": "x", "f": [None, {"bytes": b"..", "path": None}]}, "'f' holds a stored pict"),
        ({"prompt": "x", "s": {"array": [0.1], "sampling_rate": 8}}, "'s' holds a sound"),
    ],
)
def test_every_bad_row_is_named_and_can_be_skipped(row: Any, told: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=rf"(?s)1 of 2 rows cannot be used:\n  row 1: .*(?:{told})"):
        load([{"prompt": [{"role": "user", "content": "x"}]} if isinstance(row.get("prompt"), list)
              and row["prompt"] else GOOD, row], tokenizer)  # fmt: skip
    assert len(load([GOOD, row], tokenizer, on_bad_row="skip").skipped) == 1


def test_empty_columns_of_pictures_are_no_pictures(tokenizer: Any) -> None:
    row = {**GOOD, "image": None, "images": [], "image_url": "https://example.org/a.png"}
    assert len(load([row], tokenizer)) == 1


def test_pictures_of_a_dataset_are_refused_without_decoding_them(tokenizer: Any) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "photo": datasets.Image()})
    rows = [{"prompt": "x", "photo": {"bytes": b"no picture", "path": None}}] * 3
    data = datasets.Dataset.from_list(rows, features=features)
    with pytest.raises(DataError, match=r"3 of 3 .*\n  dataset row 0 and 2 more: .*'photo' holds"):
        load(data, tokenizer)


def test_odd_values_in_a_column_are_taken(tokenizer: Any) -> None:
    grid = {1: "x", "b": {(0, 1): "wall"}, None: {1, "a"}}
    data = load([{**GOOD, "grid": grid}], tokenizer)
    assert data[0].columns["grid"] == grid
    assert data.fingerprint == load([{**GOOD, "grid": dict(grid)}], tokenizer).fingerprint
    assert data.fingerprint != load([{**GOOD, "grid": {**grid, 1: "y"}}], tokenizer).fingerprint


def test_tables_are_data_sets_too(tokenizer: Any) -> None:
    import pandas as pd
    import pyarrow as pa

    rows = [GOOD, {"prompt": "3+3?", "answer": "6"}]
    expected = load(rows, tokenizer)
    for table in (pd.DataFrame(rows), pa.Table.from_pylist(rows)):
        assert load(table, tokenizer).fingerprint == expected.fingerprint
    messages = pd.DataFrame({"prompt": [np.array([{"role": "user", "content": "x"}])]})
    assert load(messages, tokenizer).conversational
