"""The CUDA twin: what it refuses, counts and computes, and a policy on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cuda_twin.process import found

# launches, waits, copies, casts of each line of ``counted`` in scenarios/basics.py.
COSTS = {
    "an operator": (1, 0, 0, 0),
    "a view": (0, 0, 0, 0),
    "memory": (0, 0, 0, 0),
    "on the host": (0, 0, 0, 0),
    "item": (1, 1, 0, 0),
    "a truth": (0, 1, 0, 0),
    "a list": (0, 1, 1, 0),
    "where": (1, 1, 0, 0),
    "a mask": (2, 1, 0, 0),
    "to the host": (0, 1, 1, 0),
    "from numbers": (0, 1, 1, 0),
    "pageable": (0, 1, 1, 0),
    "pageable, not waited for": (0, 0, 1, 0),
    "pinned": (0, 0, 1, 0),
    "pinned, waited for": (0, 1, 1, 0),
    "into pinned memory": (0, 0, 1, 0),
    "into pageable memory": (0, 1, 1, 0),
    "an index of the host": (1, 1, 1, 0),
    "a cast": (1, 0, 0, 1),
    "no cast": (0, 0, 0, 0),
    "an event a step ago": (1, 0, 0, 0),
    "an event of now": (0, 1, 0, 0),
    "synchronize": (0, 1, 0, 0),
}


@pytest.fixture(scope="module")
def basics() -> dict[str, Any]:
    return found(Path(__file__).parent / "scenarios" / "basics.py")


def test_tensors_are_where_their_storage_is(basics):
    told = basics["devices"]
    assert told["values"] == [[0, 1, 2], [3, 4, 5]]
    there = ("views", "results", "made", "made like", "a module's", "copied", "numbers of the host")
    assert {told[name] for name in there} == {"cuda:0"}
    assert told["back"] == "cpu"


def test_what_mixes_devices_is_refused(basics):
    told = basics["devices"]["refused"]
    assert "found at least two devices" in told["sum"]
    assert "found at least two devices" in told["gathered"]
    assert "can't convert cuda:0" in told["numpy"]
    assert "cannot be accessed from Triton" in told["a kernel"]


@pytest.mark.parametrize("line", COSTS)
def test_what_a_line_costs(basics, line):
    assert tuple(basics["counted"]["lines"][line].values()) == COSTS[line]


def test_a_cost_is_told_with_the_line_that_asked(basics):
    (told,) = basics["counted"]["where"]
    assert told.startswith("_local_scalar_dense @ tests/twin/scenarios/basics.py:")


def test_gradients_go_back_to_where_their_tensors_are(basics):
    told = basics["gradients_cross"]
    assert told == {"host": "cpu", "device": "cuda:0", "grad": [2, 2, 2]}


def test_memory_that_nobody_wrote_is_not_a_number(basics):
    assert basics["unwritten"] is True


def test_casts_of_weights_that_do_not_train_are_told_apart(basics):
    assert basics["frozen_casts"] == ["float32 to bfloat16", "frozen float32 to bfloat16"]


def test_gradients_of_a_row_that_is_taken_twice_are_summed_in_float64(basics):
    assert basics["gathered"] == [[1 + 1e-12] * 2, [1.0] * 2]


def test_products_of_16_bit_operands_are_float32(basics):
    told = basics["products"]
    for name in ("wide", "added"):
        rows = zip(told[name], told["exact"], strict=True)
        assert [a == pytest.approx(b, abs=1e-5) for a, b in rows] == [True] * 5
    assert "out_dtype torch.bfloat16" in told["narrow"]


def test_ragged_attention_is_that_of_each_sequence(basics):
    told = basics["varlen"]
    for off in told["off"].values():
        assert max(off) < 0.03  # of results around 1, in bfloat16
    assert "max_q and max_k that no sequence exceeds" in told["short"]
    assert "one dtype of 16 bits" in told["wide"]


def test_a_policy_gives_the_log_probs_and_gradients_of_float32_on_the_cpu(basics):
    told = basics["policy"]
    assert told["layout"] == "shared"
    assert told["logp"] < 0.02
    assert told["grad"] < 0.02
    launched = " ".join(told["counts"]["launches"])
    assert "torch_attn::_varlen_attn_backward" in launched and "triton::" in launched
