"""A function of the user's as the format of the data: ``dataset_format``, or ``formatting``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import tiny

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.config.rules import EXTENSIBLE
from fusedgrpo.engine.data.dataset import PromptDataset, load_prompts
from fusedgrpo.engine.data.formats import LAYOUTS
from fusedgrpo.engine.data.formats.chosen import Formats
from fusedgrpo.errors import CheckpointError, ConfigError, DataError

CODE = """
def asked(row):
    if row["q"] == "none":
        return None
    if row["q"] == "bad":
        raise ValueError("no question\\nin it")
    return {"prompt": row["q"], "solution": row["a"]}

def chat(row):
    return {"prompt": [{"role": "user", "content": row["q"]}]}
"""
ROWS = [{"q": "w4 w5", "a": 1}, {"q": "none", "a": 2}, {"q": "w6", "a": 3, "more": 4}]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "asking.py"
    path.write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return "asking.py"


def load(source: Any, formats: Formats | None = None, **options: Any) -> PromptDataset:
    return load_prompts(
        source,
        GRPOConfig(**options),
        tiny.tokenizer(template=True),
        vocab_size=None,
        context_length=None,
        formats=formats,
    )


def made_by(function: Callable[[Any], Any], tmp_path: Path) -> Any:
    """Formats whose function is ``function``, under the name ``mine.py:f``."""
    (tmp_path / "mine.py").write_text("def f(row): ...\n")
    formats = Formats("mine.py:f", [tmp_path])
    object.__setattr__(formats.given, "function", function)
    return formats


def register(directory: Path, **entries: Any) -> None:
    (directory / "qa.json").write_text(json.dumps(ROWS[:1]))
    both = {name: {"file_name": "qa.json", **entry} for name, entry in entries.items()}
    (directory / "dataset_info.json").write_text(json.dumps(both))


def test_the_option_and_the_registry_have_the_same_names() -> None:
    assert EXTENSIBLE["dataset_format"] == ("auto", *LAYOUTS)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("prompt", {"prompt": "w4"}),
        ("alpaca", {"instruction": "w4", "output": "w5"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "w4"}]}),
        ("openai", {"messages": [{"role": "user", "content": "w4"}]}),
    ],
)
def test_a_format_by_its_name_reads_what_is_guessed_from_its_columns(
    name: str, row: dict[str, Any]
) -> None:
    guessed, named = load([row]), load([row], dataset_format=name)
    assert named[0] == guessed[0]
    other = {"everything": "x"} | {layout.required: None for layout in LAYOUTS.values()} | row
    assert load([other], dataset_format=name)[0].prompt == guessed[0].prompt


def test_a_named_format_whose_column_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="no column 'instruction'; the columns are 'prompt'"):
        load([{"prompt": "w4"}], dataset_format="alpaca")


def test_rows_are_what_the_function_makes_of_them(file: str) -> None:
    for source in (ROWS, datasets.Dataset.from_list(ROWS)):
        data = load(source, dataset_format=f"{file}:asked")
        assert [(e.row, e.prompt, e.columns) for e in data.examples] == [
            (0, "w4 w5", {"solution": 1}),
            (2, "w6", {"solution": 3}),
        ]
        assert not data.conversational and data.column_names == ["solution"]
    assert load(ROWS, dataset_format=f"{file}:chat").conversational


def test_rows_that_are_left_out_are_counted_and_are_no_bad_rows(
    file: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fusedgrpo"):
        data = load(ROWS, dataset_format=f"{file}:asked")
    why = f"'{file}:asked' leaves it out"
    assert data.skipped == [{"row": 1, "where": "row 1", "reason": why}]
    assert f"skipped 1 of 3 rows:\n  row 1: {why}" in caplog.text
    with pytest.raises(DataError, match=r"(?s)2 rows, none of them a usable prompt.*leaves it out"):
        load(ROWS[1:2] * 2, dataset_format=f"{file}:asked")


def test_a_value_error_is_a_bad_row(file: str) -> None:
    rows = [*ROWS, {"q": "bad"}]
    why = f"'{file}:asked' raised ValueError: no question in it"
    with pytest.raises(DataError, match=f"1 of 4 rows cannot be used:\n  row 3: {why}\nCorrect"):
        load(rows, dataset_format=f"{file}:asked")
    data = load(rows, dataset_format=f"{file}:asked", on_bad_row="skip")
    assert [one["row"] for one in data.skipped] == [1, 3] and data.skipped[1]["reason"] == why


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_any_other_error_names_function_row_and_error(file: str, on_bad_row: str) -> None:
    with pytest.raises(DataError, match=rf"^row 1: '{file}:asked' failed with KeyError: 'q'$"):
        load([ROWS[0], {"a": 1}], dataset_format=f"{file}:asked", on_bad_row=on_bad_row)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("w4", "returned is str 'w4', expected an object"),
        ([{"prompt": "w4"}], "returned is list"),
        ({"solution": 1}, "returned has no 'prompt', but 'solution'"),
        ({}, "returned has no 'prompt', but nothing"),
        ({"prompt": None}, "'prompt' is null"),
        ({"prompt": []}, "an empty list of messages"),
        ({"prompt": "w4", 3: 1}, "returned has a column named int '3'"),
        ({"prompt": "w4", "image": "x.png"}, "its column 'image' holds"),
    ],
)
def test_results_are_checked_like_rows_of_files(tmp_path: Path, result: Any, said: str) -> None:
    formats = made_by(lambda row: {"prompt": "w5"} if row["good"] else result, tmp_path)
    rows = [{"good": True}, {"good": False}]
    with pytest.raises(DataError, match=f"1 of 2 rows cannot be used:\n  row 1: .*{said}"):
        load(rows, formats)
    assert len(load(rows, formats, on_bad_row="skip")) == 1


def test_columns_that_clash_with_reward_arguments_are_refused_in_results_alone(
    tmp_path: Path,
) -> None:
    assert len(load([{"completions": 1}], made_by(lambda row: {"prompt": "w4"}, tmp_path))) == 1
    with pytest.raises(DataError, match="'completions'; rename the column"):
        load([{}], made_by(lambda row: {"prompt": "w4", "completions": 1}, tmp_path))


def test_the_function_gets_a_dict_of_its_own_for_each_row_that_is_used(tmp_path: Path) -> None:
    got = []

    def taken(row: dict[str, Any]) -> dict[str, Any]:
        got.append(dict(row))
        return {"prompt": row.pop("q")}

    rows = [{"q": f"w{n}"} for n in (4, 5, 6)]
    data = load([*rows, 7], made_by(taken, tmp_path), max_samples=2)
    assert got == rows[:2] == [{"q": "w4"}, {"q": "w5"}] and len(data) == 2
    data = load([7, *rows], made_by(taken, tmp_path), on_bad_row="skip")
    assert len(got) == 5 and "is int '7'" in data.skipped[0]["reason"]  # never saw that one


def test_a_picture_that_the_function_leaves_behind_is_no_reason(tmp_path: Path) -> None:
    rows = [{"q": "w4", "photo": PIL.Image.new("RGB", (2, 2))}]
    assert len(load(rows, made_by(lambda row: {"prompt": row["q"]}, tmp_path))) == 1


def test_the_fingerprint_is_that_of_what_the_function_returns(tmp_path: Path) -> None:
    def fingerprint(source: Any, result: Any) -> str:
        return load(source, made_by(lambda row: result, tmp_path)).fingerprint

    plain = {"prompt": "w4", "a": 1}
    assert fingerprint([{"q": 1}], plain) == fingerprint([{}], plain) == load([plain]).fingerprint
    assert fingerprint([{}], {"prompt": "w4", "a": 2}) != load([plain]).fingerprint
    assert fingerprint([{}], {"prompt": "w5", "a": 1}) != load([plain]).fingerprint


def test_a_registered_format_is_found_beside_dataset_info(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(tmp_path, mine={"formatting": f"{file}:asked"}, other={})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load("mine", dataset_dir=str(tmp_path))[0].prompt == "w4 w5"
    with pytest.raises(ConfigError, match=r"dataset_format 'asking\.py:asked': no such file"):
        load("other", dataset_dir=str(tmp_path), dataset_format=f"{file}:asked")
    formats = Formats(f"{file}:asked", [tmp_path])
    # The same function by two names, and the one of the option where the entry says nothing.
    assert len(load("mine, other", formats, dataset_dir=str(tmp_path))) == 2


def test_an_entry_and_an_option_that_differ_are_both_named(tmp_path: Path, file: str) -> None:
    register(tmp_path, mine={"formatting": "alpaca"}, same={"formatting": f"./{file}:asked"})
    said = r"json: mine: formatting is 'alpaca', but dataset_format is 'asking\.py:asked'\. Remove"
    with pytest.raises(DataError, match=said):
        load("mine", dataset_dir=str(tmp_path), dataset_format=f"{file}:asked")
    assert len(load("same", dataset_dir=str(tmp_path), dataset_format=f"{file}:asked")) == 1
    with pytest.raises(DataError, match=r"asking\.py:chat"):
        load("same", dataset_dir=str(tmp_path), dataset_format=f"{file}:chat")


def test_an_entrys_columns_are_those_of_the_options_format(tmp_path: Path, file: str) -> None:
    register(tmp_path, mine={"columns": {"prompt": "q"}})
    options = {"dataset_dir": str(tmp_path)}
    assert load("mine", **options)[0].read.messages is not None  # type: ignore[union-attr]
    assert load("mine", dataset_format="prompt", **options)[0].read.messages is None  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"json: mine: 'asking\.py:asked' is given the rows as"):
        load("mine", dataset_format=f"{file}:asked", **options)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("asking.py:nobody", "has no 'nobody'"),
        ("absent.py:asked", "no such file"),
        ("a\0b.py:asked", "no such file|NUL character"),
        (f"{'a' * 5000}.py:asked", "no such file"),
        ("~nobody/a.py:asked", "no such file"),
        ("no_module_of_this_name:asked", "No module named"),
        ("broken.py:asked", "failed with ZeroDivisionError"),
        (":asked", "is ':asked', expected|none of"),
        ("alpacca", "Did you mean 'alpaca'"),
    ],
)
def test_what_cannot_be_found_is_refused_with_the_option_or_the_entry(
    tmp_path: Path, file: str, name: str, said: str
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=f"(?s)dataset_format.*({said})"):
        load(ROWS, dataset_format=name)
    register(tmp_path, mine={"formatting": name})
    with pytest.raises(DataError, match=f"(?s)json: mine: formatting.*({said})"):
        load("mine", dataset_dir=str(tmp_path))


def trainer(tmp_path: Path, folder: Path, **changes: Any) -> GRPOTrainer:
    options: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "num_generations": 2,
        "prompts_per_step": 1,
        "max_completion_length": 4,
        "max_steps": 2,
        "save_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "dataset_format": "asking.py:asked",
    }
    return GRPOTrainer(
        model=tiny.model(),
        reward_funcs=lambda completions, solution, **_: [float(s or 0) for s in solution],
        args=GRPOConfig(**options | changes),
        train_dataset=ROWS,
        tokenizer=tiny.tokenizer(template=True),
        search_paths=[folder],
    )


def test_a_run_with_a_function_and_its_resume(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "asking.py").write_text(CODE)
    run = trainer(tmp_path, folder)
    run.train()
    assert "leaves it out" in (tmp_path / "run" / "skipped_rows.jsonl").read_text()
    assert run.evaluate([{"q": "w4", "a": 1}])["eval_reward"] == 1
    saved = str(tmp_path / "run" / "checkpoints" / "step-000001")
    trainer(tmp_path, folder).train(resume_from_checkpoint=saved)
    (folder / "asking.py").write_text(CODE.replace('row["a"]}', 'row["a"] + 1}'))
    with pytest.raises(CheckpointError, match="the training prompts are not the same"):
        trainer(tmp_path, folder).train(resume_from_checkpoint=saved)


def test_a_function_that_is_not_there_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset_format 'asking\.py:asked': no such file"):
        GRPOTrainer(
            model=str(tmp_path / "no model"),
            reward_funcs="format",
            args=GRPOConfig(
                output_dir=str(tmp_path / "run"), dataset_format="asking.py:asked", use_cpu=True
            ),
            train_dataset=ROWS,
        )
