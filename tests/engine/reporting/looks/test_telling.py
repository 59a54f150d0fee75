from __future__ import annotations

import json

import pytest

from fusedgrpo.engine.reporting.completions_reader import Completions
from fusedgrpo.engine.reporting.looks import telling_groups


def completions(folder, rollouts):
    """step -> groups -> rewards, each completion says its step, group and number."""
    for step, groups in rollouts.items():
        records = [
            {"step": step, "group": g, "row": 10 * step + g, "reward": reward, "completion": f"{i}"}
            for g, rewards in enumerate(groups)
            for i, reward in enumerate(rewards)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"step-{step:06d}.jsonl").write_text(text)
    return Completions(folder)


def test_the_best_the_worst_and_the_most_divided_of_the_last_tenth(tmp_path):
    rollouts = {step: [[9, 9], [-9, -9], [-9, 9]] for step in range(1, 19)}
    rollouts |= {19: [[0, 0], [0, 1]], 20: [[1, 1], [0.4, 0.6], [0, 0.5]]}
    found = telling_groups(completions(tmp_path, rollouts))
    assert (found.first, found.last) == (19, 20)
    assert (found.best.step, found.best.group, found.best.row, found.best.mean) == (20, 0, 200, 1)
    assert (found.worst.step, found.worst.group, found.worst.mean) == (19, 0, 0)
    assert (found.divided.step, found.divided.group, found.divided.spread) == (19, 1, 0.5)
    assert [record["reward"] for record in found.divided.records] == [0, 1]
    assert [record["completion"] for record in found.best.records] == ["0", "1"]


def test_last_says_from_how_many_rollouts(tmp_path):
    run = completions(tmp_path, {1: [[5, 5]], 2: [[0, 1]], 3: [[0, 0]], 4: [[1, 1]]})
    assert telling_groups(run, last=1.0).best.step == 1
    assert telling_groups(run, last=0.5).first == 3
    assert telling_groups(run).first == telling_groups(run).best.step == 4


def test_no_group_is_there_twice(tmp_path):
    found = telling_groups(completions(tmp_path, {1: [[0, 3], [0, 1]]}))
    assert (found.best.group, found.worst.group, found.divided) == (0, 1, None)
    (tmp_path / "more").mkdir()
    found = telling_groups(completions(tmp_path / "more", {1: [[0, 3], [0, 1], [0, 2]]}))
    assert (found.best.group, found.worst.group, found.divided.group) == (0, 1, 2)


@pytest.mark.parametrize(
    "rewards, best", [([[0.1] * 7, [0.1] * 7], 1), ([[None], [None]], None), ([[2]], 0)]
)
def test_equal_groups_have_a_best_and_nothing_else(tmp_path, rewards, best):
    found = telling_groups(completions(tmp_path, {1: rewards}))
    assert (found.best and found.best.group) == best
    assert found.worst is None and found.divided is None


def test_without_completions_there_are_none(tmp_path):
    found = telling_groups(Completions(tmp_path / "nowhere"))
    assert (found.best, found.worst, found.divided, found.first) == (None, None, None, None)
