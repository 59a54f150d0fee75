"""build_tools: which tools and environments there are, and everything that is wrong with them."""

from __future__ import annotations

import functools
import inspect
import pickle
import re
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from patience import HUNG

from fusedgrpo.engine.tools.loading import Sources, load, packed
from fusedgrpo.engine.tools.spec import ToolSet, build_tools
from fusedgrpo.errors import ConfigError, ToolError

FILE = '''
import os
from pathlib import Path

with Path(__file__).with_suffix(".imports").open("a") as log:
    log.write("x")

def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b

async def shout(text: str) -> str:
    """Makes text loud.

    Args:
        text: what to shout
    """
    return text.upper()

def bare(a):
    return a

class Counter:
    def __init__(self):
        self.count = 0

    def reset(self, start: int = 0, **columns):
        self.count = start

    @property
    def secret(self):
        raise AssertionError("a property is no tool")

    def up(self, by: int) -> int:
        """Counts up.

        Args:
            by: how far
        """
        self.count += by
        return self.count

    def _private(self):
        pass

    def get_reward(self):
        return float(self.count)

def make():
    return Counter()

class Quiet(Counter):
    get_reward = None
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tools_of_test.py").write_text(FILE)
    return tmp_path


def built(tools: Any, environments: Any = None, folder: Path | None = None) -> ToolSet:
    made = build_tools(tools, environments, [folder] if folder else [], timeout=HUNG)
    assert made is not None
    return made


def problems(tools: Any, environments: Any = None, folder: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        built(tools, environments, folder)
    return caught.value.problems


def halve(x: float) -> float:
    """Halves a number.

    Args:
        x: the number
    """
    return x / 2


def test_no_tools_are_none() -> None:
    assert build_tools(None, None, []) is None
    assert build_tools([], {}, []) is None


def test_by_name_and_with_an_environment_that_a_function_makes(folder: Path) -> None:
    tools = built(
        ["tools_of_test.py:add", "tools_of_test.py:shout"], "tools_of_test.py:make", folder
    )
    assert (folder / "tools_of_test.imports").read_text() == "x"  # once for all that it holds
    assert tools.names() == ["add", "shout", "up"]
    assert tools.environments == (None,)
    assert tools.reward_names == ("Counter",) and tools.reward_name() == "Counter"
    add, _, up = tools.schemas()
    assert add["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "the first"},
            "b": {"type": "integer", "description": "the second"},
        },
        "required": ["a"],
    }
    assert list(up["function"]["parameters"]["properties"]) == ["by"]
    assert "tools_of_test" not in sys.modules and "user_file_tools_of_test" not in sys.modules


def test_several_environments_have_their_own_tools(folder: Path) -> None:
    names = {"a": "tools_of_test.py:Counter", "b": "tools_of_test.py:Quiet"}
    tools = built(["tools_of_test:add"], names, folder)
    assert tools.environments == ("a", "b")
    assert tools.names() == ["add"] and tools.names("a") == tools.names("b") == ["add", "up"]
    assert tools.reward_names == ("Counter",)
    assert (tools.reward_name("a"), tools.reward_name("b")) == ("Counter", None)
    with pytest.raises(KeyError):
        tools.schemas("c")


def class_in(module: str, text: str = "") -> type:
    """A class of a module that only this process has."""
    sys.modules[module] = made = ModuleType(module)
    exec(text or "class Env:\n    def reset(self): return None", made.__dict__)
    return made.Env  # type: ignore[attr-defined,no-any-return]


def test_objects_are_described_here_and_travel_with_what_they_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "only_here", None)  # removed again at the end
    environment = class_in("only_here")
    offset = 5

    def add(a: int) -> int:
        """Adds.

        Args:
            a: a number
        """
        return a + offset

    tools = built([add, halve], environment)
    assert tools.names() == ["add", "halve"] and tools.reward_names == ()
    del sys.modules["only_here"]  # as in another process
    loaded = load(pickle.loads(pickle.dumps(tools.sources)))
    assert loaded.tools[0](1) == 6
    assert loaded.environments[None]().reset() is None


def test_what_can_be_imported_travels_by_its_name() -> None:
    assert pickle.loads(packed(inspect.getsource, "tool")) is inspect.getsource
    assert len(packed(inspect.getsource, "tool")) < 100


def test_what_cannot_be_sent_is_refused_with_the_remedy() -> None:
    lock = threading.Lock()

    def locked(a: int) -> int:
        """Holds a lock.

        Args:
            a: a number
        """
        with lock:
            return a

    (problem,) = problems([locked])
    assert "tool 'locked'" in problem and "'file.py:name'" in problem and "lock" in problem


def undocumented(a: int) -> int:
    return a


def unhinted(a) -> int:  # type: ignore[no-untyped-def]
    """Has no hints.

    Args:
        a: something
    """
    return int(a)


def undescribed(a: int) -> int:
    """Says nothing of its argument."""
    return a


def custom(a: Path) -> int:
    """Takes a path.

    Args:
        a: the path
    """
    return 1


def unresolved(a: Nowhere) -> int:  # type: ignore[name-defined]  # noqa: F821
    """Takes what is not there.

    Args:
        a: it
    """
    return 1


def starred(*a: int) -> int:
    """Takes many.

    Args:
        a: them
    """
    return 1


def by_position(a: int, /) -> int:
    """Takes one.

    Args:
        a: it
    """
    return 1


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        (undocumented, r"'undocumented'.*no docstring"),
        (unhinted, r"'unhinted'.*\ba\b.*type hint"),
        (undescribed, r"'undescribed'.*description.*'a'"),
        (custom, r"'custom'.*Path"),
        (unresolved, r"'unresolved'.*Nowhere"),
        (starred, r"'starred' takes \*a"),
        (by_position, r"'by_position' takes a.* by position"),
        (lambda a: a, r"no name"),
        (functools.partial(halve, 1.0), r"no name"),
        (3, r"3 \(int\): expected a function"),
        ("halve", r"'halve': expected 'file.py:name'"),
        ("nowhere.py:f", r"no such file"),
    ],
)
def test_tools_that_no_schema_can_be_made_of(tool: Any, told: str) -> None:
    (problem,) = problems([tool])
    assert re.search(told, problem, re.DOTALL)


def test_all_problems_are_told_at_once(folder: Path) -> None:
    class Resetless:
        def rest(self) -> None: ...

    found = problems([undocumented, unhinted], Resetless)
    assert len(found) == 4 and any("no method 'reset'" in each for each in found)
    (problem,) = problems(["tools_of_test.py:bare"], None, folder)
    assert "'bare'" in problem and "docstring" in problem
    (problem,) = problems(["tools_of_test.py:bear"], None, folder)
    assert "Did you mean 'bare'" in problem


def test_two_tools_of_one_name_are_refused() -> None:
    class Env:
        def reset(self) -> None: ...

        def halve(self) -> int:
            """Halves."""
            return 1

    assert "2 are called 'halve'" in problems([halve, halve])[0]
    (problem,) = problems([halve], {"a": Env})
    assert "'halve' (environment 'a')" in problem


def test_an_environment_that_cannot_be_made_says_why(folder: Path) -> None:
    (folder / "bad.py").write_text("def make():\n    raise OSError('no such port')")
    (problem,) = problems(None, "bad.py:make", folder)
    assert "making it failed with OSError: no such port" in problem


def test_a_module_that_hangs_or_dies_is_not_waited_for(folder: Path) -> None:
    (folder / "slow.py").write_text("import time; time.sleep(10_000)")
    with pytest.raises(ConfigError, match=r"took more than 0.2 seconds"):
        build_tools(["slow.py:f"], None, [folder], timeout=0.2)
    (folder / "dies.py").write_text("import os; os._exit(3)")
    assert "died: exit code 3" in problems(["dies.py:f"], None, folder)[0]


def test_an_interrupt_ends_the_wait(folder: Path) -> None:
    class Stop(BaseException):
        pass

    def poll() -> None:
        raise Stop

    (folder / "slow.py").write_text("import time; time.sleep(10_000)")
    with pytest.raises(Stop):
        build_tools(["slow.py:f"], None, [folder], check_interrupt=poll)


def test_names_of_environments_are_text() -> None:
    class Env:
        def reset(self) -> None: ...

    for name in (None, 3):
        assert "is text" in problems(None, {name: Env})[0]


def test_what_was_importable_and_is_no_more_is_told_at_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "soon_gone.py").write_text("class Env:\n    def reset(self): pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    import soon_gone  # type: ignore[import-not-found]

    tools = built(None, soon_gone.Env)
    (tmp_path / "soon_gone.py").unlink()
    monkeypatch.delitem(sys.modules, "soon_gone")
    with pytest.raises(ToolError, match=r"environment 'Env' cannot be rebuilt"):
        load(Sources((), tools.sources.environments))
