"""Checkpoints that are either whole or not there: safetensors and JSON, hashed, renamed last.

Files are written into a temporary directory and synced, ``manifest.json`` with the size and sha256
of each comes last, then the directory is renamed. A checkpoint whose manifest verifies is the one
that was saved, bit for bit. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusedgrpo.engine.earlier_run import numbered, remove
from fusedgrpo.errors import CheckpointError

log = logging.getLogger("fusedgrpo")

MANIFEST = "manifest.json"
FORMAT = 1
NAME = re.compile(r"step-(\d+)(\.old)?")


def of_step(directory: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is."""
    return directory / f"step-{step:06d}"


def write_checkpoint(directory: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let ``write(dir)`` fill a new checkpoint of ``step`` under ``directory``; returns its path.

    If anything fails, what it left is removed and the checkpoints that were there stay as they are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = of_step(directory, step)
    unfinished = directory / f".{final.name}.tmp"
    replaced = directory / f"{final.name}.old"
    for left_by_a_killed_run in directory.glob(".step-*.tmp"):
        shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
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
            sync(path)
        write_json(unfinished / MANIFEST, manifest)
        sync(unfinished / MANIFEST)
        for path in [p for p in unfinished.rglob("*") if p.is_dir()] + [unfinished]:
            sync(path)
        if os.path.lexists(final):
            # The same step saved again. Out of the way it is still a checkpoint, see
            # ``checkpoints``, so that not even a kill between these lines leaves none.
            _discard(replaced)
            final.rename(replaced)
        unfinished.rename(final)
        sync(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _discard(replaced)
    return final


def _discard(path: Path) -> None:
    """Delete a checkpoint if that can be done; of one that was put elsewhere the link alone."""
    with contextlib.suppress(OSError):
        remove(path)


def verify(path: Path, needs: Callable[[Collection[str]], str | None] | None = None) -> Any:
    """The manifest of a checkpoint whose every file is as it was saved. Raises CheckpointError.

    needs: told the names of the files, it says which one is missing that has to be there.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = [(name, f["size"], f["sha256"]) for name, f in manifest["files"].items()]
        version = manifest["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}.") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}: this version reads format {FORMAT}.")
    missing = needs(manifest["files"]) if needs is not None else None
    if missing or not files:
        raise CheckpointError(
            f"{path} is damaged: its {MANIFEST} lists {missing or 'no files at all'}."
        )
    for name, size, digest in files:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing.")
        try:
            found = file.stat().st_size
            if found != size:
                raise CheckpointError(
                    f"{path} is damaged: {name} has {found} bytes, saved were {size}."
                )
            if _sha256(file) != digest:
                raise CheckpointError(f"{path} is damaged: the content of {name} has changed.")
        except OSError as error:
            raise CheckpointError(f"{path} is damaged: {name} cannot be read: {error}.") from error
    return manifest


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints under ``directory``, oldest first, damaged ones included.

    ``step-000006.old`` is left by a run that was killed while it replaced ``step-000006``.
    """
    named = [
        (NAME.fullmatch(path.name), path) for path in directory.glob("step-*") if path.is_dir()
    ]
    found = [(int(match[1]), match[2] is None, p) for match, p in named if match]
    return [p for _, _, p in sorted(found)]


def newest_valid(
    directory: Path, needs: Callable[[Collection[str]], str | None] | None = None
) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is passed over loudly."""
    for path in reversed(checkpoints(directory)):
        try:
            verify(path, needs)
        except CheckpointError as error:
            log.warning("%s The checkpoint before it is tried.", error)
        else:
            return path
    return None


def prune(directory: Path, keep: int, *kept: Path | None) -> None:
    """Delete all but the newest ``keep``. What is ``kept`` and the newest that verifies always
    stay, and so do checkpoints that were put elsewhere and left as a link."""
    all_of_them = [path for path in checkpoints(directory) if not path.is_symlink()]
    doomed = [path for path in all_of_them[: max(len(all_of_them) - keep, 0)] if path not in kept]
    if doomed and newest_valid(directory) not in doomed:
        for path in doomed:
            shutil.rmtree(path)


def abandon_after(directory: Path, step: int) -> str | None:
    """Put the checkpoints of later steps aside, into a folder of their own: a run that goes on from
    ``step`` is another one from there on. Returns what there is to say."""
    later = [p for p in checkpoints(directory) if int(NAME.fullmatch(p.name)[1]) > step]  # type: ignore[index]
    if not later:
        return None
    aside = numbered(directory, "abandoned")
    aside.mkdir()
    for path in reversed(later):  # the newest first: in between, what is left is one run as well
        if path.is_symlink():
            (aside / path.name).symlink_to(os.path.realpath(path))
            path.unlink()
        else:
            path.rename(aside / path.name)
    sync(directory)
    return (
        f"Going on from step {step}: {len(later)} checkpoints of the steps after it were moved to "
        f"{aside}; nothing looks for them there, and they may be deleted."
    )


def why_not_written(error: BaseException) -> str | None:
    """The disk's own words, if ``error`` comes from there: safetensors and tokenizers have their
    own errors for it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"([^:(]*)\(os error \d+\)", str(error))
    return found[1].strip() if found else None


def write_json(path: Path, value: Any) -> None:
    """ASCII, so that neither the locale nor a lone surrogate in a text can spoil it."""
    path.write_text(json.dumps(value))


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
    """Everything that an optimizer has accumulated, split into tensors and JSON values.

    Learning rate, betas and the like are the configuration's and not part of it.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in _flat(entries):
            key = f"{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                values[key] = value
    return tensors, {"values": values, "groups": [len(g["params"]) for g in state["param_groups"]]}


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """bitsandbytes puts its quantised state into a dict of its own; loading takes it flat too."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], saved: dict[str, Any]
) -> None:
    """Copy a saved state into the optimizer's own, where ``build_optimizer`` has made it: nothing
    is there twice, and paged state stays paged. Raises CheckpointError if it is of other
    parameters.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if saved["groups"] != sizes:
        raise CheckpointError(
            f"The checkpoint's optimizer has groups of {saved['groups']} parameters, this run's of "
            f"{sizes}."
        )
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**saved["values"], **tensors}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        own = optimizer.state.get(parameters[index]) if index < len(parameters) else None
        moment = "exp_avg" if "exp_avg" in entries else "state1"
        if index >= len(parameters) or (
            moment in entries
            # AdEMAMix has two moments in one.
            and entries[moment].numel() != (own or {}).get(moment, parameters[index]).numel()
        ):
            raise CheckpointError("The checkpoint's optimizer state fits other parameters.")
        if own is None:  # an optimizer that makes its state in the first step
            device = parameters[index].device
            optimizer.state[parameters[index]] = {
                # The count stays where torch has it, on the CPU.
                name: value.to(device) if isinstance(value, Tensor) and name != "step" else value
                for name, value in entries.items()
            }
            continue
        if own.keys() != entries.keys():
            raise CheckpointError(
                f"The checkpoint's optimizer keeps {sorted(entries)}, this run's {sorted(own)}."
            )
        for name, value in entries.items():
            if isinstance(own[name], Tensor):
                own[name].copy_(torch.as_tensor(value))
            else:
                own[name] = value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a directory with the names in it, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
