"""The command line: ``fusedgrpo train | plan | report | doctor | ...``; see ``fusedgrpo --help``.

Exit codes: 0 done; 1 the run failed; 2 configuration or data cannot be used; 130 and 143 stopped by
SIGINT and SIGTERM, with a checkpoint saved.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from fusedgrpo import __version__
from fusedgrpo.commands.evaluate import evaluate
from fusedgrpo.commands.export import export
from fusedgrpo.commands.init import init
from fusedgrpo.commands.options import options
from fusedgrpo.commands.plan import plan
from fusedgrpo.commands.push import push
from fusedgrpo.commands.show import show
from fusedgrpo.commands.tasks import tasks
from fusedgrpo.commands.train import train
from fusedgrpo.commands.training_command import ANY_WORDS, TrainingCommand

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="GRPO training of language models on one GPU.",
)
for command in (train, plan):
    app.command(cls=TrainingCommand, context_settings=ANY_WORDS)(command)
app.command()(init)
app.command()(options)
app.command()(export)
app.command("eval", cls=TrainingCommand, context_settings=ANY_WORDS)(evaluate)
app.command()(push)
app.command()(show)
app.command()(tasks)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fusedgrpo {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """GRPO training of language models on one GPU."""


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="output_dir of a run, finished or not; or of several.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="File to write; comparison.html for several runs.")
    ] = None,
) -> None:
    """Draw the plots and write report.html anew from what a run has written so far; of several
    runs, one page that compares them."""
    from fusedgrpo.engine.reporting.report import write_report
    from fusedgrpo.engine.reporting.runs_page import write_runs_page

    if len(runs) == 1:
        typer.echo(str(write_report(runs[0], output)))
    else:
        typer.echo(str(write_runs_page(runs, output or Path("comparison.html"))))


@app.command()
def doctor() -> None:
    """Say what this machine has and whether training would run here."""
    from fusedgrpo.doctor import checks

    failed = False
    for check in checks():
        typer.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.finding}")
        failed |= not check.ok
    if failed:
        raise typer.Exit(1)


def _let_segments_grow() -> None:
    """Before CUDA is: memory that micro-batches of one length leave then serves those of another,
    where segments of a fixed size would be kept beside it. What the user has set stays."""
    if not any(f"PYTORCH_{kind}ALLOC_CONF" in os.environ for kind in ("", "CUDA_", "HIP_")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def main() -> None:
    """Run the command line; errors raised on purpose are one message, not a traceback."""
    from fusedgrpo.engine.interrupts import Interrupted, StopSignals
    from fusedgrpo.engine.reporting.plain_log import plain, terminal_handler
    from fusedgrpo.engine.reporting.terminal import keep_streams
    from fusedgrpo.errors import ConfigError, DataError, FusedGRPOError, reason

    def say(text: str) -> None:
        sys.stderr.write(plain(f"fusedgrpo: {text}") + "\n")

    keep_streams()
    # Before torch is imported: its CPU threads spin only shortly before they sleep. On a machine
    # with other work that is many times faster (docs/measured.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    _let_segments_grow()
    # Warnings reach the terminal; everything from INFO up goes to run.log, once there is one.
    logging.basicConfig(handlers=[terminal_handler()])
    logging.captureWarnings(True)
    try:
        # From here on: imports and loading may take minutes, in which there is nothing to save.
        with StopSignals() as signals, signals.at_once():
            app(prog_name="fusedgrpo")
    except Interrupted as stop:
        if not stop.said:
            say(f"stopped by {stop.signal_name}; nothing was begun.")
        raise
    except FusedGRPOError as error:
        say(str(error))
        sys.exit(2 if isinstance(error, ConfigError | DataError) else 1)
    except (OSError, MemoryError, UnicodeError) as error:
        # The machine's or a foreign text's fault; a run that had begun has the place in its log.
        say(reason(error))
        sys.exit(1)
    except Exception:  # noqa: BLE001 - a fault of ours: all of it is shown, but as text
        sys.stderr.write(plain(traceback.format_exc()))
        sys.exit(1)


if __name__ == "__main__":
    main()
