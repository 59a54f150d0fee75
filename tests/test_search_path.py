from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fusedgrpo.search_path import library_first


def test_the_standard_library_is_first_and_the_users_folders_are_last(tmp_path: Path) -> None:
    library = os.path.dirname(os.__file__)
    packages = os.path.join(library, "site-packages")
    path = [str(tmp_path), packages, "relative", library, packages]
    assert library_first(path, [str(tmp_path / "x"), str(tmp_path)]) == [
        library,
        packages,
        os.path.abspath("relative"),
        str(tmp_path / "x"),
        str(tmp_path),
    ]


def test_files_in_the_working_directory_are_no_libraries(tmp_path: Path) -> None:
    for name in ("random", "logging", "json", "typer", "click", "rich", "yaml", "torch"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\n")
    (tmp_path / "c.yaml").write_text("bet: 1\n")
    root = str(Path(__file__).parents[1])
    for environment in ({}, {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}):
        done = subprocess.run(
            [sys.executable, "-m", "fusedgrpo.cli", "train", "c.yaml"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": root, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and "Did you mean 'beta'?" in done.stderr, done.stderr
        assert not (tmp_path / "ran").exists()
