"""Which linear layers ``lora_target_modules: all-linear`` means."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from torch import nn


def all_linear(model: Any) -> str | list[str]:
    """Names of the linear layers of ``model``, a causal LM, on which an adapter is trained and does
    what it says; ``"all-linear"`` where that is what peft takes it to be.

    Left out are the towers for pictures and sound, and projectors, of a model that only sees text
    here (an adapter there would never get a gradient); layers whose weight their parent reads
    without calling them, as fused state-space kernels do (an adapter would be passed over, and peft
    refuses some of these); and subclasses of Linear that compute something else.
    """
    from transformers.pytorch_utils import Conv1D

    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    decoder = model.get_decoder()
    linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    linear.discard(names.get(id(head), ""))
    chosen = []
    for name in linear:
        module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        inside = decoder is model or name.startswith(names[id(decoder)] + ".")
        attribute = name.rpartition(".")[2]
        direct = _read_directly(type(parent))  # type: ignore[arg-type]  # a class has a hash
        if inside and not _is_special(module) and attribute not in direct:
            chosen.append(name)
    # Without any, peft says what it was looking for.
    return "all-linear" if len(chosen) in (0, len(linear)) else sorted(chosen)


def _is_special(module: nn.Module) -> bool:
    """Whether a modelling file has a forward of its own for it."""
    foreign = ("transformers.models.", "transformers_modules.")
    own = type(module).forward is not nn.Linear.forward
    return own and type(module).__module__.startswith(foreign)


@functools.cache
def _read_directly(parent: type) -> frozenset[str]:
    """Children of a module class whose ``weight`` its code takes, instead of calling them."""
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):
        return frozenset()
    lines = [line for line in source.splitlines() if "init" not in line]
    # As an operand: its dtype or shape, or a slice for another kind of parallelism, is no such use.
    return frozenset(re.findall(r"self\.(\w+)\.weight(?=\s*[,@)])", "\n".join(lines)))
