"""One call of ``_compute_loss`` of stock TRL and of ours on hand-made inputs, for every option.

``AXES`` is the list of options and values. The cases of a loss type and a level are chosen so that
every value of an option meets every value of every other one (``all_pairs``).
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from types import SimpleNamespace

import tiny
import torch

from fusedgrpo.integrations.trl_loss import uncovered
from fusedgrpo.loss_options import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES

PATHS = ("trl_loss", "fused_loss")  # TRL's loss on our forward, and fused_loss=True
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5  # of the norm of the difference, against the norm
METRIC_TOLERANCE = 1e-5
DRAWS = 300  # of the slow test, from all combinations

# Options by axis; the first setting is the default. Names are GRPOConfig's where it has them;
# accumulation_window is current_gradient_accumulation_steps, shorter for the last window of an
# epoch; advantages and tools say what is in the batch, mode whether it is one of evaluation.
AXES = {
    "beta": [{}, {"beta": 0.1}, {"beta": 0.1, "use_bias_correction_kl": False}],
    "schedule": [
        {},
        {"num_iterations": 2},
        {"steps_per_generation": 4},
        {"gradient_accumulation_steps": 4, "accumulation_window": 4},
    ],
    "accumulation_window": [{}, {"accumulation_window": 1}],
    "epsilon": [{}, {"epsilon": 0.1}],
    "epsilon_high": [{}, {"epsilon_high": 0.3}, {"epsilon_high": 1.2}],
    "delta": [{}, {"delta": 1.5}],
    "top_entropy_quantile": [{}, {"top_entropy_quantile": 0.4}],
    "entropy_coef": [
        {},
        {"entropy_coef": 0.05},
        {"entropy_coef": 0.05, "use_adaptive_entropy": True, "entropy_target": 3.0},
    ],
    "off_policy_mask_threshold": [{}, {"off_policy_mask_threshold": 0.1}],
    "mask_truncated_completions": [
        {},
        {"mask_truncated_completions": True},
        {"mask_truncated_completions": True, "all_truncated": True},
    ],
    "vllm_importance_sampling_mode": [
        {},
        {"use_vllm": True, "vllm_importance_sampling_correction": False},
        *(
            {"use_vllm": True, "vllm_importance_sampling_mode": mode, **caps}
            for mode, caps in (
                ("token_truncate", {"vllm_importance_sampling_clip_max": 1.3}),
                ("token_mask", {"vllm_importance_sampling_clip_max": 1.3}),
                ("sequence_truncate", {"vllm_importance_sampling_clip_min": 0.7}),
                ("sequence_mask", {"vllm_importance_sampling_clip_min": 0.3}),
            )
        ),
    ],
    "advantages": [{}, {"advantages": "some zero"}, {"advantages": "all zero"}],
    "tools": [{}, {"tools": True}],
    "mode": [{}, {"mode": "eval"}],
}
# Options that only one loss type reads.
OWN_AXES = {
    "dr_grpo": {"max_completion_length": [{}, {"max_completion_length": 21}]},
    "sapo": {
        "sapo_temperature": [{}, {"sapo_temperature_pos": 1.4, "sapo_temperature_neg": 0.8}],
    },
    "vespo": {
        "vespo": [{}, {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.0,
                       "vespo_lambda_neg": 1.5}],
    },
}  # fmt: skip

# TRL's defaults, but a weight and a length that the hand-made inputs have.
DEFAULTS = {
    "beta": 0.0, "use_bias_correction_kl": True, "num_iterations": 1, "steps_per_generation": 2,
    "gradient_accumulation_steps": 2, "accumulation_window": 2, "epsilon": 0.2,
    "epsilon_high": None, "delta": None, "top_entropy_quantile": 1.0, "entropy_coef": 0.0,
    "use_adaptive_entropy": False, "entropy_target": 0.2, "off_policy_mask_threshold": None,
    "mask_truncated_completions": False, "all_truncated": False, "use_vllm": False,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None, "advantages": "none zero", "tools": False,
    "mode": "train", "max_completion_length": 9, "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}  # fmt: skip


def axes_of(loss_type, path):
    """``AXES`` without what this loss type or this path refuses when a trainer is made."""
    axes = AXES | OWN_AXES.get(loss_type, {})
    return {name: [s for s in axes[name] if allowed(loss_type, path, s)] for name in axes}


def allowed(loss_type, path, settings):
    options = DEFAULTS | {"loss_type": loss_type} | settings
    if loss_type == "vespo" and options["use_vllm"]:
        # TRL: the ratio is a factor of each token's weight there.
        corrected = options["vllm_importance_sampling_correction"]
        return not corrected or options["vllm_importance_sampling_mode"].startswith("token")
    return path != "fused_loss" or not refused(loss_type, settings)


def refused(loss_type, settings):
    """Does ``fused_loss=True`` refuse a trainer with these settings?"""
    options = DEFAULTS | {"loss_type": loss_type} | settings
    return bool(uncovered(SimpleNamespace(**options, aux_loss_enabled=False, _is_vlm=False)))


def cases(path):
    """``(loss type, level, number, settings)``: all pairs of settings for each type and level."""
    for loss_type, level in itertools.product(LOSS_TYPES, IMPORTANCE_SAMPLING_LEVELS):
        axes = list(axes_of(loss_type, path).values())
        for number, row in enumerate(all_pairs([len(axis) for axis in axes])):
            settings = [axis[i] for axis, i in zip(axes, row, strict=True)]
            yield loss_type, level, number, merged(settings)


def sampled(path, seed=0):
    """``DRAWS`` draws from the product of all settings, as ``cases``."""
    rng = random.Random(seed)
    for number in range(DRAWS):
        loss_type, level = rng.choice(LOSS_TYPES), rng.choice(IMPORTANCE_SAMPLING_LEVELS)
        settings = [rng.choice(axis) for axis in axes_of(loss_type, path).values()]
        yield loss_type, level, number, merged(settings)


def merged(settings):
    return {name: value for options in settings for name, value in options.items()}


def all_pairs(sizes):
    """Rows of indices, ``row[a] < sizes[a]``, few of them, such that every two values of two axes
    are together in one.

    Greedy: a row starts with a pair that no row has yet, and takes from each other axis the value
    that completes the most such pairs.
    """
    missing = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(range(len(sizes)), 2)
        for i, j in itertools.product(range(sizes[a]), range(sizes[b]))
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for axis in range(len(sizes)):
            if axis not in row:
                row[axis] = max(
                    range(sizes[axis]),
                    key=lambda i: sum(
                        tuple(sorted([(axis, i), other])) in missing for other in row.items()
                    ),
                )
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        rows.append(tuple(row[axis] for axis in range(len(sizes))))
    return rows


def configure(trainer, loss_type, level, settings):
    """What TRL's constructor would leave where ``_compute_loss`` reads it."""
    options = DEFAULTS | settings | {"loss_type": loss_type, "importance_sampling_level": level}
    for name, value in options.items():
        if hasattr(trainer.args, name):
            setattr(trainer.args, name, value)
            if hasattr(trainer, name):
                setattr(trainer, name, value)
    trainer.epsilon_low = options["epsilon"]
    if options["epsilon_high"] is None:
        trainer.epsilon_high = options["epsilon"]
    trainer._entropy_bonus_enabled = bool(options["entropy_coef"])
    # In the middle of a run: the controller has seen an entropy under its target.
    trainer._last_world_entropy = 2.0
    trainer._entropy_window_stats = None
    trainer.current_gradient_accumulation_steps = options["accumulation_window"]
    trainer.model.train(options["mode"] == "train")


def hand_made(settings):
    """Two groups of four: left-padded prompts and ragged completions of 1 to 9 tokens."""
    o = SimpleNamespace(**(DEFAULTS | settings))
    g = torch.Generator().manual_seed(3)
    B, T = 8, 9
    mask = torch.arange(T) < torch.tensor([9, 4, 1, 6, 3, 2, 7, 5])[:, None]
    inputs = {
        "prompt_ids": torch.tensor([[0, 0, 5, 6, 7]] * 4 + [[8, 9, 10, 11, 12]] * 4),
        "prompt_mask": torch.tensor([[0, 0, 1, 1, 1]] * 4 + [[1] * 5] * 4),
        "completion_ids": torch.randint(4, tiny.VOCAB, (B, T), generator=g),
        "advantages": torch.tensor([1.0, -0.7, 0.6, 0.4, -1.2, 0.9, -0.1, 0.3]),
    }
    old, ref, sampled_at = (-3 + 0.4 * torch.randn(B, T, generator=g) for _ in range(3))
    called = torch.rand(B, T, generator=g) < 0.3  # by a tool, where there are tools

    if o.mask_truncated_completions:
        mask = mask & torch.tensor([0, 1, 1, 1, 1, 1, 0, 1])[:, None].bool()
    if o.all_truncated:
        mask = torch.zeros_like(mask)
    inputs["completion_mask"] = mask.long()
    if o.tools:
        inputs["tool_mask"] = (~called).long()
        mask = mask & ~called
    inputs["num_items_in_batch"] = mask.sum() * o.steps_per_generation
    if o.advantages != "none zero":
        zero = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0]).bool() | (o.advantages == "all zero")
        inputs["advantages"][zero] = 0.0

    kept = inputs["completion_mask"]
    if o.beta:
        inputs["ref_per_token_logps"] = ref * kept
    corrected = o.use_vllm and o.vllm_importance_sampling_correction
    aligned = o.gradient_accumulation_steps % (o.steps_per_generation * o.num_iterations) == 0
    if corrected or not aligned:
        inputs["old_per_token_logps"] = old * kept
    if o.use_vllm:
        sampled_at = 0.5 * (sampled_at + old)
        sampled_at[1, 2] = torch.nan  # a token that vLLM gave no log-prob
        inputs["sampling_per_token_logps"] = sampled_at * kept
    if corrected:
        inputs["importance_sampling_ratio"] = capped_ratio((old - sampled_at) * mask, o)
    return inputs


def capped_ratio(difference, o):
    """Old over sampling probabilities: ``[B, T]``, or ``[B, 1]`` of whole completions."""
    level, cap = o.vllm_importance_sampling_mode.split("_")
    difference = difference.nan_to_num(nan=0.0)
    ratio = (difference.sum(1, keepdim=True) if level == "sequence" else difference).exp()
    low = -math.inf if o.vllm_importance_sampling_clip_min is None else (
        o.vllm_importance_sampling_clip_min
    )  # fmt: skip
    high = o.vllm_importance_sampling_clip_max
    if cap == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def step(trainer, inputs):
    """Loss, gradient (zeros in evaluation) and metrics of one call of ``_compute_loss``."""
    mode = "train" if trainer.model.training else "eval"
    trainer._metrics[mode].clear()
    trainer.model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(mode == "train"):
        loss = trainer._compute_loss(trainer.model, copy.deepcopy(inputs))
    if mode == "train":
        loss.backward()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    gradient = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                          for p in parameters])  # fmt: skip
    return loss.detach(), gradient, dict(trainer._metrics[mode])


def differences(stock, ours, loss_type, level, settings):
    """What of a case is not the same, in words; empty if everything is."""
    inputs = hand_made(settings)
    results = []
    for trainer in (stock, ours):
        configure(trainer, loss_type, level, settings)
        results.append(step(trainer, inputs))
    (want, want_gradient, want_metrics), (got, gradient, metrics) = results
    found = []
    if not math.isclose(got, want, rel_tol=LOSS_TOLERANCE, abs_tol=LOSS_TOLERANCE):
        found.append(f"loss {got:.8g}, TRL {want:.8g}")
    error = (gradient - want_gradient).norm()
    if not error <= GRADIENT_TOLERANCE * want_gradient.norm():
        found.append(f"gradient off by {error:.2g}, its norm is {want_gradient.norm():.2g}")
    if metrics.keys() != want_metrics.keys():
        found.append(f"metrics {sorted(metrics.keys() ^ want_metrics.keys())} on one side only")
    for name in metrics.keys() & want_metrics.keys():
        for a, b in itertools.zip_longest(metrics[name], want_metrics[name]):
            tolerances = {"rel_tol": METRIC_TOLERANCE, "abs_tol": LOSS_TOLERANCE}
            if not (math.isnan(a) and math.isnan(b)) and not math.isclose(a, b, **tolerances):
                found.append(f"{name} {a:.8g}, TRL {b:.8g}")
    return found
