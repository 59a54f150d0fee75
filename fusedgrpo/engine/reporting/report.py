"""``report.html``: one file that says whether the run learned, and shows from what one can tell.

Made from the files of the run's directory alone, so it can be written again at any time. It holds
its pictures inside and asks the network for nothing.
"""

from __future__ import annotations

import base64
import platform
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from fusedgrpo import host
from fusedgrpo.engine.reporting import held_out_section as held_out
from fusedgrpo.engine.reporting import plots
from fusedgrpo.engine.reporting.advisor import all_advice
from fusedgrpo.engine.reporting.completions_log import prompt_text, scores_of
from fusedgrpo.engine.reporting.completions_reader import first_and_last
from fusedgrpo.engine.reporting.formatting import gigabytes, number
from fusedgrpo.engine.reporting.held_out_log import read_checks
from fusedgrpo.engine.reporting.judging.findings import INTERVALS, Finding
from fusedgrpo.engine.reporting.judging.verdict import Verdict, judge
from fusedgrpo.engine.reporting.metrics_log import (
    Row,
    read_metrics,
    reward_names,
    series,
    trend,
)
from fusedgrpo.errors import DataError

PACKAGES = ("fusedgrpo", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton")
SHOWN = 4  # completions of the first and of the last rollout

STYLE = """
:root { --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --page: #f8fafc; }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
main { max-width: 1100px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 18px; margin: 36px 0 12px }
.soft { color: var(--soft) }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px }
.verdict { margin-top: 20px; border-left: 6px solid #94a3b8; font-size: 17px }
.verdict.green { border-left-color: #059669 } .verdict.red { border-left-color: #dc2626 }
.verdict.amber { border-left-color: #d97706 }
.verdict p { margin: 4px 0 } .verdict .soft, .verdict summary { font-size: 15px }
.verdict ul { margin: 6px 0; padding-left: 22px; font-size: 15px }
.verdict .bad::marker { color: #dc2626 } .verdict .warning::marker { color: #d97706 }
.verdict .good::marker { color: #059669 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px }
.plots img { width: 100%; display: block }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: 6px 12px; border-bottom: 1px solid var(--line) }
th { font-weight: 600; color: var(--soft) }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 0;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace }
.sample { margin-bottom: 12px } .tag { display: inline-block; margin-right: 14px }
.said { margin-top: 12px; padding-left: 14px; border-left: 3px solid #93c5fd }
.said pre { max-height: 340px; overflow-y: auto; margin: 0 0 4px }
.bar { display: flex; height: 22px; border-radius: 6px; overflow: hidden; margin: 8px 0 }
summary { cursor: pointer; font-weight: 600 }
@media (max-width: 520px) { .plots { grid-template-columns: 1fr } }
"""


def write_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of the run in ``run_dir``, to ``run_dir/report.html`` unless told otherwise.

    Draws ``run_dir/plots`` anew on the way.

    Raises:
        DataError: there is no metrics.jsonl in ``run_dir``, or no row in it.
    """
    run_dir = Path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    if not rows:
        raise DataError(
            f"{str(metrics)!r} has no rows: nothing to report on. Is this a run's output_dir?"
        )
    config = _read_config(run_dir / "config.resolved.yaml")
    checks = read_checks(run_dir / "held_out")
    path = Path(path) if path is not None else run_dir / "report.html"
    found = judge(rows, config, checks)
    keys = {reason.key for reason in found.reasons}
    sections = [
        _head(run_dir, rows, config),
        _verdict_card(found),
        _advice(all_advice(rows, config, keys)),
        _plots(plots.write_plots(rows, run_dir / "plots")),
        held_out.held_out_section(checks),
        _first_and_last(rows),
        _cost(rows),
        _samples(first_and_last(run_dir / "completions")),
        _config(config),
        _versions(),
    ]
    text = page(f"fusedgrpo: {run_dir.resolve().name}", "\n".join(sections))
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    if not path.exists():
        return {}
    config = yaml.safe_load(path.read_text("utf-8"))
    return config if isinstance(config, dict) else {}


def page(title: str, body: str) -> str:
    """A whole page around ``body``, which asks the network for nothing."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{STYLE}{held_out.STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _head(run_dir: Path, rows: Sequence[Row], config: Mapping[str, Any]) -> str:
    facts = [str(config[key]) for key in ("model_name_or_path", "dataset") if config.get(key)]
    facts.append(f"{rows[-1]['step']} steps")
    if seconds := sum(series(rows, "step_time")[1]):
        facts.append(_duration(seconds))
    return (
        f"<h1>{escape(run_dir.resolve().name)}</h1>"
        f'<div class="soft">{escape(" · ".join(facts))}</div>'
    )


def _verdict_card(found: Verdict) -> str:
    """The verdict, with what it rests on and what to do; what is only good to know is folded."""
    decisive = [reason for reason in found.reasons if reason.level != "note"]
    rest = [reason for reason in found.reasons if reason.level == "note"]
    parts = [f"<p><b>{escape(found.headline)}</b></p>", _reasons(decisive)]
    if rest:
        parts.append(f"<details><summary>Also seen</summary>{_reasons(rest)}</details>")
    parts.append(f'<p class="soft">{escape(INTERVALS)}</p>')
    return f'<div class="card verdict {found.kind}">{"".join(parts)}</div>'


def _reasons(reasons: Sequence[Finding]) -> str:
    items = []
    for reason in reasons:
        todo = " ".join(
            [reason.advice, *(f"{name}: {value:g}." for name, value in reason.change.items())]
        )
        advice = f'<div class="soft">{escape(todo)}</div>' if todo.strip() else ""
        items.append(f'<li class="{reason.level}">{escape(reason.text)}{advice}</li>')
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _advice(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<h2>Worth knowing</h2><ul class="card" style="padding-left: 40px">{items}</ul>'


def _plots(paths: Sequence[Path]) -> str:
    cards = []
    for path in paths:
        title, *_ = plots.PLOTS[path.stem]
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        cards.append(f'<div class="card">{image}</div>')
    return f'<h2>Curves</h2><div class="plots">{"".join(cards)}</div>' if cards else ""


def _first_and_last(rows: Sequence[Row]) -> str:
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
            first, last, noise = number(ends.first), number(ends.last), f"{ends.noise:.2g}"
        elif values:
            first, last, noise = number(values[0]), number(values[-1]), ""
        else:
            continue
        lines.append(
            f'<tr><td>{escape(key)}</td><td class="n">{first}</td><td class="n">{last}</td>'
            f'<td class="n">{noise}</td></tr>'
        )
    return (
        '<h2>First and last</h2><div class="card wide"><table><tr><th>metric</th>'
        '<th class="n">first</th><th class="n">last</th><th class="n">noise of the change</th>'
        f"</tr>{''.join(lines)}</table><p class='soft'>Means over the first and the last tenth of "
        "the steps, 5 at least; single values where there are fewer than 10.</p></div>"
    )


def _cost(rows: Sequence[Row]) -> str:
    seconds = {name: sum(series(rows, f"time/{name}")[1]) for name in plots.PHASES}
    total = sum(seconds.values())
    parts = []
    if total > 0:
        bar = "".join(
            f'<div style="width: {100 * value / total:.2f}%; background: {plots.PHASE_COLOURS[i]}">'
            "</div>"
            for i, value in enumerate(seconds.values())
        )
        words = " ".join(
            f'<span class="tag"><b style="color: {plots.PHASE_COLOURS[i]}">{name}</b> '
            f"{_duration(value)} ({value / total:.0%})</span>"
            for i, (name, value) in enumerate(seconds.items())
        )
        parts.append(f'<div class="bar">{bar}</div>{words}')
    _, peaks = series(rows, "memory/peak")
    if peaks:
        parts.append(f"<p>Peak memory: {gigabytes(max(peaks))}.</p>")
    _, speeds = series(rows, "tokens_per_second")
    if speeds:
        parts.append(
            f"<p>Completion tokens per second: {sum(speeds) / len(speeds):.0f} on average.</p>"
        )
    if not parts:
        return ""
    return f'<h2>Time and memory</h2><div class="card">{"".join(parts)}</div>'


def _samples(rollouts: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    blocks = []
    for records in rollouts:
        if records:
            blocks.append(f"<h2>Completions of step {escape(str(records[0].get('step')))}</h2>")
        for _, group in groupby(records[:SHOWN], key=lambda record: record.get("group")):
            blocks.append(_group(list(group)))
    return "".join(blocks)


def _group(records: Sequence[Mapping[str, Any]]) -> str:
    """A prompt and what was said to it, each with its rewards."""
    first = records[0]
    parts = [
        f'<div class="soft">row {escape(str(first.get("row")))}</div>'
        f"<pre>{escape(prompt_text(first.get('prompt') or ''))}</pre>"
    ]
    for record in records:
        tags = [f"{name} {number(value)}" for name, value in scores_of(record).items()]
        tags += [f"{record.get('length')} tokens", f"ended by {record.get('finish_reason')}"]
        parts.append(
            f'<div class="said"><pre>{escape(str(record.get("completion")))}</pre>'
            '<div class="soft">'
            + "".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags)
            + "</div></div>"
        )
    return f'<div class="card sample">{"".join(parts)}</div>'


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    lines = "\n".join(f"{key}: {value}" for key, value in config.items())
    return (
        '<h2>Configuration</h2><details class="card"><summary>config.resolved.yaml</summary>'
        f"<pre>{escape(lines)}</pre></details>"
    )


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        if version := host.package_version(package):
            found.append(f"{package} {version}")
    found.append(platform.platform())
    return f'<p class="soft">Written with {escape(", ".join(found))}.</p>'
