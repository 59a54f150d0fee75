"""Only text reaches a terminal or a log: no escape codes, no forged lines, no secrets."""

from __future__ import annotations

import logging
import sys
from typing import Any

from fusedgrpo.config.redaction import hide
from fusedgrpo.engine.reporting.formatting import escaped, shorten

LONGEST_LINE = 10_000
LOG_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


def plain(text: str) -> str:
    """``text`` as one entry: a line that begins at the margin is the entry's first."""
    first, *rest = escaped(hide(text)).split("\n")
    if any(line and not line[0].isspace() for line in rest):
        rest = [f"    {line}" for line in rest]
    return "\n".join(shorten(line, LONGEST_LINE) for line in (first, *rest))


class PlainFormatter(logging.Formatter):
    """A record as :func:`plain` text, its traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


class _PlainMessages(logging.Filter):
    """Our own records for whatever handlers a program has set up."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if (clean := plain(text)) != text:
            record.msg, record.args = clean, ()
        return True


def keep_plain() -> None:
    """Make the messages of our logger plain, wherever they go. May be called twice."""
    logger = logging.getLogger("fusedgrpo")
    if not any(isinstance(each, _PlainMessages) for each in logger.filters):
        logger.addFilter(_PlainMessages())


def terminal_handler() -> logging.Handler:
    """Warnings and errors on standard error, each with its level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(PlainFormatter("%(levelname)s %(message)s"))
    return handler


def make_plain(*names: str) -> None:
    """Let the handlers that other libraries put on their loggers write plain text."""
    for name in names:
        for handler in logging.getLogger(name).handlers:
            old: Any = handler.formatter
            handler.setFormatter(PlainFormatter(old._fmt if old is not None else None))
