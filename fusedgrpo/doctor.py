"""The machine as a run would find it, and anything that would keep it from working there."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from fusedgrpo import host

REQUIRED = (
    "torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "math-verify",
)  # fmt: skip
OPTIONAL = {
    "bitsandbytes": "load_in_4bit and 8-bit optimizers",
    "triton": "the GPU kernels",
    "gguf": "GGUF weights",
    "flash-attn": "flash attention",
    "tensorboard": "report_to: tensorboard",
}


class Check(NamedTuple):
    """``ok`` is False only for what keeps every run from working."""

    name: str
    ok: bool
    finding: str


def checks() -> Iterator[Check]:
    """Everything, in the order in which a reader wants it."""
    yield Check("python", True, f"{platform.python_version()} on {platform.system()}")
    missing = False
    for name in REQUIRED:
        version = host.package_version(name)
        missing |= version is None
        yield Check(name, version is not None, version or f"missing: pip install {name}")
    for name, purpose in OPTIONAL.items():
        finding = host.package_version(name) or f"not installed (needed for {purpose})"
        yield Check(name, True, finding)
    if missing:
        return
    yield _imports()
    yield from _devices()
    free = shutil.disk_usage(".").free
    yield Check("disk", free > 2**30, f"{free / 1e9:.0f} GB free here")


def _imports() -> Check:
    """A modelling file imports half of the stack, and is where version conflicts show."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=1, num_key_value_heads=1,
            )
        )  # fmt: skip
    except (ImportError, RuntimeError, AttributeError) as error:
        return Check("models", False, f"transformers cannot build one: {error}")
    return Check("models", True, "transformers builds them")


def _devices() -> Iterator[Check]:
    """With the precision that a run computes in unless it is told otherwise."""
    import torch

    from fusedgrpo.models.device import pick_compute_dtype

    def precision(device: str) -> str:
        dtype = pick_compute_dtype(None, False, torch.device(device)) or torch.float32
        return {
            torch.float32: "computes in float32 (no bfloat16 instructions)",
            torch.bfloat16: "computes in bfloat16",
            torch.float16: "computes in float16 with a loss scale (no bfloat16 instructions)",
        }[dtype]

    if not host.has_gpu():
        yield Check("device", True, f"CPU only ({host.threads()} threads), {precision('cpu')}")
        return
    for index in range(host.gpu_count()):
        free, total = host.gpu_memory(index)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield Check(
            f"gpu {index}", True, f"{host.gpu_name(index)}, {memory}, {precision(f'cuda:{index}')}"
        )
