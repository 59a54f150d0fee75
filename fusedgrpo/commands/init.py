"""``fusedgrpo init``: a first configuration for a model, its data and a card."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fusedgrpo.errors import ConfigError, DataError, FusedGRPOError, ModelError, PlanError

# Tried in this order until one fits the card: what costs least comes first. Activations are
# offloaded only where nothing else helps.
_SMALLER: tuple[tuple[dict[str, Any], bool | None], ...] = (
    ({}, False),
    ({"load_in_4bit": True}, False),
    ({"load_in_4bit": True}, None),
    ({"load_in_4bit": True, "max_completion_length": 512}, None),
    ({"load_in_4bit": True, "max_completion_length": 256}, None),
)
# A card has less than it is sold with: its driver and a display take some.
_SHARE_OF_CARD = 0.95
# Weights in 16 bits take no more than this share of a card where nothing else is known.
_SHARE_OF_16_BIT_WEIGHTS = 0.5


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("grpo.yaml"),
    model: Annotated[str, typer.Option(help="Model directory or Hub id.")] = "",
    dataset: Annotated[str, typer.Option(help="File, directory or Hub name of the prompts.")] = "",
    gpu: Annotated[
        str | None, typer.Option(help="Memory of the card, such as 24GB; else this machine's.")
    ] = None,
) -> None:
    """Write a commented file of options for a model, its data and a card, and say what to run."""
    if missing := [name for name, text in (("--model", model), ("--dataset", dataset)) if not text]:
        raise ConfigError(
            f"{' and '.join(missing)} missing: fusedgrpo init --model Qwen/Qwen2.5-7B-Instruct "
            "--dataset data.jsonl --gpu 24GB"
        )
    if file.exists():
        raise ConfigError(f"{file} is there already, and is left as it is; name another file.")
    draft = draft_for(model, dataset, gpu)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(draft.text())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror or error}.") from error
    for note in draft.notes:
        typer.echo(note)
    typer.echo(f"Wrote {file}. Try it, then run it:")
    typer.echo(f"  fusedgrpo train {file} --dry_run\n  fusedgrpo train {file}")


@dataclasses.dataclass
class Draft:
    """options: what is not left at its default. why: a reason beside an option. notes: what was
    found, and what was assumed."""

    options: dict[str, Any]
    why: dict[str, str]
    notes: list[str]

    def text(self) -> str:
        """The file: each option under the heading of its group, with what it is."""
        from fusedgrpo.config.described import by_group, described_options

        lines = ["# Options of a run: fusedgrpo train FILE. All of them: fusedgrpo options"]
        lines += [f"# {note}" for note in self.notes]
        for heading, found in by_group(described_options()).items():
            chosen = [option for option in found if option.name in self.options]
            lines += ["", f"# {heading}"] if chosen else []
            for option in chosen:
                line = f"{option.name}: {_yaml(self.options[option.name])}"
                lines.append(f"{line}  # {self.why.get(option.name) or option.help}")
        return "\n".join(lines) + "\n"


def draft_for(model: str, dataset: str, gpu: str | None) -> Draft:
    """Raises ConfigError."""
    from fusedgrpo.config.learning import LEARNING_RATES
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.engine.memory.planner import card_bytes

    name = Path(model).expanduser().name or model
    draft = Draft(
        {
            "model_name_or_path": model,
            "lora_r": 16,
            "dataset": dataset,
            "num_generations": 8,
            "prompts_per_step": 8,
            "max_completion_length": 1024,
            "learning_rate": LEARNING_RATES["lora"],
            "lr_scheduler_type": "cosine",
            "max_steps": 200,
            "beta": 0.0,
            "output_dir": f"runs/{re.sub(r'[^A-Za-z0-9_.-]', '-', name).lower()}-grpo",
            "save_steps": 50,
            "save_total_limit": 2,
        },
        {
            "learning_rate": "Peak learning rate; adapters want about 1e-5 to 3e-4.",
            "max_steps": "Optimizer steps; leave it out for num_train_epochs passes.",
        },
        [],
    )
    _follow_data(draft, dataset)
    card = card_bytes(GRPOConfig(gpu_memory=gpu))
    if card is None:
        draft.options |= {"max_completion_length": 256, "prompts_per_step": 2}
        draft.notes.append(
            "There is no GPU here and none was named (--gpu 24GB): sizes are for a small model on "
            "a CPU."
        )
    else:
        _follow_card(draft, gpu or f"{card / 2**30:.0f}GB", card)
    return draft


def _follow_data(draft: Draft, dataset: str) -> None:
    """Rewards by the columns of the first row."""
    from fusedgrpo.engine.data.formats import guess_layout
    from fusedgrpo.engine.data.sources import read_source
    from fusedgrpo.engine.rewards.builtin import REFERENCE_COLUMNS

    try:
        found = read_source(dataset)
        row = next((row.values for row in found.rows if row.values), {})
        columns = list(row)
        layout = found.layout or guess_layout(columns, found.name)
        prompt = layout.read(row)
    except (DataError, ValueError) as error:
        draft.notes.append(f"The data was not read ({_short(error)}), so its columns are assumed.")
        columns, prompt = [], None
    answers = [name for name in REFERENCE_COLUMNS if name in columns]
    if prompt is not None:
        draft.notes.append(f"Data: {len(found.rows)} rows, columns {', '.join(columns)}.")
        if prompt.messages is None and _chats(draft.options["model_name_or_path"]):
            draft.options["text_as_user_turn"] = True
    if prompt is None or answers or prompt.answer is not None:
        draft.options["reward_funcs"] = ["accuracy"]
        beside = f"column {answers[0]!r}" if answers else "answer of the row"
        draft.why["reward_funcs"] = f"1 if the completion gives the {beside}, else 0."
    else:
        draft.options["reward_funcs"] = ["rewards.py:reward"]
        draft.why["reward_funcs"] = "yours: def reward(completions, **columns): a number for each"
        draft.notes.append(
            "No column has a reference answer, so the reward has to be a function of yours: "
            "reward_funcs names one to write in rewards.py beside this file."
        )


def _chats(model: str) -> bool:
    """Whether the tokenizer has a chat template; by the model's name where there is none here."""
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.models.tokenizer import load_tokenizer

    try:
        return bool(load_tokenizer(GRPOConfig(model_name_or_path=model)).chat_template)
    except (ModelError, ConfigError):
        return re.search(r"instruct|chat|-it\b", model, re.IGNORECASE) is not None


def _follow_card(draft: Draft, gpu: str, card: int) -> None:
    """4 bits and lengths by what fits."""
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.engine.memory.plan import chosen
    from fusedgrpo.engine.memory.planner import MemoryPlanner
    from fusedgrpo.models.settings import model_settings

    try:
        settings = model_settings(GRPOConfig(**draft.options))
        if settings is None:
            raise ModelError("a GGUF file has no config.json")
        planner = MemoryPlanner(settings)
        context = getattr(settings.get_text_config(), "max_position_embeddings", None)
        for smaller, offloading in _fitting(context, draft.options["max_completion_length"]):
            options = draft.options | smaller
            plan = planner.plan(
                GRPOConfig(**options),
                gpu_bytes=int(_SHARE_OF_CARD * card),
                activation_offloading=offloading,
                advise=False,
            )
            if plan.fits:
                break
    except (ModelError, ConfigError, PlanError) as error:
        _guess(draft, gpu, card, error)
        return
    draft.options = options
    needed = f"{plan.needed / 2**30:.1f} of {card / 2**30:.0f} GiB"
    prompt = plan.longest - options["max_completion_length"]
    again = f"fusedgrpo plan FILE --gpu {gpu}"
    if plan.fits:
        draft.notes.append(f"Planned for {gpu}, with prompts of {prompt} tokens: {needed}.")
        draft.notes.append(f"It would train with {chosen(plan)}. Again: {again}")
    else:
        draft.notes.append(
            f"It does not fit {gpu}: {needed}. The nearest change that does: {again}"
        )


def _fitting(context: int | None, length: int) -> Iterator[tuple[dict[str, Any], bool | None]]:
    """Changes to try one after the other; completions leave room for a prompt in the context."""
    for smaller, offloading in _SMALLER:
        asked = smaller.get("max_completion_length", length)
        most = max(context // 2, 1) if context else asked
        yield smaller | {"max_completion_length": min(asked, most)}, offloading


def _guess(draft: Draft, gpu: str, card: int, error: FusedGRPOError) -> None:
    """By the size that is in the name of many models."""
    why = f"The memory was not planned ({_short(error)})"
    found = re.search(r"(\d+(?:\.\d+)?)b(?![a-z])", draft.options["model_name_or_path"], re.I)
    if found is None:
        draft.options["load_in_4bit"] = True
        draft.notes.append(f"{why}: assumed to need 4-bit weights on {gpu}.")
        return
    weights = float(found[1]) * 2e9
    four = weights > _SHARE_OF_16_BIT_WEIGHTS * card
    if four:
        draft.options["load_in_4bit"] = True
    draft.notes.append(
        f"{why}: assumed from its name to have {found[1]} billion weights, in {4 if four else 16} "
        f"bits on {gpu}."
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 160 else f"{text[:150]} ..."


def _yaml(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("...\n").strip()
