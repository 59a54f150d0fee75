"""FusedGRPOTrainer's loss, gradient and metrics are stock TRL's, option by option and in pairs."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("trl")
pytestmark = pytest.mark.peer

import conformance  # noqa: E402
from conformance import PATHS, configure, differences, hand_made  # noqa: E402
from trl import GRPOTrainer, RLOOConfig  # noqa: E402
from trl_runs import make  # noqa: E402

from fusedgrpo.errors import ConfigError  # noqa: E402
from fusedgrpo.integrations.trl import FusedGRPOTrainer, FusedRLOOTrainer  # noqa: E402
from fusedgrpo.integrations.trl_loss import refuse_uncovered  # noqa: E402


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    path = tmp_path_factory.mktemp("trl")
    return make(GRPOTrainer, path), make(FusedGRPOTrainer, path)


@pytest.mark.parametrize(
    ("path", "loss_type", "level", "settings"),
    [
        pytest.param(path, *case[:2], case[3], id="-".join(map(str, (path, *case[:3]))))
        for path in PATHS
        for case in conformance.cases(path)
    ],
)
def test_same_loss_gradient_and_metrics(trainers, path, loss_type, level, settings):
    stock, ours = trainers
    ours.fused_loss = path == "fused_loss"
    assert not differences(stock, ours, loss_type, level, settings), settings


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_same_in_draws_from_all_combinations(trainers, path):
    stock, ours = trainers
    ours.fused_loss = path == "fused_loss"
    for loss_type, level, _, settings in conformance.sampled(path):
        assert not differences(stock, ours, loss_type, level, settings), (
            loss_type, level, settings,
        )  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss_type", conformance.LOSS_TYPES)
def test_every_pair_of_settings_is_in_a_case(loss_type, path):
    axes = list(conformance.axes_of(loss_type, path).values())
    rows = conformance.all_pairs([len(axis) for axis in axes])
    for a, b in itertools.combinations(range(len(axes)), 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(range(len(axes[a])), range(len(axes[b]))))
    assert len(rows) <= 40  # the full product has more than 100,000


def test_settings_are_where_the_constructor_puts_them(tmp_path):
    settings = {
        "num_iterations": 2, "steps_per_generation": 4, "epsilon": 0.1, "epsilon_high": 0.3,
        "delta": 1.5, "top_entropy_quantile": 0.4, "entropy_coef": 0.05,
        "use_adaptive_entropy": True, "off_policy_mask_threshold": 0.1,
        "mask_truncated_completions": True, "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.4, "max_completion_length": 21, "entropy_target": 3.0,
        "loss_type": "sapo", "importance_sampling_level": "sequence",
    }  # fmt: skip
    made = make(GRPOTrainer, tmp_path, **settings)
    set_up = make(GRPOTrainer, tmp_path)
    configure(
        set_up, settings.pop("loss_type"), settings.pop("importance_sampling_level"), settings
    )
    set_up._last_world_entropy = made._last_world_entropy  # not an option
    checked = 0
    for name, value in vars(made).items():
        if isinstance(value, bool | int | float | str | None) and not name.startswith("current_"):
            assert getattr(set_up, name) == value, name
            checked += 1
    for name in conformance.DEFAULTS:
        assert getattr(set_up.args, name, None) == getattr(made.args, name, None), name
    assert checked > 30


def test_the_batch_has_no_ties_at_the_entropy_quantile(trainers):
    """First tokens after the same prompt have the same entropy but for its rounding."""
    stock, (_, quantile) = trainers[0], conformance.AXES["top_entropy_quantile"]
    options = [{}, {"tools": True}]
    for tools, truncation in itertools.product(
        options, conformance.AXES["mask_truncated_completions"]
    ):
        inputs = hand_made(tools | truncation)
        ids, masks = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1)
            for name in ("ids", "mask")
        )
        entropies = stock._get_per_token_logps_and_entropies(
            stock.model, ids, masks, inputs["completion_ids"].shape[1], compute_entropy=True
        )[1].detach()
        values = entropies[inputs["completion_mask"] * inputs.get("tool_mask", 1) == 1]
        if len(values):
            threshold = values.quantile(1 - quantile["top_entropy_quantile"])
            nearest = (values - threshold).abs().sort().values
            assert (nearest < 1e-4).sum() == 0 or (nearest[0] == 0 and nearest[1] > 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"top_entropy_quantile": 0.4, "loss_type": "vespo"},
        {"off_policy_mask_threshold": 0.1, "loss_type": "vespo"},
        {"use_adaptive_entropy": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_the_fused_loss_does_not_cover_is_refused_by_name(tmp_path, options):
    name = next(iter(options))
    with pytest.raises(ConfigError, match=f"fused_loss=True does not cover {name}"):
        make(FusedGRPOTrainer, tmp_path, fused_loss=True, **options)


def test_the_fused_loss_is_for_text_and_for_grpo(tmp_path, trainers, monkeypatch):
    monkeypatch.setattr(trainers[1], "_is_vlm", True)
    with pytest.raises(ConfigError, match="does not cover a multimodal processing_class"):
        refuse_uncovered(trainers[1])
    with pytest.raises(ConfigError, match="RLOO has a loss of its own"):
        make(FusedRLOOTrainer, tmp_path, config=RLOOConfig, fused_loss=True)


def test_the_fused_loss_wants_one_advantage_per_completion(trainers, monkeypatch):
    monkeypatch.setattr(trainers[1], "fused_loss", True)
    configure(trainers[1], "dapo", "token", {})
    inputs = hand_made({})
    inputs["advantages"] = inputs["advantages"][:, None].expand(8, 9)
    with pytest.raises(ValueError, match=r"advantages has shape \(8, 9\): expected one per"):
        conformance.step(trainers[1], inputs)
