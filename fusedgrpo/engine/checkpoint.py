"""Checkpoints that are either whole or not there: safetensors and JSON, hashed, renamed last.

Files are written into a temporary directory and synced, ``manifest.json`` with the size and sha256
of each comes last, then the directory is renamed. A checkpoint whose manifest verifies is the one
that was saved, bit for bit. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusedgrpo.errors import CheckpointError

log = logging.getLogger("fusedgrpo")

MANIFEST = "manifest.json"
FORMAT = 1


def write_checkpoint(directory: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let ``write(dir)`` fill a new checkpoint of ``step`` under ``directory``; returns its path.

    If anything fails, what it left is removed and the checkpoints that were there stay as they are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{step:06d}"
    unfinished = directory / f".{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        write(unfinished)
        files = sorted(p for p in unfinished.rglob("*") if p.is_file())
        manifest = {
            "format": FORMAT,
            "step": step,
            "files": {
                str(path.relative_to(unfinished)): {
                    "size": path.stat().st_size,
                    "sha256": _sha256(path),
                }
                for path in files
            },
        }
        for path in files:
            _sync(path)
        write_json(unfinished / MANIFEST, manifest)
        _sync(unfinished / MANIFEST)
        for path in [p for p in unfinished.rglob("*") if p.is_dir()] + [unfinished]:
            _sync(path)
        if final.exists():
            # The same step saved again (a signal right after an interval): the new one is equal.
            shutil.rmtree(final)
        unfinished.rename(final)
        _sync(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return final


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it was saved. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MANIFEST}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error}.") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')}: this version reads format {FORMAT}."
        )
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing.")
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(
                f"{path} is damaged: {name} has {size} bytes, saved were {expected['size']}."
            )
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: the content of {name} has changed.")
    return manifest


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints under ``directory``, oldest first, damaged ones included."""
    found = [p for p in directory.glob("step-*") if p.name[5:].isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_valid(directory: Path) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is passed over loudly."""
    for path in reversed(checkpoints(directory)):
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("%s The checkpoint before it is tried.", error)
        else:
            return path
    return None


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest ``keep``; the newest that verifies always stays."""
    all_of_them = checkpoints(directory)
    doomed = all_of_them[: max(len(all_of_them) - keep, 0)]
    if doomed and newest_valid(directory) not in doomed:
        for path in doomed:
            shutil.rmtree(path)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Contiguous CPU copies; safetensors refuses shared memory."""
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def optimizer_state(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of any optimizer, split into tensors and JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            key = f"{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                values[key] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    return tensors, {"values": values, "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], saved: dict[str, Any]
) -> None:
    """Put a saved state back. Raises CheckpointError if it belongs to other parameters."""
    current = optimizer.state_dict()
    groups = saved["groups"]
    if len(groups) != len(current["param_groups"]):
        raise CheckpointError(
            f"The checkpoint's optimizer has {len(groups)} parameter groups, this run's has "
            f"{len(current['param_groups'])}."
        )
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**saved["values"], **tensors}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        first = entries.get("exp_avg", entries.get("state1"))
        if index >= len(parameters) or (
            first is not None and first.numel() != parameters[index].numel()
        ):
            raise CheckpointError("The checkpoint's optimizer state fits other parameters.")
    merged = [
        {**group, "params": now["params"]}
        for group, now in zip(groups, current["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
