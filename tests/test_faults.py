"""Faults and bad inputs at the level where users meet them: refused clearly, or survived.

Details of each live in the tests that mirror the modules; here a whole trainer meets them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import tiny
import torch
from patience import HUNG

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ConfigError, DataError, ModelError, OutputDirError, RewardError

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}", "solution": f"w{6 + i}"} for i in range(4)]


def even_ids(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def config(tmp_path, **changes):
    options = {
        "output_dir": str(tmp_path / "run"),
        "num_generations": 4,
        "prompts_per_step": 1,
        "max_completion_length": 4,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "bf16": False,
    }
    return GRPOConfig(**options | changes)


def trainer(tmp_path, reward_funcs=even_ids, data=None, model=None, tokenizer=None, **changes):
    return GRPOTrainer(
        model=model if model is not None else tiny.model(),
        reward_funcs=reward_funcs,
        args=config(tmp_path, **changes),
        train_dataset=PROMPTS if data is None else data,
        tokenizer=tokenizer or tiny.tokenizer(),
    )


def rows_of(tmp_path):
    return read_metrics(tmp_path / "run" / "metrics.jsonl")


@pytest.mark.parametrize(
    "text,parts",
    [
        ("learning_rat: 1.0\n", ["learning_rat", "Did you mean 'learning_rate'"]),  # 1
        ("learning_rate: [1, 2]\n", ["learning_rate", "[1, 2]"]),  # 2
        ("num_generations: yes\n", ["num_generations", "True"]),
        ("beta: 0.1\nbeta: 0.2\n", ["beta", "twice"]),
        ("epsilon: -0.2\nbeta: -1\nlearning_rate: .nan\ntemperature: 0\n",
         ["4 problems", "epsilon", "beta", "learning_rate", "temperature"]),  # 3
        ("num_generations: 1\n", ["num_generations", "2"]),  # 4
        ("seed: !!python/object/apply:os.getpid []\n", ["python"]),  # 5
        ("use_vllm: true\n", ["use_vllm", "not supported"]),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_run_is_refused_by_name(tmp_path, text, parts):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        GRPOConfig.from_file(path)
    for part in parts:
        assert part in str(error.value)


def test_numeric_strings_are_numbers(tmp_path):  # 2
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-5\nbeta: '0.04'\n")
    assert GRPOConfig.from_file(path).learning_rate == 1e-5


@pytest.mark.parametrize(
    "data,parts",
    [
        ("nowhere.json", ["nowhere.json"]),  # 6
        ([], ["no rows"]),
        ([{"promt": "w4"}], ["promt", "prompt"]),  # 7
        (
            [{"prompt": "w4"}, {"prompt": None}, {"prompt": ""}],
            ["row 1", "row 2", "on_bad_row"],
        ),  # 8
        ([{"prompt": "w4 " * 200}], ["row 0"]),  # 9: longer than the context
    ],
)
def test_data_that_cannot_be_used_is_refused_by_row_and_column(tmp_path, data, parts):
    with pytest.raises(DataError) as error:
        trainer(tmp_path, data=data)
    for part in parts:
        assert part in str(error.value)


def test_skipped_rows_are_counted_and_listed(tmp_path, caplog):  # 8, 9
    data = [*PROMPTS, {"prompt": None}, {"prompt": "w4 " * 200}]
    run = trainer(tmp_path, data=data, on_bad_row="skip")
    run.train()
    listed = [json.loads(line) for line in (tmp_path / "run/skipped_rows.jsonl").open()]
    assert [row["row"] for row in listed] == [4, 5]
    assert "2 of 6" in caplog.text


def test_pad_equal_to_eos_changes_nothing(tmp_path):  # 10
    same = tiny.tokenizer(pad="<eos>")
    assert same.pad_token_id == same.eos_token_id
    runs = []
    for name, tokenizer in (("a", same), ("b", tiny.tokenizer())):
        data = [{"prompt": "w4"}, {"prompt": "w5 w6 w7"}]  # different lengths: padding happens
        run = trainer(
            tmp_path / name, data=data, tokenizer=tokenizer, prompts_per_step=2, max_steps=2
        )
        run.train()
        runs.append(torch.cat([p.detach().flatten() for _, p in run.policy.trainable()]))
    assert torch.equal(*runs)


def test_every_eos_id_ends_a_completion(tmp_path):  # 11
    model = tiny.model()
    model.generation_config.eos_token_id = list(range(1, 30))
    trainer(tmp_path, model=model, max_completion_length=60).train()
    row = rows_of(tmp_path)[0]
    assert row["completions/clipped_ratio"] == 0
    for line in (tmp_path / "run/completions/step-000001.jsonl").open():
        assert json.loads(line)["finish_reason"] == "stop"


def test_of_a_tokenizer_of_another_model_only_the_rows_that_fit_are_used(tmp_path, caplog):  # 12
    other = tiny.tokenizer(vocab=60)
    with pytest.raises(DataError, match=r"row 1.*45"):
        trainer(tmp_path, tokenizer=other, data=[{"prompt": "w4"}, {"prompt": "w45 w6"}])
    trainer(tmp_path, tokenizer=other)
    assert "20 tokens with ids from 40 on" in caplog.text and "belong together" in caplog.text


def test_a_tokenizer_without_pad_token_gets_one_and_it_is_said(tmp_path, caplog):  # 13
    caplog.set_level("INFO", logger="fusedgrpo")
    trainer(tmp_path, tokenizer=tiny.tokenizer(pad=None)).train()
    assert "no pad token: '<eos>' is used" in caplog.text


def test_conversations_without_a_chat_template_are_refused(tmp_path):  # 13
    data = [{"prompt": [{"role": "user", "content": "w4"}]}]
    with pytest.raises(DataError, match="chat template"):
        trainer(tmp_path, data=data)


ALARM = """
import signal
def alarmed(completions, **kwargs):
    signal.signal(signal.SIGALRM, lambda *a: None)
    signal.alarm(5); signal.alarm(0)
    return [float(len(c)) for c in completions]
"""


def test_a_reward_that_needs_the_main_thread_gets_one(tmp_path):  # 16
    (tmp_path / "rewards.py").write_text(ALARM)
    run = trainer(tmp_path, reward_funcs=f"{tmp_path}/rewards.py:alarmed")
    outcome = []

    def elsewhere():
        try:
            run.train()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            outcome.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(timeout=HUNG)
    assert not outcome and not thread.is_alive()
    assert rows_of(tmp_path)[0]["reward"] > 0


@pytest.mark.parametrize(
    "returned,parts",
    [
        (lambda n: [1.0], ["bad", "returned 1", "expected 4"]),  # 17
        (lambda n: ["1.0"] * n, ["bad", "'1.0'"]),  # 18
        (lambda n: [[1.0]] * n, ["bad", "[1.0]"]),
        (lambda n: [0.0] * (n - 1) + [float("inf")], ["bad", "inf", "row"]),  # 20
        (lambda n: [0.0] * (n - 1) + [1e38], ["bad", "1e+38"]),
    ],
)
def test_what_is_no_reward_is_refused_by_function_and_row(tmp_path, returned, parts):
    def bad(completions, **kwargs):
        return returned(len(completions))

    run = trainer(tmp_path, reward_funcs=bad)
    before = [p.clone() for _, p in run.policy.trainable()]
    with pytest.raises(RewardError) as error:
        run.train()
    for part in parts:
        assert part in str(error.value)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, run.policy.trainable(), strict=True))


def test_numbers_of_every_kind_are_rewards(tmp_path):  # 18
    import numpy as np

    def kinds(completions, **kwargs):
        return [1, np.float32(0.5), torch.tensor(0.25), True]

    trainer(tmp_path, reward_funcs=kinds).train()
    assert rows_of(tmp_path)[0]["reward"] == pytest.approx(2.75 / 4)


def test_none_is_left_out_and_nan_is_a_failure_that_is_counted(tmp_path):  # 19
    def gaps(completions, **kwargs):
        return [None, float("nan"), 1.0, 0.0]

    with pytest.raises(RewardError, match=r"'gaps' failed on completion 1 .*nan"):
        trainer(tmp_path, reward_funcs=gaps).train()
    trainer(tmp_path, reward_funcs=gaps, on_reward_error="drop").train()
    row = rows_of(tmp_path)[0]
    assert row["reward"] == 0.5 and row["rewards_dropped"] == 1
    lines = [json.loads(line) for line in (tmp_path / "run/completions/step-000001.jsonl").open()]
    assert [line["advantage"] for line in lines[:2]] == [0, 0]
    assert lines[2]["advantage"] == -lines[3]["advantage"] > 0


def test_no_signal_and_truncation_are_said_in_a_sentence(tmp_path, capsys):  # 21, 22
    def zero(completions, **kwargs):
        return [0.0] * len(completions)

    run = trainer(tmp_path, reward_funcs=zero, max_steps=6, max_completion_length=1)
    run.sampler.eos_ids = []
    run.train()
    said = capsys.readouterr().out
    assert "100% of the completions hit max_completion_length=1" in said
    assert "all rewards were equal" in said
    assert all(row["frac_reward_zero_std"] == 1 for row in rows_of(tmp_path))


def test_two_runs_do_not_share_a_directory(tmp_path):  # 49
    seen = []

    def nosy(completions, **kwargs):
        code = "from fusedgrpo.engine.reporting.run_dir import RunDir; RunDir.open('run')"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        seen.append(done.stderr)
        return even_ids(**kwargs)

    trainer(tmp_path, reward_funcs=nosy).train()
    assert f"in use by process {os.getpid()}" in seen[0]
    assert "OutputDirError" in seen[0]


def test_an_output_directory_that_cannot_be_written_is_refused_first(tmp_path):  # 49
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutputDirError, match="cannot be written"):
        trainer(tmp_path)


def test_an_earlier_run_is_kept(tmp_path):
    trainer(tmp_path).train()
    first = (tmp_path / "run/metrics.jsonl").read_text()
    trainer(tmp_path).train()
    assert (tmp_path / "run/previous/001/metrics.jsonl").read_text() == first


def test_remote_code_needs_to_be_asked_for(tmp_path):  # 52
    directory = tiny.save(tmp_path / "model", tiny.model("Llama"))
    settings = json.loads((directory / "config.json").read_text())
    settings |= {
        "model_type": "unheard_of",
        "auto_map": {
            "AutoConfig": "code.UnheardConfig",
            "AutoModelForCausalLM": "code.Unheard",
        },
    }
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ModelError):
        GRPOTrainer(str(directory), even_ids, config(tmp_path), PROMPTS, tokenizer=tiny.tokenizer())
    assert not (tmp_path / "ran").exists()


def test_a_dying_tracker_does_not_end_the_run(tmp_path, monkeypatch, caplog):  # 55
    import accelerate.tracking as tracking

    class Dying(tracking.GeneralTracker):
        name = "dying"
        tracker = None
        requires_logging_directory = False

        def __init__(self, run_name, **kwargs):
            super().__init__()

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **kwargs):
            raise ConnectionError("no route to host")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "dying", Dying)
    trainer(tmp_path, report_to="dying", max_steps=3).train()
    assert len(rows_of(tmp_path)) == 3
    assert caplog.text.count("no route to host") == 1


def test_handlers_are_given_back_after_a_run(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer(tmp_path).train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
