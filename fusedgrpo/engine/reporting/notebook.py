"""Outputs of a notebook that are drawn again in place; no widget is needed to read them."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType

SECONDS = 0.5  # between two drawings: each is a message to the browser
_HTML = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace\">{code}</pre>"
)


class NotebookOutput:
    """One output, and what is in it now; a ``Live`` of rich for what it is used for here.

    render: gives what is drawn. width: columns. clock: seconds.
    """

    def __init__(
        self,
        render: Callable[[], RenderableType],
        width: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._render = render
        self._width = width
        self._clock = clock
        self._handle: Any = None
        self._drawn = -SECONDS

    def start(self) -> None:
        self.refresh(now=True)

    def refresh(self, *, now: bool = False) -> None:
        """Draw again, if that was not done just before; ``now``: in any case."""
        if not now and self._clock() - self._drawn < SECONDS:
            return
        self._drawn = self._clock()
        data = mime_bundle(self._render(), self._width)
        if self._handle is None:
            from IPython.display import display

            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def stop(self) -> None:
        self.refresh(now=True)


def mime_bundle(content: RenderableType, width: int) -> dict[str, str]:
    """``content`` as HTML, and the same as text."""
    console = Console(
        file=io.StringIO(), record=True, width=width, force_jupyter=False, force_terminal=True
    )
    console.print(content)
    text = console.export_text(clear=False)
    return {
        "text/plain": text,
        "text/html": console.export_html(inline_styles=True, code_format=_HTML),
    }
