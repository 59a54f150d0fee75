"""The choice of the next token by noise of its own: exact, and the same for any company.

``token = argmax(z / temperature + Gumbel noise of (seed, place, token))``, see
``kernels/sample/op.py``. Where an option of sampling looks at a row of logits as a whole, or at the
tokens that were said before, the rows exist and the option is applied to them first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.warpers import only_allowed, warpers
from fusedgrpo.kernels import linear_sample
from fusedgrpo.kernels.sample.logits import sample_logits
from fusedgrpo.models.head import logits
from fusedgrpo.models.policy import Policy


class NextToken:
    """The ``Choose`` of a rollout. To be made anew for each, after weights may have changed.

    The head is cast to the dtype of the computation once, and not for each token.
    """

    def __init__(self, policy: Policy, params: SamplingParams):
        self.params = params
        self.chain = warpers(params)
        head = policy.head
        weight = head.weight.detach()
        if policy.compute_dtype is not None:
            weight = weight.to(policy.dtype)
        self.head = head._replace(weight=weight)
        # In 16 bits a CPU would have to widen the head, tile by tile, for each token.
        fits = weight.is_cuda or weight.itemsize >= torch.float32.itemsize
        self.whole_rows = not fits or params.filters

    @property
    def reads_history(self) -> bool:
        return self.params.reads_history

    def __call__(
        self,
        hidden: Tensor,
        seeds: Tensor,
        at: Tensor,
        seen: Tensor | None,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        greedy = self.params.greedy
        if self.whole_rows:
            if seen is None:
                seen = at.new_empty(len(at), 0)
            scores: Any = logits(self.head, hidden)
            if allowed is not None:
                scores = only_allowed(scores, allowed)
            scores = self.chain(seen, scores)  # by this name, so that each goes before the next
            token, logp = sample_logits(scores, seeds, at, greedy=greedy)
            return token, logp
        return linear_sample(
            hidden.to(self.head.weight.dtype),
            self.head.weight,
            seeds,
            at,
            bias=self.head.bias,
            temperature=1.0 if greedy else self.params.temperature,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
            greedy=greedy,
        )
