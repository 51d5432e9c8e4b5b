"""One file over HTTP: resumed where it broke off, measured against what the server announces, with a guarded token.

Only ``http`` and ``https`` are spoken, redirects never lead from https to http, and a token goes to the one host that
it belongs to: it is no header that a redirect would carry along.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medssl_cli.core.errors import CheckpointError, ConfigError, ResourceError
from medssl_cli.core.run import free_bytes, package_version, say_disk_errors, write_json
from medssl_cli.services.download_checks import START_BYTES, refuse_page
from medssl_cli.services.download_settings import DownloadSettings

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Bytes there, bytes in all if announced."""

_LASTING = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which another attempt may succeed."""
_SECRETS = re.compile(
    r"([?&][^&=]*(?:sig|token|policy|key|credential|secret|auth|password)[^&=]*=)[^&#]+", re.IGNORECASE
)
"""Values in the query of an address that was signed for one person, as Meta's are."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Candidate:
    """One address of a file.

    Args:
        url: http or https.
        origin: Where the address comes from, e.g. ``--url``.
        filename: Name of the file on this disk.
        token: Secret for ``token_host`` and no other host; never sent in clear text over a network.
    """

    url: str
    origin: str
    filename: str
    token: str = ""
    token_host: str = ""

    @property
    def shown(self) -> str:
        """The address as it is told and kept: without signatures and keys, which open a file to whoever reads them."""
        return _SECRETS.sub(r"\1…", self.url)


@dataclass(frozen=True)
class Announced:
    """What a server says of a file: bytes and entity tag, where it does."""

    size: int | None
    etag: str


class _Broken(Exception):
    """An attempt failed in a way that another may not."""


def check_address(url: str, where: str) -> str:
    """The address, if it is one of http or https with a host and without a password.

    Raises:
        ConfigError: ``download_address``.
    """
    fault = ""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        fault = str(error)
    else:
        if parts.scheme not in ("http", "https") or not parts.hostname:
            fault = "only http:// and https:// addresses are fetched"
        elif "@" in parts.netloc:
            fault = "a password does not belong into an address"
    if fault or any(ord(char) <= 32 or ord(char) == 127 for char in url):
        raise ConfigError(
            "This is no address of a file.",
            where=f"{where}: {urlsplit(url).netloc.rpartition('@')[2] if '@' in url else url[:120]!r}"
            + (f": {fault}" if fault else ""),
            fix="give an address such as https://huggingface.co/OWNER/NAME/resolve/main/model.pth",
            code="download_address",
        )
    return url


# --- what is announced -----------------------------------------------------------------------------------------------


def probe(candidate: Candidate, settings: DownloadSettings) -> Announced:
    """Size and entity tag without the file: HEAD, else the first byte by a ranged GET.

    Raises:
        ResourceError: The server cannot be reached or has no such file.
    """

    def ask() -> Announced:
        head = _try_head(candidate, settings)
        if head is not None and head.size is not None:
            return head
        with _opened(candidate, settings, {"Range": "bytes=0-0"}) as answer:
            refuse_page(answer.read(1) if answer.status == 206 else b"", candidate.shown, _content_type(answer))
            return Announced(_announced_size(answer), answer.headers.get("ETag", ""))

    return _with_retries(ask, candidate, settings)


def _try_head(candidate: Candidate, settings: DownloadSettings) -> Announced | None:
    try:
        with _opened(candidate, settings, {}, method="HEAD") as answer:
            if "text/html" in _content_type(answer):
                return None
            return Announced(_announced_size(answer), answer.headers.get("ETag", ""))
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 405, 501):  # some storage signs addresses for GET alone
            return None
        raise


def _announced_size(answer: Any) -> int | None:
    """Bytes of the whole file, from Content-Range or Content-Length."""
    ranged = _content_range(answer)
    if ranged is not None:
        return ranged[1]
    length = answer.headers.get("Content-Length", "").strip()
    return int(length) if length.isdigit() else None


def _content_range(answer: Any) -> tuple[int | None, int | None] | None:
    """(first byte, bytes in all) of a Content-Range; either is None where it says ``*``."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
    if match is None:
        return None
    return (int(match[1]) if match[1] else None, int(match[2]) if match[2] != "*" else None)


def _content_type(answer: Any) -> str:
    return str(answer.headers.get("Content-Type", "")).lower()


# --- the file --------------------------------------------------------------------------------------------------------


def fetch(candidate: Candidate, part: Path, settings: DownloadSettings, progress: Progress | None = None) -> Announced:
    """Bring the file to ``part``, going on with what lies there of the same file; its size is then as announced.

    Beside ``part`` lies ``<part>.json`` with address, size and entity tag of what was begun, so that two files are
    never joined.

    Raises:
        ResourceError: No connection, no such file, or it broke off in every attempt; what came stays for the next run.
        CheckpointError: A page or more bytes than announced; ``part`` is removed.
    """
    state = _PartState(part, candidate.shown)

    def attempt() -> Announced:
        return _attempt(candidate, state, settings, progress)

    try:
        announced = _with_retries(attempt, candidate, settings)
    except CheckpointError:
        state.discard()
        raise
    state.note.unlink(missing_ok=True)
    return announced


class _PartState:
    """What lies on disk of an unfinished file, and of which file it is."""

    def __init__(self, part: Path, url: str) -> None:
        self.part, self.note, self.url = part, part.with_name(part.name + ".json"), url
        known = self._read()
        if known.get("url") != url or not part.is_file():
            self.discard()
            known = {}
        size = known.get("size")
        self.announced = Announced(size if isinstance(size, int) else None, str(known.get("etag", "")))

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    @property
    def have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def begin(self, announced: Announced) -> None:
        self.announced = announced
        write_json(self.note, {"url": self.url, "size": announced.size, "etag": announced.etag})

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.announced = Announced(None, "")


def _attempt(
    candidate: Candidate, state: _PartState, settings: DownloadSettings, progress: Progress | None
) -> Announced:
    have = state.have
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and state.announced.etag.startswith('"'):
        headers["If-Range"] = state.announced.etag
    try:
        with _opened(candidate, settings, headers) as answer:
            return _receive(answer, candidate, state, settings, progress)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return _judge_416(error, state, have)
        raise


def _judge_416(error: urllib.error.HTTPError, state: _PartState, have: int) -> Announced:
    """``Range Not Satisfiable`` means complete only if the server names the size that lies here, of the same file."""
    ranged = _content_range(error)
    etag = error.headers.get("ETag", "")
    same = not etag or not state.announced.etag or etag == state.announced.etag
    if ranged is not None and ranged[1] == have and state.announced.size in (None, have) and same:
        return Announced(have, state.announced.etag)
    state.discard()
    raise _Broken(f"the server refuses to go on at byte {have:,}; beginning anew") from error


def _receive(
    answer: Any, candidate: Candidate, state: _PartState, settings: DownloadSettings, progress: Progress | None
) -> Announced:
    announced = Announced(_announced_size(answer), answer.headers.get("ETag", ""))
    have = state.have
    if have and not (answer.status == 206 and _continues(answer, announced, state, have)):
        state.discard()
        have = 0
        if answer.status == 206:
            raise _Broken("the file on the server has changed; beginning anew")
    if not have:
        if answer.status == 206 and (_content_range(answer) or (0, None))[0] != 0:
            raise _Broken("the server sent a part that was not asked for")
        state.begin(announced)
    _refuse_full_disk(state.part, announced.size, have)
    total = _write_stream(answer, candidate, state, settings, progress, announced.size)
    if announced.size is not None and total < announced.size:
        raise _Broken(f"{total:,} of {announced.size:,} bytes came")
    return announced


def _continues(answer: Any, announced: Announced, state: _PartState, have: int) -> bool:
    """Whether a part begins where ours ends, of a file with the same size and entity tag."""
    ranged = _content_range(answer)
    before = state.announced
    same_tag = not announced.etag or not before.etag or announced.etag == before.etag
    same_size = before.size is None or announced.size == before.size
    return ranged is not None and ranged[0] == have and same_size and same_tag


def _refuse_full_disk(part: Path, size: int | None, have: int) -> None:
    if size is not None and size - have > free_bytes(part):
        raise ResourceError(
            "The disk is too full for this file.",
            where=f"{part.parent}: {size - have:,} bytes needed, {free_bytes(part):,} free",
            fix="free space, or choose another folder with --out",
            code="disk_full",
        )


def _write_stream(
    answer: Any,
    candidate: Candidate,
    state: _PartState,
    settings: DownloadSettings,
    progress: Progress | None,
    size: int | None,
) -> int:
    """Append what comes; bytes that lie there afterwards."""
    total = state.have
    with say_disk_errors(state.part), state.part.open("ab") as file:
        while True:
            try:
                block = answer.read(settings.chunk_bytes)
            except http.client.IncompleteRead as error:
                block = error.partial
                if not block:
                    break
            if not block:
                break
            if total < START_BYTES:
                start = block[:START_BYTES] if total == 0 else b""
                if start:
                    refuse_page(start, candidate.shown, _content_type(answer))
            file.write(block)
            total += len(block)
            if size is not None and total > size:
                raise CheckpointError(
                    "More bytes came than were announced.",
                    where=f"{candidate.shown}: {total:,} of {size:,}",
                    fix="try again with --force, or give another address with --url",
                    code="download_size",
                )
            if progress is not None:
                progress(total, size)
    return total


# --- connections -----------------------------------------------------------------------------------------------------


def _with_retries(action: Callable[[], Announced], candidate: Candidate, settings: DownloadSettings) -> Announced:
    """The result of ``action``, tried again after faults that may pass.

    Raises:
        ResourceError: ``download_network``, with the last fault.
    """
    pause = settings.backoff_s
    fault = ""
    for attempt in range(settings.retries + 1):
        if attempt:
            log.info("%s; attempt %d of %d in %.1f s", fault, attempt + 1, settings.retries + 1, pause)
            time.sleep(pause)
            pause *= 2
        try:
            return action()
        except urllib.error.HTTPError as error:
            error.close()
            fault = f"the server answers {error.code} {error.reason}"
            if error.code not in _LASTING:
                break
        except (_Broken, urllib.error.URLError, http.client.HTTPException, OSError) as error:
            fault = str(getattr(error, "reason", "") or error) or type(error).__name__
            if isinstance(error, _Refused):
                break
    raise ResourceError(
        "The file could not be fetched.",
        where=f"{candidate.shown} ({candidate.origin}): {fault}",
        fix="check the address and the network and run the same command again: it goes on where it stopped",
        code="download_network",
    )


class _Refused(urllib.error.URLError):
    """A redirect that is not followed."""


@contextlib.contextmanager
def _opened(
    candidate: Candidate, settings: DownloadSettings, headers: dict[str, str], method: str = "GET"
) -> Iterator[Any]:
    request = urllib.request.Request(candidate.url, headers=headers, method=method)
    request.add_header("User-Agent", f"medssl/{package_version()}")
    request.add_header("Accept-Encoding", "identity")
    _add_token(request, candidate)
    with _opener(candidate, settings).open(request) as answer:
        yield answer


def _add_token(request: urllib.request.Request, candidate: Candidate) -> None:
    """Add the token where the request goes to the host it belongs to, under TLS or on this machine."""
    parts = urlsplit(request.full_url)
    private = parts.scheme == "https" or parts.hostname in _LOOPBACK
    if candidate.token and private and parts.hostname == candidate.token_host:
        request.add_unredirected_header("Authorization", f"Bearer {candidate.token}")


def _opener(candidate: Candidate, settings: DownloadSettings) -> urllib.request.OpenerDirector:
    """http and https alone: an opener without handlers for files, FTP and data addresses."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(settings),
        _Https(settings),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirect(candidate),
    ):
        opener.add_handler(handler)
    return opener


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects within http and https, never back to clear text, and asks anew who may see the token."""

    max_redirections = 5

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        parts = urlsplit(newurl)
        if parts.scheme not in ("http", "https") or (urlsplit(req.full_url).scheme == "https" != parts.scheme):
            raise _Refused(f"the server leads to {parts.scheme}://{parts.netloc}, which is not followed")
        request = urllib.request.Request(newurl, headers=dict(req.headers), method=req.get_method())
        _add_token(request, self.candidate)
        return request

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


class _Timed:
    """A connection with one time-out until it stands and another for silence afterwards."""

    settings: DownloadSettings
    timeout: float | None
    sock: socket.socket

    def connect(self) -> None:
        self.timeout = self.settings.connect_timeout_s
        super().connect()  # type: ignore[misc]
        self.sock.settimeout(self.settings.read_timeout_s)


class _HttpConnection(_Timed, http.client.HTTPConnection):
    def __init__(self, *args: Any, settings: DownloadSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings


class _HttpsConnection(_Timed, http.client.HTTPSConnection):
    def __init__(self, *args: Any, settings: DownloadSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings


class _Http(urllib.request.HTTPHandler):
    def __init__(self, settings: DownloadSettings) -> None:
        super().__init__()
        self.settings = settings

    def http_open(self, req: Any) -> Any:
        return self.do_open(functools.partial(_HttpConnection, settings=self.settings), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, settings: DownloadSettings) -> None:
        super().__init__()
        self.settings = settings

    def https_open(self, req: Any) -> Any:
        connection = functools.partial(_HttpsConnection, settings=self.settings, context=ssl.create_default_context())
        return self.do_open(connection, req)
