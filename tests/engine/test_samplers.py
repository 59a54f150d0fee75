"""A run with somebody else's sampler: named or passed, and told when the weights change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import process_runs
import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.rollout.types import Completion, Group
from fusedgrpo.errors import ConfigError, SamplerError

OWN = """
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler

class Counts(DecoderSampler):
    changes = 0
    sampled = []

    def sample(self, *args, **kwargs):
        self.sampled.append(self.changes)
        return super().sample(*args, **kwargs)

    def weights_changed(self):
        super().weights_changed()
        type(self).changes += 1
"""
STEPS = {"prompts_per_step": 2, "max_steps": 3}


class Says:
    """Another first token for each completion, then ``ids``."""

    def __init__(self, ids: tuple[int, ...] = (7,)):
        self.ids = ids
        self.changes = 0

    def sample(
        self, prompt_ids: Any, n: int, params: Any, seed: int, *, rows: Any, first: int = 0
    ) -> list[Group]:
        return [
            Group(
                row,
                tuple(prompt),
                tuple(Completion((4 + k, *self.ids), f"w{k}", "length") for k in range(n)),
            )
            for row, prompt in zip(rows, prompt_ids, strict=True)
        ]

    def weights_changed(self) -> None:
        self.changes += 1


def trainer(
    directory: Path, sampler: Any = None, search_paths: Sequence[Path] = (), **options: Any
) -> GRPOTrainer:
    by_name = {"sampler": sampler} if isinstance(sampler, str) else {}
    return GRPOTrainer(
        model=tiny.model(),
        reward_funcs=process_runs.even_ids,
        args=GRPOConfig(
            **{
                "output_dir": str(directory), "num_generations": 4, "max_completion_length": 4,
                "bf16": False, "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2,
            } | STEPS | by_name | options
        ),
        train_dataset=process_runs.PROMPTS,
        tokenizer=tiny.tokenizer(),
        search_paths=search_paths,
        sampler=None if by_name else sampler,
    )  # fmt: skip


def metrics(run: GRPOTrainer) -> list[dict[str, Any]]:
    rows = read_metrics(Path(run.args.output_dir) / "metrics.jsonl")
    clock = ("time/", "step_time", "tokens_per_second", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def named(directory: Path, name: str, **options: Any) -> GRPOTrainer:
    """With a sampler of the file's, as if the configuration lay beside it."""
    (directory / "own.py").write_text(OWN)
    return trainer(directory / name, sampler="own.py:Counts", search_paths=[directory], **options)


def test_one_by_name_is_the_run_that_it_would_be_without(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", rollout_weights="adapter")
    own = named(tmp_path, "named")
    plain.train()
    own.train()
    assert metrics(own) == metrics(plain)
    counts: Any = own.sampler
    assert counts.sampler.sampled == [0, 1, 2] and counts.sampler.changes == 3


def test_a_passed_one_is_told_of_each_update_that_was_applied(tmp_path: Path) -> None:
    sampler = Says()
    run = trainer(tmp_path, sampler)
    run.step()
    assert sampler.changes == 1
    norm = run.learner._norm
    run.args.max_nonfinite_steps = 1
    run.learner._norm = lambda parameters: norm(parameters) * torch.nan  # type: ignore[method-assign]
    assert run.step()["skipped_update"] == 1
    assert sampler.changes == 1, "these weights were left alone"
    run.learner._norm = norm  # type: ignore[method-assign]
    run.step()
    assert sampler.changes == 2


def test_it_is_told_of_weights_from_a_checkpoint_before_it_samples(tmp_path: Path) -> None:
    trainer(tmp_path, Says(), save_strategy="steps", save_steps=2, max_steps=3).train()

    class First(Says):
        def sample(self, *args: Any, **kwargs: Any) -> list[Group]:
            seen.append(self.changes)
            return super().sample(*args, **kwargs)

    seen: list[int] = []
    again = trainer(tmp_path, First(), save_strategy="steps", save_steps=2, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000002"))
    assert seen == [1]


def test_a_state_that_is_put_back_counts_as_other_weights(tmp_path: Path) -> None:
    sampler = Says()
    run = trainer(tmp_path, sampler)
    run.load_state_dict(run.state_dict())
    assert sampler.changes == 1


def test_its_memory_is_rehearsed_if_it_can(tmp_path: Path) -> None:
    class Warm(Says):
        def warm_up(self, prompt_ids: Any, n: int, params: Any) -> bool:
            warm.append((len(prompt_ids), n, params.max_new_tokens))
            return True

    warm: list[Any] = []
    assert trainer(tmp_path / "a", Says()).warm_up().startswith("Rehearsed an update at")
    assert trainer(tmp_path / "b", Warm()).warm_up().startswith("Rehearsed a rollout and an upd")
    assert warm == [(2, 4, 4)]


def test_what_is_no_rollout_ends_the_run_with_its_name(tmp_path: Path) -> None:
    run = trainer(tmp_path, Says((tiny.VOCAB,)))
    with pytest.raises(SamplerError, match=rf"sampler \(Says\): group 0 .* token {tiny.VOCAB}"):
        run.train()


def test_mistakes_come_before_the_model(tmp_path: Path) -> None:
    missing = str(tmp_path / "no model here")
    for sampler, option, problem in [
        (object(), "auto", r"sampler \(object\): expected an object with sample"),
        (Says(), "generate", r"sampler: generate, and a sampler was passed"),
        (None, "none.py:Mine", r"sampler 'none.py:Mine': no such file"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            GRPOTrainer(
                missing,
                args=GRPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, sampler=option),
                sampler=sampler,
            )
