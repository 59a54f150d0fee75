"""A broken variant of a kernel, with the tests that have to notice it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """``old`` stands exactly once in ``file`` (of fusedgrpo/kernels) and becomes ``new``.

    tests: node ids below tests/kernels. The id of the implementation is left out of their
    brackets; it follows from the file.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def backend(self) -> str:
        return "triton" if "triton" in Path(self.file).name else "torch"

    @property
    def module(self) -> str:
        return f"fusedgrpo.kernels.{self.file.removesuffix('.py').replace('/', '.')}"

    def source(self) -> str:
        """The whole broken file. ValueError where ``old`` is not there exactly once."""
        text = (ROOT / "fusedgrpo" / "kernels" / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(
                f"Mutant {self.name!r}: its line is {found} times in {self.file}, expected once. "
                "The code has changed: give the mutant the line that does this now.\n" + self.old
            )
        return text.replace(self.old, self.new)
