"""The choice of a token, by inverting the cumulative distribution at a uniform number.

Each completion draws its numbers from a generator of its own, so what it says does not depend on
the others (docs/decisions/0002-sampling-by-inverse-cdf.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# float64: the tail of a large vocabulary would drown in float32's rounding.
CUMULATIVE = torch.float64

# For each logit, while a token is chosen: as the model gives it in 16 bits, generate's float32 of
# it, what the options of sampling made of that, the log-prob, and two of the cumulative sum.
BYTES_PER_LOGIT = 2 + 3 * torch.float32.itemsize + 2 * CUMULATIVE.itemsize


class TokenChooser:
    """Last in generate's chain of logits processors: picks a token per row and leaves it the only
    one that is possible.

    seeds: of the completions, which have at most ``max_new_tokens``. greedy: take the most likely
    token. check_interrupt: called before each token, and may raise.

    logp: for each token so far ``[len(seeds)]`` float32, its log-probability.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        max_new_tokens: int,
        device: torch.device,
        *,
        greedy: bool = False,
        check_interrupt: Callable[[], None] = lambda: None,
    ):
        self.greedy = greedy
        self.check_interrupt = check_interrupt
        self.logp: list[Tensor] = []
        self.step = 0
        draws = [
            torch.rand(
                max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=CUMULATIVE
            )
            for seed in seeds
        ]
        self.uniform_BT = torch.stack(draws).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.check_interrupt()
        logp = torch.log_softmax(scores.float(), dim=-1)
        if self.greedy:
            token = logp.argmax(-1, keepdim=True)
        else:
            cumulative = logp.to(CUMULATIVE).exp().cumsum(-1)
            point = self.uniform_BT[:, self.step, None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, point, right=True)
            token = token.clamp(max=scores.shape[-1] - 1)
        self.logp.append(logp.gather(1, token)[:, 0])
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
