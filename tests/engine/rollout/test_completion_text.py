from __future__ import annotations

from typing import Any

import pytest
import tiny

from fusedgrpo.engine.rollout.completion_text import CompletionText


def tags() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w7", "w8"]})
    return tokenizer


def test_special_tokens_are_left_out_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = CompletionText(tags(), [tiny.EOS], skip_special_tokens=True)
    assert text([5, 6, tiny.EOS], ended=True) == "w5 w6" and not caplog.records
    for _ in range(2):
        assert text([7, 5, 8, tiny.EOS], ended=True) == "w5"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "'w7', 'w8'" in said and "skip_special_tokens: false" in said


def test_special_tokens_are_kept_but_for_the_eos_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = CompletionText(tags(), [tiny.EOS], skip_special_tokens=False)
    assert text([7, 5, 8, tiny.EOS], ended=True).split() == ["w7", "w5", "w8"]
    assert text([7, 5, 8], ended=False).split() == ["w7", "w5", "w8"]
    assert not caplog.records
