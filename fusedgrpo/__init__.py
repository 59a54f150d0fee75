"""GRPO training of language models on one GPU. The public names, nothing else."""

from __future__ import annotations

import sys

from fusedgrpo import search_path

if search_path.is_command_line(sys.orig_argv):
    # Before any import from the library, for which a file in the user's folder could stand in.
    sys.path[:] = search_path.of_command_line(sys.path, sys.orig_argv)

from typing import TYPE_CHECKING, Any

from fusedgrpo import host

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.engine.callbacks import Callback
    from fusedgrpo.engine.trainer import GRPOTrainer
    from fusedgrpo.kernels.fused_loss.module import GRPOLoss

__version__ = "0.1.0"
__all__ = ["Callback", "GRPOConfig", "GRPOLoss", "GRPOTrainer", "__version__"]

host.require_packages()

_HOMES = {
    "Callback": "fusedgrpo.engine.callbacks",
    "GRPOConfig": "fusedgrpo.config.schema",
    "GRPOLoss": "fusedgrpo.kernels.fused_loss.module",
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
