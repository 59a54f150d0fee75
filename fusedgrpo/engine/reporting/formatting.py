"""Numbers and model output as text that people read: display and report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from unicodedata import category

MAX_SHOWN = 400  # characters of a prompt or completion that a console shows


def number(value: float | None) -> str:
    """Three significant digits, or a dash for a value that is not there."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    return f"{value:.1e}"


def quantity(count: int, name: str) -> str:
    """``1 prompt``, ``2 prompts``."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


# Controls, invisible and reordering characters, half surrogate pairs, line and paragraph breaks.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """``text`` without the characters by which a completion could drive the terminal, hide what it
    says, show it in another order or begin a line; its own line breaks and tabs stay."""
    return _replaced(text, lambda c: "\N{REPLACEMENT CHARACTER}")


def escaped(text: str) -> str:
    """Like :func:`printable`, but one sees which characters they were: ``\\x1b``."""
    return _replaced(text, lambda c: c.encode("unicode_escape").decode("ascii"))


def _replaced(text: str, by: Callable[[str], str]) -> str:
    if text.isprintable():
        return text
    return "".join(by(c) if category(c) in _UNPRINTABLE and c not in "\n\t" else c for c in text)


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """``text`` with its middle left out where it is longer than ``limit`` characters."""
    half = (limit - 5) // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def one_line(text: str) -> str:
    """``text`` shortened, its line breaks written as ``\\n``."""
    return shorten(text).replace("\n", "\\n")


def sparkline(values: Iterable[float], width: int) -> str:
    """The last ``width`` values as block characters between their least and greatest."""
    shown = list(values)[-width:]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (value - low) / span + 0.5)] for value in shown)
