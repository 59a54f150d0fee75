"""What the curves of a page are made of."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fusedgrpo.engine.reporting.page import charts
from fusedgrpo.engine.reporting.page.chart import Chart
from fusedgrpo.engine.reporting.page.charts import run_charts


def of(rows: list[dict[str, Any]], **more: Any) -> dict[str, Chart]:
    shown, others = run_charts(rows, more.pop("config", {}), **more)
    return {chart.id: chart for chart in [*shown, *others]}


def test_every_metric_is_in_one_chart_or_among_the_others() -> None:
    rows = [
        {"step": i, "epoch": 0.1 * i, "reward": 1.0, "kl": None if i == 2 else 0.1, "mine/<x>": i,
         "grad_norm": 0.5 * i, "text": "no number", "rewards/a/mean": 1.0}
        for i in range(1, 5)
    ]  # fmt: skip
    found = of(rows, config={"max_grad_norm": 1.0})
    assert list(found["kl"].curves[0].values) == [0.1, None, 0.1, 0.1]
    assert "50% of the steps" in found["grad_norm"].note
    assert found["grad_norm"].lines == {"max_grad_norm": 1.0}
    titles = [chart.title for chart in found.values()]
    assert titles == ["Reward", "KL to the reference policy", "Gradient norm before clipping",
                      "epoch", "mine/<x>"]  # fmt: skip
    assert "entropy" not in found and "parts-0" not in found  # one part is the sum
    assert json.loads(json.dumps(found["reward"].to_data()))["x"] == [1, 2, 3, 4]


def test_calls_of_tools_are_drawn_where_there_are_tools() -> None:
    rows = [
        {"step": i, "reward": 1.0, "tools/call_frequency": 0.5 * i, "tools/failure_frequency": 0.2}
        for i in range(1, 4)
    ]
    titles = [chart.title for chart in of(rows).values()]
    assert titles == ["Reward", "Calls of tools", "Calls that were answered with an error"]


def test_a_reward_hides_no_other() -> None:
    rows = [
        {"step": i, "reward": 2 + 0.1 * i, "rewards/same/mean": 0.1 * i,
         "rewards/twin/mean": 0.1 * i, "rewards/one/mean": 1.0, "rewards/penalty/mean": -5000.0 * i,
         "rewards/points/mean": 40.0 * i}
        for i in range(1, 6)
    ]  # fmt: skip
    found = of(rows)
    groups = {chart.title: [(c.name, c.kind) for c in chart.curves] for chart in found.values()}
    assert groups["Reward: penalty"] == [("penalty", "noisy")]
    assert groups["Reward: points"] == [("points", "noisy")]
    assert groups["Reward: same, twin, one"] == [
        ("one (1.00 throughout)", "dashed"),
        ("same = twin", "noisy"),
    ]


def test_evaluations_are_beside_training() -> None:
    rows = [{"step": 0, "eval_reward": 0.2}, {"step": 1, "reward": 0.3}]
    checks = [{"step": 0, "eval_greedy_reward": 0.1}, {"step": 2, "eval_b_greedy_reward": 0.4}]
    (reward,) = of(rows, checks=checks).values()
    assert list(reward.x) == [0, 1, 2]
    assert {curve.name: list(curve.values) for curve in reward.curves} == {
        "in training": [None, 0.3, None],
        "held out": [0.2, None, None],
        "held out, most likely answers": [0.1, None, None],
        "held out (b), most likely answers": [None, None, 0.4],
    }
    assert reward.summary.startswith("in training: 0.300 throughout; held out")


def test_a_long_run_is_thinned_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "MOST_POINTS", 100)
    rows: list[dict[str, Any]] = [{"step": i, "reward": i} for i in range(1, 1001)]
    rows[554]["eval_reward"] = 7.0
    reward = of(rows)["reward"]
    assert len(reward.x) == 101 and 555 in reward.x
    assert reward.to_data()["step"] == "10th step"
    assert [v for v in reward.curves[1].values if v is not None] == [7.0]


def test_a_kl_that_was_measured_now_and_then_is_points() -> None:
    rows = [{"step": i, "reward": 0.5} | ({"kl": 0.1} if i in (1, 5) else {}) for i in range(1, 6)]
    kl = of(rows, kl_is_sampled=True)["kl"]
    assert kl.curves[0].kind == "points" and "beta is 0" in kl.note
    assert of(rows)["kl"].curves[0].kind == "noisy"
