"""The plan of a run's memory: bytes by phase, whether they fit, and the table that says so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fusedgrpo.errors import ConfigError

GIB = 2**30

RolloutWeights = Literal["adapter", "merged"]

# Beside what tensors take. The context: driver, loaded kernels and cuBLAS workspaces of a process
# that trains, of which a card's own monitor shows 0.5 to 0.7 GiB. Fragmentation: what the caching
# allocator keeps and cannot hand out, a share of what is allocated and freed in a step (weights
# are allocated once, and in whole segments).
CONTEXT = 3 * GIB // 4
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, for the longest case.

    resident: what stays during the whole run, by kind. phases: for each phase what it needs at its
    peak, by kind, resident parts as one. longest: tokens of prompt and completion, of which a
    micro-batch holds at least one. host: pinned memory beside the GPU. rollout_weights: whether a
    merged copy is among what stays. recorded: what CUDA graphs keep during a rollout, beside its
    tensors.
    """

    gpu_bytes: int
    resident: dict[str, int]
    phases: dict[str, dict[str, int]]
    tokens_per_microbatch: int
    max_in_flight: int
    activation_offloading: bool
    longest: int
    host: dict[str, int]
    rollout_weights: RolloutWeights = "adapter"
    recorded: int = 0
    advice: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of tensors by phase, to be compared with ``torch.cuda.max_memory_allocated``."""
        return {name: sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        """The highest of the totals."""
        return max(self.totals.values())

    @property
    def reserve(self) -> int:
        """Bytes that have to be free beside the tensors."""
        return CONTEXT + int(FRAGMENTATION * (self.peak - sum(self.resident.values())))

    @property
    def needed(self) -> int:
        return max(self.peak, self.totals["rollout"] + self.recorded) + self.reserve

    @property
    def fits(self) -> bool:
        return self.needed <= self.gpu_bytes


def parse_bytes(text: str) -> int:
    """``"24GB"``, ``"24 GiB"`` or ``"24"``: as cards are sold, in units of 2**30.

    Raises ConfigError.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ConfigError(f"gpu_memory: {text!r}: expected the size of a card, such as 24GB.")
    return int(float(found[1]) * GIB)


def plan_table(plan: MemoryPlan, measured: Mapping[str, int] | None = None) -> str:
    """A table: what stays, what each phase needs, and what was chosen.

    measured: bytes by phase (the names of ``plan.phases``), shown beside the planned ones.
    """
    lines = ["stays on the GPU"]
    lines += [_line(name, size) for name, size in plan.resident.items()]
    lines.append("\nhighest in each phase")
    totals = plan.totals
    for name, parts in plan.phases.items():
        line = _line(name, totals[name])
        if measured and name in measured:
            line += f"   measured {measured[name] / GIB:.2f}"
        own = [f"{part} {size / GIB:.2f}" for part, size in list(parts.items())[1:] if size]
        lines.append(line + (f"   {', '.join(own)}" if own else ""))
    lines += [
        "",
        _line("tensors", plan.peak),
        *([_line("recorded steps, in a rollout", plan.recorded)] if plan.recorded else []),
        _line("CUDA context, fragmentation", plan.reserve),
        _line("needed", plan.needed),
        _line("the GPU has", plan.gpu_bytes),
    ]
    lines += [_line(f"on the host: {name}", size) for name, size in plan.host.items()]
    lines += ["", chosen(plan), verdict(plan)]
    return "\n".join(lines)


def chosen(plan: MemoryPlan) -> str:
    """The choices in one line."""
    return (
        f"tokens_per_microbatch: {plan.tokens_per_microbatch} (at least one longest sequence, "
        f"{plan.longest}); max_in_flight: {plan.max_in_flight}; activation_offloading: "
        f"{str(plan.activation_offloading).lower()}; rollout_weights: {plan.rollout_weights}"
    )


def verdict(plan: MemoryPlan) -> str:
    """Does it fit, and else what does."""
    if plan.fits:
        return f"It fits: {(plan.gpu_bytes - plan.needed) / GIB:.1f} GiB are left."
    short = f"It does not fit: {(plan.needed - plan.gpu_bytes) / GIB:.1f} GiB are missing."
    return "\n".join([short, *(f"What does: {text}" for text in plan.advice)])


def _line(name: str, size: int) -> str:
    return f"  {name:<34} {size / GIB:8.2f} GiB"


def measured_phases(peaks: Mapping[str, float]) -> dict[str, int]:
    """The peaks of ``PhaseTimer`` by the names of a plan's phases; empty without a GPU."""
    names = {
        "memory/sample": "rollout",
        "memory/score": "scoring",
        "memory/update": "update backward",
    }
    return {names[name]: int(peak) for name, peak in peaks.items() if name in names}
