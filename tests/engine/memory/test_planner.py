"""The memory plan: as the simulated step, phase by phase; what it chooses; what it advises."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from fusedgrpo import host
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.plan import GIB, MemoryPlan, parse_bytes, plan_table
from fusedgrpo.engine.memory.planner import MemoryPlanner, plan_memory
from fusedgrpo.errors import ConfigError, PlanError
from fusedgrpo.models.activation_offload import CHUNK

BENCH = Path(__file__).parents[3] / "bench"
TOLERANCE = 0.1


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("simulate")


def config(completion: int, **changes: Any) -> GRPOConfig:
    return GRPOConfig(
        **{"load_in_4bit": True, "lora_r": 64, "max_completion_length": completion} | changes
    )


def tiny(**changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        **{
            "model_type": "qwen2", "vocab_size": 50000, "hidden_size": 512,
            "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8,
            "num_key_value_heads": 2, "tie_word_embeddings": True, "dtype": "bfloat16",
        } | changes
    )  # fmt: skip


@functools.cache
def planner(**changes: Any) -> MemoryPlanner:
    return MemoryPlanner(tiny(**changes))  # one for all tests: measuring takes the time


DEEP = {"num_hidden_layers": 48}

# What is quickly measured, where what is asked does not depend on it.
QUICK = {"gradient_checkpointing": False, "tokens_per_microbatch": 384, "sampler": "generate"}


def plan(options: GRPOConfig, gib: float = 24, **arguments: Any) -> MemoryPlan:
    of = planner(**arguments.pop("settings", {}))
    arguments = {"prompt_tokens": 128} | arguments
    return of.plan(options, gpu_bytes=int(gib * GIB), **arguments)


def agree(simulate: ModuleType, model: str, P: int, options: GRPOConfig, **changes: Any) -> None:
    offload = changes.pop("offload", False)
    settings = simulate.model_config(model, **changes)
    planned = plan_memory(
        options, settings, gpu_bytes=80 * GIB, prompt_tokens=P, activation_offloading=offload
    )
    options = dataclasses.replace(
        options,
        tokens_per_microbatch=planned.tokens_per_microbatch,
        rollout_weights=planned.rollout_weights,
    )
    found = simulate.simulate(
        options, settings, prompt_tokens=P, in_flight=planned.max_in_flight, offload=offload
    )
    weights = found.peaks["weights"].bytes
    assert planned.totals["weights"] == pytest.approx(weights, rel=0.005)
    assert list(planned.totals) == list(found.peaks)
    for phase, peak in found.peaks.items():
        assert planned.totals[phase] == pytest.approx(peak.bytes, rel=TOLERANCE), phase
        # Nor is it the weights alone that agree.
        beside = planned.totals[phase] - planned.totals["weights"]
        assert beside == pytest.approx(peak.bytes - weights, rel=0.15, abs=2**24), phase


@pytest.mark.parametrize(
    ("model", "P", "options", "changes"),
    [
        pytest.param(
            "qwen2.5-7b", 512, config(1024, tokens_per_microbatch=1536), {},
            id="7b", marks=pytest.mark.slow,
        ),
        pytest.param(
            "llama-3.2-3b", 64, config(256, lora_r=8, gradient_checkpointing=False), {},
            id="3b-no-checkpointing",
        ),
        pytest.param(
            "qwen2.5-7b", 512, config(1024, sampler="generate"), {},
            id="7b-generate", marks=pytest.mark.slow,
        ),
        pytest.param(
            "qwen2.5-14b", 256, config(768, optim="adamw_8bit"), {"offload": True},
            id="14b-offload-8bit", marks=pytest.mark.slow,
        ),
        pytest.param(
            "qwen2.5-0.5b", 128, config(512, load_in_4bit=False, shared_prompt="off"), {},
            id="0.5b-16bit-packed", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_plan_is_within_a_tenth_of_the_simulated_step(
    simulate: ModuleType, model: str, P: int, options: GRPOConfig, changes: dict[str, Any]
) -> None:
    agree(simulate, model, P, options, num_hidden_layers=4, **changes)


# Each model and each case once, and of one model all layers: every other layer is like those that
# are there. bench/bench_memory.py compares more of them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layers", "P", "C", "G", "rank", "checkpointing", "offload"),
    [
        ("llama-3.1-8b", 8, 256, 512, 4, 16, True, False),
        ("qwen2.5-7b", 8, 512, 3584, 8, 64, True, False),
        ("qwen2.5-0.5b", 24, 512, 7680, 8, 64, True, True),
        ("qwen2.5-14b", 8, 128, 384, 16, 32, False, False),
    ],
)
def test_plan_is_within_a_tenth_of_the_simulated_step_of_deep_models(
    simulate: ModuleType, model: str, layers: int, P: int, C: int, G: int, rank: int,
    checkpointing: bool, offload: bool,
) -> None:  # fmt: skip
    options = config(
        C, num_generations=G, lora_r=rank, gradient_checkpointing=checkpointing,
        per_device_train_batch_size=G, tokens_per_microbatch=P + C,
    )  # fmt: skip
    agree(simulate, model, P, options, num_hidden_layers=layers, offload=offload)


@pytest.mark.slow
def test_tied_embeddings_are_counted_once() -> None:
    options = config(256, **QUICK)
    tied = plan(options).resident["embeddings and head"]
    apart = plan(options, settings={"tie_word_embeddings": False}).resident["embeddings and head"]
    assert tied == 2 * 50000 * 512 and apart == 2 * tied


def test_adapter_gradients_and_optimizer_follow_the_rank() -> None:
    layer = 4 * 512 + 2 * (512 + 128) + 3 * (512 + 1024)  # inputs and outputs of all seven
    for rank in (8, 64):
        found = plan(config(256, lora_r=rank, **QUICK))
        trained = 6 * rank * layer
        assert found.resident["LoRA adapter"] == 4 * trained
        assert found.resident["optimizer state"] == 8 * trained
        assert found.phases["update backward"]["gradients"] == 4 * trained


def test_eight_bit_and_paged_optimizers() -> None:
    full, small, paged = (
        plan(config(256, optim=name, **QUICK))
        for name in ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
    )
    state = full.resident["optimizer state"]
    assert small.resident["optimizer state"] == pytest.approx(state / 4, rel=0.02)
    assert "optimizer state" not in paged.resident
    assert paged.host["paged optimizer state"] == small.resident["optimizer state"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"load_in_4bit": False, **QUICK}, {"bf16": False, **QUICK}, {"fp16": True, **QUICK}],
    ids=["all", "not 4 bit", "float32", "float16"],
)
def test_the_plan_is_the_same_on_every_machine(pretended: Any, monkeypatch, changes: Any) -> None:
    found = []
    for bfloat16, gpu in ((False, False), (True, False), (False, True)):
        pretended(bfloat16=bfloat16)
        monkeypatch.setattr(host, "has_gpu", lambda gpu=gpu: gpu)
        found.append(plan_memory(config(64, **changes), tiny(), gpu_bytes=24 * GIB))
    assert found[0] == found[1] == found[2]


def test_micro_batches_hold_at_least_the_longest_sequence() -> None:
    found = plan(config(256, **QUICK | {"tokens_per_microbatch": 100}))
    assert found.longest == 128 + 256
    assert found.tokens_per_microbatch == found.longest


def test_prompts_are_as_long_as_the_options_say() -> None:
    assert plan(config(256, max_prompt_length=128, **QUICK), prompt_tokens=None).longest == 384
    assert plan(config(256, max_length=384, **QUICK), prompt_tokens=None).longest == 384
    assert plan(config(256, max_prompt_length=300, **QUICK), prompt_tokens=128).longest == 384


@pytest.mark.slow
def test_more_memory_is_used_for_more_tokens_at_once() -> None:
    options = config(256, num_generations=16, per_device_train_batch_size=64)
    roomy = plan(options, settings=DEEP)
    assert roomy.tokens_per_microbatch == 16384
    least = plan(dataclasses.replace(options, tokens_per_microbatch=384), settings=DEEP)
    between = [least.needed + (roomy.needed - least.needed) * share for share in (1 / 3, 2 / 3)]
    found = [plan(options, size / GIB, settings=DEEP) for size in between]
    assert all(f.fits for f in found)
    assert 384 < found[0].tokens_per_microbatch < found[1].tokens_per_microbatch < 16384
    # and not by far less than there is
    assert all(f.needed > 0.9 * size for f, size in zip(found, between, strict=True))


def test_no_more_tokens_than_a_step_has() -> None:
    found = plan(config(256, **QUICK | {"tokens_per_microbatch": None}))
    assert found.tokens_per_microbatch == 128 + 8 * 256
    given = plan(config(256, **QUICK | {"tokens_per_microbatch": 10**6}))
    assert given.totals == found.totals


@pytest.mark.slow
def test_fewer_completions_are_in_flight_where_their_cache_does_not_fit() -> None:
    options = config(16000, per_device_train_batch_size=64, lora_r=16, sampler="generate")
    all_of_them = plan(options, 80)
    assert all_of_them.max_in_flight == 64
    cache = all_of_them.phases["rollout"]["KV cache"]
    assert cache == 64 * 16128 * 6 * 2 * 2 * 64 * 2
    everything = 1.05 * all_of_them.totals["rollout"] + GIB
    counts = [
        plan(options, (everything - 1.05 * cache * share) / GIB).max_in_flight
        for share in (0.4, 0.9, 1.03)
    ]
    assert 64 > counts[0] > counts[1] > counts[2] >= 1
    assert counts[0] % 8 == 0
    assert plan(dataclasses.replace(options, max_in_flight=20), 80).max_in_flight == 16


@pytest.mark.slow
def test_activations_are_offloaded_only_where_it_is_needed() -> None:
    options = config(8000, num_generations=2, per_device_train_batch_size=2, lora_r=16,
                     rollout_weights="adapter")  # fmt: skip
    options = dataclasses.replace(options, tokens_per_microbatch=8128)
    kept = plan(options, settings=DEEP)
    assert not kept.activation_offloading and not kept.host
    tight = plan(options, kept.needed / GIB - 0.1, settings=DEEP)
    assert tight.activation_offloading and tight.fits
    inputs, norm = -(-8128 * 512 * 2 // CHUNK), -(-8128 * 512 * 4 // CHUNK)
    head = tight.host["offloaded activations"] // CHUNK - 48 * inputs - norm
    assert 0 < head <= inputs
    saved = kept.totals["update backward"] - tight.totals["update backward"]
    assert saved == 46 * 8128 * 512 * 2  # all layer inputs but two


def test_a_plan_that_does_not_fit_names_the_nearest_change_that_does() -> None:
    options = config(
        1920, per_device_train_batch_size=16, **QUICK | {"tokens_per_microbatch": 16384}
    )  # fmt: skip
    gib = plan(options, settings=DEEP).needed / GIB - 0.2
    found = plan(options, gib, settings=DEEP, activation_offloading=False)
    assert not found.fits
    assert len(found.advice) == 1
    assert found.advice[0].startswith("tokens_per_microbatch: 2048: ")
    table = plan_table(found)
    assert "does not fit" in table and found.advice[0] in table
    followed = dataclasses.replace(options, tokens_per_microbatch=2048)
    assert plan(followed, gib, settings=DEEP, activation_offloading=False).fits


@pytest.mark.slow
def test_what_no_change_mends_needs_a_larger_card() -> None:
    (text,) = plan(config(256), 0.5).advice
    assert "optim: paged_adamw_8bit and max_completion_length: 128" in text
    assert "larger card" in text


def test_weights_that_all_train_need_no_adapter_and_more_of_everything_else() -> None:
    found = plan(config(128, load_in_4bit=False, finetuning_type="full", beta=0.1, **QUICK))
    weights = found.resident["embeddings and head"] + found.resident["other weights"]
    assert found.resident["optimizer state"] == pytest.approx(2 * weights, rel=0.01)
    assert found.resident["reference model"] == pytest.approx(weights, rel=0.01)
    assert "LoRA adapter" not in found.resident


@pytest.mark.parametrize(
    ("text", "gib"), [("24GB", 24), ("24", 24), ("7.5 GiB", 7.5), (" 80g ", 80)]
)
def test_sizes_of_cards_are_read(text: str, gib: float) -> None:
    assert parse_bytes(text) == gib * GIB


@pytest.mark.parametrize("text", ["", "lots", "0", "-3GB", "24MB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="24GB"):
        parse_bytes(text)


def test_the_table_shows_every_phase_what_was_chosen_and_what_was_measured() -> None:
    found = plan(config(256, **QUICK))
    table = plan_table(found, measured={"rollout": 3 * GIB})
    for phase in found.phases:
        assert phase in table
    assert "measured 3.00" in table
    assert f"tokens_per_microbatch: {found.tokens_per_microbatch}" in table
    assert "It fits" in table


def test_a_model_that_cannot_be_planned_is_said_to_be_one() -> None:
    """A state-space model has no keys and values."""
    settings = transformers.MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    with pytest.raises(PlanError, match="memory of a MambaConfig cannot be planned"):
        plan_memory(GRPOConfig(bf16=True), settings, gpu_bytes=8 * GIB)


@pytest.mark.slow
def test_where_the_prompts_dominate_a_small_card_still_gets_an_answer() -> None:
    options = GRPOConfig(
        max_prompt_length=2048, max_completion_length=64, num_generations=4, prompts_per_step=1
    )
    settings = transformers.Qwen2Config(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    plan = plan_memory(options, settings, gpu_bytes=GIB // 4)
    assert not plan.fits and plan.max_in_flight == 1 and plan.advice
