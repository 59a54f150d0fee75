"""``mutants`` and ``trial`` are modules of their own, for the script as for the tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
