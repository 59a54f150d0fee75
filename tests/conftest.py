"""Shared by all tests: offline, seeded, one output directory each, outputs of kernels poisoned."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from torch.utils import _device

from fusedgrpo import host

# nohup, and a shell that starts something in the background, have signals ignored, and so would
# every Python that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tiny models gain nothing from a second thread, and on a busy machine lose a lot by waiting for it.
torch.set_num_threads(1)


def pretend(patch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    """Take this machine for one with, or without, bfloat16 instructions: here and in bitsandbytes,
    which keeps 4-bit weights in another layout there."""
    patch.setattr(host, "has_bfloat16", lambda device: bfloat16)
    with contextlib.suppress(ImportError):
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: bfloat16)


# FUSEDGRPO_TEST_BFLOAT16=1 (or 0): all tests, and all Pythons that they start, take this machine
# for one with (without) bfloat16 instructions, whatever it is. Nothing but the tests reads it.
if FORCED := os.environ.get("FUSEDGRPO_TEST_BFLOAT16", ""):
    pretend(pytest.MonkeyPatch(), bfloat16=FORCED == "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(
            None,
            [
                str(Path(__file__).parent / "helpers" / "forced_host"),
                os.environ.get("PYTHONPATH", ""),
            ],
        )
    )


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``pretended(bfloat16=True)``: from here to the end of the test."""
    return functools.partial(pretend, monkeypatch)


@pytest.fixture(params=["float32", "bfloat16"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a CPU computes in where ``bf16`` is left open: one without bfloat16 instructions, and
    one that has them."""
    pretend(monkeypatch, bfloat16=request.param == "bfloat16")
    return request.param


@pytest.fixture(autouse=True, scope="module")
def _only_new_garbage() -> None:
    """What is there before a file's tests stays: a collection of garbage, for which runs that lack
    memory and measurements of memory ask often, would go through half a million objects each time.
    """
    gc.collect()
    gc.freeze()


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
        with torch.no_grad():  # torch itself may ask for one that requires a gradient
            return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


# One transparent pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000b49444154789c63600002"
    "00000500017a5eab3f0000000049454e44ae426082"
)


@pytest.fixture(autouse=True, scope="session")
def _no_pictures(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Most of the time of a tiny run is matplotlib's, also of one that the tests of a file share.
    Runs that are started as processes draw, and so do the tests of what is drawn. Gives what
    draws."""
    if all("tests/kernels" in str(item.path) for item in request.session.items):
        yield None  # to import it takes longer than most of them
        return
    from fusedgrpo.engine.reporting import plots

    draws = plots.render
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "render", lambda name, rows: PIXEL if rows else None)
        yield draws


@pytest.fixture(autouse=True)
def _pictures(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, _no_pictures: Any
) -> None:
    if request.node.get_closest_marker("pictures") or "engine/reporting" in str(request.path):
        monkeypatch.setattr("fusedgrpo.engine.reporting.plots.render", _no_pictures)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries look at the end for what they leaked


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
