"""The functions of ``tiles.py`` as Triton kernels: one program per row, no atomics, float32."""

from fusedgrpo.kernels.logprob.finish_triton import finish
from fusedgrpo.kernels.logprob.gradients_triton import logit_gradient_tile, stored_gradient_tile
from fusedgrpo.kernels.logprob.softmax_triton import moment_tile, rescale, softmax_tile

__all__ = [
    "finish",
    "logit_gradient_tile",
    "moment_tile",
    "rescale",
    "softmax_tile",
    "stored_gradient_tile",
]
