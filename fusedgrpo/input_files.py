"""Open the files that a user names: whatever cannot be read is one error of ours."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fusedgrpo.errors import FusedGRPOError

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# The first bytes of UTF-16 and UTF-32 text.
_OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


def exists(path: Path) -> bool:
    """``path.exists()``, false for what no path can be: a NUL character, thousands of letters."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, error: type[FusedGRPOError]) -> bytes:
    """The content of a regular file. A pipe without a writer and a device would never end."""
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
        if kind is not None:
            raise error(f"{path}: is no regular file but {kind}; give a file.")
        return path.read_bytes()
    except MemoryError as failure:
        raise error(f"{path}: is larger than the memory of this machine.") from failure
    except (OSError, ValueError) as failure:
        if isinstance(failure, error):
            raise
        said = failure.strerror if isinstance(failure, OSError) else None
        raise error(f"{path}: cannot be read: {said or failure}.") from failure


def read_text(path: Path, error: type[FusedGRPOError]) -> str:
    """The content of a file in UTF-8, with or without a byte order mark."""
    return decode(read_bytes(path, error), path, error)


def decode(data: bytes, path: Path, error: type[FusedGRPOError]) -> str:
    """``data``, the content of ``path``, as text."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{path}: not UTF-8 text{other_encoding(data)}: {failure}.") from failure


def other_encoding(data: bytes) -> str:
    """Another encoding than UTF-8 that a byte order mark names, in brackets; else nothing."""
    return " (but UTF-16 or UTF-32)" if data.startswith(_OTHER_MARKS) else ""
