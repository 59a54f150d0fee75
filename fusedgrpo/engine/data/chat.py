"""A chat template with all that the run gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedgrpo.engine.data.formats import Messages
from fusedgrpo.engine.data.rows import BadRowError
from fusedgrpo.engine.run_clock import RunClock, is_dated
from fusedgrpo.models.tokenizer import chat_template_of, text_tokenizer


class ChatTemplate:
    """Renders messages as the model reads them.

    processing_class: a tokenizer, or a Processor that has one. clock: says the date to the
    template. variables: the ``chat_template_kwargs`` of the run. with_tools: it has tools. False if
    there is no template.
    """

    def __init__(
        self,
        processing_class: Any,
        clock: RunClock,
        variables: dict[str, Any] | None,
        *,
        with_tools: bool = False,
    ):
        self.tokenizer = text_tokenizer(processing_class)
        self.source = chat_template_of(processing_class, with_tools=with_tools)
        self.clock = clock
        self.variables = variables or {}
        self._wants_parts = bool(self) and self._leaves_out_text()

    def __bool__(self) -> bool:
        return bool(self.source)

    @property
    def is_dated(self) -> bool:
        """Whether it writes a date."""
        return is_dated(self.source)

    def text(self, messages: Messages, **options: Any) -> str:
        """The messages as text. options: as of ``ids``. Raises what the template raises."""
        return str(self._applied(messages, tokenize=False, **options))

    def ids(self, messages: Messages, **options: Any) -> list[int]:
        """The messages as token ids.

        options: ``generation_prompt`` (default true: the turn of the assistant is begun),
        ``unfinished`` (the last message is continued), ``schemas`` (of the tools that it may call).
        Raises what the template and the tokenizer raise, and BadRowError for no token ids.
        """
        return flat_ids(self._applied(messages, tokenize=True, **options)["input_ids"])

    def _applied(
        self,
        messages: Messages,
        *,
        tokenize: bool,
        generation_prompt: bool = True,
        unfinished: bool = False,
        schemas: Sequence[dict[str, Any]] = (),
    ) -> Any:
        arguments = self.clock.pinned(self.source)
        if not arguments and self.source != getattr(self.tokenizer, "chat_template", None):
            arguments = {"chat_template": self.source}  # a Processor's, or one of several
        if schemas:
            arguments["tools"] = list(schemas)
        return self.tokenizer.apply_chat_template(
            [self._with_content(message) for message in messages],
            tokenize=tokenize,
            return_dict=tokenize,
            add_generation_prompt=generation_prompt,
            continue_final_message=unfinished,
            **arguments | self.variables,
        )

    def _with_content(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose content is text, or a list of parts where the template wants parts."""
        parts = message["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        text = "".join(part["text"] for part in parts)
        clean = [{"type": "text", "text": part["text"]} for part in parts]
        return {**message, "content": clean if self._wants_parts else text}

    def _leaves_out_text(self) -> bool:
        """Whether the template leaves out content that is text, as those of some models that see
        pictures do, and not content that is a list of parts."""
        probe = [{"role": "user", "content": "fusedgrpo"}]
        found = {}
        for self._wants_parts in (False, True):
            try:
                found[self._wants_parts] = "fusedgrpo" in self.text(probe)
            except Exception:  # noqa: BLE001 - a template that does not take a lone user turn
                found[self._wants_parts] = False
        return found[True] and not found[False]


def flat_ids(ids: Any) -> list[int]:
    """Token ids as a list, from a tokenizer or a template that gives an array or a batch of one.
    Raises BadRowError for anything else."""
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if len(ids) == 1 and isinstance(ids[0], list):
        (ids,) = ids
    if not all(isinstance(i, int) for i in ids):
        raise BadRowError(f"it was encoded to {str(ids)[:40]}, expected token ids")
    return ids
