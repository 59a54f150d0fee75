"""How a run that does not fit can be made to, nearest change first."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from fusedgrpo.engine.memory.plan import MemoryPlan
from fusedgrpo.engine.memory.workload import Asked, paged


def advice(asked: Asked, plan: MemoryPlan, choose: Callable[[Asked], MemoryPlan]) -> Iterator[str]:
    """The first single change that makes it fit, else changes one after the other."""
    steps = list(_changes(asked, plan))
    for text, changed in steps:
        found = choose(changed(asked))
        if found.fits:
            yield f"{text}: {_gib(found.needed)}"
            return
    together: list[str] = []
    found = plan
    for text, changed in steps:
        asked = changed(asked)
        together.append(text)
        found = choose(asked)
        if found.fits:
            yield f"{' and '.join(together)}: {_gib(found.needed)}"
            return
    tried = f"even with {' and '.join(together)} " if together else ""
    yield f"{tried}it needs {_gib(found.needed)}: a smaller model or a larger card"


def _changes(asked: Asked, plan: MemoryPlan) -> Iterator[tuple[str, Any]]:
    config = asked.config

    def option(**options: Any) -> tuple[str, Any]:
        text = ", ".join(f"{name}: {_yaml(value)}" for name, value in options.items())
        return text, lambda asked: asked.changed(**options)

    if plan.rollout_weights == "merged":  # a copy that was not asked for is only where it fits
        yield option(rollout_weights="adapter")
    if plan.tokens_per_microbatch > plan.longest:
        yield option(tokens_per_microbatch=plan.longest)
    if config.max_in_flight is not None and config.max_in_flight > 1:
        yield option(max_in_flight=None)
    if not config.gradient_checkpointing:
        yield option(gradient_checkpointing=True)
    if asked.offloading is False and config.gradient_checkpointing:
        yield (
            "activation_offloading: true",
            lambda asked: dataclasses.replace(asked, offloading=True),
        )
    if config.optim in ("adamw_torch", "adamw_torch_fused"):
        yield option(optim="adamw_8bit")
    if not paged(config):
        yield option(optim="paged_adamw_8bit")
    if not config.load_in_4bit and config.finetuning_type == "lora":
        yield option(load_in_4bit=True)
    length = config.max_completion_length
    for shorter in (length // 2, length // 4):
        if shorter >= 64:
            yield option(max_completion_length=shorter)
    if config.lora_r > 16 and config.finetuning_type == "lora":
        yield option(lora_r=16, lora_alpha=None)
    if config.finetuning_type == "full":
        yield option(finetuning_type="lora")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
