"""A page from its template: everything foreign escaped, everything it runs named by its hash."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import fusedgrpo
from fusedgrpo.engine.reporting.formatting import number, quantity
from fusedgrpo.engine.reporting.metrics_log import to_jsonable
from fusedgrpo.engine.reporting.page.chart import Chart

# Licences of what is written into the page come with it.
STYLES = ("vendor/uplot/uPlot.min.css", "static/page.css")
SCRIPTS = ("vendor/uplot/uPlot.iife.min.js", "static/charts.js", "static/page.js")


def render(
    template: str,
    *,
    title: str,
    parts: Sequence[tuple[str, str]],
    charts: Sequence[Chart],
    others: Sequence[Chart] = (),
    live_seconds: int | None = None,
    **context: Any,
) -> str:
    """The page of ``templates/{template}``.

    parts: id and name of what the bar on top leads to. charts, others: drawn where the template has
    a figure of that id. live_seconds: how often it loads itself again, of a run
    that goes on.
    """
    from markupsafe import Markup

    style = Markup("\n".join(map(_asset, STYLES)))
    scripts = [Markup(_asset(name)) for name in SCRIPTS]
    return (
        _templates()
        .get_template(template)
        .render(
            title=title,
            parts=parts,
            live=live_seconds,
            version=fusedgrpo.__version__,
            style=style,
            scripts=scripts,
            policy=_policy([style], scripts),
            data=_in_script({"charts": [chart.to_data() for chart in [*charts, *others]]}),
            charts=charts,
            others=others,
            **context,
        )
    )


def write_page(path: Path, text: str) -> None:
    """Whole or not at all: somebody may be looking at the file."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_text(text, encoding="utf-8", errors="replace")
        return
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8", errors="replace")
    os.replace(unfinished, path)


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """A policy that allows these scripts and styles, and nothing else."""
    own = {"script-src": scripts, "style-src": styles}
    sources = [f"{kind} {' '.join(map(_hash, texts))}" for kind, texts in own.items()]
    return "; ".join(
        ["default-src 'none'", *sources, "img-src data:", "base-uri 'none'", "form-action 'none'"]
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _in_script(data: Any) -> Any:
    from jinja2.utils import htmlsafe_json_dumps

    return htmlsafe_json_dumps(to_jsonable(data), separators=(",", ":"), allow_nan=False)


@cache
def _asset(name: str) -> str:
    """A file of this package's. A page has it between tags, which it must not end."""
    text = resources.files(__package__).joinpath(name).read_text("utf-8")
    if "</" in text:
        raise AssertionError(f"{name} has '</' in it, which could end its tag in a page.")
    if name.startswith("vendor/"):
        folder = name.rpartition("/")[0]
        licence = resources.files(__package__).joinpath(folder, "LICENSE").read_text("utf-8")
        text = f"/*! {licence.strip()} */\n{text}"
    return text


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader(__package__ or "", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "quantity": quantity}
    return found
