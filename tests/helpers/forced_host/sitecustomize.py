"""Gives every Python that a test starts the answer of FUSEDGRPO_TEST_BFLOAT16 (tests/conftest.py)
for its own: with this folder on PYTHONPATH, before anything else is imported."""

import os

from fusedgrpo import host

_ANSWER = os.environ["FUSEDGRPO_TEST_BFLOAT16"] == "1"

host.has_bfloat16 = lambda device: _ANSWER
