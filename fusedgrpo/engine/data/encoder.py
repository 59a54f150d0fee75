"""Turn the prompt of a row into token ids, and refuse what cannot be trained on."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data.chat import ChatTemplate, flat_ids
from fusedgrpo.engine.data.formats import Messages, Prompt
from fusedgrpo.engine.data.row_tools import RowTools, Tools
from fusedgrpo.engine.data.rows import BadRowError, check_characters
from fusedgrpo.engine.run_clock import RunClock
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

    tokenizer: a tokenizer, or a Processor that has one. clock: says the date to the template. said:
    warnings that are not said again. tools: the run's, for ``row_tools``, which gives prompts
    theirs. Raises ConfigError if no prompt at all can fit beside ``max_completion_length``.
    """

    def __init__(
        self,
        config: GRPOConfig,
        tokenizer: Any,
        *,
        vocab_size: int | None,
        context_length: int | None,
        clock: RunClock | None = None,
        said: set[str] | None = None,
        tools: Tools | None = None,
    ):
        self.config = config
        clock = clock or RunClock(datetime.now())
        self.chat = ChatTemplate(
            tokenizer, clock, config.chat_template_kwargs, with_tools=tools is not None
        )
        self.tokenizer = self.chat.tokenizer
        self.vocab_size = vocab_size
        self.has_template = bool(self.chat)
        self.limit, self.limit_reason = _prompt_limit(config, context_length)
        self.row_tools = RowTools(tools)
        self._said = set[str]() if said is None else said
        self._special_tokens = list(self.tokenizer.all_special_tokens)
        if config.template and self.has_template:
            self._check_template(config.template)

    @property
    def is_dated(self) -> bool:
        """Whether the chat template writes a date."""
        return self.chat.is_dated

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt.

        Raises BadRowError for a prompt that cannot be used, DataError where no prompt could.
        """
        return self.checked(self.encoded(prompt), prompt)

    def encoded(self, prompt: Prompt, known: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The same unchecked. known: what they were before, and need not be made again."""
        messages = self._messages(prompt)
        try:
            check_characters(prompt.given if messages is None else messages)
            text = self._verbatim(prompt) if messages is None else ""
            if known is not None:
                return known
            if messages is not None:
                return tuple(self._rendered(messages, prompt.schemas))
            return tuple(flat_ids(self._tokenized(text)))
        except (BadRowError, DataError):
            raise
        except Exception as error:  # templates and tokenizers are other people's code
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadRowError(f"it cannot be encoded: {said[:300]}") from error

    def checked(self, ids: tuple[int, ...], prompt: Prompt) -> tuple[int, ...]:
        """``ids``, if they can be trained on. Raises as ``encode``."""
        if not ids:
            raise BadRowError("the prompt has no tokens")
        if self.limit is not None and len(ids) > self.limit:
            told = ", with what tells of its tools" if prompt.schemas else ""
            reason = f"the prompt has {len(ids)} tokens{told}, the limit is {self.limit}"
            raise BadRowError(f"{reason} ({self.limit_reason})")
        self._check_vocabulary(ids)
        self._look_at_ends(ids, prompt if self._messages(prompt) is None else None)
        return ids

    def _messages(self, prompt: Prompt) -> Messages | None:
        """The messages for the chat template; None where the text is taken as it is."""
        if prompt.messages is None and self.config.text_as_user_turn:
            if not self.has_template:
                raise DataError("text_as_user_turn: the tokenizer has no chat template.")
            return [{"role": "user", "content": prompt.given}]
        return prompt.messages if self.has_template else None

    def _tokenized(self, text: str) -> Any:
        adds = self.config.prompt_add_special_tokens
        return self.tokenizer(text, add_special_tokens=adds)["input_ids"]

    def _rendered(self, messages: Messages, schemas: tuple[dict[str, Any], ...]) -> list[int]:
        from jinja2 import TemplateError

        unfinished = messages[-1]["role"] == "assistant"
        try:
            return self.chat.ids(
                self._with_system(messages),
                generation_prompt=not unfinished,
                unfinished=unfinished,
                schemas=schemas,
            )
        except TemplateError as error:
            raise BadRowError(f"the chat template refuses it: {error}") from error

    def _with_system(self, messages: Messages) -> Messages:
        if self.config.system_prompt and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.config.system_prompt}, *messages]
        return messages

    def _verbatim(self, prompt: Prompt) -> str:
        """The text of a prompt that no chat template is applied to."""
        plain_column = prompt.messages is None
        why = "`prompt` is plain text" if plain_column else "the tokenizer has no chat template"
        if not isinstance(prompt.given, str):
            raise DataError(
                "The prompts are messages, but the tokenizer has no chat template. Give prompts as "
                "text, or a tokenizer that has one with tokenizer_name_or_path."
            )
        if prompt.schemas:
            raise DataError(
                f"tools need prompts that are messages for a chat template, and {why}"
                + (". Set text_as_user_turn: true." if self.has_template else ".")
            )
        if self.config.system_prompt:
            remedy = "Put it into the prompts"
            if self.has_template:
                remedy += ", or set text_as_user_turn: true"
            raise DataError(f"system_prompt cannot be applied: {why}. {remedy}.")
        if prompt.messages is not None and len(prompt.messages) > 1:
            raise BadRowError(f"it has a system message or a history, but {why}")
        for key in ("template", "chat_template_kwargs"):
            if getattr(self.config, key):
                self._say_once(f"{key} has no effect: {why}, it is taken as it is.")
        if not plain_column:
            self._say_once("The tokenizer has no chat template: prompts are taken as they are.")
        elif self.has_template and not self._looks_rendered(prompt.given):
            self._say_once(
                "Prompts are plain text and taken as they are, without the chat template that the "
                "tokenizer has; text_as_user_turn: true makes each the turn of a user."
            )
        return prompt.given

    def _looks_rendered(self, text: str) -> bool:
        """Whether the user has applied a chat template already: special tokens are in the text."""
        return any(token in text for token in self._special_tokens)

    def _look_at_ends(self, ids: tuple[int, ...], text: Prompt | None) -> None:
        """Say it once if a prompt begins with two BOS or ends with EOS. text: the prompt, where no
        template was applied."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        remedy = "prompt_add_special_tokens: false keeps the tokenizer from adding any."
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            token = self.tokenizer.bos_token
            if text is None:
                cause = "the chat template writes it, and so does the first message."
            elif str(text.given).startswith(token * 2):
                cause = "the text has both."
            else:
                cause = f"the text has one, the tokenizer adds another (BOS). {remedy}"
            self._say_once(f"A prompt begins with {token!r} twice: {cause}", "bos")
        if eos is not None and len(ids) > 1 and ids[-1] == eos:
            token = self.tokenizer.eos_token
            if text is None:
                cause = "the chat template writes it there (see chat_template_kwargs)."
            elif str(text.given).endswith(token):
                cause = "it is the end of the text."
            else:
                cause = f"the tokenizer adds it. {remedy}"
            self._say_once(
                f"A prompt ends with the end-of-sequence token {token!r}, after which the model is "
                f"to answer: {cause}",
                "eos",
            )

    def _check_template(self, name: str) -> None:
        """Say it if the tokenizer's template is not the one that was named."""
        marker = _MARKERS.get(name)
        if marker is None:
            hint = did_you_mean(name, _MARKERS)
            self._say_once(f"template {name!r} is not known; the tokenizer's own is used.{hint}")
            return
        try:
            rendered = self.chat.text(self._with_system([{"role": "user", "content": "?"}]))
        except Exception as error:  # templates are other people's code
            raise DataError(f"No prompt can be rendered: {error}") from error
        if marker not in rendered:
            self._say_once(
                f"template {name!r} does not fit this model: its prompts contain {marker!r}, those "
                f"of the tokenizer's own chat template do not. The tokenizer's own is used."
            )

    def _check_vocabulary(self, ids: tuple[int, ...]) -> None:
        if self.vocab_size is None or (min(ids) >= 0 and max(ids) < self.vocab_size):
            return
        wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
        raise BadRowError(
            f"the tokenizer gives token id {wrong} ({self.tokenizer.decode([wrong])!r}), the model "
            f"has {self.vocab_size} tokens: they do not belong together, or the model has no such "
            "token; check model_name_or_path and tokenizer_name_or_path"
        )

    def _say_once(self, text: str, key: str = "") -> None:
        if (key or text) not in self._said:
            self._said.add(key or text)
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
