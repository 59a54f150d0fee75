"""Standard output and error that may be gone, full or closed, without a run ending for that."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

logger = logging.getLogger("fusedgrpo")


class Forgiving:
    """A text stream whose failure to write is said once, in the log, and otherwise ignored."""

    def __init__(self, stream: Any, name: str):
        self._stream = stream
        self._name = name
        self._failed = False

    def write(self, text: str) -> int:
        if not self._failed:
            try:
                return int(self._stream.write(text))
            except UnicodeError:
                raise  # the text's fault, and not the stream's
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self._failed:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        # What is still in the stream's buffer must have somewhere to go when Python ends.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        logger.warning(
            "%s cannot be written any more (%s); what is said goes on in run.log.",
            self._name,
            getattr(error, "strerror", None) or error,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgiving(stream: Any, name: str) -> Any:
    """``stream``, made forgiving if it is not; None stays None."""
    return stream if stream is None or isinstance(stream, Forgiving) else Forgiving(stream, name)


def keep_streams() -> None:
    """Make this process's standard streams forgiving. One that was closed when we were started
    goes to the null device: else the next file that is opened would be taken for it."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, mode)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  as long as the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  as long as the process
    for stream in (sys.stdout, sys.stderr):
        # Names and texts hold any character; an old terminal or a pipe in C locale takes few.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = forgiving(sys.stdout, "Standard output")
    sys.stderr = forgiving(sys.stderr, "Standard error")


def overwrites(console: Console) -> bool:
    """Whether lines of ``console`` can be drawn again. FORCE_COLOR makes rich take a pipe for a
    terminal; a log file full of cursor moves helps nobody, so the file itself is asked as well."""
    return console.is_interactive and bool(console.file.isatty())


def is_notebook(console: Console) -> bool:
    """Whether what ``console`` prints goes to a notebook, whose outputs can be drawn again."""
    return console.is_jupyter


@contextlib.contextmanager
def drawn(live: Any) -> Iterator[None]:
    """Inside, ``live`` (of rich) is on the terminal, and what others print comes out above it: also
    what log handlers write that were made for the streams that it stands in for."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    live.start()
    moved: list[tuple[Any, Any]] = []
    try:
        before = {
            id(_bare(stream)): name
            for name, stream in streams.items()
            if getattr(sys, name) is not stream
        }
        known = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in {h for each in known for h in getattr(each, "handlers", ())}:
            name = before.get(id(_bare(getattr(handler, "stream", None))))
            if name is not None and isinstance(handler, logging.StreamHandler):
                moved.append((handler, handler.setStream(getattr(sys, name))))
        yield
    finally:
        live.stop()
        for handler, stream in moved:
            if stream is not None:
                handler.setStream(stream)


def _bare(stream: Any) -> Any:
    return stream._stream if isinstance(stream, Forgiving) else stream
