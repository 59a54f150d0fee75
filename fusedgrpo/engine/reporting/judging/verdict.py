"""Whether a run learned: green, amber, red or too short to tell, with the reasons.

The evidence in order of its weight: held-out prompts against what they were before training, then
each reward by itself, then the sum of the rewards, then signs of illness. What weighs more is not
outvoted by what weighs less: a reward that rose in training says nothing where held-out prompts
got worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.formatting import number
from fusedgrpo.engine.reporting.held_out_log import GREEDY, Checks
from fusedgrpo.engine.reporting.judging import health
from fusedgrpo.engine.reporting.judging.changes import FEWEST, Change, is_share
from fusedgrpo.engine.reporting.judging.evidence import Evidence
from fusedgrpo.engine.reporting.judging.findings import Finding, in_words, when
from fusedgrpo.engine.reporting.metrics_log import Row

Kind = Literal["green", "amber", "red", "unclear"]

LOST = 0.5  # a reward that keeps less of what it was is lost, one that keeps more has fallen
SOLVED = 0.95  # of all prompts, before training
CEILING = 0.9  # of the greatest value of a reward: from there it has nowhere to rise to
# Findings of which a bad one is a loss, and not only that nothing was gained.
LOSSES = {"held_out", "held_out_component", "component", "sum", "length", "kl", "peak"}
# Signs that held-out prompts speak against: where these got better, the sign is a remark.
OUTWEIGHED = {"truncated", "entropy", "clipping", "mismatch", "kl", "silent", "too_easy"}


@dataclass(frozen=True)
class Verdict:
    """headline: the answer in a sentence. reasons: what it rests on, the weightiest first."""

    kind: Kind
    headline: str
    reasons: tuple[Finding, ...]

    @property
    def advice(self) -> tuple[Finding, ...]:
        """The reasons that something can be done about."""
        return tuple(reason for reason in self.reasons if reason.advice or reason.change)


def judge(
    rows: Sequence[Row],
    config: Mapping[str, Any] | None = None,
    checks: Checks | None = None,
    scores: Scores | None = None,
) -> Verdict:
    """The verdict on the run that wrote ``rows``; the arguments are those of ``Evidence``."""
    evidence = Evidence(rows, config or {}, checks or {}, scores)
    weighed = [
        *_held_out(evidence),
        *_held_out_components(evidence),
        *components(evidence),
        *_sum(evidence),
    ]
    better = any(f.key == "held_out" and f.level == "good" for f in weighed)
    for finding in health.findings(evidence):
        if better and finding.key in OUTWEIGHED and finding.level == "warning":
            finding = replace(finding, level="note")
        weighed.append(finding)
    order = {"bad": 0, "warning": 1, "good": 2, "note": 3}
    known = any(f.key in ("held_out", "sum") for f in weighed)
    reasons = tuple(sorted(weighed, key=lambda finding: order[finding.level]))
    levels = {finding.level for finding in reasons}
    if "bad" in levels:
        kind: Kind = "red"
    elif not known:
        kind = "unclear"
    elif "warning" in levels or "good" not in levels:
        kind = "amber"
    else:
        kind = "green"
    return Verdict(kind, _headline(kind, evidence, reasons), reasons)


def _headline(kind: Kind, evidence: Evidence, reasons: Sequence[Finding]) -> str:
    if kind == "unclear":
        return (
            f"Too short to tell: that takes held-out prompts that were evaluated before and after, "
            f"or {FEWEST} rollouts (there are {len(evidence.rollouts)})."
        )
    by_level = {level: [f for f in reasons if f.level == level] for level in ("bad", "good")}
    grew = bool(by_level["good"])
    if kind == "red":
        if any(f.key == "held_out" for f in by_level["good"]):
            return "Held-out prompts got better, but the run is not sound."
        return "The run got worse." if _lost(by_level["bad"]) else "The run did not work."
    if kind == "green":
        return "The run learned."
    return "The run learned, but:" if grew else "No clear sign that the run learned."


def _lost(bad: Sequence[Finding]) -> bool:
    return any(f.key in LOSSES for f in bad)


def _held_out(evidence: Evidence) -> Iterator[Finding]:
    changes = evidence.held_out
    risen = evidence.sum is not None and evidence.sum.rose
    for name, change in changes.items():
        others = any(other.rose for key, other in changes.items() if key != name)
        label = _label(name)
        since = "" if change.begins[1] == 0 else f" since {when(change.begins)}"
        text = f"{label}: mean reward {in_words(change)}{since}."
        if change.fell:
            level = "warning" if change.slight or others else "bad"
            yield Finding("held_out", level, text, change.ends, *_earlier(evidence, change))  # type: ignore[arg-type]
        elif change.rose:
            yield Finding("held_out", "good", text, change.ends)
        elif _solved_before(evidence, name, change):
            yield Finding("held_out", "note", f"{text} They were solved before.", change.ends)
        elif risen and not others:
            text += (
                " No change beyond noise, though the reward in training rose: what was learned "
                "holds for the prompts that were trained on, or is no skill."
            )
            yield Finding("held_out", "warning", text, change.ends)
        else:
            yield Finding("held_out", "note", f"{text} No change beyond noise.", change.ends)
        if change.fell_back and not change.fell:
            yield _peak(evidence, label, change)


def _solved_before(evidence: Evidence, name: str, change: Change) -> bool:
    """Whether each reward was all but 1 on a set from the beginning. A sum may be 1 by half of its
    parts, and of a reward on another scale nobody knows the greatest."""
    parts = evidence.held_out_parts(name).values() or [change]
    return all(is_share([one.first, one.best]) and one.first >= SOLVED for one in parts)


def _label(name: str) -> str:
    """A set of held-out prompts in words; ``GREEDY`` in its name says how they were answered."""
    greedy = name == GREEDY or name.endswith(f"_{GREEDY}")
    name = name.removesuffix(GREEDY).removesuffix("_") if greedy else name
    label = f"Held-out prompts ({name})" if name else "Held-out prompts"
    return f"{label}, most likely answers" if greedy else label


def _held_out_components(evidence: Evidence) -> Iterator[Finding]:
    if len(evidence.held_out_components) > len(evidence.held_out):
        yield from _each(evidence, evidence.held_out_components, "Held-out prompts: ", "held_out_")


def components(evidence: Evidence) -> Iterator[Finding]:
    """Rewards that fell while others rose, and rewards for form that rose alone."""
    return _of_chosen_prompts(evidence, _components(evidence))


def _of_chosen_prompts(evidence: Evidence, found: Iterator[Finding]) -> Iterator[Finding]:
    """Findings of training, of which a loss is a remark where it may be the choice of prompts."""
    for finding in found:
        if evidence.prompts_are_chosen and finding.level in ("bad", "warning"):
            text = f"{finding.text} The prompts of late steps are others (prompt_selection)."
            finding = replace(finding, level="note", text=text)
        yield finding


def _components(evidence: Evidence) -> Iterator[Finding]:
    changes = evidence.components
    if len(changes) < 2:
        return
    yield from _each(evidence, changes, "", "")
    rose = [name for name, change in changes.items() if change.rose]
    flat = [
        name
        for name, change in changes.items()
        if not change.rose
        and not change.fell
        and not evidence.is_style(name)
        and change.last < CEILING * _top(evidence.values(f"rewards/{name}/mean"))
    ]
    if rose and flat and all(evidence.is_style(name) for name in rose):
        yield Finding(
            "style_only",
            "warning",
            f"Only {_named(rose)} rose: {_named(flat)} did not.",
            next(iter(changes.values())).ends,
            f"Weigh {_named(flat)} more (reward_weights).",
        )


def _top(values: Sequence[float]) -> float:
    """The greatest value that a reward can have: 1 for what looks like a share of right answers."""
    return 1.0 if is_share(values) else max(values)


def _each(
    evidence: Evidence, changes: Mapping[str, Change], before: str, key: str
) -> Iterator[Finding]:
    for name, change in changes.items():
        if not change.fell:
            continue
        # Held-out prompts are the same ones at both ends, those in training may have got harder.
        better = not key and _better_held_out(evidence, name)
        lost = change.first > 0 and change.share_left < LOST and not better
        level = "bad" if lost else "note" if change.slight else "warning"
        rest = " and is lost" if lost and change.share_left < 0.1 else ""
        yield Finding(
            f"{key}component",
            level,  # type: ignore[arg-type]
            f"{before}{name} fell{rest}: {in_words(change)}.",
            change.ends,
            f"Look at completions/ of {when(change.ends)} for what is rewarded instead; weigh "
            f"{name} more, or make the others depend on it.",
        )


def _better_held_out(evidence: Evidence, reward: str) -> bool:
    sets = [evidence.held_out_parts(name) for name in evidence.held_out]
    changes = [parts[reward] for parts in sets if reward in parts]
    return any(one.rose for one in changes) and not any(one.fell for one in changes)


def _sum(evidence: Evidence) -> Iterator[Finding]:
    return _of_chosen_prompts(evidence, _training(evidence))


def _training(evidence: Evidence) -> Iterator[Finding]:
    change = evidence.sum
    if change is None:
        return
    steps = f"{when(change.begins)} against {when(change.ends)}"
    text = f"Reward in training: {in_words(change)}, {steps}."
    if change.rose:
        yield Finding("sum", "good", text, change.ends)
    elif change.fell:
        # Held-out prompts say more than prompts that differ from step to step.
        better = any(held.rose for held in evidence.held_out.values())
        level = "warning" if better or change.slight else "bad"
        yield Finding("sum", level, text, change.ends, *_earlier(evidence, change))  # type: ignore[arg-type]
    else:
        yield Finding("sum", "note", f"{text} No change beyond noise.", change.ends)
    if change.fell_back and not change.fell:
        yield _peak(evidence, "Reward in training", change)


def _peak(evidence: Evidence, label: str, change: Change) -> Finding:
    gained, kept = change.best - change.first, change.last - change.first
    return Finding(
        "peak",
        "bad" if not change.rose and kept < 0.25 * gained else "warning",
        f"{label}: {number(change.best)} at step {change.best_step} and "
        f"{number(change.last)} at the end.",
        (change.best_step, change.ends[1]),
        *_earlier(evidence, change),
    )


def _earlier(evidence: Evidence, change: Change) -> tuple[str, Mapping[str, Any]]:
    """Advice on a run that was better before: words, and options."""
    rate = evidence.option("learning_rate")
    words = "A lower learning_rate or a larger beta may keep it."
    if change.best > change.first and change.best_step > 0:
        words = (
            f"Take the checkpoint of about step {change.best_step} "
            f"(load_best_model_at_end does so by itself). {words}"
        )
    return words, {"learning_rate": rate / 3} if rate else {}


def _named(names: Sequence[str]) -> str:
    return " and ".join(names)
