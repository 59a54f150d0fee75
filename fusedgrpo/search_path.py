"""The order in which folders are searched for modules: nobody's file hides a library.

A folder of rewards or configurations may well hold a ``random.py`` or a ``json.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable


def library_first(path: Iterable[str], last: Iterable[str]) -> list[str]:
    """``path`` with the standard library in front and the folders of ``last`` at the end, each
    folder once and absolute."""
    library = os.path.dirname(os.path.realpath(os.__file__))
    folders = list(dict.fromkeys(map(os.path.abspath, last)))
    behind = {os.path.realpath(folder) for folder in folders}
    front: list[str] = []
    middle: list[str] = []
    for entry in dict.fromkeys(map(os.path.abspath, path)):
        where = os.path.realpath(entry)
        if where in (library, os.path.join(library, "lib-dynload")) or where.endswith(".zip"):
            front.append(entry)
        elif where not in behind:
            middle.append(entry)
    return [*front, *middle, *folders]
