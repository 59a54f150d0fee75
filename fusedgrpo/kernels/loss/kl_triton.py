"""The KL of a token to the reference, in Triton."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def k3(d):
    """exp(d) - 1 - d, by its series where the difference would cancel."""
    series = 1.0 + d * (1.0 / 9)
    series = 1.0 + d * (1.0 / 8) * series
    series = 1.0 + d * (1.0 / 7) * series
    series = 1.0 + d * (1.0 / 6) * series
    series = 1.0 + d * (1.0 / 5) * series
    series = 1.0 + d * (1.0 / 4) * series
    series = 1.0 + d * (1.0 / 3) * series
    return tl.where(tl.abs(d) < 0.5, 0.5 * d * d * series, tl.exp(d) - 1.0 - d)
