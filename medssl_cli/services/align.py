"""A case tree onto one grid: every sequence of a case resampled to its reference, registered first if asked.

The tree is mirrored; sidecars go along and record what was done. Running again does only what is new or changed.
"""

from __future__ import annotations

import csv
import difflib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.errors import ConfigError, DataError, MedsslError, PartialFailure
from medssl_cli.core.run import (
    check_out_folder,
    claim_out_folder,
    contained,
    digest_of,
    hide_home,
    locked,
    plain,
    result_header,
    worker_count,
    write_csv,
    write_failures,
    write_json,
    write_text,
)
from medssl_cli.core.volume import Volume
from medssl_cli.core.wording import counted
from medssl_cli.data.images import VOLUME_SUFFIXES, check_finite, read_volume, volume_stem, write_volume
from medssl_cli.data.manifest import Table, read_table
from medssl_cli.data.resample import holds_classes, is_label, register_affine, resample_to, transform_matrix
from medssl_cli.services.wording import first_and_more, up_to_date
from medssl_cli.services.worker_pool import ordered_map, told_interrupts

logger = logging.getLogger(__name__)

COMMAND = "convert align"
FORMAT = 3


@dataclass(frozen=True)
class AlignRequest:
    """What the user asked for; the flags of ``medssl convert align``."""

    root: Path
    out: Path
    reference: str
    register: bool = False
    workers: int | None = None
    on_error: str = "stop"
    overwrite: bool = False


@dataclass(frozen=True)
class AlignTask:
    """One case: its files by stem, the reference among them or not; ``dry_run`` reads them and writes nothing."""

    case_id: str
    files: dict[str, Path]
    request: AlignRequest
    dry_run: bool = False


@dataclass(frozen=True)
class Aligned:
    """One volume on the reference grid; ``n_slices`` and ``spacing`` (z, y, x) in mm are the grid's."""

    case_id: str
    stem: str
    path: str
    status: str
    n_slices: int
    spacing: tuple[float, float, float]
    metric: float | None = None


@dataclass
class AlignedCase:
    """What became of one case: its volumes, and (path, reason, fix) of each that failed."""

    case_id: str
    outputs: list[Aligned] = field(default_factory=list)
    failures: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class AlignResult:
    """What became of every case, or, with ``dry_run``, what would."""

    request: AlignRequest
    started: float
    n_cases: int = 0
    dry_run: bool = False
    outputs: list[Aligned] = field(default_factory=list)
    failures: list[tuple[str, str, str, str]] = field(default_factory=list)
    stopped: bool = False

    @property
    def error(self) -> MedsslError | None:
        """The error to end with: None, partial failure, or data rejected."""
        if not self.failures:
            return None
        table = None if self.dry_run else self.request.out / "failures.csv"
        where = first_and_more([f"{case} {path}: {reason}" for case, path, reason, _ in self.failures], table)
        case, path, _, fix = self.failures[0]
        if len({failure[3] for failure in self.failures}) > 1:
            fix = f"{case} {path}: {fix}"
        fix += "; nothing was replaced" if self.dry_run else ""
        what = f"{counted(len(self.failures), 'volume')} could not be aligned"
        if self.stopped:
            fix = f"{fix}; --on-error skip goes on with the other cases"
            return DataError(f"{what}, and the run stopped there.", where=where, fix=fix, code="align_failed")
        return PartialFailure(f"{what}; everything else is done.", where=where, fix=fix, code="align_failed")

    def count(self, status: str) -> int:
        """Outputs of one status."""
        return sum(output.status == status for output in self.outputs)

    def summary(self) -> str:
        """One line for the terminal."""
        aligned = f"{counted(self.count('aligned'), 'volume')}{up_to_date(self.count('up_to_date'))}"
        return f"{counted(self.n_cases, 'case')}; aligned: {aligned}; {len(self.failures)} failed"

    def report(self) -> dict[str, Any]:
        """``convert_report.json``."""
        options = {key: value for key, value in asdict(self.request).items() if key not in ("root", "out")}
        names = ("case_id", "path", "reason", "fix")
        return plain(
            {
                **result_header(COMMAND, self.started),
                "source": hide_home(str(self.request.root)),
                **options,
                "n_cases": self.n_cases,
                "n_aligned": self.count("aligned"),
                "n_up_to_date": self.count("up_to_date"),
                "n_failed": len(self.failures),
                "stopped": self.stopped,
                "outputs": [asdict(output) for output in self.outputs],
                "failures": [dict(zip(names, failure, strict=True)) for failure in self.failures],
            }
        )


def align_tree(request: AlignRequest, progress: Callable[[int, int], None] = lambda done, total: None) -> AlignResult:
    """Bring every sequence of every case onto the grid of one of them.

    Raises:
        ConfigError: An option or output folder that cannot be used, or a reference that no case has.
        DataError: The tree is missing or holds no case, or its table of patients cannot be read.
    """
    started = time.time()
    tasks = _tasks(request)
    _check_reference(request, tasks)
    labels = read_table(request.root / "labels.csv") if (request.root / "labels.csv").is_file() else None
    would_go = check_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=[request.root])
    with told_interrupts(request.out), locked(request.out, "output folder"):
        if would_go:  # nothing goes before the tree is known to hold something to put in its place
            planned = AlignResult(request, started, len(tasks), dry_run=True)
            _align_all(planned, [replace(task, dry_run=True) for task in tasks], progress)
            if planned.stopped or not planned.outputs:
                return planned
        claim_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=[request.root])
        result = AlignResult(request, started, len(tasks))
        _align_all(result, tasks, progress)
        _write_tables(result, labels)
    return result


def _align_all(result: AlignResult, tasks: list[AlignTask], progress: Callable[[int, int], None]) -> None:
    with ordered_map(worker_count(result.request.workers)) as run:
        for done, case in enumerate(run(align_case, tasks), start=1):
            result.outputs += case.outputs
            result.failures += [(case.case_id, *failure) for failure in case.failures]
            for path, reason, _ in case.failures:
                logger.warning("refused: %s %s: %s", case.case_id, path, reason)
            progress(done, len(tasks))
            if case.failures and result.request.on_error == "stop":
                result.stopped = True
                break


def align_case(task: AlignTask) -> AlignedCase:
    """Align one case; a volume that fails is told, the others are written. A picklable task."""
    result = AlignedCase(task.case_id)
    folder = contained(task.request.out, task.case_id, "case id")
    if folder.is_dir() and not task.dry_run:
        for leftover in folder.glob(".*.tmp*"):  # of a run that was killed; we hold the lock of the output folder
            leftover.unlink()
    source = task.files.get(task.request.reference)
    try:
        if source is None:
            raise DataError(
                "The case has no reference.",
                where=f"no {task.request.reference}.nii.gz; there are {', '.join(sorted(task.files))}",
                fix="choose a --reference that every case has",
                code="reference_missing",
            )
        reference = read_volume(source)
        if reference.array.ndim != 3:
            raise DataError(
                "The reference is 4-D.", where=str(source), fix="choose a 3-D sequence", code="reference_4d"
            )
    except DataError as error:
        result.failures.append((task.request.reference, _reason(error), error.fix))
        return result
    for stem, path in sorted(task.files.items(), key=lambda item: (item[1] != source, item[0])):
        try:
            result.outputs.append(_align_one(task, stem, path, source, reference))
        except DataError as error:
            result.failures.append((path.name, _reason(error), error.fix))
    return result


def _align_one(task: AlignTask, stem: str, path: Path, source: Path, reference: Volume) -> Aligned:
    request = task.request
    does_register = request.register and path != source and not is_label(stem)
    digest = digest_of(FORMAT, stem, _state(path), _state(source), does_register)
    target = contained(request.out, task.case_id, "case id") / f"{stem}.nii.gz"
    done = None if request.overwrite else _done(target, digest)
    if done is not None:
        return Aligned(
            task.case_id,
            stem,
            f"{task.case_id}/{target.name}",
            "up_to_date",
            reference.shape[0],
            reference.spacing,
            *done,
        )
    volume = reference if path == source else read_volume(path)
    check_finite(path, volume.array)
    if task.dry_run:
        name = f"{task.case_id}/{target.name}"
        return Aligned(task.case_id, stem, name, "planned", reference.shape[0], reference.spacing)
    transform, metric = register_affine(_first(volume), reference) if does_register else (None, None)
    is_nearest = holds_classes(stem, volume.array)
    moved = resample_to(volume, reference, nearest=is_nearest, transform=transform)
    information = None if metric is None else round(-metric, 6)
    record: dict[str, Any] = {
        "align_digest": digest,
        "aligned_to": request.reference,
        "interpolation": "nearest" if is_nearest else "linear",
        "registered": does_register,
        "transform_ras": None if transform is None else np.round(transform_matrix(transform), 9),
        "mutual_information": information,
        "n_slices": reference.shape[0],
        "spacing": [round(s, 6) for s in reference.spacing],
    }
    _write(path, target, moved, record, keeps_axes=_same_axes(volume, reference) and not does_register)
    return Aligned(
        task.case_id,
        stem,
        f"{task.case_id}/{target.name}",
        "aligned",
        reference.shape[0],
        reference.spacing,
        information,
    )


def _write(path: Path, target: Path, volume: Volume, record: dict[str, Any], *, keeps_axes: bool) -> None:
    sidecar = target.with_name(f"{volume_stem(target)}.json")
    sidecar.unlink(missing_ok=True)  # without it the volume counts as unfinished, whatever happens next
    write_volume(target, volume)
    for suffix, is_kept in (("bval", True), ("bvec", keeps_axes)):
        text = path.with_name(f"{volume_stem(path)}.{suffix}")
        if text.is_file() and is_kept:
            write_text(target.with_name(f"{volume_stem(target)}.{suffix}"), text.read_text(encoding="utf-8"))
    tags = _sidecar(path)
    ours = tags.get("medssl") if isinstance(tags.get("medssl"), dict) else {}
    write_json(sidecar, {**tags, "medssl": {**(ours or {}), **record, "bytes": target.stat().st_size}})


def _done(target: Path, digest: str) -> tuple[float | None] | None:
    try:
        record = json.loads(target.with_name(f"{volume_stem(target)}.json").read_text(encoding="utf-8"))["medssl"]
        if record["align_digest"] == digest and record["bytes"] == target.stat().st_size:
            return (record["mutual_information"],)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing or damaged: aligned again
    return None


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        tags = json.loads(path.with_name(f"{volume_stem(path)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tags if isinstance(tags, dict) else {}


def _state(path: Path) -> tuple[str, int, int]:
    state = path.stat()
    return path.name, state.st_size, state.st_mtime_ns


def _first(volume: Volume) -> Volume:
    """The volume that a 4-D series is registered by: its first."""
    return volume if volume.array.ndim == 3 else Volume(volume.array[0], volume.affine)


def _same_axes(volume: Volume, reference: Volume) -> bool:
    a, b = (v.affine[:3, :3] / np.linalg.norm(v.affine[:3, :3], axis=0) for v in (volume, reference))
    return bool(np.allclose(a, b, atol=1e-3))


def _reason(error: DataError) -> str:
    return hide_home(" ".join(f"{error.what} {error.where}".split()))


def _tasks(request: AlignRequest) -> list[AlignTask]:
    if request.on_error not in ("stop", "skip"):
        raise ConfigError(
            f"--on-error {request.on_error} is not known.",
            where="one of stop, skip",
            fix="choose one",
            code="option_unknown",
        )
    if not request.root.is_dir():
        raise DataError(
            "The case tree is missing.", where=hide_home(str(request.root)), fix="check the path", code="source_missing"
        )
    root, out = request.root.resolve(), request.out.resolve()
    if root == out or root.is_relative_to(out) or out.is_relative_to(root):
        raise ConfigError(
            "The case tree and the output folder lie in one another.",
            where=f"ROOT {hide_home(str(root))}, OUT {hide_home(str(out))}",
            fix="choose an output folder beside the tree",
            code="out_holds_source",
        )
    tasks = []
    for folder in sorted(request.root.iterdir()):
        files = {} if folder.name.startswith(".") or not folder.is_dir() else _files(folder)
        if files:
            tasks.append(AlignTask(folder.name, files, request))
    if not tasks:
        raise DataError(
            "The tree holds no case.",
            where=f"{hide_home(str(request.root))}: no folder with {' or '.join(VOLUME_SUFFIXES)} files in it",
            fix="give the folder above the case folders",
            code="no_cases",
        )
    return tasks


def _check_reference(request: AlignRequest, tasks: Sequence[AlignTask]) -> None:
    stems = sorted({stem for task in tasks for stem in task.files})
    if request.reference in stems:
        return
    near = difflib.get_close_matches(request.reference, stems, n=1)
    raise ConfigError(
        f"--reference {request.reference}: no case has such a sequence.",
        where=f"there are {', '.join(stems[:12])}{f' and {len(stems) - 12} more' if len(stems) > 12 else ''}",
        fix=f"did you mean {near[0]}?" if near else "choose one of them",
        code="reference_unknown",
    )


def _files(folder: Path) -> dict[str, Path]:
    """NIfTI files by stem; ``.nii`` wins over ``.nii.gz``."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda p: (p.suffix != ".nii", p.name)):
        stem = volume_stem(path)
        if stem and path.is_file() and not path.name.startswith("."):
            files.setdefault(stem, path)
    return files


def _write_tables(result: AlignResult, labels: Table | None) -> None:
    out = result.request.out
    write_failures(out / "failures.csv", result.failures)
    write_json(out / "convert_report.json", result.report())
    table = result.request.root / "cases.csv"
    if table.is_file():
        _write_cases(table, out / "cases.csv", result.outputs)
    if labels is not None:
        _write_labels(labels, out)


def _write_labels(labels: Table, out: Path) -> None:
    """The labels of the source for the cases that are here, so that patients and classes stay known."""
    rows, column = labels.rows, labels.find(("case_id",))
    if column is not None:
        here = {path.parent.name for path in out.glob("[!.]*/[!.]*.nii.gz")}
        rows = tuple(row for row, name in zip(rows, labels.column(column), strict=True) if name in here)
    write_csv(out / "labels.csv", labels.header, rows)


def _write_cases(table: Path, target: Path, outputs: Sequence[Aligned]) -> None:
    """The table of the source with the new grid, so that the patients of the cases stay known."""
    by_key = {(o.case_id, o.stem): o for o in outputs}
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or [])
        rows = [row for row in reader if (row.get("case_id"), row.get("stem")) in by_key]
    for row in rows:
        new = by_key[(row["case_id"], row["stem"])]
        row.update(path=new.path, n_slices=str(new.n_slices), spacing=" ".join(f"{s:.6g}" for s in new.spacing))
    write_csv(target, header, [[row.get(name, "") for name in header] for row in rows])
