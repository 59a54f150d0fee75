"""The configuration as scripts for TRL use it: on a command line, copied, changed, and TRL's own in
its place."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from fusedgrpo.config.from_trl import given_options, is_foreign
from fusedgrpo.config.parsers import ELSEWHERE
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.config.trl_fields import NAMES
from fusedgrpo.engine.own_options import own_options
from fusedgrpo.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class Derived(GRPOConfig):
    mine: str = "own"


@pytest.mark.parametrize("kind", [GRPOConfig, Derived])
def test_what_dataclasses_are_made_for(kind: type[GRPOConfig]) -> None:
    first = kind(lora_r=4, beta=0.1, reward_kwargs={"f": {"a": [1]}})
    for second in (copy.copy(first), copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert second == first and type(second) is kind
        second.learning_rate = 1e-3
        assert second != first and first.learning_rate is None
    other = dataclasses.replace(first, lora_r=8, save_steps=7)
    assert (other.lora_r, other.save_steps, other.beta) == (8, 7, 0.1)
    assert dataclasses.asdict(first)["lora_r"] == 4
    with pytest.raises(ConfigError, match="beta"):
        dataclasses.replace(first, beta=-1)


def test_options_that_are_set_are_checked_together_when_a_trainer_is_made() -> None:
    args = GRPOConfig()
    args.load_best_model_at_end = True
    args.max_length = 8
    with pytest.raises(ConfigError) as caught:
        own_options(args, "some/model", None)
    assert "load_best_model_at_end: the best of no evaluation" in str(caught.value)
    assert "max_length: 8 leaves no room" in str(caught.value)
    args.eval_strategy = "epoch"
    args.max_completion_length = 4
    assert own_options(args, "some/model", None).load_best_model_at_end


def test_settings_of_accelerates_loaders_are_taken_unless_they_are_another_run(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.json").write_text('{"even_batches": false}')
    theirs = TrainingArguments(str(tmp_path), use_cpu=True, accelerator_config={"non_blocking": 1})
    for given, name in (
        ({"dispatch_batches": True, "gradient_accumulation_kwargs": {"num_steps": 1}}, ""),
        ('{"even_batches": false}', "even_batches"),
        (str(tmp_path / "a.json"), "even_batches"),
        (AcceleratorConfig(even_batches=False), "even_batches"),
    ):
        config = GRPOConfig(accelerator_config=given)
        assert config == pickle.loads(pickle.dumps(config)) == copy.deepcopy(config)
        assert config.accelerator_config.dispatch_batches is (None if name else True)
        assert config.accelerator_config.even_batches is (not name)
        assert config.accelerator_config.use_seedable_sampler is True
    with pytest.raises(AttributeError, match="as a whole"):
        config.accelerator_config.split_batches = True
    with pytest.raises(ConfigError, match="non_blocking: expected true or false, got 1"):
        GRPOConfig.from_dict(given_options(theirs))
    for given, text in (
        ({"split_batches": True}, "split_batches: not supported: per_device_train_batch_size is"),
        ({"use_configured_state": True}, "use_configured_state: not supported"),
        ({"gradient_accumulation_kwargs": {"num_steps": 4}}, "set gradient_accumulation_steps"),
        ({"gradient_accumulation_kwargs": {"steps": 4}}, "has no 'steps'"),
        ({"gradient_accumulation_kwargs": 4}, "expected a mapping, got 4"),
        ({"even_batch": True}, "has no 'even_batch'. Did you mean 'even_batches'"),
        ("nowhere.json", "the path of a JSON file, got 'nowhere.json': FileNotFoundError"),
        ([1], r"expected a mapping, got \[1\]"),
    ):
        with pytest.raises(ConfigError, match=f"^accelerator_config: .*{text}"):
            GRPOConfig(accelerator_config=given)


@pytest.mark.parametrize("kind", [GRPOConfig, Derived])
def test_options_of_trl_that_are_none_here_are_typed_as_they_are_given(
    kind: type[GRPOConfig],
) -> None:
    parser = HfArgumentParser(kind)
    words = ["--use_vllm", "False", "--gradient_checkpointing_kwargs", '{"use_reentrant": false}']
    words += ["--activation_checkpointing", "false", "--vllm_server_timeout", "240.0"]
    (config,) = parser.parse_args_into_dataclasses(words)
    assert type(config) is kind and config == kind(gradient_checkpointing=False)
    assert dataclasses.replace(config, seed=3).seed == 3
    assert not {"use_vllm", "torch_compile"} & dataclasses.asdict(config).keys()
    assert "--use_vllm" not in parser.format_help()
    with pytest.raises(ConfigError, match=r"^torch_compile: not supported"):
        parser.parse_args_into_dataclasses(["--torch_compile"])


def test_a_stream_is_read_by_the_process_that_trains() -> None:
    args = GRPOConfig(dataloader_num_workers=4, accelerator_config={"non_blocking": True})
    own = own_options(args, "some/model", None, stream=True)
    assert own.dataloader_num_workers == 0 and own.accelerator_config.dispatch_batches is False
    assert own.accelerator_config.non_blocking and args.dataloader_num_workers == 4
    assert own_options(args, "some/model", None).dataloader_num_workers == 4
    args.accelerator_config = {"dispatch_batches": True}
    with pytest.raises(ConfigError, match="Iterable datasets require `dispatch_batches=False`"):
        own_options(args, "some/model", None, stream=True)


def test_mappings_and_lists_are_typed_on_a_command_line() -> None:
    words = ["--output_dir", "x", "--chat_template_kwargs"]
    words += ['{"a": 1}', "--reward_weights", "1", "2", "--report_to", "wandb", "tensorboard"]
    words += ["--allow_change", "beta,seed", "--no_shuffle_dataset"]
    (config,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(words)
    assert config.chat_template_kwargs == {"a": 1} and config.reward_weights == [1.0, 2.0]
    assert config.report_to == ["wandb", "tensorboard"] and not config.shuffle_dataset
    assert config.allow_change == ("beta", "seed") and config.lora_r == GRPOConfig().lora_r


@pytest.mark.peer
def test_trls_parser_takes_it_beside_its_own_dataclasses(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from trl.scripts.grpo import GRPOScriptArguments

    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\nmodel_name_or_path: a/b\nbeta: 0.25\n")
    words = ["--config", str(tmp_path / "c.yaml"), "--beta", "0.5", "--use_peft", "true"]
    words += ["--dataset_name", "d", "--reward_funcs", "think_format_reward"]
    kinds = (GRPOScriptArguments, GRPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    script, config, model, _ = trl.TrlParser(kinds).parse_args_and_config(words)
    assert (config.learning_rate, config.beta) == (1e-4, 0.5)
    assert (model.model_name_or_path, model.use_peft) == ("a/b", True)
    assert script.dataset_name == "d" and config.model_name_or_path is None
    # Dropped by TRL's own script, were it unknown to the parser.
    (tmp_path / "v.yaml").write_text("use_vllm: true\nfp16_full_eval: false\ndeepspeed: a.json\n")
    with pytest.raises(ConfigError) as caught:
        trl.TrlParser(kinds).parse_args_and_config(
            ["--config", str(tmp_path / "v.yaml"), "--vllm_mode", "server"],
            fail_with_unknown_args=False,
        )
    for name in ("use_vllm", "deepspeed", "vllm_mode"):
        assert f"{name}: not supported" in str(caught.value)
    assert "fp16" not in str(caught.value)
    theirs = {spec.name for kind in kinds if kind is not GRPOConfig for spec in
              dataclasses.fields(kind)}  # fmt: skip
    ours = {spec.name for spec in dataclasses.fields(GRPOConfig())}
    assert theirs & ours == set(ELSEWHERE)
    assert set(NAMES) == {spec.name for spec in dataclasses.fields(trl.GRPOConfig)} - ours


def trls(tmp_path: Path, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    return trl.GRPOConfig(output_dir=str(tmp_path), **{"use_cpu": True, "report_to": []} | options)


@pytest.mark.peer
def test_trls_arguments_are_translated_option_by_option(tmp_path: Path) -> None:
    plain = trls(tmp_path)
    assert is_foreign(plain) and not is_foreign(GRPOConfig())
    assert given_options(plain) == {"output_dir": str(tmp_path), "use_cpu": True}
    given = trls(
        tmp_path, learning_rate=1e-4, bf16=False, beta=0.04, lr_scheduler_type="cosine",
        gradient_checkpointing=False, gradient_accumulation_steps=4, steps_per_generation=8,
        scale_rewards=False, eval_strategy="steps", per_device_eval_batch_size=16,
        chat_template_kwargs={"a": 1}, disable_dropout=True,
    )  # fmt: skip
    own = own_options(given, "some/model", None)
    assert own == GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, finetuning_type="full", learning_rate=1e-4,
        bf16=False, beta=0.04, lr_scheduler_type="cosine", gradient_checkpointing=False,
        gradient_accumulation_steps=4, steps_per_generation=8, scale_rewards="none",
        eval_strategy="steps", eval_steps=10, per_device_eval_batch_size=16,
        chat_template_kwargs={"a": 1}, model_name_or_path="some/model",
    )  # fmt: skip
    assert own_options(plain, "some/model", None, object()).finetuning_type == "lora"
    batch = trls(tmp_path, generation_batch_size=32)
    assert own_options(batch, "some/model", None).steps_per_generation == 4


@pytest.mark.peer
def test_what_of_trls_arguments_is_not_supported_is_refused_all_at_once(tmp_path: Path) -> None:
    given = trls(tmp_path, use_vllm=True, neftune_noise_alpha=0.1, dataloader_drop_last=True)
    with pytest.raises(ConfigError) as caught:
        own_options(given, "some/model", None)
    for name in ("use_vllm", "neftune_noise_alpha", "dataloader_drop_last"):
        assert f"{name}: not supported" in str(caught.value)


def test_the_arguments_of_transformers_and_of_a_class_derived_from_them(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Mine(TrainingArguments):
        own: int = 3

    args = Mine(str(tmp_path), use_cpu=True, report_to="none", own=4, seed=7)
    assert given_options(args) == {"output_dir": str(tmp_path), "use_cpu": True, "seed": 7}
