"""``medssl download``: published weights onto this disk, with size, content and SHA-256 checked before they count."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError, ConfigError, MedsslError, ResourceError
from medssl_cli.core.result import Result
from medssl_cli.core.run import contained, hide_home, locked, result_header, say_disk_errors, write_json
from medssl_cli.services.download_checks import check_weights
from medssl_cli.services.download_settings import HF_HOST, DownloadSettings, read_settings
from medssl_cli.services.download_transfer import Announced, Candidate, Progress, check_address, fetch, probe

DEFAULT_HOME = Path("~/.cache/medssl/weights")


@dataclass(frozen=True)
class Published:
    """A model whose weights can be fetched.

    Args:
        prefix: Of its keys, e.g. ``MEDDINOV3`` for MEDDINOV3_URL.
        folder: Below the folder of all weights; SUBDIR of its keys replaces the second part.
        filename: Name of the file; empty takes that of the address.
        hf_repo: Repository on Hugging Face, empty if there is none to be had without asking.
        source: For ``medssl convert weights --source``.
        about: One line.
    """

    prefix: str
    folder: tuple[str, str]
    filename: str
    hf_repo: str
    source: str
    about: str


PUBLISHED = {
    "meddinov3": Published(
        "MEDDINOV3",
        ("meddinov3", "MedDINOv3-ViTB-16-CT-3M"),
        "model.pth",
        "ricklisz123/MedDINOv3-ViTB-16-CT-3M",
        "meddinov3",
        "ViT-B/16 trained on 3.87 million axial CT slices, some 343 MB; for research on CT only",
    ),
    "dinov3": Published(
        "DINOV3", ("dinov3", ""), "", "", "dinov3", "Meta's DINOv3; its address is given by Meta on request: DINOV3_URL"
    ),
}
_KEYS = ("URL", "FILENAME", "SUBDIR", "HF_REPO", "CKPT_PATH", "GDRIVE_FILE_ID", "GDRIVE_URL", "GDRIVE_FILENAME")


@dataclass(frozen=True)
class DownloadRequest:
    """What the user asks for.

    Args:
        name: Of ``PUBLISHED``.
        url: Address in place of the known ones.
        sha256: Expected digest in hex.
        out: Folder of the file; None takes the keys and then ``DEFAULT_HOME``.
        force: Fetch again what is there.
        timeout_s: In place of both time-outs of the keys.
    """

    name: str
    url: str | None = None
    sha256: str | None = None
    out: Path | None = None
    force: bool = False
    timeout_s: float | None = None


def download(
    request: DownloadRequest,
    *,
    environment: Mapping[str, str] = os.environ,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Fetch the weights, or check those that are there; the file appears once everything about it is right.

    Args:
        request: What.
        environment: As ``os.environ``.
        folder: Where a ``.env`` may lie; the working directory if None.
        progress: Told of the bytes.

    Raises:
        ConfigError: Unknown name, no address, wrong settings, or a path that leaves its folder.
        ResourceError: Every address failed, or the disk is full.
        CheckpointError: Wrong size, digest or content; no file is left of it, an older one is as it was.
    """
    started = time.time()
    model, settings, candidates = _prepare(request, environment, folder or Path())
    present = [path for path in _places(request, model, settings, candidates) if path.is_file()]
    if present and not request.force:
        facts = _verify_present(present[0], request)
        return _result(request.name, model, present[0], {**facts, "downloaded": False}, started)
    path, facts = _first_that_works(request, model, settings, candidates, progress)
    return _result(request.name, model, path, {**facts, "downloaded": True}, started)


def check_size(
    request: DownloadRequest, *, environment: Mapping[str, str] = os.environ, folder: Path | None = None
) -> Result:
    """What the first server that answers announces, against the file that is there; nothing is fetched.

    Raises:
        ConfigError, ResourceError: As ``download``.
    """
    started = time.time()
    model, settings, candidates = _prepare(request, environment, folder or Path())
    candidate, announced = _first_announced(candidates, settings)
    path = next(iter(_places(request, model, settings, [candidate])))
    present = path.stat().st_size if path.is_file() else None
    facts = {
        **result_header("download", started),
        "name": request.name,
        "url": candidate.shown,
        "origin": candidate.origin,
        "path": hide_home(str(path)),
        "announced_bytes": announced.size,
        "present_bytes": present,
        "equal": None if present is None or announced.size is None else present == announced.size,
    }
    if announced.size is None:
        facts["reason"] = "the server does not announce a size"
    lines = [
        f"{candidate.origin}: {candidate.shown}",
        f"announced: {'unknown' if announced.size is None else f'{announced.size:,} bytes'}",
        f"here:      {'nothing' if present is None else f'{present:,} bytes'} at {path}",
    ]
    error = None
    if facts["equal"] is False:
        error = CheckpointError(
            "The file here has another size than the one announced.",
            where=f"{path}: {present:,} bytes here, {announced.size:,} announced",
            fix=f"fetch it again: medssl download {request.name} --force",
            code="download_size",
        )
    return Result(lines, facts, error)


def list_published(*, environment: Mapping[str, str] = os.environ, folder: Path | None = None) -> Result:
    """Every name with what it is and whether it is here."""
    started = time.time()
    lines, models = [], []
    for name, model in PUBLISHED.items():
        settings = read_settings(environment, folder or Path(), _keys_of(model))
        request = DownloadRequest(name)
        candidates = _candidates(request, model, settings)
        here = [path for path in _places(request, model, settings, candidates) if path.is_file()]
        state = f"here: {here[0]}" if here else "not here" if candidates else f"no address: set {model.prefix}_URL"
        lines.append(f"{name:<12}{model.about}; {state}")
        path = hide_home(str(here[0])) if here else None
        models.append({"name": name, "about": model.about, "path": path, "urls": [c.shown for c in candidates]})
    return Result(lines, {**result_header("download", started), "models": models})


# --- what and where --------------------------------------------------------------------------------------------------


def _prepare(
    request: DownloadRequest, environment: Mapping[str, str], folder: Path
) -> tuple[Published, DownloadSettings, list[Candidate]]:
    model = PUBLISHED.get(request.name)
    if model is None:
        near = difflib.get_close_matches(request.name, PUBLISHED, n=1)
        raise ConfigError(
            f"There are no weights named {request.name[:80]!r}.",
            where=f"available: {', '.join(PUBLISHED)}",
            fix=f"did you mean {near[0]}?" if near else "see `medssl download --list`",
            code="download_unknown",
        )
    if request.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", request.sha256):
        raise ConfigError(
            "A SHA-256 has 64 hexadecimal digits.",
            where=f"--sha256 {request.sha256[:80]}",
            fix="copy it whole",
            code="download_sha256",
        )
    if request.out is not None and request.out.exists() and not request.out.is_dir():
        raise ConfigError(
            "The output folder is a file.",
            where=hide_home(str(request.out)),
            fix="name a folder with --out; the file in it has the name that its publisher gave it",
            code="out_is_file",
        )
    settings = read_settings(environment, folder, _keys_of(model), request.timeout_s)
    candidates = _candidates(request, model, settings)
    if not candidates:
        raise ConfigError(
            f"No address is known for {request.name}.",
            where=f"{model.prefix}_URL is not set",
            fix=f"ask its publisher for an address, then set {model.prefix}_URL or pass --url",
            code="download_no_address",
        )
    return model, settings, candidates


def _keys_of(model: Published) -> tuple[str, ...]:
    return tuple(f"{model.prefix}_{key}" for key in _KEYS)


def _candidates(request: DownloadRequest, model: Published, settings: DownloadSettings) -> list[Candidate]:
    """Addresses in the order in which they are tried: --url alone, else the key, Hugging Face, Google Drive."""
    token, prefix = settings.get("HUGGINGFACE_TOKEN"), model.prefix
    named = settings.get(f"{prefix}_FILENAME") or model.filename

    def at(url: str, origin: str, filename: str = "") -> Candidate:
        check_address(url, origin)
        name = filename or named or unquote(urlsplit(url).path.rpartition("/")[2]) or "weights"
        return Candidate(url, origin, name, token, HF_HOST)

    if request.url:
        return [at(request.url, "--url")]
    found = []
    if url := settings.get(f"{prefix}_URL"):
        found.append(at(url, f"{prefix}_URL"))
    if repo := settings.get(f"{prefix}_HF_REPO") or model.hf_repo:
        path = f"{quote(repo, safe='/')}/resolve/main/{quote(named or 'model.pth', safe='/')}"
        if mirror := settings.get("HF_MIRROR"):
            base = mirror.rstrip("/") if "://" in mirror else f"https://{mirror.rstrip('/')}"
            found.append(at(f"{base}/{path}", "HF_MIRROR"))
        found.append(at(f"https://{HF_HOST}/{path}", "Hugging Face"))
    if url := _drive_url(settings, prefix):
        found.append(at(url, "Google Drive", settings.get(f"{prefix}_GDRIVE_FILENAME")))
    return found


def _drive_url(settings: DownloadSettings, prefix: str) -> str:
    """Address of a shared file of Google Drive by its id, which a share link holds; empty without one."""
    link = settings.get(f"{prefix}_GDRIVE_URL")
    inside = re.search(r"(?:/d/|[?&]id=)([\w-]{10,})", link)
    file_id = settings.get(f"{prefix}_GDRIVE_FILE_ID") or (inside[1] if inside else "")
    if not file_id:
        return link
    return f"https://drive.usercontent.google.com/download?id={quote(file_id, safe='')}&export=download&confirm=t"


def _places(
    request: DownloadRequest, model: Published, settings: DownloadSettings, candidates: Sequence[Candidate]
) -> list[Path]:
    """Where the file of each candidate belongs, without repeats.

    Raises:
        ConfigError: A name that leaves the folder of the weights.
    """
    exact = settings.get(f"{model.prefix}_CKPT_PATH")
    if exact and request.out is None:
        return [Path(exact).expanduser()]
    root = settings.get("MEDSSL_HOME") or settings.get("MODELS_DIR")
    home = (Path(root) if root else DEFAULT_HOME).expanduser()
    subdir = settings.get(f"{model.prefix}_SUBDIR") or model.folder[1]
    places = []
    for candidate in candidates:
        name = Path(candidate.filename).name if model.filename else candidate.filename
        try:
            if request.out is not None:
                path = contained(request.out, name, "file name")
            else:
                path = contained(home / model.folder[0], Path(subdir) / name, "file name")
        except MedsslError as error:
            raise ConfigError(error.what, where=error.where, fix=error.fix, code=error.code) from error
        if path.name in ("", ".", "..") or path == request.out:
            raise ConfigError(
                "The weights have no file name.",
                where=candidate.shown,
                fix=f"set {model.prefix}_FILENAME",
                code="path_escapes",
            )
        places.append(path)
    return list(dict.fromkeys(places))


# --- fetching --------------------------------------------------------------------------------------------------------


def _first_that_works(
    request: DownloadRequest,
    model: Published,
    settings: DownloadSettings,
    candidates: Sequence[Candidate],
    progress: Progress | None,
) -> tuple[Path, dict[str, Any]]:
    """Try one address after the other; content that is wrong ends it only if no other address has the right one."""
    faults: list[MedsslError] = []
    for candidate in candidates:
        path = _places(request, model, settings, [candidate])[0]
        try:
            return path, _fetch_to(path, candidate, request, settings, progress)
        except (ResourceError, CheckpointError) as error:
            if error.code == "disk_full":
                raise
            faults.append(error)
    wrong = [fault for fault in faults if isinstance(fault, CheckpointError)]
    chosen = wrong[0] if wrong else faults[0]
    where = "\n".join(fault.where for fault in faults)
    raise type(chosen)(chosen.what, where=where, fix=chosen.fix, code=chosen.code)


def _fetch_to(
    path: Path, candidate: Candidate, request: DownloadRequest, settings: DownloadSettings, progress: Progress | None
) -> dict[str, Any]:
    started = time.time()
    part = path.with_name(path.name + ".part")
    with locked(path.parent, "download"), say_disk_errors(path):
        announced = fetch(candidate, part, settings, progress)
        try:
            facts = _check_part(part, candidate, announced, request)
        except CheckpointError:
            part.unlink(missing_ok=True)
            raise
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        facts = {"url": candidate.shown, "origin": candidate.origin, **facts}
        write_json(_record(path), {**result_header("download", started), "file": path.name, **facts})
    return facts


def _check_part(part: Path, candidate: Candidate, announced: Announced, request: DownloadRequest) -> dict[str, Any]:
    size = part.stat().st_size if part.is_file() else 0
    if announced.size is not None and size != announced.size:
        raise CheckpointError(
            "The file has another size than the one announced.",
            where=f"{candidate.shown}: {size:,} bytes came, {announced.size:,} were announced",
            fix="run the same command again",
            code="download_size",
        )
    kind = check_weights(part, candidate.shown) if size else _no_bytes(candidate)
    digest = file_digest(part)
    _compare_digest(digest, request.sha256, candidate.shown)
    return {
        "size": size,
        "announced": announced.size is not None,
        "sha256": digest,
        "sha256_checked": request.sha256 is not None,
        "etag": announced.etag or None,
        "format": kind,
    }


def _no_bytes(candidate: Candidate) -> str:
    raise CheckpointError("The file is empty.", where=candidate.shown, fix="check the address", code="download_content")


def _compare_digest(digest: str, expected: str | None, where: str) -> None:
    if expected is not None and digest != expected.lower():
        raise CheckpointError(
            "The SHA-256 is another one.",
            where=f"{where}: {digest}, expected {expected.lower()}",
            fix="do not use this file; check the address and the digest with the publisher",
            code="download_sha256",
        )


def _verify_present(path: Path, request: DownloadRequest) -> dict[str, Any]:
    """The file that is there against its record and the digest that was typed; a missing record is written."""
    record = _read_record(path)
    size, digest = path.stat().st_size, file_digest(path)
    again = f"fetch it again: medssl download {request.name} --force"
    if record and (record.get("size"), record.get("sha256")) != (size, digest):
        raise CheckpointError(
            "The file has changed since it was fetched.",
            where=f"{path}: {size:,} bytes, SHA-256 {digest}; recorded {record.get('size')}, {record.get('sha256')}",
            fix=again,
            code="download_changed",
        )
    kind = check_weights(path, str(path))
    _compare_digest(digest, request.sha256, str(path))
    facts = {"url": record.get("url"), "origin": record.get("origin"), "size": size}
    facts |= {"announced": record.get("announced"), "sha256": digest, "etag": record.get("etag"), "format": kind}
    facts["sha256_checked"] = request.sha256 is not None or bool(record.get("sha256_checked"))
    if not record:
        facts["reason"] = "the file was there without a record of its address"
    if not record or facts["sha256_checked"] != record.get("sha256_checked"):
        write_json(_record(path), {**result_header("download", time.time()), "file": path.name, **facts})
    return facts


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(_record(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and "sha256" in record else {}


def _first_announced(candidates: Sequence[Candidate], settings: DownloadSettings) -> tuple[Candidate, Announced]:
    faults = []
    for candidate in candidates:
        try:
            return candidate, probe(candidate, settings)
        except (ResourceError, CheckpointError) as error:
            faults.append(error)
    first = faults[0]
    where = "\n".join(fault.where for fault in faults)
    raise type(first)(first.what, where=where, fix=first.fix, code=first.code)


def _result(name: str, model: Published, path: Path, facts: dict[str, Any], started: float) -> Result:
    quoted = shlex.quote(str(path))
    next_command = f"medssl convert weights {quoted} OUT --source {model.source}"
    checked = "as expected" if facts["sha256_checked"] else "recorded, not compared with a published one"
    lines = [
        f"{name}: {path}" + ("" if facts["downloaded"] else " (was there already)"),
        f"{facts['size']:,} bytes, SHA-256 {facts['sha256']} ({checked})",
        f"next: {next_command}",
        f"or:   medssl pretrain --init {quoted}",
    ]
    shown = {"name": name, "path": hide_home(str(path)), **facts, "next": hide_home(next_command)}
    return Result(lines, {**result_header("download", started), **shown})
