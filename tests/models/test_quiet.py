"""Library messages that no user can act on stay away, and nothing else does."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest

from fusedgrpo.models.quiet import POINTLESS, silence


def test_what_is_pointless_is_dropped_and_the_rest_of_its_logger_stays(caplog):
    silence()
    silence()
    for name, beginnings in POINTLESS.items():
        logger = logging.getLogger(name)
        logger.warning(beginnings[0] + " from kernels-community: %s", "no network")
        logger.warning("another message")
        assert sum(type(own).__name__ == "_Without" for own in logger.filters) == 1
    assert caplog.messages == ["another message"] * len(POINTLESS)


@pytest.mark.parametrize("name", POINTLESS)
def test_the_library_still_says_it_in_these_words(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    assert "logging.getLogger(__name__)" in source
    for beginning in POINTLESS[name]:
        assert f'"{beginning}' in source
