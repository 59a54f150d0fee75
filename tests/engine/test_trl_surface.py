"""A script for TRL's trainer with the import changed: what it does beside training works, or is
refused by name with a remedy."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import TrainerState

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.config.foreign import REFUSED
from fusedgrpo.engine import trl_surface
from fusedgrpo.errors import ConfigError

PROMPTS = [{"prompt": p} for p in ("w4 w5 w6", "w7 w8", "w9 w10 w11 w12")]


def even_ids(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def options(path, **changes):
    return {
        "output_dir": str(path), "num_generations": 2, "prompts_per_step": 2, "max_steps": 2,
        "max_completion_length": 5, "learning_rate": 1e-2, "save_strategy": "no", "bf16": False,
        "use_cpu": True, "gradient_checkpointing": False,
    } | changes  # fmt: skip


def trainer(path, model=None, more=None, **changes):
    return GRPOTrainer(
        model=tiny.model() if model is None else model,
        reward_funcs=even_ids,
        args=GRPOConfig(**options(path, **changes)),
        train_dataset=PROMPTS,
        processing_class=tiny.tokenizer(),
        **(more or {}),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("surface")
    base = tiny.save(path / "base", tiny.model())
    made = trainer(path / "run", transformers.AutoModelForCausalLM.from_pretrained(base))
    made.train()
    return made, base


# --- the constructor ----------------------------------------------------------------------------


def test_every_argument_of_trls_constructor_has_an_answer(tmp_path):
    pytest.importorskip("trl")
    from trl import GRPOTrainer as stock

    theirs = list(inspect.signature(stock.__init__).parameters)
    ours = list(inspect.signature(GRPOTrainer.__init__).parameters)
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "lacks 28 of the 28"),
        ({"optimizers": (None, object())}, "A scheduler alone"),
        ({"quantization_config": {"load_in_4bit": True}}, "the model is loaded already"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_are_not_supported_are_refused_with_a_remedy(tmp_path, argument, remedy):
    with pytest.raises(ConfigError, match=f"{next(iter(argument))}: .*{remedy}"):
        trainer(tmp_path, more=argument)


def test_arguments_that_ask_for_nothing_are_taken(tmp_path):
    trainer(tmp_path, more={"callbacks": [], "optimizers": (None, None), "tools": None})


def test_arguments_that_are_no_trainers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"args: expected a fusedgrpo.GRPOConfig or a trl.GRPO"):
        GRPOTrainer(tiny.model(), even_ids, {"beta": 1}, PROMPTS, processing_class=tiny.tokenizer())


def test_a_quantization_config_sets_the_options(tmp_path):
    from fusedgrpo.engine.own_options import own_options

    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    own = own_options(args, "a/model", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    assert own.load_in_4bit and own.model_name_or_path == "a/model"
    assert not args.load_in_4bit


def test_a_wrong_target_is_blamed_on_the_configuration_that_has_it(tmp_path):
    with pytest.raises(ValueError, match=r"^peft_config: .*no_such_module"):
        trainer(tmp_path, more={"peft_config": LoraConfig(target_modules=["no_such_module"])})
    with pytest.raises(ConfigError, match=r"peft_config: expected a configuration of peft"):
        trainer(tmp_path, more={"peft_config": {"r": 4}})


# --- the configuration --------------------------------------------------------------------------


def test_an_option_that_is_set_is_checked_like_one_that_is_given(tmp_path):
    args = GRPOConfig("somewhere", beta="0.5")
    assert (args.output_dir, args.beta) == ("somewhere", 0.5)
    args.learning_rate = "1e-5"
    args.model_init_kwargs = {"torch_dtype": torch.float32, "cache_dir": "there"}
    assert args.learning_rate == 1e-5 and args.dtype == "float32"
    assert args.model_init_kwargs == {"cache_dir": "there"}
    args.lora_rank = 4
    assert args.lora_r == args.lora_rank == 4
    args.push_to_hub = False
    for name, value, text in (
        ("beta", -1, "beta: expected a number >= 0"),
        ("nosuch", 1, "nosuch: unknown option"),
        ("use_vllm", True, "use_vllm: not supported"),
        ("max_steps", 0, "max_steps: 0 trains nothing"),
        ("model_init_kwargs", {"device_map": "auto"}, "device_map: not supported"),
    ):
        before = args.to_dict()
        with pytest.raises(ConfigError, match=text):
            setattr(args, name, value)
        assert args.to_dict() == before
    with pytest.raises(ConfigError, match="output_dir once"):
        GRPOConfig("a", output_dir="b")


def test_options_of_other_trainers_are_read_as_they_would_be_there():
    args = GRPOConfig()
    assert args.push_to_hub is False and args.use_vllm is False and args.hub_model_id is None
    assert args.report_to == "none" and args.do_eval is False
    for name in REFUSED:
        assert hasattr(args, name), name
    with pytest.raises(AttributeError, match=r"no option 'learning_rat'. Did you mean"):
        args.learning_rat  # noqa: B018
    with pytest.raises(AttributeError, match="use_peft is read from finetuning_type"):
        args.use_peft  # noqa: B018
    assert (args.world_size, args.process_index, args.should_save) == (1, 0, True)
    assert (args.device.type, args.n_gpu) == ("cpu", 0)
    assert json.loads(args.to_json_string())["beta"] == 0 and args.to_sanitized_dict()["seed"] == 42
    with args.main_process_first():
        assert args.get_process_log_level() == logging.INFO


def test_a_derived_configuration_has_options_of_its_own():
    @dataclasses.dataclass(kw_only=True)
    class Mine(GRPOConfig):
        system: str = "be brief"

    mine = Mine(system="be long", beta=0.1)
    mine.system = "be kind"
    assert (mine.system, mine.beta) == ("be kind", 0.1)
    with pytest.raises(ConfigError, match="beta"):
        Mine(beta=-1)


def test_what_a_trainer_settles_itself_is_no_change(tmp_path, caplog):
    made = trainer(tmp_path, learning_rate=None)
    assert made.args.learning_rate == 3e-5
    assert "was changed" not in caplog.text


def test_a_change_after_a_trainer_was_made_is_not_silent(trained, caplog):
    made, _ = trained
    made.args.save_total_limit = 3
    assert "save_total_limit was changed after a trainer was made" in caplog.text
    caplog.clear()
    made.args.save_total_limit = 3
    assert not caplog.text


# --- the trainer --------------------------------------------------------------------------------


def test_what_scripts_read_is_there(trained):
    made, _ = trained
    assert isinstance(made.model, PeftModel) and made.model_wrapped is made.model
    assert made.optimizer is made.learner.optimizer and made.lr_scheduler is made.learner.scheduler
    assert made.accelerator.is_main_process and made.accelerator.unwrap_model(made.model)
    state = made.state
    assert isinstance(state, TrainerState)
    assert (state.global_step, state.max_steps) == (2, 2)
    assert made.state is state and made.control.should_training_stop
    assert state.log_history[-1].keys() >= {"train_runtime", "train_loss", "epoch", "step"}
    assert made.ref_model is None
    assert made.is_world_process_zero() and made.is_local_process_zero()
    assert made.get_learning_rates() == [made.learner.learning_rate]
    assert made.get_num_trainable_parameters() > 0
    assert (made.reward_func_names, made.reward_weights.tolist()) == (["even_ids"], [1.0])
    assert made.reward_processing_classes == [None]


def test_what_is_saved_where_peft_and_transformers_look(trained, tmp_path):
    made, base = trained
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    made.save_model(tmp_path / "out")
    loaded = PeftModel.from_pretrained(model, tmp_path / "out")
    want = {name: p for name, p in made.model.named_parameters() if "lora" in name}
    got = dict(loaded.named_parameters())
    assert want and all(torch.equal(p, got[name]) for name, p in want.items())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"
    full = trainer(tmp_path / "run", finetuning_type="full")
    full.save_model(str(tmp_path / "full"))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert full.save_model() == tmp_path / "run" / "model"


def test_the_end_of_a_script(trained, capsys):
    made, _ = trained
    made.log_metrics("train", {"loss": 0.123456, "samples": 3})
    assert "***** train metrics *****\n  loss    = 0.1235\n  samples = 3" in capsys.readouterr().out
    made.save_metrics("train", {"loss": 0.5})
    made.save_metrics("eval", {"eval_reward": 1.0})
    made.save_state()
    made.create_model_card(dataset_name="some/data", tags="mine")
    directory = made.args.output_dir
    with open(f"{directory}/all_results.json") as file:
        assert json.load(file) == {"loss": 0.5, "eval_reward": 1.0}
    assert TrainerState.load_from_json(f"{directory}/trainer_state.json").global_step == 2
    with open(f"{directory}/README.md") as file:
        card = file.read()
    assert "- mine\n- grpo" in card and "some/data" in card and "2 steps" in card


def test_evaluate_takes_a_data_set_and_a_prefix(trained):
    made, _ = trained
    metrics = made.evaluate(PROMPTS[:1], metric_key_prefix="test")
    assert "test_reward" in metrics and not any(name.startswith("eval_") for name in metrics)
    with pytest.raises(ConfigError, match="There is no eval_dataset"):
        made.evaluate()


def test_what_is_not_there_says_what_to_do_instead(trained):
    made, _ = trained
    for name, remedy in trl_surface.METHODS.items():
        with pytest.raises(ConfigError, match=rf"GRPOTrainer.{name}: ") as caught:
            getattr(made, name)("anything")
        assert remedy in str(caught.value)
    for name in trl_surface.ATTRIBUTES:
        with pytest.raises(AttributeError, match=f"no '{name}': "):
            getattr(made, name)
    with pytest.raises(AttributeError, match="GRPOTrainer has no 'nosuch'"):
        made.nosuch  # noqa: B018
    with pytest.raises(ConfigError, match="trial: start a run per setting"):
        made.train(trial=object())


def test_public_methods_of_transformers_trainer_have_an_answer(trained):
    made, _ = trained
    internal = {
        # Steps of a loop that is not there, called by nobody outside of it.
        "create_accelerator_and_postprocess", "num_examples", "get_optimizer_cls_and_kwargs",
        "get_decay_parameter_names", "compute_loss_context_manager",
        "autocast_smart_context_manager", "get_batch_samples", "set_initial_training_values",
        "get_total_train_batch_size", "get_sp_size", "get_cp_size", "get_tp_size", "store_flos",
        "call_model_init", "end", "get_optimizer_group",
    }  # fmt: skip
    public = {
        name
        for name, value in vars(transformers.Trainer).items()
        if callable(value) and not name.startswith("_")
    }
    assert {name for name in public - internal if not hasattr(made, name)} == set()


# --- what TRL says besides ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "level", "text"),
    [
        ("dapo", "sequence", "GSPO is loss_type: grpo"),
        ("bnpo", "sequence", "GSPO is loss_type: grpo"),
        ("luspo", "token", "LUSPO is with the level of the sequence"),
        ("vespo", "sequence", "VESPO weighs sequences itself"),
        ("grpo", "sequence", ""),
        ("dapo", "token", ""),
    ],
)
def test_levels_that_are_seldom_meant_are_said(tmp_path, caplog, loss_type, level, text):
    trainer(tmp_path, loss_type=loss_type, importance_sampling_level=level)
    assert text in caplog.text and ("importance_sampling_level" in caplog.text) == bool(text)


def test_the_entropy_coefficient_is_a_metric(tmp_path):
    made = trainer(tmp_path, entropy_coef=0.02, max_steps=1)
    assert made.train().metrics["entropy_coef"] == 0.02
    assert "entropy_coef" not in trainer(tmp_path / "without", max_steps=1).train().metrics


def test_masks_of_tokens_by_the_names_of_trl(trained):
    made, _ = trained
    entropies = torch.tensor([[0.1, 0.9, 0.5], [0.7, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    wanted = torch.tensor([[False, True, False], [True, False, False]])
    assert torch.equal(made.get_high_entropy_mask(entropies, mask, 0.5), wanted)
    assert not made.get_high_entropy_mask(entropies, mask * 0, 0.5).any()
    logps = torch.tensor([[-2.0, -2.0, 50.0], [-2.0, -2.0, -2.0], [-0.5, -0.5, -0.5]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    for sign, kept in ((-1.0, [[0.0], [0.0], [1.0]]), (1.0, [[1.0], [1.0], [1.0]])):
        advantages = torch.full((3, 1), sign)
        found = made.get_off_policy_mask(advantages, logps, torch.zeros(3, 3), mask, 1.0)
        assert found.tolist() == kept


def test_the_last_entry_of_the_history_has_the_steps_that_were_not_logged(tmp_path):
    made = trainer(tmp_path, more={"eval_dataset": PROMPTS[:2]}, max_steps=3, logging_steps=2,
                   entropy_coef=0.1, beta=0.1, eval_strategy="steps", eval_steps=3,
                   metric_for_best_model="loss")  # fmt: skip
    made.train()
    logged, evaluated, last = made.state.log_history
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert last["policy_loss"] == rows[2]["policy_loss"] and "policy_loss" in logged
    assert not {"loss", "grad_norm", "learning_rate"} & last.keys()
    assert made.entropy_coef == last["entropy_coef"] == 0.1 and not made.aux_loss_enabled
    # The evaluation of a run has a loss only where the best is chosen by it.
    assert rows[2]["eval_loss"] == evaluated["eval_loss"] == made.evaluate()["eval_loss"] != 0


def test_the_loss_of_an_evaluation_is_that_of_an_update_on_it(trained, tmp_path):
    made = trainer(tmp_path, more={"eval_dataset": PROMPTS}, num_generations=4)
    seen = []
    made.sampler = SimpleNamespace(sample=_kept(made.sampler.sample, seen))
    found = made.evaluate()["eval_loss"]
    completions = [c for groups in seen for group in groups for c in group.completions]
    rewards = torch.tensor([even_ids([c.ids])[0] for c in completions]).view(-1, 4)
    deviations = rewards - rewards.mean(1, keepdim=True)
    advantages = (deviations / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    tokens = torch.tensor([len(c.ids) for c in completions])
    assert found == pytest.approx(-((advantages * tokens).sum() / tokens.sum()).item(), abs=1e-6)
    assert found != 0


def _kept(sample, seen):
    def wrapped(*args, **kwargs):
        seen.append(sample(*args, **kwargs))
        return seen[-1]

    return wrapped
