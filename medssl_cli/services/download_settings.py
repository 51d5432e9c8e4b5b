"""Addresses and time-outs of ``medssl download``: keys of the environment, and of a ``.env`` file that is never run.

A ``.env`` file of the working directory is read as plain KEY=VALUE lines. Nothing in it is expanded or executed; a file
that holds anything else, or a command in a value, is refused. What the environment says wins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medssl_cli.core.errors import ConfigError

DOTENV = ".env"
MAX_DOTENV_BYTES = 65_536
HF_HOST = "huggingface.co"

_LINE = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=(.*)")
_COMMANDS = ("$(", "`", "<(", ">(")
_NUMBERS = {  # key: (default, least)
    "DOWNLOAD_CONNECT_TIMEOUT": (10.0, 0.001),
    "DOWNLOAD_READ_TIMEOUT": (120.0, 0.001),
    "DOWNLOAD_RETRIES": (3.0, 0.0),
    "DOWNLOAD_BACKOFF": (0.5, 0.0),
    "DOWNLOAD_CHUNK_MB": (1.0, 0.001),
}
_TEXTS = ("MEDSSL_HOME", "MODELS_DIR", "HF_MIRROR", "HUGGINGFACE_TOKEN")


@dataclass(frozen=True)
class DownloadSettings:
    """How to fetch, and what the keys say of places.

    Args:
        texts: Values of the keys that are set, spaces around them removed.
        connect_timeout_s, read_timeout_s: Until a connection stands, and of silence in it (DOWNLOAD_CONNECT_TIMEOUT,
            DOWNLOAD_READ_TIMEOUT).
        retries: Further attempts after the first (DOWNLOAD_RETRIES).
        backoff_s: Pause before the first of them, doubled each time (DOWNLOAD_BACKOFF).
        chunk_bytes: Read at once (DOWNLOAD_CHUNK_MB).
    """

    texts: Mapping[str, str]
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 120.0
    retries: int = 3
    backoff_s: float = 0.5
    chunk_bytes: int = 1 << 20

    def get(self, key: str) -> str:
        """The value of a key, empty where it is not set."""
        return self.texts.get(key, "")


def read_settings(
    environment: Mapping[str, str], folder: Path, keys: tuple[str, ...], timeout_s: float | None = None
) -> DownloadSettings:
    """Settings from the environment and from ``folder/.env``; a time-out that was typed wins over both.

    Args:
        environment: As ``os.environ``.
        folder: The working directory.
        keys: Further keys that the model has.
        timeout_s: In place of both time-outs.

    Raises:
        ConfigError: A ``.env`` that is no list of KEY=VALUE, or a number that is none; all of them at once.
    """
    values = {**read_dotenv(folder / DOTENV), **{k: v for k, v in environment.items() if v.strip()}}
    texts = {key: values[key].strip() for key in (*_TEXTS, *keys) if values.get(key, "").strip()}
    _refuse_expansion(folder / DOTENV, texts)
    numbers = _numbers(values)
    connect, read = numbers["DOWNLOAD_CONNECT_TIMEOUT"], numbers["DOWNLOAD_READ_TIMEOUT"]
    if timeout_s is not None:
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise _fault("A time-out is a number of seconds above 0.", f"--timeout {timeout_s:g}", "pass --timeout 60")
        connect = read = timeout_s
    return DownloadSettings(
        texts=texts,
        connect_timeout_s=connect,
        read_timeout_s=read,
        retries=int(numbers["DOWNLOAD_RETRIES"]),
        backoff_s=numbers["DOWNLOAD_BACKOFF"],
        chunk_bytes=max(1, int(numbers["DOWNLOAD_CHUNK_MB"] * 2**20)),
    )


def read_dotenv(path: Path) -> dict[str, str]:
    """KEY=VALUE of each line; comments, blank lines, ``export`` and one pair of quotes around a value are allowed.

    Raises:
        ConfigError: Unreadable, no text, too long, a line that is no KEY=VALUE, or a command in a value.
    """
    if not path.is_file():
        return {}
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _fault("The .env file cannot be read.", f"{path}: {error}", "save it as UTF-8 text") from error
    if len(data) > MAX_DOTENV_BYTES or "\0" in text:
        raise _fault("The .env file is no list of settings.", f"{path}: {len(data)} bytes", "keep KEY=VALUE lines only")
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        bare = line.strip()
        if not bare or bare.startswith("#"):
            continue
        match = _LINE.fullmatch(bare)
        if match is None or any(sign in bare for sign in _COMMANDS):
            raise _fault(
                "The .env file holds more than KEY=VALUE.",
                f"{path}, line {number}: {bare[:40]!r}",
                "leave settings alone in it: nothing of it is ever run",
            )
        values[match[1]] = _unquoted(match[2])
    return values


def _unquoted(text: str) -> str:
    """The value without its quotes, or without a comment behind a blank."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return re.split(r"\s#", text, maxsplit=1)[0].rstrip()


def _refuse_expansion(path: Path, texts: Mapping[str, str]) -> None:
    """Nothing is expanded, so a name of a variable in a value would be taken for a part of the address."""
    found = [key for key, value in texts.items() if "${" in value or "\0" in value or "\n" in value]
    if found:
        raise _fault("A setting holds a variable.", f"{path} or the environment: {', '.join(found)}", "write it out")


def _numbers(values: Mapping[str, str]) -> dict[str, float]:
    numbers, faults = {}, []
    for key, (default, least) in _NUMBERS.items():
        text = values.get(key, "").strip()
        try:
            number = float(text) if text else default
        except ValueError:
            number = math.nan
        whole = key != "DOWNLOAD_RETRIES" or number == number // 1
        if not (math.isfinite(number) and number >= least and whole and number <= 1e6):
            faults.append(
                f"{key}={text[:40]!r}: {'a whole' if key == 'DOWNLOAD_RETRIES' else 'a'} number from {least:g}"
            )
        numbers[key] = number
    if faults:
        raise _fault("A setting is no number.", "\n".join(faults), "correct it in the environment or in .env")
    return numbers


def _fault(what: str, where: str, fix: str) -> ConfigError:
    return ConfigError(what, where=where, fix=fix, code="download_settings")
