"""Live bytes: counted once per storage, gone when the last tensor is, the same fake and real."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from fusedgrpo.engine.memory.storage_tracker import StorageTracker, fake_tensors


def in_mode(fake: bool, tracker: StorageTracker) -> contextlib.AbstractContextManager[Any]:
    return fake_tensors(tracker) if fake else tracker


@pytest.mark.parametrize("fake", [True, False])
def test_a_storage_counts_once_and_until_its_last_view_is_gone(fake: bool) -> None:
    tracker = StorageTracker()
    with in_mode(fake, tracker):
        x = torch.zeros(1024)
        view = x[:10].view(2, 5)
        assert tracker.live == 4096
        del x
        assert tracker.live == 4096
        del view
        assert tracker.live == 0
    assert tracker.peak.bytes == 4096


@pytest.mark.parametrize("fake", [True, False])
def test_the_peak_is_the_most_at_once_with_what_was_alive_then(fake: bool) -> None:
    tracker = StorageTracker()
    with in_mode(fake, tracker):
        with tracker.labelled("kept"):
            kept = torch.zeros(1024)
        with tracker.labelled("passing"):
            torch.zeros(2048)
            torch.zeros(512)
        assert tracker.live == 4096
        peak = tracker.peak
        assert peak.bytes == 4096 + 8192
        assert peak.by_label() == {"passing": 8192, "kept": 4096}
        tracker.start_peak()
        assert tracker.peak.bytes == 4096
        del kept
    assert tracker.live == 0


def test_bytes_are_those_of_the_caching_allocator() -> None:
    tracker = StorageTracker()
    with fake_tensors(tracker):
        x = torch.zeros(1)
        assert tracker.live == 512
        y = torch.zeros(129)
        assert tracker.live == 512 + 1024
        del x, y


@pytest.mark.parametrize("fake", [True, False])
def test_what_the_backward_pass_needs_is_alive_until_it_ran(fake: bool) -> None:
    tracker = StorageTracker()
    with in_mode(fake, tracker):
        weight = torch.ones(256, 256, requires_grad=True)
        x = torch.ones(1024, 256)
        before = tracker.live
        out = (x @ weight).exp().sum()  # exp saves its result
        assert tracker.live - before == 1024 * 256 * 4 + 512
        out.backward()
        del out
        assert tracker.live - before == 256 * 256 * 4  # the gradient
        del weight, x


def test_an_operator_with_a_body_shows_its_scratch() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        torch.empty(8192)
        return torch.empty_like(x)

    for bodies, expected in (({}, 0), ({torch.ops.aten.exp.default: body}, 4 * 8192)):
        tracker = StorageTracker(bodies)
        with fake_tensors(tracker):
            x = torch.zeros(1024)
            y = x.exp()
            assert tracker.live == 2 * 4096
            assert tracker.peak.bytes - tracker.live == max(expected - 4096, 0)
            del x, y
