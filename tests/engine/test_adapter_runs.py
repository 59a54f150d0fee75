"""Whole runs that go on from an adapter: from a file of options, resumed, from a notebook."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.memory.planner import plan_memory
from fusedgrpo.errors import PlanError
from fusedgrpo.models.adapters.files import planned_options
from fusedgrpo.models.settings import model_settings

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(7)]


def even_ids(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"), tiny.model())


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("adapter")
    tiny.add_lora(AutoModelForCausalLM.from_pretrained(base), r=3).save_pretrained(path)
    return path


def options(directory: Path, **changes: Any) -> GRPOConfig:
    values = {
        "output_dir": str(directory),
        "num_generations": 4,
        "prompts_per_step": 1,
        "max_completion_length": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "beta": 0.1,
        "gradient_checkpointing": False,
        "save_steps": 1,
        "bf16": False,
        "use_cpu": True,
    }
    return GRPOConfig(**values | changes)


def make(directory: Path, model: Any = None, **changes: Any) -> GRPOTrainer:
    return GRPOTrainer(
        model=model,
        reward_funcs=even_ids,
        args=options(directory, **changes),
        train_dataset=PROMPTS,
        processing_class=tiny.tokenizer(),
    )


def weights(run: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.trainable()}


@pytest.mark.slow
def test_an_adapter_in_a_file_of_options_is_trained_further_and_resumed(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    names = {"model_name_or_path": str(base), "adapter_name_or_path": str(adapter)}
    file.write_text(json.dumps(options(tmp_path / "run").to_dict() | names))
    given = GRPOConfig.from_file(file)
    run = GRPOTrainer(None, even_ids, given, PROMPTS, tokenizer=tiny.tokenizer())
    before = weights(run)
    run.train()
    assert "LoRA r=3" in (tmp_path / "run/run.log").read_text()
    after = weights(run)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    again = GRPOTrainer(None, even_ids, given, PROMPTS, tokenizer=tiny.tokenizer())
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoints/step-000001"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(again).items())
    # And what came out is an adapter to go on from.
    on = make(tmp_path / "on", tmp_path / "run" / "adapter", max_steps=1)
    assert on.args.model_name_or_path == str(tmp_path / "run" / "adapter")
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(on).items())


def test_of_two_adapters_the_one_that_trains_is_resumed(tmp_path: Path) -> None:
    def two() -> Any:
        torch.manual_seed(0)
        model: Any = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"]))
        model.add_adapter("skill", LoraConfig(r=2, target_modules=["v_proj"]))
        model.set_adapter("skill")
        return model

    run = make(tmp_path / "run", two())
    run.train()
    again = make(tmp_path / "run", two())
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoints/step-000001"))
    after = weights(run)
    assert after and all("skill" in name for name in after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(again).items())
    PeftModel.from_pretrained(tiny.model(), tmp_path / "run" / "adapter")


def test_a_cell_that_is_run_twice_goes_on(tmp_path: Path) -> None:
    model = tiny.model()
    first = make(tmp_path / "run", model, lora_r=4, max_steps=1)
    first.train()
    second = make(tmp_path / "run", model, lora_r=4, max_steps=1)
    assert [p.data_ptr() for _, p in second.policy.trainable()] == [
        p.data_ptr() for _, p in first.policy.trainable()
    ]
    started = weights(second)
    second.train()
    assert any(not torch.equal(t, started[name]) for name, t in weights(second).items())
    assert (tmp_path / "run/adapter/adapter_config.json").exists()


@pytest.mark.slow
def test_the_memory_of_an_adapter_is_planned_by_its_own_shape(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    given = options(tmp_path, model_name_or_path=str(adapter))
    planned = planned_options(given)
    assert planned.lora_r == 3 and "q_proj" in planned.lora_target_modules
    plain = options(tmp_path, model_name_or_path=str(base), lora_r=3)
    assert planned_options(plain) is plain
    plans = [
        plan_memory(config, model_settings(config), gpu_bytes=24 * 2**30)
        for config in (planned, plain)
    ]
    assert plans[0].peak == plans[1].peak and math.isfinite(plans[0].peak)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    text = json.dumps(settings | {"modules_to_save": ["lm_head"]})
    (other / "adapter_config.json").write_text(text)
    with pytest.raises(PlanError, match="only that of plain LoRA"):
        planned_options(options(tmp_path, model_name_or_path=str(other)))
