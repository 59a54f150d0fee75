"""Options that are settings of torch itself, for the whole process."""

from __future__ import annotations

from fusedgrpo import host
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError


def apply(config: GRPOConfig) -> None:
    """Set what was asked for, as transformers sets it; what was not stays as it is. Raises
    ConfigError where the device has no TF32."""
    from transformers.trainer_utils import enable_full_determinism
    from transformers.utils.import_utils import enable_tf32

    if config.tf32:
        device = host.pick_device(config.use_cpu)
        if device.type != "cuda" or (host.gpu_capability() or (0, 0)) < (8, 0):
            raise ConfigError(
                f"tf32: {device.type} here has no TF32 (GPUs since Ampere have it). Leave it out."
            )
    if config.tf32 is not None:
        enable_tf32(config.tf32)
    if config.full_determinism:
        # Where torch has no deterministic algorithm (a sum for top_p on a GPU) it says so.
        enable_full_determinism(config.seed, warn_only=True)
