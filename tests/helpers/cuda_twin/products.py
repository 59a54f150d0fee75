"""Products of 16-bit operands with a float32 result, which torch has on CUDA alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WIDER = (torch.float16, torch.bfloat16)


def is_product(op: str, overload: str) -> bool:
    return op in ("mm", "addmm") and overload in ("dtype", "dtype_out")


def product(op: str, given: Mapping[str, Any]) -> Tensor:
    """``mm`` or ``addmm`` with ``out_dtype``. given: the arguments by their names in the schema."""
    a, b = (given["self"], given["mat2"]) if op == "mm" else (given["mat1"], given["mat2"])
    dtype, out = given["out_dtype"], given.get("out")
    if a.dtype != b.dtype:
        raise RuntimeError(f"{op}: operands of {a.dtype} and {b.dtype}")
    if dtype != a.dtype and not (dtype == torch.float32 and a.dtype in WIDER):
        raise RuntimeError(f"{op}: out_dtype {dtype} of operands of {a.dtype}")
    result = a.float() @ b.float()
    if op == "addmm":
        addend = given["self"]
        if addend.dtype not in (dtype, a.dtype):
            raise RuntimeError(f"addmm: adds {addend.dtype} to {dtype}, of operands of {a.dtype}")
        result = given["beta"] * addend + given["alpha"] * result
    if out is None:
        return result.to(dtype)
    if out.dtype != dtype or out.shape != result.shape:
        raise RuntimeError(f"{op}: {result.shape} of {dtype} into {out.shape} of {out.dtype}")
    return out.copy_(result)
