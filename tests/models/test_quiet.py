"""Library messages that no user can act on stay away, and nothing else does."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest

from fusedgrpo.models.quiet import POINTLESS, POINTLESS_WARNINGS, silence


def test_what_is_pointless_is_dropped_and_the_rest_of_its_logger_stays(caplog):
    silence()
    silence()
    for name, beginnings in POINTLESS.items():
        logger = logging.getLogger(name)
        logger.warning(beginnings[0] + " from kernels-community: %s", "no network")
        logger.warning("another message")
        assert sum(type(own).__name__ == "_Without" for own in logger.filters) == 1
    assert caplog.messages == ["another message"] * len(POINTLESS)


def test_warnings_that_are_pointless_are_dropped_and_the_library_still_says_them():
    spec = importlib.util.find_spec("tqdm.autonotebook")
    assert spec is not None and spec.origin is not None
    notebook = Path(spec.origin).with_name("notebook.py").read_text()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence()
        for beginning in POINTLESS_WARNINGS:
            assert beginning in notebook
            warnings.warn(f"{beginning}. Please update jupyter.", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)
    assert [str(each.message) for each in caught] == ["another warning"]


@pytest.mark.parametrize("name", POINTLESS)
def test_the_library_still_says_it_in_these_words(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    assert "logging.getLogger(__name__)" in source
    for beginning in POINTLESS[name]:
        assert f'"{beginning}' in source
