"""Names of columns and arguments that the data and the reward functions share (TRL's, mostly)."""

from __future__ import annotations

# Where the answer of a row goes that has one in its layout (Alpaca, conversations).
ANSWER = "solution"

# What a row holds under these names does not reach the reward functions.
NOT_COLUMNS = ("prompt", "completion", "completion_ids")

# Every reward function gets these beside the columns of the data.
CONVENTION = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)
