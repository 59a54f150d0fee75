"""GRPO training of language models on one GPU. The public names, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusedgrpo import host

if TYPE_CHECKING:
    from fusedgrpo.engine.config import GRPOConfig
    from fusedgrpo.engine.trainer import GRPOTrainer
    from fusedgrpo.kernels.grpo_loss import GRPOLoss

__version__ = "0.1.0"
__all__ = ["GRPOConfig", "GRPOLoss", "GRPOTrainer", "__version__"]

host.require_packages()

_HOMES = {
    "GRPOConfig": "fusedgrpo.engine.config",
    "GRPOLoss": "fusedgrpo.kernels.grpo_loss",
    "GRPOTrainer": "fusedgrpo.engine.trainer",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line and the reward worker start without importing torch.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fusedgrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
