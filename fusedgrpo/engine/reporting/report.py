"""``report.html``: one file that says whether the run learned, and shows from what one can tell.

Made from the files of the run's directory alone, so it can be written again at any time, also while
the run goes on. It holds all that it shows and asks the network for nothing.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import fusedgrpo
from fusedgrpo.engine.reporting import plots
from fusedgrpo.engine.reporting.advisor import all_advice
from fusedgrpo.engine.reporting.completions_log import completion_text, prompt_text, scores_of
from fusedgrpo.engine.reporting.completions_reader import Completions, Scores
from fusedgrpo.engine.reporting.formatting import gigabytes, number, quantity
from fusedgrpo.engine.reporting.held_out_log import Checks, check_rows
from fusedgrpo.engine.reporting.judging.findings import INTERVALS, when
from fusedgrpo.engine.reporting.judging.prompts import compared, counts
from fusedgrpo.engine.reporting.judging.verdict import judge
from fusedgrpo.engine.reporting.looks import (
    bounds_reached,
    memory_split,
    prompt_outcomes,
    telling_groups,
    time_split,
)
from fusedgrpo.engine.reporting.metrics_log import Row, reward_names, series, trend
from fusedgrpo.engine.reporting.page.charts import PHASE_COLOURS, length_charts, run_charts
from fusedgrpo.engine.reporting.page.figures import completion_figures
from fusedgrpo.engine.reporting.page.header import bound_line, described, memory_table
from fusedgrpo.engine.reporting.page.render import render, write_page
from fusedgrpo.engine.reporting.page.tokens import coloured
from fusedgrpo.engine.reporting.recorded_run import RecordedRun
from fusedgrpo.engine.reporting.run_record import newest_session

SHOWN = 4  # completions of the first and of the last rollout
PAIRS = 6  # held-out prompts, those that changed first
FOLDED = 24  # more of them
CHANGED = 12  # prompts of the training data that came again
RELOADS = 30  # seconds, of a page whose run goes on


def write_report(
    run_dir: str | Path,
    path: str | Path | None = None,
    *,
    live: bool = False,
    pictures: bool = True,
) -> Path:
    """Write the report of the run in ``run_dir``, to ``run_dir/report.html`` unless told otherwise.

    live: the run goes on, and the page loads itself again. pictures: draw ``run_dir/plots`` anew,
    and have them in the page for browsers without scripts; that takes seconds.

    Raises:
        DataError: there is no metrics.jsonl in ``run_dir``, or no row in it.
    """
    run = RecordedRun.read(run_dir)
    path = Path(path) if path is not None else Path(run_dir) / "report.html"
    scores = run.completions.scores
    drawn = []
    if pictures:
        plot_dir = Path(run_dir) / "plots"
        drawn = plots.write_plots(run.rows, plot_dir, scores=scores, config=run.config)
    verdict = judge(run.rows, run.config, run.checks, scores)
    charts, others = run_charts(
        run.rows, run.config, check_rows(run.checks), kl_is_sampled=run.kl_is_sampled
    )
    charts += length_charts(scores)
    context: dict[str, Any] = {
        "name": run.path.name,
        "summary": _summary(run),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "written_with": f"Written with fusedgrpo {fusedgrpo.__version__}.",
        "verdict": verdict,
        "intervals": INTERVALS,
        "advice": all_advice(run.rows, run.config, {reason.key for reason in verdict.reasons}),
        "facts": described(run.facts, run.rows),
        "charts": charts,
        "others": others,
        "images": [(plots.PLOTS[picture.stem][0], _inlined(picture)) for picture in drawn],
        "held_out": _held_out(run.checks),
        "figures": completion_figures(scores, run.rows),
        "telling": _telling(run.completions),
        "asked_again": _asked_again(scores),
        "coloured": coloured(run.drift),
        "cost": _cost(run),
        "ends": _ends(run.rows),
        "samples": _samples(run.completions),
        "config": run.config,
        "completion_text": completion_text,
        "scores_of": scores_of,
        "prompt_text": prompt_text,
        "when": when,
    }
    parts = {
        "advice": "Advice", "facts": "The run", "charts": "Curves", "held_out": "Held-out prompts",
        "figures": "What was rewarded", "coloured": "Tokens", "cost": "Time and memory",
        "ends": "First and last", "samples": "Completions", "config": "Options",
    }  # fmt: skip
    ids = {"charts": "curves", "held_out": "held-out", "figures": "completions"}
    ids |= {"config": "options", "coloured": "tokens"}
    text = render(
        "report.html.j2",
        title=f"fusedgrpo: {run.path.name}",
        parts=[("top", "Verdict")]
        + [(ids.get(key, key), name) for key, name in parts.items() if context[key]],
        live_seconds=RELOADS if live else None,
        **context,
    )
    write_page(path, text)
    return path


def _inlined(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode('ascii')}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _summary(run: RecordedRun) -> str:
    facts = [
        str(run.config[key]) for key in ("model_name_or_path", "dataset") if run.config.get(key)
    ]
    facts.append(quantity(run.rows[-1]["step"], "step"))
    how = newest_session(run.facts).get("how")
    if how not in (None, "finished"):
        facts.append(str(how))
    if seconds := sum(series(run.rows, "step_time")[1]):
        facts.append(_duration(seconds))
    return " · ".join(facts)


def _held_out(checks: Checks) -> dict[str, Any] | None:
    """None where there are not two checks with a prompt in common."""
    prompts = compared(checks)
    if not prompts:
        return None
    words = ", ".join(f"{count} {status}" for status, count in counts(prompts).items())
    return {
        "words": f"The most likely answer to each of {quantity(len(prompts), 'prompt')}, "
        f"step {min(checks)} and step {max(checks)}: {words}.",
        "shown": prompts[:PAIRS],
        "folded": prompts[PAIRS : PAIRS + FOLDED],
        "more": len(prompts) - PAIRS - FOLDED,
    }


def _ends(rows: Sequence[Row]) -> list[list[str]]:
    keys = [
        "reward",
        *(f"rewards/{name}/mean" for name in reward_names(rows)),
        "reward_std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "kl",
        "entropy",
        "clip_ratio/region_mean",
        "grad_norm",
        "tokens_per_second",
        *sorted({key for row in rows for key in row if key.startswith("eval_")}),
    ]
    lines = []
    for key in keys:
        _, values = series(rows, key)
        ends = trend(values)
        if ends is not None:
            lines.append([key, number(ends.first), number(ends.last), f"{ends.noise:.2g}"])
        elif values:
            lines.append([key, number(values[0]), number(values[-1]), ""])
    return lines


def _telling(completions: Completions) -> list[tuple[str, list[dict[str, Any]]]]:
    """Headings and records of groups worth reading."""
    found = telling_groups(completions)
    named = {"Best": found.best, "Worst": found.worst, "Most divided": found.divided}
    return [
        (f"{name} group, step {group.step}: mean reward {number(group.mean)}", group.records)
        for name, group in named.items()
        if group is not None
    ]


def _asked_again(scores: Scores) -> dict[str, Any] | None:
    """How prompts of the training data fared that came more than once; None if none did."""
    found = prompt_outcomes(scores)
    if not found.prompts:
        return None
    counts = ", ".join(f"{count} {status}" for status, count in found.counts.items())
    changed = [
        [
            f"row {one.row}", one.status, f"{number(one.before)} (step {one.first})",
            f"{number(one.after)} (step {one.last})",
        ]
        for one in found.changed[:CHANGED]
    ]  # fmt: skip
    asked = f"{quantity(found.prompts, 'prompt')} {'was' if found.prompts == 1 else 'were'} asked"
    return {
        "words": f"{asked} at least twice, the first time against the "
        f"last: {counts}; {found.half} neither solved nor without any reward both times.",
        "changed": changed,
    }


def _cost(run: RecordedRun) -> dict[str, Any] | None:
    rows, split, memory = run.rows, time_split(run.rows), memory_split(run.rows)
    time_parts: list[dict[str, Any]] = []
    for i, (phase, share) in enumerate(zip(split.phases, split.shares.tolist(), strict=True)):
        words = f"{phase} {_duration(split.seconds[i])} ({share:.0%})"
        begin = float(split.shares[:i].sum())
        colour = PHASE_COLOURS[phase]
        time_parts.append({"colour": colour, "begin": begin, "share": share, "words": words})
    lines = []
    if memory.peak is not None:
        planned = f", {memory.of_plan:.0%} of what was planned" if memory.of_plan else ""
        lines.append(f"Peak memory: {gigabytes(memory.peak)}{planned}.")
    if memory.retries:
        again = quantity(memory.retries, "time")
        lines.append(f"Work that did not fit was done again in parts: {again}.")
    if speeds := series(rows, "tokens_per_second")[1]:
        lines.append(f"Completion tokens per second: {sum(speeds) / len(speeds):.0f} on average.")
    if words := bound_line(run.facts, bounds_reached(rows)):
        lines.append(words)
    if not (time_parts or lines):
        return None
    return {"time": time_parts, "lines": lines, "memory": memory_table(run.facts)}


def _samples(completions: Completions) -> list[tuple[int, list[list[dict[str, Any]]]]]:
    """Some groups of the first and of the last rollout, with their steps."""
    steps = completions.steps
    found = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        records = completions.read(step)[:SHOWN]
        groups = [list(g) for _, g in groupby(records, key=lambda record: record.get("group"))]
        if groups:
            found.append((step, groups))
    return found
