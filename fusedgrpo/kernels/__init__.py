"""The three operations of a GRPO update, on tensors only.

Each file holds one operation in plain torch; ``reference.py`` is the truth they are tested against.
Nothing here imports transformers or the engine.
"""

from fusedgrpo.kernels.advantages import group_advantages
from fusedgrpo.kernels.linear_logprob import LogProbs, linear_logprob
from fusedgrpo.kernels.options import LOSS_TYPES, LossOptions
from fusedgrpo.kernels.policy_loss import PolicyLoss, policy_loss

__all__ = [
    "LOSS_TYPES",
    "LogProbs",
    "LossOptions",
    "PolicyLoss",
    "group_advantages",
    "linear_logprob",
    "policy_loss",
]
