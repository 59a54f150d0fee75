"""docs/options.md and docs/config.schema.json say what the schema says."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from fusedgrpo.config.aliases import ALIASES
from fusedgrpo.config.described import by_group, described_options, json_schema, options_page
from fusedgrpo.config.schema import GRPOConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("file", "made"), [("options.md", options_page), ("config.schema.json", json_schema)]
)
def test_the_committed_files_are_what_the_generator_writes(file, made):
    assert (DOCS / file).read_text() == made(), "run make options"


def test_every_option_is_there_once_with_all_its_names():
    options = described_options()
    assert [option.name for option in options] == [spec.name for spec in fields(GRPOConfig())]
    listed = [alias for option in options for alias in option.aliases]
    assert sorted(listed) == sorted(ALIASES)


def test_groups_are_not_torn_apart_and_sentences_end():
    options = described_options()
    assert [o.name for found in by_group(options).values() for o in found] == [
        option.name for option in options
    ]
    assert "other" not in by_group(options)
    for option in options:
        assert option.help[0] == option.help[0].upper() and option.help.endswith("."), option
        assert not option.help.endswith(".."), option


def test_the_schema_has_types_and_ranges():
    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False
    found = schema["properties"]
    assert found["lora_rank"]["minimum"] == found["lora_r"]["minimum"] == 1
    assert found["lora_alpha"]["type"] == ["integer", "null"]
    assert found["temperature"] == {
        "description": "Divides the logits, in sampling and in scoring. Default: 1.0.",
        "type": "number",
        "exclusiveMinimum": 0,
    }
    assert found["scale_rewards"]["enum"] == ["group", "batch", "none", True, False]
    assert "boolean" in found["resume_from_checkpoint"]["type"]
    assert "type" not in found["quantization_bit"]  # 4 is read as true
