"""FusedGRPOTrainer beside its numbers: what is forwarded and how, and what is refused."""

from __future__ import annotations

import itertools

import forward_only
import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytest.importorskip("trl")
pytestmark = pytest.mark.peer

from conformance import configure, hand_made, step  # noqa: E402
from peft import PromptEncoderConfig, PromptTuningConfig  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_runs import assert_same_runs, make, trained  # noqa: E402

from fusedgrpo.errors import ConfigError, ModelError  # noqa: E402
from fusedgrpo.integrations import trl as integration  # noqa: E402
from fusedgrpo.integrations import trl_version  # noqa: E402
from fusedgrpo.integrations.trl import FusedGRPOTrainer  # noqa: E402
from fusedgrpo.integrations.trl_batches import shuffle_groups  # noqa: E402


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

    def build(pairs, device, layout, **options):
        built.append((len({tuple(p) for p, _ in pairs}), len(pairs), layout))
        return original(pairs, device, layout, **options)

    monkeypatch.setattr(integration.PackedBatch, "build", build)
    fused.train()
    assert built and all(entry[2] == "shared" and entry[0] == 1 for entry in built)


def test_bad_arguments_and_other_versions_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="shared_prompt='yes'"):
        make(FusedGRPOTrainer, tmp_path, shared_prompt="yes")
    monkeypatch.setattr(trl_version.host, "package_version", lambda name: "1.17.0")
    with pytest.raises(ImportError, match=r"tested with TRL 1.16, this is 1.17.0.*pip install"):
        trl_version.import_trl()


def test_a_changed_signature_is_refused(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, inputs: None)
    with pytest.raises(ImportError, match=r"GRPOTrainer._compute_loss takes \(inputs\)"):
        trl_version.import_trl()


@pytest.mark.parametrize("fused_loss", [False, True])
def test_a_mixture_of_experts_has_ratios_of_one_in_bfloat16(tmp_path, monkeypatch, fused_loss):
    """With its router's loss at the default weight: policy, old policy and reference take one
    route, so on weights that nothing has changed they agree."""
    model = tiny.mixture()
    model.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    fused = make(
        FusedGRPOTrainer, tmp_path, model=model, bf16=True, learning_rate=0.0, beta=0.1,
        steps_per_generation=2, num_iterations=2, max_steps=4, fused_loss=fused_loss,
    )  # fmt: skip
    gaps = []
    original = fused._get_per_token_logps_and_entropies

    def watched(*args, **kwargs):
        logps, *others = original(*args, **kwargs)
        if torch.is_grad_enabled():
            gaps.append((logps - inputs[-1]["old_per_token_logps"]).detach().abs().max().item())
            gaps.append((logps - inputs[-1]["ref_per_token_logps"]).detach().abs().max().item())
        return logps, *others

    inputs = []
    loss = fused._compute_loss
    monkeypatch.setattr(
        fused, "_compute_loss", lambda model, batch: inputs.append(batch) or loss(model, batch)
    )
    monkeypatch.setattr(fused, "_get_per_token_logps_and_entropies", watched)
    fused.train()
    assert fused.aux_loss_enabled and not fused._said
    assert all("aux_loss" in row for row in fused.state.log_history[:-1])
    assert fused.accelerator.mixed_precision == "bf16"
    assert len(gaps) == 16 and max(gaps) == 0, gaps


def test_a_router_of_an_unknown_kind_takes_trls_forward_for_all_log_probs(
    tmp_path, monkeypatch, caplog
):
    def refuse(*args):
        raise ModelError("no such loss.")

    monkeypatch.setattr(integration, "probe_router", refuse)
    fused = make(FusedGRPOTrainer, tmp_path, model=tiny.mixture(), num_iterations=2)
    assert "TRL's own forward pass is used: no such loss." in caplog.text
    assert fused._packed_forward(fused.model) is None
    fused.train()
    assert fused.state.log_history[0]["aux_loss"] > 0


def test_an_operator_without_a_backward_pass_ends_the_run(tmp_path):
    model = forward_only.put_into(tiny.model("Llama", scale=6.0))
    before = [p.clone() for p in model.parameters()]
    fused = make(FusedGRPOTrainer, tmp_path, model=model)
    with pytest.raises(ModelError, match=r"fusedgrpo_tests::forward_only has no backward pass"):
        fused.train()
    assert all(map(torch.equal, before, model.parameters()))


def test_layers_of_4_bits_keep_their_backward_pass(tmp_path, monkeypatch):
    """bitsandbytes would repack them while TRL samples, on a CPU with bfloat16 instructions."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
    directory = tiny.save(tmp_path / "model", tiny.model("Llama", **sizes))
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )  # fmt: skip
    adapter = LoraConfig(target_modules="all-linear", r=2)
    fused = make(FusedGRPOTrainer, tmp_path, model=model, peft_config=adapter, max_steps=1)
    fused.train()
    layer = fused.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


PROMPTS_THAT_LEARN = {
    "PromptTuningConfig": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PromptEncoderConfig": PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("kind", PROMPTS_THAT_LEARN)
@pytest.mark.slow
def test_adapters_that_learn_a_prompt_train_as_with_trl(tmp_path, caplog, kind):
    """They are around the model, so all log-probs take TRL's forward, which is said."""
    runs = []
    for cls in (GRPOTrainer, FusedGRPOTrainer):
        own = {} if cls is GRPOTrainer else {"group_rows": False}
        options = {"peft_config": PROMPTS_THAT_LEARN[kind], "beta": 0.1, "num_iterations": 2}
        torch.manual_seed(0)
        runs.append(trained(cls, tmp_path / cls.__name__, max_steps=2, **options, **own))
    assert f"TRL's own forward pass is used: {kind} learns a prompt" in caplog.text
    assert_same_runs(*runs)
