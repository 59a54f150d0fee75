"""Which precision a run computes in, on which hardware."""

from __future__ import annotations

import logging

import pytest
import torch

from fusedgrpo import host
from fusedgrpo.errors import ConfigError
from fusedgrpo.models import device as devices
from fusedgrpo.models.device import asked_compute_dtype, pick_compute_dtype

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch):
    def answer(bfloat16: bool) -> None:
        monkeypatch.setattr(host, "has_bfloat16", lambda device: bfloat16)
        monkeypatch.setattr(host, "gpu_name", lambda device: "Tesla T4")
        devices._say.cache_clear()

    return answer


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize(
    ("bf16", "expected"), [(None, torch.bfloat16), (True, torch.bfloat16), (False, None)]
)
def test_bfloat16_where_the_device_has_it(hardware, device, bf16, expected) -> None:
    hardware(True)
    assert pick_compute_dtype(bf16, False, device) == expected


@pytest.mark.parametrize("bf16", [None, True, False])
def test_float32_on_a_cpu_without_it(hardware, bf16) -> None:
    hardware(False)
    assert pick_compute_dtype(bf16, False, CPU) is None


def test_bf16_on_a_cpu_without_it_is_float32_and_is_said_once(hardware, caplog) -> None:
    hardware(False)
    with caplog.at_level(logging.INFO, "fusedgrpo"):
        assert pick_compute_dtype(True, False, CPU) is None
        assert pick_compute_dtype(True, False, CPU) is None
    assert sum("float32" in record.message for record in caplog.records) == 1


def test_a_gpu_without_it_computes_in_float16_and_it_is_said_once(hardware, caplog) -> None:
    hardware(False)
    with caplog.at_level(logging.INFO, "fusedgrpo"):
        assert pick_compute_dtype(None, False, CUDA) == torch.float16
        assert pick_compute_dtype(None, False, CUDA) == torch.float16
    (said,) = [r.message for r in caplog.records]
    assert "Tesla T4 has no bfloat16" in said and "float16, with a loss scale" in said
    assert pick_compute_dtype(False, False, CUDA) is None, "float32 was asked for"


def test_bf16_on_a_gpu_without_it_is_refused_with_the_remedy(hardware) -> None:
    hardware(False)
    with pytest.raises(ConfigError, match=r"bf16: true, but Tesla T4 .* fp16: true"):
        pick_compute_dtype(True, False, CUDA)


def test_fp16_needs_a_gpu(hardware) -> None:
    hardware(True)
    assert pick_compute_dtype(None, True, CUDA) == torch.float16
    with pytest.raises(ConfigError, match="fp16"):
        pick_compute_dtype(None, True, CPU)


@pytest.mark.parametrize(
    ("bf16", "fp16"), [(None, False), (True, False), (False, False), (None, True)]
)
def test_what_is_planned_for_is_what_a_gpu_with_everything_computes_in(
    hardware, bf16, fp16
) -> None:
    hardware(True)
    assert asked_compute_dtype(bf16, fp16) == pick_compute_dtype(bf16, fp16, CUDA)
