"""Ids that were kept are those that would be made, and are not used for anything else."""

from __future__ import annotations

import os

import datasets
import pytest
import tiny

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data import encoded
from fusedgrpo.engine.data.chat import ChatTemplate
from fusedgrpo.engine.data.dataset import PromptDataset, load_prompts

ROWS = [
    {"prompt": [{"role": "user", "content": f"w{4 + i % 30} w{5 + i % 7}"}], "solution": i}
    for i in range(20)
]
LIMIT = 5


@pytest.fixture
def made(monkeypatch, tmp_path) -> list[int]:
    """One entry for each prompt that a template was applied to and that was tokenized."""
    monkeypatch.setattr(encoded, "LARGE", len(ROWS))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    calls: list[int] = []
    ids = ChatTemplate.ids

    def counted(self, messages, **options):
        calls.append(1)
        return ids(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "ids", counted)
    return calls


def load(rows=ROWS, template: str | None = None, **options) -> PromptDataset:
    tokenizer = tiny.tokenizer(template=True)
    if template is not None:
        tokenizer.chat_template = template
    config = GRPOConfig(max_completion_length=8, on_bad_row="skip", **options)
    return load_prompts(rows, config, tokenizer, vocab_size=tiny.VOCAB, context_length=100)


def test_the_second_run_makes_nothing_and_has_the_same(made, tmp_path):
    bad = [*ROWS, {"prompt": [], "solution": 1}, {"prompt": ROWS[0]["prompt"] * 9, "solution": 2}]
    first = load(bad, max_prompt_length=LIMIT)
    assert len(made) == len(ROWS) + 1 and len(first.skipped) == 2
    made.clear()
    second = load(bad, max_prompt_length=LIMIT)
    assert not made
    assert second.examples == first.examples and second.skipped == first.skipped
    assert second.fingerprint == first.fingerprint
    assert second.ids_fingerprint == first.ids_fingerprint
    assert len(load(bad, max_prompt_length=50)) == len(first) + 1, "ids are checked each time"
    assert not made


def test_files_that_were_not_used_for_long_go(made, tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "MOST", 2)
    folder = tmp_path / "cache" / "fusedgrpo"

    def at(system, seconds):
        """Load, and say when that was."""
        known = set(folder.glob("*"))
        load(system_prompt=system)
        for file in folder.glob("*"):
            if file not in known:
                os.utime(file, (seconds, seconds))

    at("w4", 1)
    at("w5", 2)
    at("w4", 3)  # used again, now
    at("w6", 4)
    assert len(list(folder.glob("*"))) == 2
    made.clear()
    load(system_prompt="w4")
    load(system_prompt="w6")
    assert not made
    load(system_prompt="w5")
    assert made


def test_what_is_said_of_one_data_set_is_not_said_again_of_the_next(caplog):
    said: set[str] = set()
    for _ in range(2):
        load_prompts(
            [{"prompt": "w4 w5"}],
            GRPOConfig(max_completion_length=8),
            tiny.tokenizer(template=True),
            vocab_size=tiny.VOCAB,
            context_length=100,
            said=said,
        )
    assert len(caplog.messages) == 1 and "text_as_user_turn" in caplog.messages[0]


@pytest.mark.parametrize(
    "other",
    [
        {"rows": [*ROWS[:-1], {**ROWS[-1], "prompt": ROWS[0]["prompt"]}]},
        {"rows": ROWS[::-1]},
        {"template": "{% for m in messages %}{{ m.content }} {% endfor %}<bos>"},
        {"system_prompt": "w9"},
        {"chat_template_kwargs": {"enable": True}},
    ],
)
def test_whatever_changes_the_ids_has_them_made_again(made, other):
    load()
    made.clear()
    load(**other)
    assert len(made) == len(ROWS)


def test_a_damaged_file_and_a_template_with_a_date_are_made_again(made, tmp_path, monkeypatch):
    first = load()
    (file,) = (tmp_path / "cache" / "fusedgrpo").iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    for damaged in (bytes(data), data[: len(data) // 2], b""):
        file.write_bytes(damaged)
        assert load().examples == first.examples
    dated = "{{ strftime_now('%Y') }} <bos>"
    for _ in range(2):
        made.clear()
        load(template=dated)
        assert len(made) == len(ROWS)
    made.clear()
    monkeypatch.setattr(datasets, "is_caching_enabled", lambda: False)
    load()
    assert len(made) == len(ROWS)
