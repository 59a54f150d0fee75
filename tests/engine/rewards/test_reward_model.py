"""RewardModel: a classifier with one output as a reward function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusedgrpo.engine.rewards.call import Batch
from fusedgrpo.engine.rewards.reward_model import (
    RewardModel,
    is_reward_model,
    load_reward_model,
    weights_bytes,
)
from fusedgrpo.errors import RewardError

transformers = pytest.importorskip("transformers")

TEMPLATE = "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"


def config(**options: Any) -> Any:
    return transformers.Qwen2Config(
        **{
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "num_labels": 1,
            "pad_token_id": 0,
            **options,
        }
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return transformers.Qwen2ForSequenceClassification(config(attention_dropout=0.5))


def batch(prompts: list[Any], completions: list[Any]) -> Batch:
    rows = [i + 10 for i in range(len(prompts))]
    return Batch(prompts, completions, [[0]] * len(prompts), {}, None, rows)


def score(model: RewardModel, given: Batch) -> list[float]:
    model.start(given)
    return model.finish().values


def alone(model: Any, tokenizer: Any, text: str) -> float:
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, 0].item()


def test_batches_of_any_lengths_score_as_single_texts(model: Any, tokenizer: Any) -> None:
    texts = ["a", "bc" * 9, "d" * 3, "e", "f" * 20, "g" * 7, "h", "ij", "k" * 11, "l<m>"]
    reward = RewardModel(model.train(), tokenizer)
    values = score(reward, batch(["p "] * len(texts), texts))
    expected = [alone(model, tokenizer, "p " + text) for text in texts]
    assert values == pytest.approx(expected, abs=1e-6)
    assert len(set(values)) > 5
    assert tokenizer.pad_token == "<eos>" and model.config.pad_token_id == 1
    assert not any(p.requires_grad for p in model.parameters())


def test_messages_go_through_the_chat_template(model: Any, tokenizer: Any) -> None:
    prompts = [[{"role": "user", "content": "hi"}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    reward = RewardModel(model, tokenizer)
    with pytest.raises(RewardError, match="its tokenizer has no chat template"):
        score(reward, batch(prompts, completions))
    tokenizer.chat_template = TEMPLATE
    try:
        values = score(reward, batch(prompts, completions))
    finally:
        tokenizer.chat_template = None
    assert values == pytest.approx(
        [alone(model, tokenizer, "[u]hi[a]yes"), alone(model, tokenizer, "[u]hi[a]no")], abs=1e-6
    )


def test_a_saved_model_loads_with_its_tokenizer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "judge"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    loaded = load_reward_model(str(path))
    assert is_reward_model(loaded) and not is_reward_model(lambda **kwargs: [])
    reward = RewardModel(loaded)
    assert reward.name == "judge"
    given = batch(["p"], ["abc"])
    assert score(reward, given) == pytest.approx(score(RewardModel(model, tokenizer), given))


def test_a_model_without_a_reward_head_is_refused(tmp_path: Path) -> None:
    transformers.Qwen2ForCausalLM(config()).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"is no reward model.*score.weight"):
        load_reward_model(str(tmp_path))


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"cannot load the reward model '.*nothing'"):
        load_reward_model(str(tmp_path / "nothing"))


def test_a_missing_tokenizer_is_named(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(RewardError, match="no tokenizer for the reward model 'bare'"):
        RewardModel(load_reward_model(str(tmp_path / "bare")))


def test_a_tokenizer_that_cannot_pad_is_refused(model: Any, tokenizer: Any) -> None:
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(RewardError, match="neither a pad nor an EOS token"):
        RewardModel(model, bare)


def test_two_outputs_are_refused(tokenizer: Any) -> None:
    classifier = transformers.Qwen2ForSequenceClassification(config(num_labels=2))
    with pytest.raises(RewardError, match="has 2 outputs, expected 1"):
        RewardModel(classifier, tokenizer)


def test_texts_that_do_not_fit_are_refused_and_broken_scores_are_failures(
    model: Any, tokenizer: Any
) -> None:
    reward = RewardModel(model, tokenizer)
    with pytest.raises(RewardError, match=r"completion 1 \(data row 11\).*65 tokens.*1 to 64"):
        score(reward, batch(["p", "p"], ["a", "a" * 64]))
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    reward.start(batch(["p"], ["a"]))
    assert "gave nan" in reward.finish().failures[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_bytes_are_known_before_it_is_loaded(
    dtype: torch.dtype, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model.to(dtype).save_pretrained(tmp_path / "judge")
    loaded = load_reward_model(str(tmp_path / "judge"))
    expected = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    planned = weights_bytes(str(tmp_path / "judge"))
    assert planned == RewardModel(loaded, tokenizer).bytes
    assert expected <= planned <= expected + 64  # and a table of the positions' frequencies
    with pytest.raises(RewardError, match="cannot plan the reward model"):
        weights_bytes(str(tmp_path / "nothing"))
