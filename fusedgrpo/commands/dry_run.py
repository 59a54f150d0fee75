"""``fusedgrpo train --dry_run``: the run that would be, from a trainer that is ready for it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fusedgrpo.engine import checkpointing
from fusedgrpo.engine.data.dataset import PromptDataset
from fusedgrpo.engine.data.held_out import each_of
from fusedgrpo.engine.memory.plan import plan_table
from fusedgrpo.engine.setup import describe

if TYPE_CHECKING:
    from fusedgrpo.engine.trainer import GRPOTrainer


def said(trainer: GRPOTrainer) -> str:
    """The run in words, one thing a line. Raises CheckpointError for a checkpoint that it could not
    go on from."""
    args = trainer.args
    weights = trainer.reward_funcs.weights.tolist()
    rewards = zip(trainer.reward_funcs.names, weights, strict=True)
    lines = {
        "plan": describe(args, trainer.policy, trainer.plan, trainer.processes, trainer.asking),
        "model": f"{args.model_name_or_path} ({type(trainer.policy.causal_lm).__name__})",
        "data": _data(trainer.data),
        "evaluation": "; ".join(map(_data, each_of(trainer.held_out))) or "none",
        "rewards": ", ".join(f"{name} x {weight:g}" for name, weight in rewards),
        "tools": _tools(trainer),
        "sampler": type(trainer.sampler).__name__,
        "begins": _begins(trainer),
        "writes to": str(Path(args.output_dir).expanduser().absolute()),
    }
    text = "\n".join(f"{name:<11} {line}" for name, line in lines.items())
    if trainer.memory_plan is not None:
        text += f"\n\nMemory, planned:\n{plan_table(trainer.memory_plan)}"
    return f"{text}\n\nA dry run: everything was checked, nothing was trained."


def _data(data: PromptDataset) -> str:
    lengths = sorted(len(example.prompt_ids) for example in data.examples)
    text = (
        f"{data.source}: {len(lengths)} prompts of {lengths[0]} to {lengths[-1]} tokens "
        f"(median {lengths[len(lengths) // 2]})"
    )
    return text + (f", {len(data.skipped)} rows skipped" if data.skipped else "")


def _tools(trainer: GRPOTrainer) -> str:
    if trainer.asking.tools is None:
        return "none"
    tools = trainer.asking.tools.tools
    if not tools.environments:
        return ", ".join(tools.names())
    each = {name or "the environment": tools.names(name) for name in tools.environments}
    return "; ".join(f"{name}: {', '.join(names)}" for name, names in each.items())


def _begins(trainer: GRPOTrainer) -> str:
    resume = trainer.args.resume_from_checkpoint
    if resume in (None, False):
        return "with step 1"
    folder = Path(trainer.args.output_dir).expanduser().absolute() / "checkpoints"
    found = checkpointing.find(resume, folder)
    if found is None:
        return f"with step 1: {folder} has no checkpoint"
    state = checkpointing.read_state(found)
    if "started" in state:
        trainer.set_clock(datetime.fromisoformat(state["started"]))
    trainer.identity.check(state, found)
    return f"after step {state['progress']['step']}, from {found}"
