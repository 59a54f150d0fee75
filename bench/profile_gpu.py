"""Where the time of decoding, scoring and updating goes on a GPU, kernel by kernel.

    python bench/profile_gpu.py --in-flight 8,64 --weights merged,adapter --json profile.jsonl

Random weights in the shapes of Qwen2.5-7B, in NF4 under bfloat16 autocast, LoRA on all linear
layers. Decoding: steps of all rows in the middle of their completions, as the sampler runs them
(recorded, the host a step behind) and each by itself; ``bound`` is the time that reading what a
step must read takes (the linear layers as they are kept, the head, keys and values), by
``--bandwidth`` in GB/s, over what it took. Update: forward and backward of one micro-batch of one
group with gradient checkpointing; scoring: its forward pass. FLOP are 2 for each weight and token
of a forward pass, twice as many for a backward pass through frozen weights, and once more what is
computed again. ``--top`` kernels are listed with their share of the GPU's time.

``--quick`` is a tiny model, on the CPU where there is no GPU, to see that it works.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import harness
import simulate
import step_models as models
import torch
from torch.profiler import ProfilerActivity, profile

from fusedgrpo import host
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.next_token import NextToken
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.models.kv_cache import pages_of
from fusedgrpo.models.packed_batch import PackedBatch
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.ragged_decode import Prompt, RaggedDecoder, Room, Row

UNITS = {"time": "ms", "tokens": "token/s", "bound": "", "speed": "TFLOP/s", "gpu": "ms",
         "launches": "kernel", "memory/peak": "byte"}  # fmt: skip
G = 8


def main() -> None:
    parser = harness.parser(__doc__, [])
    parser.add_argument("--in-flight", default="8,64", help="rows of a decoded step")
    parser.add_argument("--weights", default="merged,adapter")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=24, help="decoded tokens that are timed")
    parser.add_argument("--bandwidth", type=float, default=3350.0)
    parser.add_argument("--top", type=int, default=14)
    parser.add_argument("--skip", default="", help="of decode, update; by commas")
    args = parser.parse_args()
    device = "cuda" if host.has_gpu() else "cpu"
    if args.quick:
        args.prompt, args.completion, args.steps, args.in_flight = 20, 12, 3, "4,8"
    policy = load(args, device)
    rows: list[dict[str, Any]] = []
    if "update" not in args.skip:
        rows += update(policy, args)
    if "decode" not in args.skip:
        for weights in args.weights.split(","):
            sampler = DecoderSampler(policy, simulate.NoText(), [-1], rollout_weights=weights)
            for in_flight in map(int, args.in_flight.split(",")):
                rows += decode(policy, sampler, weights, in_flight, args)
            del sampler
            free()
    if args.json is not None:
        harness.write(rows, args.json)


def load(args: Any, device: str) -> Policy:
    from peft import LoraConfig, get_peft_model

    name = models.RANDOM_TINY if args.quick else models.RANDOM_7B
    model = models.in_four_bits(models.random_qwen(name, device))
    settings = LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    free()
    return Policy(model, compute_dtype=torch.bfloat16)


def free() -> None:
    gc.collect()
    if host.has_gpu():
        torch.cuda.empty_cache()


def decode(
    policy: Policy, sampler: DecoderSampler, weights: str, rows: int, args: Any
) -> list[dict[str, Any]]:
    """Steps of ``rows`` sequences, recorded and by themselves."""
    config = policy.causal_lm.config
    prompts = -(-rows // G)
    pages = prompts * pages_of(args.prompt) + rows * pages_of(args.completion)
    room = Room(pages, rows, args.completion, args.prompt)
    choose = NextToken(policy, SamplingParams(max_new_tokens=args.completion))
    samples: harness.Samples = {}
    heaviest: dict[str, list[str]] = {}
    on_gpu = policy.device.type == "cuda"
    for name, with_graphs in (("recorded", True), ("by itself", False)):
        if with_graphs and not on_gpu:
            continue
        graphs = sampler.how.graphs() if with_graphs and sampler.how.graphs else None
        with torch.no_grad(), policy.scoring(), policy.autocast(), sampler.how.weights():
            decoder = RaggedDecoder(policy, room, choose, graphs)
            read = [
                Prompt([7] * args.prompt, decoder.cache.take(pages_of(args.prompt)))
                for _ in range(prompts)
            ]
            decoder.read(read)
            live = [Row(read[i // G], i, seed=i) for i in range(rows)]
            decoder.first(live)
            for row in live:
                decoder.lengthen(row, max(args.completion - args.steps - 12, 1))
            for _ in range(3):
                decoder.next(live)
            synchronize(policy)
            samples[name] = {}
            for _ in range(3):
                started = time.perf_counter()
                for _ in range(max(args.steps // 3, 1)):
                    last = decoder.next(live)
                last.read()
                taken = (time.perf_counter() - started) / max(args.steps // 3, 1)
                samples[name].setdefault("time", []).append(1e3 * taken)
            if on_gpu:
                figures, heaviest[name] = profiled(lambda d=decoder, r=live: d.next(r), args.top)
                samples[name] |= figures
        del decoder
        free()
    kv = config.num_hidden_layers * config.num_key_value_heads * 2 * 2
    kv *= getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    read_bytes = models.weights_read(policy, merged=weights == "merged") + kv * (
        prompts * args.prompt + rows * (args.completion - 20)
    )
    for found in samples.values():
        found["tokens"] = [rows / t * 1e3 for t in found["time"]]
        found["bound"] = [1e3 * read_bytes / args.bandwidth / 1e9 / t for t in found["time"]]
    case = f"decode, {weights}, {rows} in flight after {args.prompt} + {args.completion}"
    return said(case, policy, args, samples, heaviest)


def update(policy: Policy, args: Any) -> list[dict[str, Any]]:
    learner = models.learner_of(policy, tokens=1_000_000)
    vocabulary = policy.vocabulary_size
    prompt = torch.randint(3, vocabulary, (args.prompt,)).tolist()
    samples = [
        TrainingSample(
            tuple(prompt), tuple(torch.randint(3, vocabulary, (args.completion,)).tolist()),
            (-1.0) ** i,
        )
        for i in range(G)
    ]  # fmt: skip
    tokens = args.prompt + G * args.completion
    weights = sum(
        state.shape.numel() if (state := getattr(p, "quant_state", None)) else p.numel()
        for n, p in policy.causal_lm.get_decoder().named_parameters()
        if "embed" not in n
    )
    head = policy.head.weight.numel() * G * args.completion
    flop = {
        "update": 2.0 * (3 * tokens * weights + 3 * head),  # forward, again, backward
        "scoring": 2.0 * (tokens * weights + head),
    }
    pairs = [(s.prompt_ids, s.completion_ids) for s in samples]

    def score() -> None:
        with policy.scoring():
            packed = PackedBatch.build(pairs, policy.device, policy.layout)
            policy.logprobs(packed)

    policy.model.train()
    found: harness.Samples = {}
    heaviest = {}
    works: dict[str, Callable[[], Any]] = {
        "update": lambda: learner._accumulate(samples, 0), "scoring": score,
    }  # fmt: skip
    for name, work in works.items():
        work()
        work()
        synchronize(policy)
        if policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(2 if args.quick else 5):
            started = time.perf_counter()
            work()
            synchronize(policy)
            times.append(1e3 * (time.perf_counter() - started))
        found[name] = {"time": times, "speed": [flop[name] / t / 1e9 for t in times]}
        found[name]["tokens"] = [tokens / t * 1e3 for t in times]
        if policy.device.type == "cuda":
            found[name]["memory/peak"] = [torch.cuda.max_memory_allocated()]
            figures, heaviest[name] = profiled(work, args.top)
            found[name] |= figures
    case = f"{G} completions of {args.completion} after {args.prompt} tokens"
    return said(case, policy, args, found, heaviest)


def synchronize(policy: Policy) -> None:
    if policy.device.type == "cuda":
        torch.cuda.synchronize()


def profiled(work: Callable[[], Any], top: int) -> tuple[dict[str, list[float]], list[str]]:
    """Time that the GPU was busy and kernels that ran, in one call; the heaviest of them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.device_time / 1e3
            count[event.name] += 1
    total = sum(spent.values())
    lines = [
        f"    {t / total:6.1%} {t:9.3f} ms {count[name]:6d} x  {name[:110]}"
        for name, t in sorted(spent.items(), key=lambda item: -item[1])[:top]
    ]
    return {"gpu": [total], "launches": [float(sum(count.values()))]}, lines


def said(
    case: str, policy: Policy, args: Any, samples: harness.Samples, heaviest: dict[str, list[str]]
) -> list[dict[str, Any]]:
    name = models.RANDOM_TINY if args.quick else models.RANDOM_7B
    case = f"{case}, {name}, NF4, bfloat16, LoRA r={args.rank}, {policy.device.type}"
    rows = harness.report("profile", case, samples, UNITS)
    for impl, lines in heaviest.items():
        print(f"  {impl}, by kernel:")
        print("\n".join(lines), flush=True)
    return rows


if __name__ == "__main__":
    main()
