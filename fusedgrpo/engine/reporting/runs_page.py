"""Several runs on one page: their differing options first, then how they came out, then curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusedgrpo.engine.reporting import plots
from fusedgrpo.engine.reporting.formatting import number, quantity
from fusedgrpo.engine.reporting.judging import several
from fusedgrpo.engine.reporting.judging.findings import INTERVALS
from fusedgrpo.engine.reporting.judging.several import Run
from fusedgrpo.engine.reporting.judging.verdict import judge
from fusedgrpo.engine.reporting.metrics_log import reward_names, series
from fusedgrpo.engine.reporting.page.chart import Chart, Curve
from fusedgrpo.engine.reporting.page.render import render, write_page

Known = tuple[list[int], Curve]  # the steps that a curve has values at, and it

CURVES = {
    "reward": ("Reward", "weighted sum, mean over completions"),
    "eval_reward": ("Reward of evaluations", "mean over completions"),
    "kl": ("KL to the reference", "nats a token"),
    "entropy": ("Entropy", "nats a token"),
    "completions/mean_length": ("Mean length", "tokens"),
    "frac_reward_zero_std": ("Groups without signal", "share of groups"),
}


def write_runs_page(paths: Sequence[Path], path: Path) -> Path:
    """Write the page. Raises DataError; see ``several.read_runs``."""
    runs = several.read_runs(paths)
    groups = several.by_series(runs)
    charts = list(_charts(groups))
    paired = list(_paired(runs))
    parts = [("top", "Runs"), ("differ", "Options"), ("outcomes", "Outcomes")]
    parts += [("paired", "Held-out prompts")] * bool(paired) + [("curves", "Curves")] * bool(charts)
    text = render(
        "runs.html.j2",
        title=f"fusedgrpo: {quantity(len(runs), 'run')}",
        parts=parts,
        charts=charts,
        runs=[run.name for run in runs],
        differing=[
            [name, *map(_value, values)] for name, values in several.differing(runs).items()
        ],
        outcomes=list(_outcomes(runs)),
        paired=paired,
        intervals=INTERVALS,
        series=any(group[1:] for group in groups),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, text)
    return path


def _outcomes(runs: Sequence[Run]) -> Iterator[list[str]]:
    for run in runs:
        found = judge(run.rows, run.config, run.checks, run.completions.scores)
        steps = str(run.rows[-1]["step"])
        reward = number(several.last_value(run.rows, "reward"))
        reasons = found.reasons[0].text if found.reasons else ""
        yield [run.name, found.kind, f"{found.headline} {reasons}", steps, reward]


def _paired(runs: Sequence[Run]) -> Iterator[list[str]]:
    first = runs[0]
    for run in runs[1:]:
        if (found := several.difference(first, run)) is not None:
            verdict = "no difference beyond chance"
            if found.is_sure:
                verdict = "better" if found.size > 0 else "worse"
            size = f"{found.size:+.3f} ± {found.margin:.3f}"
            yield [run.name, size, str(found.prompts), verdict]


def _charts(groups: Sequence[Sequence[Run]]) -> Iterator[Chart]:
    names = dict.fromkeys(
        name for group in groups for run in group for name in reward_names(run.rows)
    )
    parts = {f"rewards/{n}/mean": (f"Reward of {n}", "mean over completions") for n in names}
    wanted = CURVES | (parts if len(parts) > 1 else {})
    for i, (key, (title, unit)) in enumerate(wanted.items()):
        curves = _told_apart([_curves(group, key, colour) for colour, group in enumerate(groups)])
        steps = sorted({step for of_group in curves for known, _ in of_group for step in known})
        if not steps:
            continue
        drawn: list[Curve] = []
        bands = []
        for of_group in curves:
            if len(of_group) == 3:
                bands.append((len(drawn) + 1, len(drawn) + 2))
            drawn += [_at(steps, known, curve) for known, curve in of_group]
        yield Chart(f"runs-{i}", title, unit, steps, drawn, bands=bands)


def _told_apart(curves: Sequence[list[Known]]) -> list[list[Known]]:
    """Curves that are the same are one, with all their names, so that none hides another."""
    found: list[list[Known]] = []
    for of_group in curves:
        steps_and_values = [(steps, curve.values) for steps, curve in of_group]
        for i, other in enumerate(found):
            if of_group and [(steps, curve.values) for steps, curve in other] == steps_and_values:
                names = f"{other[0][1].name} = {of_group[0][1].name}"
                found[i] = [(other[0][0], replace(other[0][1], name=names)), *other[1:]]
                break
        else:
            found.append(of_group)
    return found


def _curves(group: Sequence[Run], key: str, colour: int) -> list[Known]:
    """The steps and the curve of a run; of several their mean and the edges of their band."""
    colour %= len(plots.COLOURS)
    if not group[1:]:
        steps, values = series(group[0].rows, key)
        kind = "points" if key.startswith("eval_") else "noisy"
        return [(steps, Curve(group[0].name, values, colour, kind))] if steps else []  # type: ignore[arg-type]
    found = several.band(group, key, plots.smooth)
    if found is None:
        return []
    name = f"{group[0].name}, and {len(group) - 1} with other seeds"
    edges = list(zip(found.mean, found.spread, strict=True))
    return [
        (found.steps, Curve(name, found.mean, colour, "plain")),
        (found.steps, Curve(f"{name}, +1 sd", [m + s for m, s in edges], colour, "edge")),
        (found.steps, Curve(f"{name}, -1 sd", [m - s for m, s in edges], colour, "edge")),
    ]


def _at(steps: Sequence[int], known: Sequence[int], curve: Curve) -> Curve:
    """The curve at all of ``steps``, whose gaps are drawn over."""
    values = dict(zip(known, curve.values, strict=True))
    return replace(curve, values=[values.get(step) for step in steps], joined=True)


def _value(value: Any) -> str:
    return "-" if value is None else str(value)
