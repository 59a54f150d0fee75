"""Every compilation of a kernel that is checked ahead of time, for ``aot.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusedgrpo.kernels.advantage import advantages_triton
from fusedgrpo.kernels.launch import Launch, group_launch, ragged_launch, row_launch, tile_launch
from fusedgrpo.kernels.logprob import tiles_triton
from fusedgrpo.kernels.loss import terms_triton
from fusedgrpo.loss_options import LossOptions


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of a kernel.

    signature: Triton's types of all parameters in order, e.g. ``"*bf16"``, ``"i64"``; those in
    ``constants`` are ``"constexpr"``.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    launch: Launch


def all_variants() -> list[Variant]:
    return [*_advantages(), *_head(), *_loss_terms()]


def _advantages() -> list[Variant]:
    """For the ahead-of-time check: what the defaults launch, and every branch once."""
    return [
        _advantage_variant("group_size", F=1, scale="group", per_column=False, by_id=False),
        _advantage_variant("group_ids", F=1, scale="group", per_column=False, by_id=True),
        _advantage_variant(
            "group_ids-batch-3_rewards", F=3, scale="batch", per_column=False, by_id=True
        ),
        _advantage_variant("group_size-unscaled", F=1, scale="none", per_column=False, by_id=False),
        _advantage_variant("group_ids-per_column", F=2, scale="group", per_column=True, by_id=True),
    ]


def _advantage_variant(name: str, *, F: int, scale: str, per_column: bool, by_id: bool) -> Variant:
    launch = group_launch()
    constants = {
        "F": F,
        "EPS": 1e-4,
        "SCALE": scale,
        "PER_COLUMN": per_column,
        "BY_ID": by_id,
        "BLOCK": launch.block,
    }
    signature = {
        "out": "*fp32",
        "rewards": "*fp32",
        "weights": "*fp32",
        "ids": "*i64" if by_id else "*fp32",
        "B": "i32",
        "group_size": "i32",
    } | dict.fromkeys(constants, "constexpr")
    return Variant(
        f"group_advantages/{name}", advantages_triton.normalise_kernel, signature, constants, launch
    )


_POINTERS = {"target_ptr": "*i64", "rows_ptr": "*i64"}
_LONGS = ("weight_stride_v", "weight_stride_h")


def _head_variant(kernel: Any, dtype: str, launch: Any, **constants: Any) -> Variant:
    """A compilation for GEMM operands of ``dtype``; logits and sums are float32."""
    low = {"p_ptr", "dz_ptr", "u_ptr", "v_ptr", "weight_ptr", "bias_ptr"}
    constants["BLOCK"] = launch.block
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, f"*{dtype}" if name in low else "*fp32")
        else:
            signature[name] = "i64" if name in _LONGS else "i32"
    flags = "".join(f" {k.lower()}" for k, v in constants.items() if v is True)
    capped = " softcap" if constants.get("SOFTCAP") else ""
    name = f"{kernel.fn.__name__.removesuffix('_kernel')} {dtype}{flags}{capped}"
    return Variant(name, kernel, signature, constants, launch)


def _head() -> list[Variant]:
    """The plainest and the fullest form of each kernel, and every dtype."""
    tile, row = tile_launch(16384), row_launch(3584)
    plain = {"LOGIT_SCALE": 1.0, "SOFTCAP": 0.0, "TEMPERATURE": 1.0, "HAS_BIAS": False}
    full = {"LOGIT_SCALE": 0.5, "SOFTCAP": 30.0, "TEMPERATURE": 0.7, "HAS_BIAS": True}
    found = [
        _head_variant(
            tiles_triton.softmax_tile_kernel, "bf16", tile, **plain, WANT_P=False, WANT_FIRST=False
        ),
        _head_variant(
            tiles_triton.softmax_tile_kernel, "bf16", tile, **plain, WANT_P=True, WANT_FIRST=False
        ),
        _head_variant(
            tiles_triton.softmax_tile_kernel, "fp32", tile, **full, WANT_P=True, WANT_FIRST=True
        ),
        _head_variant(tiles_triton.moment_tile_kernel, "bf16", tile, **plain),
        _head_variant(tiles_triton.moment_tile_kernel, "fp16", tile, **full),
        _head_variant(tiles_triton.rescale_kernel, "fp32", row, HAS_FIRST=False),
        _head_variant(tiles_triton.rescale_kernel, "fp32", row, HAS_FIRST=True),
        _head_variant(
            tiles_triton.logit_gradient_tile_kernel, "bf16", tile, **plain, HAS_ENTROPY=False
        ),
        _head_variant(
            tiles_triton.logit_gradient_tile_kernel, "fp16", tile, **full, HAS_ENTROPY=True
        ),
        _head_variant(tiles_triton.stored_gradient_tile_kernel, "bf16", tile),
        _head_variant(tiles_triton.stored_gradient_tile_kernel, "fp32", tile),
    ]
    for dtype, entropy, u, v in (
        ("bf16", False, False, False),
        ("bf16", False, True, False),
        ("fp16", True, True, False),
        ("fp32", True, True, True),
    ):
        wants = {"WANT_ENTROPY": entropy, "WANT_U": u, "WANT_V": v}
        found.append(_head_variant(tiles_triton.finish_kernel, dtype, row, SLOPE=1.25, **wants))
    return found


def _loss_terms() -> list[Variant]:
    """The cheapest and the fullest compilation of each kernel, and what differs in its loops."""
    launch = ragged_launch()
    names = ("counts", "old", "ref", "mask", "weight", "entropy")
    tensors = ("logp", "advantages", "cu_seqlens", "denominator", "coefficient", "sums", *names)
    everything = frozenset(names)
    cases = {
        "dapo": (LossOptions(), {"mask", "entropy"}, "*i64"),
        "dapo-int32": (LossOptions(), {"mask", "entropy"}, "*i32"),
        "dapo-bare": (LossOptions(), set(), "*i64"),
        "grpo-full": (LossOptions(loss_type="grpo", delta=2.0, beta=0.04), everything, "*i64"),
        "cispo-full": (LossOptions(loss_type="cispo", beta=0.04), everything, "*i64"),
        "vespo-full": (LossOptions(loss_type="vespo", beta=0.04), everything, "*i64"),
        "sapo-sequence-full": (
            LossOptions(loss_type="sapo", importance_sampling_level="sequence", beta=0.04),
            everything,
            "*i64",
        ),
        "luspo-sequence": (
            LossOptions(loss_type="luspo", importance_sampling_level="sequence"),
            {"old", "mask", "entropy"},
            "*i64",
        ),
    }
    found = []
    for name, (options, present, index) in cases.items():
        pointers = {f"{x}_ptr": "*fp32" for x in tensors}
        pointers |= {"cu_seqlens_ptr": index}
        if "mask" in present:
            pointers["mask_ptr"] = "*u8"
        flags = {f"HAS_{x.upper()}": x in present for x in names}
        constants = terms_triton.constants(options, **flags)
        kernel = terms_triton.completion_kernel
        found.append(_loss_variant(f"loss_terms-{name}", kernel, pointers, launch, constants))
    for level in ("token", "sequence"):
        pointers = {f"{x}_ptr": "*fp32" for x in ("sums", "denominator", "loss", "metrics")}
        constants = {"PER_SEQUENCE": level == "sequence"}
        pointers |= {"completions": "i32"}
        kernel = terms_triton.metrics_kernel
        found.append(_loss_variant(f"loss_metrics-{level}", kernel, pointers, launch, constants))
    return found


def _loss_variant(
    name: str,
    kernel: Any,
    arguments: dict[str, str],
    launch: Launch,
    constants: dict[str, Any],
) -> Variant:
    constants = {**constants, "BLOCK": launch.block}
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    return Variant(name, kernel, signature, constants, launch)
