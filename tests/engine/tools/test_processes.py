"""ToolProcesses: whatever tools and environments do, the policy is answered, the run goes on."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import HUNG

from fusedgrpo.engine.tools.processes import ToolProcesses
from fusedgrpo.engine.tools.spec import ToolSet, build_tools
from fusedgrpo.engine.tools.types import ToolCall, ToolResult
from fusedgrpo.errors import ToolError

TOOLS = '''
import asyncio, os, pickle, random, signal, subprocess, sys, time
from pathlib import Path

def tool(function):
    function.__doc__ = function.__name__ + "\\n\\nArgs:\\n    how: in which way\\n"
    return function

calls = 0

@tool
def plain(how: str = ""):
    global calls
    calls += 1
    return f"{how} {calls}"

@tool
def pids(how: str):
    group = subprocess.Popen(["sleep", "10000"])
    own = subprocess.Popen(["sleep", "10000"], start_new_session=True)
    Path(how).write_text(f"{os.getpid()} {group.pid} {own.pid}")
    if how.endswith("hang"):
        time.sleep(10_000)
    if how.endswith("exit"):
        os._exit(6)
    return "done"

@tool
def returns(how: str):
    return {"none": None, "number": 3, "list": [1, "a"], "long": "x" * 3_000_000,
            "rows": [(1, "a"), (2, None)], "parts": [text("seen "), text("twice")],
            "image": [text("seen"), {"type": "image", "image": "x"}], "sets": [{1}],
            "kinds": [{"type": "dog"}], "cut": ["a\\ud800b"], "nan": [float("nan")],
            "many": list(range(1000)), "half": "a\\ud800b", "kind": Text("text"),
            "bad": Bad(), "exit": Exits()}[how]

def text(said):
    return {"type": "text", "text": said}

@tool
async def returns_later(how: str):
    return returns(how)

class Text(str):
    pass

class Bad:
    def __str__(self):
        raise RuntimeError("no text")

class Exits:
    def __str__(self):
        sys.exit("out")

class BadError(Exception):
    def __str__(self):
        raise RuntimeError

@tool
def fails(how: str):
    if how == "raise":
        raise ValueError("unlucky\\nnumber")
    if how == "long":
        raise ValueError("x" * 3_000_000)
    if how == "bad":
        raise BadError
    if how == "sys":
        sys.exit(3)
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "base":
        raise BaseException("base")
    if how == "stop":
        raise StopIteration
    if how == "deep":
        return fails(how)
    if how == "exit":
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        while True:
            time.sleep(1)
    if how == "close":
        os.closerange(0, 1000)
    if how == "mute":
        os.close(1), os.close(2)
    if how == "fork":
        os.fork()
    if how == "stop self":
        os.kill(os.getpid(), signal.SIGSTOP)
    return "fine"

@tool
def forks(how: str):
    os.fork()
    return how

def sockets():
    for name in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{name}"):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket"):
                yield int(name)

@tool
def writes(how: str):
    from multiprocessing.connection import Connection
    number = (1).to_bytes(8, "big")
    message = {
        "early": (99).to_bytes(8, "big") + pickle.dumps(("done",)),
        "short": b"1",
        "no pickle": number + b"not a pickle",
        "code": number + pickle.dumps(("result", 0, Touch(), False, "", "")),
        "no tuple": number + pickle.dumps("done"),
        "done": number + pickle.dumps(("done",)),
        "index": number + pickle.dumps(("result", 7, "x", False, "", "")),
        "value": number + pickle.dumps(("result", 0, "x", False, "", "[" * 2000)),
        "kind": number + pickle.dumps(("copy", b"x")),
        "none": b"",
        "text": b"",
    }[how]
    for fd in sockets():
        if how == "text":
            os.write(fd, b"how did I get here")
        elif message:
            connection = Connection(fd)
            connection.send_bytes(message)
            connection._handle = None  # else it is closed with this object
    return how

class Touch:
    def __reduce__(self):
        return open, ("touched", "w")

@tool
def prints(how: str):
    if how == "flood":
        for _ in range(20_000):
            print("all work and no play " * 5)
    print("last words", flush=True)
    return "said"

@tool
def draws(how: str):
    import numpy
    return f"{random.random()} {numpy.random.random()}"

@tool
def torchless(how: str):
    return "torch" in sys.modules

@tool
def stays(how: str):
    Path(how, str(os.getpid())).touch()
    while not Path(how, "go").exists():
        time.sleep(0.02)

met = None

@tool
async def meets(how: str):
    global met
    met = met or asyncio.Event()
    if how == "second":
        met.set()
    await met.wait()
    return how

@tool
async def late(how: str):
    if how == "raise":
        raise ValueError("late")
    if how == "exit":
        sys.exit(1)
    if how == "cancel":
        raise asyncio.CancelledError
    if how == "cancel self":
        asyncio.current_task().cancel()
    if how == "deaf":
        while True:
            try:
                await asyncio.sleep(10_000)
            except asyncio.CancelledError:
                pass
    if how == "stubborn":
        try:
            await asyncio.sleep(10_000)
        except asyncio.CancelledError:
            return "sorry"
    if how == "block":
        time.sleep(10_000)
    await asyncio.sleep(10_000 if how == "hang" else 0)
    return how

@tool
def coroutine(how: str):
    return late(how)

ALL = [value for value in list(globals().values()) if getattr(value, "__doc__", None)
       and getattr(value, "__module__", "") == __name__ and hasattr(value, "__code__")]

class Env:
    def reset(self, start=0, how="", **columns):
        self.count, self.how, self.first = start, how, random.random()
        if how == "raise":
            raise ValueError("no start")
        if how == "hang":
            time.sleep(10_000)
        if how == "die":
            os._exit(4)
        return {"list": [{"type": "text", "text": "a"}], "set": {1}, "none": None,
                "half": "\\ud800"}.get(how, f"at {start}")

    def move(self, by: int) -> str:
        """Moves.

        Args:
            by: how far
        """
        self.count += by
        return f"{self.count}"

    async def wait(self, how: str):
        """Waits.

        Args:
            how: in which way
        """
        await late(how)
        self.count += 100
        return self.count

    def chance(self):
        """Draws."""
        return random.random()

    def breaks(self, how: str):
        """Breaks.

        Args:
            how: in which way
        """
        return fails(how)

    def get_reward(self):
        if self.how == "reward raises":
            raise ValueError("no reward")
        if self.how == "reward hangs":
            time.sleep(10_000)
        if self.how == "reward dies":
            os._exit(5)
        return {"reward text": "much", "reward nan": float("nan"), "reward none": None,
                "reward much": 1e9}.get(self.how, self.count)

    def __getstate__(self):
        if self.how == "locked":
            raise TypeError("a lock")
        return vars(self)

class Async(Env):
    async def get_reward(self):
        await asyncio.sleep(0)
        return -self.count

class Unpaid(Env):
    get_reward = None
'''

Make = Callable[..., ToolProcesses]


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    """The tools, in a module that no other process can import."""
    made = ModuleType("tools_of_processes_test")
    sys.modules[made.__name__] = made
    exec(TOOLS, made.__dict__)
    yield made
    del sys.modules[made.__name__]


@pytest.fixture(scope="module")
def tools(module: ModuleType) -> ToolSet:
    made = build_tools(module.ALL, None, [])
    assert made is not None
    return made


@pytest.fixture(scope="module")
def worlds(module: ModuleType) -> ToolSet:
    names = {"env": module.Env, "async": module.Async, "unpaid": module.Unpaid}
    made = build_tools([module.plain, module.fails], names, [])
    assert made is not None
    return made


def start(tools: ToolSet, **options: Any) -> ToolProcesses:
    return ToolProcesses(tools, **{"timeout": HUNG, "output_limit": 1000, **options})


@pytest.fixture(scope="module")
def shared(tools: ToolSet) -> Iterator[ToolProcesses]:
    with start(tools) as processes:
        yield processes


@pytest.fixture(scope="module")
def world(worlds: ToolSet) -> Iterator[ToolProcesses]:
    with start(worlds) as processes:
        yield processes


def answers(
    processes: ToolProcesses, calls: list[tuple[str, Any]], key: Hashable = 0, seed: int = 0
) -> list[ToolResult]:
    processes.call(key, [ToolCall(*call) for call in calls], seed)
    ((of, results),) = processes.results(wait=True)
    assert of == key and [each.name for each in results] == [name for name, _ in calls]
    return results


def answer(processes: ToolProcesses, name: str, how: str, **given: Any) -> str:
    (result,) = answers(processes, [(name, {"how": how})], **given)
    assert not result.failed, result
    return result.content


def error(processes: ToolProcesses, name: str, how: str, **given: Any) -> str:
    (result,) = answers(processes, [(name, {"how": how})], **given)
    assert result.failed, result
    said = eval(result.content)
    assert list(said) == ["error"]
    return str(said["error"])


def all_of(processes: ToolProcesses) -> dict[Hashable, list[ToolResult]]:
    found: dict[Hashable, list[ToolResult]] = {}
    while some := processes.results(wait=True):
        found.update(some)
    return found


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


def written(path: Path) -> list[int]:
    end = time.monotonic() + HUNG
    while time.monotonic() < end:
        if path.exists() and len(pids := path.read_text().split()) == 3:
            return [int(pid) for pid in pids]
        time.sleep(0.02)
    raise AssertionError("nothing was written")


def test_answers_come_in_the_order_of_the_calls(shared: ToolProcesses) -> None:
    assert shared.results(wait=True) == []  # nothing to wait for
    results = answers(shared, [("late", {"how": "a"}), ("plain", {"how": "b"}), ("plain", {})])
    assert [each.content for each in results] == ["a", "b 1", " 2"]
    assert not any(each.failed for each in results)


def test_state_is_of_one_turn_of_one_completion(shared: ToolProcesses) -> None:
    for key in range(3):
        assert answer(shared, "plain", "x", key=key) == "x 1"
    assert answer(shared, "torchless", "") == "False"


@pytest.mark.parametrize(
    ("how", "content"),
    [("none", "None"), ("number", "3"), ("list", "[1, 'a']"), ("half", "a?b"), ("kind", "text")],
)
def test_an_answer_is_its_text(how: str, content: str, shared: ToolProcesses) -> None:
    assert answer(shared, "returns", how) == content


@pytest.mark.parametrize("name", ["returns", "returns_later"])
def test_a_list_is_a_list_for_rewards(name: str, shared: ToolProcesses) -> None:
    """As with TRL; the policy reads its text, and only the text of parts of content."""
    known = {
        "list": ("[1, 'a']", [1, "a"]),
        "rows": ("[(1, 'a'), (2, None)]", [[1, "a"], [2, None]]),
        "parts": ("seen twice", [{"type": "text", "text": t} for t in ("seen ", "twice")]),
        "kinds": ("[{'type': 'dog'}]", [{"type": "dog"}]),
        "cut": ("['a\\ud800b']", ["a?b"]),
        "nan": ("[nan]", None),
        "sets": ("[{1}]", None),
        "none": ("None", None),
    }
    found = answers(shared, [(name, {"how": how}) for how in (*known, "many", "image")])
    assert [(each.content, each.value) for each in found[: len(known)]] == list(known.values())
    many, image = found[len(known) :]
    assert many.value is None and "more characters were cut" in many.content
    assert image.failed and image.value is None and "the policy reads text alone" in image.content


def test_long_answers_are_cut_and_say_so(shared: ToolProcesses) -> None:
    content = answer(shared, "returns", "long")
    assert content == "x" * 1000 + " ... (2,999,000 more characters were cut)"


@pytest.mark.parametrize(
    ("name", "how", "told"),
    [
        ("fails", "raise", "ValueError: unlucky number"),
        ("fails", "long", "ValueError: x"),
        ("fails", "bad", "BadError"),
        ("fails", "sys", "SystemExit: 3"),
        ("fails", "interrupt", "KeyboardInterrupt"),
        ("fails", "base", "BaseException: base"),
        ("fails", "stop", "StopIteration"),
        ("fails", "deep", "RecursionError"),
        ("fails", "exit", "died: exit code 7"),
        ("fails", "kill", "died: signal 9"),
        ("fails", "close", "died: exit code 1"),
        ("returns", "bad", "RuntimeError: no text"),
        ("returns", "exit", "SystemExit: out"),
        ("late", "raise", "ValueError: late"),
        ("late", "exit", "SystemExit: 1"),
        ("late", "cancel", "CancelledError"),
        ("late", "cancel self", "CancelledError"),
        ("coroutine", "raise", "ValueError: late"),
    ],
)
def test_whatever_a_tool_does_is_a_message(
    name: str, how: str, told: str, shared: ToolProcesses
) -> None:
    said = error(shared, name, how)
    assert told in said and len(said) < 1100
    assert answer(shared, "plain", "next") == "next 1"


@pytest.mark.parametrize(
    "how",
    ["early", "short", "no pickle", "code", "no tuple", "done", "index", "value", "kind", "text"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="finds the pipe in /proc")
def test_what_is_written_into_the_pipe_is_no_answer(
    how: str, shared: ToolProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "pipe" in error(shared, "writes", how)
    assert not Path("touched").exists()
    assert answer(shared, "writes", "none") == "none"


def test_a_call_after_one_that_ended_the_process_is_not_made(shared: ToolProcesses) -> None:
    results = answers(
        shared,
        [("plain", {"how": "a"}), ("fails", {"how": "exit"}), ("plain", {}), ("late", {"how": ""})],
    )
    assert [each.failed for each in results] == [False, True, True, True]
    assert results[0].content == "a 1" and "exit code 7" in results[1].content
    assert all("not called" in each.content for each in results[2:])


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("plane", {}, "there is no tool 'plane'; there are plain, pids"),
        ("", {}, "there is no tool ''"),
        ("__class__", {}, "there is no tool"),
        ("fails", {}, "missing a required argument: 'how'"),
        ("fails", {"how": "x", "why": 1}, "unexpected keyword argument 'why'"),
        ("fails", ["x"], "expected them by their names"),
        ("fails", None, "expected them by their names"),
        ("fails", {1: 2}, "fails: "),
    ],
)
def test_wrong_calls_are_told_what_is_right(
    name: str, arguments: Any, told: str, shared: ToolProcesses
) -> None:
    (result,) = answers(shared, [(name, arguments)])
    assert result.failed and told in eval(result.content)["error"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["plain", "late", "returns", "draws"]) | st.text(),
        st.dictionaries(st.just("how") | st.text(), JSON) | JSON,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(calls=CALLS)
def test_any_calls_have_an_answer_each(calls: list[tuple[str, Any]], shared: ToolProcesses) -> None:
    for result in answers(shared, calls):
        assert result.failed == ("error" in result.content[:9])
        result.content.encode()


def test_async_tools_of_a_turn_run_side_by_side(shared: ToolProcesses) -> None:
    results = answers(shared, [("meets", {"how": "first"}), ("meets", {"how": "second"})])
    assert [each.content for each in results] == ["first", "second"]


def test_an_async_tool_that_hangs_takes_nothing_with_it(worlds: ToolSet) -> None:
    with start(worlds, timeout=3.0) as processes:
        opened(processes, "")
        hows = ("deaf", "stubborn", "x")
        calls = [*(("wait", {"how": how}) for how in hows), ("move", {"by": 1})]
        results = answers(processes, calls, "k")
        assert [each.failed for each in results] == [True, True, False, False]
        assert all("more than 3 seconds" in each.content for each in results[:2])
        assert results[2].content == "103"
        # The stubborn one ends only now, and is heard no more.
        assert answer(processes, "wait", "x", key="k") == "303"
        assert processes.rewards(["k"]).values == [303.0]


@pytest.mark.parametrize("name", ["fails", "late"])
def test_a_tool_that_hangs_is_killed_at_the_deadline(name: str, tools: ToolSet) -> None:
    with start(tools, timeout=0.3) as processes:
        said = error(processes, name, {"fails": "hang", "late": "block"}[name])
        assert "more than 0.3 seconds (tool_timeout)" in said
        assert "more than 0.3" in error(processes, "fails", "stop self")


def test_a_tool_that_forks_answers_once(shared: ToolProcesses, world: ToolProcesses) -> None:
    assert [answer(shared, "forks", str(n)) for n in range(6)] == [str(n) for n in range(6)]
    opened(world, "")
    assert answer(world, "breaks", "fork", key="k") == "fine"
    for n in range(10):
        assert answers(world, [("move", {"by": 1})], "k")[0].content == str(3 + n)
    world.close_key("k")


def test_a_process_that_dies_takes_along_what_it_started(
    shared: ToolProcesses, tmp_path: Path
) -> None:
    assert "exit code 6" in error(shared, "pids", f"{tmp_path}/exit")
    own, group, escaped = written(tmp_path / "exit")
    assert gone(own) and gone(group)
    os.kill(escaped, signal.SIGKILL)


def test_prints_are_shown_until_they_are_too_many(
    tools: ToolSet, capfd: pytest.CaptureFixture[str]
) -> None:
    with start(tools) as processes:
        assert answer(processes, "prints", "some") == "said"
        assert answer(processes, "prints", "flood") == "said"
    shown = capfd.readouterr()
    assert shown.out == "" and "last words\n" in shown.err
    assert "more that tools printed is not shown" in shown.err and len(shown.err) < 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_closes_its_output_keeps_nobody_busy(world: ToolProcesses) -> None:
    opened(world, "")
    assert answer(world, "breaks", "mute", key="k") == "fine"
    before = _ticks(world)
    time.sleep(1.0)
    assert _ticks(world) - before < os.sysconf("SC_CLK_TCK") / 3
    world.close_key("k")


def _ticks(processes: ToolProcesses) -> int:
    """Processor time of the process that forks."""
    stat = Path(f"/proc/{processes._nursery._child.process.pid}/stat").read_text()
    return sum(map(int, stat.rpartition(")")[2].split()[11:13]))


def test_generators_begin_with_the_seed(shared: ToolProcesses, world: ToolProcesses) -> None:
    drawn = [
        answer(shared, "draws", "", key=key, seed=seed) for key, seed in [(1, 5), (2, 5), (3, 6)]
    ]
    random.seed(5)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == f"{random.random()} {numpy.random.RandomState(5).random_sample()}"
    for key, seed in (("a", 7), ("b", 7), ("c", 8)):
        world.open(key, "env", {}, seed)
    world.observations("abc")
    a, b, c = world.environments("abc")
    assert a.first == b.first != c.first
    chances = [answers(world, [("chance", {})], key, seed=3)[0].content for key in "abc"]
    assert len(set(chances)) == 1
    for key in "abc":
        world.close_key(key)


def test_many_completions_are_all_answered(shared: ToolProcesses) -> None:
    for key in range(200):
        shared.call(key, [ToolCall("plain", {"how": str(key)})], key)
    found = all_of(shared)
    assert {key: result.content for key, (result,) in found.items()} == {
        key: f"{key} 1" for key in range(200)
    }


def test_so_many_work_at_once(tools: ToolSet, tmp_path: Path) -> None:
    with start(tools, at_once=3) as processes:
        for key in range(6):
            processes.call(key, [ToolCall("stays", {"how": str(tmp_path)})], key)
        while len(list(tmp_path.iterdir())) < 3:
            time.sleep(0.02)
        time.sleep(0.5)  # enough for a fourth to come, were it let in
        assert len(list(tmp_path.iterdir())) == 3
        (tmp_path / "go").touch()
        assert len(all_of(processes)) == 6


def test_each_completion_has_its_own_environment(world: ToolProcesses) -> None:
    keys = list(range(30))
    for key in keys:
        world.open(key, "env", {"start": key, "other": None}, key)
    assert world.observations(reversed(keys)) == [f"at {key}" for key in reversed(keys)]
    for turn in (1, 2):
        for key in keys:
            calls = [ToolCall("move", {"by": key}), ToolCall("plain", {"how": "p"})]
            world.call(key, calls, 0)
        found = all_of(world)
        for key in keys:
            assert [each.content for each in found[key]] == [f"{key + turn * key}", f"p {turn}"]
    assert world.rewards(keys).values == [3.0 * key for key in keys]
    assert [env.count for env in world.environments(keys)] == [3 * key for key in keys]
    for key in keys:
        world.close_key(key)


def opened(processes: ToolProcesses, how: str, name: str = "env", key: str = "k") -> Any:
    processes.open(key, name, {"how": how, "start": 2}, 0)
    (observation,) = processes.observations([key])
    return observation


@pytest.mark.parametrize(
    ("how", "observation"),
    [("list", [{"type": "text", "text": "a"}]), ("none", None), ("half", "?"), ("", "at 2")],
)
def test_an_observation_is_what_reset_returned(
    how: str, observation: Any, world: ToolProcesses, module: ModuleType
) -> None:
    assert opened(world, how) == observation
    (copy,) = world.environments(["k"])
    assert type(copy) is module.Env
    world.close_key("k")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise", r"'env' failed: ValueError: no start\nTraceback(.|\n)*in reset"),
        ("die", r"died: exit code 4"),
        ("set", r"reset returned \{1\} \(set\), expected text"),
    ],
)
def test_a_reset_that_fails_ends_the_run(how: str, told: str, world: ToolProcesses) -> None:
    with pytest.raises(ToolError, match=told):
        opened(world, how)
    world.close_key("k")


def test_a_reset_that_hangs_ends_the_run(worlds: ToolSet) -> None:
    with start(worlds, timeout=0.3) as processes, pytest.raises(ToolError, match=r"more than 0\.3"):
        opened(processes, "hang")


@pytest.mark.parametrize(
    ("how", "name", "value", "told"),
    [
        ("", "env", 2.0, ""),
        ("", "async", -2.0, ""),
        ("", "unpaid", None, ""),
        ("reward none", "env", None, ""),
        ("reward raises", "env", None, "ValueError: no reward"),
        ("reward dies", "env", None, "exit code 5"),
        ("reward text", "env", None, "'much' (str), expected a finite number"),
        ("reward nan", "env", None, "nan (float), expected a finite number"),
        ("reward much", "env", None, "1000000000.0 (float), expected a finite number"),
    ],
)
def test_rewards_of_environments(
    how: str, name: str, value: float | None, told: str, world: ToolProcesses
) -> None:
    opened(world, how, name)
    reply = world.rewards(["k"])
    if value is None:
        assert numpy.isnan(reply.values).all()
    else:
        assert reply.values == [value]
    assert (0 in reply.failures) == bool(told) and told in reply.failures.get(0, "")
    world.close_key("k")


def test_large_values_pass_whatever_sockets_are_told(worlds: ToolSet) -> None:
    socket.setdefaulttimeout(0.001)
    try:
        with start(worlds) as processes:
            processes.open("k", "env", {"start": "x" * 3_000_000}, 0)
            assert processes.observations(["k"]) == ["at " + "x" * 3_000_000]
            (copy,) = processes.environments(["k"])
            assert len(copy.count) == 3_000_000
    finally:
        socket.setdefaulttimeout(None)


def test_an_environment_of_a_file_is_copied_with_its_class(tmp_path: Path) -> None:
    (tmp_path / "filed.py").write_text(
        "class Env:\n"
        "    def reset(self, **columns):\n        self.columns = columns\n"
        "    def doubled(self):\n        'Doubles.'\n        return self.columns['a'] * 2\n"
    )
    tools = build_tools(None, "filed.py:Env", [tmp_path])
    assert tools is not None and tools.environments == (None,)
    with start(tools) as processes:
        processes.open("k", None, {"a": 4}, 0)
        assert processes.observations(["k"]) == [None]
        assert answers(processes, [("doubled", {})], "k")[0].content == "8"
        (copy,) = processes.environments(["k"])
        assert copy.columns == {"a": 4} and copy.doubled() == 8
        assert numpy.isnan(processes.rewards(["k"]).values).all()
    assert "user_file_filed" not in sys.modules


@pytest.mark.slow
def test_hundreds_of_environments_live_and_die_together(
    worlds: ToolSet,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        with start(worlds, at_once=1000) as processes:
            keys = list(range(400))
            for key in keys:
                processes.open(key, "env", {"start": key}, 0)
            assert processes.observations(keys) == [f"at {key}" for key in keys]
            for key in keys:
                processes.call(key, [ToolCall("fails", {"how": "kill"})], 0)
            time.sleep(5)  # so that none of their deaths has been heard of, and all have died
            for key in keys:
                processes.close_key(key)
            assert opened(processes, "") == "at 2"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_environment_that_died_says_so_to_every_call(world: ToolProcesses) -> None:
    opened(world, "", key="dead")
    opened(world, "", key="well")
    assert "exit code 7" in error(world, "breaks", "exit", key="dead")
    (result,) = answers(world, [("move", {"by": 1})], "dead")
    assert result.failed and "no more: it died: exit code 7" in result.content
    reply = world.rewards(["dead", "well"])
    assert numpy.isnan(reply.values[0]) and reply.values[1] == 2.0 and not reply.failures
    dead, well = world.environments(["dead", "well"])
    assert dead is None and well.count == 2
    for key in ("dead", "well"):
        world.close_key(key)


def test_environments_that_cannot_be_copied_or_sent(world: ToolProcesses) -> None:
    opened(world, "locked")
    with pytest.raises(ToolError, match=r"'env' cannot be handed.*a lock.*get_reward"):
        world.environments(["k"])
    world.close_key("k")
    with pytest.raises(ToolError, match=r"the columns image.*cannot be sent.*Leave"):
        world.open("k", "env", {"image": lambda: 0}, 0)


def test_keys_have_one_thing_going_on(world: ToolProcesses, shared: ToolProcesses) -> None:
    opened(world, "")
    with pytest.raises(ValueError, match="is open"):
        world.open("k", "env", {}, 0)
    with pytest.raises(ValueError, match="not open"):
        world.call("other", [ToolCall("move", {})], 0)
    with pytest.raises(ValueError, match="no environment None"):
        world.open("other", None, {}, 0)
    world.call("k", [ToolCall("move", {"by": 1})], 0)
    with pytest.raises(ValueError, match="is busy"):
        world.call("k", [ToolCall("move", {"by": 1})], 0)
    world.results(wait=True)
    world.close_key("k")
    world.close_key("k")
    with pytest.raises(ValueError, match="no environment"):
        shared.open("k", None, {}, 0)


def test_a_closed_key_is_forgotten(tools: ToolSet, tmp_path: Path) -> None:
    with start(tools, at_once=1) as processes:
        processes.call("busy", [ToolCall("pids", {"how": f"{tmp_path}/hang"})], 0)
        processes.call("waiting", [ToolCall("fails", {"how": "hang"})], 0)
        processes.call("next", [ToolCall("plain", {})], 0)
        own, group, escaped = written(tmp_path / "hang")
        processes.close_key("busy")
        processes.close_key("waiting")
        assert gone(own) and gone(group)
        assert list(all_of(processes)) == ["next"]
        assert answer(processes, "plain", "x", key="busy") == "x 1"
    assert gone(escaped)  # it had left the session


def test_halt_ends_the_run_for_a_tools_fault_only(tools: ToolSet) -> None:
    with start(tools, on_error="halt") as processes:
        (result,) = answers(processes, [("plane", {})])
        assert result.failed
        processes.call(0, [ToolCall("plain", {}), ToolCall("fails", {"how": "raise"})], 0)
        with pytest.raises(ToolError, match=r"'fails' failed on \{'how': 'raise'\}(.|\n)*in fails"):
            processes.results(wait=True)
        processes.call(0, [ToolCall("fails", {"how": "exit"})], 0)
        with pytest.raises(ToolError, match=r"'fails' failed.*\nit died: exit code 7"):
            processes.results(wait=True)


def test_an_interrupt_ends_the_wait_and_nothing_else(tools: ToolSet) -> None:
    class Stop(BaseException):
        pass

    def poll() -> None:
        if stopping:
            raise Stop

    stopping: list[bool] = []
    with start(tools, check_interrupt=poll) as processes:
        processes.call(0, [ToolCall("fails", {"how": "hang"})], 0)
        stopping.append(True)
        with pytest.raises(Stop):
            processes.results(wait=True)
        assert processes.results(wait=False) == []
        stopping.clear()
        assert answer(processes, "plain", "x", key=1) == "x 1"


def test_the_process_that_forks_is_replaced(worlds: ToolSet) -> None:
    with start(worlds) as processes:
        opened(processes, "")
        processes.call("k", [ToolCall("fails", {"how": "hang"})], 0)
        os.kill(processes._nursery._child.process.pid, signal.SIGKILL)
        ((_, (result,)),) = processes.results(wait=True)
        assert result.failed and "died" in result.content
        opened(processes, "", key="other")
        assert answers(processes, [("move", {"by": 1})], "other")[0].content == "3"


def test_tools_that_cannot_be_loaded_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "goes.py").write_text(
        'def f() -> int:\n    """Does."""\n    return 1\n'
        "import pathlib\nif pathlib.Path(__file__).with_suffix('.gone').exists():\n"
        "    import gone\n"
    )
    tools = build_tools(["goes.py:f"], None, [tmp_path])
    assert tools is not None
    (tmp_path / "goes.gone").touch()
    with pytest.raises(ToolError, match=r"goes.py:f'.*No module named 'gone'"):
        start(tools)


def test_close_leaves_no_process(tools: ToolSet, tmp_path: Path) -> None:
    processes = start(tools)
    processes.call(0, [ToolCall("pids", {"how": f"{tmp_path}/hang"})], 0)
    processes.call(1, [ToolCall("pids", {"how": f"{tmp_path}/done"})], 0)
    pids = [*written(tmp_path / "hang"), *written(tmp_path / "done")]
    nursery = processes._nursery._child.process
    processes.close()
    processes.close()
    assert nursery.returncode == 0
    assert all(gone(pid) for pid in pids)


PARENT = """
import sys, time
from fusedgrpo.engine.tools.processes import ToolProcesses
from fusedgrpo.engine.tools.spec import build_tools
from fusedgrpo.engine.tools.types import ToolCall
sys.path.append(sys.argv[1])
from parents_tools import pids

tools = build_tools([pids], None, [])
processes = ToolProcesses(tools, timeout=None, output_limit=100)
processes.call(0, [ToolCall("pids", {"how": sys.argv[1] + "/hang"})], 0)
print(processes._nursery._child.process.pid, flush=True)
if sys.argv[2] == "raise":
    from pathlib import Path
    hang = Path(sys.argv[1], "hang")
    while not (hang.exists() and len(hang.read_text().split()) == 3):
        time.sleep(0.02)
    raise SystemExit("out")
time.sleep(10_000)
"""


@pytest.mark.parametrize("how", ["kill", "term", "raise"])
def test_no_process_outlives_the_trainer(how: str, tmp_path: Path) -> None:
    (tmp_path / "parents_tools.py").write_text(TOOLS)
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert parent.stdout is not None
    nursery = int(parent.stdout.readline())
    pids = written(tmp_path / "hang")
    if how != "raise":
        parent.send_signal(signal.SIGTERM if how == "term" else signal.SIGKILL)
    parent.wait(HUNG)
    assert all(gone(pid) for pid in (nursery, *pids))
    parent.stdout.close()
