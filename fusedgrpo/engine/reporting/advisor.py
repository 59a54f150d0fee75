"""Advice for a run that looks, or is, wrong, in plain words, with the steps that it is about.

Pure: rows of metrics in, sentences out. The display shows them while the run goes, the report
gathers them again from ``metrics.jsonl``.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusedgrpo.engine.reporting.judging import health
from fusedgrpo.engine.reporting.judging.evidence import Evidence
from fusedgrpo.engine.reporting.judging.verdict import components
from fusedgrpo.engine.reporting.metrics_log import (
    Row,
    finite,
    rollout_rows,
    steps_in_words,
    trend,
)

FEW_STEPS = 3  # in a row, before truncation is worth a word
EQUAL_STEPS = 5  # in a row without any signal
FLAT_STEPS = 50  # rollouts after which a reward should have moved
# Of the signs of illness that the verdict knows, those that no rule here says sooner; asked for
# again when there is a twentieth more to look at, half of what they call the end of a run.
SIGNS = {"entropy", "length", "kl", "clipping", "mismatch", "component"}
ANEW = 0.05
_SIGN_KEYS = re.compile(
    r"step|reward|rewards/.*/mean|time/sample|entropy|kl|completions/mean_length"
    r"|clip_ratio/region_mean|sampling/sampling_logp_difference/mean"
)
# What a verdict says of the end of a run, by the rule here that says the same.
IN_VERDICT = {
    "clipped": {"truncated"},
    "equal": {"too_easy", "too_hard", "silent"},
    "silent": {"too_easy", "too_hard", "silent"},
    "skipped": {"skipped"},
    "learning_rate": {"learning_rate"},
} | {key: {key} for key in SIGNS}
OVER_AFTER = 5  # steps in a row without it, until what was said is over and may be said again


@dataclass(slots=True)
class Note:
    """One piece of advice. first, last: the steps it is about, None for none; as long as it goes
    on, ``last`` and ``text`` are those of now. key: the rule."""

    text: str
    first: int | None = None
    last: int | None = None
    key: str = ""

    @property
    def dated(self) -> str:
        """The text, its steps before it."""
        if self.first is None or self.last is None:
            return self.text
        return f"{steps_in_words(range(self.first, self.last + 1))}: {self.text}"


class Advisor:
    """Watches one run.

    config: the run's configuration as a mapping (``GRPOConfig.to_dict()``).
    eos_token_ids: the ids that end a completion, where they are known.
    """

    def __init__(self, config: Mapping[str, Any], *, eos_token_ids: Sequence[int] = ()):
        self.config = config
        self.eos_token_ids = list(eos_token_ids)
        self.ended: list[Note] = []  # by the last row: said before, and over now
        self._current: dict[str, Note] = {}
        self._said: set[str] = set()
        self._recent: deque[Row] = deque(maxlen=EQUAL_STEPS)
        self._rewards: list[float] = []
        self._sampled: list[int] = []  # the steps of these
        self._silent: deque[tuple[int, float]] = deque(maxlen=2 * EQUAL_STEPS)
        self._rows: list[Row] = []  # as much of all of them as signs are read from
        self._signs: dict[str, tuple[str, int]] = {}
        self._ask_at = 0

    @property
    def current(self) -> list[Note]:
        """Notes that were said and are still so."""
        return list(self._current.values())

    def start(self) -> list[Note]:
        """Advice on the configuration alone, before the first step."""
        found = {"learning_rate": self._low_learning_rate(), "eos": self._several_eos()}
        return [Note(text, key=key) for key, text in found.items() if text]

    def observe(self, row: Row) -> list[Note]:
        """Notes that are new with the row of a finished step."""
        self._recent.append(row)
        if rollout_rows([row]):
            self._rewards.append(row["reward"])
            self._sampled.append(row["step"])
            silent = finite(row.get("frac_reward_zero_std"))
            # Where others take the place of such groups they are no loss of the step's.
            if silent is not None and "dynamic_sampling/groups" not in row:
                self._silent.append((row["step"], silent))
        step, begun = row["step"], []
        explained = {"loss": (self._loss_near_zero(row), step), "flat": self._flat_reward()}
        for key, (text, first) in explained.items():
            if text and key not in self._said:  # told once, it stays true
                self._said.add(key)
                begun.append(Note(text, first, step, key))
        conditions: dict[str, tuple[str | None, int]] = dict.fromkeys(SIGNS, (None, 0))
        conditions |= self._signs_with(row)
        conditions |= {
            "clipped": (self._truncation(), self._steps_ago(FEW_STEPS)),
            "equal": (self._all_equal(), self._steps_ago(EQUAL_STEPS)),
            "silent": (self._few_groups_with_signal(), self._silent[0][0] if self._silent else 0),
            "skipped": (self._skipped_update(row), step),
        }
        self.ended = []
        for key, (text, first) in conditions.items():
            known = self._current.get(key)
            if text and known is not None:
                known.text, known.last = text, step
            elif text:
                begun.append(Note(text, first, step, key))
                self._current[key] = begun[-1]
            elif known is not None and step - (known.last or 0) >= OVER_AFTER:
                self.ended.append(self._current.pop(key))
        return begun

    def _signs_with(self, row: Row) -> dict[str, tuple[str, int]]:
        """By key the signs that all rows together show, and the steps they begin with."""
        self._rows.append({key: row[key] for key in row if _SIGN_KEYS.fullmatch(key)})
        if len(self._rows) >= self._ask_at:
            evidence = Evidence(self._rows, self.config)
            self._signs = {}
            for sign in (*health.findings(evidence), *components(evidence)):
                said = sign.key in SIGNS and sign.level != "note"
                if said and sign.steps is not None:
                    before = self._signs[sign.key][0] + " " if sign.key in self._signs else ""
                    text = f"{before}{sign.text} {sign.advice}".strip()
                    self._signs[sign.key] = text, sign.steps[0]
            self._ask_at = len(self._rows) + max(1, int(ANEW * len(self._rows)))
        return self._signs

    def _steps_ago(self, steps: int) -> int:
        """The step of the row so many rows back, this one included."""
        return int(list(self._recent)[-steps:][0]["step"])

    def _mean(self, key: str, steps: int) -> float | None:
        """Mean of ``key`` over the last ``steps`` rows; None if one of them lacks it."""
        values = [finite(row.get(key)) for row in list(self._recent)[-steps:]]
        numbers = [value for value in values if value is not None]
        return sum(numbers) / steps if len(numbers) == steps else None

    def _low_learning_rate(self) -> str | None:
        rate = finite(self.config.get("learning_rate"))
        if self.config.get("finetuning_type") != "lora" or not rate or rate >= health.LOW_RATE:
            return None
        return (
            f"learning_rate {rate:g} is far too small for LoRA and the reward will hardly move: "
            "that is a value for full fine-tuning, adapters want about 1e-5 to 3e-4."
        )

    def _several_eos(self) -> str | None:
        count = len(self.eos_token_ids)
        if count < 2:
            return None
        ids = ", ".join(map(str, self.eos_token_ids))
        return f"The model has {count} end-of-sequence ids ({ids}); each of them ends a completion."

    def _loss_near_zero(self, row: Row) -> str | None:
        loss, grad_norm = finite(row.get("loss")), finite(row.get("grad_norm"))
        if loss is None or not grad_norm or abs(loss) >= 0.01:
            return None
        return (
            "A loss near 0 is by design: the advantages of a group add up to 0 and the policy has "
            "hardly left the one that sampled. Watch reward and grad_norm instead."
        )

    def _truncation(self) -> str | None:
        clipped = self._mean("completions/clipped_ratio", FEW_STEPS)
        if clipped is None or clipped <= 0.5:
            return None
        limit = self.config.get("max_completion_length")
        text = f"{clipped:.0%} of the completions hit max_completion_length={limit} and are cut off"
        if self._mean("reward", FEW_STEPS) == 0 and not self._mean("reward_std", FEW_STEPS):
            text += ", and every reward is 0"
        text += ": raise max_completion_length or ask for shorter answers."
        if clipped == 1:
            ids = ", ".join(map(str, self.eos_token_ids))
            text += (
                f" Not one ended by itself{f' (end-of-sequence ids: {ids})' if ids else ''}: "
                "is this a chat model, and is its chat template applied?"
            )
        return text

    def _all_equal(self) -> str | None:
        if self._mean("frac_reward_zero_std", EQUAL_STEPS) != 1:
            return None
        reward = self._mean("reward", EQUAL_STEPS)
        text = (
            "In every group all rewards were equal"
            f"{'' if reward is None else f' (mean reward {reward:g})'}, so nothing was learned: "
        )
        if reward == 0:
            return text + "check that a right answer does get a reward, and see completions/."
        return text + "the prompts are all solved or all out of reach, or the reward is too coarse."

    def _few_groups_with_signal(self) -> str | None:
        shares = [share for _, share in self._silent]
        if len(shares) < 2 * EQUAL_STEPS or not 0.8 <= (share := sum(shares) / len(shares)) < 1:
            return None
        return (
            f"In {share:.0%} of the groups all completions got the same reward and teach nothing: "
            "prompts nearer to what the model can half do, a finer reward or a larger "
            "num_generations give more signal per second."
        )

    def _flat_reward(self) -> tuple[str | None, int]:
        if len(self._rewards) != FLAT_STEPS:
            return None, 0
        ends = trend(self._rewards)
        if ends is None or ends.rose:
            return None, 0
        text = (
            f"After {FLAT_STEPS} rollouts the reward has not risen ({ends.first:.3g} to "
            f"{ends.last:.3g}, noise {ends.noise:.2g})."
        )
        rate = finite(self.config.get("learning_rate"))
        if self.config.get("finetuning_type") == "lora" and rate and rate < 1e-5:
            text += f" learning_rate {rate:g} is low for LoRA; try 1e-5 to 3e-4."
        if self._silent:
            silent = sum(share for _, share in self._silent) / len(self._silent)
            text += f" Groups without signal: {silent:.0%}."
        return text, self._sampled[0]

    def _skipped_update(self, row: Row) -> str | None:
        if not row.get("skipped_update"):
            return None
        return "The update was skipped, its gradient was not finite; the weights were not touched."


def all_advice(
    rows: Sequence[Row], config: Mapping[str, Any], verdict_keys: Iterable[str] = ()
) -> list[str]:
    """Everything an :class:`Advisor` says over a whole run, with the steps of each, but for what
    held to its end, or of it all, and is in a verdict with findings of these keys."""
    advisor, known = Advisor(config), set(verdict_keys)
    said = [*advisor.start(), *(note for row in rows for note in advisor.observe(row))]
    still = {id(note) for note in advisor.current}
    return [
        note.dated  # by now it is known how long each went on
        for note in said
        if not (note.first is None or id(note) in still)
        or not IN_VERDICT.get(note.key, set()) & known
    ]
