"""Prompts -> samples -> rewards -> advantages -> update. One noun per file."""

from fusedgrpo.engine.reporting.plain_log import keep_plain
from fusedgrpo.models.quiet import silence

keep_plain()
silence()  # before the libraries that would speak are imported
