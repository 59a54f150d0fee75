"""``fusedgrpo push``: the weights of a run on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusedgrpo.commands.runs import find_trained
from fusedgrpo.errors import ConfigError, FusedGRPOError, reason

# Everything else in the folder goes up: weights, settings, tokenizer, README.md.
_NOT_PUSHED = ["*.tmp", ".*", "optimizer.safetensors"]


class PushError(FusedGRPOError):
    """The Hub has not taken the weights."""


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
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ConfigError(f"--repo {repo!r}: expected ORGANISATION/NAME.")
    trained = find_trained(run)
    if not (trained.weights / "README.md").exists():
        typer.echo(f"{trained.weights} has no README.md: the page on the Hub will be empty.")
    typer.echo(f"Pushing {trained.said} to {repo} ...")
    typer.echo(f"Pushed: {upload(trained.weights, repo, private=private, revision=revision)}")


def upload(folder: Path, repo: str, *, private: bool, revision: str | None = None) -> str:
    """Make the repository, if it is not there, and upload ``folder``; returns the address. Raises
    PushError."""
    from huggingface_hub import HfApi

    api: Any = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message="Upload by fusedgrpo push",
            ignore_patterns=_NOT_PUSHED,
        )
    except Exception as error:  # whatever its HTTP library raises comes through
        raise PushError(
            f"The Hub has not taken {folder}: {reason(error)} Is there a token that may write to "
            f"{repo} (HF_TOKEN, or hf auth login)?"
        ) from error
    return str(done)
