"""A trainer's checkpoint: what is in it, how it is written, and how it comes back.

adapter/ or model/     the weights, loadable by peft or transformers as they are
optimizer.safetensors  and the JSON part of its state in state.json
window.safetensors     the unfinished rollout, if there is one; its rest in window.json
state.json             counters, data cursor, configuration, start, fingerprints of the data
manifest.json          sizes and hashes of all of these
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedgrpo.config.redaction import redacted
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine import checkpoint_files as checkpoint
from fusedgrpo.engine.batch_plan import BatchPlan
from fusedgrpo.engine.data.dataset import PromptDataset
from fusedgrpo.engine.reporting.metrics_log import Row
from fusedgrpo.engine.reporting.unwritten import Unwritten
from fusedgrpo.engine.rollout.buffer import RolloutWindow
from fusedgrpo.errors import CheckpointError, brief
from fusedgrpo.models import full_weights
from fusedgrpo.models.finite import not_finite

if TYPE_CHECKING:
    from fusedgrpo.engine.trainer import GRPOTrainer
    from fusedgrpo.models.policy import Policy

# Options that say where, how loud and how often, and do not change what is computed.
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "logging_steps", "save_strategy", "save_steps",
    "save_total_limit", "eval_strategy", "eval_steps", "per_device_eval_batch_size",
    "num_generations_eval", "eval_dataset", "resume_from_checkpoint", "allow_change", "report_to",
    "run_name", "log_completions", "num_completions_to_print", "reward_timeout",
    "max_nonfinite_steps", "dataset", "dataset_dir", "rehearsal", "max_in_flight",
    "activation_offloading", "gpu_memory",
}  # fmt: skip

# What the precision follows from, together with the machine.
PRECISION = {"bf16", "fp16", "dtype"}

# Before the hash of the rows; without it, the hash is that of version 0.1.
_DATA_TAG = "rows:"


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


def save(trainer: GRPOTrainer, directory: Path, unsynced: Sequence[Row] = ()) -> Path:
    """Write a checkpoint of the trainer's last completed step under ``directory``.

    unsynced: rows of metrics that are written, and would be lost if the machine stopped now.
    """
    window = trainer.window if trainer.window and not trainer.window.finished else None

    def write(path: Path) -> None:
        save_weights(trainer.policy, trainer.processing_class, path)
        tensors, values = checkpoint.optimizer_state(trainer.updater.optimizer)
        checkpoint.write_tensors(path / "optimizer.safetensors", tensors)
        state = {
            "progress": asdict(trainer.progress),
            "optimizer": values,
            "scaler": trainer.updater.scaler.state_dict(),
            "config": trainer.args.to_record(),
            "precision": trainer.policy.precision,
            "data": _DATA_TAG + trainer.train_dataset.fingerprint,
            "prompt_ids": trainer.train_dataset.ids_fingerprint,
            "started": trainer.clock.started.isoformat(),
            "groups": groups_of(trainer.plan),
            "unwritten": trainer.unwritten.state(unsynced),
            "window": window is not None,
        }
        checkpoint.write_json(path / "state.json", state)
        if window is not None:
            tensors, values = window.state()
            checkpoint.write_tensors(path / "window.safetensors", tensors)
            checkpoint.write_json(path / "window.json", values)

    return checkpoint.write_checkpoint(directory, trainer.progress.step, write)


def groups_of(plan: BatchPlan) -> list[int]:
    """What a step and a rollout consist of, which may depend on the number of processes."""
    return [plan.groups_per_step, plan.groups_per_rollout]


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


def missing_file(names: Collection[str]) -> str | None:
    """What a checkpoint with files of these names lacks."""
    for needed in ("state.json", "optimizer.safetensors"):
        if needed not in names:
            return f"no {needed}"
    if not any(n.startswith(("adapter/", "model/")) and n.endswith(".safetensors") for n in names):
        return "no weights in adapter/ or model/"
    if ("window.json" in names) != ("window.safetensors" in names):
        return "half of a rollout window"
    return None


def restore(trainer: GRPOTrainer, path: Path) -> None:
    """Make the trainer what it was when ``path`` was saved. Raises CheckpointError."""
    state = checkpoint.read_json(path / "state.json")
    manifest = checkpoint.read_json(path / checkpoint.MANIFEST)
    has_window = "window.json" in manifest["files"]
    if manifest["step"] != state["progress"]["step"] or has_window != state.get(
        "window", has_window
    ):
        raise CheckpointError(f"{path} is damaged: {checkpoint.MANIFEST} and state.json disagree.")
    if "started" in state:  # else it is of version 0.1
        trainer.set_clock(datetime.fromisoformat(state["started"]))
    _check_same_run(trainer, state, path)
    with trainer.keeper.loading(path):
        load_weights(trainer.policy, path)
        if problem := not_finite(trainer.policy.trainable()):
            raise CheckpointError(f"{path} is of a run that had diverged: {problem}.")
        checkpoint.load_optimizer_state(
            trainer.updater.optimizer,
            checkpoint.read_tensors(path / "optimizer.safetensors"),
            state["optimizer"],
        )
        trainer.updater.scaler.load_state_dict(state["scaler"])
        trainer.progress = Progress(**state["progress"])
        trainer.unwritten = Unwritten()
        if "unwritten" in state:  # else it is of version 0.1
            trainer.unwritten = Unwritten.from_state(state["unwritten"])
        trainer.window = None
        if has_window:
            trainer.window = RolloutWindow.from_state(
                checkpoint.read_tensors(path / "window.safetensors"),
                checkpoint.read_json(path / "window.json"),
            )


def _other_data(data: PromptDataset, state: Mapping[str, Any]) -> str | None:
    """How the data differs from what the checkpoint was trained on."""
    tagged = str(state["data"]).startswith(_DATA_TAG)
    own = _DATA_TAG + data.fingerprint if tagged else data.fingerprint_of_format_1
    if state["data"] != own:
        return "the training prompts are not the same"
    if state.get("prompt_ids", data.ids_fingerprint) != data.ids_fingerprint:
        return (
            "the rows are the same, but are encoded to other tokens: the tokenizer or its chat "
            "template has changed"
        )
    return None


def _check_same_run(trainer: GRPOTrainer, state: Mapping[str, Any], path: Path) -> None:
    allowed = set(trainer.args.allow_change)
    # An option that the checkpoint's version did not have was what it is by default.
    # A secret may be another one now: it is not stored, and no result is to depend on it.
    now = json.loads(json.dumps(trainer.args.to_record()))
    then = redacted(GRPOConfig().to_dict() | state["config"])
    changed = [
        f"{name}: {brief(then[name])} -> {brief(value)}"
        for name, value in now.items()
        if name not in FREE_TO_CHANGE | allowed and then[name] != value
    ]
    precision = trainer.policy.precision
    if not allowed & PRECISION and state.get("precision", precision) != precision:
        changed.append(
            f"the precision: {state['precision']} -> {precision}, which is what this machine "
            "computes in unless told otherwise (bf16 in allow_change lets it, or with bf16: false "
            "goes on in float32)"
        )
    if "dataset" not in allowed and (problem := _other_data(trainer.train_dataset, state)):
        changed.append(f"dataset: {problem}")
    if not changed and not allowed and state["groups"] != groups_of(trainer.plan):
        changed.append(
            f"prompts per step and per rollout: {state['groups']} -> {groups_of(trainer.plan)}, by "
            f"the number of processes ({trainer.processes.size}); prompts_per_step and "
            "generation_batch_size do not depend on it"
        )
    if changed:
        raise CheckpointError(
            f"This is not the run that {path} was saved from. Changed since: {'; '.join(changed)}. "
            "Set them back, or name in allow_change those that are meant to differ."
        )
