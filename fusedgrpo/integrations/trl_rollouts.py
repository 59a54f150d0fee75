"""Rollouts of TRL's GRPO trainer from our decoder, in place of transformers' generate.

The completions go to TRL as generate's would, so its rewards, metrics and loss do not know of it.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tqdm import tqdm

from fusedgrpo.engine.execution import Execution, Progress, unwatched
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.progress import RolloutProgress
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.seeding import derive
from fusedgrpo.errors import ConfigError, ModelError
from fusedgrpo.integrations.packed_forward import PackedForward

log = logging.getLogger("fusedgrpo")

LEAVE_IT_OUT = "leave fused_rollouts out, and TRL generates."

# Arguments of the trainer and of its configuration that ask for other rollouts.
REFUSED = (
    "use_vllm", "use_transformers_continuous_batching", "tools", "environment_factory",
    "rollout_func", "cache_implementation", "cast_lm_head_to_fp32",
)  # fmt: skip

# What the decoder samples by, among the entries of ``generation_kwargs``.
KNOWN = (
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
)  # fmt: skip

# transformers adds these of the model's own generation_config to TRL's. Each changes what generate
# says, unless it is None or the value here.
OF_THE_MODEL: dict[str, Any] = {
    "num_beams": 1, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "guidance_scale": 1,
    "token_healing": False, "top_h": None, "bad_words_ids": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "sequence_bias": None, "exponential_decay_length_penalty": None, "watermarking_config": None,
    "stop_strings": None, "max_time": None,
}  # fmt: skip


def refuse_options(arguments: Mapping[str, Any]) -> None:
    """ConfigError naming every argument of ``GRPOTrainer`` that asks for other rollouts than ours.

    Looked at before TRL loads anything.
    """
    args = arguments.get("args")
    names = [n for n in REFUSED if arguments.get(n) or (args and getattr(args, n, None))]
    if args is not None:
        unknown = [name for name in args.generation_kwargs or {} if name not in KNOWN]
        names += [f"generation_kwargs[{name!r}]" for name in unknown]
    if names:
        raise ConfigError(
            f"fused_rollouts=True does not go with {', '.join(names)}: {LEAVE_IT_OUT}"
        )


class Rollouts:
    """``completions`` for the prompts of ``trainer``, from ``causal_lm`` with its ``forward``.

    weights: "adapter" or "merged", see ``FusedLogProbs``.

    Raises ConfigError for a trainer, ModelError for a model, that the decoder is not for: at once,
    or in the first rollout where the launcher has yet to put the model on its device.
    """

    def __init__(
        self,
        trainer: Any,
        causal_lm: Any,
        forward: PackedForward,
        weights: Literal["adapter", "merged"],
    ):
        self.trainer = trainer
        self._weights: Literal["adapter", "merged"] = weights
        self._causal_lm = causal_lm
        self._forward = forward
        self._step = -1
        self._counts: Counter[str] = Counter()
        if trainer._is_vlm:
            raise ConfigError(
                "fused_rollouts=True does not go with a multimodal processing_class: "
                f"{LEAVE_IT_OUT}"
            )
        if weights == "merged" and forward.policy.adapters is None:
            raise ConfigError(
                "rollout_weights='merged' folds LoRA into a copy of the weights, and this model "
                "has no adapter: leave it out, or give peft_config."
            )
        self._refuse_generation_config()
        if causal_lm.device.type == trainer.accelerator.device.type:
            self._sampler  # noqa: B018  made now, for what it refuses

    def _refuse_generation_config(self) -> None:
        own = self._causal_lm.generation_config
        names = []
        for name, neutral in OF_THE_MODEL.items():
            value = getattr(own, name, None)
            if value is not None and value != neutral:
                names.append(f"{name}={value!r}")
        if names:
            raise ConfigError(
                f"fused_rollouts=True does not go with the model's generation_config "
                f"({', '.join(names)}): unset it there, or {LEAVE_IT_OUT}"
            )

    @functools.cached_property
    def _sampler(self) -> DecoderSampler:
        trainer = self.trainer
        kind = type(self._causal_lm).__name__
        if trainer._layout(trainer.model, self._forward) == "rows":
            raise ModelError(
                f"fused_rollouts=True needs a model that can be forwarded packed, and {kind} "
                f"cannot: {LEAVE_IT_OUT}"
            )
        ends = [token for token in trainer.eos_token_ids if token is not None]
        try:
            with trainer.accelerator.autocast():
                return DecoderSampler(
                    self._forward.policy,
                    trainer._tokenizer,
                    ends,
                    execution=Execution(OOMRetry(tokens=0), progress=_progress(trainer)),
                    rollout_weights=self._weights,
                    skip_special_tokens=False,  # the text is not used: TRL decodes the tokens
                )
        except ModelError as error:
            raise ModelError(
                f"fused_rollouts=True: the decoder does not give the log-probs of {kind}'s "
                f"training forward: {LEAVE_IT_OUT}"
            ) from error

    def completions(self, prompt_ids: Sequence[Sequence[int]], mode: str) -> list[list[int]]:
        """Token ids of one completion for each of ``prompt_ids``, its end token included.

        mode: ``"train"`` or ``"eval"``. Equal prompts that are adjacent are read together.
        """
        if not all(prompt_ids):
            raise ModelError("A prompt without tokens has nothing to predict from.")
        params = self._params()
        prompts, n = grouped(prompt_ids)
        sampler = self._sampler
        # Weights may have been written in ways that leave no trace on a tensor (DeepSpeed).
        sampler.weights_changed()
        sampler.execution.oom_retry.tokens = self._tokens(prompts, params)
        with self.trainer.accelerator.autocast():
            groups = sampler.sample(prompts, n, params, self._seed(mode))
        return [list(completion.ids) for group in groups for completion in group.completions]

    def _params(self) -> SamplingParams:
        asked = self.trainer.generation_kwargs
        return SamplingParams(
            max_new_tokens=asked["max_new_tokens"],
            temperature=asked["temperature"] or 1.0,
            top_p=1.0 if asked["top_p"] is None else asked["top_p"],
            top_k=asked["top_k"] or 0,
            min_p=asked["min_p"],
            repetition_penalty=asked["repetition_penalty"] or 1.0,
            greedy=not asked["do_sample"],
        )

    def _tokens(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> int:
        """Prompt tokens of one forward pass: not more than training has in one."""
        trainer = self.trainer
        longest = max(map(len, prompts)) + params.max_new_tokens
        return trainer.tokens_per_microbatch or trainer.args.per_device_train_batch_size * longest

    def _seed(self, mode: str) -> int:
        """A function of the trainer's seed, the step, how many rollouts it had in this mode before,
        and the process."""
        trainer = self.trainer
        if trainer.state.global_step != self._step:
            self._step = trainer.state.global_step
            self._counts.clear()
        count = self._counts[mode]
        self._counts[mode] += 1
        process = trainer.accelerator.process_index
        return derive(trainer.args.seed, "rollout", mode, self._step, count, process)


class _BelowTheBar:
    """A line below TRL's progress bar, which tqdm keeps apart from it; gone with an empty text."""

    def __init__(self) -> None:
        self._line: Any = None

    def __call__(self, text: str) -> None:
        if not text:
            self._line.close()
            self._line = None
        elif self._line is None:
            self._line = tqdm(bar_format="{desc}", desc=text, leave=False, dynamic_ncols=True)
        else:
            self._line.set_description_str(text)


def _progress(trainer: Any) -> Progress:
    """Shown by the main process: on a terminal unless ``disable_tqdm``, else in the log."""
    if not trainer.accelerator.is_main_process:
        return unwatched
    if sys.stderr is not None and sys.stderr.isatty() and not trainer.args.disable_tqdm:
        return RolloutProgress(_BelowTheBar(), overwrites=True)
    return RolloutProgress(log.info, overwrites=False)


def grouped(prompt_ids: Sequence[Sequence[int]]) -> tuple[list[list[int]], int]:
    """Prompts and ``n``, such that ``n`` copies of each in turn are ``prompt_ids``.

    ``n`` is the largest that divides the lengths of all runs of equal prompts: where processes
    share a group, the number of its completions in this one.
    """
    runs = [(list(ids), sum(1 for _ in run)) for ids, run in itertools.groupby(prompt_ids, list)]
    n = math.gcd(*(length for _, length in runs))
    return [ids for ids, length in runs for _ in range(length // n)], n
