"""Shared by all tests: offline, seeded, one output directory each, outputs of kernels poisoned."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch.utils import _device

# Tiny models gain nothing from a second thread, and on a busy machine lose a lot by waiting for it.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """In kernel tests ``torch.empty`` gives NaN, so that an output nobody wrote shows."""
    if "tests/kernels" not in str(request.path):
        return
    # Which functions torch.device("meta") acts on is looked up once and kept: not while this is on.
    _device._device_constructors()
    empty, empty_like = torch.empty, torch.empty_like

    def poison(out: torch.Tensor) -> torch.Tensor:
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
