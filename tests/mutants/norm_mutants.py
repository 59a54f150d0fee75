"""Broken variants of ``rms_norm``."""

from __future__ import annotations

from mutant import Mutant

TESTS = "norm/test_rms_norm.py::"
PLAIN = TESTS + "test_it_equals_the_reference[7-True-0.0]"
OFFSET = TESTS + "test_it_equals_the_reference[7-False-1.0]"
ROUNDED = TESTS + "test_in_16_bits_it_is_rounded_where_it_says[torch.float16-True]"
APART = TESTS + "test_rows_may_be_apart_and_dimensions_too"

TRITON = "norm/rms_norm_triton.py"
TORCH = "norm/op.py"

NORM_MUTANTS = (
    Mutant("no epsilon is added", TRITON, "/ H + eps", "/ H", (PLAIN,)),
    Mutant("the mean is that of a block", TRITON, "/ H + eps", "/ BLOCK + eps", (PLAIN,)),
    Mutant("the offset is left out", TRITON, "y * (OFFSET + weight)", "y * weight", (OFFSET,)),
    Mutant(
        "the weight multiplies before the rounding",
        TRITON,
        "y = y.to(x_ptr.dtype.element_ty).to(tl.float32) * weight",
        "y = y * weight",
        (ROUNDED,),
    ),
    Mutant("rows lie end to end", TRITON, "row * x_stride", "row * H", (APART,)),
    Mutant(
        "the mean is taken of the values",
        TORCH,
        "y.square().mean(-1, keepdim=True)",
        "y.mean(-1, keepdim=True).square()",
        (PLAIN,),
    ),
    Mutant(
        "torch multiplies before the rounding",
        TORCH,
        "return weight * y.to(x.dtype)",
        "return (weight.to(exact) * y).to(x.dtype)",
        (ROUNDED,),
    ),
)
