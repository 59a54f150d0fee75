"""The data of a chart, as ``static/charts.js`` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fusedgrpo.engine.reporting.formatting import number

Kind = Literal["noisy", "plain", "points", "dashed", "edge"]

DIGITS = 6  # significant ones of a value


@dataclass(frozen=True)
class Curve:
    """values: ``[N]``, None where there is none. colour: of the page's eight. joined: gaps are
    steps that have no value, and are drawn over."""

    name: str
    values: Sequence[float | None]
    colour: int
    kind: Kind = "noisy"
    joined: bool = False


@dataclass(frozen=True)
class Chart:
    """``id`` is that of its figure; ``unit`` labels the y axis; ``x``: ``[N]`` steps; ``lines``:
    name -> value of a level; ``bands``: pairs of curves, the upper one first, with the room between
    them filled; ``zero``: the axis begins there. ``note``: what else is to be said."""

    id: str
    title: str
    unit: str
    x: Sequence[int]
    curves: Sequence[Curve]
    lines: Mapping[str, float] = field(default_factory=dict)
    bands: Sequence[tuple[int, int]] = ()
    zero: bool = False
    note: str = ""
    every: int = 1

    @property
    def summary(self) -> str:
        """A description for those who cannot see it."""
        said = []
        for curve in self.curves:
            known = [value for value in curve.values if value is not None]
            if curve.kind == "edge" or not known:
                continue
            if min(known) == max(known):
                said.append(f"{curve.name}: {number(known[0])} throughout")
            else:
                said.append(
                    f"{curve.name}: {number(known[0])} at first, {number(known[-1])} at last, "
                    f"between {number(min(known))} and {number(max(known))}"
                )
        return "; ".join(said) + "."

    def to_data(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "x": list(self.x),
            "step": "step" if self.every == 1 else f"{self.every}th step",
            "zero": self.zero,
            "lines": [{"label": name, "value": value} for name, value in self.lines.items()],
            "bands": [list(pair) for pair in self.bands],
            "series": [
                {
                    "name": curve.name,
                    "values": [None if v is None else _rounded(v) for v in curve.values],
                    "colour": curve.colour,
                    "kind": curve.kind,
                    "joined": curve.joined,
                }
                for curve in self.curves
            ],
        }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
