"""Which layout of a batch a model can take: asked of the model itself, on a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fusedgrpo.errors import ModelError
from fusedgrpo.models import packed_attention as attention
from fusedgrpo.models.packed_batch import Layout, PackedBatch
from fusedgrpo.models.rounding import rounded_otherwise

SharedPrompt = Literal["auto", "on", "off"]

log = logging.getLogger("fusedgrpo")

# How far hidden states may be from those of one sequence per row, relative, in the median token:
# an attention that sees one token too many or too few is far above, and rounding far below, unless
# a deep model in 16 bits amplifies it. How much it does is then measured, and must leave room for
# what is looked for.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
MOST_ROUNDING = 0.25


class Probed(Protocol):
    """The parts of a ``Policy`` that a probe uses."""

    @property
    def causal_lm(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def vocabulary_size(self) -> int: ...
    def scoring(self) -> AbstractContextManager[None]: ...
    def autocast(self) -> AbstractContextManager[Any]: ...
    def hidden(self, packed: PackedBatch, plan: attention.Plan | None = None) -> Tensor: ...


def choose_layout(policy: Probed, shared_prompt: SharedPrompt) -> Layout:
    """``"shared"``, or ``"packed"`` for ``shared_prompt="off"``, where the model computes the same
    as with one sequence per row; else ``"rows"``, and the reason is said.

    The attention of packed batches is in the model afterwards, unless it is to take rows.
    Raises ModelError for ``"on"`` where that cannot be.
    """
    wanted: Layout = "packed" if shared_prompt == "off" else "shared"
    obstacle = foreign_layers(policy.causal_lm.config)
    if obstacle is None:
        before, _ = _hidden(policy, "rows")
        changed = attention.install(policy.causal_lm)
        obstacle = _obstacle(policy, wanted, before)
        if obstacle is None:
            return wanted
        attention.uninstall(changed)
    name = type(policy.causal_lm).__name__
    if shared_prompt == "on":
        raise ModelError(
            f"shared_prompt: on, but {name} cannot share prompts: {obstacle}. "
            "Use shared_prompt: auto."
        )
    log.warning("%s takes one padded sequence per row: %s.", name, obstacle)
    return "rows"


def _obstacle(policy: Probed, layout: Layout, before: Tensor) -> str | None:
    """Why ``layout`` would not give what one sequence per row gave; None if it does."""
    try:
        rows, _ = _hidden(policy, "rows")
        packed, windows = _hidden(policy, layout)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        # What models raise for arguments they do not know, or shapes they did not expect.
        return f"its forward pass fails on packed sequences ({error})"
    if lacks_windows(policy.causal_lm.config, windows):
        # A window wider than these few tokens would not show in the numbers.
        return "its sliding window is not handed to its attention"
    errors = [_difference(before, found) for found in (rows, packed)]
    # Not "any is greater": NaN has to fail.
    if all(error <= TOLERANCE[policy.dtype] for error in errors):
        return None
    said = f"hidden states are off by {max(errors):.1e} of their size"
    with rounded_otherwise(policy.causal_lm, policy.dtype):
        other, _ = _hidden(policy, "rows")
    rounding = 2 * _difference(before, other)
    if rounding > MOST_ROUNDING:
        return f"{said}, and rounding alone may move them by {rounding:.1e}"
    return None if all(error <= rounding for error in errors) else said


def _layer_types(settings: Any) -> list[str]:
    return list(getattr(settings.get_text_config(), "layer_types", None) or ())


def foreign_layers(settings: Any) -> str | None:
    """The layers, of a model with this configuration, that no packed attention stands in for."""
    foreign = sorted(set(_layer_types(settings)) - {"full_attention", "sliding_attention"})
    return f"it has layers of type {', '.join(foreign)}" if foreign else None


def lacks_windows(settings: Any, windows: Sequence[int | None]) -> bool:
    """Whether more layers slide than have handed a window to their attention. windows: of each
    attention that ran."""
    kinds = _layer_types(settings)
    sliding = kinds.count("sliding_attention")
    text = settings.get_text_config()
    if not kinds and getattr(text, "sliding_window", None) is not None:
        sliding = int(getattr(text, "use_sliding_window", True))
    return sum(window is not None for window in windows) < sliding


def _hidden(policy: Probed, layout: Layout) -> tuple[Tensor, list[int | None]]:
    """Hidden states ``[N, H]`` float64 of a few completions, and the windows that were used."""
    ids = torch.arange(16) * 7 % min(policy.vocabulary_size, 97)
    prompt, other, long, short = (part.tolist() for part in ids.split([5, 3, 5, 3]))
    pairs = [(prompt, long), (prompt, short), (other, long[::-1]), (prompt, other)]
    packed = PackedBatch.build(pairs, policy.device, layout)
    plan = attention.Plan(packed.segments, policy.device)
    with policy.scoring(), policy.autocast():
        return policy.hidden(packed, plan).double(), plan.windows


def _difference(expected: Tensor, found: Tensor) -> float:
    """How far the median token is off, relative to its size."""
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    return error.median().item()
