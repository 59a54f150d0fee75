"""Which format the data sets of a run have: the one that is named, built in or the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusedgrpo.engine.data.formats import LAYOUTS, Layout
from fusedgrpo.engine.data.formats.function import FunctionLayout
from fusedgrpo.errors import ConfigError, DataError, FusedGRPOError, brief, did_you_mean
from fusedgrpo.named_code import code_folders, load_code, locate_code

OPTION = "dataset_format"
AUTO = "auto"


class Formats:
    """Finds formats by name, and each function once.

    option: ``dataset_format``. search_paths: folders where ``file.py:function`` is looked for
    after the working directory. given: the layout that the option names, None if it is auto.
    Raises ConfigError for an option that names nothing.
    """

    def __init__(self, option: str = AUTO, search_paths: Sequence[str | Path] = ()):
        self.option = option
        self._folders = code_folders(search_paths)
        self._functions: dict[tuple[str, str], FunctionLayout] = {}
        self.given = None if option == AUTO else self._named(option, OPTION, [], ConfigError)

    def of_entry(self, formatting: str | None, where: str, directory: Path) -> Layout | None:
        """The layout of an entry of the dataset_info.json in ``directory``; None to be told from
        its columns. Raises DataError, also where the entry and the option differ."""
        if formatting is None:
            return self.given
        layout = self._named(formatting, f"{where}: formatting", [directory], DataError)
        if self.given not in (None, layout):
            raise DataError(
                f"{where}: formatting is {formatting!r}, but {OPTION} is {self.option!r}. Remove "
                f"one of them; data sets of several formats have a formatting each, and {OPTION} "
                f"is {AUTO}."
            )
        return layout

    def _named(self, text: str, who: str, first: list[Path], error: type[FusedGRPOError]) -> Layout:
        """The layout called ``text``. first: folders to look in before the others."""
        if text in LAYOUTS:
            return LAYOUTS[text]
        parts = text.rpartition(":")
        code = locate_code(text, [*first, *self._folders], who, error) if all(parts) else None
        if code is None:
            raise error(
                f"{who} is {brief(text)}, expected {', '.join(LAYOUTS)}, file.py:function or "
                f"module:function.{did_you_mean(text, LAYOUTS)}"
            )
        place = code.target, code.attribute
        if place not in self._functions:
            function = load_code(code, who, error)
            self._functions[place] = FunctionLayout(*place, name=text, function=function)
        return self._functions[place]
