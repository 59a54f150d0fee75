from __future__ import annotations

import sys
import warnings

import pytest

from fusedgrpo.engine.reporting.plots import PLOTS, render, smooth, write_plots

PNG = b"\x89PNG\r\n\x1a\n"


def make_rows(count=12, **more):
    return [
        {
            "step": step,
            "reward": step / 10,
            "rewards/accuracy/mean": step / 20,
            "reward_std": 0.5,
            "kl": 0.01 * step,
            "entropy": 1.0,
            "completions/mean_length": 20.0,
            "completions/min_length": 5,
            "completions/max_length": 60,
            "completions/clipped_ratio": 0.25,
            "time/sample": 3.0,
            "time/score": 0.1,
            "time/update": 1.0,
            "loss": -1e-3,
            "grad_norm": 0.5,
            "learning_rate": 1e-4,
            **more,
        }
        for step in range(1, count + 1)
    ]


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.slow
def test_every_metric_gets_its_file(tmp_path, count):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_plots(make_rows(count), tmp_path / "plots")
    assert {path.stem for path in paths} == set(PLOTS)
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_a_plot_without_data_is_not_drawn(tmp_path):
    rows = [{"step": 1, "reward": 0.5, "kl": None}, {"step": 2, "reward": 0.75}]
    assert [path.name for path in write_plots(rows, tmp_path)] == ["reward.png"]
    assert write_plots([], tmp_path) == []


def test_gaps_in_a_metric_are_bridged():
    rows = make_rows(6)
    rows[2]["reward"] = None
    del rows[3]["reward"]
    rows[4]["completions/min_length"] = None
    assert render("reward", rows)
    assert render("completion_length", rows)


@pytest.mark.parametrize("name", ["_private", "$^{$", "<lambda>"])
def test_a_reward_function_may_have_any_name(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render("reward", make_rows(3, **{f"rewards/{name}/mean": 0.5}))


def test_the_legend_names_functions_that_start_with_an_underscore():
    one, other = (make_rows(3, **{f"rewards/{name}/mean": 0.5}) for name in ("_one", "_other"))
    assert render("reward", one) != render("reward", other)


@pytest.mark.slow
def test_each_curve_changes_its_picture():
    rows = make_rows(6)
    for name, key in {"reward": "rewards/accuracy/mean", "time": "time/sample", "kl": "kl"}.items():
        changed = [{**row, key: row[key] * row["step"]} for row in rows]
        assert render(name, rows) != render(name, changed)


def test_pyplot_is_neither_needed_nor_left_open():
    had_pyplot = "matplotlib.pyplot" in sys.modules
    render("loss", make_rows(2))
    if had_pyplot:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
    else:
        assert "matplotlib.pyplot" not in sys.modules


def test_smoothing_keeps_a_constant_and_halves_no_edge():
    assert smooth([2.0] * 7) == pytest.approx([2.0] * 7)
    assert smooth([0.0, 3.0, 6.0]) == pytest.approx([1.5, 3.0, 4.5])
    assert smooth([]) == []
