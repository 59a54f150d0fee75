"""The words after a command: a configuration file, and options of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fusedgrpo.errors import ConfigError, brief

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig


class Given(NamedTuple):
    """file: the configuration file, if one was named. overrides: option -> text; None for one
    without a value."""

    file: Path | None
    overrides: dict[str, str | None]

    def options(self) -> GRPOConfig:
        """The configuration. Raises ConfigError."""
        from fusedgrpo.config.schema import GRPOConfig

        return GRPOConfig.from_file(self.file, overrides=self.overrides)

    @property
    def search_paths(self) -> list[Path]:
        """Where ``file.py:name`` is looked for, beside the working directory."""
        return [] if self.file is None else [self.file.parent]


def read_words(words: Sequence[str], config: Path | None = None) -> Given:
    """``[FILE] --key value --key=value --flag`` in any order. config: a file that was named by an
    option. Raises ConfigError for words that mean nothing."""
    overrides: dict[str, str | None] = {}
    free: list[str] = []
    pending: str | None = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")  # only the key's dashes are spelling
            if key in overrides:
                raise ConfigError(f"--{key} is given twice on the command line.")
            overrides[key] = value if equals else None
            pending = None if equals else key
        elif pending is not None:
            overrides[pending] = word
            pending = None
        elif not free and config is None:
            free.append(word)
        else:
            raise ConfigError(
                f"{brief(word)} on the command line belongs to no option: --key value."
            )
    return Given(Path(free[0]) if free else config, overrides)
