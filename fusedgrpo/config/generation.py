"""``generation_kwargs``: arguments of ``generate``. Those that are options here become them; the
rest, which would be of a decoding that this is not, is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedgrpo.config.foreign import Refused
from fusedgrpo.config.from_pretrained import Settled

OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_completion_length",
    "stop": "stop_strings",
    "stop_strings": "stop_strings",
    "structured_outputs": "structured_outputs",
}
_SEARCH = (
    "completions are sampled, one by one: what a search finds is no draw from the policy, and "
    "ratios and advantages are about such draws"
)
_HARMLESS = {
    "do_sample": Refused("completions are sampled", (True,)),
    "num_beams": Refused(_SEARCH, (1,)),
    "num_beam_groups": Refused(_SEARCH, (1,)),
    "length_penalty": Refused(_SEARCH, (1.0,)),
    "early_stopping": Refused(_SEARCH, (False,)),
    "num_return_sequences": Refused("num_generations says how many there are", (1,)),
    "use_cache": Refused("the cache is always used", (True,)),
}
_REMEDY = Refused(f"of generate's arguments there are {', '.join(OPTIONS)}")


def settle_generation(given: Mapping[str, Any]) -> Settled:
    """Sort ``generation_kwargs``."""
    settled = Settled([], {}, [])
    for name, value in given.items():
        label = f"generation_kwargs.{name}"
        if name in OPTIONS:
            if value is not None:
                settled.options.append((label, OPTIONS[name], value))
        elif not (refused := _HARMLESS.get(name, _REMEDY)).accepts(value):
            settled.problems.append((label, f"not supported: {refused.remedy}."))
    return settled
