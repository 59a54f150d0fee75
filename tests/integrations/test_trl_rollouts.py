"""FusedGRPOTrainer(fused_rollouts=True): our decoder's completions, in TRL's runs as TRL's own."""

from __future__ import annotations

import io
import sys

import hybrids
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from tqdm import tqdm

pytest.importorskip("trl")
pytestmark = pytest.mark.peer

from trl import RLOOConfig  # noqa: E402
from trl_runs import PROMPTS, logs, make, rollout, trained  # noqa: E402

from fusedgrpo.engine.rollout import progress  # noqa: E402
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler  # noqa: E402
from fusedgrpo.engine.rollout.sampler import SamplingParams  # noqa: E402
from fusedgrpo.engine.seeding import derive  # noqa: E402
from fusedgrpo.errors import ConfigError, ModelError  # noqa: E402
from fusedgrpo.integrations.trl import FusedGRPOTrainer, FusedRLOOTrainer  # noqa: E402
from fusedgrpo.integrations.trl_rollouts import grouped  # noqa: E402
from fusedgrpo.models.adapters.merged_weights import MergedWeights  # noqa: E402
from fusedgrpo.models.adapters.rollout_weights import AdapterWeights  # noqa: E402
from fusedgrpo.models.policy import Policy  # noqa: E402

OURS = {"fused_rollouts": True}
LORA = {"peft_config": LoraConfig(target_modules="all-linear", r=2)}
GROUPS = [[5, 6, 7], [8], [9, 10]]
FOUR_EACH = [ids for ids in GROUPS for _ in range(4)]


def completions(trainer, prompts=FOUR_EACH, mode="train"):
    trainer.model.train(mode == "train")
    ids, logprobs = trainer._generate_single_turn(prompts, None, {}, 4)
    assert logprobs is None
    return ids


def sampled(trainer, monkeypatch):
    """What the decoder is asked, and what it answers, in lists that grow."""
    calls = []
    sampler = trainer._rollouts._sampler
    sample = sampler.sample

    def watched(prompts, n, params, seed):
        groups = sample(prompts, n, params, seed)
        calls.append((prompts, n, params, groups))
        return groups

    monkeypatch.setattr(sampler, "sample", watched)
    return calls


OPTIONS = {
    "defaults": ({}, {}),
    "filters": (
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2},
    ),
    "generation_kwargs have the last word": (
        {"top_k": 9, "generation_kwargs": {"top_k": 0, "temperature": 0.5, "max_new_tokens": 5}},
        {"temperature": 0.5, "max_new_tokens": 5},
    ),
    "greedy": ({"generation_kwargs": {"do_sample": False}}, {"greedy": True}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_tokens_are_the_decoders(tmp_path, name):
    options, params = OPTIONS[name]
    trainer = make(FusedGRPOTrainer, tmp_path, seed=3, **OURS, **options)
    found = completions(trainer)
    alone = DecoderSampler(Policy(tiny.model("Llama", scale=6.0)), tiny.tokenizer(), [tiny.EOS])
    asked = SamplingParams(**{"max_new_tokens": 8, **params})
    groups = alone.sample(GROUPS, 4, asked, derive(3, "rollout", "train", 0, 0, 0))
    assert found == [list(c.ids) for group in groups for c in group.completions]
    assert len(found) == 12 and max(map(len, found)) == asked.max_new_tokens


def test_every_end_token_of_the_model_ends_a_completion(tmp_path):
    model = tiny.model("Llama", scale=6.0)
    model.generation_config.eos_token_id = [7, 20]
    found = completions(make(FusedGRPOTrainer, tmp_path, model=model, **OURS), [[5]] * 40)
    ends = {tiny.EOS, 7, 20}
    assert {ids[-1] for ids in found} >= ends
    assert all(not ends & set(ids[:-1]) for ids in found)
    assert all(ids[-1] in ends or len(ids) == 8 for ids in found)


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("fused_loss", [False, True])
def test_a_run_samples_from_the_policy_of_the_moment(tmp_path, monkeypatch, adapter, fused_loss):
    """The decoder's log-probs are those that TRL asks of our forward, after updates as well."""
    options = {"fused_loss": fused_loss, "num_iterations": 2, "max_steps": 4, **adapter}
    before = logs(trained(FusedGRPOTrainer, tmp_path, **options))
    trainer = make(FusedGRPOTrainer, tmp_path, **options, **OURS)
    calls, gaps = sampled(trainer, monkeypatch), []
    score = trainer._generate_and_score_completions

    def checked(inputs):
        batch = score(inputs)
        _, _, _, groups = calls[-1]
        mine = [c.logp for group in groups for c in group.completions]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, batch["completion_ids"].shape[1]
            )
        gaps.append((logps[batch["completion_mask"].bool()] - torch.cat(mine)).abs().max().item())
        assert "sampling_per_token_logps" not in batch
        return batch

    monkeypatch.setattr(trainer, "_generate_and_score_completions", checked)
    weights = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    trains = [p for p in trainer.model.parameters() if p.requires_grad]
    assert not any(map(torch.equal, weights, trains))
    assert len(gaps) == 2 and max(gaps) < 1e-5, gaps
    assert [(len(prompts), n) for prompts, n, _, _ in calls] == [(2, 4)] * 2
    assert [list(row) for row in logs(trainer)] == [list(row) for row in before]
    lengths = [len(c.ids) for group in calls[0][3] for c in group.completions]
    row = trainer.state.log_history[0]
    assert row["completions/mean_length"] == sum(lengths) / len(lengths)
    assert trainer.model.training


@pytest.mark.parametrize("weights", [AdapterWeights, MergedWeights])
def test_a_run_of_mixed_precision_samples_in_it(tmp_path, monkeypatch, weights):
    option = {} if weights is AdapterWeights else {"rollout_weights": "merged"}
    trainer = make(FusedGRPOTrainer, tmp_path, bf16=True, max_steps=1, **LORA, **OURS, **option)
    calls = sampled(trainer, monkeypatch)
    trainer.train()
    sampler = trainer._rollouts._sampler
    assert len(calls) == 1 and sampler.policy.dtype == torch.float32
    assert type(sampler.weights) is weights
    kept = {family.kept.dtype for family in sampler.weights._families}
    assert kept == {torch.bfloat16}


def test_a_resumed_run_goes_on_as_it_would_have(tmp_path):
    """Evaluation in between included, whose completions are ours as well."""
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
        "eval_steps": 1, "eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]}),
        "per_device_eval_batch_size": 4, "num_generations_eval": 2, **OURS,
    }  # fmt: skip
    whole = trained(FusedGRPOTrainer, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = trained(
        FusedGRPOTrainer, tmp_path / "resumed", **options, resume_from_checkpoint=checkpoint
    )
    assert any("eval_reward" in row for row in logs(whole))
    assert logs(resumed)[:-1] == logs(whole)[:-1]
    for mine, others in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, others)


def test_rollouts_differ_by_seed_step_number_mode_and_process(tmp_path):
    def first(**options):
        return completions(make(FusedGRPOTrainer, tmp_path, **OURS, **options))

    trainer = make(FusedGRPOTrainer, tmp_path, **OURS)
    state = torch.get_rng_state()
    found = [completions(trainer)]
    assert torch.equal(torch.get_rng_state(), state)
    found.append(completions(trainer))
    found.append(completions(trainer, mode="eval"))
    trainer.state.global_step = 1
    found.append(completions(trainer))
    trainer.accelerator.state._shared_state["process_index"] = 1
    try:
        found.append(completions(trainer))
    finally:
        trainer.accelerator.state._shared_state["process_index"] = 0
    found.append(first(seed=7))
    assert len({str(ids) for ids in found}) == len(found)
    assert first() == found[0]


def test_equal_prompts_are_read_together():
    a, b, c = [1, 2], [1], [2, 1]
    assert grouped([a] * 4 + [b] * 4 + [c] * 4) == ([a, b, c], 4)
    assert grouped([a] * 4 + [b] * 8) == ([a, b, b], 4)
    assert grouped([a] * 2 + [b] * 4) == ([a, b, b], 2), "a process that has half of a group"
    assert grouped([tuple(a), a]) == ([a], 2)
    assert grouped([a, b, a]) == ([a, b, a], 1)


def test_prompts_are_read_in_passes_of_the_size_of_training(tmp_path):
    trainer = make(FusedGRPOTrainer, tmp_path, **OURS)
    assert trainer._rollouts._tokens(GROUPS, SamplingParams(max_new_tokens=8)) == 4 * (3 + 8)
    trainer.tokens_per_microbatch = 5
    completions(trainer)
    assert trainer._rollouts._sampler.execution.oom_retry.tokens == 5


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_rollout_shows_itself_below_trls_bar_or_in_the_log(tmp_path, monkeypatch, caplog):
    def said(**options):
        monkeypatch.setattr(sys, "stderr", Terminal())
        trainer = make(FusedGRPOTrainer, tmp_path, **OURS, **options)
        bar = tqdm(total=3, file=sys.stderr)
        before = len(sys.stderr.getvalue())
        completions(trainer)
        text = sys.stderr.getvalue()[before:]
        bar.close()
        return text

    monkeypatch.setattr(progress, "OVERWRITTEN", (0.0, 0.0))
    text = said()
    assert "\n" in text and "sampling: 12 tokens, 11 live, 0 waiting" in text
    assert text.rstrip().endswith("\x1b[A") and "sampling" not in text.split("\r")[-1]
    with caplog.at_level("INFO", "fusedgrpo"):
        monkeypatch.setattr(progress, "LOGGED", (0.0, 1e9))
        assert said(disable_tqdm=True) == ""
    assert [m for m in caplog.messages if m.startswith("sampling: 12 tokens, ")]


def tool(x: int) -> int:
    """A tool.

    Args:
        x: a number.
    """
    return x


REFUSED = {
    "use_vllm": {"use_vllm": True},
    "use_transformers_continuous_batching": {"use_transformers_paged": True},
    "tools": {"tools": [tool]},
    "environment_factory": {"environment_factory": lambda: None},
    "rollout_func": {"rollout_func": rollout},
    "cache_implementation": {"cache_implementation": "static"},
    "cast_lm_head_to_fp32": {"cast_lm_head_to_fp32": True},
    r"generation_kwargs\['num_beams'\], generation_kwargs\['eos_token_id'\]": {
        "generation_kwargs": {"num_beams": 2, "top_k": 3, "eos_token_id": 5},
    },
}


@pytest.mark.filterwarnings("ignore:.*use_transformers_paged:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_options_of_other_rollouts_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"does not go with {name}: leave fused_rollouts out"):
        make(FusedGRPOTrainer, tmp_path, **OURS, **REFUSED[name])


def test_weights_to_sample_from_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'fast': expected 'adapter' or 'merged'"):
        make(FusedGRPOTrainer, tmp_path, rollout_weights="fast", **OURS)
    with pytest.raises(ConfigError, match="give both or neither"):
        make(FusedGRPOTrainer, tmp_path, rollout_weights="merged")
    with pytest.raises(ConfigError, match="this model has no adapter"):
        make(FusedGRPOTrainer, tmp_path, rollout_weights="merged", **OURS)
    with pytest.raises(ConfigError, match="adapters of another kind"):
        dora = LoraConfig(r=4, use_dora=True, target_modules="all-linear")
        make(FusedGRPOTrainer, tmp_path, rollout_weights="merged", peft_config=dora, **OURS)


def test_what_the_model_adds_to_generate_is_refused(tmp_path):
    model = tiny.model("Llama", scale=6.0)
    model.generation_config.suppress_tokens = [5]
    model.generation_config.num_beams = 1
    model.generation_config.temperature = 0.3  # TRL's takes its place
    with pytest.raises(ConfigError, match=r"generation_config \(suppress_tokens=\[5\]\): unset"):
        make(FusedGRPOTrainer, tmp_path, model=model, **OURS)


def test_models_that_the_decoder_is_not_for_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"can be forwarded packed, and \w+ cannot: leave fused"):
        make(FusedGRPOTrainer, tmp_path, model=hybrids.model("LFM2"), **OURS)
    learned = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match=r"PromptTuningConfig learns a prompt.*; leave fused"):
        make(FusedGRPOTrainer, tmp_path, peft_config=learned, **OURS)

    def refuse(*args, **kwargs):
        raise ModelError("other log-probs")

    monkeypatch.setattr("fusedgrpo.engine.rollout.decoder_sampler.check_decoder", refuse)
    with pytest.raises(ModelError, match="does not give the log-probs of LlamaForCausalLM's"):
        make(FusedGRPOTrainer, tmp_path, **OURS)


def test_sharded_weights_rloo_and_images_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="fused_rollouts=True is for GRPO"):
        make(FusedRLOOTrainer, tmp_path, config=RLOOConfig, **OURS)
    trainer = make(FusedGRPOTrainer, tmp_path, **OURS)
    with pytest.raises(ConfigError, match=r"more than text \(pixel_values\)"):
        trainer._generate_single_turn([[5]], [["an image"]], {"pixel_values": [0]}, 4)
    with pytest.raises(ModelError, match="A prompt without tokens"):
        completions(trainer, [[5], []])
    monkeypatch.setattr(FusedGRPOTrainer, "_sharded", True)
    with pytest.raises(ConfigError, match=r"fused_rollouts=True with sharded weights"):
        make(FusedGRPOTrainer, tmp_path, **OURS)
