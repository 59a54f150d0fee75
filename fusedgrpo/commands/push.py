"""``fusedgrpo push``: the weights of a run on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusedgrpo.commands.runs import find_trained
from fusedgrpo.errors import ConfigError


def push(
    run: Annotated[
        Path,
        typer.Argument(
            help="output_dir of a run, its adapter, a checkpoint, or a folder that export made."
        ),
    ],
    repo: Annotated[str, typer.Option(help="Repository on the Hub: ORGANISATION/NAME.")] = "",
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, if not main.")] = None,
) -> None:
    """Upload the adapter or the model of a run, with its README, to the Hugging Face Hub.

    The token is that of HF_TOKEN or of hf auth login.
    """
    from fusedgrpo.engine.hub import create, upload

    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ConfigError(f"--repo {repo!r}: expected ORGANISATION/NAME.")
    trained = find_trained(run)
    if not (trained.weights / "README.md").exists():
        typer.echo(f"{trained.weights} has no README.md: the page on the Hub will be empty.")
    typer.echo(f"Pushing {trained.said} to {repo} ...")
    name = create(repo, private=private, revision=revision)
    done = upload(trained.weights, name, message="Upload by fusedgrpo push", revision=revision)
    typer.echo(f"Pushed: {done}")
