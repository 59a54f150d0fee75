"""A trainer's checkpoint: what is in it, how it is written, and how it comes back.

adapter/ or model/     the weights, loadable by peft or transformers as they are
reference.safetensors  the reference's weights, where it follows the policy
optimizer.safetensors  and the JSON part of its state in state.json
window.safetensors     the unfinished rollout, if there is one; its rest in window.json
state.json             counters, data cursor, configuration, start, fingerprints of the data, what
                       completions come from
manifest.json          sizes and hashes of all of these
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedgrpo.engine import checkpoint_files as checkpoint
from fusedgrpo.errors import CheckpointError
from fusedgrpo.models import full_weights
from fusedgrpo.models.finite import not_finite
from fusedgrpo.models.policy import Policy


@dataclass(slots=True)
class Progress:
    """The counters of a run. step: optimizer steps done; rollouts: sampled so far; cursor: prompts
    handed out; num_tokens: TRL's count, each prompt once per completion."""

    step: int = 0
    rollouts: int = 0
    cursor: int = 0
    num_tokens: int = 0
    nonfinite_in_a_row: int = 0


def save_weights(policy: Policy, tokenizer: Any, directory: Path) -> Path:
    """Write ``adapter/`` or ``model/`` with the tokenizer; returns its path."""
    path = directory / ("model" if policy.adapters is None else "adapter")
    write_weights(policy, tokenizer, path)
    return path


def write_weights(policy: Policy, tokenizer: Any, path: Path) -> None:
    """Write the adapter, or the whole model, with the tokenizer into ``path`` itself."""
    if policy.adapters is None:
        full_weights.save(policy.model, path)
    else:
        policy.adapters.save(path)
    tokenizer.save_pretrained(path)


def load_weights(policy: Policy, directory: Path) -> None:
    """Put saved weights back, bit for bit. Raises CheckpointError."""
    if policy.adapters is None:
        full_weights.restore(policy.model, directory / "model")
    else:
        policy.adapters.restore(directory / "adapter")
    load_reference(policy, directory)
    if problem := not_finite(policy.trainable()):
        raise CheckpointError(f"{directory} is of a run that had diverged: {problem}.")


REFERENCE = "reference.safetensors"


def save_reference(policy: Policy, directory: Path) -> None:
    """Write the weights of a reference that follows the policy."""
    weights = policy.reference_weights()
    assert weights is not None, "sync_ref_model gives the reference weights of its own"
    checkpoint.write_tensors(directory / REFERENCE, weights)


def load_reference(policy: Policy, directory: Path) -> None:
    """Put back what ``save_reference`` wrote, bit for bit, if anything; a checkpoint from before
    ``sync_ref_model`` was set goes on with the reference of the run's beginning. Raises
    CheckpointError."""
    own = policy.reference_weights()
    if own is None or not (directory / REFERENCE).exists():
        return
    saved = checkpoint.read_tensors(directory / REFERENCE)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
        raise CheckpointError(f"{directory / REFERENCE} holds the weights of another model.")
    for name, weight in own.items():
        weight.copy_(saved[name])


def save(
    directory: Path,
    saved: Mapping[str, Any],
    write_weights: Callable[[Path], Any],
    *,
    only_model: bool = False,
) -> Path:
    """Write ``saved``, a trainer's ``state_dict``, and its weights as a checkpoint under
    ``directory``; returns its path. only_model: the weights and what says which they are."""

    def write(path: Path) -> None:
        write_weights(path)
        if only_model:
            facts = {k: v for k, v in saved["state"].items() if k not in ("optimizer", "unwritten")}
            checkpoint.write_json(path / "state.json", facts)
            return
        checkpoint.write_tensors(path / "optimizer.safetensors", saved["optimizer"])
        checkpoint.write_json(path / "state.json", saved["state"])
        if saved["window"] is not None:
            tensors, values = saved["window"]
            checkpoint.write_tensors(path / "window.safetensors", tensors)
            checkpoint.write_json(path / "window.json", values)

    return checkpoint.write_checkpoint(directory, saved["state"]["progress"]["step"], write)


def read_state(path: Path) -> dict[str, Any]:
    """``state.json``. Raises CheckpointError where the rest of ``path`` is not of it."""
    state = checkpoint.read_json(path / "state.json")
    manifest = checkpoint.read_json(path / checkpoint.MANIFEST)
    has_window = "window.json" in manifest["files"]
    if manifest["step"] != state["progress"]["step"] or has_window != state.get(
        "window", has_window
    ):
        raise CheckpointError(f"{path} is damaged: {checkpoint.MANIFEST} and state.json disagree.")
    return state


def read(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary that ``save`` was given; ``state`` is that of ``read_state``. Raises
    CheckpointError."""
    window = None
    if "window.json" in checkpoint.read_json(path / checkpoint.MANIFEST)["files"]:
        window = (
            checkpoint.read_tensors(path / "window.safetensors"),
            checkpoint.read_json(path / "window.json"),
        )
    tensors = checkpoint.read_tensors(path / "optimizer.safetensors")
    return {"state": state, "optimizer": tensors, "window": window}


def find(resume: str | bool | None, directory: Path) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means, verified, or None to start anew.

    A path must verify. True and "auto" take the newest that does; True needs one, "auto" does not.
    Raises CheckpointError.
    """
    if resume in (None, False):
        return None
    if resume not in (True, "auto"):
        path = Path(str(resume)).expanduser()
        checkpoint.verify(path, missing_file)
        return path
    path_or_none = checkpoint.newest_valid(directory, missing_file)
    if path_or_none is None and (resume is True or checkpoint.checkpoints(directory)):
        raise CheckpointError(
            f"There is no usable checkpoint in {directory}. Leave out resume_from_checkpoint to "
            "start a new run."
        )
    return path_or_none


def begins(
    found: Path | None, resume: str | bool | None, directory: Path, step: int, total: int
) -> str | None:
    """The sentence on where a run goes on from, if that was asked for. found: what ``find`` gave
    for ``resume`` and ``directory``; step, total: the steps that are done, and those to do."""
    if found is not None:
        left = "" if step < total else " It has done all its steps: a greater max_steps extends it."
        return f"Resumed from {found} after step {step}.{left}"
    if resume in (None, False):
        return None
    return f"resume_from_checkpoint: {resume}: no checkpoint in {directory}; this is a new run."


def missing_file(names: Collection[str]) -> str | None:
    """The first thing that a checkpoint with files of these names lacks; None for nothing."""
    if "state.json" not in names:
        return "no state.json"
    if "optimizer.safetensors" not in names:
        return "no optimizer.safetensors (save_only_model: weights to use, not to go on from)"
    if not any(n.startswith(("adapter/", "model/")) and n.endswith(".safetensors") for n in names):
        return "no weights in adapter/ or model/"
    if ("window.json" in names) != ("window.safetensors" in names):
        return "half of a rollout window"
    return None
