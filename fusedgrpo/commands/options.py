"""``fusedgrpo options``."""

from __future__ import annotations

from typing import Annotated

import typer

from fusedgrpo.errors import ConfigError, brief, did_you_mean


def options(
    name: Annotated[
        str | None, typer.Argument(help="An option, by any of its names; else all of them.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write docs/options.md to the output.")
    ] = False,
    json_schema: Annotated[
        bool, typer.Option("--json-schema", help="Write a JSON schema for editors to the output.")
    ] = False,
) -> None:
    """Say what options a run has: type, range, default, other names."""
    from fusedgrpo.config import described

    if (name is not None) + markdown + json_schema > 1:
        raise ConfigError("NAME, --markdown and --json-schema are three questions; ask one.")
    if markdown:
        typer.echo(described.options_page(), nl=False)
    elif json_schema:
        typer.echo(described.json_schema(), nl=False)
    elif name is not None:
        typer.echo(_one(name))
    else:
        for heading, found in described.by_group(described.described_options()).items():
            typer.echo(heading)
            for option in found:
                takes = f"{option.kind}; default {option.default}"
                typer.echo(f"  {option.name}: {option.help} ({takes})")


def _one(name: str) -> str:
    """The lines about an option. Raises ConfigError for one that is unknown or refused."""
    from fusedgrpo.config.described import described_options
    from fusedgrpo.config.foreign import REFUSED

    name = name.removeprefix("--").replace("-", "_")
    found = described_options()
    if name in REFUSED:
        raise ConfigError(f"{name}: not supported: {REFUSED[name].remedy}.")
    for option in found:
        if name == option.name or name in option.aliases:
            rows = {
                "group": option.group,
                "takes": option.kind,
                "default": option.default,
                "also read as": ", ".join(option.aliases),
            }
            lines = [f"  {label}: {text}" for label, text in rows.items() if text]
            return "\n".join([option.name, f"  {option.help}", *lines])
    known = [known for option in found for known in (option.name, *option.aliases)]
    raise ConfigError(f"{brief(name)} is no option.{did_you_mean(name, known)}")
