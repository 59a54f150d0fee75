"""Which sampler a run has: ours, one that was passed, or one that the option names."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fusedgrpo.engine.interrupts import Interrupted
from fusedgrpo.engine.memory.sizes import SamplerMemory
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.foreign_sampler import ForeignSampler, check_sampler
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.sampler import Sampler
from fusedgrpo.errors import ConfigError, FusedGRPOError, ModelError, brief
from fusedgrpo.models.policy import Policy
from fusedgrpo.named_code import load_code, locate_code

# From policy, tokenizer and end tokens; by name execution and skip_special_tokens.
MakeSampler = Callable[..., Sampler]


class ChosenSampler(NamedTuple):
    """make: the constructor. memory: see ``Sampler.memory``; None for what ours take. decodes:
    whether ``make`` also takes ``rollout_weights``, as ``DecoderSampler`` does. is_ours: whether it
    is one of ``OURS``."""

    make: MakeSampler
    memory: SamplerMemory | None = None
    decodes: bool = False
    is_ours: bool = False


WHO = "sampler"

log = logging.getLogger("fusedgrpo")


def decoder_or_generate(
    policy: Policy,
    *arguments: Any,
    rollout_weights: Literal["adapter", "merged"] = "adapter",
    **options: Any,
) -> Sampler:
    """Our decoder, and generate for a model that it cannot run."""
    try:
        return DecoderSampler(policy, *arguments, rollout_weights=rollout_weights, **options)
    except ModelError as error:
        if rollout_weights == "merged":
            raise
        log.info("Sampling with generate: %s", error)
    return GenerateSampler(policy, *arguments, **options)


OURS = {
    "auto": ChosenSampler(decoder_or_generate, decodes=True, is_ours=True),
    "generate": ChosenSampler(GenerateSampler, is_ours=True),
    "decoder": ChosenSampler(DecoderSampler, decodes=True, is_ours=True),
}


def choose_sampler(option: str, given: Any, folders: Sequence[Path]) -> ChosenSampler:
    """The constructor of a run's sampler, and what it says of its memory.

    The constructor takes what that of ``GenerateSampler`` takes.

    option: ``sampler`` of the configuration. given: what was passed to the trainer, or None.
    folders: where a file that ``option`` names is looked for. The code behind it is imported here,
    before there is a model. Raises ConfigError.
    """
    if given is not None:
        if option != "auto":
            raise ConfigError(
                f"sampler: {option}, and a sampler was passed to the trainer as well; give one."
            )
        who = f"sampler ({type(given).__qualname__})"
        check_sampler(given, who)
        return ChosenSampler(
            lambda policy, *_, **__: ForeignSampler(given, policy.vocabulary_size, who),
            _memory(given, who),
        )
    if option in OURS:
        return OURS[option]
    code = locate_code(option, folders, WHO, ConfigError)
    assert code is not None  # config/rules.py: what is none of ours has a colon
    make = load_code(code, WHO, ConfigError)
    _check_signature(make, f"{WHO} {option!r}")
    who = f"{WHO} {option!r}"
    return ChosenSampler(functools.partial(_made, make, who), _memory(make, who))


def _memory(owner: Any, who: str) -> SamplerMemory | None:
    """``owner.memory`` if it has one, with what it returns checked."""
    memory = getattr(owner, "memory", None)
    if memory is None:
        return None

    def checked(settings: Any, **lengths: int) -> int:
        try:
            size = memory(settings, **lengths)
        except Exception as error:  # other people's code raises anything
            raise ConfigError(f"{who}: memory raised {type(error).__name__}: {error}") from error
        if type(size) is not int or size < 0:
            raise ConfigError(f"{who}: memory returned {brief(size)}, expected bytes.")
        return size

    return checked


def _check_signature(make: Callable[..., Any], who: str) -> None:
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # of some that are not written in Python nothing is known
        return
    try:
        signature.bind(None, None, None, execution=None, skip_special_tokens=True)
    except TypeError as error:
        raise ConfigError(
            f"{who} is called as (policy, tokenizer, eos_ids, execution=..., "
            f"skip_special_tokens=...): {error}."
        ) from error


def _made(
    make: Callable[..., Any], who: str, policy: Policy, *arguments: Any, **options: Any
) -> ForeignSampler:
    try:
        sampler = make(policy, *arguments, **options)
    except (FusedGRPOError, Interrupted):
        raise
    except (Exception, SystemExit) as error:  # other people's code raises anything
        raise ConfigError(
            f"{who}: making it failed with {type(error).__name__}: {error}"
        ) from error
    return ForeignSampler(sampler, policy.vocabulary_size, who)
