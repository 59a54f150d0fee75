"""Launch parameters: pure functions of shape, dtype and architecture, so that a run never searches.

``bench/tune.py`` searches them on a machine and prints the table to paste here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is launched: elements per step of its inner loop, warps per program, and steps
    that are loaded ahead (Triton's default if None)."""

    block: int
    num_warps: int
    num_stages: int | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a kernel call, beside its own arguments."""
        # Explicit, because the default of Triton 3.10 is another one than that of 3.9.
        stages = {} if self.num_stages is None else {"num_stages": self.num_stages}
        return {"num_warps": self.num_warps, "enable_fp_fusion": True, **stages}


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the head's work is cut: rows of hidden states by columns of the vocabulary.

    rows: of a chunk whose probabilities are used tile by tile.
    columns: of a tile of logits.
    head_columns: of a tile when the gradient of the head is accumulated over all rows.
    stored_rows: of a chunk whose probabilities are kept for the whole vocabulary.
    """

    rows: int
    columns: int
    head_columns: int
    stored_rows: int


MIB = 2**20


def tiling(H: int, V: int, itemsize: int, device_type: str) -> Tiling:
    """The tiling for a head ``[V, H]`` whose GEMM operands have ``itemsize`` bytes an element.

    Independent of N and of whether gradients are needed: the same row gives the same bits in every
    pass.
    On a GPU the largest tile is taken whose scratch (float32 logits, probabilities, and for two
    gradients the float32 sums and the results of the chunk) stays below 500 MiB. 3,584 rows by
    H = 3,584 are 392 blocks of 128 x 256: 2.97 waves on the 132 SMs of an H100.
    """
    if device_type != "cuda":
        return Tiling(1024, 4096, 4096, _stored_rows(V, itemsize, most=1024))
    sizes = [(r, c) for r in (3584, 1792, 896) for c in (16384, 8192, 4096)]

    def scratch(rows: int, columns: int) -> int:
        return rows * (columns * (4 + itemsize) + H * (8 + 2 * itemsize))

    rows, columns = next((size for size in sizes if scratch(*size) <= 500 * MIB), sizes[-1])
    return Tiling(rows, columns, min(columns, 4096), _stored_rows(V, itemsize, most=rows))


def _stored_rows(V: int, itemsize: int, most: int) -> int:
    """The most rows, a power of two, whose ``[rows, V]`` probabilities take up to 320 MiB."""
    fitting = max(320 * MIB // (V * itemsize), 1)
    return min(1 << (fitting.bit_length() - 1), most)


def tile_launch(columns: int) -> Launch:
    """One program per row of a tile of logits."""
    return Launch(block=min(max(power_of_two(columns), 2), 4096), num_warps=8)


def sample_launch(columns: int) -> Launch:
    """One program per row of a tile of logits, in fours of columns that share their noise."""
    return Launch(block=min(max(power_of_two(columns), 4), 2048), num_warps=8)


def row_launch(H: int) -> Launch:
    """One program per row of hidden states."""
    return Launch(block=min(power_of_two(H), 2048), num_warps=4)


def norm_launch(H: int) -> Launch:
    """One program per row, all of which it holds."""
    block = power_of_two(H)
    return Launch(block=block, num_warps=min(max(block // 512, 1), 16))


def ragged_launch(*, turing: bool = False) -> Launch:
    """One program per completion, over its tokens: the policy loss."""
    return Launch(block=1024, num_warps=8 if turing else 4)


def group_launch() -> Launch:
    """One program per reward, over the rewards of its group."""
    return Launch(block=256, num_warps=4)


# Keys of a part of the attention of a decode step. A constant: where the parts of a row begin may
# depend on nothing but positions. Fewer are more programs, of which a few sequences make too few,
# and more partial results: those of 56 queries over 128 keys of 128 x 2 dimensions, 64 KiB in
# 16 bit, are 28 KiB. Found with bench/tune_decode.py on an H200, as the launches below.
DECODE_SPLIT = 128


# Programs that share the tiles of a group's queries over one part of its prompt's keys: with one, a
# few prompts are too few programs for a GPU. How many there are to share is known to the GPU alone.
DECODE_LANES = 2


def decode_rows(itemsize: int, head_dim: int) -> int:
    """Queries that are multiplied with a prompt's keys together: the most whose sums fit registers.
    The same for every group: another tile may be another order of sums. More queries are more
    tiles over the same keys, which are in the cache by then."""
    return 32 if itemsize == 2 and head_dim <= 128 else 16


def decode_launch(
    head_dim: int, itemsize: int, *, prompt: bool, aligned: bool, turing: bool = False
) -> Launch:
    """One program per part of the keys of a decode step and kv head, over blocks of keys.

    prompt: of a prompt's keys, for many queries. aligned: the tensors begin at multiples of 16
    elements and have such strides; where nothing is known of that, a block takes twice as many
    registers. float32 does without tensor cores: loading ahead would only take registers. turing:
    of compute capability 7.5, which loads nothing ahead, and whose products take more registers.
    """
    if itemsize > 2:
        return Launch(block=16, num_warps=8, num_stages=1)
    if head_dim > 128:
        return Launch(block=16, num_warps=8)
    if turing:
        return Launch(block=16 if prompt else 32, num_warps=8, num_stages=1)
    if not aligned:
        return Launch(block=32, num_warps=8 if head_dim > 64 else 4)
    return Launch(
        block=64, num_warps=8 if prompt else 4, num_stages=2 if prompt or head_dim > 64 else 3
    )


def decode_merge_launch() -> Launch:
    """One program per row and head; the block is of groups, to find the row's."""
    return Launch(block=128, num_warps=1)
