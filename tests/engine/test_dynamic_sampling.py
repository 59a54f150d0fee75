"""Groups whose rewards do not differ make room for other prompts, and nothing of them is lost."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from patience import HUNG

from fusedgrpo import Callback, GRPOConfig, GRPOTrainer
from fusedgrpo.engine.advantages import find_estimator
from fusedgrpo.engine.batch_plan import resolve_batch
from fusedgrpo.engine.group_signal import GroupSignal, differ
from fusedgrpo.engine.reporting.completions_log import steps_in
from fusedgrpo.engine.reporting.drift_log import read_drift
from fusedgrpo.engine.reporting.metrics_log import read_jsonl, read_metrics
from fusedgrpo.engine.rewards import RewardBatch
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.types import Verdict
from fusedgrpo.errors import RewardError
from fusedgrpo.models.ragged_decode import RaggedDecoder

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(12)]
SOLVED = {PROMPTS[i]["prompt"] for i in (1, 4)}
FAILED = {PROMPTS[i]["prompt"] for i in (0, 2, 5, 6, 9)}
CLOCK = ("time/", "step_time", "tokens_per_second", "memory/")


def by_prompt(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Rounding apart the same within a group, of all but five prompts."""
    found = []
    for i, (prompt, ids) in enumerate(zip(prompts, completion_ids, strict=True)):
        signal = 0.1 + 0.01 * sum(ids) / len(ids)  # two that are equal are not likely
        found.append(2.0 + 1e-7 * i if prompt in SOLVED else 0.0 if prompt in FAILED else signal)
    return found


def make(
    path: Path,
    reward: Callable[..., Any] | str = by_prompt,
    callbacks: list[Callback] | None = None,
    **options: Any,
) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(path), use_cpu=True, bf16=False, num_generations=3, learning_rate=0.01,
        max_completion_length=6, lora_r=4,
        **{"prompts_per_step": 3, "max_steps": 4, "dynamic_sampling": True,
           "save_strategy": "no"} | options,
    )  # fmt: skip
    return GRPOTrainer(
        tiny.model(), reward, args, PROMPTS, processing_class=tiny.tokenizer(), callbacks=callbacks
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if not k.startswith(CLOCK)}
        for row in read_metrics(path / "metrics.jsonl")
    ]


def logged(path: Path, step: int) -> list[dict[str, Any]]:
    return read_jsonl(steps_in(path / "completions")[step])


def test_a_step_has_its_prompts_with_signal_and_says_what_it_left_out(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert "up to 12 prompts tried" in trainer.plan.describe()
    order = [example.prompt for example in trainer.stream.peek(48)]
    trainer.train()
    begin = 0
    for row in rows(tmp_path):
        records = logged(tmp_path, row["step"])
        asked = [record["prompt"] for record in records[::3]]
        # The next prompts in their order, up to the third that has signal.
        assert asked == order[begin : begin + len(asked)]
        begin += len(asked)
        kept = [prompt for prompt in asked if prompt not in SOLVED | FAILED]
        assert len(kept) == 3 and asked[-1] == kept[-1]
        assert row["dynamic_sampling/groups"] == len(asked)
        assert row["dynamic_sampling/groups_kept"] == 3
        assert row["dynamic_sampling/groups_solved"] == sum(p in SOLVED for p in asked)
        assert row["dynamic_sampling/groups_failed"] == sum(p in FAILED for p in asked)
        assert row["dynamic_sampling/rounds"] == len(asked) / 3

        # Rewards and lengths are of all that was sampled, and once more of what is used.
        used = [record for record in records if record["prompt"] in kept]
        for name, of in (("reward", records), ("dynamic_sampling/kept_reward", used)):
            assert row[name] == pytest.approx(sum(r["reward"] for r in of) / len(of), rel=1e-5)
        lengths = [record["length"] for record in records]
        assert row["completions/mean_length"] == sum(lengths) / len(lengths)
        assert all((record["advantage"] is None) == (record not in used) for record in records)
        assert all(any(r["advantage"] for r in used if r["prompt"] == prompt) for prompt in kept)
        failed, solved = (sum(p in kind for p in asked) for kind in (FAILED, SOLVED))
        # What differs by rounding alone may or may not be equal.
        share = row["frac_reward_zero_std"] * len(asked)
        assert failed - 1e-6 <= share <= failed + solved + 1e-6
    assert trainer.progress.cursor == begin == row["epoch"] * len(PROMPTS)


def test_the_update_is_that_of_the_groups_that_are_used(tmp_path: Path) -> None:
    """As if the run had been asked for these prompts alone."""
    trainer = make(tmp_path / "a", max_steps=1, loss_type="dapo")
    trainer.train()
    kept = [r["prompt"] for r in logged(tmp_path / "a", 1) if r["advantage"] is not None][::3]
    (row,) = rows(tmp_path / "a")
    samples = trainer.buffer.part(0, mask_truncated=False)[0]
    assert len(samples) == 9 and len(kept) == 3
    tokens = sum(len(sample.completion_ids) for sample in samples)
    lengths = [r["length"] for r in logged(tmp_path / "a", 1) if r["prompt"] in kept]
    assert tokens == sum(lengths)
    assert row["num_tokens"] == sum(2 + r["length"] for r in logged(tmp_path / "a", 1))
    expected = [s.advantage for s in samples]
    assert sum(expected[:3]) == pytest.approx(0, abs=1e-5) and any(expected[:3])


def test_what_an_update_did_is_found_in_the_log(tmp_path: Path) -> None:
    make(tmp_path, max_steps=2, num_iterations=2).train()
    sampled = logged(tmp_path, 1)
    for records in read_drift(tmp_path / "drift").values():
        assert records
        for record in records:
            own = sampled[record["completion"]]
            assert (own["group"], own["row"]) == (record["group"], record["row"])
            assert own["advantage"] == pytest.approx(record["advantage"])
            assert own["reward"] == pytest.approx(record["reward"])


def test_there_may_not_be_enough(tmp_path: Path) -> None:
    """Then the step is of those there are, and with none at all of the first ones."""

    def one(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(i) if p == PROMPTS[3]["prompt"] else 1.0 for p, i in
                zip(prompts, completion_ids, strict=True)]  # fmt: skip

    make(tmp_path / "one", one, max_steps=1).train()
    (row,) = rows(tmp_path / "one")
    assert row["dynamic_sampling/groups"] == 12 and row["dynamic_sampling/rounds"] == 4
    assert row["dynamic_sampling/groups_kept"] == 1 and row["grad_norm"] > 0

    make(tmp_path / "none", lambda completion_ids, **_: [0.0] * len(completion_ids)).train()
    for row in rows(tmp_path / "none"):
        assert row["dynamic_sampling/groups_kept"] == 3 and row["grad_norm"] == 0
        assert row["dynamic_sampling/groups_failed"] == 9
        assert row["frac_reward_zero_std"] == 1


@pytest.mark.parametrize("sampler", ["decoder", "generate"])
def test_a_run_that_was_stopped_goes_on_the_same(tmp_path: Path, sampler: str) -> None:
    options: dict[str, Any] = {
        "max_steps": 6, "num_iterations": 2, "generation_batch_size": 18, "beta": 0.1,
        "sampler": sampler,
    }  # fmt: skip

    class Stop(Exception):
        pass

    class StopsAt(Callback):
        def on_step(self, row: dict[str, Any]) -> None:
            if row["step"] == 3:
                raise Stop

    whole = make(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(Stop):
        make(tmp_path / "cut", callbacks=[StopsAt()], **options).train()
    again = make(tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    for (_, a), (_, b) in zip(whole.policy.trainable(), again.policy.trainable(), strict=True):
        assert torch.equal(a, b)


def test_a_reward_function_that_fails_while_others_are_decoded(tmp_path: Path) -> None:
    calls = [0]

    def fails(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls[0] += 1
        if calls[0] == 8:
            raise ValueError("not now")
        return by_prompt(prompts, completion_ids)

    fails.__name__ = by_prompt.__name__
    make(tmp_path / "whole").train()
    with pytest.raises(RewardError, match="not now"):
        make(tmp_path / "cut", fails).train()
    assert 0 < len(rows(tmp_path / "cut")) < 4
    make(tmp_path / "cut", fails).train(resume_from_checkpoint=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_what_is_in_flight_does_not_matter(tmp_path: Path) -> None:
    make(tmp_path / "a").train()
    make(tmp_path / "b", max_in_flight=2).train()
    for ours, theirs in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        rounding = [name for name in ours if name.startswith("sampling/")]
        for name in rounding:
            assert ours.pop(name) < 1e-5 and theirs.pop(name) < 1e-5
        assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)


def test_streaming_and_rounds_are_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups are scored one by one either way, from seeds of their own."""

    def drawn(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [x + random.random() * (x not in (0.0, 2.0)) for x in
                by_prompt(prompts[:1] * len(prompts), completion_ids)]  # fmt: skip

    calls: list[int] = []
    sample_until = DecoderSampler.sample_until

    def counted(self: DecoderSampler, prompt_ids: Any, *args: Any, **named: Any) -> Any:
        groups = sample_until(self, prompt_ids, *args, **named)
        calls.append(len(groups))
        assert len(prompt_ids) == 12
        return groups

    monkeypatch.setattr(DecoderSampler, "sample_until", counted)
    make(tmp_path / "streamed", drawn, max_in_flight=4).train()
    assert calls == [row["dynamic_sampling/groups"] for row in rows(tmp_path / "streamed")]
    monkeypatch.setattr(DecoderSampler, "streams", False)
    make(tmp_path / "rounds", drawn, max_in_flight=4).train()
    assert len(calls) == 4
    for step in range(1, 5):
        ours, theirs = (logged(tmp_path / name, step) for name in ("streamed", "rounds"))
        assert [r["completion"] for r in ours] == [r["completion"] for r in theirs]
        assert [r["reward"] for r in ours] == [r["reward"] for r in theirs]
        assert [r["advantage"] for r in ours] == [r["advantage"] for r in theirs]


FILE = """
import time
from pathlib import Path

HERE = Path(__file__).parent
SOLVED, FAILED = {solved!r}, {failed!r}

def by_prompt(prompts, completion_ids, **columns):
    (HERE / "asked").touch()
    deadline = time.monotonic() + {hung}
    while not (HERE / "went_on").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    found = []
    for i, (prompt, ids) in enumerate(zip(prompts, completion_ids)):
        signal = 0.1 + 0.01 * sum(ids) / len(ids)
        found.append(2.0 + 1e-7 * i if prompt in SOLVED else 0.0 if prompt in FAILED else signal)
    return found
"""


def test_the_decoder_goes_on_while_a_worker_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function answers when tokens came after it was called; the run is the same one."""
    file = tmp_path / "slow.py"
    file.write_text(FILE.format(solved=SOLVED, failed=FAILED, hung=HUNG))
    make(tmp_path / "here", max_in_flight=4).train()

    plain, after = RaggedDecoder.next, []

    def next_tokens(self: RaggedDecoder, *args: Any) -> Any:
        if (tmp_path / "asked").exists():
            after.append(self)
            (tmp_path / "went_on").touch()
        return plain(self, *args)

    monkeypatch.setattr(RaggedDecoder, "next", next_tokens)
    make(tmp_path / "beside", f"{file}:by_prompt", max_in_flight=4).train()
    assert after
    for step in range(1, 5):
        ours, theirs = (logged(tmp_path / name, step) for name in ("here", "beside"))
        for mine, other in zip(ours, theirs, strict=True):
            for name in ("prompt", "completion", "reward", "advantage"):
                assert mine[name] == other[name]


def at_once(teaches: Callable[[int, Any], bool]) -> Callable[[int, Any], Verdict]:
    return lambda place, group: lambda wait: teaches(place, group)


def test_verdicts_that_come_late_change_nothing(tmp_path: Path) -> None:
    """The decoder goes on meanwhile, and waits where it has nothing else to do."""
    trainer = make(tmp_path)
    sampler = trainer.sampler
    assert isinstance(sampler, DecoderSampler)
    prompts = [example.prompt_ids for example in trainer.stream.peek(12)]
    asked, waited = Counter[int](), []

    def late(place: int, group: Any) -> Verdict:
        def verdict(wait: bool) -> bool | None:
            asked[place] += 1
            if wait:
                waited.append(place)
            return place not in {0, 1, 4} if wait or asked[place] > place else None

        return verdict

    def said(groups: list[Any]) -> list[Any]:
        return [(g.row, [c.ids for c in g.completions]) for g in groups]

    expected = sampler.sample(prompts, 3, trainer.sampling, 5)
    for every in (late, lambda place, group: lambda wait: waited.append(place) if not wait else (
            place not in {0, 1, 4})):  # fmt: skip
        groups = sampler.sample_until(prompts, 3, trainer.sampling, 5, wanted=3, teaches=every)
        assert said(groups) == said(expected[:6])
    assert asked[1] >= 2 and waited


def test_a_prompt_enters_while_others_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never more than are wanted are in flight, also after running out of memory."""
    trainer = make(tmp_path)
    sampler = trainer.sampler
    assert isinstance(sampler, DecoderSampler)
    examples = trainer.stream.peek(12)
    vain = {0, 1, 4}
    asked: list[int] = []

    def teaches(place: int, group: Any) -> bool:
        asked.append(place)
        assert said([group]) == said([expected[place]])
        return place not in vain

    def said(groups: list[Any]) -> list[Any]:
        return [(g.row, g.prompt_ids, [c.ids for c in g.completions]) for g in groups]

    prompts = [example.prompt_ids for example in examples]
    expected = sampler.sample(prompts, 3, trainer.sampling, 5)
    groups = sampler.sample_until(
        prompts, 3, trainer.sampling, 5, wanted=3, teaches=at_once(teaches)
    )
    assert said(groups) == said(expected[:6]) and sorted(asked) == list(range(6))
    everything = sampler.sample_until(
        prompts, 3, trainer.sampling, 5, wanted=3, teaches=at_once(lambda i, group: False)
    )
    assert said(everything) == said(expected)

    # Memory runs out while a group is judged, and while the next tokens are computed.
    plain, calls, tries = RaggedDecoder.next, [0], Counter[int]()

    def failing(self: Any, rows: Any, *more: Any) -> Any:
        calls[0] += 1
        assert len({row.prompt for row in rows}) <= 3
        if calls[0] in (7, 8, 12):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, rows, *more)

    def exhausted(place: int, group: Any) -> bool:
        tries[place] += 1
        if place == 1 and tries[1] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return teaches(place, group)

    asked.clear()
    monkeypatch.setattr(RaggedDecoder, "next", failing)
    groups = sampler.sample_until(
        prompts, 3, trainer.sampling, 5, wanted=3, teaches=at_once(exhausted)
    )
    assert said(groups) == said(expected[:6]) and sorted(asked) == list(range(6))
    assert tries == dict.fromkeys(range(6), 1) | {1: 2}
    assert trainer.execution.oom_retry.retries == 4


def test_rewards_are_not_computed_in_the_decoders_precision(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.policy.compute_dtype = torch.bfloat16
    seen = []

    def teaches(place: int, group: Any) -> bool:
        seen.append(torch.is_autocast_enabled("cpu"))
        return True

    prompts = [example.prompt_ids for example in trainer.stream.peek(3)]
    for outer in (False, True):
        with torch.autocast("cpu", enabled=outer):
            trainer.sampler.sample_until(
                prompts, 2, trainer.sampling, 5, wanted=3, teaches=at_once(teaches)
            )
    assert seen == [False] * 3 + [True] * 3


@pytest.mark.parametrize("sampler", ["decoder", "generate"])
def test_rewards_that_are_lost_are_counted_once(tmp_path: Path, sampler: str) -> None:
    def fails(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [torch.nan, *(float(sum(ids)) for ids in completion_ids[1:])]

    trainer = make(tmp_path, fails, sampler=sampler, on_reward_error="drop")
    row = trainer.step()
    assert row["rewards_dropped"] == row["dynamic_sampling/groups"] >= 3


def test_a_group_that_is_cut_off_as_a_whole_teaches_nothing(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids],
        max_steps=1, mask_truncated_completions=True,
    )  # fmt: skip
    trainer.train()
    records = logged(tmp_path, 1)
    groups = [records[i : i + 3] for i in range(0, len(records), 3)]
    ended = [any(r["finish_reason"] == "stop" for r in group) for group in groups]
    assert 0 < sum(ended) < len(ended)
    assert [group[0]["advantage"] is not None for group in groups] == ended


def test_evaluation_is_never_filtered(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    found = trainer.evaluate(PROMPTS[:3])
    assert found["eval_reward"] < 1.5  # with the failed ones


def test_epochs_count_steps_as_without() -> None:
    options = {"prompts_per_step": 3, "num_train_epochs": 2, "use_cpu": True}
    plain = resolve_batch(GRPOConfig(**options), 10)
    dynamic = resolve_batch(GRPOConfig(**options, dynamic_sampling=True), 10)
    assert dynamic.total_steps == plain.total_steps and dynamic.total_prompts is None
    assert "at least" in dynamic.describe() and "tried" not in plain.describe()


def test_signal_is_what_advantages_are_made_of(tmp_path: Path) -> None:
    assert not differ(torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float32))
    assert not differ(torch.tensor([5.0, torch.nan, 5.0])) and not differ(torch.tensor([torch.nan]))
    assert differ(torch.tensor([1e-9, 2e-9])) and differ(torch.tensor([-5000.0, -5000.1]))

    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1, 1], [1, 1], [0, 3], [0, 4]])

    def signal(weights: list[float], **options: Any) -> list[bool]:
        config = GRPOConfig(use_cpu=True, **options)
        factors = torch.tensor(weights)
        batch = RewardBatch(values, (values * factors).sum(1), {}, {}, {}, 0)
        made = GroupSignal(config, factors, find_estimator(config, [tmp_path]))
        return [made.of_group(batch.chosen(ids == i)) for i in range(3)]

    assert signal([1.0, 1.0]) == [False, False, True]
    each: dict[str, Any] = {"multi_objective_aggregation": "normalize_then_sum"}
    assert signal([1.0, 1.0], **each) == [True, False, True]
    assert signal([1.0, 0.0], **each) == [True, False, False]
    code = "def first(rewards, total, group_ids, weights):\n    return total * (total == 3)\n"
    (tmp_path / "mine.py").write_text(code)
    assert signal([1.0, 1.0], advantage_estimator="mine.py:first") == [False, False, True]


def test_metrics_are_numbers_in_the_file(tmp_path: Path) -> None:
    make(tmp_path, max_steps=1).train()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = {k: v for k, v in json.loads(line).items() if k.startswith("dynamic_sampling/")}
    assert len(found) == 7 and all(isinstance(v, (int, float)) for v in found.values())
