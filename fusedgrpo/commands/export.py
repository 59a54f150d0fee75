"""``fusedgrpo export``: the weights of a run, as other programs take them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fusedgrpo import host
from fusedgrpo.commands.runs import Trained, find_trained
from fusedgrpo.errors import ConfigError

CONVERTER = "convert_hf_to_gguf.py"
MADE_OF = "merged_from.json"
# The ranks that vLLM takes for --max-lora-rank.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def export(
    run: Annotated[Path, typer.Argument(help="output_dir of a run, its adapter, or a checkpoint.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter: a model of 16-bit safetensors.")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="A GGUF file, by the converter of llama.cpp.")
    ] = False,
    ollama: Annotated[bool, typer.Option("--ollama", help="A Modelfile for Ollama.")] = False,
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Say how vLLM serves it, as an adapter if it can.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the merged model; else merged/ beside it.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is not where the adapter says.")
    ] = None,
) -> None:
    """Make of a run what other programs take. Several at once will do.

    A run that has trained all weights is a model already: nothing is merged, and nothing copied.
    """
    from fusedgrpo.engine.reporting.plain_log import make_plain

    make_plain("transformers", "peft", "huggingface_hub")
    if not (merge or gguf or ollama or vllm):
        raise ConfigError("Nothing to make: give --merge, --gguf, --ollama or --vllm.")
    trained = find_trained(run)
    typer.echo(f"Taking {trained.said}.")
    served_as_adapter = vllm and not trained.full and _plain_lora(trained)
    if trained.full:
        model = trained.weights
        typer.echo(f"A model already: {model}")
    elif merge or gguf or ollama or not served_as_adapter:
        model = merged(trained, output, base)
    else:
        model = output or trained.weights.parent / "merged"
    made = True
    if gguf:
        made = _gguf(model, trained.name)
    if ollama:
        _ollama(model, trained)
    if vllm:
        _vllm(model, trained, served_as_adapter)
    if not made:
        raise typer.Exit(1)


def merged(trained: Trained, output: Path | None, base: str | None) -> Path:
    """The folder of the merged model, made now unless it is of these very weights. Raises
    ConfigError, ModelError."""
    from fusedgrpo.models.adapters.files import find_adapter
    from fusedgrpo.models.adapters.merge import several, write_merged
    from fusedgrpo.models.loading import load_model
    from fusedgrpo.models.tokenizer import load_tokenizer

    folder = output or trained.weights.parent / "merged"
    made_of = {"adapter": str(trained.weights), "sha256": _hash(trained.weights), "base": base}
    if folder.exists() and any(folder.iterdir()):
        note = folder / MADE_OF
        if note.exists() and json.loads(note.read_text(encoding="utf-8")) == made_of:
            typer.echo(f"Merged already: {folder}")
            return folder
        raise ConfigError(f"{folder} is not empty, and is left as it is; give another --output.")
    if others := several(trained.weights):
        raise ConfigError(
            f"{trained.weights} has other adapters beside it ({', '.join(others)}), which would be "
            "lost; merge them with peft."
        )
    config = _merging(trained, base)
    adapter = find_adapter(config)
    assert adapter is not None  # find_trained has seen its settings
    typer.echo(f"Merging into {config.model_name_or_path}, in {config.dtype}, on the CPU ...")
    model = load_model(config, host.pick_device(use_cpu=True))
    with _written(folder) as path:
        error = write_merged(config, adapter, model, load_tokenizer(config), path)
        (path / MADE_OF).write_text(json.dumps(made_of, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"Merged: {folder} (logits within {error:.1%} of base and adapter)")
    return folder


def _merging(trained: Trained, base: str | None) -> Any:
    """The options under which base and adapter are loaded: in 16 bits, on the CPU."""
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.models.adapters.files import base_of
    from fusedgrpo.models.settings import model_settings

    alone = GRPOConfig(model_name_or_path=str(trained.weights), use_cpu=True)
    found, revision = base_of(alone)
    options: dict[str, Any] = {
        "model_name_or_path": base or found,
        "model_revision": None if base else revision,
        "adapter_name_or_path": str(trained.weights),
        "use_cpu": True,
    }
    if trained.options_file is not None:
        own = trained.options()
        same = ("trust_remote_code", *(() if base else ("gguf_file", "model_revision")))
        options |= {name: getattr(own, name) for name in same}
    config = GRPOConfig(**options)
    stored = getattr(model_settings(config), "dtype", None)
    config.dtype = "float16" if str(stored).removeprefix("torch.") == "float16" else "bfloat16"
    return config


def _gguf(model: Path, name: str) -> bool:
    file = model / f"{name}.gguf"
    found = _converter()
    words = [str(model), "--outfile", str(file), "--outtype", "auto"]
    if found is None:
        typer.echo(
            "No GGUF: llama.cpp is neither in LLAMA_CPP nor on the PATH. These two lines do:"
        )
        typer.echo("  git clone --depth 1 https://github.com/ggml-org/llama.cpp")
        typer.echo(f"  {sys.executable} llama.cpp/{CONVERTER} {' '.join(words)}")
        return False
    if not file.exists():
        done = subprocess.run([sys.executable, str(found), *words], check=False)
        if done.returncode:
            file.unlink(missing_ok=True)
            typer.echo(f"No GGUF: {found} ended with {done.returncode}; what it says is above.")
            return False
    typer.echo(f"GGUF: {file}. Smaller, with llama.cpp built: llama-quantize {file} Q4_K_M")
    return True


def _converter() -> Path | None:
    """llama.cpp's converter, in the folder LLAMA_CPP or on the PATH."""
    home = os.environ.get("LLAMA_CPP")
    if home:
        path = Path(home).expanduser() / CONVERTER
        if not path.exists():
            raise ConfigError(f"LLAMA_CPP: {home} has no {CONVERTER}; name llama.cpp's folder.")
        return path
    found = shutil.which(CONVERTER)
    return Path(found) if found else None


def _ollama(model: Path, trained: Trained) -> None:
    source = model / f"{trained.name}.gguf"
    lines = [f"FROM ./{source.name}" if source.exists() else "FROM ."]
    if trained.options_file is not None:
        own = trained.options()
        lines.append(f"PARAMETER temperature {own.temperature:g}")
        if own.system_prompt and '"""' not in own.system_prompt:
            lines.append(f'SYSTEM """{own.system_prompt}"""')
    path = model / "Modelfile"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    typer.echo(f"Ollama: {path}. Then")
    typer.echo(f"  ollama create {trained.name} -f {path}\n  ollama run {trained.name}")
    if not source.exists():
        typer.echo(
            "  Ollama reads safetensors of some architectures only; for others add --gguf here."
        )


def _vllm(model: Path, trained: Trained, as_adapter: bool) -> None:
    if not as_adapter:
        typer.echo(f"vLLM:\n  vllm serve {model} --served-model-name {trained.name}")
        return
    settings = _settings(trained)
    rank = next(rank for rank in _RANKS if rank >= _rank(settings))
    typer.echo(
        f"vLLM, the adapter as it is:\n  vllm serve {settings['base_model_name_or_path']} "
        f"--enable-lora --max-lora-rank {rank} --lora-modules {trained.name}={trained.weights}"
    )
    if model.exists():
        typer.echo(f"or merged:\n  vllm serve {model} --served-model-name {trained.name}")


def _plain_lora(trained: Trained) -> bool:
    """Whether vLLM serves the adapter beside its base: LoRA without anything more, on a model that
    is as it was and no GGUF file."""
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.models.adapters.files import find_adapter

    adapter = find_adapter(GRPOConfig(model_name_or_path=str(trained.weights), use_cpu=True))
    settings = _settings(trained)
    more = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")
    plain = adapter is not None and adapter.leaves_base_as_it_is
    plain = plain and not any(settings.get(name) for name in more)
    base = Path(settings.get("base_model_name_or_path") or "")
    converted = base.is_dir() and not (base / "config.json").exists()
    return plain and not converted and _rank(settings) <= _RANKS[-1]


def _rank(settings: dict[str, Any]) -> int:
    return max(settings["r"], *(settings.get("rank_pattern") or {}).values(), 1)


def _settings(trained: Trained) -> dict[str, Any]:
    text = (trained.weights / "adapter_config.json").read_text(encoding="utf-8")
    settings: dict[str, Any] = json.loads(text)
    return settings


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("adapter_*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` when all of it is there."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            folder.rmdir()  # it is empty
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
