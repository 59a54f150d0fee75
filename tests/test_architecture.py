"""docs/architecture.md names what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def test_every_room_of_the_package_is_in_the_table() -> None:
    for file in (ROOT / "fusedgrpo").glob("**/__init__.py"):
        room = file.parent.relative_to(ROOT / "fusedgrpo").as_posix()
        if room != "." and not room.startswith("kernels/"):
            assert f"`{room}/`" in TEXT or f"`{room.split('/')[-1]}/`" in TEXT, room


def test_every_path_in_it_exists() -> None:
    paths = re.findall(r"`([\w/]+\.(?:py|toml|md)|tests/[\w/.]+|docs/[\w/.]+)`", TEXT)
    assert len(paths) > 10
    known = {file.name for file in (ROOT / "fusedgrpo").rglob("*")}
    for path in paths:
        assert (ROOT / path).exists() or Path(path).name in known, path


def test_the_files_of_one_step_exist() -> None:
    step = TEXT.split("```")[1]
    modules = re.findall(r"->? \w[\w, ]*?  +([a-z_/]+(?:, [a-z_]+)?)  ", step)
    assert len(modules) > 6
    for module in modules:
        for part in module.split(", "):
            found = [*(ROOT / "fusedgrpo").rglob(f"{part}.py"), *(ROOT / "fusedgrpo").rglob(part)]
            assert found, part
