"""The plan of our own decoder's rollout: its pages, what is beside them, who is planned for it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import transformers

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.config.structured import StructuredOutputs
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.decoder_memory import DecoderMemory, DecoderModel, Decoding
from fusedgrpo.engine.memory.measure import Activations, SmallModel
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.memory.plan import GIB, MemoryPlan, plan_table
from fusedgrpo.engine.memory.planner import MemoryPlanner, plan_memory
from fusedgrpo.engine.memory.sizes import Sizes
from fusedgrpo.engine.memory.whose_rollout import packs
from fusedgrpo.engine.memory.workload import Asked
from fusedgrpo.engine.rollout import scheduler
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.models.adapters.merged_weights import FOLDED
from fusedgrpo.models.kv_cache import PAGE, PagedCache, pages_of
from fusedgrpo.models.policy import Policy

BENCH = Path(__file__).parents[3] / "bench"
P, C, G = 128, 2000, 8
KV = 6 * 2 * 2 * 64 * 2  # bytes a token: layers, keys and values, heads, dimensions, bfloat16


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("simulate")


@pytest.fixture(autouse=True)
def _rollouts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What updates and scoring take is compared in ``test_planner.py``; to measure it takes most of
    the time of a plan."""
    monkeypatch.setattr(Sizes, "activations", lambda *_: Activations(0, 0, 0, 0))


def settings() -> Any:
    return transformers.AutoConfig.for_model(
        "qwen2", vocab_size=50000, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip


@functools.cache
def planner() -> MemoryPlanner:
    return MemoryPlanner(settings())  # one for all tests: measuring takes the time


def plan(gib: float = 80, **options: Any) -> MemoryPlan:
    config = GRPOConfig(
        **{
            "sampler": "decoder", "load_in_4bit": True, "rollout_weights": "adapter",
            "max_completion_length": C, "num_generations": G, "prompts_per_step": 8,
            "tokens_per_microbatch": P + C,
        } | options
    )  # fmt: skip
    return planner().plan(config, gpu_bytes=int(gib * GIB), prompt_tokens=P)


# --- against what runs ----------------------------------------------------------------------------


def agree(
    simulate: ModuleType, model: str, P: int, options: dict[str, Any], layers: int
) -> MemoryPlan:
    of = simulate.model_config(model, num_hidden_layers=layers)
    config = GRPOConfig(
        **{"sampler": "decoder", "rollout_weights": "adapter", "load_in_4bit": True} | options
    )
    planned = plan_memory(
        config, of, gpu_bytes=80 * GIB, prompt_tokens=P, activation_offloading=False
    )
    config = dataclasses.replace(config, tokens_per_microbatch=planned.tokens_per_microbatch)
    found = simulate.simulate(
        config, of, prompt_tokens=P, in_flight=planned.max_in_flight, update=False
    )
    peak, weights = found.peaks["rollout"].bytes, found.peaks["weights"].bytes
    assert planned.totals["weights"] == pytest.approx(weights, rel=0.005)
    kept = planned.resident.keys() & {"adapter as rollouts have it", "merged copy for rollouts"}
    prepared = sum(planned.resident[name] for name in kept)
    assert prepared == pytest.approx(found.resident.get("weights for rollouts", 0), rel=0.01)
    beside = planned.totals["rollout"] - planned.totals["weights"]
    assert beside == pytest.approx(peak - weights, rel=0.05)
    return planned


def test_the_plan_is_that_of_the_decoders_own_warm_up(simulate: ModuleType) -> None:
    agree(simulate, "llama-3.2-3b", 64, {"max_completion_length": 256, "lora_r": 8}, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "P", "options"),
    [
        # Many prompts are read at once.
        (
            "llama-3.2-3b", 512,
            {"max_completion_length": 64, "prompts_per_step": 16, "tokens_per_microbatch": 4096},
        ),
        # The pages are most of it; fewer in flight than whole groups.
        ("qwen2.5-7b", 512, {"max_completion_length": 7680, "max_in_flight": 13,
                             "prompts_per_step": 4}),
        # Rows of logits.
        ("qwen2.5-0.5b", 128, {"max_completion_length": 200, "prompts_per_step": 8, "top_k": 5}),
        ("qwen2.5-0.5b", 128, {"max_completion_length": 200, "prompts_per_step": 8, "top_p": 0.9,
                               "temperature": 0.7}),
        ("qwen2.5-0.5b", 128, {"max_completion_length": 4000, "prompts_per_step": 8, "min_p": 0.1,
                               "repetition_penalty": 1.1}),
        ("qwen2.5-1.5b", 256, {"max_completion_length": 500, "load_in_4bit": False}),
        # A copy of the weights, of which some stay in four bits, or which are not in four bits.
        ("llama-3.2-3b", 512, {"max_completion_length": 64, "prompts_per_step": 16,
                               "tokens_per_microbatch": 4096, "rollout_weights": "merged"}),
        ("qwen2.5-7b", 64, {"max_completion_length": 2000, "rollout_weights": "merged",
                            "lora_target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ("qwen2.5-1.5b", 64, {"max_completion_length": 64, "rollout_weights": "merged",
                              "load_in_4bit": False}),
        # The head in float32.
        ("qwen2.5-0.5b", 128, {"max_completion_length": 256, "load_in_4bit": False,
                               "finetuning_type": "full", "rollout_weights": "auto"}),
        ("qwen2.5-0.5b", 128, {"max_completion_length": 256, "load_in_4bit": False,
                               "dtype": "float32"}),
    ],
)  # fmt: skip
def test_and_of_other_cases(
    simulate: ModuleType, model: str, P: int, options: dict[str, Any]
) -> None:
    agree(simulate, model, P, options, 3)


def test_before_there_are_pages_a_layer_is_dequantised_to_be_merged(simulate: ModuleType) -> None:
    """Of a rollout of short completions that is the peak."""
    options = {"max_completion_length": 64, "rollout_weights": "merged", "prompts_per_step": 1}
    found = agree(simulate, "qwen2.5-7b", 64, options, 3)
    layer = 3584 * 18944 * 2
    rows = FOLDED // 3584 * 3584 * 4  # in float32, to which the adapter is added
    assert found.phases["rollout"]["weights for the rollout"] == layer + rows


@pytest.mark.parametrize(
    "logits", [{}, {"top_k": 5}, {"structured_outputs": StructuredOutputs(regex="a")}], ids=str
)
def test_a_token_is_chosen_without_logits_unless_they_are_filtered(logits: dict[str, Any]) -> None:
    """64 rows of 50,000 logits, beside a tile of 16,384."""
    params = SamplingParams(max_new_tokens=40, **logits)
    case = Decoding(rows=64, prompts=8, prompt=P, reads=1, params=params)
    model = SmallModel(GRPOConfig(sampler="decoder", bf16=True), settings(), 2)
    found = DecoderModel(model, merged=False).memory(case)
    if logits:
        # In float32, a mask of what is left out and a copy without it; then a tile with its noise.
        assert found.decoding >= 64 * 50000 * (4 + 1 + 4)
    else:
        assert 64 * 16384 * 4 <= found.decoding < 64 * 50000 * 4


@pytest.mark.parametrize("rows", [3, 8])
def test_the_pages_are_those_of_a_run(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PagedCache] = []
    start = PagedCache.__init__

    def noted(cache: PagedCache, pages: int) -> None:
        start(cache, pages)
        made.append(cache)

    on = Policy(tiny.model())
    sampler = DecoderSampler(on, tiny.tokenizer(), [], execution=Execution(OOMRetry(0, rows)))
    monkeypatch.setattr(PagedCache, "__init__", noted)
    prompts, most = [[5] * 20, [6] * 20], 40
    sampler.sample(prompts, 4, SamplingParams(max_new_tokens=most), seed=0)
    (cache,) = made
    kept = sum(x.nbytes for layer in cache._layers.values() for x in layer)

    params = SamplingParams(max_new_tokens=most)
    case = Decoding(rows=rows, prompts=2, prompt=20, reads=1, params=params)
    assert case.pages == cache.pages == scheduler.pages_needed([20, 20], rows, most) + 1
    config = GRPOConfig(bf16=False, sampler="decoder")
    layers = on.causal_lm.config.num_hidden_layers
    model = SmallModel(config, on.causal_lm.config, layers)
    found = DecoderModel(model, merged=False).memory(case)
    # A tensor takes whole blocks of 512 bytes.
    assert kept <= found.entries < kept + 2 * layers * 512


# --- what is planned ------------------------------------------------------------------------------


def test_a_prompts_keys_are_there_once_and_a_completions_own_beside_them() -> None:
    found = plan()
    assert found.max_in_flight == 64
    pages = 8 * pages_of(P) + 64 * pages_of(C - 1) + 1
    assert found.phases["rollout"]["K/V pages"] == pages * PAGE * KV
    by_generate = plan(sampler="generate").phases["rollout"]["KV cache"]
    assert by_generate == 64 * (P + C) * KV
    assert "K/V pages" in plan_table(found) and "rollout_weights: adapter" in plan_table(found)


def test_more_rows_need_more_memory_and_not_whole_groups() -> None:
    needed, before = [], DecoderMemory(0, 0, 0, 0, 0)
    for rows in (1, 7, 8, 9, 40, 64):
        found = plan(max_in_flight=rows)
        assert found.max_in_flight == rows
        needed.append(found.totals["rollout"])
        parts = found.phases["rollout"]
        assert parts["K/V pages"] > before.entries
        before = DecoderMemory(parts["K/V pages"], 0, 0, 0, 0)
    assert needed == sorted(needed) and len(set(needed)) == len(needed)
    assert plan(max_in_flight=20, sampler="generate").max_in_flight == 16


@pytest.mark.slow
def test_as_many_are_in_flight_as_the_card_has_pages_for() -> None:
    options = {"max_completion_length": 16000, "tokens_per_microbatch": None}
    everything = plan(**options)
    pages = everything.phases["rollout"]["K/V pages"]
    roomy = 1.05 * everything.totals["rollout"] + GIB
    counts = []
    for share in (0.2, 0.5, 0.8):
        card = int(roomy - 1.05 * pages * share)
        found = plan(card / GIB, **options)
        assert found.fits
        counts.append(found.max_in_flight)
        more = plan(card / GIB, **options, max_in_flight=found.max_in_flight + 1)
        assert more.totals["rollout"] > found.totals["rollout"]
        # One more may fit, where a line through two sizes was on the safe side; three do not.
        assert not plan(card / GIB, **options, max_in_flight=found.max_in_flight + 3).fits
    assert 64 > counts[0] > counts[1] > counts[2] > 1
    assert any(count % G for count in counts)


# --- who is planned for it ------------------------------------------------------------------------

OTHERS: dict[str, Any] = {
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "GPTNeo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2,
               "attention_types": [[["global", "local"], 1]], "window_size": 4},
}  # fmt: skip


def small(of: Any, layers: int = 2) -> SmallModel:
    return SmallModel(GRPOConfig(bf16=False, lora_target_modules="all-linear"), of, layers)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_models_that_pack_are_told_from_their_configuration(family: str) -> None:
    model = tiny.model(family)
    layers = model.config.num_hidden_layers
    assert packs(small(model.config, layers)) == (Policy(model).layout != "rows")


@pytest.mark.parametrize("family", OTHERS)
def test_and_those_that_do_not(family: str) -> None:
    of = getattr(transformers, f"{family}Config")(vocab_size=tiny.VOCAB, **OTHERS[family])
    layers = of.num_hidden_layers
    assert Policy(transformers.AutoModelForCausalLM.from_config(of).eval()).layout == "rows"
    assert not packs(small(of, layers))


def test_layers_of_another_kind_do_not_pack() -> None:
    of = transformers.Qwen3NextConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=32, num_experts=0,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    assert not packs(small(of))


def test_auto_is_the_decoder_where_the_model_packs() -> None:
    def decodes(of: Any, sampler: str, memory: Any = None, ours: bool = True) -> bool:
        config = GRPOConfig(sampler=sampler, bf16=True)
        planner = MemoryPlanner(of, sampler_memory=memory, decoder=ours)
        return planner.sizes.decodes(Asked(config, 8, False))

    of = tiny.model().config
    sinks = tiny.mixture("GptOss").config  # of its attention, which no plan of ours has
    sinks.dtype = "bfloat16"
    assert decodes(of, "decoder") and not decodes(of, "generate")
    assert decodes(of, "auto") and not decodes(sinks, "auto")
    assert not decodes(of, "auto", lambda settings, **_: 123)
    assert not decodes(of, "auto", ours=False)
