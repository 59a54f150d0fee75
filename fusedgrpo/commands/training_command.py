"""A command that takes every option of a run, without one of them being written here."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

# As they come: options of a run are read by ``given.read_words``, whose spellings are many.
ANY_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG | --OPTION VALUE",
        help="A YAML or JSON file of options, and options that win over it; either will do.",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="The file of options, if it is not named alone.")
]


class TrainingCommand(TyperCommand):
    """Its help and its completion have the options of a run, under their headings."""

    _shown = False

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        return [*params, *_parameters()] if self._shown else params

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._shown = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._shown = False

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        self._shown = True
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self._shown = False


def _parameters() -> list[Any]:
    """The options of a run as those of a command; typer makes them from a function's signature."""
    from fusedgrpo.config.described import described_options

    def options(**given: Any) -> None: ...

    made: dict[str, Any] = {
        option.name: Annotated[
            str | None,
            typer.Option(
                f"--{option.name}",
                help=f"{option.help} ({option.kind}; default {option.default})",
                metavar="",  # beside it there would be no room for the names
                rich_help_panel=f"Options of a run: {option.group}",
                show_default=False,
            ),
        ]
        for option in described_options()
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, kind, default=None, annotation=annotation)
        for name, annotation in made.items()
    ]
    options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    options.__annotations__ = made
    app = typer.Typer(add_completion=False)
    app.command()(options)
    return list(typer.main.get_command(app).params)
