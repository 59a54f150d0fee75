"""A broken variant of a kernel, or of other arithmetic, with the tests that have to notice it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNEL_IDS = {"torch": "torch-cpu", "triton": "triton-interpreted"}


@dataclass(frozen=True)
class Mutant:
    """``old`` stands exactly once in ``file`` (of fusedgrpo/``room``) and becomes ``new``.

    tests: node ids below tests/``room``. Of kernels the id of the implementation is left out of
    their brackets; it follows from the file.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    room: str = "kernels"

    @property
    def backend(self) -> str:
        return "triton" if "triton" in Path(self.file).name else "torch"

    @property
    def module(self) -> str:
        return f"fusedgrpo.{self.room}.{self.file.removesuffix('.py').replace('/', '.')}"

    @property
    def nodes(self) -> list[str]:
        """The paths and whole names of its tests."""
        return [f"{ROOT / 'tests' / self.room}{os.sep}{self._whole(test)}" for test in self.tests]

    def _whole(self, test: str) -> str:
        if self.room != "kernels":
            return test
        name, bracket, parameters = test.partition("[")
        implementation = KERNEL_IDS[self.backend]
        return f"{name}[{implementation}-{parameters}" if bracket else f"{name}[{implementation}]"

    def source(self) -> str:
        """The whole broken file. ValueError where ``old`` is not there exactly once."""
        text = (ROOT / "fusedgrpo" / self.room / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(
                f"Mutant {self.name!r}: its line is {found} times in {self.file}, expected once. "
                "The code has changed: give the mutant the line that does this now.\n" + self.old
            )
        return text.replace(self.old, self.new)
