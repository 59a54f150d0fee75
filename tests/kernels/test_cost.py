"""What the head costs: matrix products counted by dispatch, and bytes alive beyond the results."""

from __future__ import annotations

import tracemalloc
import types

import pytest
import torch
from counting import Cost, Reads
from paged import paged
from torch._subclasses import FakeTensorMode

from fusedgrpo.kernels import (
    LossOptions,
    decode_attention,
    linear_logprob,
    linear_policy_loss,
    linear_sample,
)
from fusedgrpo.kernels.fused_loss import grad_from_probs
from fusedgrpo.kernels.fused_loss import op as loss_op
from fusedgrpo.kernels.launch import Tiling, tiling
from fusedgrpo.kernels.logprob import backward, vocab_pass
from fusedgrpo.kernels.logprob import op as logprob_op
from fusedgrpo.kernels.logprob.tiles import RowStatistics

N, H, V = 40, 8, 100
MIB = 2**20


def unit(rows=N):
    """1 u: one product of so many rows with the head."""
    return 2 * rows * H * V


@pytest.fixture
def small(monkeypatch):
    sizes = Tiling(rows=16, columns=32, head_columns=24, stored_rows=16)
    monkeypatch.setattr(vocab_pass, "tiling", lambda *shape: sizes)


def make(trainable=False):
    hidden = torch.randn(N, H, requires_grad=True)
    return hidden, torch.randn(V, H, requires_grad=trainable), torch.randint(0, V, (N,))


def flops(run):
    with Cost() as cost:
        run()
    return cost.flops


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("masked", [False, True])
def test_linear_logprob_takes_1_2_3_and_4_units(masked):
    mask = torch.arange(N) % 4 != 0 if masked else None
    u = unit(30 if masked else N)

    def score():
        with torch.no_grad():
            linear_logprob(*make(), mask=mask)

    def train(trainable=False, entropy=False):
        out = linear_logprob(*make(trainable), mask=mask, return_entropy=entropy)
        (out.logp.sum() + (out.entropy.sum() if entropy else 0)).backward()

    assert flops(score) == u
    assert flops(lambda: train()) == 2 * u
    assert flops(lambda: train(entropy=True)) == 3 * u, "the entropy costs one product"
    assert flops(lambda: train(trainable=True)) == 4 * u


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("greedy", [False, True])
def test_a_draw_takes_1_unit(greedy):
    hidden, weight, seeds = make()
    draw = torch.arange(N)
    assert flops(lambda: linear_sample(hidden, weight, seeds, draw, greedy=greedy)) == unit()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_linear_policy_loss_takes_1_2_and_3_units_and_skips_rows_without_gradient(level):
    options = LossOptions(importance_sampling_level=level)
    cu_seqlens = torch.tensor([0, 10, 20, 30, 40])

    def run(advantages, trainable=False, mask=None):
        inputs = make(trainable)
        out = linear_policy_loss(
            *inputs, torch.tensor(advantages), cu_seqlens, options=options, mask=mask
        )
        out.loss.backward()

    def score():
        with torch.no_grad():
            linear_policy_loss(*make(), torch.ones(4), cu_seqlens, options=options)

    some = [1.0, 0.0, -1.0, 0.0]
    mask = torch.arange(N) < 30
    assert flops(score) == unit()
    assert flops(lambda: run([1.0] * 4)) == 2 * unit()
    assert flops(lambda: run([1.0] * 4, trainable=True)) == 3 * unit()
    assert flops(lambda: run(some)) == unit() + unit(20)
    assert flops(lambda: run(some, trainable=True)) == unit() + 2 * unit(20)
    assert flops(lambda: run(some, trainable=True, mask=mask)) == unit(30) + 2 * unit(20)
    assert flops(lambda: run([0.0] * 4, trainable=True)) == unit()


@pytest.mark.usefixtures("small")
def test_a_completion_longer_than_a_chunk_is_passed_twice_at_sequence_level():
    options = LossOptions(importance_sampling_level="sequence")

    def run():
        advantages, ends = torch.tensor([1.0, 1.0]), torch.tensor([0, 10, N])  # 30 > 16 rows
        linear_policy_loss(*make(True), advantages, ends, options=options).loss.backward()

    assert flops(run) == 3 * unit(10) + 4 * unit(30)


@pytest.mark.peer
@pytest.mark.parametrize("trainable,units", [(False, 3), (True, 4)])
def test_trl_takes_one_more_with_a_frozen_head(trainable, units):
    """What the README's table says of TRL 1.16's streamed log-probs."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def run():
        hidden, weight, targets = make(trainable)
        chunked.apply(hidden, weight, None, targets, 1.0, 32, None, 1.0, ())[0].sum().backward()

    assert flops(run) == units * unit()


@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("completions", [1, 5])
def test_decoding_reads_the_keys_of_a_prompt_once_for_all_its_completions(completions, scattered):
    own = [[6] * completions, [3] * completions]
    case = paged([17, 8], own, page=4, heads=6, kv_heads=2, d=16, scattered=scattered)
    for pool in (case.keys, case.values):
        with Reads(pool) as reads:
            decode_attention(*case)
        # A copy of whole pages where they are scattered, otherwise the keys where they lie.
        prompts = 20 + 8 if scattered else 17 + 8
        assert reads.elements == (prompts + (6 + 6) * completions) * 2 * 16


def test_decoding_with_a_window_reads_no_keys_before_it():
    case = paged([17, 8], [[6, 6], [9]], page=4, heads=6, kv_heads=2, d=16, scattered=False)
    with Reads(case.keys) as reads:
        decode_attention(*case, window=8)
    assert reads.elements == (2 + 3 * 8) * 2 * 16, "two keys of one prompt; eight a row"
    with Reads(case.keys) as reads:
        decode_attention(*case, window=2)
    assert reads.elements == 3 * 2 * 2 * 16, "two a row"


# --- bytes -----------------------------------------------------------------------------------

BIG = 3584, 152_064  # Qwen2.5-7B


def silent_tiles():
    """The tile functions without their arithmetic: what is left of the Triton path are the buffers
    that it hands to its kernels."""

    def finish(softmax, target, weight, head, acc, acc_first, dlogp, dentropy, *, want_entropy):
        entropy = softmax.total if want_entropy else softmax.total[:0]
        return RowStatistics(softmax.total, softmax.z_target, entropy, softmax.total)

    def nothing(*args, **kwargs):
        pass

    names = [
        "softmax_tile",
        "moment_tile",
        "rescale",
        "logit_gradient_tile",
        "stored_gradient_tile",
    ]
    return types.SimpleNamespace(finish=finish, **dict.fromkeys(names, nothing))


def wide_products_without_data():
    with FakeTensorMode():
        x = torch.empty(2, 2, dtype=torch.bfloat16, device="cuda")
        wide = torch.empty(2, 2, device="cuda")
        try:
            torch.addmm(wide, x, x, out_dtype=torch.float32)
        except TypeError:
            return False
    return True


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Tilings, operand dtypes and kernels of a GPU, on tensors without data."""
    for module in (vocab_pass, grad_from_probs, backward):
        monkeypatch.setattr(module, "tile_functions", lambda backend: silent_tiles())
        monkeypatch.setattr(module, "operand_dtype", lambda x: x.dtype, raising=False)
    monkeypatch.setattr(vocab_pass, "tiling", lambda H, V, size, device: tiling(H, V, 2, "cuda"))


@pytest.fixture
def no_data(monkeypatch):
    """What reads data is told what it would have read: all tokens used, no coefficient 0."""
    for module in (loss_op, logprob_op):
        monkeypatch.setattr(module, "check_targets", lambda target, vocab: None)
    monkeypatch.setattr(
        loss_op,
        "used_tokens",
        lambda cu, mask, ratio, like: (torch.arange(len(like)), [0, len(like)]),
    )
    monkeypatch.setattr(
        grad_from_probs, "rows_with_gradient", lambda c: (torch.arange(len(c)), 1.0)
    )


def scratch(run, rows):
    """Most bytes alive beyond inputs, and beyond what is alive when ``run`` is through."""
    H, V = BIG
    with FakeTensorMode(allow_non_fake_inputs=True):
        # float16: the head's gradient is kept in float32 until the backward, and counts as result.
        hidden = torch.zeros(rows, H, dtype=torch.float16)
        weight = torch.zeros(V, H, dtype=torch.float16)
        targets = torch.zeros(rows, dtype=torch.int64)
        with Cost() as cost:
            kept = run(hidden, weight, targets)
    assert kept is not None
    return cost.peak - cost.kept


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("path", [pytest.param("cpu", marks=pytest.mark.slow), "gpu"])
@pytest.mark.parametrize(
    "what",
    [
        "score",
        "train",
        pytest.param("entropy", marks=pytest.mark.slow),
        "loss",
        pytest.param("loss, trainable head", marks=pytest.mark.slow),
    ],
)
def test_scratch_at_7b_shapes_stays_below_512_mib_whatever_n(path, what, request):
    if path == "gpu":
        request.getfixturevalue("as_on_a_gpu")
        if what != "score" and not wide_products_without_data():
            pytest.skip("this torch (2.11) makes no addmm(out_dtype=) of tensors without data")

    def run(hidden, weight, targets):
        hidden.requires_grad_(what != "score")
        if what.startswith("loss"):
            weight.requires_grad_(what != "loss")
            ends = torch.tensor([0, len(targets)])
            options = LossOptions(loss_type="dapo")
            return linear_policy_loss(hidden, weight, targets, torch.ones(1), ends, options=options)
        return linear_logprob(hidden, weight, targets, return_entropy=what == "entropy")

    # Two chunks of rows, then four, stand for all that 32,768 rows are.
    sizes = vocab_pass.tiling(*BIG, 4, "cpu")
    N = 2 * (sizes.stored_rows if what.startswith("loss") else sizes.rows)
    once, twice = scratch(run, N), scratch(run, 2 * N)
    assert 0 < twice < 512 * MIB, f"{twice / MIB:.0f} MiB"
    # A few floats a token for the loss; nothing like a row of hidden states.
    assert twice - once <= N * 128


def test_a_draw_holds_tiles_of_the_vocabulary_only():
    """No more for a larger vocabulary, and less than the logits would take."""
    M, H = 256, 64

    def peak(vocab):
        hidden, weight = torch.zeros(M, H), torch.zeros(vocab, H)
        seeds, positions = torch.zeros(2, M, dtype=torch.int64)
        tracemalloc.start()  # the arrays of numpy
        with Cost() as cost:
            kept = linear_sample(hidden, weight, seeds, positions)
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kept.token.shape == (M,)
        return cost.peak + arrays

    once, twice = peak(2**14), peak(2**15)
    assert abs(twice - once) < 0.01 * once and once < M * 150_000 * 4 / 2
