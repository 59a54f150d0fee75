"""TRL's trainers, if they are what was tested."""

from __future__ import annotations

import inspect
from typing import Any

from fusedgrpo import host

TESTED = "1.16"


def import_trl() -> tuple[Any, Any]:
    """The modules of the two trainers; ImportError with the remedy where TRL is not as expected."""
    remedy = f"Install the version that was tested: pip install 'trl=={TESTED}.*'."
    try:
        from trl.trainer import grpo_trainer, rloo_trainer
    except ImportError as error:
        raise ImportError(f"fusedgrpo.integrations.trl needs TRL: {error}. {remedy}") from error
    version = host.package_version("trl") or "unknown"
    if version.split(".")[:2] != TESTED.split("."):
        raise ImportError(
            f"fusedgrpo.integrations.trl was tested with TRL {TESTED}, this is {version}. {remedy}"
        )
    expected = {
        "_get_per_token_logps_and_entropies": (
            "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
            "compute_entropy", "compute_aux_loss",
        ),
        "_compute_loss": ("model", "inputs"),
        "_prepare_inputs": ("generation_batch",),
    }  # fmt: skip
    masks = {
        "get_high_entropy_mask": ("entropies", "mask", "threshold"),
        "get_off_policy_mask": (
            "advantages", "per_token_logps", "sampling_per_token_logps", "mask",
            "off_policy_threshold",
        ),
    }  # fmt: skip
    rollouts = {
        "_generate_single_turn": (
            "prompt_ids", "images", "multimodal_fields", "num_generations",
        ),
    }  # fmt: skip
    for module, name, methods in (
        (grpo_trainer, "GRPOTrainer", expected | masks | rollouts),
        (rloo_trainer, "RLOOTrainer", expected),
    ):
        for method, names in methods.items():
            signature = inspect.signature(getattr(getattr(module, name), method))
            found = tuple(parameter for parameter in signature.parameters if parameter != "self")
            if found[: len(names)] != names:
                raise ImportError(
                    f"TRL {version}: {name}.{method} takes ({', '.join(found)}), expected "
                    f"({', '.join(names)}, ...). {remedy}"
                )
        if not hasattr(module, "shuffle_sequence_dict"):
            raise ImportError(f"TRL {version}: {module.__name__} does not shuffle. {remedy}")
    return grpo_trainer, rloo_trainer
