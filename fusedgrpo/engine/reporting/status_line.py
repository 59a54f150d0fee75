"""A line of a terminal that is overwritten."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console, RenderableType


class StatusLine:
    """The last line of a terminal, shown until the next text takes its place; ``show("")`` takes it
    away. Whatever others write to ``stream`` meanwhile gets the line to itself.
    """

    ERASE = "\r\x1b[K"

    def __init__(self, stream: Any):
        self._stream = stream
        self._write: Any = None  # the stream's own, while its place is taken
        self._replaced: Any = None
        self._drawn = False
        self._free = True  # whether the cursor is where a line begins

    def show(self, text: str) -> None:
        if text:
            self._show(text[: self._width() - 1])
        else:
            self._release()
            self._stream.flush()

    def draw(self, console: Console, content: RenderableType) -> None:
        """Show ``content``, which is one line however narrow the terminal is, as ``console``
        renders it."""
        with console.capture() as captured:
            console.print(content, width=self._width() - 1, end="")
        self._show(captured.get().rstrip("\n"))

    def _show(self, text: str) -> None:
        if self._write is None:
            self._replaced = vars(self._stream).get("write")
            self._write = self._stream.write
            self._stream.write = self._others
        if self._free:  # somebody's unfinished line is not to be erased
            self._write(self.ERASE + text)
            self._drawn = True
        self._stream.flush()

    def _others(self, text: str) -> Any:
        if self._drawn:
            self._write(self.ERASE)
            self._drawn = False
        if text:
            self._free = text.endswith("\n")
        return self._write(text)

    def _release(self) -> None:
        if self._write is None:
            return
        if self._drawn:
            self._write(self.ERASE)
        if self._replaced is None:
            del self._stream.write
        else:
            self._stream.write = self._replaced
        self._write, self._drawn, self._free = None, False, True

    def _width(self) -> int:
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return columns or 80  # a terminal that nobody has told its size says 0
