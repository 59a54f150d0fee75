"""Operators without a backward pass in a training step: an error, where torch only warns."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from fusedgrpo.errors import ModelError

# The text of torch's warning (autograd_not_implemented_fallback.cpp), after the operator's name.
WARNING = "an autograd kernel was not registered to the Autograd key"
_PATTERN = f".*{WARNING}"


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Inside, a backward pass through such an operator raises ModelError: what lies below it would
    get a part of its gradient or none."""
    with contextlib.ExitStack() as stack:
        if not _is_first():
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("error", message=_PATTERN)
        try:
            yield
        except UserWarning as warning:
            operator, found, _ = str(warning).partition(f": {WARNING}")
            if not found:
                raise
            raise ModelError(
                f"The operator {operator} has no backward pass, so the gradients of this model "
                "would be wrong. It belongs to a quantisation or to kernels that are made for "
                "inference: load the model without them, or in another version of their package."
            ) from warning


def _is_first() -> bool:
    """Entered once around a run and again around each step: to change the filters makes Python
    show all warnings anew."""
    if not warnings.filters:
        return False
    action, message, *_ = warnings.filters[0]
    return action == "error" and getattr(message, "pattern", None) == _PATTERN
