"""temporary"""

from __future__ import annotations

from torch import Tensor

from fusedgrpo.kernels.sample.op import Sampled
from fusedgrpo.kernels.sample.philox import gumbel_tile


def sample_logits(
    logits: Tensor, seeds: Tensor, positions: Tensor, *, greedy: bool = False
) -> Sampled:
    score = logits
    if not greedy:
        score = logits + gumbel_tile(seeds, positions, 0, logits.shape[1], logits.dtype)
    token = score.argmax(1)
    return Sampled(token, logits.log_softmax(1).gather(1, token[:, None])[:, 0])
