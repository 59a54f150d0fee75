"""RMSNorms of a model in one kernel each, while it samples."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusedgrpo.kernels import rms_norm
from fusedgrpo.kernels.backend import Backend, resolve_backend

# The ways in which models of transformers compute one.
WAYS: tuple[dict[str, Any], ...] = (
    {"rounds_first": True},
    {"rounds_first": False},
    {"rounds_first": False, "offset": 1.0},
)
ROWS = 8  # of the question


class FusedNorms:
    """The RMSNorms among ``model``'s modules that ``rms_norm`` stands in for.

    No name is trusted: a module is asked for a few rows in ``dtype``, and taken where one of
    ``WAYS`` gives the same, to one unit in the last place. Nothing is taken where torch would be
    the implementation: it is the module's own.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, backend: Backend = "auto"):
        self.backend = backend
        self._fused: list[tuple[nn.Module, dict[str, Any]]] = []
        known: dict[Any, dict[str, Any] | None] = {}
        for module in model.modules():
            weight = _only_weight(module)
            if weight is None or resolve_backend(backend, "rms_norm", weight.device) == "torch":
                continue
            kind = type(module), weight.shape, weight.dtype, weight.device, _eps(module)
            if kind not in known:
                known[kind] = _way(module, dtype, backend)
            if (way := known[kind]) is not None:
                self._fused.append((module, way))

    def __len__(self) -> int:
        return len(self._fused)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the modules compute in one kernel; for passes without gradients."""
        entered = [(m, way) for m, way in self._fused if "forward" not in m.__dict__]
        for module, way in entered:
            eps = _eps(module)
            module.forward = functools.partial(  # on the instance: the class keeps its own
                _forward, module, eps=eps, backend=self.backend, **way
            )
        try:
            yield
        finally:
            for module, _ in entered:
                del module.forward


def _forward(module: nn.Module, x: Tensor, **options: Any) -> Tensor:
    weight: Any = module.weight
    return rms_norm(x, weight, **options)


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(found := getattr(module, name, None), float):
            return found
    return None


def _only_weight(module: nn.Module) -> Tensor | None:
    """The weight of a module that may be an RMSNorm: it has nothing else, and an epsilon."""
    names = [name for name, _ in module.named_parameters()]
    plain = names == ["weight"] and not list(module.buffers()) and not list(module.children())
    weight: Any = module.weight if plain else None
    known = weight is not None and weight.dim() == 1 and _eps(module) is not None
    return weight if known and "forward" not in module.__dict__ else None


@torch.no_grad()
def _way(module: nn.Module, dtype: torch.dtype, backend: Backend) -> dict[str, Any] | None:
    """The arguments with which ``rms_norm`` gives what ``module`` gives; None where there are
    none."""
    weight, eps = _only_weight(module), _eps(module)
    assert weight is not None and eps is not None
    generator = torch.Generator().manual_seed(0)
    # Rows of all sizes, of which some are near epsilon's, and not around zero: a LayerNorm would
    # take the mean away.
    sizes = torch.logspace(-3, 2, ROWS)[:, None]
    x = ((torch.randn(ROWS, len(weight), generator=generator) + 0.5) * sizes).to(dtype)
    x = x.to(weight.device)
    try:
        want = module(x)
    except (TypeError, ValueError, RuntimeError):  # it takes something else
        return None
    if not isinstance(want, Tensor) or want.shape != x.shape or not want.isfinite().all():
        return None
    errors = {}
    for index, way in enumerate(WAYS):
        found = rms_norm(x, weight, eps, backend=backend, **way)
        if found.dtype != want.dtype:
            continue
        off = (found.double() - want.double()).abs()
        unit = torch.finfo(want.dtype).eps * want.double().abs().clamp(min=1e-30)
        errors[index] = (float((off / unit).max()), float((off > 0).double().mean()))
    # float32 sums in another order, and more than one operation rounds.
    most = 8.0 if want.dtype == torch.float32 else 1.01
    best = min(errors, key=lambda index: errors[index], default=None)
    return WAYS[best] if best is not None and errors[best][0] <= most else None
