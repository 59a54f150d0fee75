"""From the host to a GPU, without the host waiting for it.

A copy from ordinary memory holds the host until all that was launched before it is done. One from
pinned memory takes its place in the queue of the device, and torch keeps the memory until then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """``x``, which is on the CPU, on ``device``."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def send_numbers(
    values: Sequence[float] | Sequence[Sequence[float]],
    device: torch.device | str,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """A tensor of ``values`` on ``device``."""
    return send(torch.tensor(values, dtype=dtype), device)
