"""The choice of a token, and the memory that it takes."""

from __future__ import annotations

import torch

from fusedgrpo.engine.memory.storage_tracker import StorageTracker, fake_tensors
from fusedgrpo.models.token_chooser import BYTES_PER_LOGIT, TokenChooser


def test_the_ends_of_the_uniform_range_choose_possible_tokens() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]] * 2)
    chooser = TokenChooser([0, 1], 1, torch.device("cpu"))
    chooser.uniform_BT = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    chosen = chooser(torch.zeros(2, 1), scores).argmax(-1)
    assert chosen.tolist() == [1, 3]
    torch.testing.assert_close(chooser.logp[0], scores.log_softmax(-1)[[0, 1], chosen])


def test_the_bytes_of_a_logit_are_those_that_choosing_takes() -> None:
    rows, vocabulary = 8, 50_000
    chooser = TokenChooser([0] * rows, 1, torch.device("cpu"))
    with fake_tensors(StorageTracker()) as tracker:
        given = torch.zeros(rows, vocabulary, dtype=torch.bfloat16)  # by the model
        copied = given.float()  # by generate
        chooser(torch.zeros(rows, 1), copied / 0.7)
    beside = 4096 * 4  # a few numbers per row
    assert 0 <= tracker.peak.bytes - rows * vocabulary * BYTES_PER_LOGIT < beside
