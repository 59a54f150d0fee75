"""Values that transformers has for an option and this trainer has not, with the reason."""

from __future__ import annotations

from typing import Any

_MATRICES = (
    "it projects the gradients of whole weight matrices through hooks in the model, and an "
    "adapter's are small already. Use adamw_8bit or paged_adamw_8bit"
)
_IN_BACKWARD = (
    "it updates inside the backward pass, before the gradients are clipped and known to be finite. "
    "Use adafactor or adamw_8bit"
)
_TWO_WEIGHTS = (
    "it has one set of weights for the gradients and another for sampling, which have to be "
    "switched in between. Use adamw_torch with lr_scheduler_type: constant_with_warmup"
)
_OWN_TENSORS = (
    "its state is in tensors of torchao's own kind, which a checkpoint cannot hold. Use adamw_8bit"
)

_REASONS: dict[str, dict[str, str]] = {
    "optim": {
        **dict.fromkeys(
            ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
             "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw",
             "apollo_adamw_layerwise"),
            _MATRICES,
        ),
        **dict.fromkeys(("lomo", "adalomo"), _IN_BACKWARD),
        **dict.fromkeys(
            ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _TWO_WEIGHTS
        ),
        **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), _OWN_TENSORS),
        "adamw_torch_xla": "it is for TPUs. Use adamw_torch",
        "adamw_torch_npu_fused": "it is for NPUs. Use adamw_torch",
    },
}  # fmt: skip


def why_not(option: str, value: Any) -> str | None:
    """The refusal of a value that another trainer takes; None where there is no such."""
    value = getattr(value, "value", value)
    reason = _REASONS.get(option, {}).get(value) if isinstance(value, str) else None
    return reason and f"{value} is not supported: {reason}."
