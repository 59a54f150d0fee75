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


def draws(seed: int, count: int) -> Tensor:
    """``[count]`` uniform numbers, of a completion's first ``count`` tokens."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=CUMULATIVE)


def choose(scores: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token and its log-prob, ``[M, 1]`` each, of ``scores [M, V]`` at ``uniform [M, 1]``; the most
    likely one without."""
    logp = torch.log_softmax(scores.float(), dim=-1)
    if uniform is None:
        token = logp.argmax(-1, keepdim=True)
    else:
        cumulative = logp.to(CUMULATIVE).exp().cumsum(-1)
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)
    return token, logp.gather(1, token)


class TokenChooser:
    """Last in generate's chain of logits processors: picks a token per row and leaves it the only
    one that is possible.

    seeds: of the completions, which have at most ``max_new_tokens``. greedy: take the most likely
    token. check_interrupt: called before each token, and may raise. progress: called after each
    with how many completions got it and how many go on, integers in tensors on the device. ends:
    the tokens after which one does not go on.

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
        progress: Callable[[Tensor, Tensor], None] | None = None,
        ends: Sequence[int] = (),
    ):
        self.greedy = greedy
        self.check_interrupt = check_interrupt
        self.progress = progress
        self._going = torch.ones(len(seeds), dtype=torch.bool, device=device)
        self._ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.logp: list[Tensor] = []
        self.step = 0
        self.uniform_BT = torch.stack([draws(seed, max_new_tokens) for seed in seeds]).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.check_interrupt()
        uniform = None if self.greedy else self.uniform_BT[:, self.step, None]
        token, logp = choose(scores, uniform)
        self.logp.append(logp[:, 0])
        self.step += 1
        if self.progress is not None:
            got = self._going.sum()
            self._going &= ~torch.isin(token[:, 0], self._ends)
            self.progress(got, self._going.sum())
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
