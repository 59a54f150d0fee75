"""Every way in which adapters come into a model: what trains, what is saved, what comes back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusedgrpo import GRPOConfig, host
from fusedgrpo.engine.checkpointing import load_weights, save_weights
from fusedgrpo.engine.optimizer import build_optimizer
from fusedgrpo.errors import CheckpointError, ModelError
from fusedgrpo.models.adapters.attached import Adapters
from fusedgrpo.models.packed_batch import PackedBatch
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.settings import model_limits
from fusedgrpo.models.tokenizer import load_tokenizer

IDS = torch.tensor([[5, 6, 7, 2, 9, 30]])
PACKED = PackedBatch.build([([5, 6, 7], [2, 9, 30])], "cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two bases, tied and not, each with an adapter that was trained on it before."""
    made = {}
    for family in ("Llama", "Qwen2"):
        base = tiny.save(tmp_path_factory.mktemp(family), tiny.model(family))
        adapter = tmp_path_factory.mktemp(f"{family}-adapter")
        trained_before(base).save_pretrained(adapter)
        made |= {family: base, f"{family} adapter": adapter}
    return made


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def lora(**options: Any) -> LoraConfig:
    values = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**values | options)


def trained_before(base: Path, **options: Any) -> Any:
    torch.manual_seed(1)
    wrapped = get_peft_model(load(base), lora(**options))
    tiny.stir(wrapped)
    return wrapped


# --- the ways -------------------------------------------------------------------------------------


def second_of_two(base: Path, _: Path) -> Any:
    model = trained_before(base)
    model.add_adapter("skill", lora(target_modules=["o_proj"]))
    model.set_adapter("skill")
    return model


def first_of_two(base: Path, _: Path) -> Any:
    model = trained_before(base)
    model.add_adapter("skill", lora(target_modules=["o_proj"]))
    return model


def other_name(base: Path, _: Path) -> Any:
    return get_peft_model(load(base), lora(), adapter_name="skill")


def beside_a_frozen_one(base: Path, _: Path) -> Any:
    model = trained_before(base)
    model.add_adapter("skill", lora(target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "skill"])
    model.set_requires_grad("default", False)
    return model


def two_together(base: Path, _: Path) -> Any:
    model = trained_before(base)
    model.add_adapter("skill", lora(target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "skill"])
    return model


def added_by_transformers(base: Path, _: Path) -> Any:
    model = load(base)
    model.add_adapter(lora(task_type=None, init_lora_weights=False))
    return model


def added_by_transformers_by_name(base: Path, _: Path) -> Any:
    model = load(base)
    model.add_adapter(lora(), adapter_name="first")
    model.add_adapter(lora(target_modules=["o_proj"]), adapter_name="skill")
    return model


def folder_given_to_from_pretrained(_: Path, adapter: Path) -> Any:
    model = load(adapter)
    model.set_adapter("default")
    return model


def loaded_to_train(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load(base), adapter, is_trainable=True)


def wrapped_by_an_earlier_trainer(base: Path, _: Path) -> Any:
    model = load(base)
    get_peft_model(model, lora(init_lora_weights=False))
    return model


def wrapped_twice(base: Path, _: Path) -> Any:
    return get_peft_model(trained_before(base), lora(target_modules=["o_proj"]), "skill")


def head_trained_whole(base: Path, _: Path) -> Any:
    return get_peft_model(load(base), lora(modules_to_save=["lm_head"]))


def embeddings_trained_whole(base: Path, _: Path) -> Any:
    return get_peft_model(load(base), lora(modules_to_save=["embed_tokens"]))


def embeddings_and_head_trained_whole(base: Path, _: Path) -> Any:
    return get_peft_model(load(base), lora(modules_to_save=["embed_tokens", "lm_head"]))


def embeddings_trained_and_still_tied(base: Path, _: Path) -> Any:
    return get_peft_model(
        load(base), lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    )


def head_trained_whole_by_transformers(base: Path, _: Path) -> Any:
    model = load(base)
    model.add_adapter(lora(modules_to_save=["lm_head"]))
    return model


def some_tokens_trained(base: Path, _: Path) -> Any:
    return get_peft_model(load(base), lora(trainable_token_indices=[2, 7, 9]))


def adapter_on_the_embeddings(base: Path, _: Path) -> Any:
    return get_peft_model(load(base), lora(target_modules=["embed_tokens", "q_proj"]))


def dora(base: Path, _: Path) -> Any:
    return get_peft_model(load(base), lora(use_dora=True))


def pissa(base: Path, _: Path) -> Any:
    return get_peft_model(load(base), lora(init_lora_weights="pissa"))


def biases(base: Path, _: Path) -> Any:
    return get_peft_model(load(base), lora(bias="all"))


def sixteen_bits(base: Path, _: Path) -> Any:
    model = trained_before(base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def resized(base: Path, _: Path) -> Any:
    model = load(base)
    model.resize_token_embeddings(tiny.VOCAB + 8)
    return get_peft_model(model, lora())


def resized_and_some_tokens_trained(base: Path, _: Path) -> Any:
    model = load(base)
    model.resize_token_embeddings(tiny.VOCAB + 8)
    return get_peft_model(model, lora(trainable_token_indices=[2, tiny.VOCAB + 3]))


def resized_without_an_adapter(base: Path, _: Path) -> Any:
    model = load(base)
    model.resize_token_embeddings(tiny.VOCAB + 8)
    return model


WAYS: list[Callable[[Path, Path], Any]] = [
    second_of_two, first_of_two, other_name, beside_a_frozen_one, two_together,
    added_by_transformers, added_by_transformers_by_name, folder_given_to_from_pretrained,
    loaded_to_train, wrapped_by_an_earlier_trainer, wrapped_twice, head_trained_whole,
    embeddings_trained_whole, embeddings_and_head_trained_whole, embeddings_trained_and_still_tied,
    head_trained_whole_by_transformers, some_tokens_trained, adapter_on_the_embeddings, dora,
    pissa, biases, sixteen_bits, resized, resized_and_some_tokens_trained,
    resized_without_an_adapter,
]  # fmt: skip


def config(**options: Any) -> GRPOConfig:
    values = {"use_cpu": True, "bf16": False, "beta": 0.1, "gradient_checkpointing": False}
    return GRPOConfig(**values | options)


def logits(model: Any) -> torch.Tensor:
    training = model.training
    with torch.no_grad():
        found = model.eval()(input_ids=IDS).logits
    model.train(training)
    return found


def train(policy: Policy) -> None:
    optimizer = build_optimizer(config(learning_rate=3e-2), policy.trainable())
    for _ in range(3):
        (-policy.logprobs(PACKED).logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def own_logp(policy: Policy) -> torch.Tensor:
    """Those of ``PACKED``, from the model's own logits."""
    found = policy.model(input_ids=IDS).logits[0, 2:-1].float().log_softmax(-1)
    return found.gather(1, IDS[0, 3:, None])[:, 0]


def gradients(policy: Policy, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    policy.model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in policy.trainable() if p.grad is not None}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-5)


def tolerance(way: Callable[[Path, Path], Any]) -> float:
    return 2e-2 if way is sixteen_bits else 1e-5


@pytest.mark.parametrize(
    ("way", "family"),
    [
        pytest.param(way, family, id=f"{way.__name__}-{kind}")
        for way in WAYS
        for family, kind in (("Llama", "untied"), ("Qwen2", "tied"))
        if kind == "untied" or re.search("embeddings|head|token|resized|transformers", way.__name__)
    ],
)
def test_it_starts_as_given_trains_and_is_saved_and_restored(
    way: Callable[[Path, Path], Any],
    family: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, adapter = folders[family], folders[f"{family} adapter"]

    def given() -> Any:
        torch.manual_seed(3)
        return way(base, adapter)

    model = given()
    before = logits(model)
    policy = Policy.load(config(), model)
    # In 16 bits an adapter's products are rounded, now they are not.
    assert torch.allclose(logits(policy.model), before, rtol=0, atol=tolerance(way))
    with policy.scoring():
        first = policy.logprobs(PACKED).logp
        with policy.reference():
            assert torch.equal(policy.logprobs(PACKED).logp, first)

    started = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    train(policy)
    trained = {name for name, _ in policy.trainable()}
    for name, parameter in policy.model.named_parameters():
        if name not in trained:
            assert torch.equal(parameter, started[name]), name
    assert {p.dtype for _, p in policy.trainable()} == {torch.float32}
    after = logits(policy.model)
    assert (after - before).abs().max() > 1e-2
    with policy.scoring():
        scored = policy.logprobs(PACKED).logp
        with policy.reference():
            assert torch.equal(policy.logprobs(PACKED).logp, first)
        assert same(scored, own_logp(policy)), "our reading of the head is the model's"
    assert {name for name, _ in policy.trainable()} == trained
    ours = gradients(policy, lambda: policy.logprobs(PACKED).logp.sum())
    its_own = gradients(policy, lambda: own_logp(policy).sum())
    for name, gradient in its_own.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)

    path = save_weights(policy, tiny.tokenizer(), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    bare = load(base)
    if "resized" in way.__name__:
        bare.resize_token_embeddings(tiny.VOCAB + 8)
    loaded = PeftModel.from_pretrained(bare, path, "first")
    others = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
    for name in others:
        loaded.load_adapter(path / name, name)
    if others:
        loaded.base_model.set_adapter(["first", *others])
    assert same(logits(loaded), after)
    if not others and "resized" not in way.__name__:
        assert same(logits(AutoPeftModelForCausalLM.from_pretrained(path)), after)
    settings = json.loads((path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert settings["task_type"] == "CAUSAL_LM" and settings["inference_mode"]

    again = Policy.load(config(), given())
    load_weights(again, tmp_path / "run")
    for (name, one), (_, other) in zip(
        again.model.named_parameters(), policy.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("bf16", [True, False], ids=["autocast", "in-the-weights-dtype"])
@pytest.mark.parametrize(
    "way",
    [head_trained_whole, embeddings_trained_and_still_tied, some_tokens_trained, biases, dora],
    ids=lambda way: way.__name__,
)
def test_a_model_in_bfloat16(
    way: Callable[[Path, Path], Any],
    bf16: bool,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "has_bfloat16", lambda device: True)
    policy = Policy.load(config(bf16=bf16), way(folders["Qwen2"], Path()).bfloat16())
    with policy.scoring():
        first = policy.logprobs(PACKED).logp
        with policy.reference():
            assert torch.equal(policy.logprobs(PACKED).logp, first)
    train(policy)
    with policy.scoring(), policy.autocast():
        assert torch.allclose(policy.logprobs(PACKED).logp, own_logp(policy), rtol=0, atol=0.05)
        policy.causal_lm.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)


# --- what cannot work is refused, with a remedy that works ----------------------------------------


def refused(match: str, model: Any = None, peft_config: Any = None, **options: Any) -> None:
    with pytest.raises(ModelError, match=match):
        Policy.load(config(**options), model, peft_config)


def test_an_adapter_that_was_loaded_frozen_is_refused(folders: dict[str, Path]) -> None:
    base, adapter = folders["Llama"], folders["Llama adapter"]
    for model in (PeftModel.from_pretrained(load(base), adapter), load(adapter)):
        refused(r"is_trainable=True.*set_adapter\('default'\)", model)
        model.set_adapter("default")
        assert Policy.load(config(), model).trainable()


def test_an_active_adapter_beside_the_one_that_trains_is_refused(folders: dict[str, Path]) -> None:
    model = first_of_two(folders["Llama"], Path())
    model.set_requires_grad("default", False)
    model.set_requires_grad("skill", True)
    refused(r"'skill' requires gradients, but active is 'default'.*set_adapter\('skill'\)", model)
    model.set_adapter("skill")
    assert Policy.load(config(), model).trainable()


def test_weights_that_would_train_and_not_be_saved_are_refused(folders: dict[str, Path]) -> None:
    model = trained_before(folders["Llama"])
    model.get_input_embeddings().weight.requires_grad_(True)
    refused(r"embed_tokens\.weight requires gradients .* modules_to_save", model)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert Policy.load(config(), model).trainable()


def test_a_start_that_cannot_be_had_again_from_the_file_is_refused(
    folders: dict[str, Path],
) -> None:
    again = lora(init_lora_weights="pissa_niter_4")
    refused("'pissa_niter_4'.*'pissa' or 'olora'", load(folders["Llama"]), again)
    again.init_lora_weights = "pissa"
    assert Policy.load(config(), load(folders["Llama"]), again).trainable()


def test_a_merged_adapter_is_refused(folders: dict[str, Path]) -> None:
    model = trained_before(folders["Llama"])
    model.merge_adapter()
    refused("unmerge_adapter", model)
    model.unmerge_adapter()
    assert Policy.load(config(), model).trainable()


def test_what_asks_for_something_else_beside_an_adapter_is_refused(
    folders: dict[str, Path],
) -> None:
    base, adapter = folders["Llama"], folders["Llama adapter"]
    refused("Leave peft_config out", trained_before(base), lora())
    refused("finetuning_type: full.*merge_and_unload", trained_before(base), finetuning_type="full")
    refused("finetuning_type: full", finetuning_type="full", model_name_or_path=str(adapter))
    refused("already has an adapter", trained_before(base), adapter_name_or_path=str(adapter))
    refused(
        "is an adapter, and so is adapter_name_or_path",
        model_name_or_path=str(adapter),
        adapter_name_or_path=str(adapter),
    )
    merged = trained_before(base).merge_and_unload()
    assert Policy.load(config(), merged, lora()).trainable()


@pytest.mark.parametrize(
    "options",
    [
        {"lora_r": 3},
        {"lora_alpha": 3},
        {"lora_dropout": 0.5},
        {"use_rslora": True},
        {"lora_target_modules": ["q_proj"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_the_adapter_contradicts_are_refused(
    options: dict[str, Any], folders: dict[str, Path]
) -> None:
    says = rf"contradicts {next(iter(options))}: .* \(it has "
    refused(says, trained_before(folders["Llama"]), **options)
    refused(says, model_name_or_path=str(folders["Llama adapter"]), **options)


def test_options_that_agree_with_the_adapter_are_taken(folders: dict[str, Path]) -> None:
    options = {"lora_r": 2, "lora_alpha": 8, "lora_target_modules": ["v_proj", "q_proj"]}
    adapter = str(folders["Llama adapter"])
    assert Policy.load(config(model_name_or_path=adapter, **options)).trainable()


# --- an adapter's folder instead of a model -------------------------------------------------------


@pytest.mark.parametrize("four_bits", [False, True], ids=["plain", "four-bits"])
@pytest.mark.parametrize(
    "names",
    [
        {"model_name_or_path": "Llama adapter"},
        {"adapter_name_or_path": "Llama adapter"},
        {"model_name_or_path": "Llama", "adapter_name_or_path": "Llama adapter"},
    ],
    ids=["as-model", "as-adapter", "both"],
)
def test_a_saved_adapter_is_trained_further(
    names: dict[str, str], four_bits: bool, folders: dict[str, Path]
) -> None:
    if four_bits:
        pytest.importorskip("bitsandbytes")
    options = {key: str(folders[name]) for key, name in names.items()}
    policy = Policy.load(config(load_in_4bit=four_bits, **options))
    expected = dict(trained_before(folders["Llama"]).named_parameters())
    assert {n for n, _ in policy.trainable()} == {n for n in expected if "lora_" in n}
    for name, parameter in policy.trainable():
        assert torch.equal(parameter, expected[name]), name
    with policy.scoring():
        first = policy.logprobs(PACKED).logp
    train(policy)
    with policy.scoring(), policy.reference():
        assert torch.equal(policy.logprobs(PACKED).logp, first)


def test_an_adapter_onto_a_model_that_is_passed(folders: dict[str, Path]) -> None:
    model = load(folders["Llama"])
    policy = Policy.load(config(adapter_name_or_path=str(folders["Llama adapter"])), model)
    assert same(logits(policy.model), logits(trained_before(folders["Llama"])))


def test_an_adapter_among_the_files_of_its_model(folders: dict[str, Path], tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(folders["Llama"], both)
    shutil.copytree(folders["Llama adapter"], both, dirs_exist_ok=True)
    policy = Policy.load(config(model_name_or_path=str(both)))
    assert same(logits(policy.model), logits(trained_before(folders["Llama"])))
    assert policy.trainable()


def test_the_tokenizer_is_the_adapters_if_it_has_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "adapter"
    shutil.copytree(folders["Llama adapter"], mine)
    assert len(load_tokenizer(config(model_name_or_path=str(mine)))) == tiny.VOCAB
    tiny.tokenizer(vocab=20).save_pretrained(mine)
    assert len(load_tokenizer(config(model_name_or_path=str(mine)))) == 20
    by_name = config(model_name_or_path=str(mine), tokenizer_name_or_path=str(folders["Llama"]))
    assert len(load_tokenizer(by_name)) == tiny.VOCAB


def test_resized_embeddings_come_back_with_the_adapter(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for way in (resized, resized_and_some_tokens_trained):
        policy = Policy.load(config(), way(folders["Qwen2"], Path()))
        train(policy)
        path = save_weights(policy, tiny.tokenizer(), tmp_path / way.__name__)
        options = config(model_name_or_path=str(path))
        limits = model_limits(options)
        assert limits is not None and limits["vocab_size"] == tiny.VOCAB + 8
        assert same(logits(Policy.load(options).model), logits(policy.model))


def test_a_base_or_an_adapter_that_is_not_there_is_one_clear_error(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "run" / "adapter"
    shutil.copytree(folders["Llama adapter"], mine)
    file = mine / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "/no/such/base"}))
    refused("belongs to the model '/no/such/base'.*adapter_name_or_path", **as_model(mine))
    file.write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    refused("does not say which model", **as_model(mine))
    file.write_text("{")
    refused("is no configuration of an adapter", **as_model(mine))
    base = str(folders["Llama"])
    refused("has no adapter_config", model_name_or_path=base, adapter_name_or_path=base)
    refused(
        "Is .*run/adapter meant", model_name_or_path=base, adapter_name_or_path=str(mine.parent)
    )


def as_model(path: Path) -> dict[str, str]:
    return {"model_name_or_path": str(path)}


def test_an_adapter_that_is_damaged_incomplete_or_of_another_model_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "adapter"
    shutil.copytree(folders["Llama adapter"], mine)
    file = mine / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if "layers.1" not in k}, file)
    refused("cannot be put onto LlamaForCausalLM: .*missing", **as_model(mine))
    save_file({k: torch.zeros(3, 3) for k in tensors}, file)
    refused("cannot be put onto LlamaForCausalLM: .*size", **as_model(mine))
    file.write_bytes(b"123")
    refused("cannot be put onto|cannot be read", **as_model(mine))
    file.unlink()
    (mine / "adapter_model.bin").write_bytes(b"123")
    refused("cannot be put onto", **as_model(mine))


# --- names of bases -------------------------------------------------------------------------------


def test_a_relative_base_is_named_so_that_it_is_found_from_elsewhere(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders["Llama"].parent)
    by_name = Policy.load(config(model_name_or_path=folders["Llama"].name))
    given = Policy.load(config(), load(Path(folders["Llama"].name)))
    monkeypatch.chdir(tmp_path)
    for policy in (by_name, given):
        path = save_weights(policy, tiny.tokenizer(), tmp_path / "run")
        settings = json.loads((path / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(folders["Llama"])


def test_an_unnamed_model_is_saved_with_its_embeddings(tmp_path: Path) -> None:
    """Nobody can look up whether they were resized."""
    model = tiny.model("Llama")
    model.resize_token_embeddings(tiny.VOCAB + 8)
    policy = Policy.load(config(), model)
    path = save_weights(policy, tiny.tokenizer(), tmp_path)
    other = tiny.model("Llama")
    other.resize_token_embeddings(tiny.VOCAB + 8)
    assert same(logits(PeftModel.from_pretrained(other, path)), logits(policy.model))


def test_switching_off_leaves_frozen_what_was_frozen(folders: dict[str, Path]) -> None:
    model = beside_a_frozen_one(folders["Llama"], Path())
    flags = [p.requires_grad for p in model.parameters()]
    adapters = Adapters(model)
    with adapters.off():
        assert same(logits(model), logits(load(folders["Llama"])))
        assert adapters.active == []
    assert [p.requires_grad for p in model.parameters()] == flags
    assert adapters.active == ["default", "skill"]


def test_a_checkpoint_of_another_adapter_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    policy = Policy.load(config(), other_name(folders["Llama"], Path()))
    save_weights(policy, tiny.tokenizer(), tmp_path)
    other = Policy.load(config(lora_r=2, lora_target_modules="o_proj"), load(folders["Llama"]))
    with pytest.raises(CheckpointError, match="other modules"):
        load_weights(other, tmp_path)
    larger = Policy.load(
        config(lora_r=4, lora_target_modules="q_proj,v_proj"), load(folders["Llama"])
    )
    with pytest.raises(CheckpointError, match="another size"):
        load_weights(larger, tmp_path)


def test_checkpoints_in_pefts_own_layout_still_load(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Earlier versions wrote them with save_pretrained: others than "default" in subfolders."""
    model = second_of_two(folders["Llama"], Path())
    policy = Policy.load(config(), model)
    train(policy)
    model.save_pretrained(tmp_path / "adapter")
    again = Policy.load(config(), second_of_two(folders["Llama"], Path()))
    load_weights(again, tmp_path)
    for (name, one), (_, other) in zip(again.trainable(), policy.trainable(), strict=True):
        assert torch.equal(one, other), name
