"""The next token from rows of logits that somebody else has changed: ``sample_logits``."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedgrpo.kernels.custom_op import plain_arithmetic_on
from fusedgrpo.kernels.sample.best import AS_THEY_ARE, RunningBest
from fusedgrpo.kernels.sample.noise import Noise
from fusedgrpo.kernels.sample.op import Sampled, best_functions, log_probs

# Rows of a chunk, and the least columns of a tile.
ROWS, COLUMNS = 1024, 4096
# Logits of a tile: on a CPU what its cache holds, on a GPU enough to be worth the launches.
CACHED, LAUNCHED = 2**17, 2**22


def sample_logits(
    logits: Tensor, seeds: Tensor, positions: Tensor, *, greedy: bool = False
) -> Sampled:
    """A token for each row, drawn from ``softmax(logits)``, and its log-prob under that softmax.

    logits: ``[M, V]`` float32 (float64 for checks), the temperature applied, -inf where a filter
    has taken a token out. seeds, positions, ``greedy``: as in ``linear_sample``, whose noise this
    is: the same token for the same logits. So are ties, and rows that are not finite.

    Plain torch on any device; the logits stay as they are. The result carries no gradient. Raises
    ValueError or TypeError for shapes and dtypes that do not fit.
    """
    _check(logits, seeds, positions)
    M, V = logits.shape
    logits = logits.detach()
    token = torch.empty(M, dtype=torch.int64, device=logits.device)
    logp = logits.new_empty(M)
    fn = best_functions("torch", logits.device)
    elements = CACHED if logits.device.type == "cpu" else LAUNCHED
    with plain_arithmetic_on(logits):
        for start in range(0, M, ROWS):
            rows = slice(start, start + ROWS)
            R = len(logits[rows])
            columns = max(elements // R, COLUMNS)
            noise = None if greedy else Noise(seeds[rows], positions[rows], V)
            running = RunningBest.start(R, logits, logits.dtype)
            for lo in range(0, V, columns):
                z = logits[rows, lo : lo + columns].clone()
                fn.sample_tile(z, None, lo, AS_THEY_ARE, noise, running)
            token[rows] = running.token
            logp[rows] = log_probs(running, logits, AS_THEY_ARE, "torch")
    return Sampled(token, logp)


def _check(logits: Tensor, seeds: Tensor, positions: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: expected [M, V] with V > 0.")
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits are {logits.dtype}: expected torch.float32.")
    for name, x in (("seeds", seeds), ("positions", positions)):
        if x.shape != logits.shape[:1] or x.dtype != torch.int64:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}: "
                f"expected ({len(logits)},) and torch.int64."
            )
