from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedgrpo.search_path import is_command_line, library_first


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


@pytest.mark.parametrize(
    "command, is_ours",
    [
        ("python -m fusedgrpo.cli train c.yaml", True),
        ("python -X importtime -W error -I -m fusedgrpo.cli", True),
        ("python /venv/bin/fusedgrpo train c.yaml", True),
        ("python -m fusedgrpo_tools", False),
        ("python -m pytest fusedgrpo", False),
        ("python train.py fusedgrpo", False),
        ("python", False),
    ],
)
def test_only_the_command_line_orders_the_path(command: str, is_ours: bool) -> None:
    assert is_command_line(command.split()) is is_ours


# Every module of the library that this system has, but those that Python's own start imports.
AT_START = """abc codecs encodings genericpath importlib io ntpath os pkgutil posixpath runpy site
sitecustomize stat usercustomize zipimport"""
LIBRARY = sorted(
    name
    for name in {*sys.stdlib_module_names, "typer", "click", "rich", "yaml", "torch", "numpy"}
    if name not in {*sys.builtin_module_names, *AT_START.split()}
    and not name.startswith("_")
    and importlib.util.find_spec(name) is not None
)


@pytest.mark.parametrize("names_the_folder", [False, True])
@pytest.mark.parametrize("start", ["module", "script"])
@pytest.mark.slow
def test_files_in_the_working_directory_are_no_libraries(
    tmp_path: Path, start: str, names_the_folder: bool
) -> None:
    # With PYTHONPATH, Python's own start imports from the folder, whatever the package does.
    known = ("random", "logging", "json", "typing", "typer", "click", "rich", "yaml", "torch")
    for name in known if names_the_folder else LIBRARY:
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\n")
    (tmp_path / "c.yaml").write_text("bet: 1\n")
    root = str(Path(__file__).parents[1])
    command = ["-m", "fusedgrpo.cli"]
    if start == "script":
        script = tmp_path / "bin" / "fusedgrpo"
        script.parent.mkdir()
        script.write_text("import sys\nfrom fusedgrpo.cli import main\nsys.exit(main())\n")
        command = [str(script)]
    paths = [str(tmp_path), root] if names_the_folder else [root]
    done = subprocess.run(
        [sys.executable, *command, "train", "c.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Did you mean 'beta'?" in done.stderr, done.stderr
    assert not (tmp_path / "ran").exists()
