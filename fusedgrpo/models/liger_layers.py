"""Liger's RMSNorm, RoPE and gated MLP in the layers of a model, by transformers' own integration.

Its losses are left out: log-probs come from our own head, which makes no logits. What is patched
stays with the model (docs/decisions/0019-liger-layers.md): modules get forwards of their own, and
the rotary embedding, which is a function of the module that defines the architecture, is Liger's
only while an attention of that model runs. Sampling, scoring and update take the same kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Collection, Iterator
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedgrpo import host
from fusedgrpo.errors import ConfigError, ModelError, reason
from fusedgrpo.kernels.backend import triton_obstacle
from fusedgrpo.models.adapters.attached import unwrapped

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig

INSTALL = "pip install 'fusedgrpo[liger]'"
# What stands in for a module, by Liger's name, that is tested and planned for.
KNOWN_MODULES = (
    "LigerRMSNorm",
    "LigerSwiGLUMLP",
    "LigerPhi3SwiGLUMLP",
    "LigerQwen3MoeSwiGLUMLP",
    "LigerGEGLUMLP",
)
KNOWN_FUNCTIONS = ("liger_rotary_pos_emb",)
DEFINITIONS = "transformers.models."


def check(config: GRPOConfig) -> None:
    """Whether the kernels that ``config`` asks for can run here. Raises ConfigError."""
    if not config.use_liger_kernel:
        return
    _library()
    device = host.pick_device(config.use_cpu)
    if obstacle := triton_obstacle(device):
        raise ConfigError(
            f"use_liger_kernel: this run is on {device}, and Liger's kernels need a GPU that "
            f"Triton compiles for ({obstacle}). Leave it out."
        )


def check_type(config: GRPOConfig, settings: Any) -> None:
    """Whether Liger has what ``config`` asks for, for models with the transformers configuration
    ``settings`` (None: not known yet). Raises ConfigError."""
    if not config.use_liger_kernel or settings is None:
        return
    known = _library().MODEL_TYPE_TO_APPLY_LIGER_FN
    kind = settings.model_type
    if kind not in known:
        raise ConfigError(
            f"use_liger_kernel: Liger has nothing for models of the type {kind}. Leave it out."
        )
    has = inspect.signature(known[kind]).parameters
    for part in config.liger_kernel_config or {}:
        if part not in has and not part.endswith("cross_entropy"):
            raise ConfigError(f"liger_kernel_config: Liger has no {part} for the type {kind}.")


def put_into(model: nn.Module, config: GRPOConfig) -> None:
    """Liger's kernels in the layers of ``model``, where ``config`` asks for them.

    Raises ConfigError where Liger has none for it, and ModelError where it puts in something that
    is neither tested nor planned for here.
    """
    if not config.use_liger_kernel:
        return
    causal_lm: Any = unwrapped(model)
    check_type(config, causal_lm.config)
    if not type(causal_lm).__module__.startswith(DEFINITIONS):
        raise ModelError(
            f"use_liger_kernel: {type(causal_lm).__name__} is defined in "
            f"{type(causal_lm).__module__}, and Liger knows transformers' own. Leave it out."
        )
    from transformers.integrations.liger import apply_liger_kernel

    asked = {**(config.liger_kernel_config or {})}
    asked |= {"cross_entropy": False, "fused_linear_cross_entropy": False}
    with _restored(_definitions(causal_lm)) as changed:
        apply_liger_kernel(causal_lm, asked)
    for definition, functions in changed.items():
        _check_known({f.__name__ for f in functions.values()} - {*KNOWN_FUNCTIONS}, causal_lm)
        _give_to_readers(causal_lm, definition, functions)
    patched = {m: name for m in causal_lm.modules() if (name := _liger_name(m)) is not None}
    _check_known({*patched.values()} - {*KNOWN_MODULES}, causal_lm)
    for module, name in patched.items():
        _check_activation(module, name)


def _check_known(others: set[str], causal_lm: nn.Module) -> None:
    if others:
        raise ModelError(
            f"use_liger_kernel puts {', '.join(sorted(others))} into a {type(causal_lm).__name__}, "
            "which is not tested here. Leave that part out (liger_kernel_config: {swiglu: false}, "
            "or rope)."
        )


def _liger_name(module: nn.Module) -> str | None:
    """The module of Liger whose forward ``module`` has; None where it has its own."""
    function = getattr(vars(module).get("forward"), "__func__", None)
    if function is None or not function.__module__.startswith("liger_kernel."):
        return None
    name: str = function.__qualname__
    return name.split(".")[0]


def _check_activation(module: nn.Module, name: str) -> None:
    """Whether a gated MLP has the activation of Liger's, which asks no model for it."""
    expected = nn.GELU("tanh") if "GEGLU" in name else nn.SiLU()
    x = torch.linspace(-4, 4, 17)
    for child in module.children():
        plain = not any(True for _ in child.parameters())
        if plain and not torch.allclose(child(x), expected(x), atol=1e-5):
            raise ModelError(
                f"use_liger_kernel: {name} computes {expected}, and {type(module).__name__} has "
                f"{child}. Leave it out (liger_kernel_config: {{swiglu: false}}, or geglu)."
            )


def _definitions(causal_lm: nn.Module) -> list[ModuleType]:
    """The Python modules of transformers in which the parts of ``causal_lm`` are defined."""
    names = {type(module).__module__ for module in causal_lm.modules()}
    return [sys.modules[name] for name in names if name.startswith(DEFINITIONS)]


@contextlib.contextmanager
def _restored(definitions: list[ModuleType]) -> Iterator[dict[ModuleType, dict[str, Any]]]:
    """Inside, names in ``definitions`` may be given another meaning. Afterwards they have their
    own, and what was yielded holds the functions that were to stand in for some."""
    before = {definition: dict(vars(definition)) for definition in definitions}
    changed: dict[ModuleType, dict[str, Any]] = {}
    try:
        yield changed
    finally:
        for definition, names in before.items():
            other = {
                n: vars(definition)[n] for n, own in names.items() if vars(definition)[n] is not own
            }
            vars(definition).update({name: names[name] for name in other})
            functions = {n: f for n, f in other.items() if not isinstance(f, type)}
            if functions:
                changed[definition] = functions


def _give_to_readers(
    causal_lm: nn.Module, definition: ModuleType, functions: dict[str, Any]
) -> None:
    """While a module of ``causal_lm`` runs that reads the names in ``definition``, they mean
    ``functions``. Not while a whole layer does: gradient checkpointing computes that anew from
    within."""

    def forward(module: nn.Module, *args: Any, **options: Any) -> Any:
        own = {name: getattr(definition, name) for name in functions}
        vars(definition).update(functions)
        try:
            return type(module).forward(module, *args, **options)
        finally:
            vars(definition).update(own)

    readers = [module for module in causal_lm.modules() if _reads(module, definition, functions)]
    if not readers:
        raise ModelError(
            f"use_liger_kernel: no module of {type(causal_lm).__name__} calls "
            f"{', '.join(functions)} itself. Leave it out (liger_kernel_config: {{rope: false}})."
        )
    for module in readers:
        module.forward = MethodType(forward, module)  # a copy of the model has one of its own


def _reads(module: nn.Module, definition: ModuleType, names: Collection[str]) -> bool:
    function: Any = inspect.unwrap(type(module).forward)
    code = getattr(function, "__code__", None)
    return (
        code is not None
        and function.__globals__ is vars(definition)
        and not set(names).isdisjoint(code.co_names)
    )


def _library() -> Any:
    """The module of Liger that knows architectures. Raises ConfigError."""
    try:
        return importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise ConfigError(
            f"use_liger_kernel needs the package liger-kernel: {INSTALL} ({reason(error)})."
        ) from error
