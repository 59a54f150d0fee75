"""Every compilation of a kernel that is checked ahead of time, for ``aot.py``.

Each kernel in its plainest and its fullest form, every dtype, and every branch at least once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fusedgrpo.kernels.advantage.advantages_triton import normalise_kernel
from fusedgrpo.kernels.decode.attention_triton import constants as decode_constants
from fusedgrpo.kernels.decode.attention_triton import own_kernel, prompt_kernel
from fusedgrpo.kernels.decode.merge_triton import merge_kernel
from fusedgrpo.kernels.launch import (
    DECODE_LANES,
    DECODE_SPLIT,
    Launch,
    decode_launch,
    decode_merge_launch,
    decode_rows,
    group_launch,
    norm_launch,
    power_of_two,
    ragged_launch,
    row_launch,
    sample_launch,
    tile_launch,
)
from fusedgrpo.kernels.logprob.finish_triton import finish_kernel
from fusedgrpo.kernels.logprob.gradients_triton import (
    logit_gradient_tile_kernel,
    stored_gradient_tile_kernel,
)
from fusedgrpo.kernels.logprob.softmax_triton import (
    moment_tile_kernel,
    rescale_kernel,
    softmax_tile_kernel,
)
from fusedgrpo.kernels.loss.metrics_triton import metrics_kernel
from fusedgrpo.kernels.loss.terms_triton import completion_kernel, constants
from fusedgrpo.kernels.norm.rms_norm_triton import rms_norm_kernel
from fusedgrpo.kernels.sample.best_triton import best_tile_kernel
from fusedgrpo.loss_options import LossOptions

# Before Ampere there is no bfloat16, and some launches are others.
TURING, NVIDIA, AMD = "turing", "nvidia", "amd"
CARDS = frozenset({TURING, NVIDIA, AMD})


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of a kernel.

    signature: Triton's types of all parameters in order, e.g. ``"*bf16"``, ``"i64"``; those in
    ``constants``, pointers that are None among them, are ``"constexpr"``. aligned: parameters that
    are multiples of 16, as Triton sees when it is called with such. cards: the kinds of GPUs that
    it is launched on, of ``CARDS``.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    launch: Launch
    aligned: frozenset[str] = frozenset()
    cards: frozenset[str] = CARDS


def all_variants() -> list[Variant]:
    return [*_advantages(), *_decode(), *_head(), *_sample(), *_loss(), *_norm()]


def _variant(
    name: str, kernel: Any, launch: Launch, types: dict[str, str],
    aligned: frozenset[str] = frozenset(), cards: frozenset[str] = CARDS, **constants: Any,
) -> Variant:  # fmt: skip
    """types: of parameters that are neither float32 pointers nor in ``constants``."""
    constants["BLOCK"] = launch.block
    signature = {
        parameter: "constexpr" if parameter in constants else types.get(parameter, "*fp32")
        for parameter in kernel.arg_names
    }
    if "*bf16" in signature.values():
        cards -= {TURING}
    return Variant(name, kernel, signature, constants, launch, aligned, cards)


def _advantages() -> Iterator[Variant]:
    def one(name: str, *, F: int, scale: str, per_column: bool = False) -> Variant:
        by_id: dict[str, Any] = {} if name.startswith("group_ids") else {"ids": None}
        return _variant(
            f"group_advantages/{name}",
            normalise_kernel,
            group_launch(),
            {"ids": "*i64", "B": "i32", "group_size": "i32"},
            **by_id,
            F=F,
            EPS=1e-4,
            SCALE=scale,
            PER_COLUMN=per_column,
        )

    yield one("group_size", F=1, scale="group")
    yield one("group_ids", F=1, scale="group")
    yield one("group_ids-batch-3_rewards", F=3, scale="batch")
    yield one("group_size-unscaled", F=1, scale="none")
    yield one("group_ids-per_column", F=2, scale="group", per_column=True)


def _norm() -> Iterator[Variant]:
    types = {"x_stride": "i64", "H": "i32", "eps": "fp32"}
    for dtype, H, rounds_first, offset in (
        ("bf16", 3584, True, 0.0),
        ("fp16", 128, True, 0.0),
        ("bf16", 5376, False, 1.0),
        ("fp32", 8192, True, 0.0),
    ):
        yield _variant(
            f"rms_norm {dtype} {H}" + " offset" * bool(offset),
            rms_norm_kernel,
            norm_launch(H),
            types | dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), f"*{dtype}"),
            OFFSET=offset,
            ROUNDS_FIRST=rounds_first,
        )


def _decode() -> Iterator[Variant]:
    tables = ("pages", "lengths", "cu_rows", "own_lengths", "prompt_lengths")
    types_of_tables = {f"{name}_ptr": "*i32" for name in tables}
    strides = [f"{pool}_{of}" for pool in ("key", "value") for of in ("page", "slot", "head")]
    strides += ["query_row", "query_head"]

    def one(
        name: str, kernel: Any, dtype: str, d: int, rep: int = 7, aligned: bool = True,
        turing: bool = False, **options: Any,
    ) -> Variant:  # fmt: skip
        size = 4 if dtype == "fp32" else 2
        alike = size == 4 or d > 128  # however they lie, and on every card
        aligned = aligned and not alike
        cards = CARDS - {AMD} if aligned else CARDS
        if not alike:
            cards = frozenset({TURING}) if turing else cards - {TURING}
        prompt = kernel is prompt_kernel
        rows = decode_rows(size, d) if prompt else max(power_of_two(rep), 16)
        pools = dict.fromkeys(("query_ptr", "keys_ptr", "values_ptr"), f"*{dtype}")
        types = pools | types_of_tables | dict.fromkeys(strides, "i64")
        types |= dict.fromkeys(("M", "splits", "pages_width"), "i32")
        options = {"WINDOW": 0, "SOFTCAP": 0.0} | options
        if prompt:
            options["LANES"] = DECODE_LANES
        return _variant(
            f"decode_{name} {dtype} {d}" + " unaligned" * (not aligned and not alike),
            kernel,
            decode_launch(d, size, prompt=prompt, aligned=aligned, turing=turing),
            types,
            frozenset((*pools, *strides, "product_ptr")) if aligned else frozenset(),
            cards=cards,
            **decode_constants(d, d, rep, 4, 16),
            ROWS=rows,
            SCALING=d**-0.5,
            INTERPRET=False,
            **options,
        )

    full = {"WINDOW": 4096, "SOFTCAP": 50.0}
    for d in (64, 96, 128, 256):
        yield one("prompt", prompt_kernel, "bf16", d)
        yield one("own", own_kernel, "bf16", d)
        if d <= 128:
            yield one("prompt", prompt_kernel, "bf16", d, aligned=False)
            yield one("own", own_kernel, "bf16", d, aligned=False)
    for dtype, d in (("fp32", 64), ("fp32", 256), ("fp16", 80)):
        yield one("prompt window softcap", prompt_kernel, dtype, d, **full)
        yield one("own window softcap", own_kernel, dtype, d, **full)
    yield one("own 24 heads", own_kernel, "bf16", 128, rep=24)
    for d in (64, 96, 128):
        for aligned in (True, False):
            of = {"turing": True, "aligned": aligned}
            yield one("prompt turing", prompt_kernel, "fp16", d, **of)
            yield one("own turing", own_kernel, "fp16", d, **of)
    yield one("prompt turing window softcap", prompt_kernel, "fp16", 80, turing=True, **full)
    yield one("own turing window softcap", own_kernel, "fp16", 80, turing=True, **full)
    yield one("own turing 24 heads", own_kernel, "fp16", 128, rep=24, turing=True)
    for name, dtype, d, window in (
        ("plain", "bf16", 128, 0),
        ("window", "bf16", 80, 4096),
        ("plain fp16", "fp16", 128, 0),
    ):
        yield _variant(
            f"decode_merge {name}",
            merge_kernel,
            decode_merge_launch(),
            types_of_tables
            | {"out_ptr": f"*{dtype}"}
            | dict.fromkeys(("M", "groups", "prompt_splits"), "i32"),
            H=28,
            D=d,
            PAD=power_of_two(d),
            WINDOW=window,
            SPLIT=DECODE_SPLIT,
        )


def _head() -> Iterator[Variant]:
    def one(name: str, kernel: Any, launch: Launch, *absent: str, **constants: Any) -> Variant:
        """The second word of the name is the dtype of the GEMM's operands; logits and sums are
        float32."""
        low = dict.fromkeys(
            ("p_ptr", "dz_ptr", "dlogp_ptr", "dentropy_ptr", "weight_ptr", "bias_ptr"),
            f"*{name.split()[1]}",
        )
        types = low | {"target_ptr": "*i64", "rows_ptr": "*i64"}
        types |= dict.fromkeys(("weight_stride_v", "weight_stride_h"), "i64")
        types |= dict.fromkeys(("z_stride", "p_stride", "dz_stride", "lo", "width", "H"), "i32")
        return _variant(name, kernel, launch, types, **dict.fromkeys(absent), **constants)

    tile, row = tile_launch(16384), row_launch(3584)
    plain: dict[str, Any] = {"LOGIT_SCALE": 1.0, "SOFTCAP": 0.0, "TEMPERATURE": 1.0}
    plain |= {"bias_ptr": None}
    full: dict[str, Any] = {"LOGIT_SCALE": 0.5, "SOFTCAP": 30.0, "TEMPERATURE": 0.7}

    softmax = softmax_tile_kernel
    yield one("softmax_tile bf16", softmax, tile, "p_ptr", **plain, WANT_FIRST=False)
    yield one("softmax_tile bf16 want_p", softmax, tile, **plain, WANT_FIRST=False)
    name = "softmax_tile fp32 has_bias want_p want_first softcap"
    yield one(name, softmax, tile, **full, WANT_FIRST=True)
    yield one("moment_tile bf16", moment_tile_kernel, tile, **plain)
    yield one("moment_tile fp16 has_bias softcap", moment_tile_kernel, tile, **full)
    yield one("rescale fp32", rescale_kernel, row, "first_ptr")
    yield one("rescale fp32 has_first", rescale_kernel, row)

    gradient = logit_gradient_tile_kernel
    no_entropy = ("entropy_ptr", "grad_entropy_ptr")
    yield one("logit_gradient_tile bf16", gradient, tile, *no_entropy, **plain)
    yield one("logit_gradient_tile fp16 has_bias has_entropy softcap", gradient, tile, **full)
    yield one("stored_gradient_tile bf16", stored_gradient_tile_kernel, tile)
    yield one("stored_gradient_tile fp32", stored_gradient_tile_kernel, tile)

    no_dlogp, no_dentropy = ("acc_ptr", "dlogp_ptr"), ("acc_first_ptr", "dentropy_ptr")
    for name, absent in {
        "finish bf16": ("entropy_ptr", *no_dlogp, *no_dentropy),
        "finish bf16 want_u": ("entropy_ptr", *no_dentropy),
        "finish fp16 want_entropy want_u": no_dentropy,
        "finish fp32 want_entropy want_u want_v": (),
    }.items():
        yield one(name, finish_kernel, row, *absent, SLOPE=1.25)


def _sample() -> Iterator[Variant]:
    def one(name: str, *absent: str, **constants: Any) -> Variant:
        """The second word of the name is the dtype of the bias."""
        types = {"bias_ptr": f"*{name.split()[1]}"}
        types |= dict.fromkeys(("seed_ptr", "position_ptr", "token_ptr", "column_ptr"), "*i64")
        types |= dict.fromkeys(("z_stride", "lo", "width"), "i32")
        launch = sample_launch(16384)
        return _variant(name, best_tile_kernel, launch, types, **dict.fromkeys(absent), **constants)

    plain: dict[str, Any] = {"LOGIT_SCALE": 1.0, "SOFTCAP": 0.0, "TEMPERATURE": 0.7}
    full: dict[str, Any] = {"LOGIT_SCALE": 0.5, "SOFTCAP": 30.0, "TEMPERATURE": 0.7}
    yield one("best_tile fp32", "bias_ptr", **plain)
    yield one("best_tile bf16 has_bias softcap", **full)
    yield one("best_tile fp16 has_bias greedy softcap", "seed_ptr", "position_ptr", **full)


def _loss() -> Iterator[Variant]:
    everything = {"counts", "old", "ref", "mask", "weight", "entropy"}

    def one(
        name: str, present: set[str], index: str = "*i64", *, level: str = "token",
        turing: bool = False, **options: Any,
    ) -> Variant:  # fmt: skip
        chosen = LossOptions(importance_sampling_level=level, **options)
        return _variant(
            f"loss_terms-{name}",
            completion_kernel,
            ragged_launch(turing=turing),
            {"cu_seqlens_ptr": index, "mask_ptr": "*u8"},
            cards=frozenset({TURING}) if turing else CARDS - {TURING},
            **dict.fromkeys(f"{x}_ptr" for x in everything - present),
            **constants(chosen),
        )

    yield one("dapo", {"mask", "entropy"})
    yield one("dapo-int32", {"mask", "entropy"}, "*i32")
    yield one("dapo-bare", set())
    yield one("grpo-full", everything, loss_type="grpo", delta=2.0, beta=0.04)
    yield one("cispo-full", everything, loss_type="cispo", beta=0.04)
    yield one("vespo-full", everything, loss_type="vespo", beta=0.04)
    yield one("sapo-sequence-full", everything, level="sequence", loss_type="sapo", beta=0.04)
    yield one("turing-dapo", {"mask", "entropy"}, turing=True)
    yield one("turing-vespo-full", everything, turing=True, loss_type="vespo", beta=0.04)
    sapo = {"level": "sequence", "loss_type": "sapo", "beta": 0.04}
    yield one("turing-sapo-sequence-full", everything, turing=True, **sapo)
    yield one("luspo-sequence", {"old", "mask", "entropy"}, level="sequence", loss_type="luspo")
    for level in ("token", "sequence"):
        yield _variant(
            f"loss_metrics-{level}",
            metrics_kernel,
            ragged_launch(),
            {"completions": "i32"},
            PER_SEQUENCE=level == "sequence",
        )
