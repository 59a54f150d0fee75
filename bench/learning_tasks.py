"""What bench_learning.py teaches: short plain prompts, a few tokens to answer, right or wrong.

A prompt is text without the chat template, an answered example before the question: processor time
is prompt and completion tokens, and a model of 135M parameters then answers with a number at all.
The first line of a completion is the answer, and it is right, 1, or wrong, 0. The questions of
reasoning-gym's tasks are its own, written shorter; each has one right answer.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch

MAX_TOKENS = 4
QUESTIONS, HELD_OUT = 16, 40


@dataclasses.dataclass(frozen=True)
class Part:
    """Questions of a task of reasoning-gym. prompt: with ``{}`` for what a question asks about."""

    task: str
    options: dict[str, Any]
    prompt: str


def digits(count: int) -> dict[str, int]:
    return dict.fromkeys(("min_digits", "max_digits"), count)


def chain_sum(count: int) -> Part:
    """Two numbers of so many digits, added or subtracted."""
    options = {"min_terms": 2, "max_terms": 2, **digits(count)}
    return Part("chain_sum", options, "12 + 25 = 37\n{}")


GCD = Part("gcd", {"max_value": 30}, "gcd(8, 12) = 4\ngcd({}) =")
GYM: dict[str, list[Part]] = {
    "gcd": [GCD],
    # What data looks like that nobody sorted: some questions that are soon solved, some within
    # reach, and as many beyond a model of this size.
    "mixed": [
        chain_sum(1),
        chain_sum(2),
        GCD,
        Part("lcm", {"max_value": 10}, "lcm(4, 6) = 12\nlcm({}) ="),
        Part("lcm", {"min_value": 20}, "lcm(4, 6) = 12\nlcm({}) ="),
        Part("products", digits(2), "3 * 12 = 36\n{} ="),
        chain_sum(4),
        Part("spell_backward", {"min_word_len": 5, "max_word_len": 8}, "sun -> nus\n{} ->"),
    ],
}
TASKS = ("two_digit_sums", *GYM)


def rows(task: str, held_out: bool) -> list[dict[str, str]]:
    """``prompt`` and ``answer`` of the questions to train on, or of others."""
    count = HELD_OUT if held_out else QUESTIONS
    if task not in GYM:
        return two_digit_sums()[QUESTIONS:] if held_out else two_digit_sums()[:QUESTIONS]
    parts = GYM[task]
    return [row for part in parts for row in asked(part, count // len(parts), held_out)]


def two_digit_sums() -> list[dict[str, str]]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return [
        {"prompt": f"12 + 25 = 37\n{a} + {b} =", "answer": str(a + b)}
        for a, b in random.Random(0).sample(pairs, QUESTIONS + HELD_OUT)
    ]


def asked(part: Part, count: int, held_out: bool) -> list[dict[str, str]]:
    from fusedgrpo.tasks import PREFIX, task_rows

    options = {"size": count, "held_out_size": count, part.task: part.options}
    found = task_rows(PREFIX + part.task, options, held_out=held_out, messages=False)
    # "Find the ... of these numbers: 4, 6. Give only ...": what stands between.
    about = [row["prompt"].rpartition(": ")[2].partition(". ")[0] for row in found]
    return [
        {"prompt": part.prompt.format(text), "answer": row["answer"]}
        for text, row in zip(about, found, strict=True)
    ]


def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for a right first line, else 0; for TRL and for us."""
    lines = [text.partition("\n")[0].strip() for text in completions]
    return [float(line == right) for line, right in zip(lines, answer, strict=True)]


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, task: str) -> tuple[float, float]:
    """Of the held-out questions, by one forward pass: the probability that an answer drawn as in
    training is right, and the share of which the most likely tokens are the right answer.

    Exact but for other ways to write the same answer in tokens, which the model does not take. A
    right answer ends with its line, with EOS, or at the limit of a completion.
    """
    held_out = rows(task, held_out=True)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in held_out]
    answers = [tokenizer(" " + row["answer"])["input_ids"] for row in held_out]
    whole = [p + a for p, a in zip(prompts, answers, strict=True)]
    width = max(map(len, whole))
    # To the left, so that the answers are at the end and only there is a head needed.
    ids = torch.tensor([[0] * (width - len(row)) + row for row in whole])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in whole])
    was_training = model.training
    model.eval()
    output = model(input_ids=ids, attention_mask=mask, logits_to_keep=max(map(len, answers)) + 1)
    model.train(was_training)
    ends = ends_a_line(tokenizer, output.logits.shape[-1])
    drawn, likely = 0.0, 0
    for row, a in zip(output.logits, answers, strict=True):
        if len(a) > MAX_TOKENS:
            continue
        logp = row[-len(a) - 1 :].float().log_softmax(-1)
        value = logp[:-1].gather(1, torch.tensor(a)[:, None]).sum().exp()
        best = logp.argmax(-1).tolist()
        right = best[:-1] == a
        if len(a) < MAX_TOKENS:
            value = value * logp[-1][ends].exp().sum()
            right = right and bool(ends[best[-1]])
        drawn += float(value)
        likely += right
    return drawn / len(held_out), likely / len(held_out)


def ends_a_line(tokenizer: Any, size: int) -> torch.Tensor:
    """``[size]`` bool: tokens after which a line is over; a model may have more or fewer of them
    than its tokenizer."""
    texts = tokenizer.batch_decode([[i] for i in range(min(size, len(tokenizer)))])
    ends = torch.zeros(size, dtype=torch.bool)
    ends[: len(texts)] = torch.tensor([text.startswith("\n") for text in texts])
    ends[tokenizer.eos_token_id] = True
    return ends
