from __future__ import annotations

import pytest

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError

LIGER = {"use_liger_kernel": True}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"do_train": False}, "do_train"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16"),
        ({"load_in_4bit": True, "finetuning_type": "full"}, "finetuning_type: lora"),
        ({"rollout_weights": "merged", "finetuning_type": "full"}, "leave it at auto"),
        ({"rollout_weights": "adapter", "finetuning_type": "full"}, "leave it at auto"),
        ({"rollout_weights": "merged", "sampler": "generate"}, "set sampler: decoder"),
        ({"rollout_weights": "merged", "sampler": "mine.py:Mine"}, "takes the model as it is"),
        ({"gguf_file": "m.gguf"}, "model_name_or_path"),
        ({"generation_batch_size": 8, "steps_per_generation": 2}, "give one"),
        ({"max_length": 512, "max_completion_length": 512}, "max_length: 512 leaves no room"),
        ({"max_steps": 0}, "max_steps: 0"),
        ({"val_size": 0.1, "eval_dataset": "x"}, "val_size and eval_dataset"),
        ({"val_size": 1.5}, "val_size: .* got 1.5"),
        ({"warmup_steps": 10.5}, "warmup_steps: .* got 10.5"),
        ({"reward_funcs": "accuracy,format", "reward_weights": [1.0]}, "1 weights for 2"),
        ({"reward_kwargs": {"accuracy": 3}}, "reward_kwargs"),
        ({"liger_kernel_config": {"rope": False}}, "set use_liger_kernel: true"),
        (LIGER | {"liger_kernel_config": {"rop": True}}, "'rop' is none of .*Did you mean 'rope'"),
        (LIGER | {"liger_kernel_config": {"rope": 1}}, "rope: expected true or false, got 1"),
        (
            LIGER | {"liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "fused_linear_cross_entropy computes a loss .* never makes",
        ),
        ({"allow_change": ["bta"]}, "'bta' is no option. Did you mean 'beta'"),
    ],
)
def test_combinations_that_cannot_run_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        GRPOConfig(**options)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 513, "max_completion_length": 512},
        {"max_steps": -1},
        {"rollout_weights": "merged"},
        {"rollout_weights": "merged", "sampler": "decoder"},
        {"rollout_weights": "adapter", "sampler": "generate"},
        {"rollout_weights": "auto", "finetuning_type": "full"},
        {"val_size": 10},
        {"warmup_steps": 0.03},
        {"reward_funcs": "accuracy,format", "reward_weights": [1.0, 2.0]},
        {"reward_kwargs": {"accuracy": {}}},
    ],
)
def test_their_neighbours_run(options: dict[str, object]) -> None:
    GRPOConfig(**options)


def test_a_rule_is_silent_about_an_option_that_is_wrong_anyway() -> None:
    with pytest.raises(ConfigError) as caught:
        GRPOConfig(max_completion_length="long", max_length=400)
    assert len(caught.value.problems) == 1


def test_ligers_losses_may_be_named_to_be_left_out() -> None:
    parts = {"rms_norm": True, "swiglu": False, "cross_entropy": False}
    assert GRPOConfig(**LIGER, liger_kernel_config=parts).liger_kernel_config == parts
    assert GRPOConfig(enable_liger_kernel=True) == GRPOConfig(**LIGER)
