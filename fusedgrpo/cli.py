"""The command line: ``fusedgrpo train | plan | report | doctor``.

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

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="GRPO training of language models on one GPU.",
)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML or JSON file of options.")],
) -> None:
    """Train as CONFIG says. Any option can be set after it: --learning_rate 1e-5 --beta=0.04"""
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.engine.reporting.plain_log import make_plain
    from fusedgrpo.engine.trainer import GRPOTrainer

    make_plain("transformers", "datasets", "peft", "accelerate", "huggingface_hub")
    options = GRPOConfig.from_file(config, overrides=_overrides(context.args))
    trainer = GRPOTrainer(args=options, search_paths=[config.parent])
    trainer.train()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML or JSON file of options.")],
    gpu: Annotated[
        str | None, typer.Option(help="Memory of the card, such as 24GB; else this machine's.")
    ] = None,
) -> None:
    """Say what a run of CONFIG needs of its GPU, before any weight is there. Exit code 1: it does
    not fit. Options can be set after CONFIG, as for train."""
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.engine.memory.plan import plan_table
    from fusedgrpo.engine.memory.planner import card_bytes, plan_memory
    from fusedgrpo.engine.rollout.choice import choose_sampler
    from fusedgrpo.errors import ConfigError
    from fusedgrpo.models.adapters.files import planned_options
    from fusedgrpo.models.settings import model_settings
    from fusedgrpo.named_code import code_folders

    overrides = _overrides(context.args) | ({"gpu_memory": gpu} if gpu else {})
    options = GRPOConfig.from_file(config, overrides=overrides)
    card = card_bytes(options)
    if card is None:
        raise ConfigError("There is no GPU here: name the card's memory with --gpu 24GB.")
    settings = model_settings(options)
    if settings is None:
        raise ConfigError(
            f"{options.model_name_or_path}: a GGUF file has no config.json to plan from. Plan with "
            "the name of the model it was made of."
        )
    sampler = choose_sampler(options.sampler, None, code_folders([config.parent]))
    found = plan_memory(
        planned_options(options),
        settings,
        gpu_bytes=card,
        activation_offloading=options.activation_offloading,
        sampler_memory=sampler.memory,
        decoder=sampler.decodes,
    )
    typer.echo(plan_table(found))
    if not found.fits:
        raise typer.Exit(1)


@app.command()
def report(
    output_dir: Annotated[Path, typer.Argument(help="output_dir of a run, finished or not.")],
) -> None:
    """Draw the plots and write report.html anew from what a run has written so far."""
    from fusedgrpo.engine.reporting.report import write_report

    typer.echo(str(write_report(output_dir)))


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


def _overrides(words: list[str]) -> dict[str, str | None]:
    """``--key value`` and ``--key=value`` as a mapping; ``--flag`` alone is None."""
    from fusedgrpo.errors import ConfigError, brief

    overrides: dict[str, str | None] = {}
    pending: str | None = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")  # only the key's dashes are spelling
            if key in overrides:
                raise ConfigError(f"--{key} is given twice on the command line.")
            overrides[key] = value if equals else None
            pending = None if equals else key
        elif pending is not None:
            overrides[pending] = word
            pending = None
        else:
            raise ConfigError(
                f"{brief(word)} on the command line belongs to no option: --key value."
            )
    return overrides


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
    # Warnings reach the terminal; everything from INFO up goes to run.log, once there is one.
    logging.basicConfig(handlers=[terminal_handler()])
    logging.captureWarnings(True)
    try:
        # From here on: imports and loading may take minutes, in which there is nothing to save.
        with StopSignals() as signals, signals.at_once():
            app()
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
