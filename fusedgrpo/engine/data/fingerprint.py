"""A hash of rows of any values: the same in every process and on every machine, for equal rows.

Types count: 1, 1.0, True and "1" differ, and so do a list and a tuple. Sequences have an order,
mappings and sets have none. Of an object, what pickle would store counts; of one that cannot be
pickled, its class alone.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import hashlib
import pathlib
import uuid
from collections.abc import Iterable, Mapping, Set
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

# Their text says all that there is to say.
_BY_TEXT = (
    complex,
    range,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.tzinfo,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    pathlib.PurePath,
)
_NAMED = (FunctionType, BuiltinFunctionType, MethodType, type)


def row_digest(row: Mapping[Any, Any]) -> bytes:
    """sha256 of one row. A column that is None is as good as one that is not there."""
    return _sha256(_encoded({k: v for k, v in row.items() if v is not None}, ()))


def joined(digests: Iterable[bytes]) -> str:
    """The hexadecimal sha256 of rows in their order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _encoded(value: Any, around: tuple[int, ...]) -> bytes:
    """Bytes that differ for different values. around: ids of the containers that it is in."""
    kind = type(value)
    if kind is str:
        return b"str" + value.encode("utf-8", "surrogatepass")
    if value is None or kind is bool:
        return repr(value).encode()
    if kind is int:
        return f"int{value:x}".encode()
    if kind is float:
        return b"float" + value.hex().encode()
    if isinstance(value, enum.Enum):
        return _node(f"enum {_name(kind)}", [value.name.encode()])
    if isinstance(value, str):
        return b"str" + str(value).encode("utf-8", "surrogatepass")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return b"bytes" + bytes(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return _array(value, around)
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, _BY_TEXT):
        return _node(f"text {_name(kind)}", [str(value).encode("utf-8", "surrogatepass")])
    if isinstance(value, _NAMED):
        return b"named" + _name(value).encode()
    if isinstance(value, ModuleType):
        return b"module" + value.__name__.encode()
    if id(value) in around:
        return f"the {around[::-1].index(id(value))}th around".encode()
    around = (*around, id(value))
    if isinstance(value, Mapping):
        pairs = [_node("", [_encoded(k, around), _encoded(v, around)]) for k, v in value.items()]
        return _node("mapping", sorted(pairs))
    if isinstance(value, Set):
        return _node("set", sorted(_encoded(item, around) for item in value))
    if kind is list and all(type(item) is int for item in value):  # token ids: many
        return b"ints" + ",".join([f"{item:x}" for item in value]).encode()
    if kind in (list, tuple):
        return _node(kind.__name__, [_encoded(item, around) for item in value])
    return _object(value, around)


def _array(value: Any, around: tuple[int, ...]) -> bytes:
    kind = f"numpy {type(value).__name__} {value.dtype.str} {value.shape}"
    if value.dtype.hasobject:
        return _node(kind, [_encoded(value.tolist(), around)])
    return _node(kind, [value.tobytes()])


def _tensor(value: torch.Tensor) -> bytes:
    kind = f"tensor {value.dtype} {tuple(value.shape)}"
    plain = value.detach().to_dense().cpu().contiguous().reshape(-1)
    return _node(kind, [plain.view(torch.uint8).numpy().tobytes()])


def _object(value: Any, around: tuple[int, ...]) -> bytes:
    name = f"object {_name(type(value))}"
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 - a lock, a generator, an open file: they have no content
        return name.encode()
    if isinstance(reduced, str):
        return _node(name, [reduced.encode()])
    make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    parts = [make, arguments, state, items and list(items), pairs and dict(pairs)]
    return _node(name, [_encoded(part, around) for part in parts])


def _node(kind: str, parts: Iterable[bytes]) -> bytes:
    return kind.encode() + b":" + b"".join(_sha256(part) for part in parts)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _name(named: Any) -> str:
    module, name = getattr(named, "__module__", None), getattr(named, "__qualname__", None)
    return f"{module}.{name or type(named).__qualname__}"
