"""Launch parameters: pure functions of shape, dtype and architecture, so that a run never searches.

``bench/tune.py`` searches them on a machine and prints the table to paste here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is launched: elements per step of its inner loop, and warps per program."""

    block: int
    num_warps: int

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a kernel call, beside its own arguments."""
        # Explicit, because the default of Triton 3.10 is another one than that of 3.9.
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def ragged_launch() -> Launch:
    """One program per completion, over its tokens: the policy loss."""
    return Launch(block=1024, num_warps=4)


def group_launch() -> Launch:
    """One program per reward, over the rewards of its group."""
    return Launch(block=256, num_warps=4)


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of a kernel, as the ahead-of-time check and ``bench_compile.py`` take it.

    signature: Triton's types of all parameters in order, e.g. ``"*bf16"``, ``"i64"``; those in
    ``constants`` are ``"constexpr"``.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    launch: Launch
