"""The curves of a run, chosen from its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.formatting import number
from fusedgrpo.engine.reporting.looks import length_against_reward
from fusedgrpo.engine.reporting.metrics_log import Row, finite, reward_names, series
from fusedgrpo.engine.reporting.page.chart import Chart, Curve, Kind

MOST_POINTS = 20_000  # of a curve; of longer runs every so many steps
PHASE_COLOURS = {"sample": 5, "score": 1, "update": 4}
FAR_APART = 30.0  # greatest values of two rewards, as a factor, that one axis cannot show


class Columns:
    """The metrics of rows by name, at their steps. Of more than ``MOST_POINTS`` rows every k-th is
    taken, with those that an evaluation is in."""

    def __init__(self, rows: Sequence[Row]):
        every = -(-len(rows) // MOST_POINTS)
        self.every = every
        self.rows = [
            row
            for i, row in enumerate(rows)
            if i % every == 0 or any(key.startswith("eval_") for key in row)
        ]
        self.steps = [int(row["step"]) for row in self.rows]

    def values(self, key: str) -> list[float | None]:
        return [finite(row.get(key)) for row in self.rows]

    def has(self, key: str) -> bool:
        return any(finite(row.get(key)) is not None for row in self.rows)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def curve(self, key: str, name: str, colour: int, kind: Kind = "noisy", **more: Any) -> Curve:
        return Curve(name, self.values(key), colour, kind, **more)


def run_charts(
    rows: Sequence[Row],
    config: Mapping[str, Any],
    checks: Sequence[Row] = (),
    *,
    kl_is_sampled: bool = False,
) -> tuple[list[Chart], list[Chart]]:
    """The charts that one looks at, and one for each other metric of ``rows``.

    checks: rows of ``check_rows``. kl_is_sampled: ``kl`` was measured on a few completions now and
    then.
    """
    columns = Columns(_together(rows, checks))
    charts = [
        *_rewards(columns),
        *_signal(columns),
        *_policy(columns, config, kl_is_sampled),
        *_lengths(columns),
        *_tools(columns),
        *_update(columns, config),
        *_cost(columns),
    ]
    shown = set(_USED) | {f"rewards/{name}/mean" for name in reward_names(columns.rows)}
    shown |= {key for key in columns.names if key.startswith("eval_") and key.endswith("reward")}
    others = [
        Chart(f"other-{i}", key, key, columns.steps, [columns.curve(key, key, i, joined=True)])
        for i, key in enumerate(sorted(columns.names))
        if key not in shown and key != "step" and columns.has(key)
    ]
    return [replace(c, every=columns.every) for c in charts], [
        replace(c, every=columns.every) for c in others
    ]


_USED = (
    "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "completions/mean_length",
    "completions/min_length", "completions/max_length", "completions/clipped_ratio", "grad_norm",
    "learning_rate", "loss", "time/sample", "time/score", "time/update", "tokens_per_second",
    "memory/peak", "memory/planned", "clip_ratio/low_mean", "clip_ratio/high_mean",
    "clip_ratio/region_mean", "tools/call_frequency", "tools/failure_frequency",
)  # fmt: skip


def length_charts(scores: Scores) -> list[Chart]:
    """How long the better and the worse completions of a group are."""
    found = length_against_reward(scores)
    pairs = {"above the mean of their group": found.above, "below it": found.below}
    curves = [
        Curve(name, [None if v != v else v for v in values.tolist()], colour, "plain", joined=True)
        for colour, (name, values) in enumerate(pairs.items())
    ]
    if len(found.time) < 2 or not all(any(v is not None for v in c.values) for c in curves):
        return []
    return [
        Chart(
            "length_of_better", "Length of completions by their reward", "tokens, mean",
            found.time.first.tolist(), curves, zero=True,
        )
    ]  # fmt: skip


def _together(rows: Sequence[Row], checks: Sequence[Row]) -> list[Row]:
    """The rows with those of checks, which are of the same steps or between them."""
    found: dict[int, dict[str, Any]] = {int(row["step"]): dict(row) for row in rows}
    for row in checks:
        found.setdefault(int(row["step"]), {"step": row["step"]}).update(row)
    return [found[step] for step in sorted(found)]


def _rewards(columns: Columns) -> Iterator[Chart]:
    """The sum with the evaluations, then its parts, those that one axis can show together."""
    curves = []
    if columns.has("reward"):
        curves.append(columns.curve("reward", "in training", 0))
    sets = [key for key in sorted(columns.names) if _is_evaluation(key) and columns.has(key)]
    for i, key in enumerate(sets):
        curves.append(columns.curve(key, _evaluated(key), 1 + i % 7, "points"))
    if curves:
        yield Chart(
            "reward", "Reward", "weighted sum, mean over completions", columns.steps, curves
        )
    names = reward_names(columns.rows)
    parts = {name: columns.values(f"rewards/{name}/mean") for name in names}
    groups = _by_size({name: values for name, values in parts.items() if any(
        v is not None for v in values)}) if len(names) > 1 else []  # fmt: skip
    for i, group in enumerate(groups):
        title = "Parts of the reward" if len(groups) == 1 else f"Reward: {', '.join(group)}"
        yield Chart(
            f"parts-{i}", title, "mean over completions", columns.steps,
            _distinct({name: parts[name] for name in group}),
        )  # fmt: skip


def _is_evaluation(key: str) -> bool:
    return key.startswith("eval_") and key.endswith("reward")


def _evaluated(key: str) -> str:
    """``eval_NAME_greedy_reward`` in words."""
    words = key.removeprefix("eval_").removesuffix("reward").strip("_")
    name = words.removesuffix("greedy").strip("_")
    held_out = f"held out ({name})" if name else "held out"
    return f"{held_out}, most likely answers" if words.endswith("greedy") else held_out


def _by_size(parts: Mapping[str, Sequence[float | None]]) -> list[list[str]]:
    """Names whose greatest values lie so close that one axis shows them all, the greatest first."""
    tops = {
        name: max(abs(v) for v in values if v is not None) or 1.0 for name, values in parts.items()
    }
    groups: list[list[str]] = []
    for name in sorted(parts, key=lambda n: -tops[n]):
        if groups and tops[groups[-1][0]] <= FAR_APART * tops[name]:
            groups[-1].append(name)
        else:
            groups.append([name])
    order = list(parts)
    return [sorted(group, key=order.index) for group in groups]


def _distinct(parts: Mapping[str, Sequence[float | None]]) -> list[Curve]:
    """A curve each; those that are the same in all steps are one, and constants are dashed and come
    first, so that they hide nothing."""
    same: dict[tuple[float | None, ...], list[str]] = {}
    for name, values in parts.items():
        same.setdefault(tuple(values), []).append(name)
    constant, moving = [], []
    for i, (values, names) in enumerate(same.items()):
        known = {v for v in values if v is not None}
        name = " = ".join(names)
        if len(known) == 1:
            name = f"{name} ({number(known.pop())} throughout)"
            constant.append(Curve(name, values, i, "dashed"))
        else:
            moving.append(Curve(name, values, i))
    return [*constant, *moving]


def _single(
    columns: Columns, key: str, title: str, unit: str, colour: int, name: str = "", **more: Any
) -> Iterator[Chart]:
    if columns.has(key):
        yield Chart(
            key.replace("/", "-"), title, unit, columns.steps,
            [columns.curve(key, name or key, colour)], **more,
        )  # fmt: skip


def _signal(columns: Columns) -> Iterator[Chart]:
    yield from _single(
        columns, "reward_std", "Spread of rewards over the rollout", "standard deviation", 3,
        note="Between groups and within them; where it is 0 there is nothing to learn from.",
        zero=True,
    )  # fmt: skip
    yield from _single(
        columns, "frac_reward_zero_std", "Groups without signal", "share of groups", 7,
        "all rewards of the group the same", zero=True,
    )  # fmt: skip


def _policy(columns: Columns, config: Mapping[str, Any], sampled: bool) -> Iterator[Chart]:
    if columns.has("kl"):
        note = "Measured on a few completions now and then: beta is 0." if sampled else ""
        curve = columns.curve("kl", "kl", 1, "points" if sampled else "noisy", joined=sampled)
        yield Chart(
            "kl", "KL to the reference policy", "nats a token", columns.steps, [curve], note=note,
            zero=True,
        )  # fmt: skip
    yield from _single(
        columns, "entropy", "Entropy of the policy", "nats a token", 2, zero=True
    )  # fmt: skip
    ratios = [
        columns.curve(key, name, colour)
        for key, name, colour in (
            ("clip_ratio/low_mean", "below", 0),
            ("clip_ratio/high_mean", "above", 1),
            ("clip_ratio/region_mean", "either", 4),
        )
        if columns.has(key)
    ]
    if ratios:
        yield Chart(
            "clipped", "Tokens whose ratio was clipped", "share of tokens", columns.steps, ratios,
            zero=True,
        )  # fmt: skip


def _lengths(columns: Columns) -> Iterator[Chart]:
    if columns.has("completions/mean_length"):
        curves = [columns.curve("completions/mean_length", "mean", 0)]
        bands = []
        if columns.has("completions/max_length") and columns.has("completions/min_length"):
            curves.append(columns.curve("completions/max_length", "longest", 0, "edge"))
            curves.append(columns.curve("completions/min_length", "shortest", 0, "edge"))
            bands = [(1, 2)]
        yield Chart(
            "length", "Length of the completions", "tokens", columns.steps, curves, bands=bands,
            zero=True, note="Filled: from the shortest to the longest." if bands else "",
        )  # fmt: skip
    yield from _single(
        columns, "completions/clipped_ratio", "Cut off by max_completion_length",
        "share of completions", 7, "cut off", zero=True,
    )  # fmt: skip


def _tools(columns: Columns) -> Iterator[Chart]:
    yield from _single(
        columns, "tools/call_frequency", "Calls of tools", "calls of a completion", 3, "calls",
        zero=True,
    )  # fmt: skip
    yield from _single(
        columns, "tools/failure_frequency", "Calls that were answered with an error",
        "share of calls", 7, "errors", zero=True,
    )  # fmt: skip


def _update(columns: Columns, config: Mapping[str, Any]) -> Iterator[Chart]:
    norms = series(columns.rows, "grad_norm")[1]
    limit = finite(config.get("max_grad_norm"))
    if norms:
        note, lines = "", {}
        if limit:
            clipped = sum(norm > limit for norm in norms) / len(norms)
            note = f"{clipped:.0%} of the steps were above max_grad_norm, and clipped to it."
            if max(norms) > 0.2 * limit:  # else the line would press the curve to the ground
                lines = {"max_grad_norm": limit}
        yield from _single(
            columns, "grad_norm", "Gradient norm before clipping", "L2 norm", 5, note=note,
            lines=lines, zero=True,
        )  # fmt: skip
    if columns.has("learning_rate"):
        curve = columns.curve("learning_rate", "learning_rate", 6, "plain")
        yield Chart("learning_rate", "Learning rate", "", columns.steps, [curve], zero=True)
    yield from _single(
        columns, "loss", "Loss", "", 4,
        note="Near 0 by design: advantages of a group add up to 0. It does not say whether the "
        "run learns.",
    )  # fmt: skip


def _cost(columns: Columns) -> Iterator[Chart]:
    curves = [
        columns.curve(f"time/{phase}", phase, colour)
        for phase, colour in PHASE_COLOURS.items()
        if columns.has(f"time/{phase}")
    ]
    if curves:
        yield Chart("time", "Time of a step", "seconds", columns.steps, curves, zero=True)
    yield from _single(
        columns, "tokens_per_second", "Completion tokens per second", "tokens / s", 2, zero=True
    )  # fmt: skip
    if columns.has("memory/peak"):
        gigabytes = [None if v is None else v / 1e9 for v in columns.values("memory/peak")]
        planned = series(columns.rows, "memory/planned")[1]
        yield Chart(
            "memory", "Peak memory of a step", "GB", columns.steps,
            [Curve("measured", gigabytes, 0, "plain")],
            lines={"planned": planned[-1] / 1e9} if planned else {}, zero=True,
        )  # fmt: skip
