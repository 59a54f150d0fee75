"""The result of a run for others: weights where loaders look for them, a model card, an upload."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine import checkpointing, hub
from fusedgrpo.engine.callback_events import CallbackEvents
from fusedgrpo.engine.checkpointer import Checkpointer
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.reporting.model_card import card_header, model_card
from fusedgrpo.engine.rewards import RewardFunctions
from fusedgrpo.errors import NonFiniteError
from fusedgrpo.models.finite import not_finite
from fusedgrpo.models.policy import Policy

log = logging.getLogger("fusedgrpo")


class Publishing:
    """The part of a trainer that saves, describes and uploads its result."""

    args: GRPOConfig
    policy: Policy
    processes: Processes
    processing_class: Any
    reward_funcs: RewardFunctions
    data: Any
    _repository: str | None = None
    plan: Any
    progress: checkpointing.Progress
    checkpointer: Checkpointer
    events: CallbackEvents

    def save_model(
        self, output_dir: str | Path | None = None, _internal_call: bool = False
    ) -> Path:
        """Write the adapter, or the model, into ``output_dir``, as TRL does, or without one into
        ``adapter/`` or ``model/`` of the run's directory; returns where.

        In a run of several processes, process 0 writes and the others do nothing. Raises
        CheckpointError or NonFiniteError where the weights are nobody's wish.
        """
        if output_dir is not None:
            into = Path(output_dir).expanduser()
            if self.processes.is_main:
                self._check_savable()
                checkpointing.write_weights(self.policy, self.processing_class, into)
            return into
        directory = Path(self.args.output_dir).expanduser()
        return self._save_into(directory) if self.processes.is_main else directory

    def _save_into(self, directory: Path) -> Path:
        self._check_savable()
        where = checkpointing.save_weights(self.policy, self.processing_class, directory)
        self._write_card(where)  # in place of peft's, which is blank
        return where

    def _check_savable(self) -> None:
        self.checkpointer.check_whole()
        if problem := not_finite(self.policy.trainable()):
            raise NonFiniteError(f"The weights are not saved: {problem}.")

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **more: Any,
    ) -> None:
        """Write ``README.md`` into the output directory: base model, data, rewards, batch, what
        the reward did, versions, and the lines that load the weights. ``more`` goes into its
        header."""
        if self.processes.is_main:
            self._write_card(self._directory, model_name, dataset_name, tags, **more)

    @property
    def _directory(self) -> Path:
        return Path(self.args.output_dir).expanduser()

    def _write_card(
        self,
        into: Path,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **more: Any,
    ) -> None:
        settings = self.args.to_record()
        metrics = self._directory / "metrics.jsonl"
        header = card_header(
            settings,
            dataset_name=dataset_name or settings["dataset"],
            tags=[tags] if isinstance(tags, str) else list(tags or []),
            adapter=self.policy.adapters is not None,
        )
        text = model_card(
            {**header, **more},
            settings,
            read_metrics(metrics) if metrics.exists() else [],
            name=model_name or self.args.run_name or self._directory.resolve().name,
            steps=self.progress.step,
            facts={
                "Data": f"{dataset_name or self.data.source}, {len(self.data)} prompts",
                "Rewards": ", ".join(self.reward_funcs.names),
                "Batch": self.plan.describe(),
                "Trained": "all weights"
                if self.policy.adapters is None
                else self.policy.adapters.describe(),
                "Precision": self.policy.precision,
            },
        )
        into.mkdir(parents=True, exist_ok=True)
        (into / "README.md").write_text(text, encoding="utf-8")

    # --- the Hub --------------------------------------------------------------------------------

    @property
    def hub_model_id(self) -> str:
        """The repository that is pushed to: its full name once it is made, until then
        ``hub_model_id``, or the output directory's name."""
        return self._repository or self._asked_repository

    @property
    def _asked_repository(self) -> str:
        return self.args.hub_model_id or self._directory.resolve().name

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> str:
        """Make the repository, if it is not there; returns its full name. Raises HubError."""
        self._repository = hub.create(
            self._asked_repository,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision,
        )
        return self._repository

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Upload what ``save_model`` writes, with a model card, to ``hub_model_id``.

        token: else ``hub_token``, else the one that is logged in. revision: else ``hub_revision``.
        card: arguments of ``create_model_card``. Returns what ``HfApi.upload_folder`` does, None
        in every process but the first. Raises HubError.
        """
        self.events.fire("on_push_begin")
        if not self.processes.is_main:
            return None
        repository = self.init_hf_repo(token, private)
        folder = self.save_model()
        card.setdefault("model_name", repository.rpartition("/")[2])
        self.create_model_card(**card)
        self._write_card(folder, **card)
        return hub.upload(
            folder,
            repository,
            message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            blocking=blocking,
        )

    def _push_saved(self, checkpoint: Path) -> None:
        """With ``push_to_hub``, upload what ``hub_strategy`` says of a checkpoint. A Hub that does
        not take it costs the run nothing but a warning: the checkpoint is there."""
        args = self.args
        if not (args.push_to_hub and args.hub_strategy != "end" and self.processes.is_main):
            return
        step = self.progress.step
        weights = checkpoint / ("model" if self.policy.adapters is None else "adapter")
        folders: list[tuple[Path, str | None]] = [(weights, None)]
        if args.hub_strategy == "checkpoint":
            folders.append((checkpoint, "last-checkpoint"))
        if args.hub_strategy == "all_checkpoints":
            folders.append((checkpoint, f"checkpoints/{checkpoint.name}"))
        try:
            repository = self.init_hf_repo()
            for folder, path_in_repo in folders:
                hub.upload(
                    folder,
                    repository,
                    message=f"Training in progress, step {step}",
                    token=args.hub_token,
                    revision=args.hub_revision,
                    path_in_repo=path_in_repo,
                )
        except hub.HubError as error:
            log.warning("Step %d was saved and not pushed. %s", step, error)

    def _push_result(self) -> str | None:
        """With ``push_to_hub``, upload the result of a run that is at its end; what to say of it.
        A Hub that does not take it costs nothing that is not on the disk."""
        if not self.args.push_to_hub:
            return None
        try:
            return f"Pushed: {self.push_to_hub()}"  # in all processes: callbacks are told in all
        except hub.HubError as error:
            again = f"fusedgrpo push {self._directory} --repo {self._asked_repository}"
            return f"The run is whole, and was not pushed. {error} Later: {again}"
