"""Which dtype a run computes in, on which hardware."""

from __future__ import annotations

import logging

import pytest
import torch

from fusedgrpo.errors import ConfigError
from fusedgrpo.models import precision
from fusedgrpo.models.precision import pick_compute_dtype, pick_device

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch):
    def pretend(native: bool) -> None:
        monkeypatch.setattr(precision, "has_native_bfloat16", lambda device_type: native)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
        precision._say_float32.cache_clear()

    return pretend


@pytest.mark.parametrize(
    ("native", "bf16", "expected"),
    [
        (True, None, torch.bfloat16),
        (True, True, torch.bfloat16),
        (True, False, None),
        (False, None, None),
        (False, False, None),
    ],
)
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_bfloat16_where_the_device_has_it(hardware, device, native, bf16, expected) -> None:
    hardware(native)
    assert pick_compute_dtype(bf16, False, device) == expected


def test_bf16_on_a_cpu_without_it_is_float32_and_is_said_once(hardware, caplog) -> None:
    hardware(False)
    with caplog.at_level(logging.INFO, "fusedgrpo"):
        assert pick_compute_dtype(True, False, CPU) is None
        assert pick_compute_dtype(True, False, CPU) is None
    assert sum("float32" in record.message for record in caplog.records) == 1


def test_bf16_on_a_gpu_without_it_is_refused_with_the_remedy(hardware) -> None:
    hardware(False)
    with pytest.raises(ConfigError, match=r"bf16: true, but Tesla T4 .* fp16: true"):
        pick_compute_dtype(True, False, CUDA)


def test_fp16_needs_a_gpu(hardware) -> None:
    hardware(True)
    assert pick_compute_dtype(None, True, CUDA) == torch.float16
    with pytest.raises(ConfigError, match="fp16"):
        pick_compute_dtype(None, True, CPU)


def test_the_cpu_is_used_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(use_cpu=True) == CPU
    assert pick_device(use_cpu=False) == CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(use_cpu=False) == CPU


@pytest.mark.parametrize(
    ("flags", "native"), [("fpu avx2", False), ("avx512_bf16", True), ("amx_bf16 avx2", True)]
)
def test_cpu_flags(monkeypatch: pytest.MonkeyPatch, tmp_path, flags: str, native: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags : fpu {flags}\n")
    monkeypatch.setattr(precision, "Path", lambda path: cpuinfo)
    assert precision.has_native_bfloat16.__wrapped__("cpu") is native
    cpuinfo.unlink()
    assert precision.has_native_bfloat16.__wrapped__("cpu") is False
