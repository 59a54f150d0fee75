"""Whole seeded training runs of ours log what stock TRL logs, and end with its weights."""

from __future__ import annotations

import pandas
import pytest

pytest.importorskip("trl")
pytestmark = pytest.mark.peer

from trl import GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402
from trl_runs import (  # noqa: E402
    LORA_RUN,
    ONLY_TRLS_LOSS,
    RLOO_RUNS,
    RUNS,
    TOLERANCE,
    assert_same_runs,
    logs,
    trained,
)

from fusedgrpo.integrations.trl import FusedGRPOTrainer, FusedRLOOTrainer  # noqa: E402

# TRL shuffles single rows; ours keep groups together unless told not to.
OURS = {"group_rows": False}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_logs_the_same(tmp_path, name):
    stock = trained(GRPOTrainer, tmp_path, **RUNS[name])
    assert_same_runs(stock, trained(FusedGRPOTrainer, tmp_path, **RUNS[name], **OURS))
    if name not in ONLY_TRLS_LOSS:
        fused = trained(FusedGRPOTrainer, tmp_path, **RUNS[name], **OURS, fused_loss=True)
        assert_same_runs(stock, fused)


@pytest.mark.parametrize("name", RLOO_RUNS)
def test_a_run_of_rloo_logs_the_same(tmp_path, name):
    options = RLOO_RUNS[name] | {"config": RLOOConfig}
    stock = trained(RLOOTrainer, tmp_path, **options)
    assert_same_runs(stock, trained(FusedRLOOTrainer, tmp_path, **options, **OURS))


@pytest.mark.slow
def test_a_run_with_adapters_evaluation_completions_and_resume_logs_the_same(tmp_path):
    stock = trained(GRPOTrainer, tmp_path / "stock", **LORA_RUN)
    assert any("eval_reward" in row for row in logs(stock))
    completions = sorted((tmp_path / "stock" / "completions").iterdir())
    assert completions
    for fused_loss in (False, True):
        here = tmp_path / str(fused_loss)
        options = LORA_RUN | OURS | {"fused_loss": fused_loss}
        assert_same_runs(stock, trained(FusedGRPOTrainer, here, **options))
        for file in completions:
            tables = [pandas.read_parquet(d / "completions" / file.name)
                      for d in (tmp_path / "stock", here)]  # fmt: skip
            pandas.testing.assert_frame_equal(*tables, rtol=TOLERANCE, atol=TOLERANCE)
        # A run goes on from a checkpoint of its own as from one of TRL's.
        first = tmp_path / "stock" if fused_loss else here
        again = trained(
            FusedGRPOTrainer, here / "again", **options,
            resume_from_checkpoint=str(first / "checkpoint-2"),
        )  # fmt: skip
        # The last row, of the whole run, has the mean loss since it was resumed.
        assert_same_runs(stock, again, rows=slice(-1))
