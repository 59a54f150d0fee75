"""Imports go one way, from a layer to those above it in the list; no module is in two minds."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "fusedgrpo"

# From the ground up. What is in one row does not know the others of it. The longest name counts.
LAYERS = [
    ["errors", "search_path", "stages"],
    ["host", "input_files", "loss_options", "named_code", "tasks"],
    ["config"],
    ["kernels"],
    ["models"],
    ["engine.earlier_run", "engine.metric_names", "engine.callbacks", "engine.metric_schedule"],
    ["engine.seeding", "engine.interrupts", "engine.batch_plan", "engine.checkpoint_files",
     "engine.optimizer", "engine.run_clock", "engine.columns",
     "engine.entropy_bonus", "engine.given_optimizer", "engine.hub", "engine.child_process"],
    ["engine.distributed", "engine.run_control", "engine.torch_settings", "engine.step_means",
     "engine.train_summary"],
    # What sampling is, for all who sample, and for those who count its memory.
    ["engine.rollout.types"],
    ["engine.rollout.turns"],
    ["engine.rollout.sampler"],
    ["engine.rollout.warpers"],
    ["engine.memory", "engine.data", "engine.rewards"],
    ["engine.tools", "engine.roofline"],
    ["engine.execution"],
    ["engine.rollout"],
    ["engine.reporting"],
    ["engine.custom_loss", "engine.advantages", "engine.step_metrics", "engine.rollout_function",
     "engine.token_choice", "engine.step_passes"],
    ["engine.rollout_function"],
    ["engine.asking"],
    ["engine.learner", "engine.scoring", "engine.group_signal",
     "engine.group_scoring"],
    ["engine.comparison", "engine.evaluation", "engine.warmup", "engine.checkpointing",
     "engine.same_run"],
    ["engine.collector", "engine.held_out_check", "engine.drift_check", "engine.nonfinite",
     "engine.run_sampler", "engine.callback_events"],
    ["engine.checkpointer", "engine.own_options", "engine.planned_work", "engine.trl_surface",
     "engine.run_description", "engine.step_bounds"],
    ["engine.setup", "engine.run_session", "engine.evaluating", "engine.publishing",
     "engine.resuming"],
    ["engine.step_records"],
    ["engine.trainer"],
    ["doctor"],
    ["commands"],
    ["cli"],
    ["__main__"],
]  # fmt: skip
# Other people's trainers: imported by nobody, and what they import. Of the engine that is what it
# takes to make a rollout, so that their loop has our decoder itself and not a copy.
INTEGRATIONS = {
    "errors", "host", "loss_options", "kernels", "models", "integrations",
    "engine.rollout", "engine.rollout.types", "engine.rollout.turns", "engine.rollout.sampler",
    "engine.execution",
    "engine.memory", "engine.seeding",
}  # fmt: skip

LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}


def modules() -> dict[str, Path]:
    """Names below the package, such as ``engine.data.dataset``, and their files."""
    found = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = file
    return found


def room(module: str) -> str:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in LEVEL or name == "integrations":
            return name
    raise AssertionError(f"{module} is in no layer: add it to LAYERS.")


def imports(module: str, file: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and module of each import of our own, those for types and in functions as well."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            base = node.module or ""
            both = [f"{base}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("fusedgrpo.") in known else base for n in both]
        else:
            continue
        for name in names:
            if name.startswith("fusedgrpo."):
                yield node.lineno, name.removeprefix("fusedgrpo.")


def test_imports_go_one_way() -> None:
    known = modules()
    wrong = []
    for module, file in known.items():
        if module in ("", "engine"):  # the public names; what every part of the engine needs
            continue
        here = room(module)
        for line, target in imports(module, file, known):
            assert target in known, f"{module}:{line} imports {target}, which is not there"
            if target == "engine":
                continue
            there = room(target)
            if "integrations" in (here, there):
                right = here == "integrations" and there in INTEGRATIONS
            else:
                right = here == there or LEVEL[there] < LEVEL[here]
            if not right:
                wrong.append(f"{module}:{line} -> {target}")
    assert not wrong, "\n".join(["Imports that go the other way:", *sorted(wrong)])


def test_no_two_modules_import_each_other() -> None:
    """Rooms have one way through them, and so have the modules in a room."""
    known = modules()
    needs = {
        module: {target for _, target in imports(module, file, known)} - {module}
        for module, file in known.items()
        if module not in ("", "engine")
    }
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        raise AssertionError("A circle: " + " <- ".join(error.args[1])) from None
