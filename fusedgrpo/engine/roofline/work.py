"""FLOPs, bytes and launches that rollouts, scoring and updates cannot do without.

Of a pass over T tokens, N of them scored, with weights of W elements in the layers, LoRA factors
of A, a head of V x H, and ``pairs`` of a query and a key that it sees:

    layers, forward     2 T (W + A)            their weights are read once
    attention, forward  4 queries pairs        a layer: q k^T, and probabilities x values
    head, forward       2 N V H = 1 u          with the gradient of its input 2 u, with that of an
                                               entropy 3 u, of a head that trains 4 u
    layers, backward    2 T W + 4 T A          through frozen weights: 2/3 of the backward pass of
                                               weights that train, 4 T W
    attention, backward 8 queries pairs

Gradient checkpointing computes the layers forward once more, but for the last product of each,
whose output no gradient needs. Of the first layer's q, k and v no input gradient is wanted where
embeddings are frozen.

Bytes are those of weights, of keys and values where they are kept (a rollout), and of gradients of
weights that train. What lies between two products is not counted: it need not leave the chip. So
are not: norms, biases, rotations, the loss, sampling, the optimizer. A launch is one for a product
(of layers that read the same input together), each LoRA factor, and attention. All of it is from
below: a bound in time from it can be missed and not beaten, and launches are not a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusedgrpo.engine.roofline.cards import Card
from fusedgrpo.engine.roofline.shape import Shape
from fusedgrpo.models.packed_batch import Layout, Pair


@dataclass(frozen=True)
class Work:
    """nbytes: read and written in the GPU's memory. launches: of kernels."""

    flops: float = 0
    nbytes: float = 0
    launches: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.nbytes + other.nbytes, self.launches + other.launches
        )

    def seconds(self, card: Card) -> float:
        """The bound: whichever of computing and memory takes longer, at the card's best."""
        return max(self.flops / card.flops, self.nbytes / card.bandwidth)


class Span(NamedTuple):
    """``length`` tokens that are forwarded, each of which sees those ``before``, those of the span
    before it, and itself."""

    length: int
    before: int = 0


def spans(pairs: Sequence[Pair], layout: Layout) -> list[Span]:
    """The tokens of ``pairs`` that are forwarded: their last ones predict nothing. In layout
    ``"shared"`` equal prompts are forwarded once. Padding is no work."""
    if layout != "shared":
        return [Span(len(p.prompt) + max(len(p.completion) - 1, 0)) for p in pairs]
    prompts = [Span(len(prompt)) for prompt in {tuple(p.prompt) for p in pairs}]
    return prompts + [Span(max(len(p.completion) - 1, 0), len(p.prompt)) for p in pairs]


def seen(span: Span, window: int | None) -> int:
    """Pairs of a query in ``span`` and a key that it sees: the sum of ``min(before + i, window)``
    for i from 1 to its length."""
    length, before = span
    if window is None or before + length <= window:
        return length * before + length * (length + 1) // 2
    short = max(window - before, 0)  # queries that see less than a window
    return seen(Span(short, before), None) + (length - short) * window


def forward(shape: Shape, batch: Sequence[Span], scored: int, units: int = 1) -> Work:
    """One pass without gradients over ``batch``: scoring. scored: N, of which the head takes
    ``units``."""
    tokens = sum(span.length for span in batch)
    flops = 2.0 * tokens * sum(p.weights + p.factors for p in shape.products)
    flops += 4.0 * _attended(shape, batch)
    head = Work(2.0 * units * scored * shape.vocabulary * shape.hidden, shape.head_bytes, 1)
    launches = _families(shape) + 2 * _adapted(shape) + len(shape.attention)
    return Work(flops, shape.layer_bytes, launches) + head


def update(
    shape: Shape,
    batch: Sequence[Span],
    scored: int,
    *,
    checkpointing: bool,
    entropy_gradient: bool = False,
) -> Work:
    """Forward and backward pass of one micro-batch."""
    units = (4 if shape.head_trains else 2) + entropy_gradient
    tokens = sum(span.length for span in batch)
    weights = sum(p.weights * (p.passes_on + p.trains) for p in shape.products)
    factors = sum(
        p.rank * ((2 if p.passes_on else 1) * p.inputs + 2 * p.outputs) for p in shape.products
    )
    flops = 2.0 * tokens * (weights + factors) + 8.0 * _attended(shape, batch)
    written = sum(p.nbytes * p.trains + p.factor_bytes for p in shape.products)
    written += shape.head_bytes * shape.head_trains
    trained = sum(p.reads and p.trains for p in shape.products) + shape.head_trains
    launches = _families(shape) + trained + 4 * _adapted(shape) + len(shape.attention) + 1
    backward = Work(flops, shape.layer_bytes + written, launches)
    once = forward(shape, batch, scored, units) + backward
    return once + _recomputed(shape, batch) if checkpointing else once


def _recomputed(shape: Shape, batch: Sequence[Span]) -> Work:
    """All layers forward; of a layer's last product only what its adapter's gradient needs."""
    tokens = sum(span.length for span in batch)
    kept = [p for p in shape.products if not p.closes]
    last = [p for p in shape.products if p.closes]
    factors = sum(p.rank * p.inputs for p in last)
    flops = 2.0 * tokens * (sum(p.weights + p.factors for p in kept) + factors)
    nbytes = sum(p.nbytes + p.factor_bytes for p in kept)
    launches = sum(p.reads + 2 * (p.reads and p.rank > 0) for p in kept)
    launches += sum(p.rank > 0 for p in last) + len(shape.attention)
    return Work(flops + 4.0 * _attended(shape, batch), nbytes, launches)


class Asked(NamedTuple):
    """A group of a rollout, in tokens: its prompt and what was sampled for each completion."""

    prompt: int
    lengths: Sequence[int]


def merge(shape: Shape) -> Work:
    """The copy of the weights with the adapter in them, made once for a rollout."""
    adapted = [p for p in shape.products if p.rank]
    return Work(
        2.0 * sum(p.rank * p.weights for p in adapted),
        sum(p.nbytes + p.factor_bytes + p.weights * shape.itemsize for p in adapted),
        len(adapted),
    )


def read_prompts(shape: Shape, groups: Sequence[Asked]) -> Work:
    """Each prompt once, with the logits of its last token; keys and values are written."""
    batch = [Span(group.prompt) for group in groups]
    written = shape.entry_bytes * sum(group.prompt for group in groups)
    return forward(shape, batch, len(groups)) + Work(0, written, 0)


def decode(shape: Shape, groups: Sequence[Asked], in_flight: int | None = None) -> Work:
    """All tokens but the first of each completion, one after the other.

    shape: as it is sampled from. The weights are read once for each token of the longest, or more
    often where no more than ``in_flight`` are decoded together; keys and values of a prompt once a
    step for all of its completions that go on.
    """
    own = [max(length - 1, 0) for group in groups for length in group.lengths]
    tokens, steps = sum(own), max(own, default=0)
    if in_flight:
        steps = max(steps, -(-tokens // in_flight))
    all_spans = [
        Span(max(length - 1, 0), group.prompt) for group in groups for length in group.lengths
    ]
    one = forward(shape, all_spans, tokens)
    read = 0
    for layer in shape.attention:
        read += layer.entries * sum(seen(Span(length), layer.window) for length in own)
        for group in groups:
            longest = max(max(group.lengths, default=0) - 1, 0)
            both = seen(Span(longest, group.prompt), layer.window)
            read += layer.entries * (both - seen(Span(longest), layer.window))
    kept = shape.itemsize * read + shape.entry_bytes * tokens
    weights = steps * (shape.layer_bytes + shape.head_bytes)
    return Work(one.flops, weights + kept, steps * one.launches)


def step(shape: Shape, rows: int, groups: int, prompt: int, own: int) -> Work:
    """One decoded token of each of ``rows`` completions of ``groups`` prompts, the ``own``-th after
    a prompt of ``prompt`` tokens."""
    one = forward(shape, [Span(1, prompt + own - 1)] * rows, rows)
    read = 0
    for layer in shape.attention:
        mine = min(own, layer.window or own)
        both = min(prompt + own, layer.window or prompt + own)
        read += layer.entries * (rows * mine + groups * (both - mine))
    return one + Work(0, shape.itemsize * read + shape.entry_bytes * rows, 0)


def _attended(shape: Shape, batch: Sequence[Span]) -> int:
    """Query elements times the keys that each sees, of all layers."""
    total = {
        window: sum(seen(span, window) for span in batch)
        for window in {layer.window for layer in shape.attention}
    }
    return sum(layer.queries * total[layer.window] for layer in shape.attention)


def _families(shape: Shape) -> int:
    return sum(p.reads for p in shape.products)


def _adapted(shape: Shape) -> int:
    """Products with an adapter, of those that read the same input one."""
    return sum(p.reads and p.rank > 0 for p in shape.products)
