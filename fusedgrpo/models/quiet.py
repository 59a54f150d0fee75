"""Messages of libraries that tell a user of this one nothing that he could act on."""

from __future__ import annotations

import logging

# Logger -> beginnings of its messages.
POINTLESS = {
    # On import, on every CPU with bfloat16 instructions: a kernel for inference from the Hub is
    # missing. Training does not run it (it has no backward pass), and `pip install kernels` would
    # not bring it offline.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}


class _Without(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


def silence() -> None:
    """Drop the messages of ``POINTLESS``; once, however often it is called."""
    for name, beginnings in POINTLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(own, _Without) for own in logger.filters):
            logger.addFilter(_Without(beginnings))
