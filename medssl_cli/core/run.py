"""A folder of results: who wrote it, with what, atomically, and by one process at a time."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from medssl_cli.core.errors import ConfigError, DataError, ResourceError

SCHEMA_VERSION = 1
LOCK = ".lock"
"""File in a folder that the process working on it holds; no result, and kept when a folder is replaced."""
MARKER = ".medssl.json"
"""File in a folder of results that names the command which owns it."""
ORPHANS_END_S = 20.0
"""Workers look every 5 seconds whether their parent lives; a killed run's folder is free by then."""

_UMASK = os.umask(0)
os.umask(_UMASK)

RESEARCH_NOTE = "For research use only. Not a medical device; not for diagnosis or treatment."


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well, and vanishes otherwise.

    Raises:
        ResourceError: The disk is full or not writable; ``path`` is as it was.
    """
    temporary = _temporary_name(path)
    try:
        with say_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.chmod(temporary, 0o666 & ~_UMASK)  # some writers make files that only their owner may read
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_name(path: Path) -> Path:
    """A hidden name that no other writer has: containers that share a disk may share process ids too."""
    suffix = "".join(path.suffixes[-2:])  # readers and writers choose the format by suffix
    start = path.name.encode("utf-8", "surrogateescape")[:80].decode("utf-8", "ignore")
    return path.with_name(f".{start}.{os.getpid()}.{secrets.token_hex(4)}.tmp{suffix}")


@contextlib.contextmanager
def say_disk_errors(path: Path, bytes_needed: int | None = None) -> Iterator[None]:
    """Turn a full or read-only disk, or a file where a folder is needed, into a ResourceError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise
        need = "" if bytes_needed is None else f", {bytes_needed:,} bytes needed"
        raise ResourceError(
            "The result cannot be written.",
            where=f"{path}: {os.strerror(error.errno)}{need}, {free_bytes(path):,} bytes free",
            fix="free space or choose another folder; what was written before is intact",
            code="disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "not_writable",
        ) from error


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds ``path`` or its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN) whole or not at all."""
    write_text(path, to_json(data) + "\n")


def to_json(data: object) -> str:
    """Strict JSON with two spaces; paths become text, numpy numbers plain ones, undefined numbers ``null``."""
    return json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)


def plain(data: Any) -> Any:
    """The same data as dict, list, str, int, float, bool and None; NaN and infinity become None."""
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, np.ndarray):
        return plain(data.tolist())
    if isinstance(data, (list, tuple, set, frozenset)):
        return [plain(value) for value in data]
    if isinstance(data, np.generic):
        return plain(data.item())
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if data is None or isinstance(data, (str, int, bool)):
        return data
    return str(data)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a UTF-8 CSV whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_failures(path: Path, failures: Sequence[tuple[str, str, str, str]], *, keep_empty: bool = False) -> None:
    """``failures.csv`` of a cohort command: (case_id, path, reason, fix).

    Without failures it is removed, or holds its header alone with ``keep_empty``.
    """
    if failures or keep_empty:
        write_csv(path, ("case_id", "path", "reason", "fix"), failures)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- folders ---------------------------------------------------------------------------------------------------------


def check_out_folder(
    out: Path, command: str, *, overwrite: bool = False, inputs: Iterable[Path] = (), keep: Iterable[Path] = ()
) -> list[Path]:
    """What has to go before ``out`` can hold the results of ``command``; nothing is touched.

    A marker ``.medssl.json`` names the command that owns a folder; from its own folder a command deletes nothing here.

    Args:
        out: The folder, there or not.
        command: Its owner to be.
        overwrite: Whether other contents may go.
        inputs: Files and folders that the command reads.
        keep: Entries of ``out`` that stay, such as the scratch folder of this process.

    Raises:
        ConfigError: The folder is not empty and was not made by the same command; or it is to be emptied and holds,
            or lies in, one of ``inputs``, or holds the working directory or the home folder.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(
            "The output folder is a file.", where=str(out), fix="choose another --out", code="out_is_file"
        )
    kept = {LOCK, MARKER, *(path.name for path in keep)}  # a marker alone is what a refused command leaves
    entries = [entry for entry in out.iterdir() if entry.name not in kept] if out.is_dir() else []
    if not entries or _marker_command(out / MARKER) == command:
        return []
    if not overwrite:
        raise ConfigError(
            f"The output folder is not empty and holds no results of `medssl {command}`.",
            where=str(out),
            fix="pass --overwrite to replace its contents, or choose another folder with --out",
            code="out_not_empty",
        )
    _refuse_losing(out, inputs)
    return entries


def claim_out_folder(
    out: Path, command: str, *, overwrite: bool = False, inputs: Iterable[Path] = (), keep: Iterable[Path] = ()
) -> None:
    """Make ``out`` ready for the results of ``command``: delete what ``check_out_folder`` tells, and mark it.

    Whoever may delete does so while holding the lock of ``out``, and only once there is something to put there.

    Raises:
        ConfigError: As ``check_out_folder``.
        ResourceError: The folder cannot be written.
    """
    entries = check_out_folder(out, command, overwrite=overwrite, inputs=inputs, keep=keep)
    with say_disk_errors(out):
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    write_json(out / MARKER, {"command": command, "medssl_version": package_version()})


def _refuse_losing(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse to empty a folder whose contents are still needed."""
    folder = _real(out)
    needed = {"home folder": Path.home()}
    with contextlib.suppress(FileNotFoundError):  # a working directory that is gone lies nowhere
        needed["working directory"] = Path.cwd()
    lost = [f"the {name} {path}" for name, path in needed.items() if _real(path).is_relative_to(folder)]
    lost += [f"the input {path}" for path in inputs if not lost and _is_lost(path, folder)]
    if lost:
        raise ConfigError(
            "Replacing the contents of the output folder would delete more than old results.",
            where=f"{hide_home(str(out))} shares files with {hide_home(lost[0])}",
            fix="choose another folder with --out; nothing was deleted",
            code="out_holds_source",
        )


def _is_lost(path: Path, folder: Path) -> bool:
    """Whether emptying ``folder`` would take a path, a part of it, or what a link below it leads to."""
    real = _real(path)
    if real.is_relative_to(folder) or (_real(path.parent) / path.name).is_relative_to(folder):
        return True
    if not real.is_dir():
        return False
    inside = (Path(at, name) for at, folders, files in os.walk(real) for name in (*folders, *files))
    return folder.is_relative_to(real) or any(
        _real(entry).is_relative_to(folder) for entry in inside if entry.is_symlink()
    )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on a loop of links


def _marker_command(marker: Path) -> str | None:
    try:
        return json.loads(marker.read_text(encoding="utf-8")).get("command")
    except (OSError, ValueError, AttributeError):
        return None


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold ``folder`` for this process; the lock goes with the process, however it ends.

    Raises:
        ConfigError: Another process holds it.
        ResourceError: The folder cannot be written.
    """
    with say_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK).open("a+", encoding="utf-8")
    with opened as file:
        if not _acquire(file):
            raise ConfigError(
                f"Another process is working on this {what}.",
                where=f"{folder} (process {_holder(file) or 'unknown'})",
                fix="wait for it to end, or choose another --out",
                code="folder_locked",
            )
        _stamp(file)
        yield


def _acquire(file: IO[str]) -> bool:
    """Take the lock; wait while its holder is dead and only orphans of it, loader processes, still hold it."""
    deadline = time.monotonic() + ORPHANS_END_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            holder = _holder(file)
            if not holder.isdigit() or _lives(int(holder)) or time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stamp(file: IO[str]) -> None:
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()


def contained(root: Path, relative: str | Path, what: str = "path") -> Path:
    """``root / relative``, refused when it leaves ``root``, through ``..``, an absolute path or a link.

    Raises:
        DataError: The path leaves ``root`` or cannot be a path.
    """
    text = str(relative)
    fault = None
    if "\0" in text:
        fault = "it holds a NUL character"
    elif any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in Path(text).parts):
        fault = "a part of it is longer than 255 bytes"
    else:
        path = root / text
        if Path(text).is_absolute() or not path.resolve().is_relative_to(root.resolve()):
            fault = f"it leaves {root}"
    if fault:
        raise DataError(
            f"The {what} was refused.",
            where=f"{text[:120]!r}: {fault}",
            fix="use names below the data root, without .. and without links that lead out of it",
            code="path_escapes",
        )
    return root / text


# --- provenance ------------------------------------------------------------------------------------------------------


def package_version() -> str:
    """Version of medssl as installed."""
    return metadata.version("medssl")


def result_header(command: str, started: float) -> dict[str, Any]:
    """The keys that every JSON result begins with; ``started`` is ``time.time()`` at the start."""
    return {
        "schema_version": SCHEMA_VERSION,
        "medssl_version": package_version(),
        "command": command,
        "started_at": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "elapsed_s": round(time.time() - started, 3),
    }


def provenance() -> dict[str, Any]:
    """Command line, versions and git state, for ``run.json``; torch is not imported for it."""
    names = ("torch", "numpy", "scipy", "scikit-learn", "nibabel", "pydicom", "safetensors", "blosc2", "xformers")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "command_line": [hide_home(part) for part in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git": _git_state(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def hide_home(text: str) -> str:
    """Text with the user's home folder written as ``~``."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _git_state() -> dict[str, Any] | None:
    def ask(*words: str) -> str | None:
        try:
            answer = subprocess.run(("git", *words), capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    commit = ask("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "dirty": bool(ask("status", "--porcelain"))}


def digest_of(*parts: object) -> str:
    """SHA-256 over the JSON of the parts, in hex: names prepared stores, splits and caches."""
    text = json.dumps(plain(parts), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def usable_cpus() -> int:
    """CPUs that this process may use; all of the machine where the system does not tell (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_count(asked: int | None = None) -> int:
    """Worker processes to use: as asked, else SLURM's CPUs or this machine's, less one, from 1 to 8."""
    if asked is not None:
        return max(0, asked)
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    cpus = int(slurm) if slurm.isdigit() else usable_cpus()
    return min(8, max(1, cpus - 1))


# --- randomness ------------------------------------------------------------------------------------------------------


def seed_for(seed: int, *names: object) -> int:
    """A 63-bit seed that is a pure function of the run's seed and what it is for.

    Every draw of a run is seeded by its purpose and position, so that nothing depends on how many workers there are,
    and a resumed run draws what an undisturbed one would have drawn.
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Fix Python and NumPy; torch too if it is already loaded (never imported for it)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)


def temporary_folder(parent: Path, name: str) -> Path:
    """A new folder ``.tmp-<name>-…`` below ``parent``, to be renamed when it is complete."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".tmp-{name}-", dir=parent))
    folder.chmod(0o777 & ~_UMASK)
    return folder


def publish_folder(temporary: Path, final: Path) -> None:
    """Flush every file of a finished folder and rename it into place."""
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            _fsync(path)
    _fsync(temporary)
    os.replace(temporary, final)
    _fsync(final.parent)
