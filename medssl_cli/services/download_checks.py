"""Whether what came is a weight file: never an error page, never half of an archive."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path, PurePosixPath

from medssl_cli.core.errors import CheckpointError

START_BYTES = 512
_PICKLE = b"\x80\x02"
_MAX_SAFETENSORS_HEADER = 100_000_000


def refuse_page(start: bytes, where: str, content_type: str = "") -> None:
    """Refuse the first bytes of a web page or of an error in JSON.

    Raises:
        CheckpointError: ``download_page``.
    """
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_page = text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<")) or "text/html" in content_type.lower()
    is_json = text.startswith((b"{", b"["))
    if is_page or is_json:
        shown = " ".join(start[:120].decode("utf-8", "replace").split())
        raise _fault(
            f"The server sent {'a web page' if is_page else 'a text'} and no weights.",
            f"{where}: {shown!r}",
            "open the address in a browser: a login, a licence or a confirmation may be asked for; then pass --url",
            "download_page",
        )


def check_weights(path: Path, where: str) -> str:
    """Format of a complete file: ``torch`` (a ZIP archive), ``torch-legacy`` (a pickle) or ``safetensors``.

    Nothing is unpacked or unpickled: a pickle is told by its first bytes alone, and read later with weights only.

    Raises:
        CheckpointError: Empty, a page, damaged, no weight file, or an archive with names that leave its folder.
    """
    with path.open("rb") as file:
        start = file.read(START_BYTES)
    refuse_page(start, where)
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path, where)
        return "torch"
    if start.startswith(_PICKLE):
        return "torch-legacy"
    if _is_safetensors(path, start):
        return "safetensors"
    raise _fault(
        "This is no file of weights.",
        f"{where}: it begins with {start[:16]!r}" if start else f"{where}: it is empty",
        "give the address of a .pth, .pt or .safetensors file with --url",
        "download_no_weights",
    )


def _check_archive(path: Path, where: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise _fault("The archive of weights is damaged.", f"{where}: {error}", "try again with --force") from error
    outside = [name for name in names if _leaves(name)]
    if damaged or outside:
        what = "The archive of weights is damaged." if damaged else "The archive holds names that leave its folder."
        raise _fault(what, f"{where}: {(damaged or outside[0])[:120]!r}", "get the file from its publisher")
    if not any(PurePosixPath(name).name == "data.pkl" for name in names):
        raise _fault(
            "This archive holds no weights of PyTorch.",
            f"{where}: {', '.join(names[:5]) or 'nothing in it'}",
            "unpack it yourself and give the .pth file to `medssl convert weights`",
        )


def _leaves(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]


def _is_safetensors(path: Path, start: bytes) -> bool:
    """8 bytes with the length of a JSON header, the header, then the tensors up to the last offset it names."""
    if len(start) < 10 or start[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", start[:8])
    size = path.stat().st_size
    if length > min(_MAX_SAFETENSORS_HEADER, size - 8):
        return False
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return False
    return 8 + length + max(ends, default=0) == size


def _fault(what: str, where: str, fix: str, code: str = "download_content") -> CheckpointError:
    return CheckpointError(what, where=where, fix=fix, code=code)
