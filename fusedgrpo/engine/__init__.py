"""Prompts -> samples -> rewards -> advantages -> update. One noun per file."""

from fusedgrpo.engine.reporting.plain_log import keep_plain

keep_plain()
