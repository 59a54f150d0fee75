"""Liger's layers: what is refused, what is patched, and that nothing but rounding changes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import tiny
from cuda_twin.process import found

from fusedgrpo import GRPOTrainer, host
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError, ModelError
from fusedgrpo.kernels import backend
from fusedgrpo.models import liger_layers
from fusedgrpo.models.policy import Policy

CONFIG = GRPOConfig(use_liger_kernel=True)
COMPARED = ("Llama", "Qwen3", "Gemma2", "not checkpointed", "full")
CALLS = ("rms_norm", "rms_norm, not in place", "rope", "swiglu", "geglu")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    pytest.importorskip("liger_kernel")
    return found(Path(__file__).with_name("liger_process.py"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPARED)
def test_log_probs_and_gradients_are_those_of_the_models_own_layers(told, kind):
    mlp = "LigerGEGLUMLP" if kind == "Gemma2" else "LigerSwiGLUMLP"
    assert told[kind]["ligers"] == sorted(["LigerRMSNorm", mlp])
    # In the one layer; where it is checkpointed, in the backward pass as well.
    assert told[kind]["turned"] == (1 if kind == "not checkpointed" else 2)
    assert told[kind]["logp"] < 5e-6
    assert told[kind]["grad"] < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPARED[:-1])
def test_lora_is_computed_as_without_them(told, kind):
    assert told[kind]["left to peft"] == {}


@pytest.mark.slow
def test_the_first_ratio_is_1_and_the_first_kl_0(told):
    assert told["one route"] == {"ratio": True, "kl": True}


@pytest.mark.slow
def test_other_models_of_the_family_are_what_they_were(told):
    assert told["alone"] == {
        "same": True,
        "changed": [],
        "the copy is the same": True,
        "the copy has forwards of its own": True,
    }


@pytest.mark.slow
def test_parts_can_be_left_out(told):
    assert told["only some"] == ["LigerRMSNorm"]


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_the_memory_plan_takes_the_bytes_of_ligers_functions(told, call):
    planned, computed = told[f"memory of {call}"].values()
    assert planned == computed
    assert planned["kept"] > 0


def test_no_gpu_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(host, "has_gpu", lambda: False)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    for make in (
        lambda: Policy.load(GRPOConfig(use_liger_kernel=True, model_name_or_path="/nowhere")),
        lambda: GRPOTrainer("/nowhere", args=CONFIG),
    ):
        with pytest.raises(ConfigError, match=r"use_liger_kernel: this run is on cpu, .* a GPU"):
            make()


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'fusedgrpo\[liger\]'"):
        liger_layers.check(CONFIG)


def test_a_type_without_a_patch_is_refused() -> None:
    pytest.importorskip("liger_kernel")
    with pytest.raises(ConfigError, match=r"nothing for models of the type cohere\."):
        liger_layers.put_into(tiny.model("Cohere"), CONFIG)


def test_a_part_that_the_type_has_not_is_refused() -> None:
    pytest.importorskip("liger_kernel")
    config = GRPOConfig(use_liger_kernel=True, liger_kernel_config={"geglu": True})
    with pytest.raises(ConfigError, match=r"Liger has no geglu for the type llama"):
        liger_layers.put_into(tiny.model("Llama"), config)


def test_what_is_not_tested_here_is_refused_and_the_rest_is_taken() -> None:
    pytest.importorskip("liger_kernel")
    with pytest.raises(ModelError, match=r"LigerExperts into a Qwen3MoeForCausalLM"):
        liger_layers.put_into(tiny.mixture("Qwen3Moe"), CONFIG)
    config = GRPOConfig(use_liger_kernel=True, liger_kernel_config={"swiglu": False})
    liger_layers.put_into(tiny.mixture("Qwen3Moe"), config)


@pytest.mark.parametrize(("family", "part"), [("Llama", "SiLU"), ("Gemma2", "GELU")])
def test_another_activation_than_ligers_is_refused(family: str, part: str) -> None:
    pytest.importorskip("liger_kernel")
    other = {"hidden_act": "gelu", "hidden_activation": "gelu"}
    with pytest.raises(ModelError, match=rf"computes {part}\(.*MLP has GELU"):
        liger_layers.put_into(tiny.model(family, **other), CONFIG)


def test_code_of_another_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    built = tiny.model("Llama")
    monkeypatch.setattr(type(built), "__module__", "transformers_modules.mine")
    with pytest.raises(ModelError, match=r"is defined in transformers_modules\.mine"):
        liger_layers.put_into(built, CONFIG)


def test_without_the_option_nothing_is_asked() -> None:
    built = tiny.model("Cohere")
    liger_layers.check(GRPOConfig())
    liger_layers.put_into(built, GRPOConfig())
    assert not any("forward" in vars(module) for module in built.modules())
