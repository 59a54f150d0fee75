"""``fusedgrpo eval``: the base against what a run has made of it, on the same prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fusedgrpo.commands.given import Given, read_words
from fusedgrpo.commands.runs import Trained, find_trained
from fusedgrpo.errors import ConfigError

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.engine.comparison import Estimate
    from fusedgrpo.engine.rollout.sampler import Sampler
    from fusedgrpo.engine.trainer import GRPOTrainer

# Options of the run that evaluating has its own of: nothing is trained, saved or resumed.
_ASIDE = (
    "eval_dataset", "val_size", "eval_strategy", "save_strategy", "resume_from_checkpoint",
    "loss_type", "advantage_estimator", "beta", "report_to", "finetuning_type", "lora_r",
    "lora_alpha", "lora_dropout", "use_rslora", "max_samples", "overwrite_output_dir",
    "adapter_name_or_path", "template", "max_steps",
)  # fmt: skip


class Answers(NamedTuple):
    """The completions of one policy: by what was measured ``[P]`` means of prompts, and records of
    each completion."""

    means: dict[str, Any]
    records: list[dict[str, Any]]


def evaluate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN | --OPTION VALUE",
            help="output_dir of a run, its adapter or a checkpoint; and options that win over "
            "those of the run, such as --dataset DATA or --max_samples 100.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Another adapter than the run's: a folder or Hub id.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Sampled completions per prompt.")] = 4,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; else evaluations/NNN of the run.")
    ] = None,
) -> None:
    """Compare base and trained model on the same prompts, greedy and sampled.

    Rewards, format and lengths are those of the run. The intervals are of 95%, by resampling
    prompts; the difference is taken prompt by prompt.
    """
    from fusedgrpo.engine.earlier_run import numbered
    from fusedgrpo.engine.reporting.plain_log import make_plain

    make_plain("transformers", "datasets", "peft", "accelerate", "huggingface_hub")
    given = read_words(words or [])
    if given.file is None:
        raise ConfigError("Name the run: fusedgrpo eval RUN --dataset data.jsonl")
    trained = find_trained(given.file)
    home = trained.options_file.parent if trained.options_file else trained.weights.parent
    folder = output or numbered(home / "evaluations")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty, and is left as it is; give another --output.")
    before, after = _both(trained, given, adapter, folder)
    typer.echo(f"Base: {_named(before)}. Trained: {_named(after)}. Data: {before.dataset}")
    answers = _answers_of_both(before, after, n, [home, Path.cwd()])
    results = compared(answers["base"].means, answers["trained"].means, before.seed)
    _write(folder, answers, results, {"base": before, "trained": after}, n)
    typer.echo(table(results))
    typer.echo(f"Completions and numbers: {folder}")


def _both(
    trained: Trained, given: Given, adapter: str | None, folder: Path
) -> tuple[GRPOConfig, GRPOConfig]:
    """The options under which base and trained model answer. Raises ConfigError, ModelError."""
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.models.adapters.files import base_of

    own = trained.options(given.overrides)
    defaults = {spec.name: spec.default for spec in dataclasses.fields(GRPOConfig())}
    options = own.to_dict() | {name: defaults[name] for name in _ASIDE}
    for name in given.overrides.keys() & set(_ASIDE):
        options[name] = getattr(own, name)  # it was said for this evaluation
    options["output_dir"] = str(folder)
    if "dataset" not in given.overrides:
        options["dataset"] = own.eval_dataset or own.dataset
    if not options["dataset"]:
        raise ConfigError("dataset is missing: --dataset DATA names the prompts to evaluate on.")
    named = own if own.model_name_or_path else GRPOConfig(model_name_or_path=str(trained.weights))
    if not trained.full or own.model_name_or_path:
        options["model_name_or_path"], options["model_revision"] = base_of(named)
    base = GRPOConfig(**options)
    targets = {"lora_target_modules": defaults["lora_target_modules"]}  # an adapter has its own
    if adapter is not None:
        return base, GRPOConfig(**options | targets | {"adapter_name_or_path": adapter})
    if trained.full:
        whole = {"model_name_or_path": str(trained.weights), "model_revision": None}
        return base, GRPOConfig(**options | whole | {"gguf_file": None})
    return base, GRPOConfig(**options | targets | {"adapter_name_or_path": str(trained.weights)})


def _answers_of_both(
    before: GRPOConfig, after: GRPOConfig, n: int, folders: list[Path]
) -> dict[str, Answers]:
    """The answers of base and trained model. Where these are one model with its adapter off and on,
    it is loaded once, else one after the other."""
    from fusedgrpo.engine.memory.oom_retry import release
    from fusedgrpo.engine.trainer import GRPOTrainer

    def alone(name: str, options: GRPOConfig) -> Answers:
        trainer = GRPOTrainer(args=options, search_paths=folders)
        with contextlib.closing(trainer.reward_funcs), contextlib.closing(trainer.asking):
            return _answers(name, trainer, trainer.sampler, n)

    if not _is_base_with_adapter(after):
        base = alone("base", before)
        release()  # one model at a time
        return {"base": base, "trained": alone("trained", after)}
    trainer = GRPOTrainer(args=after, search_paths=folders)
    assert trainer.policy.adapters is not None
    with contextlib.closing(trainer.reward_funcs), contextlib.closing(trainer.asking):
        with trainer.policy.adapters.off():
            base = _answers("base", trainer, trainer.run_sampler.make_of_base(), n)
        return {"base": base, "trained": _answers("trained", trainer, trainer.sampler, n)}


def _is_base_with_adapter(options: GRPOConfig) -> bool:
    """Whether the trained model is the base again where its adapter is switched off. A sampler of
    somebody else's may take the adapter's weights elsewhere and see no switch."""
    from fusedgrpo.engine.rollout.choice import OURS
    from fusedgrpo.models.adapters.files import find_adapter

    adapter = find_adapter(options)
    return adapter is not None and adapter.leaves_base_as_it_is and options.sampler in OURS


def _answers(name: str, trainer: GRPOTrainer, sampler: Sampler, n: int) -> Answers:
    """All that the policy of that name, which ``sampler`` samples from, says and gets."""
    from fusedgrpo.engine.comparison import prompt_means
    from fusedgrpo.engine.evaluation import answer_records, sample_and_score
    from fusedgrpo.engine.seeding import derive

    data, rewards, options = trainer.data, trainer.reward_funcs, trainer.args
    means: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    for mode, count in (("greedy", 1), ("sampled", n)):
        typer.echo(f"{name}: {len(data)} prompts, {mode} x {count} ...", err=True)
        answered = sample_and_score(
            data,
            sampler,
            rewards,
            n=count,
            params=dataclasses.replace(trainer.sampling, greedy=mode == "greedy"),
            batch_size=options.per_device_eval_batch_size,
            seed=derive(options.seed, "eval"),
            state=trainer.collector.reward_state(),
            asking=trainer.asking,
        )
        rollout, scored, _ = answered
        ids = rollout.group_ids
        for measure, values in _measured(rewards.names, rollout, scored).items():
            means[f"{mode} {measure}"] = prompt_means(values, ids)
        made = answer_records(answered, rewards.names)
        records += [{"mode": mode, **record} for record in made]
    return Answers(means, records)


def _measured(names: list[str], rollout: Any, scored: Any) -> dict[str, Any]:
    """``[B]`` each."""
    import torch

    completions = list(rollout.completions())
    several = {name: scored.values[:, i] for i, name in enumerate(names)} if len(names) > 1 else {}
    return {
        "reward": scored.total,
        **several,
        "length": torch.tensor([float(c.own_tokens) for c in completions]),
        "cut off": torch.tensor([float(c.finish_reason == "length") for c in completions]),
    }


def compared(
    base: dict[str, Any], trained: dict[str, Any], seed: int
) -> dict[str, dict[str, Estimate]]:
    """For each measure, ``[P]`` means of the same prompts, the estimates of ``base`` and
    ``trained`` and of the ``difference``, trained - base."""
    from fusedgrpo.engine.comparison import estimate

    return {
        name: {
            "base": estimate(base[name], seed),
            "trained": estimate(trained[name], seed),
            "difference": estimate(trained[name] - base[name], seed),
        }
        for name in base
    }


def table(results: dict[str, dict[str, Estimate]]) -> str:
    """The results for a terminal; a difference whose interval is to one side of 0 is marked."""
    width = max(len(name) for name in results)
    lines = [f"{'':<{width}}  {'base':<23}  {'trained':<23}  difference"]
    for name, row in results.items():
        change = row["difference"]
        mark = "" if change.low <= 0 <= change.high else " *"
        lines.append(
            f"{name:<{width}}  {row['base']!s:<23}  {row['trained']!s:<23}  {change}{mark}"
        )
    prompts = max(row["difference"].prompts for row in results.values())
    lines.append(f"{prompts} prompts; intervals of 95%; * away from 0")
    return "\n".join(lines)


def _write(
    folder: Path,
    answers: dict[str, Answers],
    results: dict[str, dict[str, Estimate]],
    options: dict[str, GRPOConfig],
    n: int,
) -> None:
    from fusedgrpo.engine.reporting.metrics_log import to_json_line

    folder.mkdir(parents=True, exist_ok=True)
    for name, said in answers.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(to_json_line(record) for record in said.records)
    numbers = {
        name: {kind: found.to_record() for kind, found in row.items()}
        for name, row in results.items()
    }
    record = {
        "results": numbers,
        "sampled_per_prompt": n,
        "options": {name: given.to_record() for name, given in options.items()},
    }
    text = json.dumps(record, indent=1) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")


def _named(options: GRPOConfig) -> str:
    return str(options.adapter_name_or_path or options.model_name_or_path)
