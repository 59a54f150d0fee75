"""``fusedgrpo plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from fusedgrpo.commands.given import read_words
from fusedgrpo.commands.training_command import ConfigFile, Words
from fusedgrpo.errors import ConfigError
from fusedgrpo.stages import stage


def plan(
    words: Words = None,
    config: ConfigFile = None,
    gpu: Annotated[
        str | None, typer.Option(help="Memory of the card, such as 24GB; else this machine's.")
    ] = None,
) -> None:
    """Say what a run needs of its GPU, before any weight is there. Exit code 1: it does not fit.

    Takes what train takes.
    """
    from fusedgrpo.engine.reporting.opening import opening

    given = read_words(words or [], config)
    if gpu:
        given.overrides["gpu_memory"] = gpu
    options = given.options()
    with opening(), stage("importing torch and transformers"):
        from fusedgrpo.engine.memory.plan import plan_table
        from fusedgrpo.engine.memory.planner import card_bytes, plan_memory
        from fusedgrpo.engine.rewards.building import planned_bytes
        from fusedgrpo.engine.rollout.choice import choose_sampler
        from fusedgrpo.models.adapters.files import planned_options
        from fusedgrpo.models.settings import model_settings
        from fusedgrpo.named_code import code_folders

    card = card_bytes(options)
    if card is None:
        raise ConfigError("There is no GPU here: name the card's memory with --gpu 24GB.")
    settings = model_settings(options)
    if settings is None:
        raise ConfigError(
            f"{options.model_name_or_path}: a GGUF file has no config.json to plan from. Plan with "
            "the name of the model it was made of."
        )
    folders = code_folders(given.search_paths)
    sampler = choose_sampler(options.sampler, None, folders)
    kwargs = {"trust_remote_code": options.trust_remote_code}
    with opening():
        found = plan_memory(
            planned_options(options),
            settings,
            gpu_bytes=card,
            activation_offloading=options.activation_offloading,
            sampler_memory=sampler.memory,
            decoder=sampler.decodes,
            reward_models=planned_bytes(options.reward_funcs, folders, kwargs),
        )
    typer.echo(plan_table(found))
    if not found.fits:
        raise typer.Exit(1)
