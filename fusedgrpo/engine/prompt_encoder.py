"""Turn the prompt of a row into token ids, and refuse what cannot be trained on."""

from __future__ import annotations

import logging
from typing import Any

from fusedgrpo.engine.config import GRPOConfig
from fusedgrpo.engine.data_formats import BadRowError, Messages, Prompt
from fusedgrpo.errors import ConfigError, DataError, did_you_mean

logger = logging.getLogger("fusedgrpo")

# LLaMA-Factory's template names, by the marker that their rendered prompts contain.
_TEMPLATES = {
    "<|im_start|>": "chatml qwen qwen2_vl qwen2_5_vl qwen3 qwen3_nothink qwen3_5 qwen3_5_nothink "
    "qwen3_6 qwen3_vl smollm smollm2 yi intern2 opencoder lfm2 mimo dbrx cpm4",
    "<|start_header_id|>": "llama3 mllama openchat-3.6",
    "<|header_start|>": "llama4",
    "[INST]": "llama2 llama2_zh mistral mistral_small ministral ministral3 pixtral breeze",
    "<start_of_turn>": "gemma gemma2 gemma3 gemma3n",
    "<|turn>": "gemma4 gemma4n",
    "<|user|>": "phi phi_small phi4_mini glm4 glm4_moe glm4_7 glmz1 chatglm3 zephyr olmo starchat",
    "<|im_sep|>": "phi4",
    "<｜User｜>": "deepseek3 deepseekr1",
    "<|start_of_role|>": "granite3 granite4",
    "<|START_OF_TURN_TOKEN|>": "cohere",
    "<|message|>": "gpt_oss",
    "<|im_middle|>": "moonlight kimi_vl",
    "[|user|]": "exaone",
}
_MARKERS = {name: marker for marker, names in _TEMPLATES.items() for name in names.split()}


class PromptEncoder:
    """Encodes prompts for one model: chat template, limits and vocabulary.

    Raises ConfigError if no prompt at all can fit beside ``max_completion_length``.
    """

    def __init__(
        self,
        config: GRPOConfig,
        tokenizer: Any,
        *,
        vocab_size: int | None,
        context_length: int | None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.limit, self.limit_reason = _prompt_limit(config, context_length)
        self._said: set[str] = set()
        if config.template and self.has_template:
            self._check_template(config.template)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt.

        Raises BadRowError for a prompt that cannot be used, DataError where no prompt could.
        """
        if self.has_template and prompt.messages is not None:
            ids = self._render(prompt.messages, tokenize=True)["input_ids"]
        else:
            ids = self.tokenizer(self._verbatim(prompt))["input_ids"]
        if not ids:
            raise BadRowError("the prompt has no tokens")
        if self.limit is not None and len(ids) > self.limit:
            reason = f"the prompt has {len(ids)} tokens, the limit is {self.limit}"
            raise BadRowError(f"{reason} ({self.limit_reason})")
        self._check_vocabulary(ids)
        return tuple(ids)

    def _render(self, messages: Messages, *, tokenize: bool) -> Any:
        from jinja2 import TemplateError

        if self.config.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.system_prompt}, *messages]
        unfinished = messages[-1]["role"] == "assistant"
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=tokenize,
                return_dict=tokenize,
                add_generation_prompt=not unfinished,
                continue_final_message=unfinished,
                **(self.config.chat_template_kwargs or {}),
            )
        except TemplateError as error:
            raise BadRowError(f"the chat template refuses it: {error}") from error

    def _verbatim(self, prompt: Prompt) -> str:
        """The text of a prompt that no chat template is applied to."""
        plain_column = prompt.messages is None
        why = "`prompt` is plain text" if plain_column else "the tokenizer has no chat template"
        if not isinstance(prompt.given, str):
            raise DataError(
                "The prompts are messages, but the tokenizer has no chat template. Give prompts as "
                "text, or a tokenizer that has one with tokenizer_name_or_path."
            )
        if self.config.system_prompt:
            raise DataError(f"system_prompt cannot be applied: {why}. Put it into the prompts.")
        if prompt.messages is not None and len(prompt.messages) > 1:
            raise BadRowError(f"it has a system message or a history, but {why}")
        for key in ("template", "chat_template_kwargs"):
            if getattr(self.config, key):
                self._say_once(f"{key} has no effect: {why}, it is taken as it is.")
        if not plain_column:
            self._say_once("The tokenizer has no chat template: prompts are taken as they are.")
        return prompt.given

    def _check_template(self, name: str) -> None:
        """Say it if the tokenizer's template is not the one that was named."""
        marker = _MARKERS.get(name)
        if marker is None:
            hint = did_you_mean(name, _MARKERS)
            self._say_once(f"template {name!r} is not known; the tokenizer's own is used.{hint}")
            return
        try:
            rendered = self._render([{"role": "user", "content": "?"}], tokenize=False)
        except BadRowError as error:
            raise DataError(f"No prompt can be rendered: {error}") from error
        if marker not in rendered:
            self._say_once(
                f"template {name!r} does not fit this model: its prompts contain {marker!r}, those "
                f"of the tokenizer's own chat template do not. The tokenizer's own is used."
            )

    def _check_vocabulary(self, ids: list[int]) -> None:
        if self.vocab_size is None or (min(ids) >= 0 and max(ids) < self.vocab_size):
            return
        wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
        raise DataError(
            f"The tokenizer gives token id {wrong} ({self.tokenizer.decode([wrong])!r}), the model "
            f"has {self.vocab_size} tokens: they do not belong together. Check "
            "model_name_or_path and tokenizer_name_or_path."
        )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)


def _prompt_limit(config: GRPOConfig, context_length: int | None) -> tuple[int | None, str]:
    """The most tokens that a prompt may have, and which options say so."""
    limits: list[tuple[int, str]] = []
    if config.max_prompt_length is not None:
        limits.append((config.max_prompt_length, "max_prompt_length"))
    beside = f"max_completion_length {config.max_completion_length}"
    if config.max_length is not None:
        text = f"max_length {config.max_length} - {beside}"
        limits.append((config.max_length - config.max_completion_length, text))
    if context_length is not None:
        text = f"context of the model {context_length} - {beside}"
        limits.append((context_length - config.max_completion_length, text))
    if not limits:
        return None, ""
    limit, text = min(limits)
    if limit < 1:
        raise ConfigError(f"No room for a prompt: {text}. Lower max_completion_length.")
    return limit, text
