from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fusedgrpo.engine.reporting.metrics_log import (
    MetricsLog,
    read_metrics,
    reward_names,
    rollout_rows,
    series,
    trend,
)


def test_rows_are_strict_json_and_readable_before_close(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1, "kl": math.nan, "reward": math.inf, "loss": torch.tensor(0.5)})
    log.append({"step": 2, "loss": np.float32(0.25), "x": np.array([1, 2]), "y": 1j})
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in path.open())
    assert first == {"step": 1, "kl": None, "reward": None, "loss": 0.5}
    assert second == {"step": 2, "loss": 0.25, "x": [1, 2], "y": "1j"}
    log.close()


def test_a_row_without_step_is_refused(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(KeyError, match="needs 'step'"):
        log.append({"loss": 0.0})


def test_truncate_drops_later_rows_keeps_them_beside_and_goes_on(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(1, 6):
            log.append({"step": step})
        (said,) = log.resume(3)
        assert "2 rows" in said and "metrics.dropped.jsonl" in said
        log.append({"step": 4, "again": True})
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3, 4]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.dropped.jsonl")] == [4, 5]


def test_a_line_torn_by_a_crash_is_left_out_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    assert read_metrics(path) == [{"step": 1}]
    assert "metrics.jsonl:2" in caplog.text


def test_truncating_mends_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    with MetricsLog(path) as log:
        log.resume(1)
        log.append({"step": 2})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_series_skips_what_is_no_number():
    rows = [{"step": 1, "kl": 0.5}, {"step": 2}, {"step": 3, "kl": None}, {"step": 4, "kl": 1}]
    assert series(rows, "kl") == ([1, 4], [0.5, 1.0])


def test_reward_names_come_from_the_keys_in_order():
    rows = [{"rewards/b/mean": 0, "rewards/b/std": 0}, {"rewards/a/mean": 0, "reward": 0}]
    assert reward_names(rows) == ["b", "a"]


def test_trend_sees_a_rise_through_noise_and_none_in_noise():
    noise = [0.1 if i % 2 else -0.1 for i in range(100)]
    rising = trend([n + i / 100 for i, n in enumerate(noise)])
    assert rising is not None
    assert rising.rose
    assert rising.change == pytest.approx(0.9, abs=0.01)
    assert rising.window == 10
    flat = trend(noise)
    assert flat is not None
    assert not flat.rose
    assert not flat.fell
    falling = trend([-n for n in range(20)])
    assert falling is not None
    assert falling.fell


def test_a_change_counts_beyond_twice_its_standard_error():
    ends = trend([0, 0, 0, 0, 1, 0, 0, 0, 1, 1])
    assert ends is not None
    assert ends.change == pytest.approx(0.2)
    assert ends.noise == pytest.approx(math.sqrt((0.2 + 0.3) / 5))
    assert not ends.rose


def test_trend_of_a_short_series_is_unknown():
    assert trend([0.0] * 9) is None
    assert trend([0.0] * 10) is not None


def test_rollout_rows_leaves_out_the_steps_that_did_not_sample():
    rows = [
        {"step": 1, "reward": 1.0, "time/sample": 2.0},
        {"step": 2, "reward": 1.0, "time/sample": 0.0},
        {"step": 3, "reward": 0.0},
        {"step": 4},
    ]
    assert [row["step"] for row in rollout_rows(rows)] == [1, 3]
