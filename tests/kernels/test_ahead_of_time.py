"""Every Triton kernel compiles for every target, without spills, within its memory, in float32."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fusedgrpo.kernels.backend import interpreted

pytest.importorskip("triton", reason="needs Triton's compiler")
if interpreted():
    pytest.skip("the interpreter's kernels cannot be compiled", allow_module_level=True)

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import aot
import aot_variants
import faulty_kernels
import torch
import triton
from triton.runtime.jit import create_function_from_signature

VARIANTS = aot_variants.all_variants()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    """Kept between runs: Triton's key is the source, the options and the compiler."""
    assert pytestconfig.cache is not None
    monkeypatch.setenv("TRITON_CACHE_DIR", str(pytestconfig.cache.mkdir("triton")))


# What an older Triton spills, by its version.
SPILLS = {
    ("decode_own bf16 96", "sm_89"): "3.6.",
    ("decode_own window softcap fp16 80", "sm_89"): "3.6.",
    ("decode_prompt bf16 256", "sm_120"): "3.6.",
}
# The others have a sibling here that compiles nearly alike, with a limit as low or lower: compiling
# for all takes minutes. Each kernel is compiled for each of them, but not in each variant.
FIRST = ["gfx942", "sm_89", "sm_90"]
OTHERS = ["sm_80", "sm_86", "sm_100", "sm_120"]


def cases():
    """``(variant, target)``: every variant for the first targets; for the others the variants of a
    kernel take turns; for Turing those of its own, and one of each kernel."""

    def case(variant, target, **marks):
        return pytest.param(variant, target, id=f"{variant.name}-{target}", **marks)

    def alike(variant, card):
        return [v for v in VARIANTS if v.kernel is variant.kernel and card in v.cards]

    for variant in VARIANTS:
        for target in FIRST:
            if aot.TARGETS[target].card in variant.cards:
                yield case(variant, target)
        if variant.cards == {aot.TURING} or variant is alike(variant, aot.TURING)[0]:
            yield case(variant, "sm_75")
        if aot.NVIDIA in variant.cards:
            of_kernel = alike(variant, aot.NVIDIA)
            turns = min(len(of_kernel), len(OTHERS))
            for i, target in enumerate(OTHERS):
                if i % turns == of_kernel.index(variant) % turns:
                    yield case(variant, target, marks=pytest.mark.slow)


def test_every_kernel_is_compiled_for_every_target():
    met = {(case.values[0].kernel, case.values[1]) for case in cases()}
    assert met == {(v.kernel, target) for v in VARIANTS for target in aot.TARGETS}


@pytest.mark.parametrize(("variant", "target"), cases())
def test_a_kernel_fits_the_target(variant, target):
    found = aot.compiled(variant, aot.TARGETS[target])
    faults = found.faults(aot.TARGETS[target])
    if triton.__version__.startswith(SPILLS.get((variant.name, target), "none")):
        pytest.xfail(f"with Triton {triton.__version__}: {faults}")
    assert faults == []
    assert found.registers > 0 and found.instructions > 0


def all_kernels():
    return {
        value
        for module in aot.kernel_modules()
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }


def test_every_kernel_has_a_variant():
    covered = {variant.kernel for variant in VARIANTS}
    kernels = all_kernels()
    assert kernels and kernels <= covered
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


@pytest.mark.parametrize(
    "variant,target,fault",
    [
        pytest.param(faulty_kernels.float64(), "sm_89", "float64", id="float64"),
        pytest.param(faulty_kernels.float64(), "gfx942", "float64", id="float64-amd"),
        pytest.param(faulty_kernels.spilling(), "sm_89", "spills", id="spilling"),
        pytest.param(faulty_kernels.too_much_shared(), "sm_89", "shared memory", id="shared"),
    ],
)
def test_the_check_finds_a_fault(variant, target, fault):
    target = aot.TARGETS[target]
    assert aot.compiled(faulty_kernels.sound(), target).faults(target) == []
    found = aot.compiled(variant, target).faults(target)
    # Triton 3.6 spills besides where it is given more bins than fit.
    assert any(fault in each for each in found)


def test_spills_and_memory_of_amd_are_read_from_the_assembly():
    """Kernels that really take as much compile for half a minute there."""
    assembly = "\n".join(
        [
            "\tv_add_f32_e32 v0, v1, v2",
            "  - .agpr_count:     0",
            "    .group_segment_fixed_size: 70000",
            "    .private_segment_fixed_size: 0",
            "    .vgpr_count:     128",
            "    .vgpr_spill_count: 3",
        ]
    )
    found = aot.amd_resources(assembly, shared=16)
    assert (found.registers, found.spilled, found.shared, found.instructions) == (128, 12, 70000, 1)
    assert len(found.faults(aot.TARGETS["gfx942"])) == 2


def test_scoring_and_update_take_their_sums_in_one_order():
    """A store in 16 bit would spread a row over threads in another way, and logp would differ in
    its last bits between the pass without gradients and the one with them."""
    from fusedgrpo.kernels.logprob.softmax_triton import softmax_tile_kernel

    variants = [
        v for v in VARIANTS if v.kernel is softmax_tile_kernel and not v.constants["SOFTCAP"]
    ]
    assert len({"p_ptr" in v.constants for v in variants}) == 2
    orders = {aot.reduction_layouts(v, aot.TARGETS["sm_90"]) for v in variants}
    assert len(orders) == 1 and orders.pop()


# Pointers to whole rows, which begin where 16 bytes do whatever rows there are. Others are to one
# number of each row, token or completion, and may be views that begin anywhere.
MATRICES = {
    "z_ptr", "p_ptr", "dz_ptr", "bias_ptr", "weight_ptr", "acc_ptr", "acc_first_ptr", "dlogp_ptr",
    "dentropy_ptr", "query_ptr", "keys_ptr", "values_ptr", "product_ptr", "out_ptr", "x_ptr",
}  # fmt: skip
# Tables of a decode step, each a tensor of its own.
TABLES = {"pages_ptr", "lengths_ptr", "cu_rows_ptr", "own_lengths_ptr", "prompt_lengths_ptr"}
# Where a name is that of something else.
MATRICES_OF = {"rescale_kernel": {"first_ptr"}}
NUMBERS_OF = {"completion_kernel": {"weight_ptr"}}  # the sampler's, one of each token


def anywhere(kernel):
    """The parameters that may begin at any element."""
    name = kernel.fn.__name__
    pointers = {p for p in kernel.arg_names if p.endswith("_ptr")}
    known = (MATRICES | TABLES | MATRICES_OF.get(name, set())) - NUMBERS_OF.get(name, set())
    return pointers - known


def specialised(kernel, arguments):
    """What Triton would compile ``kernel`` for when it is called with ``arguments``."""
    backend = triton.compiler.make_backend(aot.TARGETS["sm_90"].gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return bind(*arguments)[1]


@pytest.mark.parametrize("kernel", sorted(all_kernels(), key=lambda k: k.fn.__name__), ids=str)
def test_where_a_view_begins_compiles_nothing_anew(kernel):
    """The chunks, micro-batches and rows of a run would otherwise compile in the midst of it."""
    types = next(variant.signature for variant in VARIANTS if variant.kernel is kernel)
    numbers = torch.zeros(64)

    def arguments(offset):
        found = []
        for name in kernel.arg_names:
            view = numbers[offset if name in anywhere(kernel) else 0 :]
            found.append(view if name.endswith("_ptr") else 2 if types[name] != "fp32" else 0.5)
        return found

    keys = [specialised(kernel, arguments(offset)) for offset in range(5)]
    assert all(key == keys[0] for key in keys)
