"""The configuration that a trainer goes by: its own copy of what was given."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from fusedgrpo.config.from_trl import given_options, is_foreign
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine import metric_schedule
from fusedgrpo.errors import ConfigError
from fusedgrpo.models.adapters.attached import has_adapters

log = logging.getLogger("fusedgrpo")


def own_options(
    args: Any,
    model: Any,
    quantization_config: Any,
    peft_config: Any = None,
    *,
    stream: bool = False,
) -> GRPOConfig:
    """A copy of the configuration with the name of the model that was passed, for the record, and
    with what ``quantization_config`` describes. TRL's and transformers' arguments are translated,
    option by option. stream: the training data are one. Raises ConfigError."""
    by_name = isinstance(model, (str, os.PathLike))
    if is_foreign(args):
        args = _translated(args, model, by_name, peft_config)
    if args is not None and not isinstance(args, GRPOConfig):
        raise ConfigError(
            f"args: expected a fusedgrpo.GRPOConfig or a trl.GRPOConfig, got "
            f"{type(args).__module__}.{type(args).__qualname__}."
        )
    config = getattr(model, "config", None)
    name = os.fspath(model) if by_name else getattr(config, "_name_or_path", None)
    if args is None:  # as in TRL, the run is named after its model
        args = GRPOConfig(output_dir=f"{Path(name).name}-GRPO") if name else GRPOConfig()
    too_late_to_change(args)
    own = dataclasses.replace(args, **{"model_name_or_path": name} if name else {})
    if quantization_config is not None:
        if not by_name and model is not None:
            raise ConfigError(
                "quantization_config: the model is loaded already; give its name, or load it in "
                "4 bits yourself."
            )
        given = {**(own.model_init_kwargs or {}), "quantization_config": quantization_config}
        try:
            own.model_init_kwargs = given
        except ConfigError as error:  # of an argument, by its name
            raise ConfigError(
                text.removeprefix("model_init_kwargs.") for text in error.problems
            ) from None
    if stream:
        _read_stream_here(own)
    if (compared := metric_schedule.metric_name(own)) is not None:
        # transformers' EarlyStoppingCallback reads both.
        own.metric_for_best_model = own.metric_for_best_model or compared
        own.greater_is_better = metric_schedule.greater_is_better(own)
    return own


def too_late_to_change(config: GRPOConfig) -> None:
    """Whoever changes an option of ``config`` from here on is told that it changes nothing that was
    built already."""
    object.__setattr__(config, "_used", True)


def _read_stream_here(own: GRPOConfig) -> None:
    """Every process reads a stream itself, without helpers; what scripts read says so, as in
    TRL."""
    given = own.accelerator_config or {}
    if given.get("dispatch_batches"):
        raise ConfigError(
            "accelerator_config: Iterable datasets require `dispatch_batches=False`, because every "
            "process reads the stream itself: leave it out, or pass a datasets.Dataset."
        )
    own.dataloader_num_workers = 0
    own.accelerator_config = {**given, "dispatch_batches": False}


def _translated(args: Any, model: Any, by_name: bool, peft_config: Any) -> GRPOConfig:
    """Another trainer's arguments as options. There, what trains without a ``peft_config`` is the
    model itself, unless it has an adapter."""
    given = given_options(args)
    given.setdefault("learning_rate", args.learning_rate)
    if by_name:
        adapter = (Path(model).expanduser() / "adapter_config.json").exists()
    else:
        adapter = model is not None and has_adapters(model)
    if peft_config is None and not adapter:
        given["finetuning_type"] = "full"
        log.info("args are TRL's and there is no peft_config: all weights are trained, as in TRL.")
    return GRPOConfig.from_dict(given)
