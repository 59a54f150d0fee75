"""``simulate.py``: the real step on fake tensors, with the choices of a GPU; TRL's beside it."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fusedgrpo import host
from fusedgrpo.config.schema import GRPOConfig

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow
BENCH = Path(__file__).parents[2] / "bench"
P, C = 96, 160


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("simulate")


def options(**changes: Any) -> GRPOConfig:
    return GRPOConfig(**{
        "load_in_4bit": True, "num_generations": 4, "max_completion_length": C,
        "per_device_train_batch_size": 4, "tokens_per_microbatch": P + 2 * C,
    } | changes)  # fmt: skip


@functools.cache  # a simulation is only read
def run(
    simulate: ModuleType,
    model: str = "qwen2.5-0.5b",
    layers: int = 2,
    offload: bool = False,
    **changes: Any,
) -> Any:
    settings = simulate.model_config(model, num_hidden_layers=layers)
    return simulate.simulate(options(**changes), settings, prompt_tokens=P, offload=offload)


@functools.cache
def run_trl(simulate: ModuleType, rows: int) -> Any:
    pytest.importorskip("trl")
    settings = simulate.model_config("qwen2.5-0.5b", num_hidden_layers=2)
    trl = importlib.import_module("simulate_trl")
    return trl.simulate_trl(options(), settings, prompt_tokens=P, rows=rows)


def shapes(peak: Any, op: str) -> set[tuple[str, tuple[int, ...]]]:
    return {(o.dtype, o.shape) for o in peak.alive if op in o.op}


def test_weights_are_those_of_the_architecture_in_four_bits(simulate: ModuleType) -> None:
    found = run(simulate).resident
    H, M, kv, r = 896, 4864, 128, 16
    linear = 2 * (2 * H * H + 2 * H * kv + 3 * H * M)
    # half a byte each, a byte for 64, a float32 for 64 * 256, and some rounding and tables
    assert found["weights, 4 bit"] == pytest.approx(linear * (1 / 2 + 1 / 64 + 1 / 4096), rel=5e-3)
    assert found["weights, embeddings and head"] == 2 * 151936 * H  # tied: once
    adapter = 2 * 4 * r * (4 * H + 2 * (H + kv) + 3 * (H + M))
    assert found["adapter"] == pytest.approx(adapter, rel=1e-3)
    # two moments, and of each parameter a count that takes a block
    assert found["optimizer"] == pytest.approx(2 * adapter, rel=1e-2)


def test_the_numbers_are_the_same_on_every_machine(
    simulate: ModuleType, pretended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(simulate)  # torch keeps two numbers of a process's first one
    found = []
    for bfloat16, gpu in ((False, False), (True, False), (True, True)):
        pretended(bfloat16=bfloat16)
        monkeypatch.setattr(host, "has_gpu", lambda gpu=gpu: gpu)
        result = run.__wrapped__(simulate)
        peaks = {name: peak.bytes for name, peak in result.peaks.items()}
        found.append((peaks, result.resident))
    assert found[0] == found[1] == found[2]
    peaks, resident = found[0]
    assert peaks["rollout"] > sum(resident.values())


@pytest.mark.parametrize("fp16", [False, True])
def test_the_precision_is_that_of_the_options(simulate: ModuleType, fp16: bool) -> None:
    (dtype,) = {
        dtype
        for dtype, shape in shapes(run(simulate, fp16=fp16).peaks["update forward"], "aten.empty")
        if shape == (2 * C, 16384) and dtype != "float32"
    }
    assert dtype == ("float16" if fp16 else "bfloat16")


def test_the_head_runs_in_the_tiles_of_a_gpu(simulate: ModuleType) -> None:
    peak = run(simulate).peaks["update forward"]
    rows = 2 * C
    assert ("float32", (rows, 16384)) in shapes(peak, "aten.empty")
    assert ("bfloat16", (rows, 16384)) in shapes(peak, "aten.empty")


def test_attention_is_the_varlen_kernel_over_repeated_prompts(simulate: ModuleType) -> None:
    peak = run(simulate, gradient_checkpointing=False).peaks["update backward"]
    tokens = P + 2 * (C - 1)
    assert ("bfloat16", (tokens, 14, 64)) in shapes(peak, "varlen_attn")
    assert ("float32", (14, tokens)) in shapes(peak, "varlen_attn")
    assert ("bfloat16", (tokens + 2 * P, 2, 64)) in shapes(peak, "index_select")


def test_activations_are_in_bfloat16_and_adapters_and_gradients_in_float32(
    simulate: ModuleType,
) -> None:
    peak = run(simulate, gradient_checkpointing=False).peaks["update backward"]
    wide = {s for dtype, s in shapes(peak, "aten.mm") if dtype == "float32"}
    assert not any(len(s) == 2 and s[0] == P + 2 * (C - 1) for s in wide)
    optimizer = run(simulate).peaks["optimizer step"]
    assert ("float32", (4864, 16)) in shapes(optimizer, "_to_copy")  # a B
    assert ("float32", (16, 4864)) in shapes(optimizer, "mul")  # an A, with its scaling


def test_gradients_are_there_in_the_second_micro_batch(simulate: ModuleType) -> None:
    found = run(simulate)
    gradients = found.peaks["optimizer step"].bytes - found.peaks["weights"].bytes
    assert gradients == pytest.approx(found.resident["adapter"], rel=0.01)
    # all of them, of both layers, while the forward pass of the second one runs
    alive = found.peaks["update forward"].by_label()
    assert alive["update backward"] >= found.resident["adapter"]


def test_checkpointing_and_small_states_save_what_they_are_said_to(simulate: ModuleType) -> None:
    peaks = {
        "neither": run(simulate, gradient_checkpointing=False),
        "checkpointed": run(simulate),
        "8 bit": run(simulate, optim="adamw_8bit"),
    }
    update = {name: found.peaks["update backward"].bytes for name, found in peaks.items()}
    assert update["neither"] > update["checkpointed"] > update["8 bit"]
    state = {name: found.resident["optimizer"] for name, found in peaks.items()}
    assert state["8 bit"] == pytest.approx(state["checkpointed"] / 4, rel=0.1)


@pytest.mark.parametrize(("sampler", "kept"), [("generate", 512 + 8192), ("decoder", 8192)])
def test_the_cache_of_a_rollout_grows_with_completions_in_flight(
    simulate: ModuleType, sampler: str, kept: int
) -> None:
    settings = simulate.model_config("qwen2.5-7b", num_hidden_layers=2)
    config = GRPOConfig(
        load_in_4bit=True, num_generations=8, max_completion_length=8192,
        tokens_per_microbatch=8704, sampler=sampler,
    )  # fmt: skip
    eight, six = (
        simulate.simulate(config, settings, prompt_tokens=512, in_flight=n).peaks["rollout"].bytes
        for n in (8, 6)
    )
    cache = 2 * 2 * 4 * 128 * 2 * kept  # bytes a sequence
    assert eight - six == pytest.approx(2 * cache, rel=0.02)


def test_two_layer_inputs_stay_on_the_gpu_and_all_of_them_are_on_the_host(
    simulate: ModuleType,
) -> None:
    kept, moved = (run(simulate, "qwen2.5-7b", layers=5, offload=away) for away in (False, True))
    H, T, N = 3584, P + 2 * (C - 1), 2 * C
    saved = kept.peaks["update backward"].bytes - moved.peaks["update backward"].bytes
    assert saved == pytest.approx(3 * T * H * 2, rel=0.01)
    # nothing is left behind the update
    assert moved.peaks["optimizer step"].bytes == kept.peaks["optimizer step"].bytes
    chunk = 4 << 20
    of_layer, of_norm, of_head = (-(-n // chunk) * chunk for n in (T * H * 2, T * H * 4, N * H * 2))
    assert moved.host == 5 * of_layer + of_norm + of_head
    assert kept.host == 0


def test_trl_has_the_same_weights_and_its_adapter_in_bfloat16(simulate: ModuleType) -> None:
    ours, trl = run(simulate).resident, run_trl(simulate, 4).resident
    for kind in ("weights, 4 bit", "weights, embeddings and head", "weights, norms and biases"):
        assert trl[kind] == ours[kind]
    assert trl["adapter"] == pytest.approx(ours["adapter"] / 2, rel=0.01)
    assert trl["optimizer"] == pytest.approx(ours["optimizer"] / 2, rel=0.01)


def test_trl_runs_its_tiles_and_flash_attention_over_padded_rows(simulate: ModuleType) -> None:
    peaks = run_trl(simulate, 4).peaks
    assert ("bfloat16", (4 * C, 32768)) in shapes(peaks["update forward"], "aten.empty")
    attended = {
        (dtype, shape)
        for phase in ("update forward", "update backward")
        for dtype, shape in shapes(peaks[phase], "flash_attention")
        if dtype != "uint64"  # of dropout
    }
    assert attended == {("bfloat16", (4, 14, P + C, 64)), ("float32", (4, 14, P + C))}


def test_trl_takes_less_with_fewer_rows_at_once(simulate: ModuleType) -> None:
    four, one = (run_trl(simulate, rows) for rows in (4, 1))
    assert four.peaks["weights"].bytes == one.peaks["weights"].bytes
    for phase in ("update forward", "update backward"):
        beside = [found.peaks[phase].bytes - found.peaks["weights"].bytes for found in (four, one)]
        assert beside[0] > 2 * beside[1], phase


def test_the_bench_gives_planned_and_simulated_of_ours_and_simulated_of_trl(
    simulate: ModuleType,
) -> None:
    pytest.importorskip("trl")
    bench = importlib.import_module("bench_memory")
    rows = bench.run(bench.QUICK[0], False, ["trl"])
    found = {(row["impl"], row["metric"]): row["value"] for row in rows}
    assert {impl for impl, _ in found} == {"fusedgrpo", "trl, 4 at once", "trl, 1 at once"}
    for how in ("planned", "simulated"):
        assert found["fusedgrpo", f"{how}/update backward"] > 0
    one, four = (found[f"trl, {n} at once", "simulated/update backward"] for n in (1, 4))
    assert one < four
