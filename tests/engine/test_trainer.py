"""Whole runs of a tiny model: the trajectory is what it should be, and stays what it was."""

from __future__ import annotations

import copy
import dataclasses
import json

import forward_only
import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine import learner as update
from fusedgrpo.engine import scoring
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import (
    CheckpointError,
    ConfigError,
    ModelError,
    NonFiniteError,
    RewardError,
)
from fusedgrpo.kernels.reference import reference_group_advantages
from fusedgrpo.models import loading
from fusedgrpo.models import packing_probe as layout

PROMPTS = [
    {"prompt": " ".join(f"w{4 + (i * j) % 30}" for j in range(1, 3 + i % 4))} for i in range(7)
]
TIMES = ("time/", "step_time", "tokens_per_second", "memory/")


def even_ids(completion_ids, **kwargs):
    """Rewards that differ between completions of an untrained model."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def config(tmp_path, **changes):
    options = {
        "output_dir": str(tmp_path / "run"),
        "num_generations": 4,
        "prompts_per_step": 2,
        "max_completion_length": 6,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "bf16": False,
    }
    return GRPOConfig(**options | changes)


def trainer(tmp_path, *, reward_funcs=even_ids, data=None, model=None, **changes):
    return GRPOTrainer(
        model=tiny.model() if model is None else model,
        reward_funcs=reward_funcs,
        args=config(tmp_path, **changes),
        train_dataset=PROMPTS if data is None else data,
        tokenizer=tiny.tokenizer(),
    )


def rows_of(run):
    """Metrics without what the clock says."""
    rows = read_metrics(f"{run.args.output_dir}/metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def weights(run):
    return torch.cat([p.detach().flatten() for _, p in run.policy.trainable()])


def trained(tmp_path, **changes):
    run = trainer(tmp_path, **changes)
    run.train()
    return run


def test_it_learns(tmp_path):
    run = trained(tmp_path, max_steps=30, learning_rate=3e-2, lr_scheduler_type="constant")
    rewards = [row["reward"] for row in rows_of(run)]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1


@pytest.mark.pictures
def test_the_output_directory_is_complete(tmp_path):
    run = trained(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1, beta=0.1)
    out = tmp_path / "run"
    for name in (
        "config.resolved.yaml", "metrics.jsonl", "report.html", "run.log", "plots/reward.png",
        "plots/reward_std.png", "plots/kl.png", "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json", "checkpoints/step-000004/manifest.json",
    ):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    assert not (out / "run.lock").exists()
    assert not (out / "checkpoints" / "step-000002").exists()
    again = GRPOConfig.from_file(out / "config.resolved.yaml")
    assert dataclasses.replace(again, model_name_or_path=None) == dataclasses.replace(
        run.args, model_name_or_path=None
    )
    records = [json.loads(line) for line in (out / "completions/step-000001.jsonl").open()]
    assert len(records) == 8
    assert {"prompt", "completion", "reward", "advantage", "finish_reason"} <= set(records[0])


def test_the_adapter_is_loadable_by_peft_as_it_is(tmp_path):
    from peft import PeftModel

    run = trained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "run" / "adapter"))
    ids = torch.tensor([[5, 6, 7]])
    with run.policy.scoring(), torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, run.policy.model(ids).logits)


def test_twice_the_same_run_to_the_last_bit(tmp_path, precision):
    options = {"lora_dropout": 0.1, "beta": 0.1, "num_iterations": 2, "bf16": None}
    models = tiny.model(), tiny.model()
    torch.manual_seed(1)
    first = trained(tmp_path / "a", model=models[0], **options)
    torch.manual_seed(2)  # what somebody else draws must not matter
    second = trained(tmp_path / "b", model=models[1], **options)
    assert first.policy.precision == precision
    assert rows_of(first) == rows_of(second)
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo", "sapo"])
def test_the_cut_into_micro_batches_does_not_change_the_run(tmp_path, loss_type):
    # Adam's default epsilon of 1e-8 would make full steps of the rounding of gradients that are 0.
    same = {"loss_type": loss_type, "beta": 0.1, "adam_epsilon": 1e-3}
    whole = trained(tmp_path / "a", **same)
    cut = trained(tmp_path / "b", tokens_per_microbatch=20, **same)
    torch.testing.assert_close(weights(cut), weights(whole), rtol=0, atol=1e-6)
    for a, b in zip(rows_of(whole), rows_of(cut), strict=True):
        # A group that is cut repeats its prompt.
        assert a.pop("num_forwarded_tokens") < b.pop("num_forwarded_tokens")
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "num_iterations": 2}, {"loss_type": "grpo"}])
def test_sharing_prompts_does_not_change_the_run(tmp_path, options):
    options = {"adam_epsilon": 1e-3, **options}
    runs = [trained(tmp_path / v, shared_prompt=v, **options) for v in ("on", "off")]
    assert [run.policy.layout for run in runs] == ["shared", "packed"]
    torch.testing.assert_close(*map(weights, runs), rtol=0, atol=1e-6)
    for shared, alone in zip(*map(rows_of, runs), strict=True):
        assert shared.pop("num_forwarded_tokens") < 0.8 * alone.pop("num_forwarded_tokens")
        assert shared == pytest.approx(alone, abs=1e-5)


def test_a_model_that_cannot_be_packed_trains_one_sequence_per_row(tmp_path, monkeypatch):
    same = {"adam_epsilon": 1e-3, "sampler": "generate"}
    packed = trained(tmp_path / "a", **same)
    monkeypatch.setattr(layout, "foreign_layers", lambda settings: "it is a test")
    rows = trained(tmp_path / "b", **same)
    assert rows.policy.layout == "rows"
    torch.testing.assert_close(weights(packed), weights(rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_in_bfloat16_cuts_and_layouts_round_the_gradient_otherwise_and_no_more(
    tmp_path, monkeypatch, pretended, loss_type
):
    """A product of another shape may round each of its bfloat16 results to the other side, by up
    to 2**-8 of it. Runs of many steps are not compared: a token that falls on the other side of a
    tie is another token."""
    pretended(bfloat16=True)
    same = {"bf16": None, "beta": 0.1, "loss_type": loss_type, "sampler": "generate"}
    whole, rows = first_gradient(tmp_path / "whole", **same)
    for name, changes in {
        "cut": {"tokens_per_microbatch": 20},
        "cut in single ones": {"tokens_per_microbatch": 8},
        "prompts not shared": {"shared_prompt": "off"},
        "one sequence per row": {},
    }.items():
        with monkeypatch.context() as patch:
            if name == "one sequence per row":
                patch.setattr(layout, "foreign_layers", lambda settings: "it is a test")
            cut, rows_of_cut = first_gradient(tmp_path / name, **same, **changes)
        assert (cut - whole).norm() <= 4 * 2**-8 * whole.norm(), name
        assert rows_of_cut["reward"] == rows["reward"], name
        assert rows_of_cut["kl"] == rows["kl"] == 0, name
        assert rows_of_cut["loss"] == pytest.approx(rows["loss"], abs=1e-5), name
        assert rows_of_cut["entropy"] == pytest.approx(rows["entropy"], rel=2**-8), name


def first_gradient(tmp_path, **changes):
    """Of the first step, and its metrics."""
    run = trainer(tmp_path, max_steps=1, **changes)
    assert run.policy.precision == "bfloat16"
    norm, found = run.learner._norm, []

    def watched(parameters):
        found.extend(p.grad.flatten().clone() for p in parameters)
        return norm(parameters)

    run.learner._norm = watched
    run.train()
    return torch.cat(found), rows_of(run)[0]


def test_gradient_checkpointing_does_not_change_the_run(tmp_path, precision):
    plain = trained(tmp_path / "a", bf16=None)
    checkpointed = trained(tmp_path / "b", bf16=None, gradient_checkpointing=True)
    assert plain.policy.precision == precision
    assert torch.equal(weights(plain), weights(checkpointed))


@pytest.mark.parametrize("sampler", ["decoder", "generate"])
def test_weights_that_rest_in_bfloat16_do_not_change_the_run(tmp_path, pretended, sampler):
    pretended(bfloat16=True)
    directory = tiny.save(tmp_path / "model", tiny.model("Llama"))
    runs = [
        trained(tmp_path / dtype, model=str(directory), dtype=dtype, bf16=None, beta=0.1,
                sampler=sampler, max_steps=2)
        for dtype in ("float32", "auto")
    ]  # fmt: skip
    assert [run.policy.head.weight.dtype for run in runs] == [torch.float32, torch.bfloat16]
    assert torch.equal(*map(weights, runs)) and rows_of(runs[0]) == rows_of(runs[1])
    saved = [tmp_path / d / "run/adapter/adapter_model.safetensors" for d in ("float32", "auto")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert "on float32 weights" in (tmp_path / "float32/run/run.log").read_text()
    assert "on bfloat16 weights" in (tmp_path / "auto/run/run.log").read_text()


def test_full_fine_tuning_trains_all_weights_and_keeps_its_reference(tmp_path):
    model = tiny.model()
    before = [p.clone() for p in model.parameters()]
    run = trained(tmp_path, model=model, finetuning_type="full", beta=0.1, learning_rate=1e-3)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert rows_of(run)[0]["kl"] == 0 and rows_of(run)[-1]["kl"] > 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokens_per_microbatch": 20},
        {"steps_per_generation": 2, "tokens_per_microbatch": 20},
        {"shared_prompt": "off"},
        {"finetuning_type": "full", "learning_rate": 1e-3},
    ],
    ids=["whole", "cut", "a window", "prompts not shared", "all weights"],
)
def test_the_first_step_has_ratio_one_and_kl_zero_exactly(tmp_path, precision, changes):
    options = {"bf16": None, "beta": 0.1, "max_steps": 2, "num_iterations": 2}
    run = trained(tmp_path, **options | changes)
    assert run.policy.precision == precision
    row = rows_of(run)[0]
    assert row["kl"] == 0
    assert row["clip_ratio/region_mean"] == 0
    assert abs(row["loss"]) < 1e-6  # advantages of a group add up to 0 at ratio 1, KL is 0
    # The sampler computes token by token, so in bfloat16 it rounds otherwise.
    bar = {"float32": 1e-5, "bfloat16": 8 * 2**-8}[precision]
    assert row["sampling/sampling_logp_difference/max"] < bar


def test_iterations_and_several_steps_serve_one_rollout(tmp_path):
    run = trained(tmp_path, steps_per_generation=2, num_iterations=2, max_steps=8)
    rows = rows_of(run)
    assert run.plan.steps_per_rollout == 2
    assert [bool(row["time/sample"]) for row in read_metrics(f"{tmp_path}/run/metrics.jsonl")] == [
        True, False, False, False, True, False, False, False,
    ]  # fmt: skip
    assert all("reward" in row for row in rows)
    assert len(list((tmp_path / "run" / "completions").iterdir())) == 2
    assert abs(rows[0]["loss"]) < 1e-6 and abs(rows[2]["loss"]) > 1e-6


def test_an_epoch_uses_each_prompt_exactly_once(tmp_path):
    run = trained(tmp_path, max_steps=-1, num_train_epochs=2, prompts_per_step=3)
    seen = [
        json.loads(line)["row"]
        for path in sorted((tmp_path / "run" / "completions").iterdir())
        for line in path.open()
    ]
    assert len(seen) == 2 * 7 * 4
    assert all(seen.count(row) == 2 * 4 for row in range(7))
    assert sorted(set(seen[: 7 * 4])) == list(range(7))
    assert rows_of(run)[-1]["epoch"] == 2


def test_the_metrics_of_a_step_are_those_of_its_completions(tmp_path):
    run = trained(tmp_path, max_steps=1)
    (row,) = rows_of(run)
    records = [json.loads(line) for line in (tmp_path / "run/completions/step-000001.jsonl").open()]
    rewards = torch.tensor([r["reward"] for r in records], dtype=torch.float64)
    lengths = [r["length"] for r in records]
    assert row["reward"] == pytest.approx(float(rewards.mean()))
    assert row["reward_std"] == pytest.approx(float(rewards.std()))
    assert row["rewards/even_ids/mean"] == row["reward"]
    assert row["completions/mean_length"] == sum(lengths) / 8
    cut = [r["finish_reason"] == "length" for r in records]
    assert row["completions/clipped_ratio"] == sum(cut) / 8
    prompts = [len(e.prompt_ids) for e in run.stream.data.examples]
    rows = [r["row"] for r in records]
    assert row["num_tokens"] == sum(lengths) + sum(prompts[i] for i in rows)
    groups = torch.tensor([r["group"] for r in records])
    want = reference_group_advantages(rewards, groups)
    got = torch.tensor([r["advantage"] for r in records], dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_truncated_completions_can_be_left_out_of_the_loss(tmp_path):
    run = trained(tmp_path, mask_truncated_completions=True, max_completion_length=1, max_steps=1)
    (row,) = rows_of(run)
    if row["completions/clipped_ratio"] == 1:
        assert row["loss"] == 0 and row["grad_norm"] == 0


def test_everything_masked_costs_nothing_and_breaks_nothing(tmp_path, monkeypatch):
    run = trainer(tmp_path, mask_truncated_completions=True, max_completion_length=2, beta=0.1)
    run.sampler.eos_ids = []  # nothing ever ends
    before = weights(run).clone()
    run.train()
    assert torch.equal(weights(run), before)
    for row in rows_of(run):
        assert row["loss"] == 0 and row["grad_norm"] == 0
        assert row["completions/clipped_ratio"] == 1


def test_equal_rewards_leave_the_weights_alone(tmp_path):
    run = trainer(tmp_path, reward_funcs=lambda completions, **k: [0.1] * len(completions))
    before = weights(run).clone()
    run.train()
    assert torch.equal(weights(run), before)
    assert all(row["frac_reward_zero_std"] == 1 and row["loss"] == 0 for row in rows_of(run))


def test_sampler_correction_drops_tokens_the_sampler_has_no_logp_for(tmp_path):
    run = trainer(tmp_path, sampler_correction=True, max_steps=1)
    sample = run.sampler.sample

    def gappy(*args, **kwargs):
        groups = sample(*args, **kwargs)
        groups[0].completions[0].logp[0] = torch.nan
        return groups

    run.sampler.sample = gappy
    run.train()
    (row,) = rows_of(run)
    assert row["sampling/dropped_tokens"] == 1
    assert row["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)


def test_entropy_bonus_raises_the_entropy(tmp_path):
    flat = lambda completions, **k: [1.0] * len(completions)  # noqa: E731
    run = trained(tmp_path, reward_funcs=flat, entropy_coef=1.0, max_steps=8)
    rows = rows_of(run)
    assert rows[-1]["entropy"] > rows[0]["entropy"]
    assert rows[0]["policy_loss"] == 0 and rows[0]["loss"] < 0


def test_evaluation_repeats_itself_and_leaves_the_run_alone(tmp_path):
    plain = trained(tmp_path / "a")
    run = GRPOTrainer(
        model=tiny.model(), reward_funcs=even_ids, tokenizer=tiny.tokenizer(),
        args=config(tmp_path / "b", eval_strategy="steps", eval_steps=2),
        train_dataset=PROMPTS, eval_dataset=PROMPTS[:3],
    )  # fmt: skip
    run.train()
    rows = rows_of(run)
    assert ["eval_reward" in row for row in rows] == [False, True, False, True]
    assert run.evaluate() == run.evaluate()
    bare = [{k: v for k, v in row.items() if not k.startswith("eval_")} for row in rows]
    assert bare == rows_of(plain)


def test_held_out_rows_are_not_trained_on(tmp_path):
    run = trained(tmp_path, val_size=2, eval_strategy="steps", eval_steps=4)
    held = {e.row for e in run.held_out.examples}
    assert len(held) == 2
    seen = {
        json.loads(line)["row"]
        for path in (tmp_path / "run" / "completions").iterdir()
        for line in path.open()
    }
    assert not held & seen


def test_async_reward_functions_and_several_with_weights(tmp_path):
    async def slow(completions, **kwargs):
        return [1.0] * len(completions)

    def sometimes(completions, **kwargs):
        return [None if i % 2 else 2.0 for i in range(len(completions))]

    run = trained(
        tmp_path,
        reward_funcs=[slow, sometimes, even_ids],
        reward_weights=[1.0, 0.5, 0.0],
        max_steps=1,
    )
    (row,) = rows_of(run)
    assert row["rewards/slow/mean"] == 1 and row["rewards/sometimes/mean"] == 2
    assert row["reward"] == 1.5  # 2 where both apply, 1 where one does


def test_a_failing_reward_saves_first(tmp_path):
    calls = []

    def brittle(completions, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise KeyError("boom")
        return even_ids(**kwargs)

    run = trainer(tmp_path, reward_funcs=brittle)
    with pytest.raises(RewardError, match=r"'brittle'.*boom"):
        run.train()
    assert (tmp_path / "run/checkpoints/step-000002/manifest.json").exists()


def test_an_operator_without_a_backward_pass_ends_the_run(tmp_path):
    run = trainer(tmp_path, model=forward_only.put_into(tiny.model()))
    before = weights(run).clone()
    with pytest.raises(ModelError, match=r"fusedgrpo_tests::forward_only has no backward pass"):
        run.train()
    assert torch.equal(weights(run), before)


def test_a_non_finite_step_never_reaches_the_weights(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    before = weights(run).clone()
    logprobs = run.policy.logprobs

    def broken(packed, **kwargs):
        out = logprobs(packed, **kwargs)
        return out._replace(logp=out.logp * torch.nan)

    monkeypatch.setattr(run.policy, "logprobs", broken)
    with pytest.raises(NonFiniteError, match=r"Step 1: loss nan.*step-000001.json"):
        run.train()
    assert torch.equal(weights(run), before)
    dump = json.loads((tmp_path / "run/nonfinite/step-000001.json").read_text())
    assert dump["seed"] == 42 and len(dump["samples"]) == 8


def test_an_infinite_gradient_can_be_skipped_and_is_counted(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_nonfinite_steps=1)
    step = run.learner.step

    def sometimes(samples, number):
        parameter = run.policy.trainable()[0][1]
        if number == 1:
            hook = parameter.register_hook(lambda grad: grad * torch.inf)
            result = step(samples, number)
            hook.remove()
            return result
        return step(samples, number)

    monkeypatch.setattr(run.learner, "step", sometimes)
    run.train()
    rows = rows_of(run)
    assert [row.get("skipped_update", 0) for row in rows] == [0, 1, 0, 0]
    assert torch.isfinite(weights(run)).all()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"eval_strategy": "steps"}, "eval_strategy: steps needs an eval_dataset"),
        ({"report_to": "tensorbord"}, "no tracker 'tensorbord'"),
        ({"fp16": True, "bf16": False}, "fp16: true needs a CUDA device"),
    ],
)
def test_what_only_the_trainer_can_see_is_refused_before_work(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **changes)


def test_no_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="dataset is missing"):
        GRPOTrainer(
            model=tiny.model(),
            reward_funcs=even_ids,
            args=config(tmp_path),
            tokenizer=tiny.tokenizer(),
        )


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_qlora_in_four_bits_trains_on_the_cpu(tmp_path, optim):
    directory = tiny.save(tmp_path / "model", tiny.model("Llama", hidden_size=64))
    run = GRPOTrainer(
        reward_funcs=even_ids,
        args=config(
            tmp_path, model_name_or_path=str(directory), load_in_4bit=True, beta=0.1, optim=optim,
            num_iterations=2, gradient_checkpointing=True, save_strategy="steps", save_steps=2,
        ),
        train_dataset=PROMPTS,
    )  # fmt: skip
    assert run.policy.layout == "shared"
    before = weights(run).clone()
    run.train()
    rows = rows_of(run)
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert not torch.equal(weights(run), before)
    assert (tmp_path / "run/checkpoints/step-000004/manifest.json").exists()
    assert "4-bit weights" in (tmp_path / "run/run.log").read_text()


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_run_in_float16_has_a_loss_scale(tmp_path, monkeypatch, four_bit):
    """What a GPU without bfloat16 computes in, for weights that are stored in bfloat16."""
    half = lambda bf16, fp16, device: torch.float16  # noqa: E731
    monkeypatch.setattr(loading, "pick_compute_dtype", half)
    size = {"hidden_size": 64, "scale": 6.0}
    directory = tiny.save(tmp_path / "model", tiny.model("Llama", **size).bfloat16())
    run = GRPOTrainer(
        reward_funcs=even_ids,
        args=config(
            tmp_path, model_name_or_path=str(directory), load_in_4bit=four_bit, beta=0.1,
            max_nonfinite_steps=4,
        ),
        train_dataset=PROMPTS,
    )  # fmt: skip
    before = weights(run).clone()
    run.train()
    assert run.learner.scaler.is_enabled() and run.policy.dtype == torch.float16
    assert run.policy.head.weight.dtype == torch.float16
    rows = rows_of(run)
    assert rows[0]["kl"] == 0 and not torch.equal(weights(run), before)
    assert torch.isfinite(weights(run)).all()
    assert "computing in float16" in (tmp_path / "run/run.log").read_text()


def first_group_only(completions, completion_ids, **kwargs):
    rewards = even_ids(completion_ids)
    return rewards[:4] + [0.5] * (len(rewards) - 4)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_rows_without_gradient_are_not_forwarded_and_change_nothing(
    tmp_path, monkeypatch, num_iterations
):
    options = {"reward_funcs": first_group_only, "num_iterations": num_iterations}
    run = trained(tmp_path / "a", **options)
    for module in (update, scoring):
        monkeypatch.setattr(module, "has_gradient", lambda *_, **__: True)
    full = trained(tmp_path / "b", **options)
    torch.testing.assert_close(weights(run), weights(full), rtol=0, atol=1e-6)
    for skipped, whole in zip(rows_of(run), rows_of(full), strict=True):
        assert skipped["frac_rows_skipped"] >= 0.5 and whole["frac_rows_skipped"] == 0
        for name in (
            "loss",
            "grad_norm",
            "clip_ratio/region_mean",
            "clip_ratio/high_max",
            "reward",
        ):
            assert skipped[name] == pytest.approx(whole[name], abs=1e-5), name


def test_a_rollout_with_nothing_to_learn_costs_no_forward(tmp_path):
    run = trainer(tmp_path, reward_funcs=lambda completions, **k: [1.0] * len(completions))
    run.learner._loss = None  # would fail
    run.train()
    for row in rows_of(run):
        assert row["frac_rows_skipped"] == 1 and row["loss"] == row["num_forwarded_tokens"] == 0


def test_a_step_needs_nothing_that_train_opens(tmp_path):
    whole = trainer(tmp_path / "whole", max_steps=2)
    whole.train()
    by_hand = trainer(tmp_path / "by_hand", max_steps=2)
    rows = [by_hand.step(), by_hand.step()]
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["grad_norm"] > 0
    assert torch.equal(weights(by_hand), weights(whole))
    assert not list((tmp_path / "by_hand/run").iterdir())


def test_a_state_dict_goes_on_where_it_was_taken(tmp_path):
    whole = trainer(tmp_path / "whole", max_steps=4, generation_batch_size=16)
    rows = [whole.step() for _ in range(4)]
    first = trainer(tmp_path / "first", max_steps=4, generation_batch_size=16)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    again = trainer(tmp_path / "again", max_steps=4, generation_batch_size=16, model=tiny.model())
    for (_, new), (_, old) in zip(again.policy.trainable(), first.policy.trainable(), strict=True):
        new.data.copy_(old)
    again.load_state_dict(saved)
    rest = [again.step() for _ in range(3)]
    for one, other in zip(rest, rows[1:], strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(TIMES)} == {
            k: v for k, v in other.items() if not k.startswith(TIMES)
        }
    assert torch.equal(weights(again), weights(whole))
    with pytest.raises(ConfigError, match="has finished its run"):
        again.step()


def test_a_step_that_left_half_a_change_is_not_gone_on_from(tmp_path, monkeypatch):
    run = trainer(tmp_path)

    def half(*args, **kwargs):
        run.learner.changing()
        raise RuntimeError("half a step")

    monkeypatch.setattr(run.learner.scaler, "step", half)
    with pytest.raises(RuntimeError, match="half a step"):
        run.step()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="half a change"):
        run.step()
