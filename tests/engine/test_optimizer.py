"""Optimizers by name, and schedules that a resume does not change."""

from __future__ import annotations

import builtins
import json
import warnings
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import SchedulerType, get_scheduler
from transformers.training_args import OptimizerNames

from fusedgrpo.config import not_here
from fusedgrpo.config.schema import GRPOConfig, Optimizer, Scheduler
from fusedgrpo.engine import metric_schedule
from fusedgrpo.engine.checkpoint_files import load_optimizer_state, optimizer_state
from fusedgrpo.engine.metric_schedule import BY_METRIC
from fusedgrpo.engine.optimizer import build_optimizer, build_scheduler, check_options
from fusedgrpo.errors import ConfigError


def parameters() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    shapes = {"a.weight": (80, 80), "a.bias": (8,), "b.weight": (4, 2), "norm.weight": (8,)}
    return [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]


def config(**options: Any) -> GRPOConfig:
    return GRPOConfig(learning_rate=0.1, **options)


def minimise(
    optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], steps: int = 30
) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum((p.square().sum() for _, p in named), torch.zeros(()))
        loss.backward()
        optimizer.step()
    return float(loss)


NOT_INSTALLED = {
    "stable_adamw": "pip install torch-optimi",
    "grokadamw": "pip install grokadamw",
    "adamw_anyprecision": "torchdistx",
}


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_minimises_and_goes_on_or_is_refused_by_name(name: str) -> None:
    named = parameters()
    start = sum(float(p.detach().square().sum()) for _, p in named)
    rate = {"sgd": 0.05, "adagrad": 0.5}.get(name, 0.1)
    settings = {"optim_args": "momentum=0.9, dampening=0.1"} if name == "sgd" else {}
    chosen = GRPOConfig(learning_rate=rate, optim=name, **settings)
    try:
        optimizer = build_optimizer(chosen, named)
    except ConfigError as error:
        needs = NOT_INSTALLED.get(name, f"optim: {name} does not run on cpu")
        assert f"optim: {name} " in str(error) and needs in str(error)
        assert "adamw_torch" in str(error)
        return
    minimise(optimizer, named, steps=3)
    # As a checkpoint holds it, into a new one.
    tensors, values = optimizer_state(optimizer)
    copies = [(n, nn.Parameter(p.detach().clone())) for n, p in named]
    again = build_optimizer(chosen, copies)
    load_optimizer_state(again, {k: v.clone() for k, v in tensors.items()}, values)
    assert minimise(optimizer, named, steps=27) < 0.2 * start
    minimise(again, copies, steps=27)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(named, copies, strict=True))


def test_the_names_are_those_of_transformers() -> None:
    names = {name.value for name in OptimizerNames}
    assert set(get_args(Optimizer)) | not_here._REASONS["optim"].keys() == names
    assert not set(get_args(Optimizer)) & not_here._REASONS["optim"].keys()
    schedules = {name.value for name in SchedulerType}
    assert set(get_args(Scheduler)) == schedules
    for option, value, why in (
        ("optim", "lomo", "inside the backward pass"),
        ("optim", OptimizerNames.GALORE_ADAMW, "whole weight matrices"),
        ("optim", "schedule_free_adamw", "one set of weights for the gradients"),
    ):
        with pytest.raises(ConfigError, match=rf"^{option}: \w+ is not supported: .*{why}"):
            GRPOConfig(**{option: value})


def test_what_transformers_makes_has_its_settings() -> None:
    arguments = {"optim": "sgd", "optim_args": "momentum=0.5, nesterov=true"}
    optimizer = build_optimizer(config(weight_decay=0.3, **arguments), parameters())
    assert type(optimizer) is torch.optim.SGD
    (group, rest) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"]) == (0.5, True)
    assert (group["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim": "sgd", "optim_args": "momentm=0.9"}, "optim_args: sgd has no setting momentm"),
        ({"optim_args": "eps=1e-3"}, "optim_args: adamw_torch_fused has no setting eps"),
        ({"optim": "sgd", "optim_args": "weight_decay=1"}, "weight_decay is an option of its own"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "optim: sgd cannot be made .*'much'"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "lr_scheduler_kwargs: linear cannot be made of"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cannot be made of no settings: .*min_lr"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}},
            "lr_scheduler_kwargs: lr_scheduler_type constant has no settings, got a",
        ),
    ],
)
def test_settings_that_nobody_reads_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_options(GRPOConfig(**options))


def test_settings_that_are_read_pass() -> None:
    check_options(GRPOConfig(optim="sgd", optim_args="momentum=0.9, nesterov=true"))
    with pytest.raises(ConfigError, match="optim_args: expected name=value"):
        GRPOConfig(optim_args="momentum")


@pytest.mark.parametrize(
    ("name", "kind", "bits", "paged"),
    [
        ("adamw_8bit", "AdamW8bit", 8, False),
        ("adamw_bnb_8bit", "AdamW8bit", 8, False),
        ("paged_adamw_32bit", "PagedAdamW32bit", 32, True),
        ("paged_adamw_8bit", "PagedAdamW8bit", 8, True),
    ],
)
def test_bitsandbytes_optimizers_are_what_their_names_say(
    name: str, kind: str, bits: int, paged: bool
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    try:
        optimizer: Any = build_optimizer(config(optim=name), parameters())
    except ConfigError:
        pytest.skip(f"{name} does not run on this CPU")
    assert isinstance(optimizer, getattr(bnb.optim, kind))
    assert (optimizer.args.optim_bits, optimizer.is_paged) == (bits, paged)


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, AttributeError])
def test_an_optimizer_that_the_device_cannot_run_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def fail(self: Any) -> None:
        raise error("no kernel for this device")

    monkeypatch.setattr(bnb.optim.AdamW8bit, "step", fail)
    with pytest.raises(ConfigError, match=r"optim: adamw_8bit does not run on cpu .*no kernel"):
        build_optimizer(config(optim="adamw_8bit"), parameters())


def test_a_missing_bitsandbytes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "bitsandbytes":
            raise ModuleNotFoundError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="adamw_8bit needs the package bitsandbytes"):
        build_optimizer(config(optim="adamw_8bit"), parameters())


def test_weight_decay_acts_on_matrices_alone() -> None:
    named = parameters()
    optimizer = build_optimizer(config(weight_decay=0.5), named)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert [decay[id(p)] for _, p in named] == [0.5, 0.0, 0.5, 0.0]
    assert len(build_optimizer(config(), named[:1]).param_groups) == 1


def test_adams_constants_arrive() -> None:
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    (group, _) = build_optimizer(config(**options), parameters()).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.95), 1e-6)
    (group, _) = build_optimizer(config(optim="adamw_torch_fused"), parameters()).param_groups
    assert group["fused"] is True


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="No parameter is trainable"):
        build_optimizer(config(), [])


def rates(options: dict[str, Any], total: int, done: int = 0) -> list[float]:
    optimizer = build_optimizer(config(**options), parameters())
    scheduler = build_scheduler(config(**options), optimizer, total, done)
    out = []
    for _ in range(total - done):
        out.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == out[-1]
        optimizer.step()
        scheduler.step()
    return out


@pytest.mark.parametrize("warmup", [0, 3, 0.25])
@pytest.mark.parametrize("name", [s for s in get_args(Scheduler) if s not in BY_METRIC])
def test_a_resumed_schedule_equals_the_uninterrupted_one(name: str, warmup: float) -> None:
    settings = {
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr": 0.01, "warmup_lr_rate": 0.2},
        "warmup_stable_decay": {"num_decay_steps": 4},
        "cosine_with_restarts": {"num_cycles": 2},
    }
    options = {
        "lr_scheduler_type": name,
        "warmup_steps": warmup,
        "lr_scheduler_kwargs": settings.get(name),
    }
    whole = rates(options, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for done in (0, 1, 5, 11):
            assert rates(options, 12, done) == whole[done:]


@pytest.mark.parametrize("done", [1, 7])
def test_a_resume_over_a_loaded_optimizer_gives_the_same_rates(done: int) -> None:
    """As the trainer does it: a second schedule on an optimizer that already has one."""
    options = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    optimizer = build_optimizer(config(**options), parameters())
    build_scheduler(config(**options), optimizer, 12)
    build_scheduler(config(**options), optimizer, 12, done)
    assert optimizer.param_groups[0]["lr"] == rates(options, 12)[done]


@pytest.mark.parametrize("name", BY_METRIC)
def test_a_schedule_by_evaluations_is_transformers_and_goes_on(name: str) -> None:
    settings = {"patience": 1, "factor": 0.5, "min_lr": 0.0}
    given = config(lr_scheduler_type=name, lr_scheduler_kwargs=settings, eval_strategy="epoch")
    optimizers = [build_optimizer(given, parameters()) for _ in range(3)]
    ours = build_scheduler(given, optimizers[0], 8)
    theirs: Any = get_scheduler(
        name, optimizers[1], scheduler_specific_kwargs=settings | {"mode": "max"}
    )
    again = build_scheduler(given, optimizers[2], 8)
    rates = set()
    for number, reward in enumerate([0.1, 0.3, 0.5, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6]):
        ours.step()  # that of an update
        metric_schedule.observe(ours, reward)
        theirs.step(reward)
        if number == 4:
            metric_schedule.restore(again, json.loads(json.dumps(metric_schedule.state(ours))))
        elif number > 4:
            metric_schedule.observe(again, reward)
            assert again.get_last_lr() == ours.get_last_lr()
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
        rates.add(ours.get_last_lr()[0])
    assert len(rates) > 1
    assert build_scheduler(given, optimizers[0], 8, 3, ours) is ours
    with pytest.raises(ConfigError, match="lr_scheduler_type: the best of no evaluation"):
        config(lr_scheduler_type=name)
    with pytest.raises(ConfigError, match=r"warmup_steps: lr_scheduler_type: \w+ has no warm-up"):
        config(lr_scheduler_type=name, eval_strategy="epoch", warmup_steps=2)


def test_warmup_is_a_count_or_a_share_of_the_run() -> None:
    linear = {"lr_scheduler_type": "constant_with_warmup"}
    assert rates({**linear, "warmup_steps": 4}, 8) == pytest.approx(
        [0.0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1]
    )
    assert rates({**linear, "warmup_steps": 0.5}, 8) == rates({**linear, "warmup_steps": 4}, 8)
    assert rates({"lr_scheduler_type": "linear"}, 4) == pytest.approx([0.1, 0.075, 0.05, 0.025])
