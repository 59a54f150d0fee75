"""Whatever is given as a configuration is read or refused in one short line per problem."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import HfArgumentParser

from fusedgrpo.config.aliases import ALIASES
from fusedgrpo.config.foreign import REFUSED
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError


class Hostile:
    """Raises whatever is asked of it."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


def bomb(levels: int = 9) -> Any:
    """A few lists that hold each other ten times over: 10 ** levels values."""
    value: Any = ["x"] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


def endless() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["itself"] = value
    return value


def deep(levels: int = 5000) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"x": value}
    return value


NASTY = {
    "null": None,
    "true": True,
    "empty text": "",
    "blank": "  ",
    "NUL": "a\0b",
    "half a pair": "a\ud800",
    "escapes": "\x1b[31m\n2026-01-01 forged",
    "long": "x" * 20_000,
    "many digits": "9" * 5000,
    "nan text": "nan",
    "infinite text": "1e999",
    "nan": math.nan,
    "infinity": math.inf,
    "negative": -1,
    "bigint": 2**200,
    "hugeint": 10**5000,
    "negative huge": -(10**5000),
    "huge float": 1e308,
    "fraction": Fraction(10**400, 3),
    "complex": 1j,
    "bytes": b"a",
    "set": {1, 2},
    "date": datetime.date(2026, 1, 1),
    "array": np.zeros(3),
    "no array": np.zeros(0),
    "tensor": torch.zeros(2),
    "nested list": [[["a"]]],
    "list of null": [None],
    "list of NUL": ["a\0"],
    "dict": {"a": {"b": [1]}},
    "odd keys": {1: 2, None: 3, (1, 2): 4},
    "inner odd keys": {"f": {1: 2, None: 3, (1, 2): 4}},
    "NUL inside": {"f": {"x": ["\0"]}},
    "bomb": bomb(),
    "bomb inside": {"f": bomb()},
    "endless": endless(),
    "deep": deep(),
    "hostile": Hostile(),
    "hostile inside": {"f": {"x": [Hostile()]}},
    "a path of bytes": Path("x"),
    "class": Hostile,
    "slice": slice(1),
}


@pytest.mark.parametrize("kind", NASTY)
def test_no_value_of_any_option_is_a_traceback(kind: str) -> None:
    for name in [*GRPOConfig().to_dict(), *ALIASES, *REFUSED, "unknown"]:
        try:
            config = GRPOConfig(**{name: NASTY[kind]})
        except ConfigError as error:
            assert all(len(problem) < 1000 for problem in error.problems), name
            continue
        if kind not in ("hostile inside", "class"):
            assert len(yaml.safe_dump(config.to_dict())) < 10**6
            assert len(json.dumps(config.to_dict())) < 10**6


@pytest.mark.parametrize("kind", NASTY)
def test_no_key_is_a_traceback(kind: str) -> None:
    key = NASTY[kind]
    try:
        hash(key)
    except (TypeError, RuntimeError):
        return
    for options in ({key: 1}, {"self": 1}, {"given": 1}):
        with pytest.raises(ConfigError) as caught:
            GRPOConfig.from_dict(options)
        assert all(len(problem) < 1000 for problem in caught.value.problems)


LAUGHS = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 50)}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

TEXTS = {
    "huge integer": "seed: " + "9" * 400,
    "too many digits": "seed: " + "9" * 5000,
    "an empty int": "seed: !!int ''",
    "a float of letters": "beta: !!float abc",
    "base 60": "seed: !!int '1:x'",
    "a bool of letters": "fp16: !!bool maybe",
    "a date": "run_name: !!timestamp foo",
    "a date that is one": "run_name: !!timestamp 2026-01-01",
    "binary": "run_name: !!binary aGk=",
    "broken binary": "run_name: !!binary '*'",
    "set": "chat_template_kwargs: {x: !!set {a, b}}",
    "pairs": "chat_template_kwargs: {x: !!pairs [a: b]}",
    "omap": "chat_template_kwargs: {x: !!omap 5}",
    "python": "run_name: !!python/object/apply:os.getcwd []",
    "a long tag": f"run_name: !!{'x' * 10_000} 1",
    "nested lists": "chat_template_kwargs: " + "[" * 2000 + "]" * 2000,
    "nested mappings": "chat_template_kwargs: " + "{a: " * 2000 + "}" * 2000,
    "moderately nested": "chat_template_kwargs: {a: " + "[" * 80 + "]" * 80 + "}",
    "recursive": "chat_template_kwargs: &a\n  x: *a\n",
    "recursive list": "lora_target_modules: &a [*a]",
    "recursive key": "? &a [*a]\n: 1",
    "aliases of aliases": LAUGHS + "chat_template_kwargs: {x: *i}",
    "aliases of aliases as text": LAUGHS + "run_name: *i",
    "merges of merges": MERGED,
    "a merge of text": "<<: text",
    "a merge of a number": "<<: [1]",
    "an unknown alias": "a: *b",
    "NaN as a key": ".nan: 1\n.nan: 2",
    "tabs": "a:\n\t- 1",
    "control characters": "run_name: \x07",
    "half a pair": 'run_name: "\\ud800"',
    "NUL": 'run_name: "a\\0"',
    "duplicates": "beta: 1\nbeta: 2",
    "two documents": "beta: 1\n---\nbeta: 2",
    "a directive": "%YAML 9.9\n---\nbeta: 1",
    "no mapping": "- beta",
    "empty": "",
    "comments": "# beta: 1",
    "value": "=: 1",
    "an infinite number": "beta: .inf",
    "no number": "beta: .nan",
    "an empty path": 'output_dir: ""',
    "endless generations": "num_generations: 1000000000",
    "a rollout nobody can hold": "prompts_per_step: 1000000000000",
}


def check_file(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        GRPOConfig.from_file(path).to_dict()
    assert all(len(problem) < 6000 for problem in caught.value.problems)


@pytest.mark.parametrize("kind", TEXTS)
def test_no_yaml_file_is_a_traceback(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TEXTS[kind] + "\n", encoding="utf-8", newline="")
    check_file(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfeb\x00e\x00t\x00a\x00",
        b"\x00\x00\xfe\xff",
        b"\x00" * 100,
        b"beta: \xe9",
        b"\xef\xbb\xbf",
        b'{"beta": NaN}',
        b'{"beta": Infinity}',
        b'{"beta": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"chat_template_kwargs": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001,
        b'{"beta": 1',
        b'{"run_name": "\\ud800"}',
        b'["beta"]',
        b"null",
    ],
)
@pytest.mark.parametrize("name", ["c.yaml", "c.json", "c"])
def test_no_bytes_are_a_traceback(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    check_file(tmp_path / name)


def test_what_is_no_file_is_no_traceback(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    odd = [tmp_path, tmp_path / "pipe.yaml", tmp_path / "loop.yaml", tmp_path / ("x" * 5000)]
    for path in [*odd, Path("a\0b"), Path("/dev/zero"), tmp_path / "\udcff"]:
        check_file(path)


def test_a_json_file_may_hold_any_character(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"system_prompt": "Think \N{THINKING FACE}."}))
    assert GRPOConfig.from_file(tmp_path / "c.json").system_prompt == "Think \N{THINKING FACE}."


def test_anchors_and_merges_of_ordinary_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "reward_kwargs:\n  a: &a {x: 1, y: 2}\n  b: {<<: *a, y: 3}\n  c: *a\n"
    )
    assert GRPOConfig.from_file(tmp_path / "c.yaml").reward_kwargs == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 2},
    }


def test_a_wrong_seed_is_blamed_on_the_seed() -> None:
    with pytest.raises(ConfigError, match="seed: expected an integer of at most 64 bits"):
        GRPOConfig(seed=2**200)


def test_a_rollout_is_bounded_however_it_is_asked_for() -> None:
    for options in (
        {"prompts_per_step": 10**6},
        {"generation_batch_size": 10**7},
        {"steps_per_generation": 10**7},
        {"gradient_accumulation_steps": 10**7},
        {"per_device_train_batch_size": 10**7},
    ):
        with pytest.raises(ConfigError, match="completions can never be kept"):
            GRPOConfig(**options)


def test_transformers_makes_a_command_line_of_it() -> None:
    words = ["--output_dir", "x", "--learning_rate", "1e-5", "--bf16", "true", "--seed", "3"]
    (config,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(words)
    assert config == GRPOConfig(output_dir="x", learning_rate=1e-5, bf16=True, seed=3)


def test_fields_carry_nothing_that_argparse_does_not_know() -> None:
    for spec in dataclasses.fields(GRPOConfig()):
        assert set(spec.metadata) == {"help"}
        assert spec.metadata["help"] % {} == spec.metadata["help"]
