"""Worker: deadlines, deaths and leftovers of the reward process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from patience import HUNG

from fusedgrpo.engine.rewards.call import Batch, CallFailed
from fusedgrpo.engine.rewards.spec import locate
from fusedgrpo.engine.rewards.worker import Worker
from fusedgrpo.errors import RewardError

REWARDS = """
import asyncio, os, re, signal, subprocess, sys, threading, time

def length(completions, **kwargs):
    return [len(c) for c in completions]

def pid(completions, **kwargs):
    return [os.getpid() % 100_000] * len(completions)

def has_torch(completions, **kwargs):
    return ["torch" in sys.modules] * len(completions)

def hang(completions, **kwargs):
    if completions[0] == "hang":
        while True:
            time.sleep(1)
    return [1.0] * len(completions)

def backtrack(completions, **kwargs):
    return [bool(re.match(r"(a+)+$", c)) for c in completions]

def child(completions, log_metric, **kwargs):
    process = subprocess.Popen(["sleep", "10000"])
    log_metric("pid", process.pid)
    if completions[0] == "hang":
        time.sleep(10_000)
    return [process.pid % 100_000] * len(completions)

def exits(completions, **kwargs):
    if completions[0] == "exit":
        os._exit(7)
    if completions[0] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if completions[0] == "sys":
        sys.exit(0)
    return [1.0] * len(completions)

def alarm(completions, **kwargs):
    def stop(*args):
        raise TimeoutError
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(10_000)
    except TimeoutError:
        return [float(threading.current_thread() is threading.main_thread())] * len(completions)

_loops = set()

async def late(completions, **kwargs):
    _loops.add(id(asyncio.get_running_loop()))
    await asyncio.sleep(0.01)
    return [len(_loops)] * len(completions)

def talks(completions, **kwargs):
    print("hello from the reward")
    return [sys.stdin.read() == ""] * len(completions)

def state(completions, trainer_state, **kwargs):
    return [trainer_state.global_step] * len(completions)

def raises(completions, **kwargs):
    return [int(c) for c in completions]

def forks(completions, **kwargs):
    os.fork()
    return [float(len(c)) for c in completions]

def pipe():
    for name in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{name}"):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket"):
                yield int(name)

def writes(completions, **kwargs):
    from multiprocessing.connection import Connection
    import pickle
    said = completions[0]
    for fd in pipe():
        if said == "text":
            os.write(fd, b"how did I get here")
        elif said == "close":
            os.close(fd)
        elif said != "nothing":
            connection = Connection(fd)
            connection.send_bytes({
                "late": (1).to_bytes(8, "big") + pickle.dumps(("reply", "an old one")),
                "early": (99).to_bytes(8, "big") + pickle.dumps(("reply", "a new one")),
                "short": b"1",
                "no pickle": (2).to_bytes(8, "big") + b"not a pickle",
                "code": (2).to_bytes(8, "big") + pickle.dumps(("reply", Touch())),
            }[said])
            connection._handle = None  # else it is closed with this object
    return [float(len(c)) for c in completions]

class Touch:
    def __reduce__(self):
        return open, ("touched", "w")
"""

Make = Callable[..., Worker]


def batch(*completions: str, state: Any = None, **columns: list[Any]) -> Batch:
    count = len(completions)
    ids = [[0]] * count
    return Batch(["p"] * count, list(completions), ids, columns, state, list(range(count)))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    (tmp_path / "worker_rewards.py").write_text(REWARDS)
    workers: list[Worker] = []

    def worker(name: str, timeout: float | None = HUNG) -> Worker:
        source = locate(f"worker_rewards:{name}", [tmp_path])
        workers.append(Worker(source, {}, folders=[tmp_path], timeout=timeout))
        workers[-1].ready()
        return workers[-1]

    yield worker
    for each in workers:
        each.close()


def score(worker: Worker, *completions: str, **given: Any) -> list[float]:
    worker.start(batch(*completions, **given))
    return worker.finish().values


def gone(pid: int) -> bool:
    """Whether a process is dead (a zombie that nobody reaps is)."""
    end = time.monotonic() + HUNG
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def over_in_the_end(worker: Worker) -> bool:
    end = time.monotonic() + HUNG
    while not worker.over() and time.monotonic() < end:
        time.sleep(0.01)
    return worker.over()


def test_over_says_that_nobody_waits(make: Make) -> None:
    worker = make("hang")
    worker.start(batch("fine"))
    assert over_in_the_end(worker) and worker.finish().values == [1.0]
    worker.start(batch("hang"))
    assert not worker.over()
    worker._deadline = 0.0  # the time is up
    assert worker.over()
    with pytest.raises(CallFailed, match="reward_timeout"):
        worker.finish()
    dead = make("exits")
    dead.start(batch("kill"))
    assert over_in_the_end(dead)
    with pytest.raises(CallFailed, match="its process died"):
        dead.finish()
    assert dead.over()


def test_scores_in_another_process_without_torch(make: Make) -> None:
    worker = make("length")
    assert worker.name == "length"
    assert score(worker, "a", "bcd") == [1.0, 3.0]
    assert score(worker) == []
    assert score(make("pid"), "a") != [os.getpid() % 100_000]
    assert score(make("has_torch"), "a") == [0.0]


def test_large_batches_pass_the_pipe(make: Make) -> None:
    assert score(make("length"), "x" * 900_000, "y") == [900_000.0, 1.0]


@pytest.mark.parametrize(("name", "text"), [("hang", "hang"), ("backtrack", "a" * 40 + "!")])
def test_a_hanging_function_is_killed_and_replaced(name: str, text: str, make: Make) -> None:
    worker = make(name)
    first = worker._child.process.pid
    worker._timeout = 0.5
    with pytest.raises(CallFailed, match=r"took more than 0\.5 seconds") as caught:
        score(worker, text)
    assert not caught.value.repeatable and gone(first)
    worker._timeout = HUNG
    assert score(worker, "aaa") == [1.0]
    assert worker._child.process.pid != first


@pytest.mark.parametrize(
    ("text", "told"),
    [("exit", "exit code 7"), ("kill", "signal 9 .*memory"), ("sys", "SystemExit: 0")],
)
def test_a_dying_function_is_reported_and_replaced(text: str, told: str, make: Make) -> None:
    worker = make("exits")
    with pytest.raises(CallFailed, match=told):
        score(worker, text)
    assert score(worker, "fine") == [1.0]


def test_a_worker_that_died_between_batches_is_replaced(make: Make) -> None:
    worker = make("length")
    os.kill(worker._child.process.pid, signal.SIGKILL)
    assert gone(worker._child.process.pid)
    assert score(worker, "ab") == [2.0]


def test_an_interrupted_batch_leaves_no_answer_for_the_next(make: Make) -> None:
    worker = make("length")
    worker.start(batch("abc"))  # never finished
    assert score(worker, "a") == [1.0]


def test_alarms_work_and_async_functions_keep_their_loop(make: Make) -> None:
    assert score(make("alarm"), "a") == [1.0]
    worker = make("late")
    assert [score(worker, "a"), score(worker, "a")] == [[1.0], [1.0]]


def test_prints_do_not_disturb_the_pipe(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    assert score(make("talks"), "a") == [1.0]
    assert "hello from the reward" in capfd.readouterr().out


def test_exceptions_come_with_their_place_and_traceback(make: Make) -> None:
    worker = make("raises")
    with pytest.raises(CallFailed, match=r"ValueError: .*'x'.*worker_rewards.py:\d+") as caught:
        score(worker, "1", "x")
    assert caught.value.repeatable and "return [int(c)" in caught.value.details
    assert score(worker, "1", "2") == [1.0, 2.0]


def test_refused_answers_come_back_as_reward_errors(make: Make) -> None:
    with pytest.raises(RewardError, match="'length' returned 2000000 for completion 0"):
        score(make("length"), "x" * 2_000_000)


class Unsendable:
    def __reduce__(self) -> Any:
        raise TypeError("not me")


def test_columns_that_the_worker_cannot_rebuild_are_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("only_here")
    exec("class Thing: pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    worker = make("length")
    with pytest.raises(RewardError, match=r"cannot be rebuilt.*No module named 'only_here'"):
        score(worker, "a", image=[module.Thing()])
    assert score(worker, "a") == [1.0]


def test_an_unsendable_column_is_named(make: Make) -> None:
    with pytest.raises(RewardError, match="data column 'image' cannot be sent"):
        score(make("length"), "a", other=[1], image=[Unsendable()])


def test_the_scalars_of_the_trainer_state_are_there(make: Make) -> None:
    class State:
        def __init__(self) -> None:
            self.global_step = 3
            self.lock = Unsendable()

    worker = make("state")
    assert score(worker, "a", state=State()) == [3.0]
    assert score(worker, "a", state=SimpleNamespace(global_step=4)) == [4.0]
    assert score(worker, "a", state={"global_step": 5}) == [5.0]


def test_what_cannot_be_loaded_fails_at_once(make: Make) -> None:
    with pytest.raises(RewardError, match="has no 'nothing'"):
        make("nothing")


def test_loading_has_a_deadline(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(10_000)")
    worker = Worker(locate("slow:f", [tmp_path]), {}, folders=[tmp_path], timeout=0.5)
    with pytest.raises(RewardError, match=r"'slow:f': loading it took more than 0.5 seconds"):
        worker.ready()
    assert gone(worker._child.process.pid)


def test_close_reaps_the_worker_and_what_it_started(make: Make) -> None:
    worker = make("child")
    worker.start(batch("a"))
    grandchild = int(worker.finish().metrics["pid"][0])
    pid = worker._child.process.pid
    worker.close()
    worker.close()
    assert worker._child.process.returncode == 0
    assert gone(pid) and gone(grandchild)


def test_close_does_not_wait_for_a_busy_worker(make: Make) -> None:
    worker = make("hang")
    worker.start(batch("hang"))
    worker.close()  # else this test ends by its timeout
    assert gone(worker._child.process.pid)


PARENT = """
import os, sys, time
from pathlib import Path
from fusedgrpo.engine.rewards.call import Batch
from fusedgrpo.engine.rewards.spec import locate
from fusedgrpo.engine.rewards.worker import Worker

folder, how = Path(sys.argv[1]), sys.argv[2]
worker = Worker(locate("worker_rewards:hang", [folder]), {}, folders=[folder], timeout=None)
worker.ready()
print(worker._child.process.pid, flush=True)
if how.startswith("busy"):
    worker.start(Batch(["p"], ["hang"], [[0]], {}, None, [0]))
    time.sleep(0.3)
if how.endswith("raise"):
    raise SystemExit("out")
print("on", flush=True)
time.sleep(10_000)
"""


@pytest.mark.parametrize("how", ["idle raise", "busy raise", "idle kill", "busy kill", "busy term"])
def test_the_worker_never_outlives_its_trainer(how: str, make: Make, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    if not how.endswith("raise"):
        assert parent.stdout.readline() == "on\n"
        parent.send_signal(signal.SIGTERM if how.endswith("term") else signal.SIGKILL)
    parent.wait(HUNG)
    assert gone(worker)
    parent.stdout.close()


def test_what_the_poll_raises_ends_a_function_that_hangs(tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def poll() -> None:
        if started:
            raise Stop

    started: list[bool] = []
    (tmp_path / "worker_rewards.py").write_text(REWARDS)
    source = locate("worker_rewards:hang", [tmp_path])
    worker = Worker(source, {}, folders=[tmp_path], timeout=None, check_interrupt=poll)
    worker.ready()
    worker.start(batch("hang"))
    started.append(True)
    with pytest.raises(Stop):
        worker.finish()
    assert gone(worker._child.process.pid)
    started.clear()
    assert score(worker, "fine") == [1.0]
    worker.close()


def test_a_function_that_forks_answers_once(make: Make) -> None:
    worker = make("forks")
    assert [score(worker, "x" * n) for n in range(6)] == [[float(n)] for n in range(6)]


def test_an_answer_to_an_earlier_request_is_no_answer(make: Make) -> None:
    worker = make("writes")
    assert score(worker, "late") == [4.0]
    assert score(worker, "nothing") == [7.0]


@pytest.mark.parametrize("what", ["early", "short", "no pickle", "code", "text", "close"])
def test_what_is_written_into_the_pipe_is_no_answer(
    what: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    worker = make("writes")
    with pytest.raises(CallFailed, match=r"pipe|died") as caught:
        score(worker, what)
    assert not caught.value.repeatable and not (tmp_path / "touched").exists()
    assert score(worker, "nothing") == [7.0]


def test_no_file_beside_a_reward_is_taken_for_a_library(tmp_path: Path) -> None:
    """random.py is a reward where it is asked for by name, and nothing else; its neighbours are
    nearer to it than those of the configuration."""
    folder, config = tmp_path / "rewards", tmp_path / "config"
    folder.mkdir(), config.mkdir()
    for name in ("random", "json", "numpy"):
        text = f"from helper import VALUE\ndef score(completions, **k): return [VALUE]\n{LIBRARIES}"
        (folder / f"{name}.py").write_text(text)
        (config / f"{name}.py").write_text("raise SystemExit('taken for a library')")
    (folder / "helper.py").write_text("VALUE = 1")
    (config / "helper.py").write_text("VALUE = 2")
    (config / "shape.py").write_text(
        "from helper import VALUE\ndef f(completions, **k): return [VALUE]"
    )
    for name, value in (
        (f"{folder}/random.py:score", 1.0),
        (f"{folder}/json.py:score", 1.0),
        (f"{folder}/numpy.py:score", 1.0),
        ("shape:f", 2.0),
        ("format", 0.0),
    ):
        worker = Worker(locate(name, [config]), {}, folders=[config], timeout=HUNG)
        worker.ready()
        assert score(worker, "a") == [value]
        worker.close()


LIBRARIES = """
import json, random, numpy
assert json.dumps and random.random and numpy.zeros
"""
