"""``fusedgrpo show``: what a run's policy said, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from fusedgrpo.errors import ConfigError

WIDTH = 60  # characters of a prompt in a list


def show(
    run: Annotated[Path, typer.Argument(help="output_dir of a run.")],
    step: Annotated[
        int | None, typer.Option(help="The rollout that this step trained on; else the last.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="One prompt of it, by its number in the list.")
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option("--held_out", help="Held-out prompts instead, before training and after."),
    ] = False,
    evaluated: Annotated[
        bool,
        typer.Option("--evaluated", help="The evaluation that the step had, or one before it."),
    ] = False,
) -> None:
    """Show completions of a run: a line for each prompt of a rollout, or all answers to one."""
    if held_out and evaluated:
        raise ConfigError("--held_out, --evaluated: one at a time.")
    if held_out and step is not None:
        raise ConfigError("--step: --held_out compares the first check with the last.")
    folder = "eval_completions" if evaluated else "completions"
    lines = _held_out(run, prompt) if held_out else _sampled(run, folder, step, prompt)
    typer.echo("\n".join(lines))


# Folder -> what is in it; who has one.
_KINDS = {
    "completions": ("rollout", "name the output_dir of a run"),
    "eval_completions": ("evaluation", "a run has one that evaluates (eval_strategy)"),
}


def _sampled(run: Path, folder: str, step: int | None, prompt: int | None) -> list[str]:
    from fusedgrpo.engine.reporting.completions_reader import Completions
    from fusedgrpo.engine.reporting.formatting import quantity

    kind, advice = _KINDS[folder]
    found = Completions(run / folder)
    if not found.steps:
        raise ConfigError(f"{run}: has no {folder}/; {advice}.")
    first, last = found.steps[0], found.steps[-1]
    at = [number for number in found.steps if step is None or number <= step]
    if not at:
        raise ConfigError(f"--step {step}: the first {kind} is that of step {first}.")
    records = found.read(at[-1])
    groups = [
        list(group) for _, group in groupby(records, key=lambda r: (r.get("set"), r.get("group")))
    ]
    counts = f"{quantity(len(groups), 'prompt')}, {quantity(len(records), 'completion')}"
    head = f"step {at[-1]} of {last}: {counts}"
    if prompt is None:
        return [head, *(_line(i, group) for i, group in enumerate(groups))]
    return [head, *_answers(_chosen(groups, prompt))]


def _line(number: int, group: Sequence[Mapping[str, Any]]) -> str:
    from fusedgrpo.engine.reporting.formatting import escaped
    from fusedgrpo.engine.reporting.formatting import number as shown

    rewards = _numbers(group, "reward")
    mean = sum(rewards) / len(rewards) if rewards else None
    spread = f"{min(rewards):.3g} to {max(rewards):.3g}" if rewards else "no reward"
    of_set = f"{escaped(name)}: " if isinstance(name := group[0].get("set"), str) and name else ""
    return f"{number:>4}  reward {shown(mean):>6} ({spread})  {of_set}{_prompt(group[0], WIDTH)}"


def _answers(group: Sequence[Mapping[str, Any]]) -> list[str]:
    """All answers to a prompt, the best first."""
    from fusedgrpo.engine.reporting.metrics_log import finite

    ordered = sorted(group, key=lambda record: -(finite(record.get("reward")) or 0.0))
    lines = ["", _prompt(group[0], None)]
    for record in ordered:
        lines += ["", f"--- {_scores(record)}", _text(record)]
    return lines


def _held_out(run: Path, prompt: int | None) -> list[str]:
    from fusedgrpo.engine.reporting.formatting import quantity
    from fusedgrpo.engine.reporting.held_out_log import read_checks
    from fusedgrpo.engine.reporting.judging.prompts import compared, counts

    checks = read_checks(run / "held_out")
    if not checks:
        raise ConfigError(
            f"{run}: has no held_out/: a run has one that was given an eval_dataset or a val_size."
        )
    prompts = compared(checks)
    if not prompts:
        raise ConfigError(f"{run}: only step {min(checks)} was checked, there is no after yet.")
    words = ", ".join(f"{count} {status}" for status, count in counts(prompts).items())
    count = quantity(len(prompts), "prompt")
    head = f"step {min(checks)} against step {max(checks)}: {count}, {words}"
    if prompt is None:
        return [
            head,
            *(
                f"{i:>4}  {one.status:<12}  {_prompt(one.after, WIDTH)}"
                for i, one in enumerate(prompts)
            ),
        ]
    one = _chosen(prompts, prompt)
    lines = [head, "", _prompt(one.after, None)]
    for when, record in (("before", one.before), ("after", one.after)):
        lines += ["", f"--- {when}: {_scores(record)}", _text(record)]
    return lines


def _chosen(among: Sequence[Any], number: int) -> Any:
    if not 0 <= number < len(among):
        raise ConfigError(f"--prompt {number}: there are 0 to {len(among) - 1}.")
    return among[number]


def _numbers(group: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    from fusedgrpo.engine.reporting.metrics_log import finite

    return [value for record in group if (value := finite(record.get(key))) is not None]


def _scores(record: Mapping[str, Any]) -> str:
    from fusedgrpo.engine.reporting.completions_log import scores_of
    from fusedgrpo.engine.reporting.formatting import escaped, number, quantity

    words = [f"{name} {number(value)}" for name, value in scores_of(record).items()]
    if isinstance(length := record.get("length"), int):
        words.append(quantity(length, "token"))
    return escaped(", ".join([*words, str(record.get("finish_reason"))]))


def _prompt(record: Mapping[str, Any], width: int | None) -> str:
    from fusedgrpo.engine.reporting.completions_log import prompt_text
    from fusedgrpo.engine.reporting.formatting import escaped, printable, shorten

    prompt = record.get("prompt")
    if width is None:
        return printable(prompt_text(prompt))
    last = prompt_text(prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        last = str(prompt[-1].get("content"))
    return escaped(shorten(" ".join(last.split()), width))


def _text(record: Mapping[str, Any]) -> str:
    from fusedgrpo.engine.reporting.completions_log import completion_text
    from fusedgrpo.engine.reporting.formatting import printable

    return printable(completion_text(record))
