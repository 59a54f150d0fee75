"""Reward functions: found by name or given as callables, called, checked, put into one matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusedgrpo.engine.rewards.building import build_rewards
    from fusedgrpo.engine.rewards.runner import RewardBatch, RewardFunctions

__all__ = ["RewardBatch", "RewardFunctions", "build_rewards"]


def __getattr__(name: str) -> Any:
    # Lazy, because reward workers import this package and have no use for torch.
    if name == "build_rewards":
        from fusedgrpo.engine.rewards.building import build_rewards

        return build_rewards
    if name in __all__:
        from fusedgrpo.engine.rewards import runner

        return getattr(runner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
