"""The Hugging Face Hub: a repository for the result of a run, and uploads to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedgrpo.errors import FusedGRPOError, reason

# Everything else in a folder goes up: weights, settings, tokenizer, README.md.
_NOT_PUSHED = ["*.tmp", ".*", "optimizer.safetensors"]
# A checkpoint goes up whole: a run goes on from it.
_NOT_PUSHED_OF_A_CHECKPOINT = ["*.tmp", ".*"]


class HubError(FusedGRPOError):
    """The Hub has not taken what it was given."""


def create(
    repo: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """Make the repository ``repo``, and its branch ``revision``, if they are not there; returns the
    full name. token: else that of HF_TOKEN or of the login. Raises HubError."""
    from huggingface_hub import HfApi

    hub: Any = HfApi()
    try:
        name = str(hub.create_repo(repo, token=token, private=private, exist_ok=True).repo_id)
        if revision:
            hub.create_branch(name, branch=revision, token=token, exist_ok=True)
    except Exception as error:  # whatever its HTTP library raises comes through
        raise _refused(f"the repository {repo}", repo, error) from error
    return name


def upload(
    folder: Path,
    repo: str,
    *,
    message: str,
    token: str | None = None,
    revision: str | None = None,
    path_in_repo: str | None = None,
    blocking: bool = True,
) -> Any:
    """Put the files of ``folder`` into ``repo``, below ``path_in_repo`` if it is given; returns
    what ``HfApi.upload_folder`` does: where they are, or a future. Raises HubError."""
    from huggingface_hub import HfApi

    hub: Any = HfApi()
    try:
        return hub.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            path_in_repo=path_in_repo,
            commit_message=message,
            token=token,
            revision=revision,
            run_as_future=not blocking,
            ignore_patterns=_NOT_PUSHED if path_in_repo is None else _NOT_PUSHED_OF_A_CHECKPOINT,
        )
    except Exception as error:  # as above
        raise _refused(str(folder), repo, error) from error


def _refused(what: str, repo: str, error: Exception) -> HubError:
    return HubError(
        f"The Hub has not taken {what}: {reason(error).rstrip('.')}. Is there a token that may "
        f"write to {repo} (HF_TOKEN, hub_token, or hf auth login)?"
    )
