"""A sequence classification model with one output as a reward function."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fusedgrpo import stages
from fusedgrpo.engine.rewards.call import Batch, Reply
from fusedgrpo.engine.run_clock import RunClock
from fusedgrpo.errors import RewardError, reason
from fusedgrpo.models import loading_bars

ROWS_PER_FORWARD = 8


def load_reward_model(target: str, model_kwargs: Mapping[str, Any] | None = None) -> Any:
    """A classifier with one output, from a directory or the Hub.

    Raises :class:`RewardError` if it cannot be loaded or its head is not in the checkpoint: a
    fresh head would reward at random.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        with stages.stage("loading the reward model"), loading_bars.told():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                target, num_labels=1, output_loading_info=True, **dict(model_kwargs or {})
            )
    except Exception as error:  # foreign code reads foreign files
        raise RewardError(f"cannot load the reward model {target!r}: {reason(error)}") from error
    fresh = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if fresh:
        raise RewardError(
            f"{target!r} is no reward model: its checkpoint has no fitting {', '.join(fresh)}. "
            "Expected a sequence classification model with one output"
        )
    return model


def weights_bytes(target: str, model_kwargs: Mapping[str, Any] | None = None) -> int:
    """The bytes of a reward model's weights as they will be loaded, none of which is.

    Raises :class:`RewardError` if there is no model of that name.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    given = dict(model_kwargs or {})
    try:
        settings = AutoConfig.from_pretrained(target, num_labels=1, **given)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(settings, **given)
    except Exception as error:  # as for loading it
        raise RewardError(f"cannot plan the reward model {target!r}: {reason(error)}") from error
    return _bytes(model)


def _bytes(model: Any) -> int:
    return sum(p.nbytes for p in (*model.parameters(), *model.buffers()))


def is_reward_model(candidate: object) -> bool:
    """Whether it is a transformers model, compiled or not, rather than a function."""
    return isinstance(candidate, torch.nn.Module) and hasattr(candidate, "config")


class RewardModel:
    """Scores prompt + completion, through the chat template where they are messages.

    tokenizer: the model's own; loaded from the model's path if not given. clock: says the date to
    its chat template.
    Raises :class:`RewardError` for a model that has more than one output.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: str | torch.device = "cpu",
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        clock: RunClock | None = None,
    ):
        self._clock = clock
        path = getattr(model.config, "_name_or_path", "")
        self.name = path.rstrip("/").split("/")[-1] or type(model).__name__
        if model.config.num_labels != 1:
            raise RewardError(
                f"reward model {self.name!r} has {model.config.num_labels} outputs, expected 1: "
                "which of them is the reward?"
            )
        if tokenizer is None:
            tokenizer = self._load_tokenizer(path, tokenizer_kwargs or {})
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise RewardError(
                    f"the tokenizer of the reward model {self.name!r} has neither a pad nor an EOS "
                    "token; set its pad_token and give it in reward_processing_classes"
                )
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        # The score is read at the last token that is not this one.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if not (getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)):
            model.to(device)  # the others were placed when they were loaded
        self._model = model.eval().requires_grad_(False)
        self.bytes = _bytes(model)
        self._batch: Batch | None = None
        self.check_interrupt: Callable[[], None] = lambda: None  # called before each forward pass

    def _load_tokenizer(self, path: str, kwargs: Mapping[str, Any]) -> Any:
        from transformers import AutoTokenizer

        problem = f"no tokenizer for the reward model {self.name!r} in {path!r}; give it in "
        problem += "reward_processing_classes"
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
        except Exception as error:  # as for the model
            raise RewardError(f"{problem} ({reason(error)})") from error
        # Without tokenizer files, transformers makes an empty one from the model's type.
        if not tokenizer("reward", add_special_tokens=False)["input_ids"]:
            raise RewardError(problem)
        return tokenizer

    def start(self, batch: Batch) -> None:
        self._batch = batch

    def finish(self) -> Reply:
        """Raises :class:`RewardError` for a text that is too long."""
        assert self._batch is not None
        batch, self._batch = self._batch, None
        start = time.perf_counter()
        values, failures = [math.nan] * len(batch), dict[int, str]()
        ids = self.tokenizer(self._texts(batch), add_special_tokens=False)["input_ids"]
        self._check_lengths(ids, batch)
        # Neighbours of like length share a forward, so little of it is padding.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for first in range(0, len(order), ROWS_PER_FORWARD):
            self.check_interrupt()
            indices = order[first : first + ROWS_PER_FORWARD]
            for index, score in zip(indices, self._scores([ids[i] for i in indices]), strict=True):
                if math.isfinite(score):
                    values[index] = score
                else:
                    failures[index] = f"it gave {score}, which is no finite number"
        return Reply(values, failures, seconds=time.perf_counter() - start)

    def close(self) -> None:
        pass

    def _texts(self, batch: Batch) -> list[str]:
        pairs = zip(batch.prompts, batch.completions, strict=True)
        if isinstance(batch.prompts[0], str):
            return [prompt + completion for prompt, completion in pairs]
        if not self.tokenizer.chat_template:
            raise RewardError(
                f"reward model {self.name!r}: the prompts are messages and its tokenizer has no "
                "chat template"
            )
        clock = self._clock
        dated = clock.pinned(self.tokenizer.chat_template) if clock else {}
        return [
            self.tokenizer.apply_chat_template(prompt + completion, tokenize=False, **dated)
            for prompt, completion in pairs
        ]

    def _check_lengths(self, ids: list[list[int]], batch: Batch) -> None:
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        for index, row in enumerate(ids):
            if not row or (limit is not None and len(row) > limit):
                raise RewardError(
                    f"reward model {self.name!r}: completion {index} (data row "
                    f"{batch.rows[index]}) with its prompt has {len(row)} tokens, expected 1 to "
                    f"{limit}"
                )

    @torch.inference_mode()
    def _scores(self, ids: list[list[int]]) -> list[float]:
        inputs = self.tokenizer.pad(
            {"input_ids": ids}, padding_side="right", return_tensors="pt"
        ).to(self._model.device)
        logits = self._model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        return logits[:, 0].float().tolist()
