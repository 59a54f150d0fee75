"""Every kernel test runs for each implementation that this process can run.

``backend`` is "torch" on the CPU; under ``TRITON_INTERPRET=1`` (a process of its own, started by
``test_interpreted.py``) also "triton", interpreted; with a GPU both, on the GPU too.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from interpreter import work_with_this_numpy

from fusedgrpo.kernels.backend import interpreted

if interpreted():
    work_with_this_numpy()


class Kernel(NamedTuple):
    """What a test passes on: ``backend=kernel.backend`` and tensors on ``kernel.device``."""

    backend: str
    device: torch.device


def _kernels() -> list:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    params = [pytest.param(Kernel("torch", cpu), id="torch-cpu")]
    if interpreted():
        params.append(pytest.param(Kernel("triton", cpu), id="triton-interpreted"))
    params.append(pytest.param(Kernel("torch", cuda), id="torch-cuda", marks=pytest.mark.gpu))
    if not interpreted():
        params.append(pytest.param(Kernel("triton", cuda), id="triton-cuda", marks=pytest.mark.gpu))
    return params


@pytest.fixture(params=_kernels())
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param
