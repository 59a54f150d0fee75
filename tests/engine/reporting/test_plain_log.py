from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fusedgrpo.engine.reporting.plain_log import PlainFormatter, make_plain, plain
from fusedgrpo.engine.reporting.run_dir import RunDir

FORGED = "2026-01-01 00:00:00,000 INFO    Checkpoint: forged"
# Everything that ends a line for somebody: a terminal, Python's splitlines, an editor.
BREAKS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
CODES = [
    *("\x1b[31m", "\x07", "\x08", "\x7f", "\x9b31m", "\x00"),
    *("\u202e", "\u2066", "\u200e", "\u061c", "\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad"),
    *("\ud800", "\udcff"),
]


@pytest.mark.parametrize("code", CODES, ids=ascii)
def test_no_code_is_left(code: str) -> None:
    assert code not in plain(f"a{code}b") and plain(f"a{code}b").startswith("a\\")


@pytest.mark.parametrize("end", BREAKS, ids=ascii)
def test_no_line_can_be_forged(end: str) -> None:
    lines = plain(f"cannot parse {end}{FORGED}").splitlines()
    assert not any(line.startswith("2026") for line in lines)


def test_text_stays_text() -> None:
    for text in ("计算\u3000\t1 é ß ✓", "a table:\n  one   1\n  two   2\n\n  three 3"):
        assert plain(text) == text
    assert plain("a table:\nname 1\n  two 2") == "a table:\n    name 1\n      two 2"
    assert len(plain("x" * 10**6)) <= 10_000
    assert plain(plain(f"a\n{FORGED}")) == plain(f"a\n{FORGED}")


def test_the_log_of_a_run_is_plain(tmp_path: Path) -> None:
    logger = logging.getLogger("fusedgrpo")
    with pytest.raises(ZeroDivisionError), RunDir.open(tmp_path):
        logger.warning("from %s", f"a\x1b[31m\n{FORGED}")
        raise ZeroDivisionError(f"b\x1b[31m\r\n{FORGED}")
    log = (tmp_path / "run.log").read_text()
    assert "\x1b" not in log and "\n2026-01-01" not in log
    assert "a\\x1b[31m" in log and "ZeroDivisionError" in log and "Traceback" in log


def test_our_messages_are_plain_for_every_handler(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("fusedgrpo").warning("from %r and %s", "\x1b", f"\x1b\n{FORGED}")
    assert caplog.messages == [f"from '\\x1b' and \\x1b\n    {FORGED}"]


def test_handlers_of_other_libraries_are_made_plain(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("another.library")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    make_plain("another.library")
    logger.warning("x\x1b[31m\n%s", FORGED)
    logger.removeHandler(handler)
    assert isinstance(handler.formatter, PlainFormatter)
    assert capsys.readouterr().err == f"x\\x1b[31m\n    {FORGED}\n"
