"""From what a policy wrote in one turn to a message with its calls of tools."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fusedgrpo.engine.data.chat import ChatTemplate
from fusedgrpo.engine.data.rows import is_deep
from fusedgrpo.engine.tools import probes
from fusedgrpo.engine.tools.argument_types import Schemas, typed
from fusedgrpo.engine.tools.formats import FORMATS, CallFormat, UnreadableCallError
from fusedgrpo.engine.tools.responses import Responses, response_reader
from fusedgrpo.engine.tools.types import ToolCall
from fusedgrpo.errors import ConfigError
from fusedgrpo.models.tokenizer import special_tokens

Tags = tuple[str, str]

# Tags of reasoning. Where the first of a pair is in the chat template, the template keeps reasoning
# apart from content.
_THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
)
_PREFIX = 512  # tokens that are looked at before a turn: what a template begins it with is shorter
_SAID = 500  # characters of a problem: the policy's own text may be in it
_REMEDY = (
    "Give the tokenizer a chat template that writes calls of tools, or a response_template (in "
    "tokenizer_config.json, or tokenizer.response_template), by which transformers reads them."
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the policy.

    message: ``role`` and ``content``, and ``reasoning_content`` and ``tool_calls`` if there are
    any. calls: the same calls. problem: why what looks like a call cannot be read, in words for the
    policy; then there are no calls, not even those that could be read, and the content is all the
    text.
    """

    message: dict[str, Any]
    calls: tuple[ToolCall, ...] = ()
    problem: str | None = None


class TurnParser:
    """Reads turns by the tokenizer's ``response_template``, or else in the format in which its chat
    template writes calls.

    Raises ConfigError if there is neither, or if the ``response_template`` does not read the call
    that the chat template writes.
    """

    def __init__(self, chat: ChatTemplate):
        self._tokenizer = chat.tokenizer
        source = str(chat.source or "")
        known = [tags for tags in _THOUGHTS if tags[0] in source]
        self._tags, self._apart = (known or _THOUGHTS)[0], bool(known)
        special = special_tokens(chat.tokenizer)
        written = probes.written_call(chat)
        self._respond = response_reader(chat.tokenizer)
        self._format: CallFormat | None = None
        if self._respond is not None:
            _check_reads(self._respond, written)
        else:
            self._format = self._recognised(written, special.values())
        marks = {*self._tags, *(self._format.marks if self._format else ())}
        self._dropped = {i for i, token in special.items() if not _is_mark(token, marks)}

    def parse(self, ids: Sequence[int], prefix_ids: Sequence[int], schemas: Schemas = ()) -> Turn:
        """The turn that ``ids`` are, with or without the token that ended it.

        prefix_ids: what is before it, and may have begun it: the prompt, or what was given last.
        schemas: of the tools; they tell numbers from text where the format does not. Never raises
        for what is in ``ids``.
        """
        before = list(prefix_ids[-_PREFIX:])
        try:
            if self._respond is not None:
                message, calls = self._respond(list(ids), before)
                return _turn(message, calls, schemas)
            assert self._format is not None
            return self._read(self._format, self._text(ids), self._text(before), schemas)
        except UnreadableCallError as problem:
            text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
            return Turn({"role": "assistant", "content": text}, problem=str(problem)[:_SAID])

    def _text(self, ids: Sequence[int]) -> str:
        kept = [i for i in ids if i not in self._dropped]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    def _read(self, form: CallFormat, text: str, before: str, schemas: Schemas) -> Turn:
        opened = before.rstrip().endswith(self._tags[0])
        content, thoughts, calls = split_turn(text, form, self._tags, opened, self._apart)
        if form.thoughts is not None:
            thoughts, content = form.thoughts(content)
        message = {"role": "assistant", "content": content}
        if calls or content != text:
            message["content"] = content.strip()
        if thoughts:
            message["reasoning_content"] = thoughts.strip()
        return _turn(message, calls, schemas)

    def _recognised(self, written: probes.WrittenCall | str, special: Iterable[str]) -> CallFormat:
        """The format in which a call was written."""
        if isinstance(written, str):
            raise ConfigError(
                f"tools: the chat template does not write calls of tools: {written}. {_REMEDY}"
            )
        for form in FORMATS:
            text = written.text
            for token in special:
                if not _is_mark(token, {*self._tags, *form.marks}):
                    text = text.replace(token, "")
            try:
                if self._read(form, text, written.before, [probes.SCHEMA]).calls == (written.call,):
                    return form
            except UnreadableCallError:
                continue
        raise ConfigError(
            "tools: the format in which the chat template writes a call is not known: "
            f"{written.text[:200]!r}. {_REMEDY}"
        )


def split_turn(
    text: str, form: CallFormat, tags: Tags, opened: bool, apart: bool
) -> tuple[str, str, list[ToolCall]]:
    """Content, reasoning and calls of a text. opened: it begins within reasoning. apart: reasoning
    is no content. Nothing in reasoning is a call."""
    content: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    at = 0
    call = form.opening.search(text)
    if opened or _closes_first(text, tags, call.start() if call else len(text)):
        at = _thought(text, 0, 0, tags, thoughts if apart else content, apart)
    while True:
        if call is not None and call.start() < at:
            call = form.opening.search(text, at)
        think = text.find(tags[0], at)
        if think >= 0 and (call is None or think < call.start()):
            content.append(text[at:think])
            inside = think + len(tags[0])
            at = _thought(text, think, inside, tags, thoughts if apart else content, apart)
        elif call is not None:
            content.append(text[at : call.start()])
            found, at = form.read(call)
            calls += found
        else:
            content.append(text[at:])
            return "".join(content), "\n".join(filter(None, thoughts)), calls


def _closes_first(text: str, tags: Tags, before: int) -> bool:
    """Whether reasoning is closed, ahead of any call, that the text does not open."""
    end = text.find(tags[1], 0, before)
    return end >= 0 and text.find(tags[0], 0, end) < 0


def _thought(text: str, start: int, inside: int, tags: Tags, taken: list[str], apart: bool) -> int:
    """Take the reasoning that begins at ``start``, or what is ``inside`` of its tags if it is kept
    apart, and return where it ends."""
    close = text.find(tags[1], inside)
    end = len(text) if close < 0 else close + len(tags[1])
    last = len(text) if close < 0 else close
    taken.append(text[inside:last].strip() if apart else text[start:end])
    return end


def _turn(message: dict[str, Any], calls: list[ToolCall], schemas: Schemas) -> Turn:
    """A turn with these calls, if they can be sent to tools. Raises UnreadableCallError."""
    if not calls:
        return Turn(message)
    calls = [typed(call, schemas) for call in calls]
    for call in calls:
        if is_deep(call.arguments):
            raise UnreadableCallError(f"the arguments of {call.name!r} are nested too deeply")
        try:
            sent = json.dumps([call.name, call.arguments], ensure_ascii=False, allow_nan=False)
            sent.encode()
        except (TypeError, ValueError) as error:
            raise UnreadableCallError(
                f"the arguments of {call.name!r} are no JSON: {error}"
            ) from None
    written = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
    return Turn(message | {"tool_calls": written}, tuple(calls))


def _check_reads(respond: Responses, written: probes.WrittenCall | str) -> None:
    """Raise ConfigError if the call that the chat template writes is not read."""
    if isinstance(written, str):  # a policy may write calls that its template knows nothing of
        return
    try:
        _, calls = respond(written.text, written.before)
        if [call.name for call in calls] == [written.call.name]:
            return
        why = f"it reads {len(calls)} calls in it"
    except UnreadableCallError as error:
        why = str(error)
    raise ConfigError(
        "tools: the tokenizer's response_template does not read the call that its chat template "
        f"writes, {written.text[:200]!r}: {why}. Correct one of the two."
    )


def _is_mark(token: str, marks: set[str]) -> bool:
    return any(token in mark for mark in marks)
