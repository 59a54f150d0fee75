"""How long a test waits before it calls something hung. Never a measure of speed.

A machine with other work runs a test many times slower than a quiet one: what a test waits for
gets this much, and what should not be waited for sleeps longer than this.
"""

from __future__ import annotations

HUNG = 1500.0  # seconds; the pytest timeout in pyproject.toml is longer
