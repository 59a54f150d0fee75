"""The least that rollouts, scoring and updates of a model can cost on a GPU, and what was measured.

    python bench/roofline.py --model qwen2.5-7b --card H100 --four-bit
    python bench/roofline.py --measured bench/results/2026-11-26-gpu-rollout.jsonl

``--model`` is a folder with a config.json, or one of the names that ``simulate.py`` knows; nothing
is loaded. A step is of ``--prompts`` x ``--generations`` completions of ``--completion`` tokens
after ``--prompt`` tokens. The formulas are in ``fusedgrpo/engine/roofline/work.py``; ``bound`` is
the longer of what the FLOP (``compute``) and the bytes (``memory``) take at the card's best, and
``launches`` beside it the time in which so many kernels are started one by one (``--launch``
microseconds each), as no recorded step does. ``--tflops`` and ``--bandwidth`` overrule the card's
data sheet.

``--measured`` reads rows of ``bench_rollout.py``, ``bench_update.py``, ``bench_step.py`` and
``profile_gpu.py``, makes the lengths of their completions once more and prints how much of the
bound each contender ``reached``: the bound of what the task needs (each prompt once for its group,
completions without a gradient left out), so that padding shows as a small share. ``kernels`` are
those that were launched, where that was counted, over those that are needed. The card is the one
that the rows are of. Rows of other benches, of a CPU and of other models than ``--model`` (rows of
random weights in its shapes are of Qwen2.5-7B) are counted and left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import roofline_rows
import simulate_models
import step_models
import torch

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.bare_models import adapted_model
from fusedgrpo.engine.roofline import work
from fusedgrpo.engine.roofline.cards import CARDS, LAUNCH, Card, find_card
from fusedgrpo.engine.roofline.shape import Shape
from fusedgrpo.engine.roofline.work import Asked, Work

UNITS = {
    "reached": "", "time": "ms", "bound": "ms", "compute": "ms", "memory": "ms", "launches": "ms",
    "kernels": "kernel", "kernels/needed": "kernel", "flops": "FLOP", "bytes": "byte",
}  # fmt: skip
SHAPES_OF_RANDOM_7B = "qwen2.5-7b"


def main() -> None:
    args = arguments()
    if args.measured is None:
        rows = planned(args)
    else:
        rows = [row for file in args.measured for row in measured(file, args)]
    if args.json is not None:
        harness.write(rows, args.json)


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__, [])
    parser.add_argument("--model", help="a folder, or a name of simulate.py (default: qwen2.5-7b)")
    parser.add_argument("--card", help=f"{', '.join(c.name for c in CARDS)} (default: H200)")
    parser.add_argument("--tflops", type=float, help="dense in 16 bit, instead of the card's")
    parser.add_argument("--bandwidth", type=float, help="GB/s, instead of the card's")
    parser.add_argument("--launch", type=float, default=1e6 * LAUNCH, help="us for each kernel")
    parser.add_argument("--four-bit", action="store_true", help="frozen weights in NF4")
    parser.add_argument("--full", action="store_true", help="all weights train, without LoRA")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA on all linear layers")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=512, help="tokens of each completion")
    parser.add_argument("--in-flight", type=int, help="completions decoded together (default: all)")
    parser.add_argument("--tokens-per-microbatch", type=int, default=8192)
    parser.add_argument("--no-checkpointing", action="store_true", help="nothing computed again")
    parser.add_argument(
        "--measured", type=Path, action="append", metavar="FILE", help="rows of other benches"
    )
    args = parser.parse_args()
    if args.full and args.four_bit:
        parser.error("--full: weights in 4 bit do not train")
    if args.card and find_card(args.card) is None:
        parser.error(f"--card {args.card}: there are {', '.join(c.name for c in CARDS)}")
    if args.quick:
        args.model = args.model or "qwen2.5-0.5b"
        args.prompts, args.generations, args.prompt, args.completion = 2, 4, 24, 12
    args.model = args.model or "qwen2.5-7b"
    return args


def card_of(args: argparse.Namespace, name: str) -> Card | None:
    """``--card``, or else the one that torch calls ``name``, with the numbers of the options; None
    where its own are not known and the options do not have them both."""
    card = find_card(args.card or name)
    flops = 1e12 * args.tflops if args.tflops else card and card.flops
    bandwidth = 1e9 * args.bandwidth if args.bandwidth else card and card.bandwidth
    return Card(card.name if card else name, flops, bandwidth) if flops and bandwidth else None


@functools.cache
def shape_of(model: str, four_bit: bool, rank: int, full: bool = False) -> Shape:
    """With the adapter, computing in bfloat16; made on the meta device."""
    from transformers import AutoConfig

    known = model in simulate_models.MODELS
    load = simulate_models.model_config if known else AutoConfig.from_pretrained
    settings = load(model)
    kind = "full" if full else "lora"
    config = GRPOConfig(load_in_4bit=four_bit, lora_r=rank, finetuning_type=kind)
    made = adapted_model(config, settings, settings.get_text_config().num_hidden_layers)
    return Shape.of(made if full else made.get_base_model(), torch.bfloat16.itemsize)


def planned(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The parts of a step that nobody ran."""
    card = card_of(args, "NVIDIA H200")
    assert card is not None
    shape = shape_of(args.model, args.four_bit, args.rank, args.full)
    n, all_rows = args.generations, args.prompts * args.generations
    groups = [Asked(args.prompt, [args.completion] * n)] * args.prompts
    kinds = {"": shape} if args.full else {"merged": shape.merged(), "adapter": shape.beside()}
    parts: dict[str, Work] = {}
    for kind, sampled in kinds.items():
        rows = min(args.in_flight or all_rows, all_rows)
        middle = rows, -(-rows // n), args.prompt, max(args.completion // 2, 1)
        parts |= {
            f"{kind} prompts".strip(): work.read_prompts(sampled, groups),
            f"{kind} decoding".strip(): work.decode(sampled, groups, args.in_flight),
            f"{kind} one token each".strip(): work.step(sampled, *middle),
        }
    if not args.full:
        parts["merging"] = work.merge(shape)
    pairs = roofline_rows.alike(args.prompts, n, args.prompt, args.completion)
    batches = roofline_rows.cut(pairs, args.tokens_per_microbatch, "shared")
    again = not args.no_checkpointing
    parts["scoring"] = roofline_rows.scoring(shape, batches, "shared")
    parts["update"] = roofline_rows.updates(shape, batches, "shared", checkpointing=again)
    case = (
        f"{Path(args.model).name}, {args.prompts} prompts of {args.prompt} tokens x {n} "
        f"completions of {args.completion}, "
        f"weights in {'NF4' if args.four_bit else 'bfloat16'}, "
        + ("all of them train, " if args.full else f"LoRA r={args.rank} all-linear, ")
        + ("gradient checkpointing, " if again else "")
        + f"{len(batches)} micro-batches; {said(card)}, {args.launch:g} us a launch"
    )
    figures = {
        name: bounds(part, card)
        | {
            "launches": 1e-3 * args.launch * part.launches,
            "flops": part.flops,
            "bytes": part.nbytes,
        }
        for name, part in parts.items()
    }
    return report(case, figures, harness.about())


def bounds(part: Work, card: Card) -> dict[str, float]:
    return {
        "bound": 1e3 * part.seconds(card),
        "compute": 1e3 * part.flops / card.flops,
        "memory": 1e3 * part.nbytes / card.bandwidth,
        "kernels/needed": part.launches,
    }


def said(card: Card) -> str:
    return f"{card.name} with {card.flops / 1e12:g} TFLOP/s and {card.bandwidth / 1e9:,.0f} GB/s"


def measured(file: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A table for each case of ``file`` that has a bound; the rows of all."""
    cases: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    where: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        key = row["bench"], row["case"], row["machine"]
        rows = cases.setdefault(key, defaultdict(dict))
        rows[row["impl"]][row["metric"]] = row["value"]
        where[key] = {name: row[name] for name in ("machine", "versions", "commit")}
    left_out: Counter[str] = Counter()
    result = []
    for (bench, case, machine), rows in cases.items():
        device = re.sub(r" \d+ GiB$", "", machine.rpartition(", ")[2])
        card, read = card_of(args, device), roofline_rows.READERS.get(bench)
        random = step_models.RANDOM_7B in case
        of_model = args.model == SHAPES_OF_RANDOM_7B if random else Path(args.model).name in case
        if read is None or not of_model:
            left_out["of another bench or model"] += 1
        elif card is None:
            left_out[f"of a card whose speed is not known: {device}"] += 1
        elif (found := read(case, rows, functools.partial(shape_of, args.model))) is None:
            left_out["that did not compute in bfloat16 on a GPU"] += 1
        else:
            figures = {
                impl: {
                    "reached": done.work.seconds(card) / done.seconds,
                    "time": 1e3 * done.seconds,
                }
                | bounds(done.work, card)
                | ({} if done.launched is None else {"kernels": done.launched})
                for impl, done in found.items()
            }
            key = bench, case, machine
            result += report(f"{bench}: {case}; {said(card)}", figures, where[key])
    for why, count in left_out.items():
        print(f"{file.name}: {count} case{'s' * (count != 1)} left out {why}")
    return result


def report(
    case: str, figures: dict[str, dict[str, float]], where: dict[str, Any]
) -> list[dict[str, Any]]:
    """Prints a table with a line for each contender or part; the rows."""
    metrics = [name for name in UNITS if any(name in values for values in figures.values())]
    lines = [["", *(f"{name}, ms" if UNITS[name] == "ms" else name for name in metrics)]]
    lines += [
        [impl, *(shown(name, values.get(name)) for name in metrics)]
        for impl, values in figures.items()
    ]
    print(f"\nroofline: {case}\n{where['machine']}; commit {where['commit']}\n{table(lines)}")
    return [
        {"bench": "roofline", "case": case, "impl": impl, "metric": name, "value": values[name],
         "unit": UNITS[name]} | where
        for impl, values in figures.items()
        for name in metrics
        if name in values
    ]  # fmt: skip


def shown(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if metric in ("flops", "bytes"):
        return f"{value:.3g}"
    if metric == "reached":
        return f"{value:.1%}"
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    main()
