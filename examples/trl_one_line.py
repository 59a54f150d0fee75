"""A TRL script with one line changed: the import of its trainer.

A small random Llama is rewarded for even tokens. Runs on a CPU in seconds; give a model's name to
train that one instead:

    python examples/trl_one_line.py
    python examples/trl_one_line.py Qwen/Qwen2.5-0.5B-Instruct
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from fusedgrpo.integrations.trl import FusedGRPOTrainer as GRPOTrainer  # was: from trl import


def even_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def main(name: str | None = None) -> list[float]:
    """The mean reward of each step."""
    if name is None:
        torch.set_num_threads(1)  # a model this small only loses by a second one
    torch.manual_seed(0)
    model, tokenizer = (
        small_model() if name is None else (name, AutoTokenizer.from_pretrained(name))
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=even_tokens,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=12,
                max_steps=40,
                learning_rate=5e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a b c", "d e", "f g h i", "j"] * 8}),
            processing_class=tokenizer,
        )
        trainer.train()
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


def small_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Random weights, and a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<eos>", "<pad>", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config), tokenizer


if __name__ == "__main__":
    rewards = main(*sys.argv[1:])
    print(f"reward: first step {rewards[0]:.2f}, last step {rewards[-1]:.2f}")
