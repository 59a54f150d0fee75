"""Dropout of the model's own is off while it trains, wherever it is kept; what is saved has it."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.models.dropout import (
    as_it_samples,
    computes_otherwise_in_training,
    own_dropout,
    switched_off,
)

SIZE = {
    "vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip

# In modules of their own, in numbers of modules, in what a forward pass reads of the config.
DROPPING = {
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16, "layerdrop": 0.3},
    "GPTNeo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]],
               "attention_dropout": 0.3, "resid_dropout": 0.3, "embed_dropout": 0.3},
    "GPTNeoX": {"intermediate_size": 32, "attention_dropout": 0.3, "hidden_dropout": 0.3},
    "Llama": {"intermediate_size": 32, "attention_dropout": 0.3},
    "Persimmon": {"intermediate_size": 32, "attention_dropout": 0.3, "hidden_dropout": 0.3},
    "Mixtral": {"intermediate_size": 32, "num_key_value_heads": 1, "num_local_experts": 4,
                "router_jitter_noise": 0.3},
}  # fmt: skip


def dropping(family: str) -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(**SIZE | DROPPING[family])
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config)
    tiny.stir(model)
    return model


def run(directory, model, **changes):
    options = {
        "output_dir": str(directory), "num_generations": 4, "prompts_per_step": 1,
        "max_completion_length": 5, "max_steps": 1, "learning_rate": 1e-2, "lora_r": 4,
        "beta": 0.1, "bf16": False, "use_cpu": True,
    } | changes  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **_: [float(i) for i in range(len(completion_ids))],
        args=GRPOConfig(**options),
        train_dataset=[{"prompt": f"w{4 + i} w{5 + i}"} for i in range(4)],
        tokenizer=tiny.tokenizer(),
    )
    trainer.train()
    return read_metrics(directory / "metrics.jsonl")


@pytest.mark.parametrize("family", DROPPING)
def test_switched_off_a_model_in_training_is_the_one_that_samples(family):
    model = dropping(family)
    decoder = model.get_decoder()
    places = own_dropout(model)
    assert places
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        want = model.eval()(ids).logits
        model.train()
        assert not torch.equal(model(ids).logits, want)
        with switched_off(places):
            torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=0)
    assert not computes_otherwise_in_training(model, decoder) and model.training
    assert [getattr(owner, name) for owner, name, _ in places] == [p.value for p in places]


@pytest.mark.slow
def test_ratio_and_kl_of_the_first_step_are_those_of_an_untouched_model(tmp_path, caplog):
    row = run(tmp_path / "off", dropping("GPT2"))[0]
    assert row["kl"] == 0 and row["grad_norm"] > 0
    row = run(tmp_path / "on", dropping("GPT2"), disable_dropout=False)[0]
    assert row["kl"] > 1e-4
    assert sum("disable_dropout: false, and GPT2LMHeadModel" in m for m in caplog.messages) == 1


def test_the_dropout_of_an_adapter_is_the_users(tmp_path):
    model = tiny.add_lora(tiny.model("Llama"), lora_dropout=0.5)
    assert own_dropout(model) == []
    assert run(tmp_path, tiny.model("Llama"), lora_dropout=0.9)[0]["grad_norm"] > 0


def test_what_is_saved_has_the_models_own_numbers(tmp_path):
    run(tmp_path, dropping("GPT2"), finetuning_type="full")
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert saved.resid_pdrop == saved.attn_pdrop == saved.embd_pdrop == 0.1


def drawing() -> torch.nn.Module:
    """Its router draws experts at random in training mode."""
    config = transformers.PhimoeConfig(
        **SIZE
        | {"intermediate_size": 32, "num_key_value_heads": 1, "num_local_experts": 4}
        | {"router_jitter_noise": 0.9}
    )
    torch.manual_seed(0)
    model = transformers.PhimoeForCausalLM(config).eval()
    tiny.stir(model, 0.5)
    return model


def test_experts_that_are_drawn_at_random_are_noticed():
    model = drawing()
    before = torch.random.get_rng_state()
    assert computes_otherwise_in_training(model, model.get_decoder()) and not model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not computes_otherwise_in_training(model, model.get_decoder(), as_it_samples)


def test_layers_are_checkpointed_where_a_model_trains_as_it_samples():
    model = tiny.add_lora(drawing(), lora_dropout=0.5).train()
    modes = [module.training for module in model.modules()]
    with as_it_samples(model):
        training = {path for path, module in model.named_modules() if module.training}
    assert [module.training for module in model.modules()] == modes
    kinds = {path.rsplit(".", 1)[-1] for path in training}
    assert kinds == {"0", "1", "default"}  # two layers, and the dropout of the adapter


@pytest.mark.slow
def test_experts_are_not_drawn_in_a_run(tmp_path, caplog):
    changes = {"router_aux_loss_coef": 0, "gradient_checkpointing": True}
    row = run(tmp_path / "off", drawing(), **changes)[0]
    assert row["kl"] == pytest.approx(0, abs=1e-9) and row["grad_norm"] > 0
    assert not [m for m in caplog.messages if "not exactly 1 and 0" in m]
    row = run(tmp_path / "on", drawing(), disable_dropout=False, **changes)[0]
    assert row["kl"] > 1e-4
    assert [m for m in caplog.messages if "not exactly 1 and 0" in m]
