"""``evaluate`` of a trainer: held-out prompts, one set of them or several with names."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers.trainer_utils import speed_metrics

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.advantages import Estimator
from fusedgrpo.engine.asking import Asking
from fusedgrpo.engine.callback_events import CallbackEvents
from fusedgrpo.engine.collector import Collector
from fusedgrpo.engine.data.dataset import PromptDataset, load_prompts
from fusedgrpo.engine.data.formats.chosen import Formats
from fusedgrpo.engine.data.held_out import HeldOut, load_held_out
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.evaluation import evaluate, rollout_loss
from fusedgrpo.engine.reporting.opening import opening
from fusedgrpo.engine.rewards import RewardBatch, RewardFunctions
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.types import Rollout
from fusedgrpo.engine.run_clock import RunClock
from fusedgrpo.engine.seeding import derive
from fusedgrpo.engine.trl_surface import TRLSurface
from fusedgrpo.errors import ConfigError
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.settings import model_limits
from fusedgrpo.stages import stage


class Evaluating(TRLSurface):
    """The part of a trainer that evaluates; ``log`` is the surface's."""

    args: GRPOConfig
    policy: Policy
    processes: Processes
    processing_class: Any
    clock: RunClock
    formats: Formats
    data: PromptDataset
    held_out: HeldOut | None
    given_datasets: tuple[Any, Any]
    reward_funcs: RewardFunctions
    sampler: Sampler
    sampling: SamplingParams
    collector: Collector
    asking: Asking
    events: CallbackEvents
    estimate_advantages: Estimator
    # A run's own evaluations do without: it takes another forward pass.
    evaluates_loss = True
    # While they go on, the records of what they sample, for the log; None: nobody wants them.
    answers: list[dict[str, Any]] | None = None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Sample and score the evaluation prompts, or those of ``eval_dataset``: another data set,
        a dictionary of them, or the name of one of the trainer's. Returns the metrics, which begin
        with the prefix, of sets in a dictionary with the name after it (``eval_name_reward``); the
        history and transformers' callbacks get them as well, with ``eval_runtime`` and the like.
        ``eval_loss`` is that of the completions, as an update on them would begin with; the
        evaluations of a run leave it out, unless ``metric_for_best_model`` is the loss.
        ignore_keys: TRL's; there is nothing to ignore.

        Always from the same seeds, so that two evaluations differ by the policy alone. Raises
        ConfigError where there is no such data set, and DataError.
        """
        held_out = self._held_out(eval_dataset)
        if not isinstance(held_out, PromptDataset):
            together: dict[str, Any] = {}
            for name, prompts in held_out.items():
                together |= self.evaluate(prompts, ignore_keys, f"{metric_key_prefix}_{name}")
            return together
        started = time.time()
        n = self.args.num_generations_eval or self.args.num_generations
        with opening(bars=not self.args.disable_tqdm), stage("evaluating", counted=True):
            found = evaluate(
                held_out,
                self.sampler,
                self.reward_funcs,
                loss=self._loss if self.evaluates_loss else None,
                keep=None if self.answers is None else partial(self._keep, metric_key_prefix),
                n=n,
                params=self.sampling,
                batch_size=self.args.per_device_eval_batch_size,
                seed=derive(self.args.seed, "eval"),
                state=self.collector.reward_state(),
                asking=self.asking,
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        clock = speed_metrics(  # type: ignore[no-untyped-call]
            metric_key_prefix, started, num_samples=len(held_out) * n
        )
        self.log({**metrics, **clock})
        self.events.fire("on_evaluate", metrics={**metrics, **clock})
        return metrics

    @property
    def train_dataset(self) -> Any:
        """The data set that was passed, as in TRL; where that was a name, a list of rows, which is
        none there, or nothing, ``data``, the prompts that were read."""
        given = self.given_datasets[0]
        return self.data if given is None or isinstance(given, (str, list)) else given

    @property
    def eval_dataset(self) -> Any:
        """Likewise of evaluation, beside ``held_out``. One that is put here is read at once, and
        evaluated from then on."""
        given = self.given_datasets[1]
        return self.held_out if given is None or isinstance(given, (str, list)) else given

    @eval_dataset.setter
    def eval_dataset(self, given: Any) -> None:
        self.held_out = None if given is None else self._held_out(given)
        self.given_datasets = self.given_datasets[0], given

    def _keep(self, prefix: str, records: list[dict[str, Any]]) -> None:
        name = prefix.removeprefix("eval").removeprefix("_")  # of the set
        assert self.answers is not None
        self.answers += [{"set": name, **record} for record in records]

    def _loss(self, rollout: Rollout, scored: RewardBatch) -> float:
        return rollout_loss(
            rollout,
            scored,
            self.reward_funcs.weights,
            self.learner,
            estimate=self.estimate_advantages,
            mask_truncated=self.args.mask_truncated_completions,
        )

    def _held_out(self, given: Any) -> HeldOut:
        own = self.held_out
        if given is None:
            if own is None:
                raise ConfigError("There is no eval_dataset.")
            return own
        if isinstance(given, PromptDataset):
            return given
        if isinstance(given, str) and isinstance(own, Mapping) and given in own:
            return own[given]
        limits: dict[str, Any] = model_limits(self.args, self.policy.causal_lm) or {}
        return load_held_out(
            given,
            self.args.max_samples,
            lambda source: load_prompts(
                source,
                self.args,
                self.processing_class,
                split="test",
                clock=self.clock,
                formats=self.formats,
                tools=self.asking.tool_set,
                **limits,
            ),
        )
