"""``rollout_weights``: what the plan makes of it, and what a run takes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import tiny
import torch
import transformers

from fusedgrpo import host
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.plan import GIB, MemoryPlan, plan_table
from fusedgrpo.engine.memory.planner import MemoryPlanner
from fusedgrpo.engine.memory.rollout_weights import choose_rollout_weights, merged_bytes, pays
from fusedgrpo.models.policy import Policy

H, M, LAYERS = 512, 1024, 6
# Queries and output, keys and values, and the three of the MLP; in bfloat16.
COPY = LAYERS * (2 * H * H + 2 * H * 128 + 3 * H * M) * 2


@functools.cache
def planner() -> MemoryPlanner:
    return MemoryPlanner(
        transformers.AutoConfig.for_model(
            "qwen2", vocab_size=50000, hidden_size=H, intermediate_size=M,
            num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2,
            tie_word_embeddings=True, dtype="bfloat16",
        )
    )  # fmt: skip


def plan(size: int = 80 * GIB, **options: Any) -> MemoryPlan:
    config = GRPOConfig(
        **{
            "sampler": "decoder", "load_in_4bit": True, "max_completion_length": 256,
            "prompts_per_step": 2,
        } | options
    )  # fmt: skip
    return planner().plan(config, gpu_bytes=size, prompt_tokens=128)


def test_a_copy_is_there_where_all_else_stays_as_it_is() -> None:
    roomy, alone = plan(), plan(rollout_weights="adapter")
    assert roomy.rollout_weights == "merged" and alone.rollout_weights == "adapter"
    assert roomy.resident["merged copy for rollouts"] == COPY
    assert "merged copy for rollouts" not in alone.resident
    assert "merged copy" in plan_table(roomy) and "rollout_weights: merged" in plan_table(roomy)
    # To the byte: with all of it, and with one less.
    exact = plan(roomy.needed)
    assert exact == dataclasses.replace(roomy, gpu_bytes=roomy.needed)
    less = plan(roomy.needed - 1)
    assert less.rollout_weights == "adapter" and less.fits
    for name in ("tokens_per_microbatch", "max_in_flight", "activation_offloading", "phases"):
        assert getattr(less, name) == getattr(alone, name), name


def test_its_rollout_has_neither_adapter_nor_four_bit_weights() -> None:
    merged, adapter = (
        plan(rollout_weights=name, prompts_per_step=1, tokens_per_microbatch=384).phases["rollout"]
        for name in ("merged", "adapter")
    )
    assert merged["K/V pages"] == adapter["K/V pages"]
    beside = [sum(parts.values()) - parts["weights, adapter, optimizer"]
              for parts in (merged, adapter)]  # fmt: skip
    # The largest weight, which is not made for each product; two layers in one product take some of
    # that.
    assert H * M * 2 / 2 < beside[1] - beside[0] < H * M * 2


def test_a_copy_that_was_asked_for_displaces_other_things_or_is_advised_against() -> None:
    asked = plan(rollout_weights="merged")
    assert asked.rollout_weights == "merged"
    short = plan(asked.needed - COPY // 2, rollout_weights="merged", tokens_per_microbatch=10**6,
                 activation_offloading=False, max_in_flight=16)  # fmt: skip
    assert short.rollout_weights == "merged" and not short.fits
    assert any(text.startswith("rollout_weights: adapter") for text in short.advice)


@pytest.mark.parametrize(
    "options", [{"sampler": "generate"}, {"finetuning_type": "full", "load_in_4bit": False}]
)
def test_there_is_none_without_our_decoder_or_without_an_adapter(options: Any) -> None:
    found = plan(**options, gradient_checkpointing=False, tokens_per_microbatch=384)
    assert found.rollout_weights == "adapter"
    assert "merged copy for rollouts" not in found.resident


# --- in a run -------------------------------------------------------------------------------------


def with_adapter(**options: Any) -> Policy:
    return Policy(tiny.add_lora(tiny.model(), **options))


# Two layers: queries and output 16 x 16, keys and values 16 x 8, three of 16 x 32; float32.
TINY = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32) * 4


def test_the_copy_of_a_model_is_that_of_what_has_an_adapter() -> None:
    assert merged_bytes(with_adapter()) == TINY
    assert merged_bytes(with_adapter(target_modules=["q_proj"])) == 2 * 16 * 16 * 4
    assert merged_bytes(Policy(tiny.model())) == 0
    half = Policy(tiny.add_lora(tiny.model()), compute_dtype=torch.bfloat16)
    assert merged_bytes(half) == TINY // 2


@pytest.mark.parametrize("sampler", ["auto", "decoder"])
def test_on_a_cpu_a_quarter_of_its_memory_decides(sampler: str, monkeypatch) -> None:
    config, on = GRPOConfig(sampler=sampler), with_adapter()
    for size, expected in ((4 * TINY, "merged"), (4 * TINY - 1, "adapter")):
        monkeypatch.setattr(host, "memory", lambda size=size: size)
        assert choose_rollout_weights(config, None, on) == expected
    assert choose_rollout_weights(config, None, Policy(tiny.model())) == "adapter"


def test_on_a_gpu_the_plan_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    on = with_adapter()
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    config = GRPOConfig(sampler="decoder")
    assert choose_rollout_weights(config, plan(), on) == "merged"
    assert choose_rollout_weights(config, plan(rollout_weights="adapter"), on) == "adapter"
    # A model that was handed over has no plan.
    for size, expected in ((4 * TINY, "merged"), (4 * TINY - 1, "adapter")):
        monkeypatch.setattr(host, "gpu_memory", lambda device, size=size: (0, size))
        assert choose_rollout_weights(config, None, on) == expected


@pytest.mark.parametrize("option", ["adapter", "merged"])
def test_what_was_asked_for_is_taken(option: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "memory", lambda: 1)
    config = GRPOConfig(sampler="decoder", rollout_weights=option)
    assert choose_rollout_weights(config, None, with_adapter()) == option


def test_a_copy_for_short_completions_does_not_pay() -> None:
    assert pays(GRPOConfig(max_completion_length=32))
    assert not pays(GRPOConfig(max_completion_length=31))
