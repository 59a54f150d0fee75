"""The rollout window: whole groups per step, and a bitwise round trip through a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fusedgrpo.engine.checkpoint_files import read_json, read_tensors, write_json, write_tensors
from fusedgrpo.engine.rollout.buffer import RolloutBuffer, sampler_logp
from fusedgrpo.engine.rollout.types import Completion, Group, Rollout


def rollout(groups: int, size: int = 2) -> Rollout:
    made = []
    for g in range(groups):
        completions = []
        for c in range(size):
            ids = tuple(range(10 * g, 10 * g + 1 + c))
            logp = None if (g, c) == (1, 0) else torch.randn(len(ids))
            reason = "length" if c == 1 else "stop"
            completions.append(Completion(ids, f"té\ud800xt {g} {c}", reason, logp))  # type: ignore[arg-type]
        made.append(Group(100 + g, (g, g + 1), tuple(completions)))
    return Rollout(tuple(made))


def window(
    groups: int = 3,
    steps: int = 2,
    iterations: int = 2,
    *,
    sampled: Rollout | None = None,
    **fields: object,
) -> RolloutBuffer:
    sampled = rollout(groups) if sampled is None else sampled
    tokens = sum(c.own_tokens for c in sampled.completions())
    return RolloutBuffer(
        sampled,
        torch.randn(2 * groups),
        steps,
        iterations,
        old_logp=torch.arange(tokens).float(),
        ref_logp=torch.randn(tokens),
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("groups", "steps"), [(1, 1), (3, 2), (5, 3), (4, 4), (7, 2)])
def test_each_iteration_trains_on_every_group_exactly_once(groups: int, steps: int) -> None:
    w = window(groups, steps, iterations=2)
    everything = [(c.ids, w.rollout.groups[g].prompt_ids) for c, g in zip(
        w.rollout.completions(), w.rollout.group_ids, strict=True)]  # fmt: skip
    for _ in range(2):
        seen = []
        for _ in range(steps):
            assert not w.finished
            samples = w.next_samples(mask_truncated=False)
            assert samples and len(samples) % 2 == 0
            seen += [(s.completion_ids, s.prompt_ids) for s in samples]
            w.done += 1
        assert seen == everything
    assert w.finished


def test_every_sample_gets_its_own_tokens_and_advantage() -> None:
    w = window(3, 1)
    samples = w.next_samples(mask_truncated=False)
    old = torch.cat([s.old_logp for s in samples])  # type: ignore[misc]
    assert torch.equal(old, w.old_logp)
    assert [s.advantage for s in samples] == w.advantages.tolist()
    for sample, completion in zip(samples, w.rollout.completions(), strict=True):
        assert sample.sampler_logp is completion.logp
        assert sample.sampler_weight is None
        assert sample.old_logp is not None and len(sample.old_logp) == len(completion.ids)


def conversation() -> Rollout:
    """Three groups, the second of which has answers of tools in it."""
    plain = rollout(3)
    message = {"role": "assistant", "content": "té", "tool_calls": [{"function": {"name": "f"}}]}
    several = Completion(
        (7, 8, 9, 10, 11, 12),
        "text",
        "stop",
        torch.randn(3),
        ((1, 3), (4, 5)),
        (message, {"role": "tool", "name": "f", "content": "4"}),
        calls=2,
        failures=1,
    )
    second = Group(101, (4, 5), (several, plain.groups[1].completions[1]))
    return Rollout((plain.groups[0], second, plain.groups[2]))


def test_per_token_values_are_of_the_tokens_that_the_policy_wrote() -> None:
    w = window(3, 1, sampled=conversation())
    samples = w.next_samples(mask_truncated=False)
    assert [len(s.old_logp) for s in samples] == [1, 2, 3, 2, 1, 2]  # type: ignore[arg-type]
    assert torch.equal(torch.cat([s.old_logp for s in samples]), w.old_logp)  # type: ignore[arg-type]
    assert samples[2].given == ((1, 3), (4, 5))
    assert [w.row_at(token) for token in (2, 3, 7, 8)] == [100, 101, 101, 102]


def test_some_completions_are_a_window_of_their_own() -> None:
    w = window(3, 2)
    assert [w.indices(part) for part in (0, 1)] == [[0, 1], [2, 3, 4, 5]]
    few = w.only([1, 4, 5])
    everything = w.part(0, mask_truncated=False)[0] + w.part(1, mask_truncated=False)[0]
    (samples, _), wanted = few.part(0, mask_truncated=False), [everything[i] for i in (1, 4, 5)]
    assert [(s.pair, s.advantage) for s in samples] == [(s.pair, s.advantage) for s in wanted]
    assert [group.row for group in few.rollout.groups] == [100, 102]
    assert (few.steps, few.iterations, few.old_logp) == (1, 1, None)


def test_completions_cut_by_the_limit_leave_the_loss_if_asked() -> None:
    w = window(2, 1)
    assert all(s.in_loss for s in w.next_samples(mask_truncated=False))
    assert [s.in_loss for s in w.next_samples(mask_truncated=True)] == [True, False] * 2


@pytest.mark.parametrize("sampled", [rollout(3), conversation()], ids=["plain", "conversation"])
def test_a_window_comes_back_from_a_checkpoint_bit_for_bit(
    tmp_path: Path, sampled: Rollout
) -> None:
    before = window(
        sampled=sampled,
        sampler_weight=None,
        rewards=torch.arange(6).float(),
        metrics={"reward": 0.1 + 0.2, "kl": math.nan, "n": 3},
        done=1,
    )
    tensors, values = before.state()
    write_tensors(tmp_path / "w.safetensors", tensors)
    write_json(tmp_path / "w.json", values)
    after = RolloutBuffer.from_state(
        read_tensors(tmp_path / "w.safetensors"), read_json(tmp_path / "w.json")
    )
    for name in ("advantages", "old_logp", "ref_logp", "rewards"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    assert after.sampler_weight is None
    assert (after.steps, after.iterations, after.done) == (2, 2, 1)
    assert repr(after.metrics) == repr(before.metrics)
    for one, other in zip(after.rollout.groups, before.rollout.groups, strict=True):
        assert (one.row, one.prompt_ids) == (other.row, other.prompt_ids)
    pairs = zip(after.rollout.completions(), before.rollout.completions(), strict=True)
    for one, other in pairs:
        assert (one.ids, one.text, one.finish_reason) == (
            other.ids,
            other.text,
            other.finish_reason,
        )
        assert (one.given, one.messages) == (other.given, other.messages)
        assert (one.calls, one.failures) == (other.calls, other.failures)
        assert (one.logp is None) == (other.logp is None)
        assert one.logp is None or torch.equal(one.logp, other.logp)
    assert [s.completion_ids for s in after.next_samples(mask_truncated=True)] == [
        s.completion_ids for s in before.next_samples(mask_truncated=True)
    ]


def test_an_unknown_sampler_logp_is_nan_for_its_own_tokens() -> None:
    completions = [
        Completion((1, 2), "", "stop", torch.tensor([-1.0, -2.0])),
        Completion((3,), "", "stop", None),
    ]
    flat = sampler_logp(completions)
    assert flat[:2].tolist() == [-1.0, -2.0] and flat[2:].isnan().all() and len(flat) == 3
    assert sampler_logp([]).shape == (0,)
