"""The order in which folders are searched for modules: nobody's file hides a library.

A folder of rewards or configurations may well hold a ``random.py`` or a ``json.py``.
"""

from __future__ import annotations

# Only what Python has loaded before its first line: the package imports this before all else.
import os


def is_command_line(arguments: list[str]) -> bool:
    """Whether this process is ``fusedgrpo ...`` or ``python -m fusedgrpo...``; ``arguments`` are
    ``sys.orig_argv``."""
    rest = iter(arguments[1:])
    for argument in rest:
        if argument == "-m":
            return next(rest, "").split(".")[0] == "fusedgrpo"
        if argument in ("-X", "-W"):
            next(rest, "")
        elif not argument.startswith("-"):
            return os.path.basename(argument) == "fusedgrpo"
    return False


def of_command_line(path: list[str], arguments: list[str]) -> list[str]:
    """``path`` of such a process: `python -m` searches the working directory first, and PYTHONPATH
    may name the folder of the configuration. A random.py or torch.py there is a reward's, and
    nobody's library."""
    files = (argument for argument in arguments[1:] if os.path.isfile(argument))
    return library_first(path, [os.getcwd(), *map(os.path.dirname, files)])


def library_first(path: list[str], last: list[str]) -> list[str]:
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
