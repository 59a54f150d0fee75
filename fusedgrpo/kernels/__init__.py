"""The operations of a GRPO run, on tensors only.

Each is a custom operator with two implementations: plain torch, and Triton in ``*_triton.py``;
``reference.py`` is the truth they are tested against. Nothing here imports transformers or the
engine.
"""

from fusedgrpo.kernels.advantage.op import group_advantages
from fusedgrpo.kernels.decode.op import decode_attention
from fusedgrpo.kernels.fused_loss.module import GRPOLoss
from fusedgrpo.kernels.fused_loss.op import linear_policy_loss
from fusedgrpo.kernels.logprob.op import LogProbs, linear_logprob
from fusedgrpo.kernels.loss.op import policy_loss
from fusedgrpo.kernels.loss.types import PolicyLoss
from fusedgrpo.kernels.norm.op import rms_norm
from fusedgrpo.kernels.sample.op import Sampled, linear_sample
from fusedgrpo.loss_options import LOSS_TYPES, LossOptions

__all__ = [
    "LOSS_TYPES",
    "GRPOLoss",
    "LogProbs",
    "LossOptions",
    "PolicyLoss",
    "Sampled",
    "decode_attention",
    "group_advantages",
    "linear_logprob",
    "linear_policy_loss",
    "linear_sample",
    "policy_loss",
    "rms_norm",
]
