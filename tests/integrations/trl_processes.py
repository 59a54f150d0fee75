"""What each process of ``test_trl_distributed.py`` runs: ``torchrun trl_processes.py OUT [zero3]``.

Every scenario leaves ``OUT/NAME-RANK.pt``; the test compares them. DDP and FSDP2 take turns in one
launch, since importing everything takes longer than all of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny
import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from fusedgrpo.integrations.packed_forward import install
from fusedgrpo.integrations.trl import FusedGRPOTrainer, FusedRLOOTrainer
from fusedgrpo.models.packed_batch import PackedBatch

PROMPTS = [f"w{i} w{i + 1} w{i // 2}" for i in range(4, 10)] + ["w5", "w30 w31"]
OF_THE_TRAINER = ("model", "reward_funcs", "peft_config", "group_rows", "fused_loss",
                  "fused_rollouts", "tokens_per_microbatch")  # fmt: skip
ROWS = 8

# name: trainer, options.
STEPS: dict[str, tuple[Any, dict[str, Any]]] = {}
for adapter in ("full", "lora"):
    own = {"peft_config": "lora"} if adapter == "lora" else {}
    STEPS |= {
        f"{adapter}-trl": (GRPOTrainer, own),
        f"{adapter}-fused": (FusedGRPOTrainer, own),
        f"{adapter}-fused_loss": (FusedGRPOTrainer, {**own, "fused_loss": True}),
    }
for loss in ({"loss_type": "grpo", "beta": 0.1}, {"importance_sampling_level": "sequence"}):
    name = next(iter(loss))
    STEPS |= {
        f"{name}-trl": (GRPOTrainer, loss),
        f"{name}-fused": (FusedGRPOTrainer, loss),
        f"{name}-fused_loss": (FusedGRPOTrainer, {**loss, "fused_loss": True}),
    }
STEPS |= {"rloo-trl": (RLOOTrainer, {}), "rloo-fused": (FusedRLOOTrainer, {})}

# name: options. Each with stock TRL, our forward, our loss as well.
RUNS: dict[str, dict[str, Any]] = {
    # Old log-probs are scored, and each rollout is used twice.
    "iterations": {"steps_per_generation": 4, "num_iterations": 2, "peft_config": "lora"},
    "kl": {"beta": 0.1, "loss_type": "grpo", "gradient_checkpointing": False},
}

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trl": (GRPOTrainer, {}),
    "fused": (FusedGRPOTrainer, {"group_rows": False}),
    "fused_loss": (FusedGRPOTrainer, {"group_rows": False, "fused_loss": True}),
}

# Of STEPS, those that are repeated with sharded weights.
SHARDED = ("full-fused", "full-fused_loss", "lora-fused")


def rank_and_size() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def reward(completion_ids: list[list[int]], prompts: list[str], **kwargs: Any) -> list[float]:
    """Equal for all completions of some prompts: their advantages are 0."""
    return [
        0.5 if len(prompt) < 6 else sum(i % 2 == 0 for i in ids) / max(len(ids), 1)
        for ids, prompt in zip(completion_ids, prompts, strict=True)
    ]


def launch_arguments(name: str) -> Any:
    """What ``accelerate launch --config_file docs/accelerate/NAME.yaml`` reads from the file."""
    path = Path(__file__).parents[2] / "docs" / "accelerate" / f"{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    return _validate_launch_command(arguments)[0]


def use_fsdp2() -> None:
    """Go on as under ``accelerate launch --config_file docs/accelerate/fsdp2.yaml``, in float32."""
    environment = prepare_multi_gpu_env(launch_arguments("fsdp2"))
    os.environ |= {k: v for k, v in environment.items() if "FSDP" in k}
    AcceleratorState._reset_state()


def use_zero3() -> dict[str, Any]:
    """Arguments for ZeRO-3 with DeepSpeed's CPU accelerator and gloo."""
    import deepspeed.comm.torch  # noqa: F401

    # It would compile an operator for collectives in shared memory.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    own = {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,  # so that tiny parameters are sharded too
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
    }
    return {"deepspeed": own, "use_cpu": False, "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": 1, "steps_per_generation": 2}  # fmt: skip


def as_if_on_gpus(strategy: str) -> None:
    """accelerate 1.15 shards only where it sees GPUs."""
    rank, size = rank_and_size()
    state = PartialState._shared_state
    if strategy == "fsdp2":
        state["distributed_type"] = DistributedType.MULTI_GPU
    elif strategy == "zero3":
        state.update(
            backend="gloo", num_processes=size, process_index=rank, local_process_index=rank
        )


def make(cls: Any, out: Path, strategy: str = "ddp", **options: Any) -> Any:
    own = {name: options.pop(name) for name in OF_THE_TRAINER if name in options}
    if own.get("peft_config") == "lora":
        own["peft_config"] = LoraConfig(target_modules="all-linear", r=2)
    config = RLOOConfig if issubclass(cls, RLOOTrainer) else GRPOConfig
    model = tiny.model("Llama", scale=6.0)
    model.config._name_or_path = str(out / "model")  # TRL loads its reference from there
    defaults: dict[str, Any] = {
        "output_dir": str(out / "run"), "use_cpu": True, "bf16": False, "report_to": "none",
        "logging_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4,
        "gradient_accumulation_steps": 2, "max_completion_length": 8, "max_steps": 3,
        "learning_rate": 1e-2, "disable_dropout": True, "save_strategy": "no",
        "adam_epsilon": 1e-3, "disable_tqdm": True, "beta": 0.0, "ddp_timeout": 1500,
        "ddp_backend": "gloo" if rank_and_size()[1] > 1 else None,
    }  # fmt: skip
    arguments = config(**(defaults | options))
    as_if_on_gpus(strategy)
    return cls(
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny.tokenizer(),
        **({"model": model, "reward_funcs": reward} | own),
    )


def inputs(rank: int, size: int) -> dict[str, Any]:
    """This process' share of two groups of 8: the second half has advantages of 0 throughout and
    is shorter, its first completion masked, so that halves need different numbers of forwards."""
    g = torch.Generator().manual_seed(3)
    rows, T = 2 * ROWS, 9
    lengths = torch.tensor([9, 4, 1, 6, 3, 0, 7, 5, 0, 3, 2, 2, 1, 4, 3, 2])
    zeros = [0.0] * ROWS
    whole: dict[str, Any] = {
        "prompt_ids": torch.tensor([[0, 0, 5, 6, 7]] * ROWS + [[8, 9, 10, 11, 12]] * ROWS),
        "prompt_mask": torch.tensor([[0, 0, 1, 1, 1]] * ROWS + [[1] * 5] * ROWS),
        "completion_ids": torch.randint(4, tiny.VOCAB, (rows, T), generator=g),
        "completion_mask": (torch.arange(T) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.0, -0.7, 0.0, 0.4, -1.2, 0.9, 0.0, 0.3, *zeros]),
    }
    mask = whole["completion_mask"]
    for name in ("ref_per_token_logps", "old_per_token_logps"):
        whole[name] = (-3 + 0.4 * torch.randn(rows, T, generator=g)) * mask
    whole["old_logps"] = whole["old_per_token_logps"].sum(1)  # RLOO's
    share = slice(rank * rows // size, (rank + 1) * rows // size)
    own = {name: value[share] for name, value in whole.items()}
    return own | {"num_items_in_batch": lengths.sum()}


def prepared(cls: Any, out: Path, strategy: str = "ddp", **options: Any) -> tuple[Any, Any]:
    """A trainer, and its model as accelerate hands it."""
    trainer = make(cls, out, strategy, **options)
    if "peft_config" in options:
        torch.manual_seed(5)
        tiny.stir(trainer.model)  # so that both matrices of an adapter have a gradient
    model, accelerator = trainer.model, trainer.accelerator
    if strategy == "ddp":
        model = accelerator.prepare_model(model)
    else:
        assert accelerator.is_fsdp2 or strategy == "zero3"
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.train()
    trainer.current_gradient_accumulation_steps = 2
    return trainer, model


def step(cls: Any, out: Path, strategy: str = "ddp", **options: Any) -> dict[str, Any]:
    """Loss, gradients and metrics of one ``_compute_loss``."""
    trainer, model = prepared(cls, out, strategy, **options)
    forwards = []
    model.register_forward_hook(lambda *args: forwards.append(torch.is_grad_enabled()))
    loss = trainer._compute_loss(model, inputs(*rank_and_size()))
    if strategy == "zero3":
        from deepspeed.utils import safe_get_full_grad as gradient_of

        model.backward(loss)
    else:
        gradient_of = whole_gradient
        trainer.accelerator.backward(loss)
    gradients = {
        name.removeprefix("module."): gradient_of(parameter).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {
        "loss": loss.detach(),
        "gradients": gradients,
        "metrics": dict(trainer._metrics["train"]),
        "forwards": forwards,
    }


def whole_gradient(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def scored(out: Path, strategy: str) -> torch.Tensor:
    """Log-probs of a bfloat16 run."""
    trainer, model = prepared(FusedGRPOTrainer, out, strategy, bf16=True)
    own = inputs(*rank_and_size())
    ids, mask = (
        torch.cat([own[f"prompt_{what}"], own[f"completion_{what}"]], dim=1)
        for what in ("ids", "mask")
    )
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(model, ids, mask, 9, batch_size=3)[0]


def plainly_sharded(adapter: str, shard: bool) -> dict[str, Any]:
    """Log-probs, entropies and gradients of a model whose blocks are sharded, and then the rest."""
    model = tiny.model("Llama", scale=6.0)
    causal_lm = model
    if adapter == "lora":
        torch.manual_seed(5)
        model = tiny.add_lora(model)
    install(causal_lm)
    if shard:
        for block in causal_lm.model.layers:
            fully_shard(block)
        fully_shard(model)
    rank = rank_and_size()[0]
    with torch.no_grad():
        (layout,) = model(fusedgrpo_packed="layout")
    parts, logps, entropies = ([0, 1] if not shard else [rank]), [], []
    for part in parts:  # what the processes do at the same time, one of them does in turn
        pairs = [((5, 6, 7), tuple(range(4, 8 + 3 * part))), ((5, 6, 7), (9, 8))]
        packed = PackedBatch.build(pairs, "cpu", layout)
        answer = model(fusedgrpo_packed=(packed, True))
        weights = torch.linspace(-1, 1, len(answer))
        loss = (answer.real * weights).sum() + 0.1 * answer.imag.sum()
        (loss / (1 if shard else 2)).backward()  # FSDP averages
        logps.append(answer.real.detach())
        entropies.append(answer.imag.detach())
    gradients = {n: whole_gradient(p) for n, p in model.named_parameters() if p.requires_grad}
    return {"layout": layout, "logp": logps, "entropy": entropies, "gradients": gradients}


def run(cls: Any, out: Path, strategy: str, **options: Any) -> list[dict[str, Any]]:
    """The log of a whole run, without what depends on the clock."""
    trainer = make(cls, out, strategy, **options)
    trainer.train()
    skip = ("runtime", "per_second", "step_time")
    return [
        {k: v for k, v in row.items() if not any(s in k for s in skip)}
        for row in trainer.state.log_history
    ]


def run_with_rollouts(out: Path) -> dict[str, Any]:
    """The log of a run with our decoder, half of each group in each process; what this one said,
    and the weights that it ended with."""
    said: list[list[list[int]]] = []

    def watched(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        said.append(completion_ids)
        return reward(completion_ids, **kwargs)

    trainer = make(
        FusedGRPOTrainer, out, fused_rollouts=True, num_generations=16, peft_config="lora",
        reward_funcs=watched,
    )  # fmt: skip
    trainer.train()
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {"log": trainer.state.log_history, "said": said, "weights": weights}


def main(out: Path, only: str | None = None) -> None:
    torch.set_num_threads(1)
    rank = rank_and_size()[0]

    def leave(name: str, value: Any) -> None:
        torch.save(value, out / f"{name}-{rank}.pt")

    if only == "zero3":
        arguments = use_zero3()
        for name in SHARDED:
            cls, options = STEPS[name]
            leave(f"zero3-{name}", step(cls, out, "zero3", **options, **arguments))
        return
    leave("ddp-rollouts", run_with_rollouts(out))
    for strategy in ("ddp", "fsdp2"):
        if strategy == "fsdp2":
            use_fsdp2()
        for name, (cls, options) in STEPS.items():
            if strategy == "ddp" or name in SHARDED:
                leave(f"{strategy}-{name}", step(cls, out, strategy, **options))
        for name, options in RUNS.items():
            for kind, (cls, extra) in KINDS.items():
                leave(f"{strategy}-{name}-{kind}", run(cls, out, strategy, **options, **extra))
    leave("fsdp2-bf16", scored(out, "fsdp2"))
    for adapter in ("full", "lora"):
        leave(f"plain-{adapter}", plainly_sharded(adapter, shard=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
