"""``fusedgrpo tasks``: what there is to train on out of the box."""

from __future__ import annotations

from typing import Annotated

import typer

from fusedgrpo.errors import ConfigError, did_you_mean

EXAMPLES = 2
WIDTH = 300  # characters of an example


def tasks(
    name: Annotated[str | None, typer.Argument(help="A task; else all of them.")] = None,
) -> None:
    """List the tasks of reasoning-gym, or one's options and examples.

    They are data and reward in one: dataset: reasoning_gym:NAME.
    """
    from fusedgrpo import tasks as gym

    known = gym.registered()
    if name is not None:
        typer.echo(_one(name.removeprefix(gym.PREFIX), known))
        return
    by_kind: dict[str, list[str]] = {}
    for task, options in known.items():
        # reasoning_gym.arithmetic.chain_sum
        by_kind.setdefault(options.__module__.split(".")[1], []).append(task)
    for kind, names in sorted(by_kind.items()):
        typer.echo(f"{kind}: {', '.join(sorted(names))}")
    typer.echo(
        f"{len(known)} tasks. Options and examples of one: fusedgrpo tasks NAME. To train on two, "
        f"twice as often on the first: dataset: {gym.PREFIX}chain_sum*2+gcd"
    )


def _one(task: str, known: dict[str, object]) -> str:
    from fusedgrpo import tasks as gym
    from fusedgrpo.engine.reporting.formatting import shorten

    if task not in known:
        raise ConfigError(f"There is no task {task!r}.{did_you_mean(task, known)}")
    lines = [f"dataset: {gym.PREFIX}{task}", "task_options:", f"  {task}:"]
    lines += [f"    {key}: {value}" for key, value in gym.difficulty_of(task).items()]
    options = {"size": EXAMPLES, "seed": 0}
    for row in gym.task_rows(f"{gym.PREFIX}{task}", options, held_out=False, messages=False):
        lines += ["", shorten(row["prompt"], WIDTH), f"-> {shorten(row['answer'], WIDTH)}"]
    return "\n".join(lines)
