"""The weights that completions are drawn from: base and adapter, or a copy with it merged in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusedgrpo import host
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.plan import MemoryPlan, RolloutWeights
from fusedgrpo.models.adapters.attached import adapter_layers
from fusedgrpo.models.adapters.plain_lora import all_plain

if TYPE_CHECKING:
    from fusedgrpo.models.policy import Policy

# Of a machine's main memory, or a GPU's, for a copy where nothing is planned.
SHARE = 1 / 4
# Making the copy after each update takes about as long as it saves in so many tokens.
WORTH_IT = 32


def pays(config: GRPOConfig) -> bool:
    """Whether completions may be long enough for a copy to be worth making."""
    return config.max_completion_length >= WORTH_IT


def choose_rollout_weights(
    config: GRPOConfig, plan: MemoryPlan | None, policy: Policy
) -> RolloutWeights:
    """The option ``rollout_weights``, and for ``auto`` what fits and pays.

    On a GPU that is what ``plan`` says. Without one, and on a CPU, a copy may take a quarter of the
    memory that the device has: not of what is free now, so that a resumed run has the same. Nothing
    is said of adapters that cannot be merged.
    """
    if config.rollout_weights != "auto":
        return config.rollout_weights
    if not pays(config) or not all_plain(policy) or policy.layout == "rows":
        return "adapter"
    on_gpu = policy.device.type == "cuda"
    if on_gpu and plan is not None:
        return plan.rollout_weights
    memory = host.gpu_memory(policy.device)[1] if on_gpu else host.memory()
    return "merged" if 0 < merged_bytes(policy) <= SHARE * memory else "adapter"


def merged_bytes(policy: Policy) -> int:
    """Bytes of a copy of all weights that have an adapter, in the dtype that is computed in; 0
    where there is none."""
    layers: list[Any] = adapter_layers(policy.model)
    sizes = (getattr(m, "in_features", 0) * getattr(m, "out_features", 0) for m in layers)
    return sum(sizes) * policy.dtype.itemsize
