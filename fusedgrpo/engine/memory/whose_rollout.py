"""Whether completions come from our own decoder, from the options and the configuration alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.fake_layers import PagesStandIn
from fusedgrpo.engine.memory.measure import SmallModel
from fusedgrpo.models.packing_probe import foreign_layers, lacks_windows

# The values of ``sampler`` that are our decoder, for models that it can run.
DECODER = ("auto", "decoder")


def decodes_itself(config: GRPOConfig, small: Callable[[], SmallModel]) -> bool:
    """Whether a run of ``config`` has its completions from our own decoder.

    small: makes the model with few layers. What stands in the way of a packed forward is looked for
    as ``packing_probe`` does, but for the comparison of numbers, of which there are none.
    """
    return config.sampler in DECODER and (config.sampler != "auto" or packs(small()))


def packs(model: SmallModel) -> bool:
    """Whether one row without padding can be forwarded with an attention of ours in each layer."""
    settings = model.causal_lm.config
    if foreign_layers(settings) is not None:
        return False
    pages = PagesStandIn(1)
    model.model.eval()
    try:
        with model.fake, model.tracker, torch.no_grad(), model.autocast():
            model.forward(1, fusedgrpo_pages=pages)
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        return False  # arguments that it does not know, or shapes that it did not expect
    layers = settings.get_text_config().num_hidden_layers
    return pages.layers == layers and not lacks_windows(settings, pages.windows)
