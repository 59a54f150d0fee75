"""Keys, passwords and tokens that a user passes on reach no file and no log.

What is stored is a configuration without them: a mark replaces values whose names say that they
are secret and text that looks like a credential. Rather too much is hidden than too little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MARK = "<secret, not stored>"

# Parts of names. The second kind also occurs in long words without a break: openaiapikey.
_WORDS = {
    "password", "passwords", "passwd", "pwd", "passphrase", "passcode", "secret", "secrets",
    "credential", "credentials", "cookie", "cookies", "auth", "authorization", "authentication",
    "bearer", "jwt", "oauth", "pem", "dsn", "otp", "webhook", "apikey", "apikeys", "headers",
}  # fmt: skip
_PARTS = re.compile(
    "passw|passphrase|secret|credential|apikey|apitoken|accesskey|accesstoken|authtoken|privatekey"
)
# ... unless the name goes on to say what kind of key or token it is.
_HARMLESS_KEYS = {
    "answer", "primary", "sort", "foreign", "column", "row", "json", "dict", "public", "label",
    "prompt", "solution", "target",
}  # fmt: skip
_HARMLESS_TOKENS = {
    "bos", "eos", "pad", "unk", "sep", "cls", "mask", "special", "image", "start", "end", "stop",
    "begin", "max", "min", "num", "n", "new", "per", "think", "thinking", "open", "close",
    "first", "last",
}  # fmt: skip
_SECRET_TOKENS = {
    "access", "api", "auth", "refresh", "bearer", "id", "hf", "hub", "user", "login",
}  # fmt: skip

_CREDENTIALS = re.compile(
    r"""
    \b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{8,}
    | \bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}
    | \b(?:gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|gsk_|nvapi-|pplx-|tvly-|r8_)[\w-]{8,}
    | \b(?:AKIA|ASIA)[0-9A-Z]{12,}
    | \bAIza[\w-]{16,}
    | \bya29\.[\w-]{8,}
    | \beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----[\s\S]*?(?:-----END\ [A-Z ]*-----|\Z)
    | (?<=://)[^\s/?\#]+(?=@)
    | (?<=[Bb]earer\ )[A-Za-z0-9._~+/=-]{4,}
    | (?<=BEARER\ )[A-Za-z0-9._~+/=-]{4,}
    | (?<=[Bb]asic\ )(?=\S*[0-9=])[A-Za-z0-9+/=]{8,}
    """,
    re.VERBOSE,
)
# name=value, name: value, "name": "value", ?name=value
_ASSIGNED = re.compile(
    r"""(?ix)
    ( (?: api[_-]?key | access[_-]?key | secret(?:[_-]?key)? | passw(?:or)?d | pwd | passphrase
        | authorization | accountkey | sharedaccesskey | private[_-]?key )  ["']?\s*[=:]\s*["']?
    | (?: token | signature | \bsig | \bkey ) ["']?=["']?
    )
    (?! \s | <secret) ( [^\s"'&;,}\])]{4,} )
    """
)

# Values that were hidden and are unlike any word, to be hidden wherever else they turn up.
_known: set[str] = set()


def redacted(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options``, plain values by the names of our options, with a mark in place of every secret
    that they hold."""
    return {name: _hide_option(name, value) for name, value in options.items()}


def _hide_option(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):  # modules, trackers, functions
        return [_hide(item) for item in value]
    if name == "structured_outputs":  # nothing but what texts look like, and a password is one
        return value
    if name == "reward_kwargs" and isinstance(value, Mapping):  # functions may be called anything
        return {function: _hide(arguments) for function, arguments in value.items()}
    return _hide(value)


def hide(text: str) -> str:
    """``text`` without the secrets that were seen in a configuration, and without what looks like
    a credential."""
    return _hide_known(_hide_credentials(text))


def hide_known(value: Any) -> Any:
    """``value``, and what it holds, without the secrets that were seen in a configuration."""
    if not _known:
        return value
    if isinstance(value, str):
        return _hide_known(value)
    if isinstance(value, Mapping):
        return {hide_known(key): hide_known(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_known(item) for item in value]
    return value


def remember(options: Mapping[str, Any]) -> None:
    """Know the secrets of ``options`` from now on, so that :func:`hide` finds them in any text."""
    redacted(options)


def marks(value: Any, where: str = "") -> list[str]:
    """Where in ``value`` a secret is missing: names joined by dots."""
    if isinstance(value, str):
        return [where] if MARK in value else []
    if isinstance(value, Mapping):
        inner = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        inner = [(str(index), item) for index, item in enumerate(value)]
    else:
        return []
    return [found for name, item in inner for found in marks(item, f"{where}.{name}".strip("."))]


def _hide(value: Any, secret: bool = False) -> Any:
    if isinstance(value, Mapping):
        named = any(
            names_a_secret(str(value[key])) for key in ("name", "header", "key") if key in value
        )
        return {
            _hide_credentials(key) if isinstance(key, str) else key: _hide(
                item,
                secret or names_a_secret(str(key), item) or (named and key == "value"),
            )
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        # A name and its value may also be neighbours: ["--api-key", "..."].
        before = [None, *value]
        return [
            _hide(item, secret or (isinstance(name, str) and _is_flag(name)))
            for name, item in zip(before, value, strict=False)
        ]
    if isinstance(value, str):
        if not secret:
            return _hide_credentials(value)
        _remember(value)
        return MARK if value.strip() else value
    if secret and isinstance(value, (int, float)) and not isinstance(value, bool):
        return MARK
    return value


def _is_flag(text: str) -> bool:
    """Whether a text in a list is the name of the secret that comes next. "key" is just a word."""
    is_name = re.fullmatch("-{0,2}[A-Za-z][A-Za-z0-9_-]*", text)
    return is_name is not None and text != "key" and names_a_secret(text)


def names_a_secret(name: str, value: Any = "") -> bool:
    """Whether what is called ``name`` is a secret by that name."""
    if len(name) > 100:
        return False
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    words = re.findall(r"[a-z0-9]+", spaced.lower())
    if not words:
        return False
    if _WORDS.intersection(words) or _PARTS.search("".join(words)):
        return True
    last, others = words[-1], set(words[:-1])
    if last in ("key", "keys"):
        return not others & _HARMLESS_KEYS
    if last == "token":
        # A number of tokens is a length; nobody's token is a number.
        return not others & _HARMLESS_TOKENS and not isinstance(value, (int, float))
    return last == "tokens" and bool(others & _SECRET_TOKENS)


def _hide_credentials(text: str) -> str:
    def assigned(match: re.Match[str]) -> str:
        _remember(match[2])
        return match[1] + MARK

    def credential(match: re.Match[str]) -> str:
        _remember(match[0])
        return MARK

    return _ASSIGNED.sub(assigned, _CREDENTIALS.sub(credential, text))


def _hide_known(text: str) -> str:
    for secret in _known:
        if secret in text:
            text = text.replace(secret, MARK)
    return text


def _remember(secret: str) -> None:
    """Remember a secret unless it looks like a word: the value of a dictionary's ``key`` is hidden
    where it is configured, and nowhere else."""
    mixed = re.search("[0-9]", secret) and re.search("[A-Za-z]", secret)
    if MARK not in secret and len(secret) >= 8 and (mixed or len(secret) >= 20):
        _known.add(secret)
