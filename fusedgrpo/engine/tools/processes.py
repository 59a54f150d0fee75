"""All tools and environments of a run at work: each completion's in a process of its own.

What a tool does, be it that it raises, hangs, dies, floods or answers nonsense, is an error message
for the policy that called it. Deadlines are kept whenever this is asked for anything.
"""

from __future__ import annotations

import json
import math
import pickle
import selectors
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

from fusedgrpo.engine.child_process import GRACE_SECONDS, GarbledReply, Requests, death_in_words
from fusedgrpo.engine.data.rows import is_deep
from fusedgrpo.engine.rewards.call import Reply
from fusedgrpo.engine.tools.jobs import Completion, Job
from fusedgrpo.engine.tools.nursery import Nursery
from fusedgrpo.engine.tools.spec import ToolSet
from fusedgrpo.engine.tools.types import ToolCall, ToolResult
from fusedgrpo.errors import ToolError, reason

# Before code of the user's begins, there is only ours to wait for.
_START_SECONDS = 120.0
_AT_ONCE = 64
_ANSWERS = {"reset": "observation", "reward": "reward", "copy": "copy"}


class ToolProcesses:
    """The processes of a run's tools and environments. Close it, or use it as a context manager.

    A completion is known by its key, and has one thing going on at a time. Without environments it
    has a process for the calls of one turn; with them one from :meth:`open` to :meth:`close_key`,
    in which its tools are called, too, and whose generators begin with the seed that is given.
    Code given by name or by object is imported once, in a process without torch that forks the
    others.

    timeout: seconds for a call, and for making, resetting, rewarding and copying an environment;
    None for no limit. output_limit: characters of an answer. check_interrupt: called while
    something is waited for, and may raise. on_error: ``"halt"`` makes a tool that fails a
    ToolError of :meth:`results`, what the policy does wrong (tools that are not there, arguments
    that do not fit) being none of the tool's. at_once: how many processes work at once; further
    ones wait for them, in order. Environments live on between their calls, as many as are open.

    Raises :class:`ToolError` if the tools cannot be loaded.
    """

    def __init__(
        self,
        tools: ToolSet,
        *,
        timeout: float | None,
        output_limit: int,
        check_interrupt: Callable[[], None] = lambda: None,
        on_error: Literal["message", "halt"] = "message",
        at_once: int = _AT_ONCE,
    ):
        self._tools = tools
        self._timeout = timeout
        self._limit = output_limit
        self._check_interrupt = check_interrupt
        self._halts = on_error == "halt"
        self._at_once = at_once
        self._completions: dict[Hashable, Completion] = {}
        self._processes: dict[int, Completion] = {}
        self._waiting: deque[Job] = deque()
        self._working: dict[int, Job] = {}
        self._done: deque[Job] = deque()
        self._started = 0
        self._selector = selectors.DefaultSelector()
        self._start_nursery()

    def open(
        self, key: Hashable, environment: str | None, reset: Mapping[str, Any], seed: int
    ) -> None:
        """A completion begins: its environment is made, and reset with these columns of its row.

        environment: one of the :class:`ToolSet`'s. Raises :class:`ToolError` for columns that no
        process can be sent.
        """
        if environment not in self._tools.environments:
            raise ValueError(f"no environment {environment!r} in {self._tools.environments}")
        if key in self._completions:
            raise ValueError(f"{key!r} is open")
        columns = dict(reset)
        try:
            pickle.dumps(columns)
        except Exception as error:  # pickle raises what the values' own classes raise
            raise ToolError(
                f"reset runs in a process of its own, to which the columns {', '.join(columns)} "
                f"cannot be sent: {reason(error)}. Leave such columns out of the data"
            ) from error
        self._completions[key] = Completion(environment)
        self._add(Job(key, ("reset", environment, columns, seed)))

    def observations(self, keys: Iterable[Hashable]) -> list[str | list[Any] | None]:
        """The answers of ``reset`` of their environments, waited for; once for each :meth:`open`.

        Raises :class:`ToolError` if one failed.
        """
        answers = []
        for key, job in self._outcomes(keys).items():
            if job.failure:
                raise ToolError(f"reset of {self._who(key)} failed: {job.failure}")
            answers.append(job.answer)
        return answers

    def call(self, key: Hashable, calls: Sequence[ToolCall], seed: int) -> None:
        """Begin the calls of one turn: sync tools in order, then async ones side by side."""
        if not calls:
            raise ValueError("no calls")
        if self._tools.environments and key not in self._completions:
            raise ValueError(f"{key!r} is not open")
        self._completions.setdefault(key, Completion())
        plain = [(call.name, call.arguments) for call in calls]
        request = ("call", plain, seed, self._timeout, self._limit)
        self._add(Job(key, request, tuple(calls)))

    def results(self, *, wait: bool) -> list[tuple[Hashable, list[ToolResult]]]:
        """The turns that are done, in that order: key, and a result for each of its calls.

        wait: until there is one, if any has begun. Raises :class:`ToolError` where a tool failed
        and ``on_error`` is ``"halt"``.
        """
        self._advance(0.0)
        while wait and not self._done and self._is_calling():
            self._advance(0.5)
        done = []
        while self._done:
            job = self._done.popleft()
            self._completions[job.key].job = None
            if not self._tools.environments:
                del self._completions[job.key]
            if self._halts and job.errors:
                raise job.halt()
            done.append((job.key, [job.results[index] for index in range(len(job.calls))]))
        return done

    def rewards(self, keys: Sequence[Hashable]) -> Reply:
        """The answers of ``get_reward`` of their environments, waited for.

        NaN where it returned None, where there is none, and where the environment's process has
        ended in the course of the completion. ``failures`` has those that raised, hung, died or
        returned no reward.
        """
        start = time.perf_counter()
        reply = Reply([math.nan] * len(keys))
        rewarding = [
            key
            for key in keys
            if self._tools.reward_name(self._completions[key].environment) is not None
        ]
        jobs = self._asked(rewarding, "reward")
        for index, key in enumerate(keys):
            job = jobs.get(key)
            if job is not None and job.failure:
                reply.failures[index] = job.failure
            elif job is not None:
                reply.values[index] = job.answer
        reply.seconds = time.perf_counter() - start
        return reply

    def environments(self, keys: Sequence[Hashable]) -> list[Any]:
        """Copies of the environments as they are now, None for one whose process has ended.

        They are unpickled, so that code of their classes runs in this process. Raises
        :class:`ToolError` where they cannot be pickled here or there.
        """
        copies: dict[Hashable, Any] = dict.fromkeys(keys)
        for key, job in self._asked(keys, "copy").items():
            try:
                if job.failure:
                    raise ValueError(job.failure)
                copies[key] = pickle.loads(job.answer)
            except Exception as error:  # classes that are not there, or whose __setstate__ raises
                raise ToolError(
                    f"{self._who(key)} cannot be handed to a reward function, for which it is "
                    f"copied from its process: {reason(error)}. Give it a method get_reward, which "
                    "runs there, or a __getstate__ that leaves out what cannot be copied"
                ) from error
        return [copies[key] for key in keys]

    def close_key(self, key: Hashable) -> None:
        """A completion is over: its process is ended, what it is doing forgotten."""
        completion = self._completions.get(key)
        if completion is None:
            return
        self._waiting = deque(job for job in self._waiting if job.key != key)
        self._done = deque(job for job in self._done if job.key != key)
        self._release(completion)
        del self._completions[key]
        self._begin_waiting()

    def close(self) -> None:
        """End all processes."""
        for completion in list(self._processes.values()):
            self._release(completion)
        self._completions.clear()
        self._waiting.clear()
        self._done.clear()
        self._selector.close()
        self._nursery.close()

    def __enter__(self) -> ToolProcesses:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _who(self, key: Hashable) -> str:
        name = self._completions[key].environment
        return "the environment" if name is None else f"environment {name!r}"

    def _is_calling(self) -> bool:
        return any(job.calls for job in (*self._working.values(), *self._waiting))

    def _add(self, job: Job) -> None:
        completion = self._completions[job.key]
        if completion.job is not None:
            raise ValueError(f"{job.key!r} is busy, or what came of it has not been asked for")
        completion.job = job
        self._waiting.append(job)
        self._begin_waiting()

    def _asked(self, keys: Sequence[Hashable], what: str) -> dict[Hashable, Job]:
        """Have something done for each completion whose process was there to begin with it."""
        for key in keys:
            self._add(Job(key, (what,)))
        jobs = self._outcomes(keys)
        return {key: job for key, job in jobs.items() if job.begun is not None}

    def _outcomes(self, keys: Iterable[Hashable]) -> dict[Hashable, Job]:
        """The jobs for these keys, once they are over."""
        jobs = {}
        for key in keys:
            job = self._completions[key].job
            if job is None or job.calls:
                raise ValueError(f"nothing was begun for {key!r}")
            jobs[key] = job
        while not all(job.over for job in jobs.values()):
            self._advance(0.5)
        for key in jobs:
            self._completions[key].job = None
        return jobs

    def _begin_waiting(self) -> None:
        while self._waiting and len(self._working) < self._at_once:
            job = self._waiting.popleft()
            completion = self._completions[job.key]
            if completion.death:
                self._over(completion, f"its process is no more: {completion.death}")
            else:
                self._begin(completion, job)

    def _begin(self, completion: Completion, job: Job) -> None:
        if completion.requests is None:
            self._started += 1
            completion.number = self._started
            completion.requests = Requests(self._nursery.fork(completion.number))
            self._processes[completion.number] = completion
        job.deadline = time.monotonic() + _START_SECONDS
        self._working[completion.number] = job
        self._selector.register(completion.requests.connection, selectors.EVENT_READ, completion)
        completion.requests.send(pickle.dumps(job.request))

    def _advance(self, seconds: float) -> None:
        """Take in what has come; wait for it for at most so long."""
        if seconds:
            self._check_interrupt()
            nearest = min((job.deadline for job in self._working.values()), default=math.inf)
            seconds = max(0.0, min(seconds, nearest - time.monotonic()))
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                for number, how in self._nursery.notices():
                    self._ended(number, how)
            elif key.data.number in self._working:  # else it ended with one before it
                self._hear(key.data)
        now = time.monotonic()
        for number, job in list(self._working.items()):
            if now >= job.deadline:
                self._too_late(self._processes[number], job)
        if self._nursery.is_gone:
            self._replace_nursery()
        self._begin_waiting()

    def _hear(self, completion: Completion) -> None:
        """Take in all that a process at work has said."""
        requests, job = completion.requests, completion.job
        assert requests is not None and job is not None  # it is at work
        while True:
            try:
                answer = requests.receive()
                if answer is not None:
                    self._take(completion, job, answer)
            except EOFError:
                # The nursery may say how it ended.
                completion.closed = True
                self._selector.unregister(requests.connection)
                job.deadline = min(job.deadline, time.monotonic() + GRACE_SECONDS)
                return
            except GarbledReply:
                self._lost(completion, "it wrote something else than answers to the trainer's pipe")
                return
            if job.over or not requests.connection.poll(0):
                return

    def _take(self, completion: Completion, job: Job, answer: tuple[Any, ...]) -> None:
        now = time.monotonic()
        match answer:
            case ("began", tuple() as begun, bool() as side_by_side):
                job.begun = begun
                # Those keep their deadline themselves, so that one that is late ends no other.
                grace = GRACE_SECONDS if side_by_side else 0.0
                job.deadline = math.inf if self._timeout is None else now + self._timeout + grace
            case (
                "result",
                int() as index,
                str() as content,
                bool() as failed,
                str() as trace,
                str() as listed,
            ) if 0 <= index < len(job.calls) and index not in job.results:
                name, value = job.calls[index].name, _list_of(listed)
                job.results[index] = ToolResult(name, content, failed, value)
                if trace:
                    job.errors.append((index, trace))
                if job.is_between:
                    job.deadline = now + _START_SECONDS
            case ("done",) if len(job.results) == len(job.calls):
                self._over(completion)
            case ("failed", str() as text, str() as trace):
                self._over(completion, f"{text}\n{trace}".strip())
            case (kind, value) if kind == _ANSWERS.get(job.request[0]):
                job.answer = value
                self._over(completion)
            case _:
                raise GarbledReply

    def _ended(self, number: int, how: int | str) -> None:
        """A process has ended by itself; what it said before still counts."""
        completion = self._processes.get(number)
        if completion is None:
            return
        if number in self._working and not completion.closed:
            self._hear(completion)
        if number in self._processes:
            in_words = how if isinstance(how, str) else f"it died: {death_in_words(how)}"
            self._lost(completion, in_words)

    def _too_late(self, completion: Completion, job: Job) -> None:
        if completion.closed:
            self._lost(completion, death_in_words(None))
        elif job.is_between:
            self._lost(completion, f"its process said nothing for {_START_SECONDS:g} seconds")
        else:
            self._lost(
                completion,
                f"it took more than {self._timeout:g} seconds (tool_timeout), and its process was "
                "ended",
            )

    def _lost(self, completion: Completion, why: str) -> None:
        """The process of a completion is no more, or of no use."""
        completion.death = why
        self._release(completion)
        if completion.job is not None and not completion.job.over:
            self._over(completion, why)

    def _over(self, completion: Completion, failure: str = "") -> None:
        job = completion.job
        assert job is not None
        self._rest(completion)
        job.end(failure, self._limit)
        if job.calls:
            self._done.append(job)
            if not self._tools.environments:
                self._release(completion)

    def _rest(self, completion: Completion) -> None:
        """Listen no more to a process that was at work."""
        if self._working.pop(completion.number, None) and not completion.closed:
            assert completion.requests is not None  # it was at work
            self._selector.unregister(completion.requests.connection)

    def _release(self, completion: Completion) -> None:
        """End the process of a completion, if it has one."""
        if completion.requests is None:
            return
        self._rest(completion)
        completion.requests.connection.close()
        completion.requests = None
        del self._processes[completion.number]
        self._nursery.end(completion.number)

    def _start_nursery(self) -> None:
        self._nursery = Nursery(self._tools, self._check_interrupt)
        self._selector.register(self._nursery.connection, selectors.EVENT_READ)

    def _replace_nursery(self) -> None:
        for completion in list(self._processes.values()):
            self._lost(completion, "the process that it was forked from died")
        self._selector.unregister(self._nursery.connection)
        self._nursery.close()
        self._start_nursery()


def _list_of(text: str) -> list[Any] | None:
    """The list that a tool returned, from JSON; None where it returned none."""
    try:
        found = json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise GarbledReply from error
    if found is not None and (not isinstance(found, list) or is_deep(found)):
        raise GarbledReply
    return found
