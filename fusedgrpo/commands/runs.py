"""The remains of a run: its weights and its options, by any of the folders that people name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fusedgrpo.errors import ConfigError

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig

ADAPTER, MODEL = "adapter_config.json", "config.json"
OPTIONS = "config.resolved.yaml"


@dataclasses.dataclass(frozen=True)
class Trained:
    """weights: a folder with an adapter, or with a whole model if ``full``. options_file: the
    options of the run; None where the folder stands alone. said: which weights these are."""

    weights: Path
    full: bool
    options_file: Path | None
    said: str

    @property
    def name(self) -> str:
        """A name for what is made of it."""
        home = self.options_file.parent if self.options_file else self.weights
        return home.name

    def options(self, overrides: Mapping[str, str | None] | None = None) -> GRPOConfig:
        """The options of the run, those of ``overrides`` in place of its own. Raises
        ConfigError."""
        from fusedgrpo.config.schema import GRPOConfig

        return GRPOConfig.from_file(self.options_file, overrides=overrides)


def find_trained(run: Path) -> Trained:
    """The weights that ``run`` means: an output_dir, its ``adapter/`` or ``model/``, or a
    checkpoint. Of a run that has not ended, the newest checkpoint. Raises ConfigError."""
    path = run.expanduser().absolute()
    if not path.is_dir():
        raise ConfigError(f"{run}: no such folder; name the output_dir of a run.")
    folder = _weights_in(path)
    if folder is not None:
        return _found(folder, "the weights of")
    from fusedgrpo.engine.checkpoint_files import newest_valid
    from fusedgrpo.engine.checkpointing import missing_file

    newest = newest_valid(path / "checkpoints", missing_file)
    folder = newest and _weights_in(newest)
    if folder is None:
        raise ConfigError(
            f"{run}: has no weights: expected {ADAPTER} or {MODEL} in it, in its adapter/ or "
            "model/, or in one of its checkpoints."
        )
    return _found(folder, "the run has not ended; the weights of")


def _weights_in(path: Path) -> Path | None:
    # Any folder may have a model/ in it: only a run's or a checkpoint's is what was trained.
    is_run = (path / OPTIONS).exists() or (path / "state.json").exists()
    inside = (path / "adapter", path / "model") if is_run else ()
    for folder in (*inside, path):
        if (folder / ADAPTER).exists() or (
            (folder / MODEL).exists() and any(folder.glob("*.safetensors"))
        ):
            return folder
    return None


def _found(folder: Path, said: str) -> Trained:
    # adapter/ of an output_dir, or checkpoints/step-N/adapter of one, or a folder by itself.
    homes = (folder.parent, *folder.parents[2:3])
    options = next((home / OPTIONS for home in homes if (home / OPTIONS).exists()), None)
    return Trained(folder, not (folder / ADAPTER).exists(), options, f"{said} {folder}")
