"""Runs tests against a mutant, quickly: ``Server``, and a script with a table.

A server process per backend imports torch, triton and pytest once and forks a child per trial, in
which the broken source takes the place of the file before anything of fusedgrpo is imported: a
custom operator can be registered only once.
"""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import pytest
from mutants import BACKENDS, MUTANTS, ROOT, Mutant


@dataclass(frozen=True)
class Outcome:
    """code: pytest's. passed: node ids. failed: node id, phase and exception of each failure."""

    code: int
    passed: list[str]
    failed: list[tuple[str, str, str]]
    output: str

    @property
    def killers(self) -> list[str]:
        """The tests in whose body an assertion failed."""
        return [
            name
            for name, phase, error in self.failed
            if phase == "call" and error == "AssertionError"
        ]


class Server:
    """A process that runs tests in a forked child each time; a context manager."""

    def __init__(self, backend: str):
        self.backend = backend
        self._scratch = tempfile.TemporaryDirectory(prefix="mutants-")
        environment = {
            **os.environ,
            "TRITON_INTERPRET": str(int(backend == "triton")),
            "OMP_NUM_THREADS": "1",
            "PYTEST_ADDOPTS": "",
            # The tree stays as it is: no byte code of mutants, no examples that only they fail.
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": self._scratch.name,
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "serve", self._scratch.name],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()
        self._scratch.cleanup()

    def run(self, nodes: Sequence[str], mutant: Mutant | None = None) -> Outcome:
        """Runs the tests ``nodes`` up to the first failure. RuntimeError if the child or the server
        died."""
        request: dict[str, Any] = {"nodes": list(nodes)}
        if mutant is not None:
            request |= {"module": mutant.module, "source": mutant.source()}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply.strip():
            raise RuntimeError(f"The process with {mutant} died without an outcome.")
        fields = json.loads(reply)
        fields["failed"] = [tuple(failure) for failure in fields["failed"]]
        return Outcome(**fields)


def serve(scratch: Path) -> None:
    """One JSON request a line from stdin, one JSON outcome a line to stdout."""
    sys.path[0] = str(ROOT)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # The first custom operator that runs imports torch._dynamo; the first session pytest's plugins.
    for name in ("torch._dynamo", "hypothesis.strategies", "triton", "peft"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    pytest.main(["--collect-only", "-p", "no:cacheprovider", f"--rootdir={scratch}", str(scratch)])
    assert not any(name.startswith("fusedgrpo") for name in sys.modules)
    # Else pytest's collections of garbage go through all of torch, in each child again.
    gc.collect()
    gc.freeze()
    # The tests are compiled once, beside the tree.
    sys.pycache_prefix, sys.dont_write_bytecode = str(scratch), False
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with os.fdopen(write, "w") as pipe:
                    json.dump(_trial(scratch, **json.loads(line)), pipe)
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            outcome = pipe.read()
        os.waitpid(child, 0)
        replies.write(outcome + "\n")
        replies.flush()
    gc.unfreeze()


def _trial(
    scratch: Path, nodes: list[str], module: str | None = None, source: str = ""
) -> dict[str, Any]:
    if module is not None:
        # Of its own, so that no byte code of another mutant is taken for this one's.
        path = Path(tempfile.mkdtemp(dir=scratch)) / f"{module.rpartition('.')[2]}.py"
        path.write_text(source, encoding="utf-8")
        sys.meta_path.insert(0, _Finder(module, path))
    log = scratch / "output"
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    seen = _Seen()
    options = ["-x", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *nodes], plugins=[seen])
    sys.stdout.flush()
    sys.stderr.flush()
    return {
        "code": int(code),
        "passed": seen.passed,
        "failed": seen.failed,
        "output": log.read_text(errors="replace")[-6000:],
    }


class _Finder:
    """Imports ``module`` from another file: Triton reads the source of a kernel from disk."""

    def __init__(self, module: str, path: Path):
        self.module, self.path = module, path

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path)


class _Seen:
    """A pytest plugin."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[tuple[str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_exception_interact(
        self, call: pytest.CallInfo[Any], report: pytest.TestReport | pytest.CollectReport
    ) -> None:
        assert call.excinfo is not None
        self.failed.append((report.nodeid, call.when, call.excinfo.type.__name__))


def main() -> int:
    """Prints ``mutant | killed by``; 1 if one survived."""
    survivors = 0
    for backend in BACKENDS:
        with Server(backend) as server:
            for mutant in MUTANTS:
                if mutant.backend != backend:
                    continue
                start = time.perf_counter()
                outcome = server.run(mutant.nodes, mutant)
                seconds = time.perf_counter() - start
                survivors += not outcome.killers
                by = outcome.killers[0].rpartition("/")[2] if outcome.killers else "SURVIVED"
                print(f"{mutant.file}: {mutant.name} | {by} | {seconds:.1f} s", flush=True)
                if not outcome.killers:
                    print(outcome.code, outcome.failed, outcome.output, sep="\n")
    return int(survivors > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]))
    else:
        sys.exit(main())
