"""``python -m fusedgrpo`` is ``fusedgrpo``."""

from __future__ import annotations

from fusedgrpo.cli import main

if __name__ == "__main__":
    main()
