"""``fusedgrpo train``."""

from __future__ import annotations

from typing import Annotated

import typer

from fusedgrpo.commands.given import read_words
from fusedgrpo.commands.training_command import ConfigFile, Words
from fusedgrpo.stages import stage


def train(
    words: Words = None,
    config: ConfigFile = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry_run",
            "--dry-run",
            help="Check all that can be checked before step 1, say what would run, and stop.",
        ),
    ] = False,
) -> None:
    """Train as a file of options says, as options after the command say, or both.

    fusedgrpo train run.yaml --learning_rate 1e-5 --beta=0.04
    """
    from fusedgrpo.engine.reporting.opening import opening
    from fusedgrpo.engine.reporting.plain_log import make_plain

    given = read_words(words or [], config)
    if given.file is None and not given.overrides:
        raise typer.BadParameter(
            "give a file of options, or options: fusedgrpo train run.yaml, or fusedgrpo train "
            "--model_name_or_path MODEL --dataset DATA --reward_funcs accuracy. fusedgrpo init "
            "writes a file to start from."
        )
    options = given.options()
    make_plain("transformers", "datasets", "peft", "accelerate", "huggingface_hub")
    with opening(bars=not options.disable_tqdm), stage("importing torch and transformers"):
        from fusedgrpo.engine.trainer import GRPOTrainer
    trainer = GRPOTrainer(args=options, search_paths=given.search_paths)
    if not dry_run:
        trainer.train()
        return
    from fusedgrpo.commands.dry_run import said

    try:
        text = said(trainer)
        if trainer.processes.is_main:
            typer.echo(text)
    finally:
        trainer.reward_funcs.close()
        trainer.asking.close()
