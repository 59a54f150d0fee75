"""resolve: from a name in reward_funcs to a function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fusedgrpo.engine.rewards.builtin import FACTORIES, FUNCTIONS
from fusedgrpo.engine.rewards.call import Batch
from fusedgrpo.engine.rewards.spec import Source, load, locate
from fusedgrpo.errors import RewardError

REWARDS = """
def even(completion_ids, scale=1.0, **kwargs):
    return [scale * (len(ids) % 2 == 0) for ids in completion_ids]

class Constant:
    def __init__(self, value):
        self.value = value
    def __call__(self, completions, **kwargs):
        return [self.value] * len(completions)

LIMIT = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "resolve_me.py").write_text(REWARDS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    return tmp_path


def values(name: str, folder: Path, **kwargs: Any) -> list[float]:
    batch = Batch(["p"] * 2, ["a", "b"], [[1], [1, 2]], {}, None, [0, 0])
    return load(locate(name, [folder]), kwargs)(batch).values


def test_every_built_in_name_is_found() -> None:
    for name in [*FUNCTIONS, *FACTORIES]:
        assert locate(name, []) == Source("builtin", name, name)


def test_a_function_in_a_file(folder: Path) -> None:
    assert values("sub/resolve_me.py:even", folder) == [0.0, 1.0]
    assert values(f"{folder}/sub/resolve_me.py:even", Path("/"), scale=3) == [0.0, 3.0]


def test_a_file_can_import_its_neighbours(folder: Path) -> None:
    (folder / "sub" / "neighbour.py").write_text(
        "from resolve_me import even\ndef odd(**k): return [1 - v for v in even(**k)]"
    )
    assert values("sub/neighbour.py:odd", folder) == [1.0, 0.0]


@pytest.mark.parametrize("name", ["resolve_me:even", "resolve_me.even"])
def test_a_function_in_a_module(name: str, folder: Path) -> None:
    sys.path.insert(0, str(folder / "sub"))
    assert values(name, folder) == [0.0, 1.0]


def test_a_class_is_made_with_its_arguments(folder: Path) -> None:
    assert values("sub/resolve_me.py:Constant", folder, value=2) == [2.0, 2.0]
    with pytest.raises(RewardError, match=r"missing a required argument: 'value'.*reward_kwargs"):
        values("sub/resolve_me.py:Constant", folder)


def test_a_factory_without_its_arguments_says_which() -> None:
    with pytest.raises(
        RewardError, match=r"'cosine_scaled': missing a required argument: 'max_len'.*reward_kwargs"
    ):
        load(locate("cosine_scaled", []), {})
    with pytest.raises(
        RewardError,
        match=r"unexpected keyword argument 'max_length'.*It takes \(max_len, min_value_wrong=-1.0",
    ):
        load(locate("cosine_scaled", []), {"max_len": 3, "max_length": 3})


def test_models_are_directories_and_hub_ids(folder: Path) -> None:
    assert locate("sub", [folder]) == Source("model", "sub", str(folder / "sub"))
    assert locate("org/reward-1.5B", [folder]).kind == "model"


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(
        RewardError, match=r"'acuracy'. Did you mean 'accuracy'.*Built in: accuracy"
    ):
        locate("acuracy", [])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sub/none.py:even", r"no such file \(looked for .*sub/none.py\)"),
        ("sub/resolve_me.py", r"name a function of 'sub/resolve_me.py'"),
        ("sub/resolve_me.py:evn", "has no 'evn'. Did you mean 'even'"),
        ("sub/resolve_me.py:LIMIT", "holds no function in 'LIMIT'"),
        ("no_such_module:f", "No module named 'no_such_module' .cwd "),
        ("no_such_module.f", "No module named 'no_such_module'"),
        ("sub/syntax.py:f", "importing .*syntax.py failed with SyntaxError"),
        ("sub/raises.py:f", "importing .*raises.py failed with RuntimeError: no key"),
        ("sub/needs.py:f", "No module named 'not_installed'"),
    ],
)
def test_what_cannot_be_loaded_is_explained(name: str, told: str, folder: Path) -> None:
    (folder / "sub" / "syntax.py").write_text("def f(:")
    (folder / "sub" / "raises.py").write_text("raise RuntimeError('no key')")
    (folder / "sub" / "needs.py").write_text("import not_installed")
    with pytest.raises(RewardError, match=told) as caught:
        load(locate(name, [folder]), {})
    assert name in str(caught.value)
