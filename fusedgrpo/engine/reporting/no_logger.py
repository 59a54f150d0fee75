"""A run's logger in processes that log nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.execution import unwatched
from fusedgrpo.engine.reporting.run_logger import RunLogger
from fusedgrpo.engine.reporting.unwritten import Unwritten
from fusedgrpo.engine.rollout.training_sample import TrainingSample

T = TypeVar("T")


class _NoDisplay:
    """A ``Display`` that nobody sees."""

    def phase(self, name: str) -> None: ...
    def note(self, text: str) -> None: ...


class NoLogger(RunLogger):
    """Nothing is locked, shown or written: in every process but the first, and where ``step`` is
    called without ``train``."""

    writes = False

    def __init__(self) -> None:
        self.display = _NoDisplay()  # type: ignore[assignment]
        self.progress = unwatched

    @classmethod
    @contextmanager
    def opened(cls, config: GRPOConfig, *, resume: bool, **rest: Any) -> Iterator[RunLogger]:
        yield cls()

    def write(self, unwritten: Unwritten, step: int, *, insist: bool = False) -> None:
        unwritten.completions.clear()
        unwritten.evaluations.clear()
        del unwritten.rows[: len(unwritten.complete_rows)]

    def writing(
        self, what: str, step: int, work: Callable[[], T], *, insist: bool = False
    ) -> T | None: ...
    def tell(self, *events: tuple[Any, ...]) -> None: ...
    def evaluated_first(self, metrics: Mapping[str, Any]) -> None: ...
    def answered(self, step: int, records: Sequence[Mapping[str, Any]]) -> None: ...
    def drifted(self, step: int, records: Sequence[Mapping[str, Any]]) -> None: ...

    def lacks_answers(self, step: int) -> bool:
        return False

    def skipped_rows(self, rows: Sequence[dict[str, Any]]) -> None: ...
    def finish(self, save_model: Callable[[Path], Path]) -> None: ...

    def dump(self, step: int, samples: Sequence[TrainingSample], **facts: Any) -> Path:
        return Path(f"step-{step:06d}.json")
