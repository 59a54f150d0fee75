"""inline: where callables run."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from fusedgrpo.engine.rewards.call import Batch, CallFailed, RewardCall
from fusedgrpo.engine.rewards.inline import Concurrent, EventLoop, Inline

BATCH = Batch(["p"], ["c"], [[0]], {}, None, [0])


def test_sync_callables_run_in_the_calling_thread() -> None:
    def here(**kwargs: Any) -> list[bool]:
        return [threading.current_thread() is threading.main_thread()]

    scorer = Inline(RewardCall(here))
    scorer.start(BATCH)
    assert scorer.finish().values == [1.0]


def test_async_callables_meet_in_one_loop_for_the_whole_run() -> None:
    loops = set()
    arrived = []

    async def waits_for_the_other(**kwargs: Any) -> list[float]:
        loops.add(id(asyncio.get_running_loop()))
        arrived.append(None)
        while len(arrived) % 2:
            await asyncio.sleep(0.001)
        return [1.0]

    loop = EventLoop()
    scorers = [Concurrent(RewardCall(waits_for_the_other), loop) for _ in range(2)]

    async def notebook() -> None:  # has a loop running in this thread
        for _ in range(2):
            for scorer in scorers:
                scorer.start(BATCH)
            assert [scorer.finish().values for scorer in scorers] == [[1.0], [1.0]]

    asyncio.run(notebook())
    threads = threading.active_count()
    for scorer in scorers:
        scorer.close()
    assert len(loops) == 1 and threading.active_count() == threads - 1


def test_a_failing_async_callable_is_a_failed_call() -> None:
    async def broken(**kwargs: Any) -> list[float]:
        raise OSError("judge is down")

    scorer = Concurrent(RewardCall(broken), EventLoop())
    scorer.start(BATCH)
    with pytest.raises(CallFailed, match="OSError: judge is down"):
        scorer.finish()
    scorer.close()


def test_an_async_callable_has_a_deadline_too() -> None:
    async def slow(completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(60 if completions == ["slow"] else 0)
        return [1.0] * len(completions)

    loop = EventLoop()
    scorer = Concurrent(RewardCall(slow), loop, timeout=0.2)
    scorer.start(replace(BATCH, completions=["slow"]))
    with pytest.raises(CallFailed, match=r"more than 0\.2 seconds") as caught:
        scorer.finish()
    assert not caught.value.repeatable
    scorer = Concurrent(RewardCall(slow), loop)  # which is free again
    scorer.start(BATCH)
    assert scorer.finish().values == [1.0]
    scorer.close()
