"""A choice between two numbers, token by token or completion by completion."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(where: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """``where ? a : b`` in the dtype of ``like`` (torch.where of two numbers would be float32)."""
    return torch.where(where, like.new_full((), a), like.new_full((), b))
