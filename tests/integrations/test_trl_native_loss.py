"""The native learner's loss, gradient and controller against stock TRL's ``_compute_loss``, for the
options that say which tokens count and what entropy is worth."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("trl")
pytestmark = pytest.mark.peer

from conformance import configure, hand_made, step  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_runs import make  # noqa: E402

from fusedgrpo.engine.entropy_bonus import EntropyBonus  # noqa: E402
from fusedgrpo.engine.execution import Execution  # noqa: E402
from fusedgrpo.engine.learner import Learner  # noqa: E402
from fusedgrpo.engine.memory.oom_retry import OOMRetry  # noqa: E402
from fusedgrpo.engine.rollout.training_sample import TrainingSample  # noqa: E402
from fusedgrpo.engine.token_choice import TokenChoice  # noqa: E402
from fusedgrpo.kernels import LossOptions  # noqa: E402
from fusedgrpo.models.policy import Policy  # noqa: E402

# One call of TRL's is a whole step then, as ours is.
ONE_WINDOW = {
    "gradient_accumulation_steps": 1, "accumulation_window": 1, "steps_per_generation": 1,
}  # fmt: skip
# No quantile falls on the first tokens of a group: they have the same entropy but for rounding.
CASES = {
    "entropy quantile": {"top_entropy_quantile": 0.4, "beta": 0.1},
    "and bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05, "loss_type": "grpo"},
    "off policy": {"off_policy_mask_threshold": 0.1, "num_iterations": 2, "beta": 0.1},
    "sequence level": {
        "off_policy_mask_threshold": 0.1, "num_iterations": 2, "top_entropy_quantile": 0.7,
        "importance_sampling_level": "sequence",
    },
    "truncated": {"top_entropy_quantile": 0.4, "mask_truncated_completions": True,
                  "entropy_coef": 0.05},
    "zero advantages": {"top_entropy_quantile": 0.4, "advantages": "some zero"},
    "adaptive": {"entropy_coef": 0.05, "use_adaptive_entropy": True, "entropy_target": 2.2,
                 "top_entropy_quantile": 0.55},
    "adaptive, enough": {"entropy_coef": 0.05, "use_adaptive_entropy": True,
                         "entropy_target": 0.5, "advantages": "some zero"},
    **{f"tools, {loss}": {"tools": True, "loss_type": loss, "beta": 0.1, "entropy_coef": 0.05,
                          "num_iterations": 2, "advantages": "some zero"}
       for loss in ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo")},
    "tools, sequence level": {"tools": True, "importance_sampling_level": "sequence",
                              "off_policy_mask_threshold": 0.1, "num_iterations": 2,
                              "top_entropy_quantile": 0.6},
    "tools, truncated": {"tools": True, "mask_truncated_completions": True, "loss_type": "grpo"},
}  # fmt: skip


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return make(GRPOTrainer, tmp_path_factory.mktemp("trl"), gradient_accumulation_steps=1)


def samples_of(inputs):
    """The rows of a batch of TRL's as samples; what is masked out of a row makes it one that is not
    in the loss, and what tools have said is given."""
    samples = []
    for i, mask in enumerate(inputs["completion_mask"].bool()):
        inside = bool(mask.any())
        keep = mask if inside else torch.tensor([True] + [False] * (len(mask) - 1))
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
        wrote = inputs["tool_mask"][i].bool() if "tool_mask" in inputs else torch.ones_like(keep)
        given = [(t, t + 1) for t, own in enumerate(wrote[keep].tolist()) if not own]
        own = keep & wrote
        optional = {
            name: inputs[theirs][i][own]
            for name, theirs in (("old_logp", "old_per_token_logps"),
                                 ("ref_logp", "ref_per_token_logps"))
            if theirs in inputs
        }  # fmt: skip
        samples.append(
            TrainingSample(
                prompt_ids=tuple(prompt.tolist()),
                completion_ids=tuple(inputs["completion_ids"][i][keep].tolist()),
                advantage=float(inputs["advantages"][i]),
                in_loss=inside,
                given=tuple(given),
                **optional,
            )
        )
    return samples


def learner_of(stock, settings, tokens):
    policy = Policy(copy.deepcopy(stock.model).train())
    policy.model.gradient_checkpointing_disable()
    bonus = EntropyBonus(
        settings.get("entropy_coef", 0.0),
        settings.get("use_adaptive_entropy", False),
        delta=0.005,
        target=settings.get("entropy_target", 0.2),
        last=2.0,
    )
    return Learner(
        policy,
        torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0),
        None,
        LossOptions(
            loss_type=settings.get("loss_type", "dapo"),
            beta=settings.get("beta", 0.0),
            max_completion_length=stock.max_completion_length,
            importance_sampling_level=settings.get("importance_sampling_level", "token"),
        ),
        max_grad_norm=0.0,
        execution=Execution(OOMRetry(tokens)),
        bonus=bonus,
        choice=TokenChoice(
            top_entropy=settings.get("top_entropy_quantile", 1.0),
            off_policy=settings.get("off_policy_mask_threshold"),
        ),
    )


@pytest.mark.parametrize("tokens", [4096, 24], ids=["whole", "cut"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_same_loss_gradient_and_controller(stock, settings, tokens):
    settings = ONE_WINDOW | settings
    inputs = hand_made(settings)
    chosen = {"loss_type": "dapo", "importance_sampling_level": "token"} | settings
    configure(stock, chosen["loss_type"], chosen["importance_sampling_level"], settings)
    stock.use_adaptive_entropy = settings.get("use_adaptive_entropy", False)
    want, want_gradient, metrics = step(stock, inputs)
    ours = learner_of(stock, settings, tokens)
    loss, own = ours._accumulate(samples_of(inputs), 0)
    gradient = torch.cat([
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
        for _, p in ours.policy.trainable()
    ])  # fmt: skip
    assert math.isclose(loss, want, rel_tol=1e-5, abs_tol=1e-6)
    assert (gradient - want_gradient).norm() <= 1e-5 * want_gradient.norm()
    if ours.bonus.on:
        ours.bonus.update(ours._entropy)
        assert metrics["entropy_coef"] == [pytest.approx(ours.bonus.coef)]
        assert metrics["policy_loss"] == [pytest.approx(own["policy_loss"], abs=1e-6)]
    if ours.bonus.adaptive:
        assert ours.bonus.last == pytest.approx(stock._last_world_entropy, rel=1e-5)
        again = EntropyBonus(0.05, True)
        again.restore(ours.bonus.state())
        assert (again.coef, again.last) == (ours.bonus.coef, ours.bonus.last)
