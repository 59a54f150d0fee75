"""Prompts -> samples -> rewards -> advantages -> update. One noun per file."""

from fusedgrpo.engine.plain_log import keep_plain

keep_plain()
