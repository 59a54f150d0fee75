"""The load-balancing loss of a mixture of experts, as sums over tokens.

``E * sum_e f_e P_e`` (Switch Transformers, arXiv:2101.03961, equations 4 to 6): over tokens and
layers, f_e is how often expert e was chosen and P_e its mean probability. Only P_e has a gradient,
so that with f_e known the loss is a sum over tokens, and a batch may be cut anywhere.

E experts, T tokens.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedgrpo.errors import ModelError

log = logging.getLogger("fusedgrpo")

TOLERANCE = 1e-3  # of our loss against the model's own, relative


class RouterSums(NamedTuple):
    """Over tokens and layers. chosen ``[E]`` float64: how often each expert was; probability
    ``[E]`` float32: the router's, with gradients."""

    chosen: Tensor
    probability: Tensor

    def __add__(self, other: RouterSums) -> RouterSums:  # type: ignore[override]
        return RouterSums(*(a + b for a, b in zip(self, other, strict=True)))

    def to(self, device: torch.device | str) -> RouterSums:
        return RouterSums(*(values.to(device) for values in self))


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """The router's part of the loss: ``coef`` times ``loss``."""

    coef: float
    experts: int
    top_k: int

    def sums(self, router_logits: Sequence[Tensor], weights: Tensor) -> RouterSums:
        """The sums over ``router_logits``, ``[T, E]`` per layer; each token counts ``weights [T]``
        times."""
        device = router_logits[0].device
        total = self.nothing(device)
        weights = weights.to(device)
        each = weights.double().repeat_interleave(self.top_k)
        for logits in router_logits:
            probabilities = torch.softmax(logits.to(device), dim=-1)
            chosen = probabilities.topk(self.top_k, dim=-1).indices.flatten()
            # Whole numbers: the order in which they are added does not matter.
            count = torch.zeros_like(total.chosen).scatter_add_(0, chosen, each)
            mass = (probabilities.float() * weights.float()[:, None]).sum(0)
            total += RouterSums(count, mass)
        return total

    def nothing(self, device: torch.device | str) -> RouterSums:
        """The sums of no token."""
        zeros = torch.zeros(self.experts, device=device)
        return RouterSums(zeros.double(), zeros)

    def loss(self, sums: RouterSums, load: RouterSums | None = None) -> Tensor:
        """``[]`` float32: the part that ``sums`` has in the loss of a batch whose sums are
        ``load``; by default the batch is no more than that."""
        chosen = (load or sums).chosen.to(sums.probability.device)
        rows = (chosen.sum() / self.top_k).clamp(min=1)  # tokens times layers
        share = (chosen / rows * self.experts / rows).float()
        return (share * sums.probability).sum()


def router_coefficient(model: Any, coef: float | None) -> float:
    """The weight of the load-balancing loss, as TRL has it: ``coef``, or the model's own for None.
    Raises ModelError where ``coef`` is for a model that has no router."""
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if coef:
            raise ModelError(
                f"router_aux_loss_coef: {coef}, but {type(model).__name__} is no mixture of "
                "experts with a router to balance. Leave it out."
            )
        return 0.0
    own = getattr(config, "router_aux_loss_coef", None) or 0.0
    return float(own if coef is None else coef)


def find_router(
    model: Any,
    coef: float | None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> RouterLoss | None:
    """The router's loss of a causal LM in eval mode; None without one, or with a weight of 0.

    Compared with the model's own on a few tokens. Raises ModelError where that is another, or where
    there is none to compare with.
    """
    value = router_coefficient(model, coef)
    if not value:
        return None
    if coef is None and _expert_counts(model) == [0]:
        return None  # a family with experts, of which this model has none (Granite 4.0 H)
    name = type(model).__name__
    remedy = "router_aux_loss_coef: 0 trains without it."
    asked = f"router_aux_loss_coef is {value:g}" + (" (the model's own)" if coef is None else "")
    ids = torch.arange(24, device=model.get_input_embeddings().weight.device).view(2, 12) * 7 + 5
    ids %= model.get_input_embeddings().weight.shape[0]
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    asking = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad(), autocast():
        outputs = model.get_decoder()(**asking, output_router_logits=True)
        logits = getattr(outputs, "router_logits", None)
        own = None
        if logits:
            own = getattr(model(**asking, output_router_logits=True), "aux_loss", None)
        top_k = _top_k(model)
        if not logits or top_k is None or not all(_known(layer, mask) for layer in logits):
            raise ModelError(
                f"{asked}, but {name} has no load-balancing loss that fusedgrpo knows. {remedy}"
            )
        router = RouterLoss(value, logits[0].shape[-1], top_k)
        ours = router.loss(router.sums(logits, mask.flatten())).item()
    # Families without a loss of their own get this one when asked, as in TRL.
    if isinstance(own, Tensor) and not abs(ours - own.item()) < TOLERANCE * max(own.item(), 1e-6):
        raise ModelError(
            f"{asked}, but {name} has a load-balancing loss that fusedgrpo does not know "
            f"({own.item():.4g}, where the usual one is {ours:.4g}). {remedy}"
        )
    log.info("%s: the router's load-balancing loss is added to the loss.", asked)
    return router


def planned_router(model: Any, coef: float | None) -> RouterLoss | None:
    """The router that ``find_router`` will find in a model without weights; None for none."""
    value, top_k = router_coefficient(model, coef), _top_k(model)
    experts = next((n for n in _expert_counts(model) if n > 0), None)
    if not value or top_k is None or experts is None:
        return None
    return RouterLoss(value, experts, top_k)


# Their number, by families.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _expert_counts(model: Any) -> list[int]:
    """The numbers of experts that a model's configuration names."""
    config = model.config.get_text_config()
    counts = (getattr(config, name, None) for name in EXPERTS)
    return [n for n in counts if isinstance(n, int)]


def _known(logits: Any, mask: Tensor) -> bool:
    return isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == mask.numel()


def _top_k(model: Any) -> int | None:
    """How many experts a token goes to."""
    own = getattr(model, "num_experts_per_tok", None)
    own = own or getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return own if isinstance(own, int) else None
