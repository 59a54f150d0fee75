"""Columns of pictures, sounds and videos: found, because a model of text would not see them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# TRL's names of the pictures of a prompt, LLaMA-Factory's of the rest.
COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
_DECODERS = ("torchcodec", "torchvision.io", "decord", "datasets.features._torchcodec")
_STORED = {"bytes", "path"}
_SOUND = {"array", "sampling_rate"}


def media_reason(row: Mapping[str, Any]) -> str | None:
    """Why a row cannot be used that has a picture, a sound or a video; None if it has none."""
    for name, value in row.items():
        kind = _kind(value)
        if kind is None and name in COLUMNS and not _is_empty(value):
            kind = f"what {name} belongs to the prompt"
        if kind is not None:
            return (
                f"its column {name!r} holds {kind}, and only text is trained on here; remove the "
                "column (a reward function can be given bytes or a path, under another name)"
            )
    return None


def undecoded(dataset: Any) -> Any:
    """A ``datasets.Dataset`` that leaves its pictures, sounds and videos as they are stored."""
    for name, feature in dict(getattr(dataset, "features", None) or {}).items():
        if type(feature).__name__ in ("Image", "Audio", "Video") and feature.decode:
            dataset = dataset.cast_column(name, dataclasses.replace(feature, decode=False))
    return dataset


def _kind(value: Any) -> str | None:
    if isinstance(value, (str, int, float, bytes, type(None))):
        return None
    if isinstance(value, Mapping):
        if value.keys() == _STORED and any(value.values()):
            return "a stored picture, sound or video ({'bytes', 'path'})"
        if value.keys() >= _SOUND:
            return "a sound ({'array', 'sampling_rate'})"
        if value.get("type") in ("image", "image_url", "video", "audio", "input_audio"):
            return f"a part of the type {value['type']!r}"
        return next(filter(None, map(_kind, value.values())), None)
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(_kind, value)), None)
    for base in type(value).__mro__:
        if base.__module__.startswith("PIL."):
            return "a picture (of PIL)"
        if base.__module__.startswith(_DECODERS):
            return f"a sound or a video ({base.__name__})"
    return None


def _is_empty(value: Any) -> bool:
    return value is None or (hasattr(value, "__len__") and len(value) == 0)
