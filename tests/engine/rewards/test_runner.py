"""RewardFunctions: one matrix from functions of all kinds."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patience import HUNG

from fusedgrpo.engine.rewards import RewardBatch, RewardFunctions, build_rewards
from fusedgrpo.engine.rollout.metrics import reward_metrics
from fusedgrpo.errors import RewardError

REWARDS = """
import pathlib, time

def length(completions, scale=1, **kwargs):
    return [scale * len(c) for c in completions]

def number(completions, **kwargs):
    return [int(c) for c in completions]

def napping(completions, log_extra, log_metric, **kwargs):
    log_extra("nap", [0.4] * len(completions))
    log_metric("naps", 1)
    pathlib.Path("napping").touch()
    while not pathlib.Path("slow").exists():
        time.sleep(0.01)
    return [None] * len(completions)

def emptying(completions, tests, **kwargs):
    found = [len(cases) for cases in tests]
    for cases in tests:
        cases.clear()
    return found

def hang(completions, **kwargs):
    if "hang" in completions:
        time.sleep(10_000)
    return [1.0] * len(completions)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "run_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def score(functions: RewardFunctions, *completions: Any, **columns: list[Any]) -> RewardBatch:
    return functions.score(
        prompts=["p"] * len(completions),
        completions=list(completions),
        completion_ids=[[0]] * len(completions),
        columns=columns,
        rows=[i + 10 for i in range(len(completions))],
    )


@contextmanager
def impatient(functions: RewardFunctions) -> Iterator[None]:
    """Half a second for a call of the first function, and as long as it takes to load again."""
    worker: Any = functions._scorers[0]
    worker._timeout = 0.5
    try:
        yield
    finally:
        worker._timeout = HUNG


def ones(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def number(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(completion) for completion in completions]


async def slow_length(completions: list[str], **kwargs: Any) -> list[int]:
    await asyncio.sleep(0.01)
    return [len(completion) for completion in completions]


def test_strings_callables_and_weights_make_one_matrix() -> None:
    with build_rewards(
        ["format, run_rewards:length", "run_rewards.py:length", ones, slow_length],
        weights=[1, 2, 0, -1, 0.5],
        kwargs={"run_rewards.py:length": {"scale": 10}},
    ) as functions:
        batch = score(functions, "<think>a</think><answer>b</answer>", "abc")
    assert functions.names == ["format", "length", "length#2", "ones", "slow_length"]
    assert functions.weights.tolist() == [1, 2, 0, -1, 0.5]
    assert batch.values.dtype == batch.total.dtype == torch.float32
    assert batch.values.tolist() == [[1, 34, 340, 1, 34], [0, 3, 30, 1, 3]]
    assert batch.total.tolist() == [1 + 68 - 1 + 17, 6 - 1 + 1.5]
    assert set(batch.seconds) == set(functions.names)
    assert batch.dropped == 0


def test_the_recipe_of_the_tutorial_runs() -> None:
    with build_rewards("accuracy,format") as functions:
        batch = score(
            functions, "<think>8×2</think><answer>16</answer>", "16", solution=["16", "16"]
        )
    assert batch.values.tolist() == [[1, 1], [1, 0]]
    assert batch.extra == {"reference": ["16", "16"]}


def test_prompt_and_completion_columns_are_left_out() -> None:
    seen: list[set[str]] = []

    def spy(completions: list[str], **kwargs: Any) -> list[float]:
        seen.append(set(kwargs))
        return [0.0]

    score(build_rewards(spy), "a", prompt=["p"], completion=["c"], completion_ids=[[1]], x=[1])
    assert seen == [{"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric", "x"}]


def test_none_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    def even(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [1.0 if len(c) % 2 == 0 else None for c in completions]

    def short(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [2.0 if len(c) < 3 else None for c in completions]

    functions = build_rewards([even, short], weights=[1.0, 3.0])
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        batch = score(functions, "ab", "a", "abcd", "abc")
        score(functions, "abc")
    assert batch.total[:3].tolist() == [7.0, 6.0, 1.0] and batch.total[3].isnan()
    assert batch.values.isnan().tolist() == [
        [False, False],
        [True, False],
        [False, True],
        [True, True],
    ]
    (said,) = caplog.messages
    assert "1 of 4 completions got no reward" in said and "data row 13" in said
    assert "returned None for the following kwargs: {" in said and "'completions': 'abc'" in said


def test_functions_run_at_the_same_time() -> None:
    def wait(own: str, *others: str) -> Iterator[None]:
        Path(own).touch()
        while not all(Path(other).exists() for other in others):
            yield

    async def slow(completions: list[str], **kwargs: Any) -> list[float]:
        for _ in wait("slow", "napping", "slower"):
            await asyncio.sleep(0.01)
        return [0.0]

    async def slower(completions: list[str], **kwargs: Any) -> list[float]:
        for _ in wait("slower", "napping", "slow"):
            await asyncio.sleep(0.01)
        return [0.0]

    # Each returns when the others have begun: one after the other they would wait for ever.
    with build_rewards(["run_rewards:napping", slow, slower], timeout=HUNG) as functions:
        batch = score(functions, "a")
    assert min(batch.seconds.values()) > 0
    assert batch.extra == {"nap": [0.4]} and batch.metrics == {"naps": 1.0}


@pytest.mark.parametrize("function", [number, "run_rewards:number"])
def test_a_failure_names_function_row_and_completion(function: Any) -> None:
    with (
        build_rewards([ones, function]) as functions,
        pytest.raises(
            RewardError,
            match=r"'number' failed on completion 2 of 3 \(data row 12\): ValueError.*\.py:\d+",
        ) as caught,
    ):
        score(functions, "1", "2", "x" * 3)
    assert "'xxx'" in str(caught.value) and "on_reward_error: drop" in str(caught.value)


def test_a_failure_that_no_row_repeats_is_still_a_failure() -> None:
    def moody(completions: list[str], **kwargs: Any) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [1.0]

    with pytest.raises(RewardError, match=r"'moody' failed on a batch of 2 .*too many"):
        score(build_rewards(moody), "a", "b")


@pytest.mark.parametrize("function", [number, "run_rewards:number"])
def test_drop_leaves_out_the_rows_that_fail(
    function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with build_rewards([function, ones], on_error="drop") as functions:
        batch = score(functions, "1", "x", "3")
    assert batch.dropped == 1
    assert batch.values[:, 1].tolist() == [1, 1, 1]
    assert batch.values[0, 0] == 1 and batch.values[1, 0].isnan() and batch.values[2, 0] == 3
    assert "'number': 1 of 3 completions left out" in caplog.text


def test_drop_does_not_excuse_a_function_that_always_fails() -> None:
    functions = build_rewards(number, on_error="drop")
    for _ in range(2):
        assert score(functions, "x", "y").dropped == 2
    assert score(functions, "x", "1").dropped == 1  # starts the count anew
    for _ in range(2):
        score(functions, "x", "y")
    with pytest.raises(RewardError, match="'number' failed on every completion of 3 batches"):
        score(functions, "x", "y")


def test_bad_answers_are_refused_even_under_drop() -> None:
    def bad(completions: list[str], **kwargs: Any) -> list[str]:
        return ["1"]

    with pytest.raises(RewardError, match="'bad' returned '1'"):
        score(build_rewards(bad, on_error="drop"), "a")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_obeys_on_reward_error(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    def ratio(completions: list[str], **kwargs: Any) -> list[float]:
        return [value if text == "x" else 1.0 for text in completions]

    with pytest.raises(RewardError, match=rf"'ratio' failed on completion 1 of 2 .*{value}.*None"):
        score(build_rewards([ratio, ones]), "a", "x")
    functions = build_rewards([ratio, ones], on_error="drop")
    batch = score(functions, "a", "x")
    assert batch.dropped == 1
    assert batch.values[0].tolist() == [1, 1] and batch.total.tolist() == [2, 1]
    assert batch.values[1, 0].isnan()
    assert f"1 of 2 completions left out (on_reward_error: drop), the first for data row 11: it " \
        f"returned {value}" in caplog.text  # fmt: skip
    for _ in range(2):
        score(functions, "x", "x")
    functions.patience = 8  # batches are parts of a rollout
    score(functions, "x", "x")
    with pytest.raises(RewardError, match="on every completion of 4 batches in a row"):
        score(functions, "x", "x")
    functions.patience = 0
    score(functions, "a")
    for _ in range(2):
        score(functions, "x")
    with pytest.raises(RewardError, match="on every completion of 3 batches in a row"):
        score(functions, "x")


def test_functions_of_one_name_have_labels_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    def made(bonus: float) -> Any:
        def judge(completions: list[str], plus: float = 0.0, **kwargs: Any) -> list[float]:
            return [bonus + plus for _ in completions]

        return judge

    functions = build_rewards(
        [made(1), ones, made(2), made(3)], kwargs={"judge": {"plus": 10}, "judge#3": {"plus": 20}}
    )
    assert functions.names == ["judge", "ones", "judge#2", "judge#3"]
    assert "judge#2, judge#3" in caplog.text
    batch = score(functions, "a")
    assert batch.values.tolist() == [[11, 1, 2, 23]]
    assert list(batch.seconds) == functions.names
    row = reward_metrics(functions.names, batch, torch.zeros(1), "group")
    assert [row[f"rewards/{name}/mean"] for name in functions.names] == [11, 1, 2, 23]


def test_what_a_function_changes_is_seen_by_nobody_else() -> None:
    seen: list[Any] = []

    def vandal(tests: Any, options: Any, trainer_state: Any, **given: Any) -> list[float]:
        rows = zip(given["prompts"], given["completions"], given["completion_ids"], strict=True)
        for (prompt, completion, ids), test in zip(rows, tests, strict=True):
            seen.append(repr((prompt, completion, ids, test)))
            prompt[0]["content"] = completion[0]["content"] = "changed"
            for one in (test["cases"], test["more"][0], ids):
                one.clear()
        seen.append(repr((options, trainer_state.step)))
        options["deep"].clear()
        trainer_state.step += 1
        return [1.0] * len(tests)

    def first(**kwargs: Any) -> list[float]:
        return vandal(**kwargs)

    async def late(**kwargs: Any) -> list[float]:
        return vandal(**kwargs)

    prompt, completion = [{"role": "user", "content": "q"}], [{"content": "a"}]
    row, ids, state = {"cases": [1, {2}], "more": ([3],)}, [5, 6], SimpleNamespace(step=7)
    shared = {"options": {"deep": [1]}}
    arguments = dict.fromkeys(("vandal", "first", "late"), shared)
    functions = build_rewards([vandal, first, late], kwargs=arguments)
    with functions:
        for _ in range(2):
            functions.score(
                prompts=[prompt] * 2,
                completions=[completion] * 2,
                completion_ids=[ids] * 2,
                columns={"tests": [row] * 2},
                trainer_state=state,
                rows=[0, 0],
            )
    assert len(seen) == 3 * 2 * 3
    assert set(seen) == {repr((prompt, completion, ids, row)), repr(({"deep": [1]}, 7))}
    assert row["cases"] == [1, {2}] and ids == [5, 6] and prompt[0]["content"] == "q"


def test_a_worker_gives_each_completion_its_own_row_too() -> None:
    cases = [1, 2]
    with build_rewards(["run_rewards:emptying", "run_rewards.py:emptying"]) as functions:
        for _ in range(2):
            assert score(functions, "a", "b", tests=[cases, cases]).values.tolist() == [[2, 2]] * 2


def test_an_object_that_cannot_be_copied_is_handed_over_itself_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lock = threading.Lock()

    def judge(completions: list[str], lock: list[Any], **kwargs: Any) -> list[float]:
        return [float(one is lock[0]) for one in lock]

    functions = build_rewards(judge)
    for _ in range(2):
        assert score(functions, "a", "b", lock=[lock, lock]).values.tolist() == [[1], [1]]
    assert caplog.text.count("holds a lock that cannot be copied") == 1


def test_a_hang_halts_naming_function_and_seconds() -> None:
    with build_rewards(["run_rewards:hang", ones], timeout=HUNG) as functions:
        with (
            impatient(functions),
            pytest.raises(RewardError, match=r"'hang' failed on a batch of 2 .*more than 0.5 sec"),
        ):
            score(functions, "hang", "a")
        assert score(functions, "a").values.tolist() == [[1, 1]]


def test_a_hang_can_be_dropped() -> None:
    with build_rewards("run_rewards:hang", on_error="drop", timeout=HUNG) as functions:
        with impatient(functions):
            batch = score(functions, "hang", "a")
        assert batch.dropped == 2 and batch.values.isnan().all()
        assert score(functions, "a").values.tolist() == [[1]]


def test_one_refusal_leaves_the_other_workers_in_step() -> None:
    def bad(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * (len(completions) if completions != ["aa"] else 0)

    with build_rewards([bad, "run_rewards:length", slow_length]) as functions:
        with pytest.raises(RewardError, match="returned 0, expected 1"):
            score(functions, "aa")
        assert score(functions, "bbb").values.tolist() == [[1, 3, 3]]


def test_other_exceptions_pass() -> None:
    def stop(completions: list[str], **kwargs: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(build_rewards(stop, on_error="drop"), "a")


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="x has 1 values for 2 completions"):
        score(build_rewards(ones), "a", "b", x=[1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"reward_funcs": None}, "reward_funcs is empty"),
        ({"reward_funcs": " , "}, "reward_funcs is empty"),
        ({"reward_funcs": [3]}, r"reward_funcs holds 3 \(int\)"),
        ({"reward_funcs": "acuracy"}, "Did you mean 'accuracy'"),
        ({"reward_funcs": "format,run_rewards:lenght"}, "Did you mean 'length'"),
        ({"reward_funcs": "no/such-model"}, "cannot load the reward model 'no/such-model'"),
        ({"reward_funcs": "cosine_scaled"}, "missing a required argument: 'max_len'"),
        (
            {"reward_funcs": "format,accuracy", "weights": [1.0]},
            "expected 2 finite numbers: one for each of format, accuracy",
        ),
        ({"reward_funcs": ones, "weights": [math.nan]}, "expected 1 finite number"),
        ({"reward_funcs": ones, "on_error": "ignore"}, "on_reward_error is 'ignore'"),
        ({"reward_funcs": ones, "kwargs": {"one": {}}}, "Did you mean 'ones'"),
        ({"reward_funcs": ones, "kwargs": {"ones": 3}}, "'ones' is 3, expected argument: value"),
        (
            {"reward_funcs": "format", "kwargs": {"format": {"f": lambda: 0}}},
            "'format' runs in a worker process, to which reward_kwargs cannot be sent",
        ),
        (
            {"reward_funcs": [ones, ones], "reward_processing_classes": object()},
            "has 1 entries, expected 2",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_built(
    arguments: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RewardError, match=told):
        build_rewards(**arguments)


def test_search_paths_beside_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    names = "run_rewards:length,run_rewards.py:length"
    with pytest.raises(RewardError, match="no such file"):
        build_rewards(names)
    with build_rewards(names, search_paths=[folder]) as functions:
        assert score(functions, "abc").values.tolist() == [[3, 3]]


def test_a_class_instance_and_a_partial_are_named_as_trl_names_them() -> None:
    class Judge:
        def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
            return [1.0]

    assert build_rewards([Judge(), ones, ones]).names == ["Judge", "ones", "ones#2"]
