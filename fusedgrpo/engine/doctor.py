"""What a machine has, and what would keep a run from working there."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from typing import NamedTuple

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
        version = _version(name)
        missing |= version is None
        yield Check(name, version is not None, version or f"missing: pip install {name}")
    for name, purpose in OPTIONAL.items():
        finding = _version(name) or f"not installed (needed for {purpose})"
        yield Check(name, True, finding)
    if missing:
        return
    yield _imports()
    yield from _devices()
    free = shutil.disk_usage(".").free
    yield Check("disk", free > 2**30, f"{free / 1e9:.0f} GB free here")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    import torch

    from fusedgrpo.models.precision import has_native_bfloat16

    if not torch.cuda.is_available():
        dtype = "bfloat16" if has_native_bfloat16("cpu") else "float32"
        yield Check("device", True, f"CPU only ({torch.get_num_threads()} threads, {dtype})")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        dtype = "bfloat16" if has_native_bfloat16("cuda") else "float16 only: set fp16: true"
        text = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {dtype}"
        yield Check(f"gpu {index}", True, text)
