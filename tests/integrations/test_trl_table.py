"""docs/trl-conformance.md says what the tests compare, about every option that TRL has."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")
pytestmark = pytest.mark.peer

import conformance_table as page  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "docs" / "trl-conformance.md"


def test_the_committed_page_is_what_the_generator_writes():
    assert DOCUMENT.read_text() == page.document(), (
        "run python tests/integrations/conformance_table.py > docs/trl-conformance.md"
    )


def test_every_option_of_trl_is_on_the_page_once():
    compared = {name for name in page.in_cases() | page.in_runs() if name not in page.IN_THE_BATCH}
    untouched = [name for names in page.UNTOUCHED.values() for name in names]
    listed = [*compared, *untouched, *page.NOT_COMPARED]
    options = set(page.options_of_trl())
    assert sorted(options - set(listed)) == []
    inherited = {field.name for field in page.dataclasses.fields(page.TrainingArguments)}
    assert sorted(set(listed) - options - inherited) == []
    assert len(listed) == len(set(listed))


def test_an_option_that_trl_gains_is_missed(monkeypatch):
    monkeypatch.setattr(page, "options_of_trl", lambda: ["a_new_option"])
    with pytest.raises(AssertionError, match="a_new_option"):
        test_every_option_of_trl_is_on_the_page_once()


def test_what_the_fused_loss_refuses_is_on_the_page():
    rows = {row[0].strip("`"): row[3] for row in page.option_rows()}
    assert {name: text for name, text in rows.items() if "refused" in text} == {
        "top_entropy_quantile": "same; refused with vespo",
        "off_policy_mask_threshold": "same; refused with vespo",
        **dict.fromkeys(
            ["use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta",
             "entropy_target"],
            "refused",
        ),
    }  # fmt: skip
