"""A model folder of any content is loaded, or refused in a line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.errors import FusedGRPOError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder / "model", tiny.model("Llama"), template=True)
    adapted = tiny.add_lora(tiny.model("Llama"))
    adapted.save_pretrained(folder / "adapter")
    return folder


def train(folder: Path, **options: Any) -> None:
    """One step with what is in ``folder``, or an error of ours in one short line."""
    config = {
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "num_generations": 2,
        "prompts_per_step": 1,
        "max_completion_length": 2,
        "max_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "lora_r": 2,
        **options,
    }
    prompts = [{"prompt": [{"role": "user", "content": "w4"}]}]
    try:
        GRPOTrainer(
            args=GRPOConfig(**config),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=prompts,
        ).train()
    except FusedGRPOError as error:
        assert len(str(error)) < 5000 and "\n\n" not in str(error)


def edit(name: str, **changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**values, **changes}))

    return change


def write(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, end: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def pickled(folder: Path, value: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no config": lambda folder: (folder / "config.json").unlink(),
    **{
        f"{name} is {what}": write(name, data)
        for name in (
            *("config.json", "generation_config.json", "tokenizer.json"),
            *("tokenizer_config.json", "model.safetensors"),
        )
        for what, data in {
            "empty": b"",
            "no JSON": b"{",
            "a list": b"[1]",
            "a number": b"5",
            "deep": b"[" * 5000,
            "binary": b"\xff\xfe\x00",
            "an object": b"{}",
        }.items()
    },
    **{
        f"{key} is {value!r}": edit("config.json", **{key: value})
        for key, values in {
            "model_type": [5, None, "nothing", "bert", "t5", []],
            "vocab_size": ["x", -1, 0, None, 2**70, 1.5],
            "hidden_size": ["x", -8, 0, 10**9, 24],
            "num_hidden_layers": ["x", -1, 0, 3],
            "num_attention_heads": ["x", 0, 3],
            "max_position_embeddings": ["x", -1, 0],
            "rope_parameters": ["x", {"rope_type": "nothing"}, {"rope_theta": "x"}, 5],
            "architectures": [5, ["Nothing"], None],
            "dtype": ["nothing", 5],
            "quantization_config": ["x", {"quant_method": "nothing"}, 5],
            "hidden_act": ["nothing", 5],
            "tie_word_embeddings": ["x"],
            "auto_map": [{"AutoModelForCausalLM": "code.Model"}, 5],
        }.items()
        for value in values
    },
    **{
        f"{name} {key} is {value!r}": edit(name, **{key: value})
        for name, key, value in [
            ("generation_config.json", "eos_token_id", "abc"),
            ("generation_config.json", "eos_token_id", [[1]]),
            ("generation_config.json", "eos_token_id", {"a": 1}),
            ("generation_config.json", "eos_token_id", -5),
            ("generation_config.json", "eos_token_id", 1.5),
            ("generation_config.json", "eos_token_id", 10**6),
            ("generation_config.json", "temperature", "hot"),
            ("tokenizer_config.json", "chat_template", 5),
            ("tokenizer_config.json", "chat_template", ["x"]),
            ("tokenizer_config.json", "eos_token", 5),
            ("tokenizer_config.json", "eos_token", {"a": 1}),
            ("tokenizer_config.json", "pad_token", [1]),
            ("tokenizer_config.json", "tokenizer_class", "Nothing"),
            ("tokenizer_config.json", "tokenizer_class", 5),
            ("tokenizer_config.json", "model_max_length", "x"),
            ("tokenizer.json", "model", 5),
            ("tokenizer.json", "added_tokens", [5]),
        ]
    },
    **{
        f"a template: {text}": write("chat_template.jinja", text.encode())
        for text in (
            "{{ messages + 1 }}",
            "{{ nothing.at.all }}",
            "{% if",
            "{{ 1 // 0 }}",
            "{{ messages[99].role }}",
            "{{ raise_exception('no') }}",
            "",
            "\x1b[31m",
        )
    },
    "half the weights": cut("model.safetensors", 2000),
    "some of the header": cut("model.safetensors", 20),
    "a header without an end": write("model.safetensors", struct.pack("<Q", 2**60)),
    "a header that lies": write(
        "model.safetensors",
        header(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 999]}}'),
    ),
    "other weights": write(
        "model.safetensors",
        header(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
    ),
    "a pickle that runs": lambda folder: pickled(folder, {"x": Runs()}),
    "a pickle of a list": lambda folder: pickled(folder, [1]),
    "a pickle of no tensors": lambda folder: pickled(folder, {"lm_head.weight": "x"}),
    "a plain pickle": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1})),
    ),
    "no pickle": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "pytorch_model.bin").write_bytes(b"not a pickle"),
    ),
    "an index of nothing": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "y"}}'),
    ),
    "an index of numbers": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}'),
    ),
    "a folder for a file": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors").mkdir(),
    ),
}
QUICK = ("a list", "no JSON", "deep", "half the", "lies", "pickle", "a template", "index", "-5")


def _kinds() -> list[Any]:
    return [
        pytest.param(kind, marks=() if any(part in kind for part in QUICK) else pytest.mark.slow)
        for kind in DAMAGES
    ]


@pytest.mark.parametrize("kind", _kinds())
def test_no_model_folder_is_a_traceback(
    models: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "model", tmp_path / "model")
    DAMAGES[kind](tmp_path / "model")
    train(tmp_path)
    assert not Path("ran").exists()


ADAPTERS: dict[str, Callable[[Path], Any]] = {
    **{
        f"{name} is {what}": write(name, data)
        for name in ("adapter_config.json", "adapter_model.safetensors")
        for what, data in {"empty": b"", "a list": b"[1]", "binary": b"\xff", "{}": b"{}"}.items()
    },
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "half the weights": cut("adapter_model.safetensors", 500),
    **{
        f"{key} is {value!r}": edit("adapter_config.json", **{key: value})
        for key, value in [
            ("peft_type", "NOTHING"),
            ("peft_type", 5),
            ("r", "x"),
            ("r", 0),
            ("r", 5),
            ("target_modules", 5),
            ("target_modules", ["nothing"]),
            ("base_model_name_or_path", 5),
            ("lora_alpha", "x"),
            ("rank_pattern", 5),
        ]
    },
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_no_adapter_folder_is_a_traceback(models: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(models / "model", tmp_path / "model")
    shutil.copytree(models / "adapter", tmp_path / "adapter")
    ADAPTERS[kind](tmp_path / "adapter")
    train(tmp_path, adapter_name_or_path=str(tmp_path / "adapter"), lora_r=16)


@pytest.mark.parametrize(
    "data", [b"", b"GGUF", b"GGUF" + bytes(100), b"no model", b"GGUF\x03" * 99]
)
def test_no_gguf_file_is_a_traceback(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    train(tmp_path, model_name_or_path=str(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    "name",
    [
        *("x" * 1000, "~nobody_there/x", "/dev/zero.gguf"),
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("a/b/c", "/dev/zero", "é\u2028", "a b")
        ),
    ],
)
def test_no_name_of_a_model_is_a_traceback(tmp_path: Path, name: str) -> None:
    train(tmp_path, model_name_or_path=name)
    tiny.save(tmp_path / "model", tiny.model("Llama"), template=True)
    for option in ("tokenizer_name_or_path", "adapter_name_or_path", "gguf_file", "model_revision"):
        train(tmp_path, **{option: name})


def test_an_adapter_that_no_memory_holds_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "model", tmp_path / "model")
    train(tmp_path, lora_r=2**50)
    train(tmp_path, lora_alpha=2**62)
    train(tmp_path, lora_target_modules=["nothing"])
