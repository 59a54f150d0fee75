"""All that scripts for ``trl.GRPOTrainer`` do with a trainer beside ``train``: each name works,
or says what to do instead."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState

    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.engine.checkpointing import Progress
    from fusedgrpo.engine.distributed import Processes
    from fusedgrpo.engine.learner import Learner
    from fusedgrpo.engine.run_control import RunControl
    from fusedgrpo.models.policy import Policy

_CALLBACKS = (
    "give instances of fusedgrpo.Callback to the constructor (callbacks=[...]); they are in the "
    "attribute callbacks"
)
_OWN_STEP = (
    "the step is not transformers'. fusedgrpo.integrations.trl.FusedGRPOTrainer is TRL's trainer "
    "on this forward pass, with everything that can be overridden there"
)
_GENERATION = (
    "completions come from the model alone. Give `sampler` another Sampler, or use "
    "fusedgrpo.integrations.trl.FusedGRPOTrainer"
)
_UPLOAD = (
    "nothing is uploaded. After the run: huggingface_hub.upload_folder(repo_id=..., "
    "folder_path=...) of what save_model has written"
)

# Arguments of TRL's constructor, and what to do instead.
ARGUMENTS = {
    "optimizers": "optim, learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon and "
    "lr_scheduler_type describe the optimizer and its schedule",
    "tools": _GENERATION,
    "rollout_func": _GENERATION,
    "environment_factory": _GENERATION,
}

# Methods and attributes of TRL's trainer, and what to do instead.
METHODS = {
    **dict.fromkeys(["add_callback", "pop_callback", "remove_callback"], _CALLBACKS),
    **dict.fromkeys(["push_to_hub", "init_hf_repo"], _UPLOAD),
    "predict": "evaluate() samples and scores held-out prompts; completions/*.jsonl has the texts",
    "log": "metrics.jsonl is the run's own; a reward function logs with log_metric and log_extra",
    "hyperparameter_search": "start a run per setting: fusedgrpo train CONFIG --option value",
    **dict.fromkeys(
        ["compute_loss", "training_step", "prediction_step", "create_optimizer",
         "create_scheduler", "create_optimizer_and_scheduler", "get_train_dataloader",
         "get_eval_dataloader", "get_test_dataloader", "evaluation_loop", "floating_point_ops"],
        _OWN_STEP,
    ),
}  # fmt: skip
ATTRIBUTES = {
    **dict.fromkeys(["callback_handler", "control"], _CALLBACKS),
    **dict.fromkeys(["data_collator", "label_names", "compute_metrics"], _OWN_STEP),
    "ref_model": "trainer.policy.reference() is the context in which the model is the reference",
    "vllm_generation": _GENERATION,
    "deepspeed": "every process holds the whole model",
}


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """ConfigError for arguments of TRL's constructor that ask for something; None, an empty list
    and ``(None, None)`` do not."""
    problems = []
    for name, value in given.items():
        nothing = value is None or (
            isinstance(value, (list, tuple)) and all(item is None for item in value)
        )
        if not nothing:
            problems.append(f"{name}: {ARGUMENTS[name]}.")
    if problems:
        raise ConfigError(problems)


class TRLSurface:
    """The names of TRL's trainer, on top of what a trainer here has."""

    args: GRPOConfig
    policy: Policy
    learner: Learner
    processes: Processes
    progress: Progress
    run_control: RunControl
    plan: Any
    stream: Any

    @property
    def model(self) -> nn.Module:
        """The model that is trained, a peft model if there is an adapter."""
        model: nn.Module = self.policy.model
        return model

    @property
    def model_wrapped(self) -> nn.Module:
        return self.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.learner.optimizer

    @property
    def lr_scheduler(self) -> Any:
        return self.learner.scheduler

    @functools.cached_property
    def accelerator(self) -> Accelerator:
        """An ``Accelerator`` for what scripts ask of it; the trainer does without."""
        from accelerate import Accelerator

        return Accelerator(cpu=self.policy.device.type == "cpu")

    @property
    def state(self) -> TrainerState:
        """Where the run is, with the rows of metrics.jsonl as ``log_history``: a copy."""
        from transformers import TrainerState

        metrics = Path(self.args.output_dir).expanduser() / "metrics.jsonl"
        best = self.run_control.best_model_checkpoint
        rows = read_metrics(metrics) if self.progress.step and metrics.exists() else []
        return TrainerState(
            global_step=self.progress.step,
            max_steps=self.plan.total_steps,
            epoch=self.stream.epoch,
            num_train_epochs=math.ceil(self.args.num_train_epochs),
            logging_steps=self.run_control.logging_steps,
            save_steps=self.run_control.save_steps,
            eval_steps=self.run_control.eval_steps,
            best_metric=self.run_control.best_metric,
            best_global_step=self.run_control.best_global_step,
            best_model_checkpoint=None if best is None else str(best),
            num_input_tokens_seen=self.progress.num_tokens,
            log_history=[dict(row) for row in rows],
            is_world_process_zero=self.processes.is_main,
        )

    def is_world_process_zero(self) -> bool:
        return self.processes.is_main

    def is_local_process_zero(self) -> bool:
        return bool(self.accelerator.is_local_main_process)

    def get_learning_rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_num_trainable_parameters(self) -> int:
        return sum(p.numel() for _, p in self.policy.trainable())

    def metrics_format(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _shown(value) for name, value in metrics.items()}

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print ``metrics`` as a table, in process 0."""
        if not self.processes.is_main:
            return
        width = max((len(name) for name in metrics), default=0)
        lines = [f"  {name:<{width}} = {_shown(metrics[name])}" for name in sorted(metrics)]
        print("\n".join([f"***** {split} metrics *****", *lines]))

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write ``{split}_results.json`` and, combined, ``all_results.json`` into the output
        directory."""
        if not self.processes.is_main:
            return
        directory = Path(self.args.output_dir).expanduser()
        _write_json(directory / f"{split}_results.json", dict(metrics))
        if combined:
            path = directory / "all_results.json"
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            _write_json(path, before | dict(metrics))

    def save_state(self) -> None:
        """Write ``trainer_state.json`` into the output directory. Checkpoints have their own."""
        if self.processes.is_main:
            path = Path(self.args.output_dir).expanduser() / "trainer_state.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(path))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **more: Any,
    ) -> None:
        """Write ``README.md`` into the output directory. ``more`` goes into its header."""
        if not self.processes.is_main:
            return
        import yaml

        directory = Path(self.args.output_dir).expanduser()
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        header = {
            "library_name": "transformers" if self.policy.adapters is None else "peft",
            "base_model": self.args.model_name_or_path,
            "datasets": dataset_name,
            "tags": [*dict.fromkeys([*tags, "grpo", "fusedgrpo"])],
        } | more
        header = {name: value for name, value in header.items() if value is not None}
        name = model_name or self.args.run_name or directory.name
        text = (
            f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {name}\n\n"
            f"Trained with GRPO by fusedgrpo, {self.progress.step} steps. The options are in "
            "`config.resolved.yaml`, the metrics in `metrics.jsonl`.\n"
        )
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "README.md").write_text(text, encoding="utf-8")

    def __getattr__(self, name: str) -> Any:
        # Only for what is not there.
        if name in METHODS:

            def absent(*args: Any, **kwargs: Any) -> Any:
                raise ConfigError(f"GRPOTrainer.{name}: {METHODS[name]}.")

            return absent
        text = f"GRPOTrainer has no {name!r}"
        raise AttributeError(f"{text}: {ATTRIBUTES[name]}." if name in ATTRIBUTES else f"{text}.")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=4, sort_keys=True) + "\n", encoding="utf-8")
