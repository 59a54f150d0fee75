"""Frozen linear layers rest in the dtype that autocast would cast them to, and nothing changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.models.at_rest import frozen_linear
from fusedgrpo.models.loading import load_model
from fusedgrpo.models.policy import Policy

PAIRS = [([5, 6, 7], [8, 9, 10, 1]), ([5, 6, 7], [9, 9]), ([4], [11, 12])]
LOW = torch.bfloat16


@pytest.fixture(autouse=True)
def _bfloat16(pretended: Any) -> None:
    pretended(bfloat16=True)


def config(path: Path | str | None, **options: Any) -> GRPOConfig:
    name = None if path is None else str(path)
    return GRPOConfig(model_name_or_path=name, use_cpu=True, lora_r=4, **options)


def phi() -> Any:
    """Biases everywhere, also on a head that is not tied."""
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**tiny._SIZE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.24)
    return model


def mamba() -> Any:
    sizes = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    settings = transformers.MambaConfig(**sizes, initializer_range=0.3, bos_token_id=3)
    return transformers.MambaForCausalLM(settings).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "Qwen2, tied, biases": lambda: tiny.model("Qwen2"),
    "Llama, untied": lambda: tiny.model("Llama"),
    "Llama, tied": lambda: tiny.model("Llama", tie_word_embeddings=True),
    "Gemma2": lambda: tiny.model("Gemma2"),
    "Phi, biases, untied": phi,
    "Mixtral": lambda: tiny.mixture("Mixtral"),
    "Phimoe": lambda: tiny.mixture("Phimoe"),
    "Mamba": mamba,
}


@pytest.fixture(params=MODELS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model", MODELS[request.param]())


def llama(tmp_path: Path, **options: Any) -> Path:
    return tiny.save(tmp_path / "model", tiny.model("Llama", **options))


def frozen(policy: Policy, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Parameters of the base in ``dtype``, by the ends of their names."""
    return {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in policy.model.named_parameters()
        if not parameter.requires_grad and parameter.dtype == dtype
    }


def one_update(policy: Policy) -> dict[str, Tensor]:
    """All that a step computes, of an adapter that does something."""
    torch.manual_seed(1)
    tiny.stir(policy.model)
    packed = policy.pack(PAIRS)
    with policy.scoring(), policy.reference():
        reference = policy.logprobs(packed).logp
    with policy.training():
        found = policy.logprobs(packed, entropy=True)
        assert found.entropy is not None
        loss = found.logp @ torch.linspace(-1, 1, len(found.logp)) + found.entropy.mean()
        loss.backward()
    with policy.scoring(), policy.autocast():
        own = policy.causal_lm(input_ids=packed.input_ids[None], use_cache=False).logits
    gradients = {n: p.grad for n, p in policy.trainable() if p.grad is not None}
    assert gradients
    return {"logits": own, "logp": found.logp, "entropy": found.entropy, "loss": loss,
            "reference": reference, **gradients}  # fmt: skip


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_every_bit_is_that_of_weights_in_float32(stored: Path, checkpointing: bool) -> None:
    options = {"gradient_checkpointing": checkpointing}
    before = Policy.load(config(stored, dtype="float32", **options))
    after = Policy.load(config(stored, **options))
    assert frozen(after, LOW) and not frozen(before, LOW)
    want, got = one_update(before), one_update(after)
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].dtype == got[name].dtype and torch.equal(want[name], got[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_adapters_of_other_kinds_compute_the_same_too(tmp_path: Path, settings: Any) -> None:
    from peft import LoraConfig

    directory = tiny.save(tmp_path / "model", tiny.model("Qwen2", tie_word_embeddings=False))
    settings = {"target_modules": ["q_proj", "down_proj"]} | settings
    runs = [
        Policy.load(config(directory, **options), None, LoraConfig(r=2, **settings))
        for options in ({"dtype": "float32"}, {})
    ]
    assert frozen(runs[1], LOW)
    want, got = (one_update(run) for run in runs)
    assert all(torch.equal(want[name], got[name]) for name in want)
    written = []
    for number, run in enumerate(runs):
        assert run.adapters is not None
        run.adapters.save(tmp_path / str(number))
        written.append(load_file(tmp_path / str(number) / "adapter_model.safetensors"))
    assert written[0].keys() == written[1].keys()
    for name, tensor in written[0].items():
        assert tensor.dtype == written[1][name].dtype and torch.equal(tensor, written[1][name])


# --- what is cast, and what is not ---------------------------------------------------------------


def test_linear_layers_rest_and_nothing_else_does(tmp_path: Path) -> None:
    policy = Policy.load(config(llama(tmp_path)))
    assert all(name.endswith("norm.weight") or "embed_tokens" in name
               for name in frozen(policy, torch.float32))  # fmt: skip
    assert len(frozen(policy, LOW)) == 2 * 7 + 1
    assert "lm_head.weight" in frozen(policy, LOW)
    assert {p.dtype for _, p in policy.trainable()} == {torch.float32}
    loaded: Any = load_model(config(tmp_path / "model"), torch.device("cpu"))
    for name, parameter in loaded.named_parameters():
        own = name.replace("_proj.weight", "_proj.base_layer.weight")
        if own in frozen(policy, LOW):
            assert torch.equal(frozen(policy, LOW)[own], parameter.to(LOW)), name


def test_a_head_that_is_tied_stays_with_its_embeddings(tmp_path: Path) -> None:
    policy = Policy.load(config(llama(tmp_path, tie_word_embeddings=True)))
    embeddings = policy.causal_lm.get_input_embeddings().weight
    assert policy.head.weight is embeddings and embeddings.dtype == torch.float32
    assert len(frozen(policy, LOW)) == 2 * 7


def test_the_bias_of_a_head_is_added_in_float32(tmp_path: Path) -> None:
    policy = Policy.load(config(tiny.save(tmp_path / "model", phi())))
    assert policy.head.weight.dtype == LOW
    assert policy.head.bias is not None and policy.head.bias.dtype == torch.float32
    layer = policy.causal_lm.get_decoder().layers[0].self_attn.q_proj.base_layer
    assert layer.bias.dtype == LOW


def test_a_head_that_goes_into_the_checkpoint_stays_as_it_is(tmp_path: Path) -> None:
    directory = llama(tmp_path)
    larger: Any = transformers.AutoModelForCausalLM.from_pretrained(directory)
    larger.resize_token_embeddings(tiny.VOCAB + 8)
    tiny.add_lora(larger).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    options = config(directory, adapter_name_or_path=str(tmp_path / "adapter"), lora_alpha=None)
    options.lora_r = 16  # left open: the adapter's own
    policy = Policy.load(options)
    assert policy.adapters is not None and policy.adapters.saves_embeddings
    assert policy.head.weight.dtype == torch.float32 and frozen(policy, LOW)
    policy.adapters.save(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any("lm_head" in name for name in saved)


def test_weights_that_a_model_reads_itself_stay_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mamba multiplies by a weight; this one adds one up."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    own = LlamaMLP.forward

    def with_a_sum(self: Any, x: Tensor) -> Tensor:
        up = self.up_proj
        result: Tensor = own(self, x)
        return result + getattr(up, "base_layer", up).weight.sum()

    monkeypatch.setattr(LlamaMLP, "forward", with_a_sum)
    directory = llama(tmp_path)
    before = Policy.load(config(directory, dtype="float32"))
    after = Policy.load(config(directory))
    assert sum("up_proj" in name for name in frozen(after, torch.float32)) == 2
    assert len(frozen(after, LOW)) == 2 * 6 + 1
    want, got = one_update(before), one_update(after)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_layer_that_computes_in_float32_on_purpose_stays_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def exact(self: Any, x: Tensor) -> Tensor:
        gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        with torch.autocast("cpu", enabled=False):
            result: Tensor = self.down_proj(gated.float())
            return result

    monkeypatch.setattr(LlamaMLP, "forward", exact)
    policy = Policy.load(config(llama(tmp_path)))
    assert sum("down_proj" in name for name in frozen(policy, torch.float32)) == 2
    assert len(frozen(policy, LOW)) == 2 * 6 + 1
    assert one_update(policy)


def test_what_belongs_to_adapters_is_left_out() -> None:
    """A frozen adapter is saved as it is; so is the original of what another trains."""
    from peft import LoraConfig

    kinds: dict[str, Any] = {
        "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5]}},
    }
    for name, settings in kinds.items():
        model = tiny.add_lora(tiny.model("Llama"), **settings)
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "other"])
        for path, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in path and "default" in path)
        inside = model.base_model.model.model
        expected = {m for m in inside.modules() if type(m) is nn.Linear}
        expected -= {m for path, m in inside.named_modules() if ".lora_" in path}
        assert len(expected) == 14 and set(frozen_linear(model)) == expected, name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dtype_that_was_asked_for_is_kept(tmp_path: Path, dtype: Any) -> None:
    policy = Policy.load(config(llama(tmp_path), dtype=dtype))
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {
        getattr(torch, dtype)
    }


@pytest.mark.parametrize("options", [{"bf16": False}, {"finetuning_type": "full"}])
def test_runs_in_float32_and_of_all_weights_are_what_they_were(
    tmp_path: Path, options: Any
) -> None:
    policy = Policy.load(config(llama(tmp_path), **options))
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}


def test_a_model_that_was_given_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("Llama")
    with caplog.at_level(logging.INFO, "fusedgrpo"):
        policy = Policy.load(config(None), model)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert "million frozen weights are cast to bfloat16 in each forward pass" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "fusedgrpo"):
        Policy.load(config(None), tiny.model("Llama").bfloat16())
    assert "frozen weights are cast" not in caplog.text


def test_it_is_said_and_the_layers_are_plain_ones_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fusedgrpo"):
        policy = Policy.load(config(llama(tmp_path)))
    assert "15 frozen linear layers in float32 now rest in bfloat16" in caplog.text
    kinds = {type(m) for m in policy.model.modules() if isinstance(m, nn.Linear)}
    assert nn.Linear in kinds and not any("Watched" in kind.__name__ for kind in kinds)
