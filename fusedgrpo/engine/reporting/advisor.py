"""Advice for a run that looks, or is, wrong: each thing once, in plain words.

Pure: rows of metrics in, sentences out. The display shows them while the run goes, the report
gathers them again from ``metrics.jsonl``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusedgrpo.engine.reporting.metrics_log import Row, finite, rollout_rows, trend

# Adam moves each weight by about the learning rate per step, whatever the size of the gradient.
# Adapters start from zero and are few, so they need far more than the 1e-6 of full fine-tuning.
LOW_LORA_LR = 5e-6
FEW_STEPS = 3  # in a row, before truncation is worth a word
EQUAL_STEPS = 5  # in a row without any signal
FLAT_STEPS = 50  # rollouts after which a reward should have moved


class Advisor:
    """Watches one run.

    config: the run's configuration as a mapping (``GRPOConfig.to_dict()``).
    eos_token_ids: the ids that end a completion, where they are known.
    """

    def __init__(self, config: Mapping[str, Any], *, eos_token_ids: Sequence[int] = ()):
        self.config = config
        self.eos_token_ids = list(eos_token_ids)
        self._said: set[str] = set()
        self._recent: deque[Row] = deque(maxlen=EQUAL_STEPS)
        self._rewards: list[float] = []
        self._silent_shares: deque[float] = deque(maxlen=2 * EQUAL_STEPS)

    def start(self) -> list[str]:
        """Advice on the configuration alone, before the first step."""
        return self._once({"lora_lr": self._low_learning_rate(), "eos": self._several_eos()})

    def observe(self, row: Row) -> list[str]:
        """Advice on the row of a finished step."""
        self._recent.append(row)
        if rollout_rows([row]):
            self._rewards.append(row["reward"])
            if (silent := finite(row.get("frac_reward_zero_std"))) is not None:
                self._silent_shares.append(silent)
        return self._once(
            {
                "loss": self._loss_near_zero(row),
                "clipped": self._truncation(),
                "equal": self._all_equal(),
                "silent": self._few_groups_with_signal(),
                "flat": self._flat_reward(),
                "skipped": self._skipped_update(row),
            }
        )

    def _once(self, messages: Mapping[str, str | None]) -> list[str]:
        new = {key: text for key, text in messages.items() if text and key not in self._said}
        self._said.update(new)
        return list(new.values())

    def _mean(self, key: str, steps: int) -> float | None:
        """Mean of ``key`` over the last ``steps`` rows; None if one of them lacks it."""
        values = [finite(row.get(key)) for row in list(self._recent)[-steps:]]
        numbers = [value for value in values if value is not None]
        return sum(numbers) / steps if len(numbers) == steps else None

    def _low_learning_rate(self) -> str | None:
        rate = finite(self.config.get("learning_rate"))
        if self.config.get("finetuning_type") != "lora" or not rate or rate >= LOW_LORA_LR:
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
            f"In every group of the last {EQUAL_STEPS} steps all rewards were equal"
            f"{'' if reward is None else f' (mean reward {reward:g})'}, so nothing was learned: "
        )
        if reward == 0:
            return text + "check that a right answer does get a reward, and see completions/."
        return text + "the prompts are all solved or all out of reach, or the reward is too coarse."

    def _few_groups_with_signal(self) -> str | None:
        shares = self._silent_shares
        if len(shares) < 2 * EQUAL_STEPS or not 0.8 <= (share := sum(shares) / len(shares)) < 1:
            return None
        return (
            f"In {share:.0%} of the groups all completions got the same reward and teach nothing: "
            "prompts nearer to what the model can half do, a finer reward or a larger "
            "num_generations give more signal per second."
        )

    def _flat_reward(self) -> str | None:
        if len(self._rewards) != FLAT_STEPS:
            return None
        ends = trend(self._rewards)
        if ends is None or ends.rose:
            return None
        text = (
            f"After {FLAT_STEPS} steps the reward has not risen ({ends.first:.3g} to "
            f"{ends.last:.3g}, noise {ends.noise:.2g})."
        )
        rate = finite(self.config.get("learning_rate"))
        if self.config.get("finetuning_type") == "lora" and rate and rate < 1e-5:
            text += f" learning_rate {rate:g} is low for LoRA; try 1e-5 to 3e-4."
        if self._silent_shares:
            silent = sum(self._silent_shares) / len(self._silent_shares)
            text += f" Groups without signal: {silent:.0%}."
        return text

    def _skipped_update(self, row: Row) -> str | None:
        if not row.get("skipped_update"):
            return None
        return (
            f"The update of step {row['step']} was skipped, its gradient was not finite; "
            "the weights were not touched."
        )


def all_advice(rows: Iterable[Row], config: Mapping[str, Any]) -> list[str]:
    """Everything an :class:`Advisor` says over a whole run."""
    advisor = Advisor(config)
    return [*advisor.start(), *(text for row in rows for text in advisor.observe(row))]
