"""Token ids of large data sets, kept between runs, as ``datasets.map`` keeps what it makes.

A file is found by a hash of all that the ids follow from: the rows, the tokenizer, its chat
template, the options, this code and the versions of what it calls. Where one of these cannot be
hashed, or the template says the date, nothing is kept. Ids alone are in it: they are checked in
each run as if they had just been made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fusedgrpo
from fusedgrpo import host
from fusedgrpo.engine.data.encoder import PromptEncoder
from fusedgrpo.engine.data.formats import Layout
from fusedgrpo.errors import reason

logger = logging.getLogger("fusedgrpo")

LARGE = 2000  # rows from which on it is worth a file
MOST = 32  # files that stay, those that were used last
_CALLED = ("transformers", "tokenizers", "jinja2")
_OPTIONS = (
    "system_prompt",
    "text_as_user_turn",
    "prompt_add_special_tokens",
    "chat_template_kwargs",
)
# Anybody may put methods of his own into a tokenizer.
_METHODS = ("apply_chat_template", "__call__", "_encode_plus", "encode")

Ids = tuple[int, ...]
Rows = Sequence[tuple[bytes | None, Layout]]


class EncodedRows:
    """Ids by the row's index. ``kept`` are those of an earlier run; ``add`` all others, and
    ``save``. path: where they are kept; None for nowhere."""

    def __init__(self, path: Path | None, count: int):
        self._path = path
        self._count = count
        self._added: dict[int, Ids] = {}
        self._kept: dict[int, Ids] = {}
        if path is not None and path.exists():
            try:
                self._kept = _read(path, count)
            except Exception as error:  # noqa: BLE001 - a damaged file, whatever its reader says
                logger.info("%s is not used: %s", path, reason(error))
            else:
                with contextlib.suppress(OSError):  # somebody else's
                    os.utime(path)  # it was used

    @classmethod
    def of(cls, encoder: PromptEncoder, rows: Rows) -> EncodedRows:
        """For rows with these digests (None for a bad row), read by these layouts."""
        folder = _folder() if len(rows) >= LARGE else None
        key = None if folder is None else _key(encoder, rows)
        if folder is None or key is None:
            return cls(None, len(rows))
        return cls(folder / f"{key}.safetensors", len(rows))

    def kept(self, index: int) -> Ids | None:
        return self._kept.get(index)

    def add(self, index: int, ids: Ids) -> None:
        self._added[index] = ids

    def save(self) -> None:
        """Keep what was added, if that is enough to be worth it. Where it cannot be written, the
        log says so, and the next run makes it again."""
        if self._path is None or len(self._added) < LARGE // 2:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _write(self._path, self._kept | self._added, self._count)
        except Exception as error:  # noqa: BLE001 - a full disk, in whatever words
            logger.info("%s cannot be written: %s", self._path, reason(error))
        else:
            with contextlib.suppress(OSError):  # another run takes some away at the same time
                _leave_the_last(self._path.parent)


def _leave_the_last(folder: Path) -> None:
    """All but ``MOST`` go: a file is of no use any more once its rows, or this code, have changed.
    A run that reads one of them at this moment keeps what it has opened."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    for file in files[:-MOST]:
        file.unlink(missing_ok=True)


def _folder() -> Path | None:
    """Where ``datasets`` keeps its own; None where it was told to keep nothing."""
    import datasets

    if not datasets.is_caching_enabled():
        return None
    return Path(datasets.config.HF_DATASETS_CACHE) / "fusedgrpo"


def _key(encoder: PromptEncoder, rows: Rows) -> str | None:
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = vars(tokenizer)
    if (
        backend is None
        or encoder.is_dated
        or not type(tokenizer).__module__.startswith("transformers.")
        or any(name in own for name in _METHODS)
    ):
        return None
    plain = (str, int, float, bool, type(None))
    facts = {
        "fusedgrpo": fusedgrpo.__version__,
        "code": _code(),
        "called": {name: host.package_version(name) for name in _CALLED},
        "tokenizer": type(tokenizer).__qualname__,
        "settings": {name: value for name, value in own.items() if isinstance(value, plain)},
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "template": encoder.chat.source,
        "tools": encoder.row_tools.schemas,
        "options": {name: getattr(encoder.config, name) for name in _OPTIONS},
    }
    try:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(backend.to_str().encode())
    except Exception:  # noqa: BLE001 - a value that is no JSON, a tokenizer with code in it
        return None
    layouts: dict[int, bytes] = {}
    for row, layout in rows:
        if id(layout) not in layouts:
            layouts[id(layout)] = _layout(layout).encode()
        digest.update((row or b"").ljust(32, b"\0") + layouts[id(layout)])
    return digest.hexdigest()


def _layout(layout: Layout) -> str:
    """The fields by which it differs from others; a function has made the rows already."""
    fields = [spec.name for spec in dataclasses.fields(layout) if spec.compare]  # type: ignore[arg-type]
    return f"{type(layout).__qualname__} {[(name, getattr(layout, name)) for name in fields]}"


def _code() -> str:
    """A hash of the code that is between rows and ids."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(path: Path, ids: dict[int, Ids], count: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    lengths = np.array([len(ids.get(i, ())) for i in range(count)], dtype=np.int64)
    flat = np.array([token for i in sorted(ids) for token in ids[i]], dtype=np.int64)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({"ids": flat, "lengths": lengths}, temporary, {"sha256": _checksum(flat, lengths)})
    os.replace(temporary, path)


def _read(path: Path, count: int) -> dict[int, Ids]:
    """Raises ValueError for a file that is not whole, and what its reader raises."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        flat, lengths = file.get_tensor("ids"), file.get_tensor("lengths")
        if file.metadata()["sha256"] != _checksum(flat, lengths):
            raise ValueError("it is damaged")
    if len(lengths) != count or int(lengths.sum()) != len(flat):
        raise ValueError("it is of other rows")
    tokens = flat.tolist()
    found, start = {}, 0
    for index, length in enumerate(lengths.tolist()):
        if length:
            found[index] = tuple(tokens[start : start + length])
        start += length
    return found


def _checksum(flat: Any, lengths: Any) -> str:
    return hashlib.sha256(flat.tobytes() + lengths.tobytes()).hexdigest()
