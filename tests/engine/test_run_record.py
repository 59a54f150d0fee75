"""run.json: what a run is made of, and its sessions."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import BitsAndBytesConfig

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.memory.plan import MemoryPlan
from fusedgrpo.engine.reporting import run_facts
from fusedgrpo.engine.reporting.recorded_run import RecordedRun
from fusedgrpo.engine.reporting.run_lock import STALE_SECONDS
from fusedgrpo.engine.reporting.run_record import RunRecord, read_facts
from fusedgrpo.engine.run_description import described, session
from fusedgrpo.errors import OutputDirError

TRAINED = [{"prompt": p} for p in ("w4 w5 w6", "w7 w8", "w9 w10 w11 w12")]


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make(path: Path, reward: Any = even_ids, held_out: Any = None, **options: Any) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(path), use_cpu=True, bf16=False, num_generations=2, prompts_per_step=2,
        max_completion_length=4, lora_r=2, gradient_checkpointing=False, held_out_check=False,
        drift_check=False, **{"max_steps": 2, "save_steps": 1} | options,
    )  # fmt: skip
    return GRPOTrainer(tiny.model(), reward, args, TRAINED, held_out, tiny.tokenizer())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            {"method": "bitsandbytes", "bits": 4, "kind": "nf4", "double": False},
        ),
        (BitsAndBytesConfig(load_in_8bit=True), {"method": "bitsandbytes", "bits": 8}),
        ({"quant_method": "gptq", "bits": 3}, {"method": "gptq", "bits": 3}),
    ],
)
def test_quantised_weights_are_said(tmp_path: Path, config: Any, said: dict[str, Any]) -> None:
    run = make(tmp_path)
    run.policy.causal_lm.config.quantization_config = config
    assert json.loads(json.dumps(described(run)["model"]["quantisation"])) == said


def sessions(path: Path) -> list[tuple[Any, ...]]:
    found = read_facts(path / "run.json")["sessions"]
    for each in found:
        assert datetime.fromisoformat(each["started"]).tzinfo is not None
        assert each["ended"] is None or each["ended"] >= each["started"]
    return [(each["first_step"], each["last_step"], each["how"]) for each in found]


def test_what_a_run_is_made_of(tmp_path: Path) -> None:
    held_out = {"a": TRAINED[:2], "b": [{"prompt": "w4 w5 w6 w7 w8"}]}
    run = make(tmp_path, held_out=held_out, generation_batch_size=8, max_in_flight=4)
    facts = json.loads(json.dumps(described(run)))
    parameters = sum(p.numel() for p in run.policy.model.parameters())
    trainable = sum(p.numel() for p in run.policy.model.parameters() if p.requires_grad)
    assert facts["model"] == {
        "name": None, "architecture": "Qwen2ForCausalLM", "parameters": parameters,
        "trainable": trainable, "dtype": "float32", "quantisation": None,
    }  # fmt: skip
    assert facts["adapter"]["type"] == "LORA"
    assert (facts["adapter"]["r"], facts["adapter"]["alpha"]) == (2, 4)
    assert facts["adapter"]["modules"] == 14 and "q_proj" in facts["adapter"]["target_modules"]
    assert facts["data"]["rows"] == 3 and facts["data"]["skipped"] == 0
    assert facts["data"]["held_out"] == {"a": 2, "b": 1} and facts["data"]["longest_prompt"] == 5
    assert facts["batch"] == {
        "prompts_per_step": 2, "generations": 2, "completions_per_step": 4,
        "prompts_per_rollout": 4, "steps_per_rollout": 2, "iterations": 1, "epochs": 4 / 3,
        "tokens_per_microbatch": 4096, "max_in_flight": 4,
    }  # fmt: skip
    assert facts["total_steps"] == 2
    assert (facts["attention"], facts["layout"]) == ("sdpa", "shared")
    assert facts["kernels"] == "torch" and facts["memory"] == {"plan": None, "measured": {}}

    here = session(run)
    assert here["versions"]["torch"] and here["machine"]["memory"] > 2**20
    assert (here["machine"]["precision"], here["machine"]["processes"]) == ("float32", 1)

    run.run_sampler.memory_plan = MemoryPlan(
        gpu_bytes=100, resident={"weights": 10}, tokens_per_microbatch=8, max_in_flight=4,
        phases={"rollout": {"resident": 10, "kv": 5}, "scoring": {"resident": 10, "logits": 9}},
        activation_offloading=False, longest=8, host={},
    )  # fmt: skip
    run.memory_peaks = {"memory/sample": 14.0, "memory/peak": 20.0}
    memory = described(run)["memory"]
    assert memory["plan"]["phases"] == {"rollout": 15, "scoring": 19}
    assert memory["plan"]["peak"] == 19 and memory["measured"] == {"rollout": 14}


def test_all_weights_have_no_adapter(tmp_path: Path) -> None:
    facts = described(make(tmp_path, finetuning_type="full"))
    assert facts["adapter"] is None
    assert facts["model"]["trainable"] == facts["model"]["parameters"]


def test_each_session_is_there_with_its_end(tmp_path: Path) -> None:
    calls = []

    def stops(completion_ids: list[list[int]], **more: Any) -> list[float]:
        calls.append(RecordedRun.read(tmp_path).is_running if len(calls) else None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) == 4:
            raise KeyError("a mistake")
        return even_ids(completion_ids, **more)

    with pytest.raises(SystemExit):
        make(tmp_path, stops, max_steps=4).train()
    assert sessions(tmp_path) == [(1, 1, "interrupted")]
    with pytest.raises(Exception, match="a mistake") as failure:
        make(tmp_path, stops, max_steps=4).train("auto")
    failed = f"failed: {type(failure.value).__name__}"
    assert sessions(tmp_path)[1:] == [(2, 2, failed)]
    make(tmp_path, stops, max_steps=4).train("auto")
    assert sessions(tmp_path) == [(1, 1, "interrupted"), (2, 2, failed), (3, 4, "finished")]
    assert all(calls[1:])
    recorded = RecordedRun.read(tmp_path)
    assert not recorded.is_running and recorded.facts["total_steps"] == 4

    # Another run in the same place begins anew; the first is put aside whole.
    make(tmp_path).train()
    assert sessions(tmp_path) == [(1, 2, "finished")]
    assert len(read_facts(tmp_path / "previous/001/run.json")["sessions"]) == 3


def test_the_session_is_over_before_the_report_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, max_steps=1)
    seen: list[Any] = []
    save = run._save_into

    def look(path: Path) -> Path:
        seen.append((sessions(tmp_path)[-1], RecordedRun.read(tmp_path).is_running))
        return save(path)

    monkeypatch.setattr(run, "_save_into", look)
    run.train()
    assert seen == [((1, 1, "finished"), False)]


def begun(path: Path) -> None:
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.0}\n')
    record = RunRecord(path / "run.json", {"memory": {}})
    record.begin({"first_step": 1})
    record.write()


def test_a_killed_run_is_not_running(tmp_path: Path) -> None:
    begun(tmp_path)
    assert not RecordedRun.read(tmp_path).is_running  # it has no lock at all
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))
    assert not RecordedRun.read(tmp_path).is_running
    # Of another machine's there is the heartbeat.
    lock.write_text(json.dumps({"pid": 1, "host": "another", "beats": 30.0}))
    assert RecordedRun.read(tmp_path).is_running
    before = sorted(tmp_path.iterdir())
    silent = time.time() - STALE_SECONDS - 60
    os.utime(lock, (silent, silent))
    assert not RecordedRun.read(tmp_path).is_running
    assert sorted(tmp_path.iterdir()) == before  # a reader leaves nothing behind


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sessions": 3}', '{"sessions": [1]}', "\ud800"])
def test_a_torn_file_has_no_facts(tmp_path: Path, text: str) -> None:
    begun(tmp_path)
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    recorded = RecordedRun.read(tmp_path)
    assert not recorded.is_running
    record = RunRecord(tmp_path / "run.json", {})
    record.begin({})
    record.write()
    assert read_facts(tmp_path / "run.json")["sessions"][-1]["ended"] is None


def test_no_secret_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "hf_" + "Ab1" * 8
    monkeypatch.setattr(run_facts.sys, "argv", ["train.py", f"--hub_token={key}"])
    run = make(tmp_path)
    run.data.source = f"https://name:{key}@host/data"
    record = RunRecord(tmp_path / "run.json", described(run))
    record.begin(session(run))
    record.write()
    text = (tmp_path / "run.json").read_text()
    assert key not in text and "train.py" in text and "host/data" in text


def test_a_disk_that_is_full_at_the_end_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, written = RunRecord.write, []

    def once(record: RunRecord) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(write(record))

    monkeypatch.setattr(RunRecord, "write", once)
    make(tmp_path, max_steps=1).train()
    assert "run.json could not be written" in caplog.text
    assert sessions(tmp_path) == [(1, None, None)]


def test_one_that_is_full_at_the_beginning_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(record: RunRecord) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunRecord, "write", refused)
    monkeypatch.setattr("fusedgrpo.engine.reporting.disk_refusals.PAUSE_SECONDS", 0.0)
    with pytest.raises(OutputDirError, match=r"run\.json of step 0 could not be written"):
        make(tmp_path, max_steps=1).train()
