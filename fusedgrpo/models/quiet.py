"""Messages of libraries that tell a user of this one nothing that he could act on."""

from __future__ import annotations

import logging
import warnings

# Logger -> beginnings of its messages.
POINTLESS = {
    # On import, on every CPU with bfloat16 instructions: a kernel for inference from the Hub is
    # missing. Training does not run it (it has no backward pass), and `pip install kernels` would
    # not bring it offline.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}
# Beginnings of warnings. tqdm's, on import in a notebook without ipywidgets: the bars that would
# be drawn with them are not drawn here.
POINTLESS_WARNINGS = ("IProgress not found",)


class _Without(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


def silence() -> None:
    """Drop the messages that are listed above; once, however often it is called."""
    for beginning in POINTLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)
    for name, beginnings in POINTLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(own, _Without) for own in logger.filters):
            logger.addFilter(_Without(beginnings))
