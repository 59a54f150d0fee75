"""The work of the cases of other benches, made once more from the words in their rows.

A reader gets a case and its rows, ``[contender][metric]``, and says for each contender how long
what took and the work that this cannot do without; None for a case that it does not know. It exits
where the rows contradict what it has made.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import bench_rollout
import bench_update
import harness
import torch

from fusedgrpo.engine.roofline import work
from fusedgrpo.engine.roofline.shape import Shape
from fusedgrpo.engine.roofline.work import Asked, Work
from fusedgrpo.models.micro_batches import micro_batches
from fusedgrpo.models.packed_batch import Layout, Pair

Rows = Mapping[str, Mapping[str, float]]
ShapeOf = Callable[[bool, int], Shape]  # of the frozen weights in 4 bit or not, and the rank


class Done(NamedTuple):
    """seconds: that it took. launched: kernels, where that was counted."""

    work: Work
    seconds: float
    launched: float | None = None


ROLLOUT = re.compile(
    r".*, (?P<prompts>\d+) prompts of (?P<prompt>\d+) tokens x (?P<n>\d+) completions of "
    r"(?P<kind>\w+) lengths up to (?P<longest>\d+), LoRA r=(?P<rank>\d+) all-linear, bfloat16"
    r"(?P<four>, base in 4 bit)?, cuda,"
)


def rollout(case: str, rows: Rows, shape_of: ShapeOf) -> dict[str, Done] | None:
    """Ours reads merged weights, all others weights as they are kept with the adapter beside."""
    match = ROLLOUT.match(case)
    if match is None:
        return None
    given = argparse.Namespace(
        tokens=int(match["longest"]), generations=int(match["n"]), prompts=int(match["prompts"]),
        prompt_tokens=int(match["prompt"]), lengths=match["kind"], rank=int(match["rank"]),
        bf16=True, four_bit=bool(match["four"]), device="cuda", threads=0,
    )  # fmt: skip
    drawn = bench_rollout.draw(given, 1000, "")
    one = next(iter(rows.values()))
    if abs(one["useful"] * one["time"] / drawn.tokens - 1) > 0.01:
        raise SystemExit(f"{case}: its completions did not have {drawn.tokens} tokens")
    shape = shape_of(given.four_bit, given.rank)
    groups = [Asked(given.prompt_tokens, lengths) for lengths in drawn.lengths]

    def sampled(weights: Shape) -> Work:
        return work.read_prompts(weights, groups) + work.decode(weights, groups)

    merged = work.merge(shape) + sampled(shape.merged())
    beside = sampled(shape.beside())
    return {
        name: Done(merged if name == harness.OURS else beside, figures["time"])
        for name, figures in rows.items()
    }


UPDATE = re.compile(
    r"\((?P<P>\d+), (?P<C>\d+), (?P<G>\d+)\) x (?P<groups>\d+)(?P<quarter>, 1/4 without signal)?, "
    r".*LoRA r=(?P<rank>\d+) all-linear, NF4, bfloat16, cuda, (?P<tokens>\d+) tokens per "
    r"micro-batch [^,]*(?P<off>, shared_prompt=off)?$"
)


def update(case: str, rows: Rows, shape_of: ShapeOf) -> dict[str, Done] | None:
    """The rollouts that the bench gives to all; it computes nothing again."""
    match = UPDATE.match(case)
    if match is None:
        return None
    shape = shape_of(True, int(match["rank"]))
    sizes = bench_update.Shape(*(int(match[name]) for name in ("P", "C", "G", "groups")))
    without, tokens = bool(match["quarter"]), int(match["tokens"])
    drawn = bench_update.Case("", "", sizes, without, "cuda", torch.bfloat16, 0, tokens)
    given = bench_update.rollouts(drawn, shape.vocabulary)
    pairs = [Pair(one.prompt_ids, one.completion_ids) for one in given if one.advantage]
    layout: Layout = "packed" if match["off"] else "shared"
    batches = cut(pairs, tokens, layout)
    forwarded = sum(span.length for b in batches for span in work.spans(b, layout))
    if rows[harness.OURS]["tokens/forwarded"] != forwarded:
        raise SystemExit(f"{case}: it did not forward {forwarded} tokens")
    needed = updates(shape, batches, layout, checkpointing=False)
    return {name: Done(needed, figures["time"] / 1e3) for name, figures in rows.items()}


STEP = re.compile(
    r".*, (?P<prompts>\d+) prompts x (?P<n>\d+) completions x (?P<tokens>\d+) tokens, "
    r"LoRA r=(?P<rank>\d+) all-linear, NF4, bfloat16, cuda,"
)


def step(case: str, rows: Rows, shape_of: ShapeOf) -> dict[str, Done] | None:
    """Completions all of the greatest length, prompts all of one: what ours forwarded says which.
    In one micro-batch, and from weights as they are kept: how it was does not stand there, and
    neither is more work than that."""
    match = STEP.match(case)
    if match is None:
        return None
    shape = shape_of(True, int(match["rank"]))
    prompts, n, tokens = (int(match[name]) for name in ("prompts", "n", "tokens"))
    forwarded = rows[harness.OURS]["tokens/forwarded_grad"] - prompts * n * (tokens - 1)
    prompt, rest = divmod(int(forwarded), prompts)
    if prompt < 1 or rest:
        raise SystemExit(f"{case}: {forwarded:.0f} tokens are not those of {prompts} prompts")
    groups = [Asked(prompt, [tokens] * n)] * prompts
    sampled = shape.beside()
    sample = work.read_prompts(sampled, groups) + work.decode(sampled, groups)
    learn = updates(shape, [alike(prompts, n, prompt, tokens)], "shared", checkpointing=True)
    return {
        f"{name}, {phase}": Done(needed, figures[f"time/{phase}"])
        for name, figures in rows.items()
        for phase, needed in (("sample", sample), ("update", learn))
    }


PROFILE = re.compile(
    r"(decode, (?P<weights>\w+), (?P<rows>\d+) in flight after (?P<P>\d+) \+ (?P<C>\d+)|"
    r"(?P<G>\d+) completions of (?P<own>\d+) after (?P<prompt>\d+) tokens), "
    r".*, NF4, bfloat16, LoRA r=(?P<rank>\d+), cuda$"
)
TO_THE_END = 20  # tokens, from where profile_gpu.py decodes


def profiled(case: str, rows: Rows, shape_of: ShapeOf) -> dict[str, Done] | None:
    """A decoded token of each near the end of completions; one group's update and scoring."""
    match = PROFILE.match(case)
    if match is None:
        return None
    shape = shape_of(True, int(match["rank"]))
    if match["weights"]:
        sampled = shape.merged() if match["weights"] == "merged" else shape.beside()
        live, P, C = (int(match[name]) for name in ("rows", "P", "C"))
        token = work.step(sampled, live, -(-live // 8), P, C - TO_THE_END)
        needed = dict.fromkeys(rows, token)
    else:
        G, own, prompt = (int(match[name]) for name in ("G", "own", "prompt"))
        batches = [alike(1, G, prompt, own)]
        needed = {
            "update": updates(shape, batches, "shared", checkpointing=True),
            "scoring": scoring(shape, batches, "shared"),
        }
    return {
        name: Done(needed[name], figures["time"] / 1e3, figures.get("launches"))
        for name, figures in rows.items()
    }


READERS = {"rollout": rollout, "update": update, "step": step, "profile": profiled}


def alike(prompts: int, n: int, prompt: int, completion: int) -> list[Pair]:
    """``n`` completions of each of as many prompts, all of the same lengths."""
    return [
        Pair([-i, *[0] * (prompt - 1)], [0] * completion)
        for i in range(1, prompts + 1)
        for _ in range(n)
    ]


def cut(pairs: Sequence[Pair], tokens: int, layout: Layout) -> list[list[Pair]]:
    """Into micro-batches, as the engine does."""
    return [[pairs[i] for i in members] for members in micro_batches(pairs, tokens, layout)]


def scoring(shape: Shape, batches: Sequence[Sequence[Pair]], layout: Layout) -> Work:
    return sum((work.forward(shape, work.spans(b, layout), scored(b)) for b in batches), Work())


def updates(
    shape: Shape, batches: Sequence[Sequence[Pair]], layout: Layout, *, checkpointing: bool
) -> Work:
    done = (
        work.update(shape, work.spans(b, layout), scored(b), checkpointing=checkpointing)
        for b in batches
    )
    return sum(done, Work())


def scored(batch: Sequence[Pair]) -> int:
    return sum(len(pair.completion) for pair in batch)
