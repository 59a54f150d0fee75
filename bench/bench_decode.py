"""What a decoded token is made of: the draw, the attention, products of few rows.

    python bench/bench_decode.py --threads 1 --json decode.jsonl

**The draw**: ``linear_sample``, from hidden states to a token and its log-prob, beside ``torch``
(rows of logits, float32 softmax, ``multinomial``) and the bare product with the head. The error of
the log-probs against float64, and in how many rows the token is the one that float64 draws from the
same noise (``torch`` draws others). ``peaked`` rows have three competitors near a top logit of 16
to 31.

**The attention**: ``decode_attention`` over pages beside ``torch``: its SDPA (enable_gqa) over a
cache that is padded to the longest and has a prompt for each completion. Relative errors against
float64, of all rows together and of the worst; ``bytes`` of keys and values that are there.

**Products**: ``x W^T`` of a few rows as ``torch`` and as the rollout's layers compute it
(``models/adapters/few_rows.py``), and all products of a token of SmolLM2-135M, each with a weight
of its own, for 16 sequences (ours) and for other numbers of them: what completions that leave can
save. Float32, on a CPU.

``relative`` is processor time over ours, on a CPU; ``time`` that of a GPU. Exit code 1: ours miss
``BARS``. ``--peers`` is taken, as by all benches, and compares with nobody.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import head_contenders as heads
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from fusedgrpo import host
from fusedgrpo.kernels import decode_attention, linear_sample
from fusedgrpo.kernels.sample.philox import gumbel_tile
from fusedgrpo.models.adapters.few_rows import product

# Of log-probs in nats, as in bench_accuracy.py, and of attention, relative to the row.
BARS = {"logp_max": 1e-5, "attention/float32": 1e-5, "attention/bfloat16": 8e-3}
PAGE = 16
UNITS = {
    "logp_max": "nat", "logp_mean": "nat", "same_token": "share", "error": "relative",
    "worst_row": "relative", "bytes": "byte", "time": "s", "relative": f"x {harness.OURS}",
}  # fmt: skip

Values = dict[str, float]


def main() -> None:
    parser = harness.parser(__doc__, heads.PEERS)
    parser.add_argument("--rounds", type=int, help="that count (default: 9, with --quick 2)")
    parser.add_argument("--threads", type=int, default=host.cores())
    parser.add_argument("--device", default="cuda" if host.has_gpu() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds = args.rounds or (2 if args.quick else 9)
    rows: list[dict[str, Any]] = []
    missed: list[str] = []

    def compare(case: str, errors: dict[str, Values], works: dict[str, Callable[[], Any]]) -> None:
        steps = {name: stopwatch(work, args.device) for name, work in works.items()}
        samples = harness.interleave(steps, rounds=rounds, warmup=1)
        if args.device == "cpu":
            ours = statistics.median(samples[harness.OURS]["time"])
            for values in samples.values():
                values["relative"] = [taken / ours for taken in values.pop("time")]
        for name, found in errors.items():
            samples[name] |= {metric: [value] for metric, value in found.items()}
        case += f", {args.device}, {args.threads} threads"
        rows.extend(harness.report("decode", case, samples, UNITS))

    H, V = (64, 2048) if args.quick else (576, 49152)
    for dtype in (torch.float32, torch.bfloat16):
        for data in ("flat", "peaked"):
            for M in (4,) if args.quick else (8, 64):
                hidden, weight = head(data, M, H, V, dtype, args.device)
                errors, works = draw(hidden, weight)
                compare(f"a token each, {data}, M={M}, H={H}, V={V}, {dtype}", errors, works)
                missed += over(f"{data}, M={M}, {dtype}", errors, "logp_max", BARS["logp_max"])
    for dtype, bar in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for P in (24,) if args.quick else (64, 1024):
            cache = Cache.random(
                2 if args.quick else 4, 8, P, 12 if args.quick else 96, args, dtype
            )
            errors, works = attend(cache)
            compare(f"attention, {cache.describe()}, {dtype}", errors, works)
            missed += over(cache.describe(), errors, "worst_row", BARS[f"attention/{bar}"])
    if args.device == "cpu":
        for k, n in ((H, V),) if args.quick else ((576, 1536), (1536, 576), (576, 49152)):
            for M in (2, 4, 8):
                compare(f"x W^T, {M} x {k} x {n}, torch.float32", {}, products(M, k, n))
        compare("all products of a token, 16 rows, torch.float32", {}, whole_step(args.quick))
    if args.json is not None:
        harness.write(rows, args.json)
    if missed:
        print("bars MISSED:\n  " + "\n  ".join(missed), file=sys.stderr)
        raise SystemExit(1)
    print("\nours are within the bars: " + ", ".join(f"{k} <= {v:g}" for k, v in BARS.items()))


def stopwatch(work: Callable[[], Any], device: str) -> Callable[[], Values]:
    if device != "cpu":
        return harness.timed(work, device)

    def run() -> Values:
        started = time.process_time()
        work()
        return {"time": time.process_time() - started}

    return run


def products(M: int, k: int, n: int) -> dict[str, Callable[[], Any]]:
    """With weights that are too many for a cache, as those of a model are."""
    x = torch.randn(M, k)
    weights = [torch.randn(n, k) for _ in range(max(2**25 // (k * n), 1))]
    return {
        harness.OURS: lambda: [product(x, weight) for weight in weights],
        "torch": lambda: [linear(x, weight) for weight in weights],
    }


def whole_step(quick: bool) -> dict[str, Callable[[], Any]]:
    layer = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    shapes = layer * (1 if quick else 30) + [(576, 2048 if quick else 49152)]
    weights = [torch.randn(n, k) for k, n in shapes]

    def with_rows(M: int) -> Callable[[], None]:
        inputs = {k: torch.randn(M, k) for k in (576, 1536)}

        def run() -> None:
            for weight in weights:
                product(inputs[weight.shape[1]], weight)

        return run

    others = {f"{M} rows": with_rows(M) for M in (1, 4, 8, 32, 64)}
    return {harness.OURS: with_rows(16), **others}


def over(case: str, errors: dict[str, Values], metric: str, bar: float) -> list[str]:
    found = errors[harness.OURS][metric]
    # Not ">": NaN has to fail.
    return [] if found <= bar else [f"{case}: {metric} {found:.1e}, the bar is {bar:g}"]


def head(
    data: str, M: int, H: int, V: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = heads.random_head(M, H, V, generator)
    weight = weight.to(dtype).float()
    if data == "peaked":
        logits = heads.peaked_logits(M, generator)
        hidden, _ = heads.boosted(hidden, weight, logits, generator)
    return hidden.to(dtype), weight.to(dtype)


def draw(hidden: Tensor, weight: Tensor) -> tuple[dict[str, Values], dict[str, Callable[[], Any]]]:
    M, V = len(hidden), len(weight)
    seeds = torch.arange(M, device=hidden.device)
    positions = 3 + seeds
    exact = hidden.double() @ weight.double().T
    logps = exact.log_softmax(-1)
    noise = gumbel_tile(seeds, positions, 0, V, torch.float64)
    drawn = (exact + noise).argmax(-1)

    def ours() -> tuple[Tensor, Tensor]:
        return linear_sample(hidden, weight, seeds, positions)

    def plain() -> tuple[Tensor, Tensor]:
        logp = linear(hidden, weight).log_softmax(-1, dtype=torch.float32)
        token = torch.multinomial(logp.exp(), 1)
        return token[:, 0], logp.gather(1, token)[:, 0]

    def errors(work: Callable[[], tuple[Tensor, Tensor]]) -> Values:
        token, logp = work()
        off = (logp.double() - logps.gather(1, token[:, None])[:, 0]).abs()
        return {"logp_max": off.max().item(), "logp_mean": off.mean().item()}

    same = (ours()[0] == drawn).double().mean().item()
    return (
        {harness.OURS: errors(ours) | {"same_token": same}, "torch": errors(plain)},
        {harness.OURS: ours, "torch": plain, "the product": lambda: linear(hidden, weight)},
    )


class Cache:
    """Keys and values of ``groups`` prompts of P tokens and G completions each, of 1 to ``most``
    tokens: in pages, and padded as ``[rows, heads, longest, d]``. SmolLM2-135M's heads."""

    heads, kv_heads, d = 9, 3, 64

    def __init__(self, groups: int, G: int, P: int, own: Tensor, dtype: torch.dtype, device: str):
        self.groups, self.G, self.P, self.own = groups, G, P, own
        g = torch.Generator().manual_seed(1)
        rows = groups * G
        longest = P + int(own.max())
        self.query = torch.randn(rows, self.heads, self.d, generator=g).to(device, dtype)
        padded = torch.randn(2, rows, longest, self.kv_heads, self.d, generator=g)
        for i in range(rows):  # a group has one prompt
            padded[:, i, :P] = padded[:, i // G * G, :P]
        self.mask = torch.arange(longest) < (P + own)[:, None]
        lengths = [P] * groups + own.tolist()
        needed = [-(-n // PAGE) for n in lengths]
        self.pages = torch.zeros(2, sum(needed), PAGE, self.kv_heads, self.d)
        tables, first = [], 0
        for i, (n, count) in enumerate(zip(lengths, needed, strict=True)):
            row, lo = (i * G, 0) if i < groups else (i - groups, P)
            flat = self.pages[:, first : first + count].view(2, -1, self.kv_heads, self.d)
            flat[:, :n] = padded[:, row, lo : lo + n]
            tables.append(list(range(first, first + count)))
            first += count
        self.pages = self.pages.to(device, dtype)
        self.keys, self.values = padded.transpose(2, 3).to(device, dtype)
        self.mask = self.mask.to(device)[:, None, None]
        wide = max(map(len, tables))
        table = torch.tensor([row + [0] * (wide - len(row)) for row in tables]).int().to(device)
        self.tables = (
            table[:groups], torch.full((groups,), P).int().to(device),
            (torch.arange(groups + 1) * G).int().to(device), table[groups:], own.int().to(device),
        )  # fmt: skip

    @classmethod
    def random(cls, groups: int, G: int, P: int, most: int, args: Any, dtype: torch.dtype) -> Cache:
        own = torch.randint(1, most + 1, (groups * G,), generator=torch.Generator().manual_seed(0))
        return cls(groups, G, P, own, dtype, args.device)

    def describe(self) -> str:
        return (
            f"{self.groups} prompts of {self.P} x {self.G} of {int(self.own.min())} to "
            f"{int(self.own.max())} tokens, {self.heads} heads over {self.kv_heads}, d={self.d}"
        )


def attend(cache: Cache) -> tuple[dict[str, Values], dict[str, Callable[[], Any]]]:
    def ours() -> Tensor:
        return decode_attention(cache.query, *cache.pages, *cache.tables)

    def plain(dtype: torch.dtype | None = None) -> Tensor:
        query, keys, values = (x.to(dtype) for x in (cache.query, cache.keys, cache.values))
        found: Tensor = scaled_dot_product_attention(
            query[:, :, None], keys, values, attn_mask=cache.mask, enable_gqa=True
        )
        return found[:, :, 0]

    exact = plain(torch.float64)

    def errors(found: Tensor, size: int) -> Values:
        off = (found.double() - exact).flatten(1)
        of_row = off.norm(dim=1) / exact.flatten(1).norm(dim=1)
        whole = off.norm() / exact.norm()
        return {"error": whole.item(), "worst_row": of_row.max().item(), "bytes": size}

    padded = cache.keys.nbytes + cache.values.nbytes
    return (
        {harness.OURS: errors(ours(), cache.pages.nbytes), "torch": errors(plain(), padded)},
        {harness.OURS: ours, "torch": plain},
    )


if __name__ == "__main__":
    main()
