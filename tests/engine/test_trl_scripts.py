"""What a script for TRL does with optimizers, data sets, the Hub, and from its first line on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import tiny
import torch
import transformers
from peft import PeftModel

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.config import learning
from fusedgrpo.engine.data import streams
from fusedgrpo.engine.hub import HubError
from fusedgrpo.engine.own_options import own_options
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ConfigError, DataError

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(4)]


def even(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def trainer(directory: Path, model: Any = None, data: Any = None, **more: Any) -> GRPOTrainer:
    names = ("eval_dataset", "optimizers", "callbacks")
    arguments = {name: more.pop(name) for name in names if name in more}
    options: dict[str, Any] = {
        "output_dir": str(directory),
        "num_generations": 2,
        "prompts_per_step": 2,
        "max_completion_length": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    return GRPOTrainer(
        model=tiny.model() if model is None else model,
        reward_funcs=even,
        args=GRPOConfig(**options | more),
        train_dataset=PROMPTS if data is None else data,
        processing_class=tiny.tokenizer(),
        **arguments,
    )


def weights(made: GRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in made.policy.trainable()])


# --- optimizers -----------------------------------------------------------------------------------


def with_optimizer(directory: Path, **more: Any) -> GRPOTrainer:
    model = tiny.add_lora(tiny.model())
    optimizer = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizers = (optimizer, schedule)
    return trainer(directory, model, max_steps=4, optimizers=optimizers, **more)


def test_an_optimizer_and_its_schedule_are_used_and_resumed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = with_optimizer(tmp_path / "whole")
    whole.train()
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert rates == pytest.approx([0.1, 0.05, 0.1 / 3, 0.025])
    assert isinstance(whole.optimizer, torch.optim.Adagrad)
    torch.manual_seed(0)
    cut = with_optimizer(tmp_path / "cut")

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_save = control.should_training_stop = state.global_step == 2

    cut.add_callback(Stop)
    cut.train()
    again = with_optimizer(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again), weights(whole))
    model = tiny.model()
    alone = torch.optim.SGD(model.parameters(), lr=0.1)
    made = trainer(tmp_path / "full", model, optimizers=(alone, None), finetuning_type="full")
    made.train()
    assert made.optimizer is alone and made.get_learning_rates() == [0.0]


# --- data -----------------------------------------------------------------------------------------


def test_evaluation_sets_have_names(tmp_path: Path) -> None:
    sets = {"a": PROMPTS[:1], "b": datasets.Dataset.from_list(PROMPTS[1:3])}
    made = trainer(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=2)
    made.train()
    row = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert {"eval_a_reward", "eval_b_reward"} <= set(row) and "eval_reward" not in row
    assert [
        {name[:6] for name in entry if "_reward" in name and name.startswith("eval")}
        for entry in made.state.log_history
    ] == [{"eval_a"}, {"eval_b"}, set()]
    assert made.evaluate()["eval_a_reward"] == row["eval_a_reward"]
    assert made.evaluate("b")["eval_reward"] == row["eval_b_reward"]
    assert "test_b_reward" in made.evaluate({"b": PROMPTS}, metric_key_prefix="test")
    assert "test_b_reward" in made.evaluate(datasets.DatasetDict(b=sets["b"]), None, "test")
    assert "eval_reward" in made.evaluate(datasets.DatasetDict(b=sets["b"], test=sets["b"]))
    with pytest.raises(DataError, match="none in it"):
        made.evaluate({})


def endless() -> Any:
    while True:
        yield from PROMPTS


def test_streams_are_read_as_far_as_the_run_goes(tmp_path: Path, monkeypatch: Any) -> None:
    stream = datasets.IterableDataset.from_generator(endless)
    made = trainer(tmp_path, data=stream, eval_dataset=stream.take(3))
    assert len(made.data) == 4 and len(made.held_out) == 3  # type: ignore[arg-type]
    made.train()
    few = trainer(tmp_path, data=stream, max_samples=3, eval_dataset=stream, max_steps=-1)
    assert len(few.data) == len(few.held_out) == 3  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Give max_steps, which says how many prompts"):
        trainer(tmp_path, data=stream, max_steps=-1)
    monkeypatch.setattr(streams, "MOST_HELD_OUT", 5)
    with pytest.raises(DataError, match=r"more than 5 rows.*Give max_samples"):
        trainer(tmp_path, eval_dataset=stream)


# --- the Hub --------------------------------------------------------------------------------------


def test_ref_model_is_there_where_trl_has_one(tmp_path: Path) -> None:
    full = trainer(tmp_path, finetuning_type="full", beta=0.1)
    assert full.ref_model is not None and full.ref_model is not full.model
    assert trainer(tmp_path, finetuning_type="full").ref_model is None
    assert trainer(tmp_path, beta=0.1).ref_model is None


def test_without_args_the_run_is_named_after_its_model() -> None:
    from fusedgrpo.engine.own_options import own_options

    assert own_options(None, "some/model", None).output_dir == "model-GRPO"


class FakeHub:
    """Takes the place of ``huggingface_hub.HfApi``; refuses a branch named ``locked``."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    files: ClassVar[dict[str, str]] = {}

    def create_repo(self, repo_id: str, **more: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **more}))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def create_branch(self, repo_id: str, *, branch: str, **more: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, "branch": branch}))

    def upload_folder(self, *, folder_path: str, **more: Any) -> str:
        if more["revision"] == "locked":
            raise OSError("no such right")
        self.calls.append(("upload_folder", more))
        FakeHub.files = {
            path.name: path.read_text(errors="replace")
            for path in Path(folder_path).iterdir()
            if path.is_file()
        }
        return "done"


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    return FakeHub


def test_what_is_pushed_is_the_adapter_with_a_card(tmp_path: Path, fake_hub: type[FakeHub]) -> None:
    base = tiny.save(tmp_path / "base")
    made = trainer(tmp_path / "run", str(base))
    made.train()
    answer = made.push_to_hub(dataset_name="some/data", token="t", private=True, tags="mine")
    assert answer == "done"
    (_, create), (_, upload) = fake_hub.calls
    assert create == {"repo_id": "run", "token": "t", "private": True, "exist_ok": True}
    assert upload["repo_id"] == "me/run" and upload["commit_message"] == "End of training"
    assert upload["token"] == "t" and upload["run_as_future"] is False
    assert {"adapter_config.json", "tokenizer.json", "README.md"} <= set(fake_hub.files)
    card = fake_hub.files["README.md"]
    rewards = [row["reward"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    for text in (
        "- mine\n- grpo", "some/data, 4 prompts", "| Rewards | even |", "LoRA r=16", "2 steps",
        f"{rewards[0]:.4g} (step 1)", f"{rewards[1]:.4g} (step 2)", "AutoPeftModelForCausalLM",
        f"torch {torch.__version__.partition('+')[0]}", f"| Base model | {base} |",
    ):  # fmt: skip
        assert text in card, text


def test_a_run_pushes_its_checkpoints_and_its_result(
    tmp_path: Path, fake_hub: type[FakeHub]
) -> None:
    hub = {"push_to_hub": True, "hub_model_id": "sums", "hub_token": "hf_secretSECRET1"}
    options = {**hub, "hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path / "run", **options).train()
    uploads = [given for name, given in fake_hub.calls if name == "upload_folder"]
    assert [(u["commit_message"], u["path_in_repo"]) for u in uploads] == [
        ("Training in progress, step 1", None),
        ("Training in progress, step 1", "last-checkpoint"),
        ("Training in progress, step 2", None),
        ("Training in progress, step 2", "last-checkpoint"),
        ("End of training", None),
    ]
    assert fake_hub.calls[0] == (
        "create_repo",
        {"repo_id": "sums", "token": "hf_secretSECRET1", "private": None, "exist_ok": True},
    )
    assert {u["token"] for u in uploads} == {"hf_secretSECRET1"}
    for path in (tmp_path / "run").rglob("*.*"):
        assert path.is_dir() or "secretSECRET1" not in path.read_text(errors="replace"), path


def test_a_hub_that_refuses_costs_a_run_nothing(
    tmp_path: Path, fake_hub: type[FakeHub], monkeypatch: Any, capsys: Any, caplog: Any
) -> None:
    hub = {"push_to_hub": True, "hub_revision": "locked"}
    result = trainer(tmp_path / "run", save_strategy="steps", save_steps=1, **hub).train()
    assert result.global_step == 2 and (tmp_path / "run" / "adapter").is_dir()
    assert [m for m in caplog.messages if "Step 1 was saved and not pushed" in m]
    assert f"fusedgrpo push {tmp_path / 'run'} --repo run" in capsys.readouterr().out

    def nobody(*args: Any, **kwargs: Any) -> Any:
        raise OSError("who are you?")

    monkeypatch.setattr(fake_hub, "create_repo", nobody)
    with pytest.raises(HubError, match=r"repository other: .*who are you"):
        trainer(tmp_path / "other", push_to_hub=True).train()
    assert not (tmp_path / "other" / "metrics.jsonl").exists(), "said before any work"


# --- a whole script -------------------------------------------------------------------------------


def test_a_script_of_trl_runs_with_the_import_changed(tmp_path: Path, monkeypatch: Any) -> None:
    trl = pytest.importorskip("trl")
    base = tiny.save(tmp_path / "base")
    out = tmp_path / "out"
    ended: list[int] = []

    class Ended(transformers.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            ended.append(state.global_step)

    @dataclass
    class MyArguments(trl.ScriptArguments):  # type: ignore[misc]
        reward_scale: float = 1.0

    monkeypatch.setattr(
        sys, "argv",
        ["script.py", "--model_name_or_path", str(base), "--dtype", "float32", "--output_dir",
         str(out), "--num_generations", "2", "--per_device_train_batch_size", "4", "--max_steps",
         "2", "--max_completion_length", "4", "--bf16", "false", "--use_cpu", "true", "--use_peft",
         "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--reward_scale", "2",
         "--learning_rate", "1e-2", "--eval_strategy", "steps", "--eval_steps", "2",
         "--dataset_name", "none", "--report_to", "none"],
    )  # fmt: skip
    parser = trl.TrlParser((MyArguments, GRPOConfig, trl.ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision, "attn_implementation": None, "dtype": "float32",
    }  # fmt: skip
    quantization_config = trl.get_quantization_config(model_args)
    assert quantization_config is None
    dataset = datasets.DatasetDict(
        train=datasets.Dataset.from_list(PROMPTS), test=datasets.Dataset.from_list(PROMPTS[:1])
    )
    made = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[
            lambda completion_ids, **_: [script_args.reward_scale for _ in completion_ids]
        ],
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split],
        processing_class=tiny.tokenizer(),
        quantization_config=quantization_config,
        peft_config=trl.get_peft_config(model_args),
        callbacks=[Ended()],
    )
    result = made.train()
    made.save_model(training_args.output_dir)
    made.log_metrics("train", result.metrics)
    made.save_metrics("train", result.metrics)
    made.save_state()
    assert ended == [2] and made.evaluate()["eval_reward"] == 2.0
    loaded = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), out)
    assert set(loaded.peft_config["default"].target_modules) == {"q_proj", "v_proj"}
    state = transformers.TrainerState.load_from_json(str(out / "trainer_state.json"))
    assert state.log_history == made.state.log_history[:-1]


@pytest.mark.peer
def test_trls_own_script_trains_an_adapter_on_four_bits_and_pushes_it(
    tmp_path: Path, monkeypatch: Any, fake_hub: type[FakeHub], capsys: Any
) -> None:
    trl = pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    from trl.scripts import grpo

    monkeypatch.setattr(trl, "GRPOTrainer", GRPOTrainer)
    monkeypatch.setattr(trl, "GRPOConfig", GRPOConfig)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_rewards.py").write_text(
        "def even(completion_ids, **_): return [float(ids[0] % 2) for ids in completion_ids]"
    )
    rows = datasets.DatasetDict(train=datasets.Dataset.from_list(PROMPTS))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    base = tiny.save(tmp_path / "base", tiny.model("Llama"))
    words = [
        *("--model_name_or_path", str(base), "--dataset_name", "any"),
        *("--reward_funcs", "my_rewards.even", "--output_dir", "out", "--report_to", "none"),
        *("--max_steps", "1", "--num_generations", "2", "--per_device_train_batch_size", "2"),
        *("--max_completion_length", "4", "--use_cpu", "true", "--bf16", "false"),
        *("--use_peft", "--load_in_4bit", "--lora_target_modules", "q_proj", "v_proj"),
        *("--use_vllm", "False", "--gradient_checkpointing_kwargs", '{"use_reentrant": false}'),
        *("--push_to_hub", "--hub_strategy", "end", "--save_strategy", "no"),
    ]
    parsed = grpo.make_parser().parse_args_and_config(words, fail_with_unknown_args=False)
    grpo.main(*parsed)
    assert Path("out/adapter_config.json").exists() and "grpo" in fake_hub.files["README.md"]
    assert "on 4-bit weights" in Path("out/run.log").read_text()
    assert "https://huggingface.co/me/out" in capsys.readouterr().out
    parsed[2].load_in_4bit, parsed[2].load_in_8bit = False, True
    with pytest.raises(ConfigError, match=r"^quantization_config: not supported: BitsAndBytes"):
        grpo.main(*parsed)


def test_the_data_sets_of_a_trainer_are_those_that_were_given(tmp_path: Path) -> None:
    train, other = (datasets.Dataset.from_list([{"prompt": f"w{n} w5"}]) for n in (4, 9))
    made = trainer(tmp_path, data=train, eval_dataset=train)
    assert made.train_dataset is train and made.eval_dataset is train
    first = made.evaluate()
    made.eval_dataset = other
    assert made.evaluate()["eval_reward"] != first["eval_reward"]
    made.eval_dataset = {"a": train, "b": other}
    assert made.evaluate()["eval_a_reward"] == first["eval_reward"]
    assert "eval_reward" in made.evaluate("b")
    made.eval_dataset = None
    with pytest.raises(ConfigError, match="no eval_dataset"):
        made.evaluate()
    # A list of rows is no data set in TRL; here it is read, and that is what there is.
    listed = trainer(tmp_path, data=[{"prompt": "w4 w5"}], eval_dataset=[{"prompt": "w9"}])
    assert listed.train_dataset is listed.data and listed.eval_dataset is listed.held_out


@pytest.mark.peer
def test_arguments_of_trl_bring_its_learning_rate(tmp_path: Path) -> None:
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")

    def settled(args: Any) -> GRPOConfig:
        own = own_options(args, tiny.model(), None, peft.LoraConfig())
        learning.settle(own, quietly=False)
        return own

    theirs = settled(trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    assert theirs.finetuning_type == "lora" and theirs.learning_rate == 1e-6
    assert learning.said(theirs) == ""
    ours = settled(GRPOConfig(output_dir=str(tmp_path)))
    assert ours.learning_rate == learning.LEARNING_RATES["lora"] and learning.said(ours)
