"""The next token of each sequence straight from its hidden state: the logits never exist.

    z = hidden @ weight.T + bias;  z *= logit_scale;  z = softcap * tanh(z / softcap)
    z /= temperature;              token = argmax(z + g);  logp = log_softmax(z)[token]

With Gumbel noise g the argmax is an exact draw from the softmax (Gumbel, 1954; Maddison et al.,
2014, arXiv 1411.0030), and an argmax needs no more than the best so far: the vocabulary passes by
in the tiles of ``linear_logprob``, 1 u in all. The noise is a function of seed, position and token
id (``philox.py``): not of the tiling, not of the other rows, and of the same bits on every device.

``logp`` is that of ``linear_logprob`` for the same hidden states, to the last bit where the same
implementation computes both. A row knows nothing of the others, but with another number of rows the
library's GEMM may round a logit, and plain torch a sum, in another way.

Shapes: M sequences, H hidden, V vocabulary, R rows of a chunk, K columns of a tile.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Backend, Resolved, resolve_backend
from fusedgrpo.kernels.custom_op import autocast_operands, check_operands, plain_arithmetic_on
from fusedgrpo.kernels.logprob.tiles import HeadOptions
from fusedgrpo.kernels.logprob.vocab_pass import (
    accumulator,
    logit_tiles,
    tile_functions,
    tiling_for,
)
from fusedgrpo.kernels.sample import best, best_cpu
from fusedgrpo.kernels.sample.best import RunningBest
from fusedgrpo.kernels.sample.noise import Noise


class Sampled(NamedTuple):
    """``token [M]`` int64, and ``logp [M]`` float32 of it under the softmax, in nats."""

    token: Tensor
    logp: Tensor


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    greedy: bool = False,
    backend: Backend = "auto",
) -> Sampled:
    """A token for each row of ``hidden``, drawn from ``softmax(logits / temperature)``, and its
    log-prob; formula in the module's docstring.

    hidden: ``[M, H]`` float32, bfloat16 or float16 (float64 for checks). weight: ``[V, H]`` of
    the same dtype, any strides; under autocast both are cast to its dtype. seeds: ``[M]`` int64,
    one for each completion. positions: ``[M]`` int64, of the token in its completion. bias:
    ``[V]``. ``greedy`` takes the greatest logit; seeds and positions are then not read.

    Of equal scores the lowest id is taken. A row with a logit that is NaN or +inf, or with none but
    -inf, has a logp of NaN and some valid token: callers check. The result carries no gradient.
    Raises ValueError or TypeError for shapes, dtypes and options that do not fit.
    """
    head = HeadOptions(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    hidden, weight = autocast_operands(hidden, weight)
    if hidden.dim() != 2 or len(weight) == 0:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}: "
            "expected [M, H] and [V, H] with V > 0."
        )
    check_operands(hidden, weight, seeds, bias, None, name="seeds")
    check_operands(hidden, weight, positions, bias, None, name="positions")
    return Sampled(
        *_linear_sample(
            hidden.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            seeds,
            positions,
            head.temperature,
            head.logit_scale,
            head.softcap,
            greedy,
            backend,
        )
    )


@torch.library.custom_op("fusedgrpo::linear_sample", mutates_args=())
def _linear_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    greedy: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    head = HeadOptions(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    chosen = resolve_backend(backend, "linear_sample", hidden.device, hidden.dtype)
    bias = None if bias is None else bias.contiguous()
    seeds, positions = seeds.contiguous(), positions.contiguous()
    token, logp = _outputs(hidden)
    R = tiling_for(weight).rows
    with plain_arithmetic_on(hidden):
        for lo in range(0, len(hidden), R):
            rows = slice(lo, lo + R)
            token[rows], logp[rows] = _sample_rows(
                hidden[rows],
                weight,
                bias,
                None if greedy else Noise(seeds[rows], positions[rows], len(weight)),
                head,
                chosen,
            )
    return token, logp


@_linear_sample.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(hidden)


def _outputs(hidden: Tensor) -> tuple[Tensor, Tensor]:
    M = len(hidden)
    return hidden.new_empty(M, dtype=torch.int64), hidden.new_empty(M, dtype=accumulator(hidden))


def _sample_rows(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise: Noise | None,
    head: HeadOptions,
    backend: Resolved,
) -> tuple[Tensor, Tensor]:
    """Token and log-prob of the rows ``h [R, H]``, in one pass over the vocabulary."""
    running = RunningBest.start(len(h), h, accumulator(h))
    fn = best_functions(backend, h.device)
    for tile in logit_tiles(h, weight, bias):
        fn.sample_tile(tile.z, tile.bias, tile.lo, head, noise, running)
    return running.token, log_probs(running, weight, head, backend)


def log_probs(best: RunningBest, weight: Tensor, head: HeadOptions, backend: Resolved) -> Tensor:
    """``[R]``: of the best tokens, after the last tile."""
    finish = tile_functions(backend).finish
    no_gradients = (None, None, None, None)
    statistics = finish(best.others, best.token, weight, head, *no_gradients, want_entropy=False)
    # +inf less what is finite would pass for a token that is certain.
    endless = best.others.z_target == torch.inf
    return statistics.logp.masked_fill(endless, torch.nan)


def best_functions(backend: Resolved, device: torch.device) -> ModuleType:
    """``best.py``, or the module that does the same on this device with this backend."""
    if backend == "torch":
        return best_cpu if device.type == "cpu" else best
    from fusedgrpo.kernels.sample import best_triton

    return best_triton
