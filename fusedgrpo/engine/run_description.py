"""The parts and sizes of a run, as ``run.json`` has them: model, adapter, data, batch, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fusedgrpo import host
from fusedgrpo.engine.data.run_data import all_examples
from fusedgrpo.engine.memory.plan import MemoryPlan, measured_phases
from fusedgrpo.engine.reporting.run_facts import command, machine, versions
from fusedgrpo.kernels.backend import chosen_backend
from fusedgrpo.models import packed_attention
from fusedgrpo.models.policy import Policy


def described(trainer: Any) -> dict[str, Any]:
    """The run of a trainer. All sizes in bytes, all lengths in tokens."""
    policy: Policy = trainer.policy
    return {
        "total_steps": trainer.plan.total_steps,
        "model": _model(policy, trainer.args.model_name_or_path),
        "adapter": _adapter(policy),
        "data": _data(trainer),
        "batch": _batch(trainer),
        "attention": packed_attention.implementation(policy.causal_lm),
        "layout": policy.layout,
        "sampler": trainer.args.sampler,
        "rollout_weights": trainer.run_sampler.weights,
        "kernels": chosen_backend(policy.device, policy.dtype),
        "memory": {"plan": _plan(trainer.memory_plan), "measured": measured(trainer)},
        "roofline": trainer.bounds.described(),
    }


def session(trainer: Any) -> dict[str, Any]:
    """This session of it: where it begins, and what it runs on."""
    device = trainer.policy.device
    return {
        "first_step": trainer.progress.step + 1,
        "last_step": None,
        "versions": versions(),
        "machine": {
            **machine(),
            "processes": trainer.processes.size,
            "device": device.type,
            "bfloat16": host.has_bfloat16(device),
            "precision": trainer.policy.precision,
        },
        "command": command(),
    }


def measured(trainer: Any) -> dict[str, int]:
    """The highest peak of each phase so far, by the plan's names; empty without a GPU."""
    return measured_phases(trainer.memory_peaks)


def weights_in_words(model: Any) -> str:
    """``4-bit``, or the dtype that most of the weights have."""
    if getattr(model, "is_loaded_in_4bit", False):
        return "4-bit"
    sizes: Counter[Any] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel() * parameter.is_floating_point()
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def _model(policy: Policy, name: str | None) -> dict[str, Any]:
    model = policy.causal_lm
    return {
        "name": name or getattr(model, "name_or_path", None) or None,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "trainable": sum(parameter.numel() for _, parameter in policy.trainable()),
        "dtype": weights_in_words(model),
        "quantisation": _quantisation(getattr(model.config, "quantization_config", None)),
    }


def _quantisation(config: Any) -> dict[str, Any] | None:
    """method, and what there is to say of it: of bitsandbytes' 4 bits their kind."""
    if config is None:
        return None
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    found = {
        "method": str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    }
    if values.get("load_in_4bit"):
        kind, double = values["bnb_4bit_quant_type"], values["bnb_4bit_use_double_quant"]
        return {**found, "bits": 4, "kind": kind, "double": double}
    return {**found, "bits": 8 if values.get("load_in_8bit") else values.get("bits")}


def _adapter(policy: Policy) -> dict[str, Any] | None:
    """The first one that is trained. target_modules: the names of the layers that have it, without
    what is before the last dot; modules: how many there are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if policy.adapters is None or not policy.adapters.trained:
        return None
    name = policy.adapters.trained[0]
    settings = policy.adapters.configs[name]
    layers = [
        path.rpartition(".")[2]
        for path, module in policy.causal_lm.named_modules()
        if isinstance(module, BaseTunerLayer) and name in module.active_adapters
    ]
    return {
        "name": name,
        "type": settings.peft_type.value,
        "r": getattr(settings, "r", None),
        "alpha": getattr(settings, "lora_alpha", None),
        "target_modules": sorted(set(layers)),
        "modules": len(layers),
    }


def _data(trainer: Any) -> dict[str, Any]:
    held_out = trainer.held_out
    sets = held_out if isinstance(held_out, Mapping) else {} if held_out is None else {"": held_out}
    prompts = all_examples(trainer.data, held_out)
    return {
        "source": trainer.data.source,
        "rows": len(trainer.data),
        "skipped": len(trainer.data.skipped),
        "held_out": {name: len(rows) for name, rows in sets.items()},
        "longest_prompt": max(len(example.prompt_ids) for example in prompts),
    }


def _batch(trainer: Any) -> dict[str, Any]:
    plan, limits = trainer.plan, trainer.execution.oom_retry
    return {
        "prompts_per_step": plan.groups_per_step,
        "generations": plan.num_generations,
        "completions_per_step": plan.completions_per_step,
        "prompts_per_rollout": plan.groups_per_rollout,
        "steps_per_rollout": plan.steps_per_rollout,
        "iterations": plan.num_iterations,
        "epochs": plan.prompts / plan.num_prompts,
        "tokens_per_microbatch": limits.tokens,
        "max_in_flight": limits.in_flight,
    }


def _plan(plan: MemoryPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {
        "gpu": plan.gpu_bytes,
        "resident": plan.resident,
        "phases": plan.totals,
        "peak": plan.peak,
        "reserve": plan.reserve,
        "needed": plan.needed,
        "fits": plan.fits,
    }
