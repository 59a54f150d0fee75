"""FusedGRPOTrainer beside its numbers: what is forwarded and how, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("trl")
pytestmark = pytest.mark.peer

from conformance import configure, hand_made, step  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_runs import make  # noqa: E402

from fusedgrpo.errors import ConfigError  # noqa: E402
from fusedgrpo.integrations import trl as integration  # noqa: E402
from fusedgrpo.integrations.trl import FusedGRPOTrainer, shuffle_groups  # noqa: E402


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    path = tmp_path_factory.mktemp("trl")
    return make(GRPOTrainer, path), make(FusedGRPOTrainer, path)


def test_rows_without_gradient_are_scored_without_one(trainers, monkeypatch):
    fused = trainers[1]
    settings = {"advantages": "some zero", "mask_truncated_completions": True}
    configure(fused, "dapo", "token", settings)
    scored = []
    original = fused._score
    monkeypatch.setattr(
        fused,
        "_score",
        lambda model, pairs, rows, entropy: (
            scored.append((sorted(rows), torch.is_grad_enabled())),
            original(model, pairs, rows, entropy),
        )[1],
    )
    step(fused, hand_made(settings))
    assert scored == [([1, 3, 4, 5, 7], True), ([0, 2, 6], False)]


def test_a_batch_in_which_nothing_has_a_gradient_stays_connected(trainers):
    for trainer in trainers:
        configure(trainer, "dapo", "token", {})
    inputs = hand_made({"advantages": "all zero"})
    loss, gradient, _ = step(trainers[1], inputs)
    assert loss == step(trainers[0], inputs)[0] == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_groups_stay_together_and_are_still_shuffled():
    prompts = torch.tensor([[0, 1], [2, 3], [4, 5]]).repeat_interleave(4, 0)
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [1, 1]]).repeat_interleave(4, 0),
        "row": torch.arange(12),
        "names": [str(i) for i in range(12)],
        "num_items_in_batch": torch.tensor(5),
        "absent": None,
    }
    orders = []
    for seed in range(20):
        torch.manual_seed(seed)
        out = shuffle_groups(batch)
        rows = out["row"].tolist()
        assert sorted(rows) == list(range(12)) and [str(i) for i in rows] == out["names"]
        assert torch.equal(out["prompt_ids"], prompts[rows]) and out["absent"] is None
        groups = [row // 4 for row in rows]
        assert [g for g, _ in itertools.groupby(groups)] == list(dict.fromkeys(groups))
        orders.append(tuple(rows))
    assert len(set(orders)) == 20


def test_prompts_are_shared_within_a_micro_batch(tmp_path, monkeypatch):
    fused = make(FusedGRPOTrainer, tmp_path, max_steps=1)
    assert fused._packed_forward(fused.model).layout == "shared"  # and the question is asked
    built = []
    original = integration.PackedBatch.build

    def build(pairs, device, layout):
        built.append((len({tuple(p) for p, _ in pairs}), len(pairs), layout))
        return original(pairs, device, layout)

    monkeypatch.setattr(integration.PackedBatch, "build", build)
    fused.train()
    assert built and all(entry[2] == "shared" and entry[0] == 1 for entry in built)


def test_bad_arguments_and_other_versions_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="shared_prompt='yes'"):
        make(FusedGRPOTrainer, tmp_path, shared_prompt="yes")
    monkeypatch.setattr(integration.importlib.metadata, "version", lambda name: "1.17.0")
    with pytest.raises(ImportError, match=r"tested with TRL 1.16, this is 1.17.0.*pip install"):
        integration._import_trl()


def test_a_changed_signature_is_refused(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, inputs: None)
    with pytest.raises(ImportError, match=r"GRPOTrainer._compute_loss takes \(inputs\)"):
        integration._import_trl()
