"""Secrets: what counts as one, and taking them out of every text that is written or shown. The one rule for all rooms.

A secret is the value of an environment variable whose name says so (`AWS_SECRET_ACCESS_KEY`, `HF_TOKEN`, ...), Ray's
token, the user part of an address (`https://user:password@host`), a signature or key among an address's parameters, a
bearer header, and a value behind a name such as `password=`. `redact` replaces them; `secrets_in` finds them, for
configurations, which must not hold any.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, urlsplit

MASK = "***"
LEAST_LENGTH = 8  # a shorter value would be found in ordinary words
# Parts of a variable's name, between underscores, that make its value a secret.
SECRET_WORDS = frozenset(
    [
        "TOKEN",
        "SECRET",
        "SECRETS",
        "PASSWORD",
        "PASSWD",
        "PASS",
        "PASSPHRASE",
        "CREDENTIAL",
        "CREDENTIALS",
        "KEY",
        "APIKEY",
        "SAS",
        "SIGNATURE",
        "PAT",
        "COOKIE",
        "DSN",
        "AUTH",
        "AUTHORIZATION",
        "BEARER",
    ]
)
SECRET_PHRASES = ("CONNECTION_STRING",)
# Last parts that say where a secret lies, or how it is used, instead of what it is.
HARMLESS_ENDINGS = frozenset(
    [
        "PATH",
        "FILE",
        "DIR",
        "MODE",
        "SOCK",
        "TYPE",
        "METHOD",
        "NAME",
        "PARALLELISM",
        "ENABLED",
        "TIMEOUT",
        "SIZE",
        "COUNT",
    ]
)
RAY_TOKEN_FILES = ("RAY_AUTH_TOKEN_PATH",)

_PARAMETERS = (
    r"x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|googleaccessid|awsaccesskeyid|"
    r"signature|sig|token|access_token|auth|api_?key|key|password|secret"
)
_NAMES = (
    r"(?:aws_)?secret_access_key|secret_?key|client_secret|account_key|sas_token|session_token|access_token|auth_token|"
    r"api_?key|passwd|password|passphrase|secret"
)
_PATTERNS = (
    # abfs://container@account is an address without a secret: before an @ alone only http hides one.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:'\"<>]*:[^\s/@'\"<>]+@", re.IGNORECASE), rf"\1{MASK}@"),
    (re.compile(r"(\bhttps?://)(?!\*\*\*@)[^\s/@'\"<>]+@", re.IGNORECASE), rf"\1{MASK}@"),
    (re.compile(rf"([?&](?:{_PARAMETERS})=)[^&\s'\"<>#]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(rf"(\b(?:{_NAMES})[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&}})]{{6,}}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{30,}|\bgh[opsu]_[A-Za-z0-9]{30,}"), MASK),
)


def is_secret_name(name: str) -> bool:
    """Whether the value of a variable (or option) of this name is a secret."""
    parts = name.upper().replace("-", "_").split("_")
    wanted = any(part in SECRET_WORDS for part in parts) or any(one in name.upper() for one in SECRET_PHRASES)
    return wanted and parts[-1] not in HARMLESS_ENDINGS


def secret_values(environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets of an environment: value -> name of the variable that holds it; longer values first."""
    found: dict[str, str] = {}
    for name, value in environment.items():
        if name in RAY_TOKEN_FILES:
            found |= dict.fromkeys(_lines(Path(value)), name)
        elif is_secret_name(name):
            found[value.strip()] = name
        else:
            found |= dict.fromkeys(_inside(value), name)
    kept = {value: name for value, name in found.items() if len(value) >= LEAST_LENGTH and not _is_plain(value)}
    quoted = {quote(value, safe=""): name for value, name in kept.items()}
    return dict(sorted((quoted | kept).items(), key=lambda entry: -len(entry[0])))


def _inside(value: str) -> Iterator[str]:
    """Secrets in the value of a variable whose name does not tell: an address's password, options as JSON."""
    if "://" in value and "@" in value:
        try:
            yield urlsplit(value).password or ""
        except ValueError:
            return
    if value.startswith("{"):
        try:
            options = json.loads(value)
        except ValueError:
            return
        yield from (str(one) for name, one in options.items() if isinstance(one, str) and is_secret_name(name))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []


def _is_plain(value: str) -> bool:
    """A path or a number is not a secret, whatever its variable is called."""
    return value.startswith(("/", "~", "./")) or re.fullmatch(r"[\d.]+|true|false", value.lower()) is not None


@lru_cache(maxsize=4)
def _known(environment: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return secret_values(dict(environment))


def redact(text: str) -> str:
    """The text without secrets: each is replaced by ***, or by *** and the name of the variable that holds it."""
    for value, name in _known(tuple(os.environ.items())).items():
        if value in text:
            text = text.replace(value, f"{MASK}{name}{MASK}")
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redacted(value: Any) -> Any:
    """`redact` for every text in nested mappings, lists and tuples; anything else as it is."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(one) for one in value]
    return value


def secrets_in(value: Any, path: str = "") -> list[str]:
    """The dotted paths of all texts in nested mappings and lists that hold a secret."""
    if isinstance(value, str):
        return [path] if redact(value) != value else []
    if isinstance(value, Mapping):
        return [one for key, item in value.items() for one in secrets_in(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list | tuple):
        return [one for number, item in enumerate(value) for one in secrets_in(item, f"{path}[{number}]")]
    return []


class RedactedStream:
    """A text stream in front of another that takes secrets out of whole lines; the rest of a line waits for its end.

    What ends in a carriage return, or is flushed, goes out at once: progress bars and prompts are not held back.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._waiting = stream, ""

    def write(self, text: str) -> int:
        """Takes a piece of text."""
        self._waiting += text
        end = max(self._waiting.rfind("\n"), self._waiting.rfind("\r")) + 1
        if end:
            ready, self._waiting = self._waiting[:end], self._waiting[end:]
            self._stream.write(redact(ready))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Takes several."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Sends out what waits, too."""
        waiting, self._waiting = self._waiting, ""
        if waiting:
            self._stream.write(redact(waiting))
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_output() -> None:
    """From now on nothing that Python code of this process prints holds a secret; a second call does nothing."""
    if not isinstance(sys.stdout, RedactedStream):
        sys.stdout = RedactedStream(sys.stdout)
    if not isinstance(sys.stderr, RedactedStream):
        sys.stderr = RedactedStream(sys.stderr)


def restore_output() -> None:
    """Undoes `guard_output`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, RedactedStream):
            stream.flush()
            setattr(sys, name, stream._stream)
