"""Activations of a whole model from two small ones."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory import fake_layers
from fusedgrpo.engine.memory.fake_layers import Batch, Ragged
from fusedgrpo.engine.memory.measure import SmallModel, straight_line
from fusedgrpo.engine.memory.plan import GIB
from fusedgrpo.engine.memory.planner import plan_memory
from fusedgrpo.engine.memory.rollout_memory import generate_memory
from fusedgrpo.engine.memory.sizes import DEPTHS
from fusedgrpo.engine.memory.storage_tracker import StorageTracker
from fusedgrpo.models import varlen_attention
from fusedgrpo.models.adapters import fused_lora
from fusedgrpo.models.varlen_attention import VarlenTraits, varlen_traits

LAYERS = 7


@pytest.fixture(scope="module")
def models() -> Any:
    from transformers import AutoConfig

    settings = AutoConfig.for_model(
        "qwen2", vocab_size=5000, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2, dtype="bfloat16",
    )  # fmt: skip
    config = GRPOConfig(load_in_4bit=True)
    return {n: SmallModel(config, settings, n) for n in (*DEPTHS, LAYERS)}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.slow
def test_two_depths_tell_all_others(models: Any, gradients: bool) -> None:
    batch = Batch(tokens=2000, keys=2500, scored=1800, sequences=3)

    def at(layers: int) -> Any:
        return models[layers].activations(batch, gradients=gradients)

    assert straight_line(at, *DEPTHS, LAYERS) == pytest.approx(at(LAYERS), rel=0.001)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layers_with_lora_compute_as_they_do_in_an_update(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.model("Llama").config
    settings.dtype = "bfloat16"
    model = SmallModel(GRPOConfig(load_in_4bit=True, bf16=True, lora_dropout=dropout), settings, 2)
    sizes: list[int] = []
    original = fused_lora.lora_linears

    def noting(x: Any, layers: Any, dtype: Any) -> Any:
        sizes.append(len(layers))
        return original(x, layers, dtype)

    monkeypatch.setattr(fused_lora, "lora_linears", noting)
    batch = Batch(tokens=50, keys=60, scored=40, sequences=3)
    once = [3, 1, 2, 1] * 2
    model.activations(batch, gradients=False)
    assert sizes == once
    model.activations(batch, gradients=True)
    # Forward, and again behind the checkpoints; peft's own where each layer draws a mask.
    assert sizes == (once if dropout else 3 * once)


@pytest.mark.slow
def test_repeated_prompts_are_kept_per_key_until_the_layer_is_done(models: Any) -> None:
    few, many = (
        models[LAYERS].activations(Batch(4000, keys, 3000, 5), gradients=True)
        for keys in (4000, 12000)
    )
    # keys and values, two heads of 32 in 16 bit; attention's backward may add to it
    assert many.layers_backward - few.layers_backward >= 8000 * 2 * 2 * 32 * 2
    assert many.head_forward == few.head_forward


def test_a_rollout_keeps_keys_and_values_of_all_layers(models: Any) -> None:
    found = generate_memory(models[LAYERS], rows=16, groups=2, prompt=50, length=300)
    assert found.entries == 16 * 300 * LAYERS * 2 * 2 * 32 * 2


def planned(settings: Any, **options: Any) -> dict[str, int]:
    # One adapter a layer, and one sequence: measuring takes the time.
    config = GRPOConfig(
        bf16=True, max_prompt_length=32, max_completion_length=64, tokens_per_microbatch=96,
        lora_target_modules=["o_proj"], rollout_weights="adapter", **options,
    )  # fmt: skip
    return plan_memory(config, settings, gpu_bytes=16 * GIB, activation_offloading=False).totals


@pytest.mark.slow
def test_dropout_is_counted_where_it_is_on() -> None:
    settings = tiny.model("Phi3").config
    settings.dtype = "bfloat16"
    without = planned(settings)
    settings.resid_pdrop = settings.embd_pdrop = 0.1
    assert planned(settings) == without
    more = planned(settings, disable_dropout=False)
    assert more["update backward"] > without["update backward"]
    assert more["rollout"] == without["rollout"]


@pytest.mark.parametrize("family", ["Mixtral", "GraniteMoe", "Glm4Moe"])
@pytest.mark.slow
def test_what_the_router_adds_to_an_update_is_counted(family: str) -> None:
    settings = tiny.mixture(family).config
    settings.dtype = "bfloat16"
    without = planned(settings, router_aux_loss_coef=0)
    more = planned(settings, router_aux_loss_coef=0.01)
    # Logits and probabilities of each token, expert and layer are kept for the backward pass.
    tokens = 32 + 64
    layers = settings.num_hidden_layers - getattr(settings, "first_k_dense_replace", 0)
    least = tokens * layers * 4 * 2
    assert more["update forward"] >= without["update forward"] + least
    assert more["scoring"] == without["scoring"]


def attention_memory(traits: VarlenTraits, sequences: int = 1) -> tuple[int, int]:
    """Bytes that attention over 300 queries and 500 keys keeps of itself, and that its backward
    pass takes at the most."""
    tracker = StorageTracker({})
    with FakeTensorMode(), tracker:
        shapes = (300, 8, 32), (300, 2, 32), (300, 2, 32)
        q, k, v = (torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        before = tracker.live
        out = fake_layers._VarlenAttention.apply(q, k, v, Ragged(500, sequences, traits))
        kept = tracker.live - before
        grad = torch.empty_like(out)
        tracker.start_peak()
        out.backward(grad)
        return kept, tracker.peak.bytes - before


def test_heads_that_a_kernel_does_not_share_are_kept_repeated() -> None:
    shared, repeated = (attention_memory(VarlenTraits(each, False)) for each in (False, True))
    assert repeated[0] - shared[0] == 2 * 500 * (8 - 2) * 32 * 2


def test_deterministic_gradients_of_queries_take_room_for_each_part() -> None:
    once, parts = (attention_memory(VarlenTraits(False, each)) for each in (False, True))
    assert parts[0] == once[0]
    row = 8 * 32 * 4
    # 132 programs for 8 heads of one sequence; 17 are enough sequences.
    assert parts[1] - once[1] == (17 - 1) * (300 + 128) * row
    many = [attention_memory(VarlenTraits(False, each), 17)[1] for each in (False, True)]
    assert many[0] == many[1] == once[1] + 16 * 128 * (row + 8 * 4)


@pytest.mark.parametrize(
    ("flash", "known", "everything", "traits"),
    [
        (False, {"scale", "enable_gqa"}, False, (False, False)),
        (False, {"scale", "enable_gqa"}, True, (False, True)),
        (False, {"scale"}, False, (True, False)),  # torch 2.11
        (True, {"scale"}, False, (False, True)),
    ],
)
def test_what_the_kernel_takes_follows_from_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, flash: bool, known: set[str], everything: bool, traits: Any
) -> None:
    monkeypatch.setattr(varlen_attention, "_has_flash_attn", lambda: flash)
    monkeypatch.setattr(varlen_attention, "_varlen_parameters", lambda: frozenset(known))
    assert varlen_traits(full_determinism=everything) == traits
