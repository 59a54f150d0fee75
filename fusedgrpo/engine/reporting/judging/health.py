"""Signs that a run is ill, whatever its reward does: each a rule with its evidence.

The limits and where they come from are in docs/reading-a-run.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean

from fusedgrpo.engine.reporting.formatting import number
from fusedgrpo.engine.reporting.judging.evidence import RECENT, Evidence
from fusedgrpo.engine.reporting.judging.findings import Finding
from fusedgrpo.engine.reporting.metrics_log import finite, series

ENTROPY = (0.05, 0.1)  # nats a token, and share of the beginning: collapsed below both
LENGTH = (0.1, 2.0, 8.0)  # share of the beginning; or so many tokens where there were so many
KL = (1.0, 5.0)  # nats a token: far, and out of hand
TRUNCATED = (0.5, 0.95)
SILENT = 0.9  # share of completions in groups whose rewards are all equal
KEPT = 0.5  # of the groups that dynamic sampling is to find for a step
SKIPPED = 0.1  # share of updates
CLIPPED = 0.3  # share of tokens whose ratio is clipped
SOLVED = 0.9  # of 1, of each reward
LOW_RATE = 5e-6  # of an adapter


def findings(evidence: Evidence) -> list[Finding]:
    """All signs, in the order of RULES."""
    return [finding for rule in RULES for finding in rule(evidence)]


def updates(evidence: Evidence) -> Iterator[Finding]:
    """Gradients that were not finite, or are none."""
    rows = evidence.updates
    skipped = [row["step"] for row in rows if row.get("skipped_update")]
    if skipped:
        share = len(skipped) / len(rows)
        text = f"{len(skipped)} of {len(rows)} updates were skipped: their gradient was not finite."
        streak = all(row.get("skipped_update") for row in rows[-RECENT:])
        level = (
            "bad" if streak and len(rows) >= RECENT else "warning" if share > SKIPPED else "note"
        )
        rate = evidence.option("learning_rate")
        yield Finding(
            "skipped",
            level,  # type: ignore[arg-type]
            text,
            (skipped[0], skipped[-1]),
            "Lower learning_rate, or set bf16: false to see whether the precision is to blame; "
            "nonfinite/ has the batches."
            if level != "note"
            else "",
            {"learning_rate": rate / 3} if level != "note" and rate else {},
        )
    norms = series(rows, "grad_norm")[1]
    if len(norms) >= 2 * RECENT and sum(norm == 0 for norm in norms) > 0.9 * len(norms):
        yield Finding(
            "no_gradient",
            "warning",
            f"{sum(norm == 0 for norm in norms)} of {len(norms)} updates had no gradient at all.",
            (rows[0]["step"], rows[-1]["step"]),
        )


def collapse_of_entropy(evidence: Evidence) -> Iterator[Finding]:
    change, last = evidence.training("entropy"), evidence.at_the_end("entropy")
    if change is None or last is None or change.first <= 0:
        return
    if last < ENTROPY[0] and last < ENTROPY[1] * change.first:
        coefficient = evidence.option("entropy_coef") or 0.0
        yield Finding(
            "entropy",
            "warning",
            f"The entropy collapsed from {number(change.first)} to {number(last)} nats a token: "
            "the completions of a group are all but the same, and nothing new is tried.",
            evidence.last_steps,
            "A higher epsilon_high, an entropy bonus or a lower learning_rate keeps it up.",
            {"epsilon_high": 0.28} if coefficient else {"entropy_coef": 0.001},
        )


def collapse_of_length(evidence: Evidence) -> Iterator[Finding]:
    change = evidence.training("completions/mean_length")
    last = evidence.at_the_end("completions/mean_length")
    if change is None or last is None:
        return
    share, few, many = LENGTH
    if last < share * change.first or (last <= few and change.first >= many):
        yield Finding(
            "length",
            "bad",
            f"The completions shrank from {change.first:.0f} to {last:.1f} tokens.",
            evidence.last_steps,
            "Look at completions/: a reward that an empty answer gets is being farmed. A larger "
            "beta or a lower learning_rate holds the policy.",
            _held_back(evidence),
        )


def divergence(evidence: Evidence) -> Iterator[Finding]:
    found = _distance(evidence)
    if found is None or found[0] <= KL[0]:
        return
    last, steps, how = found
    yield Finding(
        "kl",
        "bad" if last > KL[1] else "warning",
        f"The policy is {number(last)} nats a token away from the model it began as{how}: what "
        "that could do may be lost.",
        steps,
        "A larger beta or a lower learning_rate holds it.",
        _held_back(evidence),
    )


def _held_back(evidence: Evidence) -> dict[str, float]:
    """Options with which a policy stays nearer to what it was."""
    beta, rate = evidence.option("beta") or 0.0, evidence.option("learning_rate")
    return {"beta": max(2 * beta, 0.01)} | ({"learning_rate": rate / 3} if rate else {})


def _distance(evidence: Evidence) -> tuple[float, tuple[int, int], str] | None:
    """KL at the end, the steps that it is of, and a word on how it was measured. Where it was
    measured now and then alone, the last time counts, wherever that was: the end of the run may
    have none, nor the step that sampled."""
    steps, values = series(evidence.updates, "kl")
    if values and 2 * len(values) <= len(evidence.updates):
        return values[-1], (steps[-1], steps[-1]), ", by a few completions"
    last = evidence.at_the_end("kl")
    return None if last is None else (last, evidence.last_steps, "")


def truncation(evidence: Evidence) -> Iterator[Finding]:
    last = evidence.at_the_end("completions/clipped_ratio")
    if last is None or last <= TRUNCATED[0]:
        return
    limit = evidence.option("max_completion_length")
    limits = "" if limit is None else f" at max_completion_length={limit:.0f}"
    yield Finding(
        "truncated",
        "warning",
        f"{last:.0%} of the completions are cut off{limits}.",
        evidence.last_steps,
        "Raise max_completion_length, or ask for shorter answers in the prompt.",
        {} if limit is None else {"max_completion_length": round(2 * limit)},
    )


def silence(evidence: Evidence) -> Iterator[Finding]:
    """Groups without signal: all solved, or all out of reach."""
    last = evidence.at_the_end("frac_reward_zero_std")
    kept = evidence.at_the_end("dynamic_sampling/groups_kept")
    if kept is not None and last is not None and last < 1:
        yield from _too_few_kept(evidence, kept)
        return
    if last is None or last < SILENT:
        return
    begins = evidence.values("frac_reward_zero_std")[: len(evidence.rollouts) // 5 or 1]
    always = fmean(begins) >= SILENT
    level = evidence.at_the_end("reward") or 0.0
    # Known to be solved, known not to be, or None: a reward on a scale of its own.
    solved = evidence.at_their_tops(SOLVED) if level > 0 else False
    text = f"In {last:.0%} of the groups all completions get the same reward and teach nothing"
    if not always:
        # What remains of a task that was learned, which is no fault.
        yield Finding(
            "silent",
            "note",
            f"{text}, at the end.",
            evidence.last_steps,
            "Harder prompts would go on teaching."
            if solved
            else "Prompts that the model can half do would go on teaching; see completions/ for "
            "what the others get.",
        )
        return
    if solved is None:
        yield Finding(
            "silent",
            "warning",
            f"{text}, from the beginning: the prompts are all solved, all out of reach, or the "
            "reward is too coarse.",
            (evidence.rollouts[0]["step"], evidence.rollouts[-1]["step"]),
            "See completions/ for which it is; take prompts that the model can half do.",
        )
        return
    yield Finding(
        "too_easy" if solved else "too_hard",
        "warning" if solved else "bad",
        f"{text}, from the beginning: "
        + ("the prompts are solved already." if solved else "no completion gets more than others."),
        (evidence.rollouts[0]["step"], evidence.rollouts[-1]["step"]),
        "Take harder prompts; among these, ask more often for those whose answers still differ."
        if solved
        else "Take prompts that the model can half do, or a reward that gives parts of an answer "
        "their due; check that a right answer does get a reward.",
        {"prompt_selection": "informative"}
        if solved
        else {"num_generations": 2 * round(evidence.option("num_generations") or 8)},
    )


def _too_few_kept(evidence: Evidence, kept: float) -> Iterator[Finding]:
    """With dynamic sampling groups without signal cost time; too few with it cost the step."""
    tried = evidence.at_the_end("dynamic_sampling/groups") or kept
    wanted = tried / (evidence.at_the_end("dynamic_sampling/rounds") or 1)
    if kept < KEPT * wanted:
        yield Finding(
            "silent",
            "warning",
            f"A step has {number(kept)} of the {number(wanted)} groups that it should have, though "
            f"{number(tried)} prompts were tried for it: in the others all completions get the "
            "same reward.",
            evidence.last_steps,
            "Take prompts that the model can half do, or let it try more (max_sampling_rounds).",
        )


def clipping(evidence: Evidence) -> Iterator[Finding]:
    last = evidence.at_the_end("clip_ratio/region_mean")
    if last is not None and last > CLIPPED:
        rate = evidence.option("learning_rate")
        yield Finding(
            "clipping",
            "warning",
            f"{last:.0%} of the tokens are clipped: the policy moves further than epsilon within "
            "one rollout.",
            evidence.last_steps,
            "Lower learning_rate or num_iterations.",
            {"learning_rate": rate / 3} if rate else {},
        )


def low_rate(evidence: Evidence) -> Iterator[Finding]:
    rate, change = evidence.option("learning_rate"), evidence.sum
    if evidence.config.get("finetuning_type") != "lora" or not rate or rate >= LOW_RATE:
        return
    if change is not None and not change.rose:
        yield Finding(
            "learning_rate",
            "note",
            f"learning_rate {rate:g} is one for all weights; an adapter hardly moves with it.",
            None,
            "Adapters want about 1e-5, small models more.",
            {"learning_rate": 1e-5},
        )


def sampler(evidence: Evidence) -> Iterator[Finding]:
    """Sampled by other numbers than trained by."""
    key = "sampling/sampling_logp_difference/mean"
    values = [v for row in evidence.rollouts if (v := finite(row.get(key))) is not None]
    if values and fmean(values[-RECENT:]) > 0.1:
        yield Finding(
            "mismatch",
            "warning",
            f"Sampled and trained log-probs differ by {number(fmean(values[-RECENT:]))} nats a "
            "token in the mean: the updates are off-policy.",
            evidence.last_steps,
            "Weigh tokens by how far the two are apart.",
            {"sampler_correction": True},
        )


RULES: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    updates, collapse_of_length, collapse_of_entropy, divergence, truncation, silence, clipping,
    sampler, low_rate,
)  # fmt: skip
