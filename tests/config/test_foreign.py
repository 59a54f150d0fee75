from __future__ import annotations

import pytest

from fusedgrpo.config.foreign import REFUSED
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("use_vllm", True, "sampled in this process"),
        ("top_entropy_quantile", 0.2, "entropy_coef"),
        ("reward_model", "org/rm", "reward_funcs"),
        ("load_in_8bit", True, "load_in_4bit"),
        ("deepspeed", "ds.json", "accelerate launch"),
        ("plot_loss", False, "plots are always written"),
        ("preprocessing_num_workers", 16, "remove it"),
        ("create_new_adapter", True, "is trained further"),
        ("pissa_init", True, "starting from zero"),
    ],
)
def test_options_of_other_trainers_are_refused_by_name(
    key: str, value: object, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: not supported: .*{remedy}"):
        GRPOConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_vllm", False),
        ("deepspeed", None),
        ("plot_loss", True),
        ("overwrite_cache", True),
        ("save_only_model", False),
        ("dataloader_num_workers", 0),
        ("gradient_checkpointing_kwargs", {"use_reentrant": False}),
    ],
)
def test_values_that_ask_for_what_happens_anyway_are_taken(key: str, value: object) -> None:
    assert GRPOConfig(**{key: value}) == GRPOConfig()


def test_inert_values_are_compared_with_their_type() -> None:
    assert not REFUSED["dataloader_num_workers"].accepts(False)
    assert not REFUSED["use_vllm"].accepts(0)
