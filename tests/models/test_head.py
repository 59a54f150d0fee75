"""The head: what it is in each family, and which heads are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from fusedgrpo.errors import ModelError
from fusedgrpo.models.head import check_head, find_head, vocabulary_size


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [
        ("Qwen2", 1.0, None),
        ("Gemma2", 1.0, 3.0),
        ("Granite", 1 / 4.0, None),
        ("Cohere", 0.25, None),
    ],
)
def test_scale_and_softcap_are_read_from_the_configuration(
    family: str, scale: float, softcap: float | None
) -> None:
    head = find_head(tiny.model(family))
    assert (head.logit_scale, head.softcap) == (scale, softcap)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_known_family_passes_the_check(family: str) -> None:
    check_head(tiny.model(family))


def scale_logits(model: Any, factor: float) -> None:
    """What a family that we do not know could do after its head."""
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * factor
        return output

    model.forward = scaled


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "Cohere"])
def test_an_unknown_scaling_of_the_logits_is_refused(family: str) -> None:
    model = tiny.model(family)
    scale_logits(model, 1.1)
    with pytest.raises(ModelError, match=rf"{family}ForCausalLM does something between"):
        check_head(model)


def test_a_zero_embedding_of_the_first_token_does_not_blind_the_check() -> None:
    """A padding token's embedding is zero, and with it the logits, whatever scales them."""
    model = tiny.model("Llama", pad_token_id=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    scale_logits(model, 3.0)
    with pytest.raises(ModelError, match="does something between"):
        check_head(model)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError):
        check_head(model)


def test_a_head_with_an_adapter_is_refused() -> None:
    model = tiny.add_lora(tiny.model("Llama"), target_modules=["lm_head"])
    with pytest.raises(ModelError, match="carries a low-rank adapter"):
        find_head(model.get_base_model())


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (None, "no output embeddings"),
        (nn.Conv1d(4, 8, 1), "Conv1d"),
        (SimpleNamespace(weight=torch.zeros(8, 4, dtype=torch.uint8)), "torch.uint8"),
    ],
)
def test_a_head_that_is_no_dense_linear_layer_is_refused(layer: object, says: str) -> None:
    model = SimpleNamespace(
        get_output_embeddings=lambda: layer,
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()),
    )
    with pytest.raises(ModelError, match=says):
        find_head(model)


def test_the_head_is_looked_up_anew() -> None:
    model = tiny.model("Llama")
    before = find_head(model).weight
    model.lm_head = nn.Linear(16, tiny.VOCAB, bias=True)
    after = find_head(model)
    assert after.weight is model.lm_head.weight is not before
    assert after.bias is model.lm_head.bias


def test_the_vocabulary_is_what_can_be_read_and_scored() -> None:
    model = tiny.model("Llama")
    assert vocabulary_size(model) == tiny.VOCAB
    model.lm_head = nn.Linear(16, tiny.VOCAB - 3, bias=False)
    assert vocabulary_size(model) == tiny.VOCAB - 3
