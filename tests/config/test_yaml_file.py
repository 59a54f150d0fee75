from __future__ import annotations

from pathlib import Path

import pytest

from fusedgrpo.config.yaml_file import parse_override, read_config_file
from fusedgrpo.errors import ConfigError


def read(tmp_path: Path, text: str, name: str = "c.yaml") -> dict[object, object]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_config_file(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-5", 1e-5), ("5.0e-7", 5e-7), ("1E3", 1e3), ("-.5", -0.5), ("2.", 2.0), ("1_0.5", 10.5)],
)
def test_numbers_are_numbers(tmp_path: Path, text: str, number: float) -> None:
    value = read(tmp_path, f"a: {text}")["a"]
    assert value == number and isinstance(value, float)


@pytest.mark.parametrize("text", ["1e", "e5", "1.2.3", "1e-5x", ".", "2026-01-01", "v1e5"])
def test_what_only_looks_like_a_number_stays_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"a: {text}")["a"] == text


def test_integers_and_truth_values_are_those_of_yaml(tmp_path: Path) -> None:
    assert read(tmp_path, "a: 8\nb: yes\nc:\nd: [1, x]") == {
        "a": 8,
        "b": True,
        "c": None,
        "d": [1, "x"],
    }


def test_json_is_read(tmp_path: Path) -> None:
    text = '{\n\t"a": 1e-5,\n\t"b": {"c": [true, null, "x\\ty"]}\n}'
    assert read(tmp_path, text, "c.json") == {"a": 1e-5, "b": {"c": [True, None, "x\ty"]}}


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_duplicate_keys_are_refused_with_the_line(tmp_path: Path, name: str) -> None:
    text = '{"beta": 0.1,\n"beta": 0.2}' if name == "c.json" else "beta: 0.1\nbeta: 0.2\n"
    with pytest.raises(ConfigError, match=rf"{name}: line 2: key 'beta' is given twice"):
        read(tmp_path, text, name)


def test_duplicate_keys_inside_a_value_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 3: key 'x' is given twice"):
        read(tmp_path, "reward_kwargs:\n  x: 1\n  x: 2\n")


def test_python_tags_are_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "touched"
    with pytest.raises(ConfigError, match=r"line 1: .*no Python objects"):
        read(tmp_path, f"a: !!python/object/apply:os.mkdir [{victim}]")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2", r"c.yaml: line \d"),
        ("a: 1\n b: 2", r"c.yaml: line 2"),
        ("", "found nothing"),
        ("- a\n- b", "found list"),
        ("just text", "found str"),
        ("? [a, b]\n: 1\n", "unhashable"),
    ],
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        read_config_file(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config_file(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8"):
        read_config_file(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "takes_text", "value"),
    [
        ("1e-5", False, 1e-5),
        ("true", False, True),
        ("null", True, None),
        ("[q_proj, v_proj]", True, ["q_proj", "v_proj"]),
        ("007", True, "007"),
        ("true", True, "true"),
        ("a: b: c", False, "a: b: c"),
    ],
)
def test_overrides_are_read_as_yaml_unless_text_is_wanted(
    text: str, takes_text: bool, value: object
) -> None:
    assert parse_override(text, takes_text=takes_text) == value
