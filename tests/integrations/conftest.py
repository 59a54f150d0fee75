"""The helpers beside the tests are modules of their own, for the scripts as for the tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
