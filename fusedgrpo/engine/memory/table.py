"""A memory plan as text."""

from __future__ import annotations

from collections.abc import Mapping

from fusedgrpo.engine.memory.planner import GIB, MemoryPlan


def plan_table(plan: MemoryPlan, measured: Mapping[str, int] | None = None) -> str:
    """What stays, what each phase needs, and what was chosen.

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
        f"{str(plan.activation_offloading).lower()}"
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
    """The peaks of ``StepClock`` by the names of a plan's phases; empty without a GPU."""
    names = {
        "memory/sample": "rollout",
        "memory/score": "scoring",
        "memory/update": "update backward",
    }
    return {names[name]: int(peak) for name, peak in peaks.items() if name in names}
