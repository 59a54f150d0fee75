"""Kinds of peft's adapters: each trains right and is loaded again, or is refused by name."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
import transformers

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ModelError

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
INSIDE = {
    "LoraConfig": ATTENTION,
    "DoRA": ATTENTION | {"use_dora": True},
    "PiSSA": ATTENTION | {"init_lora_weights": "pissa", "r": 2},
    "IA3Config": {
        "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"],
    },
    "AdaLoraConfig": ATTENTION | {"total_step": 10, "tinit": 1, "tfinal": 2, "deltaT": 1},
    "VeraConfig": {"target_modules": ["q_proj"], "r": 2},
    "LoHaConfig": ATTENTION | {"r": 2},
    "LoKrConfig": ATTENTION | {"r": 2},
    "OFTConfig": ATTENTION | {"r": 0, "oft_block_size": 4},
    "BOFTConfig": ATTENTION | {"boft_block_size": 4},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "VBLoRAConfig": ATTENTION | {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2},
    "RandLoraConfig": ATTENTION | {"r": 2},
    "TrainableTokensConfig": {"token_indices": [4, 5]},
}  # fmt: skip
AROUND = {
    "PromptTuningConfig": ({"num_virtual_tokens": 3}, "learns a prompt"),
    "PrefixTuningConfig": ({"num_virtual_tokens": 3}, "learns a prompt"),
    "PromptEncoderConfig": ({"num_virtual_tokens": 3}, "learns a prompt"),
    "CPTConfig": (
        {"cpt_token_ids": [4, 5], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
        "learns a prompt",
    ),
    "AdaptionPromptConfig": ({"adapter_len": 4, "adapter_layers": 1}, "learned prompt"),
    "PolyConfig": (ATTENTION | {"r": 2, "n_tasks": 1}, "number of a task"),
    "XLoraConfig": ({"hidden_size": 16, "adapters": {"0": "somewhere"}}, "mixes its adapters"),
    "aLoRA": (ATTENTION | {"alora_invocation_tokens": [4, 5]}, "acts only after these tokens"),
}


def settings(kind, options):
    cls = {"DoRA": "LoraConfig", "PiSSA": "LoraConfig", "aLoRA": "LoraConfig"}.get(kind, kind)
    return getattr(peft, cls)(task_type="CAUSAL_LM", **options)


def even_ids(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def trainer(path, peft_config):
    base = tiny.save(path / "base", tiny.model("Llama", scale=6.0))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    options = {
        "output_dir": str(path / "run"), "num_generations": 4, "prompts_per_step": 2,
        "max_completion_length": 6, "max_steps": 2, "num_iterations": 2, "beta": 0.1, "bf16": False,
        "learning_rate": 1e-2, "use_cpu": True, "save_strategy": "no",
        "gradient_checkpointing": False,
    }  # fmt: skip
    return base, GRPOTrainer(
        model=model,
        reward_funcs=even_ids,
        args=GRPOConfig(**options),
        train_dataset=[{"prompt": "w4 w5 w6"}, {"prompt": "w7 w8"}],
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("kind", INSIDE)
def test_adapters_inside_the_model_train_and_are_loaded_again(tmp_path, kind):
    base, made = trainer(tmp_path, settings(kind, INSIDE[kind]))
    made.train()
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # On weights that nothing has changed policy, old policy and reference are one.
    assert first["kl"] == 0 and first["clip_ratio/region_mean"] == 0
    assert first["sampling/sampling_logp_difference/max"] < 1e-4
    assert first["grad_norm"] > 0 and second["kl"] > 0
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        want = made.model.eval()(input_ids=ids).logits
        loaded = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter"
        )
        got = loaded.eval()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("kind", AROUND)
def test_adapters_around_the_model_are_refused_by_name(tmp_path, kind):
    options, what = AROUND[kind]
    named = type(made := settings(kind, options)).__name__
    with pytest.raises(ModelError, match=rf"peft_config: {named} .*{what}.*Use LoRA"):
        trainer(tmp_path, made)


def test_one_that_is_there_already_is_refused_too(tmp_path):
    model = peft.get_peft_model(tiny.model("Llama"), settings("aLoRA", AROUND["aLoRA"][0]))
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_completion_length=8)
    with pytest.raises(ModelError, match="alora_invocation_tokens acts only after"):
        GRPOTrainer(model, even_ids, args, [{"prompt": "w4"}], processing_class=tiny.tokenizer())


def test_adalora_is_said_to_keep_its_ranks(tmp_path, caplog):
    trainer(tmp_path, settings("AdaLoraConfig", INSIDE["AdaLoraConfig"]))
    assert "AdaLoraConfig: ranks stay as they begin" in caplog.text


@pytest.mark.parametrize(
    "broken",
    [
        peft.LoraConfig(target_modules=["no_such"]),
        peft.RoadConfig(target_modules=["q_proj"]),
        peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", r=2, rank_pattern=3),
    ],
    ids=["target", "group size", "rank pattern"],
)
def test_what_peft_refuses_is_blamed_on_peft_config(tmp_path, broken):
    with pytest.raises(ModelError, match=r"^peft_config: "):
        trainer(tmp_path, broken)
