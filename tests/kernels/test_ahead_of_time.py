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
import triton

VARIANTS = aot_variants.all_variants()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    """Kept between runs: Triton's key is the source, the options and the compiler."""
    assert pytestconfig.cache is not None
    monkeypatch.setenv("TRITON_CACHE_DIR", str(pytestconfig.cache.mkdir("triton")))


# The others have a sibling here that compiles nearly alike, with a limit as low or lower: compiling
# for all takes minutes. Each kernel is compiled for each of them, but not in each variant.
# What an older Triton spills, by its version.
SPILLS = {("decode_own bf16 96", "sm_89"): "3.6."}
FIRST = {"sm_75", "sm_89", "sm_90", "sm_120", "gfx942"}
OTHERS = [name for name in aot.TARGETS if name not in FIRST]


def cases():
    """``(variant, target)``: every variant for the first targets; for the others the variants of a
    kernel take turns."""
    for variant in VARIANTS:
        for target in sorted(FIRST):
            if aot.TARGETS[target].card in variant.cards:
                yield pytest.param(variant, target, id=f"{variant.name}-{target}")
        if aot_variants.NVIDIA not in variant.cards:
            continue
        nvidia = [other for other in VARIANTS if aot_variants.NVIDIA in other.cards]
        of_kernel = [other for other in nvidia if other.kernel is variant.kernel]
        turns = min(len(of_kernel), len(OTHERS))
        for i, target in enumerate(OTHERS):
            if i % turns == of_kernel.index(variant) % turns:
                name = f"{variant.name}-{target}"
                yield pytest.param(variant, target, id=name, marks=pytest.mark.slow)


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


def test_every_kernel_has_a_variant():
    covered = {variant.kernel for variant in VARIANTS}
    kernels = {
        value
        for module in aot.kernel_modules()
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
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
