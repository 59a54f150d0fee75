"""The operations of a GRPO update, on tensors only.

Each is a custom operator with two implementations: plain torch, and Triton in ``*_triton.py``;
``reference.py`` is the truth they are tested against. Nothing here imports transformers or the
engine.
"""

from fusedgrpo.kernels.advantages import group_advantages
from fusedgrpo.kernels.grpo_loss import GRPOLoss
from fusedgrpo.kernels.linear_logprob import LogProbs, linear_logprob
from fusedgrpo.kernels.linear_policy_loss import linear_policy_loss
from fusedgrpo.kernels.options import LOSS_TYPES, LossOptions
from fusedgrpo.kernels.policy_loss import PolicyLoss, policy_loss

__all__ = [
    "LOSS_TYPES",
    "GRPOLoss",
    "LogProbs",
    "LossOptions",
    "PolicyLoss",
    "group_advantages",
    "linear_logprob",
    "linear_policy_loss",
    "policy_loss",
]
