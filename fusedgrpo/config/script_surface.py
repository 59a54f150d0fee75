"""For scripts written for TRL: the attributes of transformers' training arguments that are no
options here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from fusedgrpo import host


class TrainingArgumentsSurface:
    """Names of ``transformers.TrainingArguments`` that are no options."""

    def to_record(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json_string(self) -> str:
        return json.dumps(self.to_record(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Values that trackers take as hyperparameters."""
        plain = (bool, int, float, str)
        return {k: v if isinstance(v, plain) else str(v) for k, v in self.to_record().items()}

    def get_process_log_level(self) -> int:
        return logging.INFO if self.should_log else logging.WARNING

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Nobody waits for the main process here: preparing the data writes nothing."""
        yield

    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def process_index(self) -> int:
        return int(os.environ.get("RANK", "0"))

    @property
    def local_process_index(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def should_log(self) -> bool:
        return self.process_index == 0

    @property
    def should_save(self) -> bool:
        return self.process_index == 0

    @property
    def device(self) -> Any:
        """Where the model of this process is."""
        return host.pick_device(bool(vars(self)["use_cpu"]))

    @property
    def n_gpu(self) -> int:
        return int(self.device.type == "cuda")
