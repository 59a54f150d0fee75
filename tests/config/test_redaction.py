from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusedgrpo.config import redaction
from fusedgrpo.config.redaction import MARK, hide, hide_known, names_a_secret
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.reporting.plain_log import plain
from fusedgrpo.errors import ConfigError


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(redaction, "_known", set())
    yield


HIDDEN = "Zx81-qq77"  # in every value below

SECRETS: list[Any] = [
    {"api_key": HIDDEN},
    {"apikey": HIDDEN},
    {"openaiApiKey": HIDDEN},
    {"OPENAI_API_KEY": HIDDEN},
    {"key": HIDDEN},
    {"token": HIDDEN},
    {"hf_token": HIDDEN},
    {"accessToken": HIDDEN},
    {"access_tokens": [HIDDEN]},
    {"password": HIDDEN},
    {"db-password": HIDDEN},
    {"client": {"secret": HIDDEN}},
    {"auth": ["user", HIDDEN]},
    {"credentials": {"user": "me", "value": {"deep": [HIDDEN]}}},
    {"headers": {"X-Whatever": HIDDEN}},
    {"headers": [["X-Api-Key", HIDDEN]]},
    {"options": ["--api-key", HIDDEN]},
    {"env": [{"name": "API_KEY", "value": HIDDEN}]},
    {"env": {"SERVICE_PASSWORD": HIDDEN}},
    {"url": f"https://me:{HIDDEN}@host/v1"},
    {"url": f"https://{HIDDEN}@host/v1"},
    {"url": f"postgres://me:p@{HIDDEN}@host:5432/db"},
    {"url": f"https://host/v1?api_key={HIDDEN}&x=1"},
    {"url": f"https://host/v1?x=1&sig={HIDDEN}"},
    {"command": f"serve --port 1 password={HIDDEN}"},
    {"connection": f"AccountName=a;AccountKey={HIDDEN};"},
    {"settings": json.dumps({"api_key": HIDDEN})},
    {"header": f"Bearer {HIDDEN}"},
    {"header": f"Authorization: Bearer {HIDDEN}"},
    {"x": f"sk-{HIDDEN}"},
    {"x": [f"sk-proj-{HIDDEN}"]},
    {"x": f"ghp_{HIDDEN}"},
    {f"sk-{HIDDEN}": 1},
    {"pem": f"-----BEGIN PRIVATE KEY-----\n{HIDDEN}\n-----END PRIVATE KEY-----"},
    {"x": f"-----BEGIN RSA PRIVATE KEY-----\n{HIDDEN}\n-----END RSA PRIVATE KEY-----"},
]


@pytest.mark.parametrize("arguments", SECRETS, ids=lambda arguments: str(arguments)[:40])
def test_no_secret_is_in_the_record(arguments: dict[str, Any]) -> None:
    for options in ({"reward_kwargs": {"judge": arguments}}, {"model_init_kwargs": arguments}):
        config = GRPOConfig(**options)
        assert HIDDEN in str(config.to_dict())
        for text in (str(config.to_record()), repr(config), yaml.safe_dump(config.to_record())):
            assert HIDDEN not in text and MARK in text


PLAIN = {
    "strict": True,
    "weights": [1.0, 2.0],
    "mode": "keyword",
    "max_tokens": 512,
    "stop_token": "</answer>",
    "bos_token": "<s>",
    "tokens": ["yes", "no"],
    "answer_key": "solution",
    "tokenizer": "a/b",
    "url": "https://host:8000/v1?x=1",
    "model": "org/name",
    "token": True,
    "use_auth_token": False,
    "columns": ["key", "answer"],
    "text": "One token per key, a basic secretary.",
    "hub": "hf_transfer",
}


def test_what_is_no_secret_is_recorded_as_it_is() -> None:
    functions = ["rewards/secret_key.py:token", "accuracy"]
    options = {
        "reward_funcs": functions,
        "reward_kwargs": {functions[0]: PLAIN},
        "chat_template_kwargs": PLAIN,
        "tokenizer_name_or_path": "org/tokenizer",
    }
    assert GRPOConfig(**options).to_record() == GRPOConfig(**options).to_dict()
    assert not redaction._known


def test_a_truth_value_and_a_number_of_tokens_are_no_secret() -> None:
    assert not names_a_secret("max_new_tokens")
    assert GRPOConfig(model_init_kwargs={"token": True}).to_record()["model_init_kwargs"] == {
        "token": True
    }
    pin = GRPOConfig(reward_kwargs={"f": {"passcode": 1234}}).to_record()["reward_kwargs"]
    assert pin == {"f": {"passcode": MARK}}


def test_a_secret_is_hidden_wherever_else_it_turns_up() -> None:
    GRPOConfig(reward_kwargs={"f": {"api_key": HIDDEN, "password": "swordfish"}})
    said = f"ValueError: 401, no such user {HIDDEN!r}"
    assert plain(said) == f"ValueError: 401, no such user '{MARK}'"
    assert hide_known({"a": [f"x{HIDDEN}", 1]}) == {"a": [f"x{MARK}", 1]}
    # A word is a word, whoever takes it for a password.
    assert hide("The swordfish was caught.") == "The swordfish was caught."


def test_what_was_left_out_must_be_given_again(tmp_path: Path) -> None:
    config = GRPOConfig(
        reward_kwargs={"f": {"api_key": HIDDEN, "n": 1}}, model_init_kwargs={"token": HIDDEN}
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_record()))
    with pytest.raises(ConfigError) as caught:
        GRPOConfig.from_file(tmp_path / "c.yaml")
    assert [
        problem.split(" was a secret and left out")[0] for problem in caught.value.problems
    ] == [
        "model_init_kwargs.token:",
        "reward_kwargs.f.api_key:",
    ]
    given = {"reward_kwargs": json.dumps(config.reward_kwargs), "model_init_kwargs": "null"}
    assert GRPOConfig.from_file(tmp_path / "c.yaml", given).reward_kwargs == config.reward_kwargs
