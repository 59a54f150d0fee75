"""Something to be done in the process of a completion, and what has come of it so far."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from fusedgrpo.engine.child_process import Requests
from fusedgrpo.engine.tools.acting import error_text
from fusedgrpo.engine.tools.types import ToolCall, ToolResult
from fusedgrpo.errors import ToolError, brief


@dataclass(slots=True)
class Job:
    """A request, ``over`` when there is an answer or a failure.

    calls: where it is those of a turn, with what came of them. begun: what was under way last, None
    before any code of the user's ran. errors: calls that failed by the tools' own fault, and how.
    """

    key: Hashable
    request: tuple[Any, ...]
    calls: tuple[ToolCall, ...] = ()
    results: dict[int, ToolResult] = field(default_factory=dict)
    errors: list[tuple[int, str]] = field(default_factory=list)
    begun: tuple[int, ...] | None = None
    deadline: float = math.inf
    answer: Any = None
    failure: str = ""
    over: bool = False

    @property
    def is_between(self) -> bool:
        """Whether none of the user's code is at work, but ours before, between or after it."""
        return self.begun is None or (bool(self.calls) and self.results.keys() >= set(self.begun))

    def end(self, failure: str, limit: int) -> None:
        """It is over; calls without a result get an error of at most so many characters."""
        self.over, self.failure = True, failure
        for index, call in enumerate(self.calls):
            if index in self.results:
                continue
            text = "it was not called: a call before it ended the process"
            if self.begun is None or index in self.begun:
                text = failure
                self.errors.append((index, failure))
            self.results[index] = ToolResult(call.name, error_text(text[:limit]), True)

    def halt(self) -> ToolError:
        """The first error as one that ends the run."""
        index, how = self.errors[0]
        call = self.calls[index]
        return ToolError(
            f"tool {call.name!r} failed on {brief(call.arguments)}:\n{how.rstrip()}\n"
            "on_tool_error: message lets the run go on and tells the policy"
        )


@dataclass(slots=True)
class Completion:
    """Whatever is open under a key. number, requests: of its process, while it has one. death: how
    that ended, if not by us. closed: nothing more will come of it."""

    environment: str | None = None
    job: Job | None = None
    number: int = 0
    requests: Requests | None = None
    death: str = ""
    closed: bool = False
