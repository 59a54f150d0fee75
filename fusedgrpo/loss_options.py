"""The losses there are, and the options of one as a value that every caller passes around."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

ImportanceSamplingLevel = Literal["token", "sequence"]
IMPORTANCE_SAMPLING_LEVELS: tuple[str, ...] = get_args(ImportanceSamplingLevel)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossKind:
    """A loss type, apart from the arithmetic of its surrogate.

    surrogate: its file in ``kernels/loss/surrogates``, with formula and paper.
    summed: ``"tokens"``, or the ``"means"`` of the completions over their tokens.
    divided_by: what the sum is divided by: ``"tokens"``, ``"completions"``, or the
        ``"longest"``, completions times ``max_completion_length``.
    metrics: those of its own, and the entry of ``kernels.loss.types.METRICS`` that each is.
    weighs_completions: a whole completion has one weight, of its ratio and of its sampler's.
    """

    surrogate: str
    summed: Literal["tokens", "means"] = "tokens"
    divided_by: Literal["tokens", "completions", "longest"]
    metrics: dict[str, str]
    weighs_completions: bool = False


_CLIP_SHARES = {
    f"clip_ratio/{name}": f"clip_ratio/{name}"
    for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")
}
_PHI = {"vespo/phi_seq_mean": "vespo/phi_seq_mean"}

LOSSES: dict[str, LossKind] = {
    "grpo": LossKind(
        surrogate="clipped", summed="means", divided_by="completions", metrics=_CLIP_SHARES
    ),
    "bnpo": LossKind(surrogate="clipped", divided_by="tokens", metrics=_CLIP_SHARES),
    "dr_grpo": LossKind(surrogate="clipped", divided_by="longest", metrics=_CLIP_SHARES),
    "dapo": LossKind(surrogate="clipped", divided_by="tokens", metrics=_CLIP_SHARES),
    "luspo": LossKind(surrogate="clipped", divided_by="completions", metrics=_CLIP_SHARES),
    "cispo": LossKind(
        surrogate="cispo",
        divided_by="tokens",
        metrics={"cispo_clip_ratio": "clip_ratio/high_mean"},
    ),
    "sapo": LossKind(surrogate="sapo", summed="means", divided_by="completions", metrics={}),
    "vespo": LossKind(
        surrogate="vespo", divided_by="tokens", metrics=_PHI, weighs_completions=True
    ),
}
LOSS_TYPES = tuple(LOSSES)
CLIPPED_LOSS_TYPES = tuple(name for name, kind in LOSSES.items() if kind.surrogate == "clipped")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """Names, defaults and meaning are TRL 1.16's.

    loss_type: the surrogate and its normaliser, one of ``LOSS_TYPES``.
    importance_sampling_level: ``"token"``, or ``"sequence"`` for one ratio per completion (GSPO).
    epsilon, epsilon_high: the ratio is clipped to ``[1 - epsilon, 1 + epsilon_high]``;
        ``epsilon_high`` is ``epsilon`` unless given. For ``cispo`` it is the absolute cap of the
        ratio, without the ``1 +``.
    delta: second, upper clip of the ratio before the minimum is taken (two-sided clipping).
    beta: weight of the KL to the reference; 0 leaves it out.
    use_bias_correction_kl: multiply the KL estimate by the importance ratio.
    max_completion_length: the constant of ``dr_grpo``, in tokens.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    max_completion_length: int | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type={self.loss_type!r}: expected one of {', '.join(LOSS_TYPES)}."
            )
        if self.importance_sampling_level not in IMPORTANCE_SAMPLING_LEVELS:
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r}: "
                "expected 'token' or 'sequence'."
            )
        for name, minimum in (
            ("epsilon", 0.0),
            ("epsilon_high", 0.0),
            ("delta", 0.0),
            ("beta", 0.0),
        ):
            value = getattr(self, name)
            if value is not None and not minimum <= value < math.inf:
                raise ValueError(f"{name}={value!r}: expected a finite number >= {minimum:g}.")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a number > 0.")
        if self.kind.divided_by == "longest" and not self.max_completion_length:
            raise ValueError(
                f"loss_type={self.loss_type!r} divides by max_completion_length: give it."
            )

    @property
    def kind(self) -> LossKind:
        return LOSSES[self.loss_type]

    @property
    def upper(self) -> float:
        """``epsilon_high``, or ``epsilon`` where it is not given."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def mean_per_completion(self) -> bool:
        """Is the loss a sum of each completion's mean over its tokens, not of all tokens?"""
        return self.kind.summed == "means"

    @property
    def per_sequence(self) -> bool:
        """Is there one ratio per completion?"""
        return self.importance_sampling_level == "sequence"

    @property
    def needs_whole_completions(self) -> bool:
        """Does a token's derivative depend on the other tokens of its completion?"""
        return self.per_sequence or self.kind.weighs_completions

    def to_dict(self) -> dict[str, Any]:
        """The options as keyword arguments of ``policy_loss``."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_numbers(self) -> list[float]:
        """The options as a custom op's schema can carry them; ``from_numbers`` reads them back.

        No JSON: torch.compile traces this, and cannot write a number that changes between calls
        into a string.
        """
        values = self.to_dict()
        values["loss_type"] = LOSS_TYPES.index(self.loss_type)
        values["importance_sampling_level"] = IMPORTANCE_SAMPLING_LEVELS.index(
            self.importance_sampling_level
        )
        return [math.nan if value is None else float(value) for value in values.values()]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> LossOptions:
        values: dict[str, Any] = {
            field.name: None if math.isnan(value) else value
            for field, value in zip(fields(cls), numbers, strict=True)
        }
        values["loss_type"] = LOSS_TYPES[int(values["loss_type"])]
        level = int(values["importance_sampling_level"])
        values["importance_sampling_level"] = IMPORTANCE_SAMPLING_LEVELS[level]
        values["use_bias_correction_kl"] = bool(values["use_bias_correction_kl"])
        return cls(**values)
