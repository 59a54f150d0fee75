"""The sampler that the options name: found before a model is loaded, made when there is one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from fusedgrpo.config.rules import EXTENSIBLE
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.memory.plan import MemoryPlan
from fusedgrpo.engine.memory.planner import plan_memory
from fusedgrpo.engine.rollout.choice import OURS, choose_sampler
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.foreign_sampler import ForeignSampler
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.errors import ConfigError, ModelError
from fusedgrpo.models.policy import Policy

CODE = """
from fusedgrpo.errors import ModelError

class Mine:
    def __init__(self, policy, tokenizer, eos_ids, *, execution, skip_special_tokens):
        self.given = policy, tokenizer, eos_ids, execution, skip_special_tokens
    def sample(self, prompt_ids, n, params, seed, *, rows=None, first=0):
        return []

def made(*args, **kwargs):
    return Mine(*args, **kwargs)

class Nothing:
    def __init__(self, *args, **kwargs):
        pass

class Fails(Nothing):
    def __init__(self, *args, **kwargs):
        raise OSError("no server at port 8000")

class Refuses(Nothing):
    def __init__(self, *args, **kwargs):
        raise ModelError("it cannot be sampled from")

class Short(Nothing):
    def __init__(self, policy):
        pass

number = 3
"""


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("import no_such_module")
    return [Path.cwd(), tmp_path]


POLICY: Any = SimpleNamespace(vocabulary_size=40)


def make(option: str, folders: list[Path]) -> Any:
    chosen = choose_sampler(option, None, folders).make
    return chosen(POLICY, "tokenizer", [2], execution=None, skip_special_tokens=False)


def test_ours_are_those_that_the_options_know() -> None:
    assert tuple(OURS) == EXTENSIBLE["sampler"]
    assert all(choose_sampler(name, None, []) == OURS[name] for name in OURS)
    assert [name for name in OURS if OURS[name].decodes] == ["auto", "decoder"]


def test_auto_is_the_decoder_where_it_can_be() -> None:
    execution = Execution(OOMRetry(tokens=0))
    on = Policy(tiny.model())
    chosen = choose_sampler("auto", None, []).make
    assert isinstance(chosen(on, tiny.tokenizer(), [1], execution=execution), DecoderSampler)
    on.layout = "rows"
    assert isinstance(chosen(on, tiny.tokenizer(), [1], execution=execution), GenerateSampler)
    with pytest.raises(ModelError, match="cannot"):
        choose_sampler("decoder", None, []).make(on, tiny.tokenizer(), [1])
    with pytest.raises(ModelError, match="cannot"):  # or the option would be ignored
        chosen(on, tiny.tokenizer(), [1], rollout_weights="merged")


@pytest.mark.parametrize("name", ["Mine", "made"])
def test_a_named_class_or_function_makes_it(name: str, folders: list[Path]) -> None:
    sampler = make(f"mine.py:{name}", folders)
    assert isinstance(sampler, ForeignSampler) and sampler.vocabulary_size == 40
    assert sampler.sampler.given == (POLICY, "tokenizer", [2], None, False)


def test_ours_by_its_module_is_like_any_other() -> None:
    chosen = choose_sampler(
        "fusedgrpo.engine.rollout.generate_sampler:GenerateSampler", None, [Path.cwd()]
    )
    sampler = chosen.make(
        Policy(tiny.model()), tiny.tokenizer(), [tiny.EOS],
        execution=Execution(OOMRetry(0)), skip_special_tokens=True,
    )  # fmt: skip
    params = SamplingParams(max_new_tokens=3)
    (group,) = sampler.sample([[5, 6]], 2, params, seed=0)
    assert len(group.completions) == 2
    assert sampler.warm_up([[5, 6]], 2, params)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("none.py:Mine", r"sampler 'none.py:Mine': no such file \(looked for .*none.py"),
        ("mine.py:Mime", r"has no 'Mime'. Did you mean 'Mine'"),
        ("mine.py:number", r"'number'"),
        ("broken.py:Mine", r"sampler 'broken.py:Mine'.*no_such_module"),
        ("no.such.module:Mine", r"sampler 'no.such.module:Mine'.*No module"),
        ("mine.py:Short", r"sampler 'mine.py:Short' is called as \(policy, tokenizer"),
    ],
)
def test_a_mistake_is_found_before_there_is_a_model(
    option: str, problem: str, folders: list[Path]
) -> None:
    with pytest.raises(ConfigError, match=problem):
        choose_sampler(option, None, folders)


@pytest.mark.parametrize(
    ("name", "error", "problem"),
    [
        ("Fails", ConfigError, r"sampler 'mine.py:Fails': .*OSError: no server at port 8000"),
        ("Nothing", ConfigError, r"sampler 'mine.py:Nothing': .*a Nothing has no such method"),
        ("Refuses", ModelError, r"^it cannot be sampled from$"),
    ],
)
def test_a_mistake_in_making_it(
    name: str, error: type[Exception], problem: str, folders: list[Path]
) -> None:
    with pytest.raises(error, match=problem):
        make(f"mine.py:{name}", folders)


def test_an_object_that_was_passed_is_taken_as_it_is() -> None:
    given = SimpleNamespace(sample=lambda *_, **__: [])
    sampler: Any = choose_sampler("auto", given, []).make(POLICY, None, [], execution=None)
    assert isinstance(sampler, ForeignSampler) and sampler.sampler is given
    with pytest.raises(ConfigError, match=r"sampler: generate, and a sampler was passed"):
        choose_sampler("generate", given, [])
    with pytest.raises(ConfigError, match=r"sampler \(int\): expected an object with sample"):
        choose_sampler("auto", 3, [])


MEMORY = """
class Remote:
    def __init__(self, policy, tokenizer, eos_ids, **options):
        pass

    @staticmethod
    def memory(settings, *, rows, prompt, longest):
        return settings.num_hidden_layers * rows * longest

    def sample(self, *arguments, **options):
        return []

class Wrong(Remote):
    @staticmethod
    def memory(settings, **lengths):
        return 1.5

class Raising(Remote):
    @staticmethod
    def memory(settings, **lengths):
        raise KeyError("rows")
"""


def test_what_it_says_of_its_memory_is_planned(tmp_path: Path) -> None:
    (tmp_path / "remote.py").write_text(MEMORY)
    settings = tiny.model().config
    # Measuring an update takes the time, and no part of it is asked for here.
    options = GRPOConfig(
        max_prompt_length=20, max_completion_length=30, bf16=True, tokens_per_microbatch=100,
        gradient_checkpointing=False, lora_target_modules="q_proj", rollout_weights="adapter",
    )  # fmt: skip

    def planned(memory: Any) -> MemoryPlan:
        return plan_memory(options, settings, gpu_bytes=8 << 30, sampler_memory=memory)

    remote = choose_sampler("remote.py:Remote", None, [tmp_path])
    plan = planned(remote.memory)
    layers, rows = settings.num_hidden_layers, plan.max_in_flight
    assert plan.phases["rollout"]["KV cache"] == layers * rows * 50
    assert "KV cache" not in planned(None).phases["rollout"]
    passed = remote.make(POLICY, None, []).sampler  # type: ignore[attr-defined]
    assert planned(choose_sampler("auto", passed, []).memory) == plan
    for name, problem in {"Wrong": "returned 1.5", "Raising": "raised KeyError: 'rows'"}.items():
        memory = choose_sampler(f"remote.py:{name}", None, [tmp_path]).memory
        with pytest.raises(ConfigError, match=f"sampler 'remote.py:{name}': memory {problem}"):
            planned(memory)
