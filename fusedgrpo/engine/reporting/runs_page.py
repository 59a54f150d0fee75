"""Several runs on one page: their differing options first, then how they came out, then curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fusedgrpo.engine.reporting import plots
from fusedgrpo.engine.reporting.formatting import number
from fusedgrpo.engine.reporting.judging import several
from fusedgrpo.engine.reporting.judging.findings import INTERVALS
from fusedgrpo.engine.reporting.judging.several import Run
from fusedgrpo.engine.reporting.judging.verdict import judge
from fusedgrpo.engine.reporting.metrics_log import reward_names
from fusedgrpo.engine.reporting.report import page

CURVES = {
    "reward": "Reward",
    "eval_reward": "Reward of evaluations",
    "kl": "KL to the reference, nats a token",
    "entropy": "Entropy, nats a token",
    "completions/mean_length": "Mean length, tokens",
    "frac_reward_zero_std": "Share of groups without signal",
}


def write_runs_page(paths: Sequence[Path], path: Path) -> Path:
    """Write the page. Raises DataError; see ``several.read_runs``."""
    runs = several.read_runs(paths)
    sections = [
        f"<h1>{len(runs)} runs</h1>",
        _options(runs),
        _outcomes(runs),
        _paired(runs),
        _curves(several.by_series(runs)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = page(f"fusedgrpo: {len(runs)} runs", "\n".join(sections))
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def cells(kind: str, values: Iterable[str]) -> str:
        return "".join(f"<{kind}>{escape(value)}</{kind}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="card wide"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def _options(runs: Sequence[Run]) -> str:
    found = several.differing(runs)
    if not found:
        return '<h2>Options</h2><p class="soft">All the same.</p>'
    rows = [[name, *map(_value, values)] for name, values in found.items()]
    return "<h2>Options that differ</h2>" + _table(["", *(run.name for run in runs)], rows)


def _outcomes(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        found = judge(run.rows, run.config, run.checks)
        steps = str(run.rows[-1]["step"])
        reward = number(several.last_value(run.rows, "reward"))
        reasons = found.reasons[0].text if found.reasons else ""
        rows.append([run.name, found.kind, f"{found.headline} {reasons}", steps, reward])
    head = ["run", "verdict", "", "steps", "last reward"]
    return "<h2>How they came out</h2>" + _table(head, rows)


def _paired(runs: Sequence[Run]) -> str:
    first, rows = runs[0], []
    for run in runs[1:]:
        if (found := several.difference(first, run)) is not None:
            verdict = "no difference beyond chance"
            if found.is_sure:
                verdict = "better" if found.size > 0 else "worse"
            size = f"{found.size:+.3f} ± {found.margin:.3f}"
            rows.append([run.name, size, str(found.prompts), verdict])
    if not rows:
        return ""
    return (
        f"<h2>On the same held-out prompts, against {escape(first.name)}</h2>"
        + _table(["run", "mean reward, difference", "prompts", ""], rows)
        + f'<p class="soft">The last greedy answers, prompt by prompt. {escape(INTERVALS)}</p>'
    )


def _curves(groups: Sequence[Sequence[Run]]) -> str:
    names = dict.fromkeys(
        name for group in groups for run in group for name in reward_names(run.rows)
    )
    parts = {f"rewards/{name}/mean": f"Reward of {name}" for name in names}
    wanted = CURVES | (parts if len(parts) > 1 else {})
    cards = []
    for key, title in wanted.items():
        if (image := _drawn(groups, key, title)) is not None:
            data = base64.b64encode(image).decode("ascii")
            cards.append(
                f'<div class="card"><img alt="{escape(title)}" '
                f'src="data:image/png;base64,{data}"></div>'
            )
    words = "Means over a tenth of a run; of runs that differ in their seed alone the mean, with a "
    words += "band of one standard deviation."
    return (
        f'<h2>Curves</h2><p class="soft">{words}</p><div class="plots">{"".join(cards)}</div>'
        if cards
        else ""
    )


def _drawn(groups: Sequence[Sequence[Run]], key: str, title: str) -> bytes | None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        drawn = False
        for i, group in enumerate(groups):
            if (found := several.band(group, key, plots.smooth)) is None:
                continue
            drawn, colour = True, plots.COLOURS[i % len(plots.COLOURS)]
            label = group[0].name + (
                f", and {len(group) - 1} with other seeds" if group[1:] else ""
            )
            axes.plot(found.steps, found.mean, color=colour, label=label)
            if group[1:]:
                edges = list(zip(found.mean, found.spread, strict=True))
                axes.fill_between(
                    found.steps,
                    [m - s for m, s in edges],
                    [m + s for m, s in edges],
                    color=colour, alpha=0.2, linewidth=0,
                )  # fmt: skip
        if not drawn:
            return None
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.legend()
        file = io.BytesIO()
        FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _value(value: Any) -> str:
    return "-" if value is None else str(value)
