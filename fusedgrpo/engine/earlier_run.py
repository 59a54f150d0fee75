"""Put an earlier run in an output directory out of the way, and keep links to other disks.

An entry that is a link, or a mount point, is where its owner wants the next run to write as well:
it stays, and what lies behind it is moved beside, on its own disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

# What of a linked directory is a run's: others may keep things there, too.
_COMPLETIONS = ("step-*.jsonl", ".step-*.tmp", "steps-*.parquet", ".steps-*.tmp", "dropped-*")
OWN = {
    "completions": _COMPLETIONS,
    "eval_completions": _COMPLETIONS,
    "held_out": _COMPLETIONS,
    "plots": ("*.png",),
    "checkpoints": ("step-*", ".step-*.tmp", "abandoned-*"),
    "nonfinite": ("step-*.json",),
    "adapter": ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"),
    "model": ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"),
}


def clear(directory: Path, entries: Iterable[str], *, overwrite: bool) -> list[str]:
    """Move what there is of ``entries`` to ``previous/NNN``, or delete it; returns what to say."""
    found = [directory / name for name in entries if os.path.lexists(directory / name)]
    found = [path for path in found if not _is_place(path) or any(_behind(path))]
    if not found:
        return []
    # Without its log this is no run of ours, so nothing is deleted however firmly it was asked for.
    if overwrite and (directory / "run.log").exists():
        for path in found:
            if _is_place(path):
                for thing in _behind(path):
                    remove(thing)
            else:
                remove(path)
        return [f"Deleted the earlier run in {directory} (overwrite_output_dir)."]
    previous = directory / "previous"
    target = numbered(previous)
    target.mkdir(parents=True)
    for path in found:
        if _is_place(path):
            _move_what_is_behind(path, target / path.name)
            continue
        try:
            path.rename(target / path.name)
        except OSError:  # another disk, or a mount that does not show as one
            shutil.move(path, target / path.name)
    return [f"Moved the earlier run in {directory} to {target}."]


def remove(path: Path) -> None:
    """Delete a file or a directory; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_place(path: Path) -> bool:
    """Whether an entry only says where things are to lie."""
    return path.is_symlink() or os.path.ismount(path)


def _behind(path: Path) -> list[Path]:
    """The parts of an earlier run that lie behind a link or in a mount."""
    real = Path(os.path.realpath(path))
    if real.is_file():
        return [real]
    if not real.is_dir():
        return []  # it points nowhere yet, or to a device
    patterns = OWN.get(path.name)
    if patterns is None:
        return [thing for thing in sorted(real.iterdir()) if thing.name != "previous"]
    return sorted({thing for pattern in patterns for thing in real.glob(pattern)})


def _move_what_is_behind(path: Path, link: Path) -> None:
    """Put it beside, on its own disk, with a ``link`` to where it went."""
    real = Path(os.path.realpath(path))
    if real.is_file():
        aside = numbered(real.with_name(f"{real.name}.previous"))
        aside.parent.mkdir(exist_ok=True)
        real.rename(aside)
    else:
        things = _behind(path)
        aside = numbered(real / "previous")
        aside.mkdir(parents=True)
        for thing in things:
            thing.rename(aside / thing.name)
    link.symlink_to(aside)


def numbered(directory: Path, prefix: str = "") -> Path:
    """The next free ``NNN``, or ``prefix-NNN``, in a directory."""
    start = f"{prefix}-" if prefix else ""
    names = [child.name.removeprefix(start) for child in directory.glob(f"{start}*")]
    taken = [int(name) for name in names if name.isdecimal()]
    return directory / f"{start}{max(taken, default=0) + 1:03d}"
