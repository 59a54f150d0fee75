"""What is no causal LM is refused by name, with something to do about it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import nn

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ModelError
from fusedgrpo.models.kinds import accepted, check_causal
from fusedgrpo.models.loading import load_model
from fusedgrpo.models.settings import model_settings

BERT: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=tiny.VOCAB,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=2,
        )
    )


def bart() -> Any:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=tiny.VOCAB,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            bos_token_id=3,
            pad_token_id=2,
            eos_token_id=1,
            forced_eos_token_id=1,
        )
    )


def pipeline() -> Any:
    return transformers.pipeline(
        "text-generation", model=tiny.model(), tokenizer=tiny.tokenizer(), device="cpu"
    )


class Wrapped(nn.Module):
    """As DistributedDataParallel and its kind hold a model."""

    def __init__(self) -> None:
        super().__init__()
        self.module = tiny.model()


def over_compiled() -> Any:
    wrapped = tiny.add_lora(tiny.model())
    wrapped.base_model.model = torch.compile(wrapped.base_model.model)
    return wrapped


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (t5, "T5ForConditionalGeneration is an encoder-decoder"),
        (bart, "BartForConditionalGeneration is an encoder-decoder"),
        (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)), "cannot generate"),
        (lambda: transformers.BertModel(transformers.BertConfig(**BERT)), "no LM head"),
        (lambda: tiny.model().model, "Qwen2Model has no LM head"),
        (
            lambda: transformers.LlamaForSequenceClassification(tiny.model("Llama").config),
            "LlamaForSequenceClassification has no LM head",
        ),
        (lambda: transformers.LlamaForCausalLM, "LlamaForCausalLM is a class"),
        (pipeline, r"pipeline\.model"),
        (lambda: nn.Linear(2, 2), r"got a Linear\. Expected"),
        (lambda: {"model": 1}, r"got a dict\. Expected"),
        (lambda: tiny.model().config, "got a Qwen2Config"),
        (Wrapped, r"model\.module"),
        (over_compiled, "wrapped by torch.compile"),
    ],
)
def test_other_objects_are_refused_by_name(build: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        accepted(build())


def test_causal_models_are_taken_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    for model in (tiny.model(), tiny.add_lora(tiny.model())):
        assert accepted(model) is model
        check_causal(model.get_base_model() if hasattr(model, "get_base_model") else model)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        assert accepted(torch.compile(model)) is model
    assert "torch.compile is taken off" in caplog.text


def test_a_model_that_looks_ahead_is_no_causal_lm() -> None:
    seeing = transformers.BertLMHeadModel(transformers.BertConfig(**BERT)).eval()
    with pytest.raises(ModelError, match="BertLMHeadModel is no causal LM: its tokens see those"):
        check_causal(seeing)
    causal = transformers.BertLMHeadModel(transformers.BertConfig(**BERT, is_decoder=True)).eval()
    check_causal(causal)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (t5, r"\(T5\) is an encoder-decoder"),
        (bart, r"\(Bart\) is an encoder-decoder"),
        (
            lambda: transformers.ViTModel(
                transformers.ViTConfig(
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=16,
                    image_size=16,
                    patch_size=8,
                )
            ),
            r"\(ViT\) is no causal language model",
        ),
    ],
)
def test_they_are_refused_by_path_in_a_line(tmp_path: Path, build: Any, said: str) -> None:
    build().save_pretrained(tmp_path)
    config = GRPOConfig(model_name_or_path=str(tmp_path), use_cpu=True)
    for load in (model_settings, lambda c: load_model(c, torch.device("cpu"))):
        with pytest.raises(ModelError, match=said) as caught:
            load(config)
        assert len(str(caught.value)) < 400


def test_a_multimodal_model_is_loaded_for_its_text(tmp_path: Path) -> None:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 8,
    }
    text = tiny.model("Llama").config.to_dict()
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
    }
    built = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={k: v for k, v in text.items() if k not in ("model_type", "architectures")},
            vision_config=vision | {"out_hidden_size": 16, "fullatt_block_indexes": [0]},
            image_token_id=36,
            video_token_id=37,
            vision_start_token_id=38,
            vision_end_token_id=39,
        )
    )
    built.save_pretrained(tmp_path)
    config = GRPOConfig(model_name_or_path=str(tmp_path), use_cpu=True)
    assert type(load_model(config, torch.device("cpu"))) is type(built)
