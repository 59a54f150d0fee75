"""Checkpoints survive what happens to files: crashes at any call, bit rot, missing parts."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusedgrpo.engine import checkpoint_files as checkpoint
from fusedgrpo.engine.checkpoint_files import (
    checkpoints,
    load_optimizer_state,
    newest_valid,
    optimizer_state,
    prune,
    read_json,
    read_tensors,
    verify,
    write_checkpoint,
    write_json,
    write_tensors,
)
from fusedgrpo.engine.optimizer import make_state
from fusedgrpo.errors import CheckpointError


def save(directory: Path, step: int, value: float) -> Path:
    def write(path: Path) -> None:
        (path / "adapter").mkdir()
        write_tensors(path / "adapter" / "weights.safetensors", {"w": torch.full((4,), value)})
        write_json(path / "state.json", {"value": value})

    return write_checkpoint(directory, step, write)


def value_of(path: Path) -> float:
    """The value a checkpoint was saved with, all of its parts agreeing."""
    verify(path)
    value = read_json(path / "state.json")["value"]
    weights = read_tensors(path / "adapter" / "weights.safetensors")["w"]
    assert torch.equal(weights, torch.full((4,), value))
    return value


# --- crashes -------------------------------------------------------------------------------------


class Killed(BaseException):
    """kill -9: no file system call after it does anything, clean-up included."""


class FailingDisk:
    """The N-th file system call fails; ``persistent``: and all after it."""

    CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir", "scandir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, persistent: bool):
        self.error, self.persistent = error, persistent
        self.fail_at = 0
        self.calls = 0
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))
        monkeypatch.setattr(io, "open", self.wrapped(io.open))
        monkeypatch.setattr(checkpoint, "save_file", self.wrapped(checkpoint.save_file))

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.fail_at and (
                self.calls == self.fail_at or (self.persistent and self.calls > self.fail_at)
            ):
                raise self.error
            return call(*args, **kwargs)

        return counted

    def failing_at(self, number: int, work: Callable[[], object]) -> bool:
        """Do ``work`` with the ``number``-th call failing; whether it came that far."""
        self.calls, self.fail_at = 0, number
        try:
            work()
        except BaseException as error:
            if error is not self.error:
                raise
        finally:
            reached = self.calls >= number
            self.fail_at = 0
        return reached


@pytest.mark.parametrize(
    ("error", "persistent"),
    [(OSError(28, "No space left"), False), (OSError(5, "I/O error"), True), (Killed(), True)],
    ids=["transient", "persistent", "killed"],
)
@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_a_failure_at_any_call_leaves_the_old_or_the_new_state_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    persistent: bool,
    step: int,
) -> None:
    disk = FailingDisk(monkeypatch, error, persistent)
    found = []
    for number in range(1, 200):
        directory = tmp_path / str(number)
        save(directory, 1, 1.0)
        reached = disk.failing_at(number, lambda: save(directory, step, 2.0))  # noqa: B023
        newest = newest_valid(directory)
        assert newest is not None, f"call {number} lost everything"
        found.append(value_of(newest))
        # And the disk being well again, the next checkpoint goes through and the litter is gone.
        assert value_of(save(directory, step + 1, 3.0)) == 3.0
        assert newest_valid(directory) == directory / f"step-{step + 1:06d}"
        assert not list(directory.glob(".*"))
        if not reached:
            break
    else:
        pytest.fail("the save never completed")
    assert set(found) == {1.0, 2.0}
    # A passing error may be survived (the directory was there already), a lasting one may not.
    assert not persistent or found == sorted(found)
    assert len(found) > 15


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)

    def write(path: Path) -> None:
        (path / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 2, write)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_the_same_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    assert value_of(save(tmp_path, 1, 2.0)) == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_everything_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    opened: dict[int, str] = {}
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename

    def note_open(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = real_open(path, *args, **kwargs)
        opened[descriptor] = Path(str(path)).name
        return descriptor

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(opened[fd]), real_fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), real_rename(a, b))[1])
    save(tmp_path, 1, 1.0)
    assert set(events[:2]) == {"weights.safetensors", "state.json"}
    assert events[2] == "manifest.json"
    assert set(events[3:5]) == {"adapter", ".step-000001.tmp"}
    assert events[5:] == ["rename", tmp_path.name]


# --- damage --------------------------------------------------------------------------------------


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def test_one_flipped_bit_anywhere_is_refused_by_the_files_name(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 1.0)
    for file in files_of(path):
        good = file.read_bytes()
        harmless = set()
        for position in range(0, len(good), 1 if file.name == "manifest.json" else 7):
            bad = bytearray(good)
            bad[position] ^= 4
            file.write_bytes(bad)
            try:
                verify(path)
            except CheckpointError as error:
                assert file.name in str(error) or file.name == "manifest.json"
            else:
                harmless.add(position)
        file.write_bytes(good)
        # The manifest's own step number and its unused key are not what a resume reads.
        step = good.find(b'"step": 1') if file.name == "manifest.json" else 0
        assert all(step <= position < step + 9 for position in harmless), file
    verify(path)


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_truncated_or_missing_file_is_refused_by_its_name(tmp_path: Path, keep: float) -> None:
    path = save(tmp_path, 1, 1.0)
    for file in files_of(path):
        good = file.read_bytes()
        file.write_bytes(good[: int(len(good) * keep)])
        with pytest.raises(CheckpointError, match=file.name):
            verify(path)
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            verify(path)
        file.write_bytes(good)
    verify(path)


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        {"format": 1},
        {"format": 1, "files": []},
        {"format": 1, "files": {"state.json": 3}},
        {"format": 1, "files": {"state.json": {"size": 3}}},
        {"format": 99, "files": {}},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, manifest: Any) -> None:
    path = save(tmp_path, 1, 1.0)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged|format 99"):
        verify(path)


def test_a_disk_that_cannot_be_read_is_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 1.0)
    second = save(tmp_path, 2, 2.0)
    real = checkpoint._sha256

    def bad_sector(path: Path) -> str:
        if second in path.parents:
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoint, "_sha256", bad_sector)
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify(second)
    assert newest_valid(tmp_path) == tmp_path / "step-000001"


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"no complete checkpoint: it has no manifest"):
            verify(path)


def test_the_newest_whole_one_is_found_and_the_damaged_ones_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_valid(tmp_path) is None
    for step in (2, 9, 10):
        save(tmp_path, step, float(step))
    (tmp_path / "step-000099").mkdir()
    (tmp_path / "step-notes.txt").write_text("")
    (tmp_path / "step-draft").mkdir()
    (tmp_path / "step-000010" / "state.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        assert newest_valid(tmp_path) == tmp_path / "step-000009"
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "step-000099" in warnings[0] and "manifest.json" in warnings[0]
    assert "step-000010" in warnings[1] and "state.json" in warnings[1]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (1_000_000, 999_999, 5):
        save(tmp_path, step, 0.0)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [5, 999_999, 1_000_000]


def test_what_a_killed_replacement_left_counts_as_the_older_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0).rename(tmp_path / "step-000001.old")
    newest = newest_valid(tmp_path)
    assert newest is not None and value_of(newest) == 1.0
    new = save(tmp_path, 1, 2.0)
    assert newest_valid(tmp_path) == new and checkpoints(tmp_path) == [new]


# --- pruning -------------------------------------------------------------------------------------


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, 0.0)
    prune(tmp_path, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    prune(tmp_path, 9)
    assert len(checkpoints(tmp_path)) == 2


def test_pruning_never_deletes_the_newest_that_is_whole(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, float(step))
    for step in (4, 5):
        (tmp_path / f"step-{step:06d}" / "state.json").unlink()
    prune(tmp_path, 1)
    assert newest_valid(tmp_path) == tmp_path / "step-000003"
    assert value_of(tmp_path / "step-000003") == 3.0


# --- values --------------------------------------------------------------------------------------


def test_tensors_and_json_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(3, 4)
    tensors = {
        "transposed": base.T,
        "shared": base,
        "bf16": base.bfloat16(),
        "nan": torch.tensor([torch.nan, torch.inf, -0.0]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0),
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    back = read_tensors(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name].nan_to_num(7), tensor.nan_to_num(7)), name
    value = {"x": 0.1 + 0.2, "text": "é\ud800\n", "big": 2**62, "none": None}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value
    assert (tmp_path / "v.json").read_bytes().isascii()


def test_unreadable_parts_are_checkpoint_errors(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{")
    for read in (read_json, read_tensors):
        for name in ("x", "nowhere"):
            with pytest.raises(CheckpointError, match=name):
                read(tmp_path / name)


# --- optimizer state -----------------------------------------------------------------------------


def adamw(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=0.1, **options)
    make_state(optimizer)
    return optimizer


def bnb_8bit(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    bnb = pytest.importorskip("bitsandbytes")
    optimizer = bnb.optim.AdamW8bit(parameters, lr=0.1, **options)
    make_state(optimizer)
    return optimizer


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, parameter in enumerate(parameters):
            torch.manual_seed(100 * step + i)
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def parameters() -> list[nn.Parameter]:
    # The last one is large enough for bitsandbytes to quantise its state.
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,), (80, 80)]]


@pytest.mark.parametrize("build", [adamw, bnb_8bit])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, build: Callable[..., Any]) -> None:
    whole = parameters()
    optimizer = build(whole)
    train(optimizer, whole, range(6))

    first = parameters()
    optimizer = build(first)
    train(optimizer, first, range(3))
    tensors, values = optimizer_state(optimizer)
    write_tensors(tmp_path / "o.safetensors", tensors)
    write_json(tmp_path / "o.json", values)

    second = [nn.Parameter(p.detach().clone()) for p in first]
    optimizer = build(second)
    load_optimizer_state(
        optimizer, read_tensors(tmp_path / "o.safetensors"), read_json(tmp_path / "o.json")
    )
    train(optimizer, second, range(3, 6))
    for one, other in zip(whole, second, strict=True):
        assert torch.equal(one, other)


def test_hyperparameters_are_the_configurations_and_not_the_checkpoints() -> None:
    """A learning rate changed on purpose (allow_change) must not be silently put back."""
    old = parameters()
    optimizer = adamw(old)
    train(optimizer, old, range(2))
    tensors, values = optimizer_state(optimizer)
    again = adamw(old, weight_decay=0.5)
    again.param_groups[0]["lr"] = 0.025
    load_optimizer_state(again, tensors, values)
    assert again.param_groups[0]["lr"] == 0.025
    assert again.param_groups[0]["weight_decay"] == 0.5
    assert int(again.state[old[0]]["step"]) == 2


def test_the_state_of_other_parameters_is_refused() -> None:
    old = parameters()
    optimizer = adamw(old)
    train(optimizer, old, range(1))
    tensors, values = optimizer_state(optimizer)
    for others in (old[:2], [*old, nn.Parameter(torch.zeros(2))], old[::-1]):
        with pytest.raises(CheckpointError):
            load_optimizer_state(adamw(others), tensors, values)
    split = torch.optim.AdamW([{"params": old[:1]}, {"params": old[1:]}])
    with pytest.raises(CheckpointError, match="groups of"):
        load_optimizer_state(split, tensors, values)


def test_state_is_loaded_into_the_tensors_that_are_there() -> None:
    """Never twice in memory; and what bitsandbytes has paged stays paged."""
    old = parameters()
    optimizer = adamw(old)
    train(optimizer, old, range(2))
    tensors, values = optimizer_state(optimizer)
    again = adamw(old)
    before = {id(v) for entries in again.state.values() for v in entries.values()}
    load_optimizer_state(again, tensors, values)
    assert {id(v) for entries in again.state.values() for v in entries.values()} == before
    assert torch.equal(again.state[old[0]]["exp_avg"], optimizer.state[old[0]]["exp_avg"])


def test_the_state_of_another_optimizer_is_refused() -> None:
    tensors, values = optimizer_state(adamw(parameters()))
    with pytest.raises(CheckpointError, match=r"keeps \['exp_avg', 'exp_avg_sq', 'step'\]"):
        load_optimizer_state(bnb_8bit(parameters()), tensors, values)


def test_the_directory_is_made_if_it_is_not_there(tmp_path: Path) -> None:
    save(tmp_path / "a" / "b", 1, 1.0)
    shutil.rmtree(tmp_path / "a" / "b" / "step-000001")
    assert checkpoints(tmp_path / "a" / "b") == []
