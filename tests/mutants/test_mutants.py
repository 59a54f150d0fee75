"""Every mutant is noticed by its tests, which pass without it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mutants import MUTANTS, Mutant
from trial import Server

NEEDS: dict[str, Any] = {
    "torch": (),
    "triton": pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
}
forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="a trial is a forked process")


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[str], Server]]:
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda backend: stack.enter_context(Server(backend)))


def test_the_line_of_each_mutant_is_still_there():
    for mutant in MUTANTS:
        compile(mutant.source(), mutant.file, "exec")
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


@forking
@pytest.mark.slow
@pytest.mark.parametrize("backend", [pytest.param(k, marks=v) for k, v in NEEDS.items()])
def test_without_a_mutant_their_tests_pass(server, backend):
    tests = {node: None for mutant in MUTANTS if mutant.backend == backend for node in mutant.nodes}
    outcome = server(backend).run(list(tests))
    assert outcome.code == pytest.ExitCode.OK, outcome.output
    assert len(outcome.passed) == len(tests)


@forking
@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=m.name.replace(" ", "-"), marks=NEEDS[m.backend]) for m in MUTANTS],
)
def test_a_broken_line_is_noticed(server, mutant: Mutant):
    outcome = server(mutant.backend).run(mutant.nodes, mutant)
    assert outcome.code == pytest.ExitCode.TESTS_FAILED, outcome.output
    assert outcome.killers, f"no assertion failed, but: {outcome.failed}\n{outcome.output}"
