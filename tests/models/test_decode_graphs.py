"""Steps that are recorded and replayed give what the steps themselves give; a CPU stands in."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout import next_token
from fusedgrpo.engine.rollout.decode_loop import How
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.next_token import NextToken
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.kernels.sample import op as sample_op
from fusedgrpo.models import cached_attention
from fusedgrpo.models.adapters.merged_weights import MergedWeights
from fusedgrpo.models.adapters.rollout_weights import AdapterWeights
from fusedgrpo.models.decode_graphs import Result, StepGraphs, bucket
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.ragged_decode import Prompt, RaggedDecoder, Room, Row

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [4], [9, 9], [3, 30, 20] * 9]


class Recorder:
    """Replays by running again, into the tensors of the first result, as a graph does."""

    def __init__(self, wrong: float = 0.0, fails: bool = False):
        self.recorded = self.replayed = 0
        self.wrong, self.fails = wrong, fails

    def __call__(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.recorded += 1
        result = tuple(x.clone() for x in run())

        def replay() -> None:
            self.replayed += 1
            for kept, new in zip(result, run(), strict=True):
                kept.copy_(new)
            result[1].add_(self.wrong)

        return result, replay  # type: ignore[return-value]


def sample(
    on: Policy, how: How, params: SamplingParams, in_flight: int | None = None
) -> Sequence[Any]:
    execution = Execution(OOMRetry(0, in_flight))
    sampler = DecoderSampler(on, tiny.tokenizer(), [tiny.EOS], execution=execution)
    sampler.how = how
    groups = sampler.sample(PROMPTS, 3, params, seed=4)
    return [completion for group in groups for completion in group.completions]


# How many rows are in flight and how a token is chosen each meet everything else.
OPTIONS: dict[str, dict[str, Any]] = {
    "drawn": {},
    "filtered": {"top_k": 9, "repetition_penalty": 1.2},
    "greedy": {"greedy": True},
}
CASES = [
    (in_flight, name, (i + j) % 2, ("Qwen2", "Gemma2")[(i + j // 2) % 2])
    for (i, in_flight), (j, name) in itertools.product(enumerate([None, 1, 5]), enumerate(OPTIONS))
]


@functools.cache
def step_by_step(family: str, name: str) -> tuple[Policy, SamplingParams, Sequence[Any]]:
    """A policy, how it is sampled from, and what it says without graphs, all rows in flight."""
    on, params = Policy(tiny.model(family)), SamplingParams(max_new_tokens=40, **OPTIONS[name])
    return on, params, sample(on, How(), params)


def test_the_cases_have_every_pair() -> None:
    axes = [set(axis) for axis in zip(*CASES, strict=True)]
    for a, b in itertools.combinations(range(len(axes)), 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(axes[a], axes[b]))


@pytest.mark.parametrize(("in_flight", "name", "behind", "family"), CASES)
def test_a_replayed_step_is_the_step(
    in_flight: int | None, name: str, behind: int, family: str
) -> None:
    on, params, expected = step_by_step(family, name)
    recorder = Recorder()
    how = How(behind=behind, graphs=lambda: StepGraphs(recorder))
    found = sample(on, how, params, in_flight)
    assert [c.ids for c in found] == [c.ids for c in expected]
    torch.testing.assert_close(
        torch.cat([c.logp for c in found]), torch.cat([c.logp for c in expected]),
        rtol=0, atol=1e-5,
    )  # fmt: skip
    most = in_flight or len(found)
    assert recorder.recorded <= len({bucket(m, most) for m in range(1, most + 1)})
    assert recorder.replayed > 2 * recorder.recorded


@pytest.mark.parametrize("recorder", [Recorder(fails=True), Recorder(wrong=0.5)], ids=["no", "off"])
def test_where_it_does_not_work_steps_run_by_themselves(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    on = Policy(tiny.model())
    params = SamplingParams(max_new_tokens=30)
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        found = sample(on, How(behind=1, graphs=lambda: StepGraphs(recorder)), params)
    assert [c.ids for c in found] == [c.ids for c in sample(on, How(), params)]
    messages = [record.getMessage() for record in caplog.records]
    (said,) = [message for message in messages if "graphs" in message]
    expected = "not permitted when stream is capturing." if recorder.fails else "off by 5.0e-01."
    assert said.startswith("Sampling without CUDA graphs") and said.endswith(expected)


def test_running_out_of_memory_while_recording_is_running_out_of_memory() -> None:
    def record(run: Callable[[], Result]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    on = Policy(tiny.model())
    graphs = StepGraphs(record)
    with pytest.raises(Exception, match="ut of memory"):
        sample(on, How(graphs=lambda: graphs), SamplingParams(max_new_tokens=4))
    assert graphs.works


def test_all_graphs_of_a_rollout_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that stands for a GPU: what is recorded where."""
    pools: list[object] = []

    def graph(recorded: Any, pool: Any = None) -> Any:
        pools.append(pool)
        return contextlib.nullcontext()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, new in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda side: contextlib.nullcontext(),
        "graph_pool_handle": object,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, new)
    on = Policy(tiny.model())
    for _ in range(2):
        graphs = StepGraphs()
        sample(on, How(graphs=lambda graphs=graphs: graphs), SamplingParams(max_new_tokens=30), 5)  # type: ignore[misc]
        assert len(graphs.buckets) > 1
    half = len(pools) // 2
    assert len(set(map(id, pools[:half]))) == 1 and pools[0] is not None
    assert set(map(id, pools[half:])) == {id(pools[-1])} and pools[-1] is not pools[0]


def test_buckets_are_few_and_hold_their_rows() -> None:
    for most in (1, 7, 64, 100, 256):
        sizes = {rows: bucket(rows, most) for rows in range(1, most + 1)}
        assert all(rows <= size <= most for rows, size in sizes.items())
        assert all(size < 4 * rows for rows, size in sizes.items())
        assert all(size < 2 * rows for rows, size in sizes.items() if rows > 64)
    assert sorted({bucket(rows, 256) for rows in range(1, 257)}) == [1, 4, 16, 64, 128, 256]


@pytest.mark.parametrize(
    ("family", "options", "kind"),
    [  # every pair
        ("Qwen2", {}, AdapterWeights),
        ("Qwen2", {"top_k": 3, "top_p": 0.9}, MergedWeights),
        ("Qwen2", {"repetition_penalty": 1.2}, AdapterWeights),
        ("Gemma2", {}, MergedWeights),
        ("Gemma2", {"top_k": 3, "top_p": 0.9}, AdapterWeights),
        ("Gemma2", {"repetition_penalty": 1.2}, MergedWeights),
        ("Mistral", {}, AdapterWeights),
        ("Mistral", {"top_k": 3, "top_p": 0.9}, MergedWeights),
        ("Mistral", {"repetition_penalty": 1.2}, AdapterWeights),
    ],
)
def test_a_step_never_waits_for_the_device(
    family: str, options: dict[str, Any], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without values: nobody can look at one."""
    on = Policy(tiny.add_lora(tiny.model(family)))
    on.model.to("meta")
    monkeypatch.setattr(cached_attention, "resolve_backend", lambda *_: "triton")
    monkeypatch.setattr(
        next_token, "sample_logits", lambda z, seeds, at, greedy: (z.argmax(1), z.amax(1))
    )
    # This device knows no autocast.
    monkeypatch.setattr(sample_op, "autocast_operands", lambda *operands: operands)
    params = SamplingParams(max_new_tokens=40, **options)
    weights = kind(on)
    with torch.no_grad(), on.scoring():
        decoder = RaggedDecoder(on, Room(3 + 4 * 2, 4, 40, 20), NextToken(on, params))
        prompts = [Prompt(list(range(3, 23)), decoder.cache.take(2)), Prompt([5], [])]
        prompts[1].pages = decoder.cache.take(1)
        rows = [Row(prompts[i // 2], i, i) for i in range(4)]
        with weights.learn():
            decoder.read(prompts[:1])
        with weights.active():
            decoder.read(prompts[1:])
            decoder.first(rows)
            for _ in range(20):
                said = decoder.next(rows)
        step = decoder.blank(7)
        decoder._step(rows).write_into(step, decoder.blank(7))
    assert [row.said for row in rows] == [21] * 4
    with pytest.raises((NotImplementedError, RuntimeError)):
        said.read()
