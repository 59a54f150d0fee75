"""Every random choice of a run derives from its seed and from what the choice is for.

So a resumed run chooses what the uninterrupted one would have, and nothing depends on how many
random numbers somebody else drew in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from fusedgrpo import host


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for ``purpose``, for example ``derive(42, "sample", step, prompt, index)``."""
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global generators of torch, numpy and random start from ``seed`` inside; restored after."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(host.gpu_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
