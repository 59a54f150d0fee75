"""``accelerator_config``: settings of accelerate's data loaders, of which a run here has none.

Scripts for transformers set and read them. Those that only say how rows travel to a step are taken:
every process has read its prompts before the first one. Those that would make another run are
refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusedgrpo.errors import brief, did_you_mean, reason

# Of transformers' AcceleratorConfig, with its defaults.
_DEFAULTS: dict[str, Any] = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "use_seedable_sampler": True,
    "non_blocking": False,
    "gradient_accumulation_kwargs": None,
    "use_configured_state": False,
}
_REFUSED = {
    "split_batches": "per_device_train_batch_size is that of one process here",
    "use_configured_state": "processes and precision are chosen by this run's own options",
}


class LoaderSettings(dict[str, Any]):
    """The settings that were given. As an attribute, each that transformers has."""

    def __getattr__(self, name: str) -> Any:
        if name in _DEFAULTS:
            return self.get(name, _DEFAULTS[name])
        raise AttributeError(f"accelerator_config has no {name!r}.")

    def __setattr__(self, name: str, value: Any) -> None:
        # It would pass by the checks of the option.
        raise AttributeError(f"Set accelerator_config to {{{name!r}: {value!r}}} as a whole.")


def read_loader_settings(given: Any) -> dict[str, Any] | None:
    """Settings as transformers takes them: a mapping, its JSON, the path of a JSON file, or an
    ``AcceleratorConfig``. ValueError for what is none of these, and what is refused."""
    if given is None:
        return None
    values = _mapping(given)
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _DEFAULTS:
            raise ValueError(f"has no {brief(name)}.{did_you_mean(str(name), _DEFAULTS)}")
        if name == "gradient_accumulation_kwargs":
            _check_accumulation(value)
        elif not (isinstance(value, bool) or (value is None and name == "dispatch_batches")):
            raise ValueError(f"{name}: expected true or false, got {brief(value)}.")
        elif value and name in _REFUSED:
            raise ValueError(f"{name}: not supported: {_REFUSED[name]}.")
        settings[name] = value
    return settings


def _mapping(given: Any) -> Mapping[str, Any]:
    if isinstance(given, str):
        try:
            text = given if given.lstrip().startswith("{") else Path(given).expanduser().read_text()
            given = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"expected a mapping or the path of a JSON file, got {brief(given)}: "
                f"{reason(error)}."
            ) from None
    elif type(given).__name__ == "AcceleratorConfig":
        given = given.to_dict()
    if not isinstance(given, Mapping):
        raise ValueError(f"expected a mapping, got {brief(given)} ({type(given).__name__}).")
    return given


def _check_accumulation(value: Any) -> None:
    """``sync_each_batch`` is taken: gradients are reduced once in a step, with the same sum."""
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise ValueError(f"gradient_accumulation_kwargs: expected a mapping, got {brief(value)}.")
    for name, setting in value.items():
        if name not in ("num_steps", "sync_each_batch"):
            raise ValueError(f"gradient_accumulation_kwargs has no {brief(name)}.")
        if name == "num_steps" and setting not in (None, 1):
            raise ValueError(
                "gradient_accumulation_kwargs: not supported: set gradient_accumulation_steps."
            )
