"""Slice vectors on disk, found by the content they were computed from, so that they are never stale.

``<root>/features/<first 2 hex>/<key>.safetensors`` holds the arrays of one case and ``<key>.json`` beside it every
field of the key. The key is the SHA-256 of those fields, so a changed file, weight or setting asks for another name.
The check sum lies inside the array file: two processes that write one entry at a time leave a whole one, whichever
comes last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medssl_cli.core.errors import ConfigError, ResourceError
from medssl_cli.core.run import (
    SCHEMA_VERSION,
    atomic_path,
    digest_of,
    hide_home,
    package_version,
    plain,
    say_disk_errors,
    write_json,
)

log = logging.getLogger(__name__)

FOLDER = "features"
ARRAYS, SIDECAR = ".safetensors", ".json"
_KEY = re.compile(r"[0-9a-f]{64}")
_TEMPORARY_LIVES_S = 86400.0


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds.

    Args:
        entries: Complete entries.
        bytes: All its files together.
        models: (entries, bytes) by SHA-256 of the weights; empty text where a sidecar cannot be read.
    """

    entries: int
    bytes: int
    models: dict[str, tuple[int, int]]


class FeatureCache:
    """Arrays by the digest of everything that decides them.

    Args:
        root: Made when the first entry is written.

    Raises:
        ConfigError: A file lies where the folder should be.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / FOLDER
        for path in (self.root, self.folder):
            if path.exists() and not path.is_dir():
                raise ConfigError(
                    "The cache folder is a file.",
                    where=hide_home(str(path)),
                    fix="choose another folder with --cache",
                    code="cache_is_file",
                )

    @staticmethod
    def key_of(fields: Mapping[str, Any]) -> str:
        """SHA-256 of the canonical JSON of ``fields``, in hex."""
        return digest_of(dict(fields))

    def path(self, key: str) -> Path:
        """The array file of an entry, there or not.

        Raises:
            ValueError: ``key`` is no SHA-256 in hex; ids of cases never reach a file name.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"a key is 64 hex digits, got {key[:80]!r}")
        return self.folder / key[:2] / f"{key}{ARRAYS}"

    def read(self, key: str, fields: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """The arrays of an entry; None where there is none, or where it is damaged, which is said in the log.

        Raises:
            ResourceError: The file is there and may not be read.
        """
        path = self.path(key)
        sidecar = path.with_suffix(SIDECAR)
        if not path.is_file() or not sidecar.is_file():  # an entry is complete once its sidecar is written
            return None
        try:
            with say_disk_errors(path):
                return _verified(path, sidecar, fields)
        except FileNotFoundError:  # pruned by another process meanwhile
            return None
        except (_Damaged, OSError) as error:
            log.warning("Cached features are damaged and are computed again: %s: %s", hide_home(str(path)), error)
            return None

    def write(self, key: str, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays, whole or not at all.

        Raises:
            ResourceError: The disk is full or not writable.
        """
        path = self.path(key)
        dense = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        with atomic_path(path) as temporary, say_disk_errors(path, sum(array.nbytes for array in dense.values())):
            try:
                save_file(dense, temporary, metadata={"sha256": _checksum(dense)})
            except SafetensorError as error:  # how the library words a full disk
                raise ResourceError(
                    "The features cannot be kept.",
                    where=f"{hide_home(str(path))}: {error}",
                    fix="free space, or choose another folder with --cache; finished cases are kept",
                    code="cache_not_writable",
                ) from error
        facts = {
            "schema_version": SCHEMA_VERSION,
            "medssl_version": package_version(),
            "fields": dict(fields),
            "arrays": _shapes(dense),
        }
        write_json(path.with_suffix(SIDECAR), facts)

    def info(self) -> CacheInfo:
        """Entries and bytes, in all and by model."""
        models: dict[str, tuple[int, int]] = {}
        for path in self._entries():
            model = _model_of(path)
            entries, size = models.get(model, (0, 0))
            models[model] = entries + 1, size + _size(path) + _size(path.with_suffix(SIDECAR))
        every = sum(_size(path) for path in self._files())
        return CacheInfo(sum(entries for entries, _ in models.values()), every, dict(sorted(models.items())))

    def prune(
        self, *, older_than_days: float | None = None, model: str | None = None, everything: bool = False
    ) -> tuple[int, int]:
        """Remove entries, and what writers that were killed left behind.

        Args:
            older_than_days: Those that were written longer ago.
            model: Those of the weights whose SHA-256 begins so. Together with the age: those that meet both.
            everything: All.

        Returns:
            (entries removed, bytes freed).

        Raises:
            ConfigError: Nothing was chosen, or an empty model.
        """
        if not everything and older_than_days is None and not model:
            raise ConfigError(
                "Nothing was chosen that could be removed from the cache.",
                where=hide_home(str(self.folder)),
                fix="name an age in days, the SHA-256 of a model, or everything",
                code="prune_nothing",
            )
        now, removed, freed = time.time(), 0, 0
        for path in self._files():
            age_s = now - _mtime(path, now)
            if path.name.startswith("."):  # of a writer that was killed, unless it is at work
                chosen = age_s > _TEMPORARY_LIVES_S
            else:
                old = older_than_days is None or age_s > older_than_days * 86400
                chosen = everything or (old and (model is None or _model_of(path).startswith(model)))
            if chosen and path.suffix == ARRAYS and not path.name.startswith("."):
                sidecar = path.with_suffix(SIDECAR)
                freed += _size(path) + _size(sidecar)
                removed += sidecar.is_file()
                _remove(sidecar)  # first: without it an entry is not there
                _remove(path)
            elif chosen:
                freed += _size(path)
                _remove(path)
        return removed, freed

    def _files(self) -> list[Path]:
        """Every file of ours below the folder, array files before their sidecars."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.glob("[0-9a-f][0-9a-f]/*") if path.is_file() and _is_ours(path)]
        return sorted(found, key=lambda path: (path.suffix != ARRAYS, path))

    def _entries(self) -> Iterator[Path]:
        """Array files of complete entries."""
        for path in self._files():
            if path.suffix == ARRAYS and _KEY.fullmatch(path.stem) and path.with_suffix(SIDECAR).is_file():
                yield path


class _Damaged(Exception):
    """Why an entry is not what it should be."""


def _verified(path: Path, sidecar: Path, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _Damaged(f"its sidecar is no JSON ({error})") from error
    if not isinstance(facts, dict) or facts.get("fields") != plain(dict(fields)):
        raise _Damaged("its sidecar tells other fields")
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            checksum = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise _Damaged(str(error)) from error
    if _shapes(arrays) != facts.get("arrays"):
        raise _Damaged("its arrays have other shapes or types than its sidecar tells")
    if checksum != _checksum(arrays):
        raise _Damaged("its check sum differs")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise _Damaged(f"{name} holds NaN or infinity")
    return arrays


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in sorted(arrays.items())}


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _model_of(path: Path) -> str:
    """SHA-256 of the weights of an entry; empty if its sidecar does not tell."""
    try:
        fields = json.loads(path.with_suffix(SIDECAR).read_text(encoding="utf-8"))["fields"]
        return str(fields["settings"]["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _is_ours(path: Path) -> bool:
    if path.name.startswith("."):
        return path.name.endswith((f".tmp{ARRAYS}", f".tmp{SIDECAR}"))
    return path.suffix in (ARRAYS, SIDECAR) and _KEY.fullmatch(path.stem) is not None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _mtime(path: Path, missing: float) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return missing


def _remove(path: Path) -> None:
    with say_disk_errors(path):
        path.unlink(missing_ok=True)
