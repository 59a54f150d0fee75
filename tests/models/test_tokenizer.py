"""A Processor in the place of a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from transformers import AutoTokenizer, ProcessorMixin

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.trainer import GRPOTrainer
from fusedgrpo.models.tokenizer import chat_template_of, text_tokenizer

TEMPLATE = "{% for m in messages %}<bos> {{ m.content }} {% endfor %}<bos>"


class Lens(ProcessorMixin):
    attributes = ["tokenizer"]  # noqa: RUF012 - as transformers has it
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any, chat_template: str | None = None):
        super().__init__(tokenizer, chat_template=chat_template)


def test_a_tokenizer_is_its_own() -> None:
    tokenizer = tiny.tokenizer(template=True)
    assert text_tokenizer(tokenizer) is tokenizer
    assert chat_template_of(tokenizer) == tokenizer.chat_template
    assert chat_template_of(Lens(tokenizer)) == tokenizer.chat_template
    assert chat_template_of(Lens(tokenizer, TEMPLATE)) == TEMPLATE
    assert chat_template_of(tiny.tokenizer()) is None


def test_a_run_with_a_processor_saves_it_beside_the_adapter(tmp_path: Path) -> None:
    def length(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(len(messages[0]["content"])) for messages in completions]

    config = GRPOConfig(
        output_dir=str(tmp_path), max_completion_length=3, num_generations=2, prompts_per_step=1,
        max_steps=1, lora_r=2, save_strategy="no", use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        tiny.model(),
        length,
        config,
        [{"prompt": [{"role": "user", "content": "w5"}]}],
        processing_class=Lens(tiny.tokenizer(), TEMPLATE),
    )
    assert trainer.data[0].prompt_ids == (tiny.BOS, 5, tiny.BOS)
    trainer.train()
    saved = tmp_path / "adapter"
    assert (saved / "processor_config.json").is_file()
    assert (saved / "chat_template.jinja").read_text() == TEMPLATE
    assert AutoTokenizer.from_pretrained(saved)("w5")["input_ids"] == [5]
