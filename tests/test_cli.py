"""The command line: what it takes, what it says, and a run from its first file to its last use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

from fusedgrpo import __version__
from fusedgrpo.cli import app
from fusedgrpo.commands.export import _plain_lora
from fusedgrpo.commands.given import read_words
from fusedgrpo.commands.runs import find_trained
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError, FusedGRPOError


def call(*words: Any) -> str:
    """The output of a command that succeeds."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_options_are_read_in_both_spellings() -> None:
    words = ["--beta=0.1", "--learning-rate", "-1", "--bf16", "--run_name=a-b=c", "--use_cpu"]
    assert read_words(words) == (
        None,
        {
            "beta": "0.1",
            "learning_rate": "-1",
            "bf16": None,
            "run_name": "a-b=c",
            "use_cpu": None,
        },
    )


@pytest.mark.parametrize(
    ("words", "config"),
    [(["c.yaml", "--beta", "1"], None), (["--beta", "1", "c.yaml"], None),
     (["--beta", "1"], Path("c.yaml"))],
)  # fmt: skip
def test_the_file_may_stand_anywhere(words: list[str], config: Path | None) -> None:
    assert read_words(words, config) == (Path("c.yaml"), {"beta": "1"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--beta=0.1", "--beta", "0.2"], "--beta is given twice"),
        (["--save-steps=1", "--save_steps=1"], "--save_steps is given twice"),
        (["c.yaml", "0.1"], "'0.1' on the command line belongs to no option"),
        (["c.yaml", "--bf16=true", "\x1b[31m"], r"'\\x1b\[31m' on the command line belongs"),
    ],
)
def test_words_that_mean_nothing_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_words(words)
    with pytest.raises(ConfigError, match=r"'d.yaml' on the command line belongs to no option"):
        read_words(["d.yaml"], Path("c.yaml"))


def test_only_a_truth_value_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("beta: 0\n")

    def read(*words: str) -> GRPOConfig:
        return read_words([str(tmp_path / "c.yaml"), *words]).options()

    config = read("--bf16", "--disable_shuffling", "--use_peft", "--resume_from_checkpoint")
    assert config.bf16 and not config.shuffle_dataset and config.resume_from_checkpoint is True
    for words in (["--output_dir", "--beta=1"], ["--learning_rate"], ["--dataset"]):
        with pytest.raises(ConfigError, match="has no value on the command line"):
            read(*words)
    with pytest.raises(ConfigError, match="output_dir: expected text"):
        read("--output_dir=")


def test_help_and_completion_have_every_option() -> None:
    assert call("--version") == f"fusedgrpo {__version__}\n"
    assert "train" in call("-h")
    page = call("train", "--help")
    assert "Options of a run: loss" in page
    assert all(f"--{name} " in page for name in GRPOConfig().to_dict())
    asked = {"_FUSEDGRPO_COMPLETE": "complete_bash", "COMP_CWORD": "2",
             "COMP_WORDS": "fusedgrpo train --lora_"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "fusedgrpo"], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.stdout.split() == [f"--lora_{x}" for x in ("r", "alpha", "dropout",
                                                           "target_modules")]  # fmt: skip


def test_an_option_is_found_by_any_of_its_names() -> None:
    assert call("options", "lora-rank") == (
        "lora_r\n  Rank of the adapter.\n  group: adapter\n  takes: an integer >= 1\n"
        "  default: 16\n  also read as: lora_rank\n"
    )
    assert "  epsilon: Lower clip bound of the ratio. (a number >= 0; default 0.2)\n" in call(
        "options"
    )
    for words, said in (
        (["use_vllm"], "not supported"),
        (["epsilonn"], "Did you mean 'epsilon'"),
        (["beta", "--markdown"], "three questions"),
    ):
        with pytest.raises(ConfigError, match=said):
            call("options", *words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, its data, and a run of two steps that the command line has made
    without a file of options."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save(folder / "model", tiny.model("Llama"), template=True)
    rows = [{"prompt": f"w{5 + i} w{9 + i}", "answer": f"w{5 + i}"} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "reward.py").write_text(
        "def short(completions, **kwargs):\n    return [-float(len(c)) for c in completions]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fusedgrpo.engine.reporting.plots.render", lambda name, rows: None)
        call("train", *OPTIONS, "--output_dir", "run", "--max_steps", 2)
        yield folder


OPTIONS = [
    "--model_name_or_path", "model", "--dataset", "data.jsonl", "--reward_funcs",
    "reward.py:short", "--num_generations", "2", "--prompts_per_step", "2",
    "--max_completion_length", "4", "--learning_rate", "0.1", "--use_cpu",
    "--gradient_checkpointing", "false", "--save_strategy", "no",
]  # fmt: skip


@pytest.mark.parametrize(
    "given,expected",
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"},) * 2,
        ({"PYTORCH_ALLOC_CONF": ""},) * 2,
    ],
    ids=["nothing", "older", "newer"],
)
def test_memory_of_the_gpu_grows_unless_the_user_has_set_how(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    said = (
        "import json, os; from fusedgrpo import cli; "
        "cli.app = lambda **_: print(json.dumps({n: v for n, v in os.environ.items() "
        "if 'ALLOC_CONF' in n})); cli.main()"
    )
    without = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    run = subprocess.run(
        [sys.executable, "-c", said], env=without | given, capture_output=True, text=True
    )
    assert json.loads(run.stdout) == expected, run.stderr


def test_a_dry_run_says_what_would_run_and_trains_nothing(place: Path) -> None:
    said = call("train", *OPTIONS, "--max_steps", 3, "--output_dir=dry", "--dry_run")
    assert "2 prompts x 2 completions per step; 3 steps" in said
    assert "data.jsonl: 4 prompts of 2 to 2 tokens" in said
    assert "short x 1" in said and "with step 1" in said and "nothing was trained" in said
    assert [path.name for path in (place / "dry").iterdir()] == []


def test_init_writes_a_file_that_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedgrpo.commands.init import draft_for

    monkeypatch.setattr("fusedgrpo.host.has_gpu", lambda: False)
    said = call("init", "first.yaml", "--model", "model", "--dataset", "data.jsonl")
    text = (place / "first.yaml").read_text()
    assert "4 rows, columns prompt, answer" in said and "There is no GPU here" in text
    assert "lora_r: 16  # Rank of the adapter.\n" in text
    config = read_words(["first.yaml"]).options()
    assert config.reward_funcs == ["accuracy"] and config.text_as_user_turn
    with pytest.raises(ConfigError, match=r"first.yaml is there already"):
        call("init", "first.yaml", "--model", "model", "--dataset", "data.jsonl")
    assert (place / "first.yaml").read_text() == text
    with pytest.raises(ConfigError, match="--dataset missing"):
        call("init", "--model", "model")
    # Neither the model nor the data can be read: what is assumed is said.
    guessed = draft_for("./none/Other-70B", "./none.jsonl", "24GB")
    assert guessed.options["load_in_4bit"] is True
    assert ["not read" in note or "70 billion" in note for note in guessed.notes] == [True, True]
    (place / "bare.jsonl").write_text('{"prompt": "w5"}\n')
    own = draft_for("./none/small-1b", "bare.jsonl", "24GB")
    assert own.options["reward_funcs"] == ["rewards.py:reward"]
    assert "load_in_4bit" not in own.options


@pytest.mark.slow  # a plan runs the model on tensors without storage, many times
def test_init_plans_for_the_card(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedgrpo.commands.init import _SMALLER, draft_for

    draft = draft_for("model", "data.jsonl", "24GB")
    assert draft.notes[1].startswith("Planned for 24GB, with prompts of ")
    assert draft.options["max_completion_length"] == 64  # half of the context
    assert not draft.options.get("load_in_4bit")
    monkeypatch.setattr("fusedgrpo.commands.init._SMALLER", _SMALLER[-1:])
    none = draft_for("model", "data.jsonl", "0.5GB")  # less than the context of CUDA
    assert "It does not fit 0.5GB" in none.notes[1] and none.options["load_in_4bit"] is True


def logits_of(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 20)[None]).logits.float()


def test_export_merges_as_peft_computes(place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = call("export", "run", "--merge", "--output", "merged")
    assert "Merging into" in said and "in bfloat16" in said
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    assert {str(p.dtype) for p in merged.parameters()} == {"torch.bfloat16"}
    base = AutoModelForCausalLM.from_pretrained("model", dtype="float32")
    plain = logits_of(base)
    wanted = logits_of(PeftModel.from_pretrained(base, "run/adapter"))
    far, near = (wanted - plain).norm(), (wanted - logits_of(merged)).norm()
    assert near < 0.03 * wanted.norm() < 0.3 * far, (near, far)
    assert AutoTokenizer.from_pretrained("merged").chat_template
    assert "Merged already" in call("export", "run/adapter", "--merge", "--output", "merged")
    with pytest.raises(ConfigError, match="not empty, and is left as it is"):
        call("export", "run", "--merge", "--output", "model")


def test_export_says_how_others_take_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(place))
    said = call("export", "run", "--vllm")
    assert f"--max-lora-rank 16 --lora-modules run={place / 'run/adapter'}" in said
    assert not (place / "run" / "merged").exists()
    done = CliRunner().invoke(app, ["export", "run", "--gguf", "--ollama", "--output", "merged"])
    assert done.exit_code == 1 and "git clone --depth 1" in done.output
    assert (place / "merged" / "Modelfile").read_text() == "FROM .\nPARAMETER temperature 1\n"
    (place / "convert_hf_to_gguf.py").write_text(
        "import pathlib, sys\nassert sys.argv[2::2] == ['--outfile', '--outtype'], sys.argv\n"
        "pathlib.Path(sys.argv[3]).write_text(sys.argv[1])\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(place))
    said = call("export", "run", "--gguf", "--ollama", "--output", "merged")
    assert (place / "merged" / "run.gguf").read_text() == "merged"
    assert (place / "merged" / "Modelfile").read_text().startswith("FROM ./run.gguf\n")
    with pytest.raises(ConfigError, match="Nothing to make"):
        call("export", "run")
    with pytest.raises(ConfigError, match="has no weights"):
        call("export", ".", "--merge")


@pytest.mark.parametrize(
    "change", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"use_dora": True}, {"r": 1024}]
)
def test_vllm_is_not_given_an_adapter_that_it_refuses(
    place: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(place / "run" / "adapter", tmp_path / "adapter")
    assert _plain_lora(find_trained(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert not _plain_lora(find_trained(tmp_path / "adapter"))


def test_eval_compares_base_and_trained_on_the_same_prompts(place: Path) -> None:
    said = call("eval", "run", "--dataset", "data.jsonl", "--n", 3, "--max_samples=3")
    folder = place / "run" / "evaluations" / "001"
    found = json.loads((folder / "results.json").read_text())
    lines = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("base", "trained")
    }
    assert [len(rows) for rows in lines.values()] == [3 + 9, 3 + 9]
    assert f"Trained: {place / 'run/adapter'}" in said and "3 prompts" in said
    for mode in ("greedy", "sampled"):
        means = {}
        for name, rows in lines.items():
            own = [row for row in rows if row["mode"] == mode]
            assert all(row["reward"] == row["rewards"]["short"] for row in own)
            means[name] = sum(row["reward"] for row in own) / len(own)
            got = found["results"][f"{mode} reward"][name]
            assert got["mean"] == pytest.approx(means[name])
            assert got["low"] <= got["mean"] <= got["high"]
        change = found["results"][f"{mode} reward"]["difference"]
        assert change["mean"] == pytest.approx(means["trained"] - means["base"])
    texts = {
        name: [row["completion"] for row in rows if row["mode"] == "greedy"]
        for name, rows in lines.items()
    }
    assert texts["base"] != texts["trained"]  # the run was at learning rate 0.1
    with pytest.raises(ConfigError, match="is not empty"):
        call("eval", "run", "--output", folder)


def test_eval_loads_once_and_says_what_two_loads_would(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedgrpo.models import loading

    loads: list[Any] = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *given: loads.append(given) or load(*given))
    words = ("eval", "run", "--bf16=false", "--n=2", "--max_samples=3", "--output")
    call(*words, "once")
    assert len(loads) == 1
    monkeypatch.setattr("fusedgrpo.commands.evaluate._is_base_with_adapter", lambda options: False)
    call(*words, "twice")
    assert len(loads) == 3
    for file in ("base.jsonl", "trained.jsonl", "results.json"):
        once, twice = ((place / folder / file).read_text() for folder in ("once", "twice"))
        assert once.replace('"once"', '"twice"') == twice, file


def test_a_run_that_trained_all_weights_is_a_model_already(place: Path) -> None:
    full = ("--finetuning_type", "full", "--output_dir", "whole", "--max_steps", 1)
    call("train", *OPTIONS, *full)
    said = call("export", "whole", "--vllm")
    model = place / "whole" / "model"
    assert f"A model already: {model}" in said and f"vllm serve {model} " in said
    said = call("eval", "whole", "--n=1", "--output", "compared")
    assert f"Base: model. Trained: {model}. Data: data.jsonl" in said
    change = json.loads((place / "compared/results.json").read_text())["results"]
    assert change["greedy length"]["base"]["prompts"] == 4
    assert find_trained(model).options_file == place / "whole" / "config.resolved.yaml"
    alone = find_trained(place / "model")  # a model by itself
    assert alone.full and alone.options_file is None


def test_intervals_are_over_prompts() -> None:
    import torch

    from fusedgrpo.engine.comparison import estimate, prompt_means

    values = torch.tensor([1.0, 0.0, torch.nan, 0.5, torch.nan, torch.nan])
    means = prompt_means(values, [0, 0, 0, 1, 2, 2])
    assert means[:2].tolist() == [0.5, 0.5] and means[2].isnan()
    assert estimate(means, 0) == (found := estimate(means, 1)) and found.prompts == 2
    coin = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(50)
    found = estimate(coin, 0)
    assert found.mean == 0.5
    # 1.96 standard deviations of a mean of 100 coins.
    assert found.low == pytest.approx(0.402, abs=0.02)
    assert found.high == pytest.approx(0.598, abs=0.02)
    assert estimate(torch.full((2,), torch.nan), 0).to_record()["mean"] is None


def test_push_uploads_the_adapter_with_its_card(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalTokenNotFoundError

    calls: list[Any] = []

    class FakeApi:
        def create_repo(self, repo_id: str, *, private: bool, **more: Any) -> Any:
            calls.append(("create_repo", repo_id, private))
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id: str, *, branch: str, **more: Any) -> None:
            calls.append(("create_branch", repo_id, branch))

        def upload_folder(
            self, *, repo_id: str, folder_path: str, revision: str | None, **more: Any
        ) -> str:
            calls.append(("upload_folder", repo_id, folder_path, revision))
            if revision == "locked":
                raise LocalTokenNotFoundError("no token")
            return f"https://huggingface.co/{repo_id}/tree/main/"

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    said = call("push", "run", "--repo", "me/sums", "--private")
    assert "Pushed: https://huggingface.co/me/sums" in said
    adapter = place / "run" / "adapter"
    assert calls == [
        ("create_repo", "me/sums", True),
        ("upload_folder", "me/sums", str(adapter), None),
    ]
    assert "Rewards" in (adapter / "README.md").read_text(), "the card is not peft's blank one"
    with pytest.raises(FusedGRPOError, match=r"no token.*HF_TOKEN"):
        call("push", "run", "--repo", "me/sums", "--revision", "locked")
    with pytest.raises(ConfigError, match="expected ORGANISATION/NAME"):
        call("push", "run", "--repo", "sums")
