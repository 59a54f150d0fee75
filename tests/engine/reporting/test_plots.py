"""What is in the plots, asked of matplotlib's figures: lines, labels, legends, limits."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest

from fusedgrpo.engine.reporting.drawing.rewards import reward_curves
from fusedgrpo.engine.reporting.plots import PLOTS, Material, figure_of, render, write_plots
from tests.helpers import synthetic_scores

PNG = b"\x89PNG\r\n\x1a\n"
OF_SCORES = {"reward_histogram", "group_signal", "length_reward"}


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
            "memory/peak": 4e9,
            "clip_ratio/region_mean": 0.1,
            **more,
        }
        for step in range(1, count + 1)
    ]


def rewards(**series):
    """Rows with these means of functions, by step."""
    count = max(map(len, series.values()))
    return [
        {"step": i + 1, **{f"rewards/{name}/mean": values[i] for name, values in series.items()}}
        for i in range(count)
    ]


def draw(name, rows, scores=None, config=None):
    return figure_of(name, Material(rows, scores, config))


def legend(figure):
    """The note of the legend and its labels."""
    found = figure.legends[0]
    return found.get_title().get_text(), [text.get_text().strip() for text in found.get_texts()]


def thick(figure, label, axes=0):
    """The line in the legend as ``label``."""
    return next(one for one in figure.axes[axes].lines if one.get_label().strip() == label)


@pytest.mark.parametrize("count", [1, pytest.param(1500, marks=pytest.mark.slow)])
def test_every_plot_with_data_gets_its_file(tmp_path, count):
    scores = synthetic_scores.learning(rollouts=count, groups=2, each=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_plots(
            make_rows(count), tmp_path / "plots", scores=scores, config={"max_grad_norm": 1.0}
        )
    assert [path.stem for path in paths] == list(PLOTS)
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_a_plot_without_data_is_not_drawn(tmp_path):
    rows = [{"step": 1, "reward": 0.5, "kl": None}, {"step": 2, "reward": 0.75}]
    assert [path.name for path in write_plots(rows, tmp_path)] == ["reward.png"]
    assert write_plots([], tmp_path) == []


@pytest.mark.parametrize("name", sorted(OF_SCORES))
def test_plots_of_completions_need_completions_with_rewards(name):
    rows = make_rows()
    assert draw(name, rows) is None
    assert draw(name, rows, synthetic_scores.scores(np.zeros((0, 0, 0)))) is None
    unscored = synthetic_scores.scores(np.full((3, 2, 4), math.nan))
    assert (draw(name, rows, unscored) is None) == (name != "group_signal")


@pytest.mark.parametrize("name", list(PLOTS))
def test_a_plot_has_its_title_and_its_axes_have_labels_with_units(name):
    figure = draw(name, make_rows(), synthetic_scores.learning(rollouts=5))
    assert figure.axes[0].get_title("left") == PLOTS[name].title
    for axes in figure.axes:
        labelled = axes.get_ylabel() and (axes.get_xlabel() or axes is not figure.axes[0])
        assert labelled, axes
    words = {"kl": "nats per token", "completion_length": "tokens", "time": "seconds",
             "memory": "GB", "clip_fraction": "(%)", "entropy": "nats per token",
             "group_signal": "(%)", "grad_norm": "L2 norm"}  # fmt: skip
    assert words.get(name, "") in figure.axes[0].get_ylabel()


def test_the_legend_says_what_is_thin_and_what_is_thick():
    note, labels = legend(draw("reward", make_rows(40)))
    assert note == "thin: each step; thick: mean over 5 steps"
    assert labels == ["reward (weighted sum)", "accuracy"]
    assert legend(draw("kl", make_rows(40))) == (note, [])
    assert not draw("kl", make_rows(1)).legends  # one dot needs no words
    note, _ = legend(draw("kl", make_rows(10_000)))
    assert note == "pale: least to greatest of 33 steps; thick: mean over 1001 steps"


def test_many_steps_are_a_band_that_loses_no_peak():
    rows = make_rows(10_000)
    rows[7003]["entropy"] = 3.0
    axes = draw("entropy", rows).axes[0]
    assert [len(line.get_xdata()) for line in axes.lines] == [10_000]
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 1].max() == 3.0
    assert len(band.get_paths()[0].vertices) < 1000


def test_a_constant_reward_is_thin_and_under_the_others():
    up = [i / 10 for i in range(11)]
    figure = draw("reward", rewards(accuracy=up, form=[1.0] * 11))
    _, labels = legend(figure)
    assert labels == ["accuracy", "form: always 1"]
    constant, other = thick(figure, "form: always 1"), thick(figure, "accuracy")
    assert constant.get_zorder() < other.get_zorder()
    assert constant.get_linewidth() < other.get_linewidth()
    assert constant.get_linestyle() != "-"


def test_equal_rewards_are_drawn_once_under_both_names():
    up = [i / 10 for i in range(11)]
    rows = [{**row, "reward": row["rewards/a/mean"]} for row in rewards(a=up, b=up, c=up[::-1])]
    figure = draw("reward", rows)
    assert legend(figure)[1] == ["reward (weighted sum) = a = b", "c"]
    assert len(figure.axes[0].lines) == 4  # a thin and a thick one of each
    zero = draw("reward", rewards(a=[0.0] * 5, b=[0.0] * 5))
    assert legend(zero)[1] == [] and zero.axes[0].lines[0].get_label().strip() == "a = b: always 0"


def test_rewards_that_coincide_part_of_the_time_both_show():
    up, late = [i / 10 for i in range(11)], [0.0] * 5 + [i / 10 for i in range(5, 11)]
    rows = rewards(a=up, b=late, c=[1 - i for i in up])
    assert len({str(curve.dashes) for curve in reward_curves(rows)}) == 3
    figure = draw("reward", rows)
    lines = [thick(figure, name) for name in "abc"]
    assert len({line.get_color() for line in lines}) == 3
    widths = [line.get_linewidth() for line in lines]  # drawn in this order: the widest is below
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[1]


@pytest.mark.parametrize(
    "others, panels",
    [
        ({"b": [0.5, 0.9] * 6}, [["a", "b"]]),
        ({"b": [100.0, 10.0] * 6}, [["a"], ["b"]]),
        ({"b": [100.0] * 12}, [["a"], ["b: always 100"]]),
        ({"b": [0.001] * 12}, [["a", "b: always 0.001"]]),
        ({"b": [50.0, 90.0] * 6, "c": [-5000.0, -4000.0] * 6, "d": [3.0, 1.0] * 6},
         [["a", "d"], ["b"], ["c"]]),
    ],
)  # fmt: skip
def test_rewards_of_very_different_size_have_axes_of_their_own(others, panels):
    figure = draw("reward", rewards(a=[0.0, 1.0] * 6, **others))
    found = [
        [one.get_label().strip() for one in axes.lines if not one.get_label().startswith("_")]
        for axes in figure.axes
    ]
    assert found == panels
    for axes in figure.axes:  # nothing is a flat line but what is one
        low, high = axes.get_ylim()
        assert all(np.ptp(one.get_ydata()) > 0.05 * (high - low) for one in axes.lines
                   if "always" not in one.get_label() and one.get_alpha())  # fmt: skip


def test_one_value_far_out_leaves_the_others_readable_and_is_told():
    values = [0.1, 0.2] * 20
    values[7] = -5000.0
    figure = draw("reward", rewards(a=values, b=[0.3, 0.5] * 20))
    low, high = figure.axes[0].get_ylim()
    assert -0.5 < low < 0.1 and 0.5 < high < 1
    assert "1 beyond the picture, the furthest -5000 (in no mean)" in legend(figure)[0]
    line = thick(figure, "a").get_ydata()
    assert min(line) >= 0.1 and len(line) == 40


def test_a_gap_shows_as_one_and_a_value_between_gaps_as_a_dot():
    rows = make_rows(12)
    for i in (3, 5, 8):
        rows[i]["kl"] = None
    del rows[10]["kl"]
    thin, line = draw("kl", rows).axes[0].lines
    for one in (thin, line):
        assert np.flatnonzero(np.isnan(one.get_ydata())).tolist() == [3, 5, 8]
        assert len(one.get_xdata()) == 11
    assert line.get_markevery() == [4] and line.get_marker() == "o"
    assert draw("kl", make_rows(12)).axes[0].lines[1].get_marker() == ""
    del rows[4]["completions/min_length"]
    assert render("completion_length", Material(rows))


def test_rounding_is_not_magnified():
    rows = make_rows(30)
    rows[3]["reward_std"] += 1e-12
    low, high = draw("reward_std", rows).axes[0].get_ylim()
    assert high - low > 0.01


@pytest.mark.parametrize("name", ["_private", "$^{$", "<lambda>", "多い", "a\x1b[31m\n", "x" * 300])
def test_a_reward_function_may_have_any_name(name):
    rows = make_rows(3, **{f"rewards/{name}/mean": 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render("reward", Material(rows))
    label = legend(draw("reward", rows))[1][-1]
    assert label.endswith(": always 0.5") and len(label) < 70 and label.isprintable()
    if len(name) < 10 and name.isprintable():
        assert label.startswith(name)


def test_held_out_prompts_are_marked():
    rows = make_rows(12)
    rows[0]["eval_reward"], rows[11]["eval_reward"] = 0.2, 0.9
    figure = draw("reward", rows)
    line = thick(figure, "held-out prompts")
    assert line.get_xdata().tolist() == [1, 12] and line.get_marker() == "D"


def test_the_gradient_has_its_limit_and_the_share_that_was_clipped():
    rows = make_rows(12)
    for row in rows[:3]:
        row["grad_norm"] = 2.0
    figure = draw("grad_norm", rows, config={"max_grad_norm": 1.0})
    assert legend(figure)[1] == ["grad_norm", "max_grad_norm 1: 25% of the steps clipped"]
    assert figure.axes[0].lines[-1].get_ydata()[0] == 1.0
    assert legend(draw("grad_norm", rows))[1] == []
    far = draw("grad_norm", rows, config={"max_grad_norm": 100.0})
    assert "far above the picture, max_grad_norm 100: 0% of the steps clipped" in legend(far)[0]
    assert far.axes[0].get_ylim()[1] < 3


def test_memory_is_drawn_by_phase_beside_the_plan():
    more = {"memory/sample": 3e9, "memory/update": 4e9, "memory/planned": 5e9}
    figure = draw("memory", make_rows(4, **more))
    assert legend(figure)[1] == ["sample", "update", "planned, peak at 80% of it"]
    assert figure.axes[0].lines[-1].get_ydata()[0] == 5
    _, labels = legend(draw("memory", make_rows(4)))
    assert labels == []


def test_clip_fractions_are_in_percent():
    more = {"clip_ratio/high_mean": 0.03, "cispo_clip_ratio": None}
    figure = draw("clip_fraction", make_rows(4, **more))
    assert legend(figure)[1] == ["clip_ratio/region_mean", "clip_ratio/high_mean"]
    assert thick(figure, "clip_ratio/high_mean").get_ydata() == pytest.approx([3] * 4)


def test_the_histogram_has_a_row_for_each_value_and_a_colour_bar():
    scores = synthetic_scores.scores([[[0, 1, 1, 1]], [[0, 0, 0, 0.5]]])
    figure = draw("reward_histogram", make_rows(), scores)
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "0.5", "1"]
    shares = axes.collections[0].get_array()
    assert shares.filled(-1).tolist() == [[25, 75], [-1, 25], [75, -1]]
    assert bar.get_ylabel() == "completions of these steps (%)"


def test_groups_are_layers_that_add_up():
    scores = synthetic_scores.scores([[[1, 1], [0, 1], [0, 0], [0, 1]]] * 3)
    figure = draw("group_signal", make_rows(), scores)
    assert legend(figure)[1] == [
        "solved: all have the greatest reward (25%)",
        "signal: rewards differ (50%)",
        "none: all the same (25%)",
    ]
    tops = [one.get_paths()[0].vertices[:, 1].max() for one in figure.axes[0].collections]
    assert tops == [25, 75, 100]
    only = draw("group_signal", make_rows(), synthetic_scores.scores(np.ones((1, 2, 2))))
    assert legend(only)[1] == ["solved: all have the greatest reward (100%)"]


def test_length_against_reward_has_points_and_no_empty_panel():
    figure = draw("length_reward", make_rows(), synthetic_scores.learning(rollouts=10))
    assert len(figure.axes) == 2 and len(legend(figure)[1]) == 4
    early = legend(figure)[1][0]
    assert early.startswith("steps 1 to 2: correlation ")
    alone = synthetic_scores.scores(np.arange(6.0).reshape(6, 1, 1))
    assert len(draw("length_reward", make_rows(), alone).axes) == 1
    assert draw("length_reward", make_rows(), synthetic_scores.scores(np.ones((5, 2, 2)))) is None


def test_the_way_of_kl_and_reward_begins_and_ends_where_the_run_does():
    figure = draw("kl_reward", make_rows(12))
    assert legend(figure) == ("means over 3 steps", ["first step (1)", "last step (12)"])
    assert figure.axes[0].lines[1].get_xdata()[0] == pytest.approx(0.015)


def test_phases_are_named_with_their_shares():
    rows = make_rows(4, **{"time/sample": 6.0, "time/score": 1.0, "time/update": 3.0})
    note, labels = legend(draw("time", rows))
    assert labels == ["sample (60%)", "score (10%)", "update (30%)"]
    assert note == "mean over 3 steps"


def test_pyplot_is_neither_needed_nor_left_open():
    had_pyplot = "matplotlib.pyplot" in sys.modules
    render("loss", Material(make_rows(2)))
    if had_pyplot:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
    else:
        assert "matplotlib.pyplot" not in sys.modules
