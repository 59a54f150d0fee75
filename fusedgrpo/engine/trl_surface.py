"""All that scripts for ``trl.GRPOTrainer`` do with a trainer beside ``train``: each name works,
or says what to do instead."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedgrpo.engine.callbacks import Callback, sorted_callbacks
from fusedgrpo.errors import ConfigError
from fusedgrpo.kernels.loss.selection import entropy_threshold, near_policy

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerControl, TrainerState
    from transformers.trainer_callback import CallbackHandler

    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.engine.asking import Asking
    from fusedgrpo.engine.callback_events import CallbackEvents
    from fusedgrpo.engine.distributed import Processes
    from fusedgrpo.engine.learner import Learner
    from fusedgrpo.engine.rewards import RewardFunctions
    from fusedgrpo.models.policy import Policy

_OWN_STEP = (
    "the step is not transformers'. fusedgrpo.integrations.trl.FusedGRPOTrainer is TRL's trainer "
    "on this forward pass, with everything that can be overridden there"
)
_GENERATION = (
    "completions come from the model alone. Give `sampler` another Sampler, or use "
    "fusedgrpo.integrations.trl.FusedGRPOTrainer"
)
# Methods and attributes of TRL's trainer, and what to do instead.
METHODS = {
    "predict": "evaluate() samples and scores held-out prompts; a run's are in eval_completions/",
    "hyperparameter_search": "start a run per setting: fusedgrpo train CONFIG --option value",
    **dict.fromkeys(
        ["compute_loss", "training_step", "prediction_step", "create_optimizer",
         "create_scheduler", "create_optimizer_and_scheduler", "get_train_dataloader",
         "get_eval_dataloader", "get_test_dataloader", "evaluation_loop", "floating_point_ops"],
        _OWN_STEP,
    ),
}  # fmt: skip
ATTRIBUTES = {
    **dict.fromkeys(["data_collator", "label_names", "compute_metrics"], _OWN_STEP),
    "vllm_generation": _GENERATION,
    "environments": "each lives as long as its completion, in a process of its own. A reward "
    "function with an argument `environments` is given copies of them as they are at the end",
    "deepspeed": "every process holds the whole model",
}


class TRLSurface:
    """The names of TRL's trainer, on top of what a trainer here has."""

    args: GRPOConfig
    policy: Policy
    learner: Learner
    reward_funcs: RewardFunctions
    processes: Processes
    asking: Asking
    events: CallbackEvents
    callbacks: list[Callback]

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
        """transformers' ``TrainerState``, always current: ``log_history`` has the means of every
        ``logging_steps`` steps, each evaluation, and at the end the summary of the run."""
        return self.events.state

    @property
    def control(self) -> TrainerControl:
        """transformers' ``TrainerControl``, which callbacks change and ``train`` obeys."""
        return self.events.control

    @property
    def callback_handler(self) -> CallbackHandler:
        return self.events.handler

    def add_callback(self, callback: Any) -> None:
        """Add a ``fusedgrpo.Callback`` or a ``transformers.TrainerCallback``. Raises ConfigError
        for anything else."""
        ours, theirs = sorted_callbacks([callback])
        self.callbacks += ours
        for one in theirs:
            self.callback_handler.add_callback(one)  # type: ignore[no-untyped-call]

    def pop_callback(self, callback: Any) -> Any:
        """Take the first callback of this class, or this one, out; returns it, or None."""
        is_type = isinstance(callback, type)
        for callbacks in (self.callbacks, self.callback_handler.callbacks):
            for index, one in enumerate(callbacks):
                if isinstance(one, callback) if is_type else one == callback:
                    return callbacks.pop(index)
        return None

    def remove_callback(self, callback: Any) -> None:
        """``pop_callback``, without a result."""
        self.pop_callback(callback)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add ``logs`` to ``state.log_history`` and call ``on_log``; called for every entry of the
        history. metrics.jsonl and trackers have the rows of steps: a reward function gets numbers
        into these with ``log_metric``."""
        self.events.log(logs)

    @property
    def ref_model(self) -> nn.Module | None:
        """The frozen copy that full fine-tuning with ``beta`` compares with; None, as in TRL, where
        there is an adapter, which is switched off for that, or no ``beta``."""
        return self.policy.reference_model

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the load-balancing loss of a mixture of experts is part of the loss."""
        return self.policy.router is not None

    @property
    def entropy_coef(self) -> float:
        """The weight of the entropy bonus, where ``use_adaptive_entropy`` has brought it by now."""
        return self.learner.bonus.coef

    @property
    def reward_processing_classes(self) -> list[Any]:
        """The tokenizers of reward models, in the order of the reward functions, None for those
        that are no models."""
        return self.reward_funcs.tokenizers

    @property
    def reward_func_names(self) -> list[str]:
        return self.reward_funcs.names

    @property
    def reward_weights(self) -> Tensor:
        """``[F]`` float32, on the CPU."""
        return self.reward_funcs.weights

    @property
    def tools(self) -> list[Callable[..., Any]]:
        """The functions that the policy may call: those that were passed, and of an environment's
        class its methods. What was given by name is not among them, and is not loaded here."""
        use = self.asking.tools
        return [] if use is None else use.tools.functions

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """``[B, T]`` bool: the tokens in ``mask``, which has the shape of ``entropies``, with an
        entropy at or above that quantile of theirs. Of this process; an update asks of all."""
        inside = mask.bool()
        return inside & (entropies >= entropy_threshold(entropies[inside], 1 - threshold))

    @staticmethod
    def get_off_policy_mask(
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """``[B, 1]`` in the dtype of ``mask``: 0 for a completion with a negative advantage whose
        mean difference from the policy that sampled it is above the threshold, else 1. advantages:
        ``[B, 1]``; the rest ``[B, T]``."""
        rows, width = mask.shape
        near = near_policy(
            per_token_logps.flatten(),
            sampling_per_token_logps.flatten(),
            advantages.flatten(),
            mask.flatten().bool(),
            torch.arange(rows + 1, device=mask.device) * width,
            off_policy_threshold,
        )
        return near[:, None].to(mask.dtype)

    def end(self) -> None:
        """Leave the group of processes, at the very end of a script: nothing that takes all of them
        works from then on. Trackers are finished when ``train`` is."""
        self.accelerator.end_training()

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
