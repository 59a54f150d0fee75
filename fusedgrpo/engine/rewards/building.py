"""The reward functions of a run, from what a user names or passes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusedgrpo import stages
from fusedgrpo.engine.interrupts import StopSignals
from fusedgrpo.engine.rewards.call import RewardCall
from fusedgrpo.engine.rewards.in_process import Concurrent, EventLoop, Inline
from fusedgrpo.engine.rewards.labels import unique_labels
from fusedgrpo.engine.rewards.reward_model import (
    RewardModel,
    is_reward_model,
    load_reward_model,
    weights_bytes,
)
from fusedgrpo.engine.rewards.runner import RewardFunctions
from fusedgrpo.engine.rewards.scorers import Scorer
from fusedgrpo.engine.rewards.spec import Source, locate
from fusedgrpo.engine.rewards.worker import Worker
from fusedgrpo.engine.run_clock import RunClock
from fusedgrpo.errors import RewardError, did_you_mean
from fusedgrpo.named_code import code_folders

logger = logging.getLogger("fusedgrpo")

SHARED_WITH_TOKENIZER = ("cache_dir", "revision", "token", "trust_remote_code")


def build_rewards(
    reward_funcs: Any,
    *,
    weights: Sequence[float] | None = None,
    kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    on_error: str = "halt",
    timeout: float | None = 300.0,
    device: str | torch.device = "cpu",
    reward_processing_classes: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    search_paths: Sequence[str | Path] = (),
    signals: StopSignals | None = None,
    clock: RunClock | None = None,
    environments: Sequence[Scorer] = (),
) -> RewardFunctions:
    """The reward functions of a run, each of them found and loaded.

    reward_funcs: a name, several ("accuracy,format"), a callable, a transformers model, or a
    list of these. Named functions run in worker processes, everything else in this one.
    kwargs: ``{name: {argument: value}}``, the name as in ``reward_funcs`` (of a callable, its
    own; of the second of a name, ``name#2``). on_error: ``"halt"`` or ``"drop"`` when a function
    raises, hangs, dies or returns NaN or infinity; one that raises is called again with single
    completions, to find those that it fails on. timeout: seconds for a call in a worker and of an
    async function. device: where reward models go. model_kwargs: for loading
    them. reward_processing_classes: their tokenizers, one for each entry of ``reward_funcs``.
    search_paths: folders beside the working directory where files and modules are looked for.
    signals: those of the run, which end it while a function is at work.
    clock: says the date to the chat templates of reward models. environments: those that reward
    what is done in them; they come last, with the weight 1, and there may be no other reward.

    Raises :class:`RewardError` if a function cannot be found, loaded or given its arguments.
    """
    if on_error not in ("halt", "drop"):
        raise RewardError(f"on_reward_error is {on_error!r}, expected 'halt' or 'drop'")
    functions = _listed(reward_funcs, needs_one=not environments)
    count = len(functions)
    weights = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise RewardError(
            f"reward_weights is {weights}, expected {count} finite numbers: one for each of "
            f"{', '.join(map(_label, functions))}"
        )
    tokenizers = _tokenizers(reward_processing_classes, count)
    arguments = _arguments(functions, kwargs or {})
    folders = code_folders(search_paths)
    signals = signals or StopSignals()
    loop: EventLoop | None = None
    scorers: list[Scorer] = []
    try:
        for function, tokenizer, given in zip(functions, tokenizers, arguments, strict=True):
            source = locate(function, folders) if isinstance(function, str) else None
            if source is not None and source.kind != "model":
                scorers.append(
                    Worker(
                        source,
                        given,
                        folders=folders,
                        timeout=timeout,
                        check_interrupt=signals.check,
                    )
                )
            elif source is not None or is_reward_model(function):
                model = _reward_model(
                    source, function, tokenizer, given, device, model_kwargs, clock
                )
                model.check_interrupt = signals.check
                scorers.append(model)
            else:
                call = RewardCall(function, given, interrupts=lambda: not signals.none_came)
                if call.is_async:
                    loop = loop or EventLoop()
                    scorers.append(Concurrent(call, loop, timeout, signals))
                else:
                    scorers.append(Inline(call, signals))
        if workers := [scorer for scorer in scorers if isinstance(scorer, Worker)]:
            with stages.stage("starting the reward functions"):
                for worker in workers:  # they load side by side
                    worker.ready()
    except BaseException:
        for scorer in scorers:
            scorer.close()
        raise
    scorers += environments
    weights += [1.0] * len(environments)
    functions_of_run = RewardFunctions(scorers, weights, on_error)
    renamed = [name for name in functions_of_run.names if name not in {s.name for s in scorers}]
    if renamed:
        logger.warning(
            "Reward functions share a name: in metrics and logs the later ones are called %s",
            ", ".join(renamed),
        )
    return functions_of_run


def planned_bytes(
    reward_funcs: Any, folders: Sequence[Path], model_kwargs: Mapping[str, Any] | None = None
) -> int:
    """The bytes of the weights of the reward models among the names ``reward_funcs``, of which none
    is loaded. Raises :class:`RewardError` for a name that can be nothing."""
    sources = [locate(name, folders) for name in _listed(reward_funcs, needs_one=False)]
    models = [source.target for source in sources if source.kind == "model"]
    return sum(weights_bytes(target, model_kwargs) for target in models)


def _listed(reward_funcs: Any, *, needs_one: bool) -> list[Any]:
    given = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    functions: list[Any] = []
    for function in given:
        if isinstance(function, str):
            functions += [name.strip() for name in function.split(",") if name.strip()]
        elif callable(function):
            functions.append(function)
        elif function is not None:
            raise RewardError(
                f"reward_funcs holds {function!r} ({type(function).__name__}), expected names, "
                "callables and reward models"
            )
    if not functions and needs_one:
        raise RewardError(
            "No reward source provided: reward_funcs is empty. Give at least one reward, such as "
            "'accuracy,format', 'file.py:function' or a callable"
        )
    return functions


def _label(function: Any) -> str:
    if isinstance(function, str):
        return function
    return type(function).__name__ if is_reward_model(function) else RewardCall(function).name


def _tokenizers(given: Any, count: int) -> list[Any]:
    if given is None:
        return [None] * count
    tokenizers = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(tokenizers) != count:
        raise RewardError(
            f"reward_processing_classes has {len(tokenizers)} entries, expected {count}: their "
            "number must match that of the reward functions (None for one that is no reward model)"
        )
    return tokenizers


def _arguments(
    functions: list[Any], kwargs: Mapping[str, Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    labels = unique_labels([_label(function) for function in functions])
    for name, given in kwargs.items():
        if name not in labels:
            raise RewardError(
                f"reward_kwargs: {name!r} is none of the reward_funcs ({', '.join(labels)})."
                + did_you_mean(name, labels)
            )
        if not isinstance(given, Mapping):
            raise RewardError(f"reward_kwargs: {name!r} is {given!r}, expected argument: value")
    return [kwargs.get(label, {}) for label in labels]


def _reward_model(
    source: Source | None,
    model: Any,
    tokenizer: Any,
    arguments: Mapping[str, Any],
    device: str | torch.device,
    model_kwargs: Mapping[str, Any] | None,
    clock: RunClock | None,
) -> RewardModel:
    if source is not None:
        model = load_reward_model(source.target, model_kwargs)
    shared = {k: v for k, v in (model_kwargs or {}).items() if k in SHARED_WITH_TOKENIZER}
    reward_model = RewardModel(
        model, tokenizer, device=device, tokenizer_kwargs=shared, clock=clock
    )
    if arguments:
        raise RewardError(f"reward_kwargs: the reward model {reward_model.name!r} takes none")
    return reward_model
