"""The short examples run as they stand, and what they train learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_by_hand_learns() -> None:
    history = load("grpo_loss_loop").main()
    assert sum(history[:5]) / 5 < 0.6 < 0.8 < sum(history[-5:]) / 5


@pytest.mark.peer
@pytest.mark.slow
def test_trl_with_one_line_changed_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl")
    rewards = load("trl_one_line").main()
    assert sum(rewards[:5]) / 5 + 0.2 < sum(rewards[-5:]) / 5
