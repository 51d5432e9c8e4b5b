"""A data set of another program's layout as our own readers take it: planned, placed, and published whole.

Everything is built beside the output folder and put in its place in the end. A run that was cut off is gone on with; a
run over a finished result adds what is missing.
"""

from __future__ import annotations

import csv
import difflib
import errno
import logging
import os
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from medssl_cli.core.errors import ConfigError, DataError, MedsslError, PartialFailure, ResourceError
from medssl_cli.core.run import (
    LOCK,
    MARKER,
    atomic_path,
    check_out_folder,
    claim_out_folder,
    hide_home,
    locked,
    package_version,
    plain,
    publish_folder,
    result_header,
    say_disk_errors,
    write_csv,
    write_failures,
    write_json,
)
from medssl_cli.core.wording import counted
from medssl_cli.data.nifti_volumes import cut_volumes
from medssl_cli.services.convert_layout_pictures import plan_imagenet, plan_pclt20k
from medssl_cli.services.convert_layout_plan import FOLDS, Fault, Placement, Plan, PlannedCase, checked, describe_faults
from medssl_cli.services.convert_layout_vfm import plan_vfm
from medssl_cli.services.convert_layout_volumes import plan_decathlon, plan_nnunet
from medssl_cli.services.wording import up_to_date
from medssl_cli.services.worker_pool import told_interrupts

log = logging.getLogger(__name__)

COMMAND = "convert layout"
MAP = "layout_map.csv"
MAP_HEADER = ("source", "target", "volume")
REPORT = "convert_report.json"
Files = Literal["link", "copy"]
Planner = Callable[[Path, str | None], Plan]

PLANNERS: dict[str, Planner] = {
    "pclt20k": plan_pclt20k,
    "nnunet": plan_nnunet,
    "decathlon": plan_decathlon,
    "vfm": plan_vfm,
    "imagenet": plan_imagenet,
}
_SYMBOLIC = ("pclt20k",)
"""Sources whose links are symbolic: readers of CT-PET follow them, all others refuse links out of the data root."""


@dataclass(frozen=True)
class LayoutRequest:
    """What the user asked for; the flags of ``medssl convert layout``.

    Args:
        files: link makes relative links for pclt20k and hard links for all others; None links pclt20k, copies others.
        group_pattern: Regular expression that finds the patient in a name; None where nothing tells patients.
    """

    source_folder: Path
    out: Path
    source: str
    files: str | None = None
    dry_run: bool = False
    overwrite: bool = False
    on_error: str = "stop"
    group_pattern: str | None = None

    @property
    def way(self) -> Literal["symlink", "hardlink", "copy"]:
        """How files are placed."""
        files = self.files or ("link" if self.source in _SYMBOLIC else "copy")
        return "copy" if files == "copy" else "symlink" if self.source in _SYMBOLIC else "hardlink"


@dataclass
class LayoutResult:
    """What became of every file, or, of a dry run, what would."""

    request: LayoutRequest
    started: float
    plan: Plan
    placed: list[Placement] = field(default_factory=list)
    kept: list[Placement] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    stopped: bool = False

    @property
    def error(self) -> MedsslError | None:
        """The error to end with: None, partial failure, or data rejected."""
        if not self.faults:
            return None
        n = len({fault.case_id for fault in self.faults})
        fix = "; ".join(dict.fromkeys(fault.fix for fault in self.faults[:8]))
        what, code = f"{counted(n, 'case')} cannot be converted", self.faults[0].code
        where = describe_faults(self.faults)
        if self.stopped:
            fix += "; --on-error skip leaves them out" if self.plan.cases else ""
            state = "the run stopped there" if self.placed or self.kept else "nothing was written"
            return DataError(f"{what}; {state}.", where=where, fix=fix, code=code)
        return PartialFailure(f"{what}; everything else is done.", where=where, fix=fix, code=code)

    def summary(self) -> str:
        """A few lines for a terminal."""
        plan, request = self.plan, self.request
        counts = plan.counts
        parts = ", ".join(f"{part} {count}" for part, count in counts.items()) if set(counts) != {"all"} else ""
        patients = f" of {counted(plan.n_patients, 'patient')}" if plan.n_patients else ""
        unit = "slice" if plan.id_column == "" and request.source == "pclt20k" else _unit(plan)
        lines = [
            f"{request.source} -> {plan.product}: {counted(len(plan.cases), unit)}{patients}"
            + (f" ({parts})" if parts else "")
        ]
        lines += [f"note: {note}" for note in plan.notes]
        if plan.ignored:
            lines.append(f"left alone: {counted(len(plan.ignored), 'file')} of the source, e.g. {plan.ignored[0]}")
        done = {"copy": "copied", "symlink": "linked", "hardlink": "linked (hard links)"}[request.way]
        if request.dry_run:
            n = sum(len(case.files) for case in plan.cases)
            lines.append(f"planned: {counted(n, 'file')} to be {done}; nothing was written")
        elif not self.stopped:
            cut = sum(file.volume is not None for file in self.placed)
            more = f", {cut} of them cut from 4-D files" if cut else ""
            lines.append(
                f"written to {hide_home(str(request.out))}: {counted(len(self.placed), 'file')} {done}{more}"
                f"{up_to_date(len(self.kept))}; {counted(len({f.case_id for f in self.faults}), 'case')} left out"
            )
            lines += [f"next: {step}" for step in self._next_steps()]
        return "\n".join(lines)

    def _next_steps(self) -> list[str]:
        return [step.replace("OUT", str(self.request.out)) for step in self.plan.next_steps]

    def report(self) -> dict[str, Any]:
        """``convert_report.json``."""
        request, plan = self.request, self.plan
        options = asdict(request)
        for name in ("source_folder", "out", "files"):
            del options[name]
        return plain(
            {
                **result_header(COMMAND, self.started),
                **options,
                "source_folder": hide_home(str(request.source_folder)),
                "files": request.way,
                "product": plan.product,
                "n_cases": len(plan.cases),
                "n_patients": plan.n_patients,
                "counts": plan.counts,
                "n_files": sum(len(case.files) for case in plan.cases),
                "n_placed": len(self.placed),
                "n_up_to_date": len(self.kept),
                "n_failed": len({fault.case_id for fault in self.faults}),
                "stopped": self.stopped,
                "notes": list(plan.notes),
                "left_alone": list(plan.ignored),
                "next": [hide_home(step) for step in self._next_steps()],
                "failures": [asdict(fault) for fault in self.faults],
            }
        )


def convert_layout(
    request: LayoutRequest, progress: Callable[[int, int], None] = lambda done, total: None
) -> LayoutResult:
    """Convert a data set of another layout.

    Args:
        request: Source, output folder and options.
        progress: Called with the cases that are done, and how many there are.

    Returns:
        The result; what could not be converted stands in it, and ``error`` is what the command has to end with.

    Raises:
        ConfigError: Options or an output folder that cannot be used; nothing has been written.
        DataError: The source has not this layout, or its description is damaged.
        ResourceError: The disk is full, or links cannot be made there.
    """
    started = time.time()
    _check_request(request)
    out = Path(os.path.realpath(request.out))
    plan = PLANNERS[request.source](request.source_folder, request.group_pattern)
    plan = checked(plan, request.source_folder)
    result = LayoutResult(request, started, plan, faults=list(plan.faults))
    if plan.faults and (request.on_error == "stop" or not plan.cases):
        result.stopped = True
        return result
    if request.dry_run:
        check_out_folder(out, COMMAND, overwrite=request.overwrite, inputs=[request.source_folder])
        return result
    with told_interrupts(request.out):
        if (out / MAP).is_file() and (out / MARKER).is_file() and not request.overwrite:
            _go_on(result, out, progress)
        else:
            _build(result, out, progress)
    return result


# --- checks before ---------------------------------------------------------------------------------------------------


def _check_request(request: LayoutRequest) -> None:
    faults = []
    for name, value, allowed in (
        ("--source", request.source, tuple(PLANNERS)),
        ("--files", request.files, (None, "link", "copy")),
        ("--on-error", request.on_error, ("stop", "skip")),
    ):
        if value not in allowed:
            known = [text for text in allowed if text]
            near = difflib.get_close_matches(str(value), known, n=1)
            faults.append(f"{name} {value}: one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else ""))
    if request.source == "pclt20k" and request.group_pattern is not None:
        faults.append("--group-pattern: no effect with --source pclt20k, whose folders are the patients")
    if faults:
        raise ConfigError(
            "The options cannot be used.", where="\n".join(faults), fix="correct them", code="option_unknown"
        )
    source = request.source_folder
    if not source.is_dir():
        raise DataError(
            "The source is no folder.", where=hide_home(str(source)), fix="check the path", code="source_missing"
        )
    real, out = Path(os.path.realpath(source)), Path(os.path.realpath(request.out))
    if real == out or real.is_relative_to(out) or out.is_relative_to(real):
        raise ConfigError(
            "The source and the output folder lie in one another.",
            where=f"SOURCE {hide_home(str(real))}, OUT {hide_home(str(out))}",
            fix="choose an output folder beside the source",
            code="out_holds_source",
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def _build(result: LayoutResult, out: Path, progress: Callable[[int, int], None]) -> None:
    """A new result, made in a hidden folder beside ``out`` and renamed once it is whole."""
    request = result.request
    _check_replaceable(request, out)
    folder = out.with_name(f".{out.name}.partial")
    with locked(folder, "output folder"):
        claim_out_folder(folder, COMMAND)
        _place_all(result, folder, progress)
        if result.stopped:
            return
        _sweep(folder, result.plan)
        _write_tables(result, folder, result.plan)
        _publish(folder, out)


def _check_replaceable(request: LayoutRequest, out: Path) -> None:
    """Refuse an output folder whose contents must not go.

    Raises:
        ConfigError: It holds other things and is not to be replaced, or the source or the working directory.
    """
    inputs = [request.source_folder]
    check_out_folder(out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    if request.overwrite:  # an older result of this command is replaced as a whole, too: nothing needed may be in it
        check_out_folder(out, f"{COMMAND}, replaced", overwrite=True, inputs=inputs)
    if out.exists() and Path(os.path.realpath(Path.cwd())).is_relative_to(out):
        raise ConfigError(
            "The output folder is the working directory, and it is put in its place as a whole.",
            where=hide_home(str(out)),
            fix="run the command from another folder",
            code="out_is_cwd",
        )


def _go_on(result: LayoutResult, out: Path, progress: Callable[[int, int], None]) -> None:
    """Add to a finished result what is missing or new; tables come last."""
    check_out_folder(out, COMMAND, inputs=[result.request.source_folder])
    with locked(out, "output folder"):
        _refuse_stale(out, result.plan)
        for leftover in out.rglob(".*.tmp*"):  # of a run that was killed; we hold the lock
            leftover.unlink()
        _place_all(result, out, progress)
        if not result.stopped:
            _write_tables(result, out, result.plan)


def _refuse_stale(out: Path, plan: Plan) -> None:
    """Files of an earlier conversion that would not be made now.

    Raises:
        ConfigError: With the first of them.
    """
    wanted = {file.target for case in plan.cases for file in case.files}
    stale = [target for target in _mapped(out) if target not in wanted and (out / target).exists()]
    if stale:
        raise ConfigError(
            "The output folder holds files that the source has no longer.",
            where=f"{hide_home(str(out))}: {counted(len(stale), 'file')}, such as {stale[0]}",
            fix="pass --overwrite to make it anew, or choose another folder",
            code="out_stale",
        )


def _mapped(out: Path) -> list[str]:
    try:
        with (out / MAP).open(encoding="utf-8", newline="") as file:
            return [row["target"] for row in csv.DictReader(file) if row.get("target")]
    except FileNotFoundError:
        return []


def _place_all(result: LayoutResult, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Place the files of every case; one that fails stays as an earlier run left it, or is taken out again."""
    done: list[PlannedCase] = []
    for number, case in enumerate(result.plan.cases, start=1):
        try:
            _place_case(result, case, folder)
            done.append(case)
        except (DataError, FileNotFoundError) as error:
            is_kept = (folder / MAP).is_file() and all((folder / file.target).exists() for file in case.files)
            result.faults.append(_fault_of(case, error, is_kept=is_kept))
            log.warning("not converted: %s: %s", case.case_id, result.faults[-1].reason)
            if is_kept:
                done.append(case)
            else:
                for file in case.files:
                    (folder / file.target).unlink(missing_ok=True)
            if result.request.on_error == "stop":
                result.stopped = True
                return
        progress(number, len(result.plan.cases))
    result.plan = replace(result.plan, cases=tuple(done))
    result.stopped = not done


def _fault_of(case: PlannedCase, error: DataError | FileNotFoundError, *, is_kept: bool) -> Fault:
    more = "; its earlier conversion was kept" if is_kept else ""
    if isinstance(error, DataError):
        reason = hide_home(" ".join(f"{error.what} {error.where}".split()))
        return Fault(case.case_id, case.case_id, reason + more, error.fix, error.code)
    path = hide_home(str(error.filename))
    return Fault(case.case_id, path, f"the file has gone meanwhile{more}", "run the command again", "file_missing")


def _place_case(result: LayoutResult, case: PlannedCase, folder: Path) -> None:
    cuts: dict[Path, dict[int, Path]] = defaultdict(dict)
    for file in case.files:
        target = folder / file.target
        if _is_there(target, file, result.request):
            result.kept.append(file)
            continue
        if file.volume is not None:
            cuts[file.source][file.volume] = target
        else:
            _place(file, target, result.request)
        result.placed.append(file)
    for source, targets in cuts.items():
        _cut(source, targets)


def _cut(source: Path, targets: Mapping[int, Path]) -> None:
    """The volumes of a 4-D file, all of them or none, with the times of the file."""
    state = source.stat()
    whole = {number: path.with_name(f".{path.name}.tmp.nii.gz") for number, path in targets.items()}
    try:
        cut_volumes(source, whole)
        for number, path in whole.items():
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
            os.replace(path, targets[number])
    finally:
        for path in whole.values():
            path.unlink(missing_ok=True)


def _is_there(target: Path, file: Placement, request: LayoutRequest) -> bool:
    """Whether the very file stands there already; times are those of the source."""
    if file.volume is None and request.way == "symlink":
        return target.is_symlink() and os.readlink(target) == _link(file, request)
    if target.is_symlink() or not target.is_file():
        return False
    old, new = target.stat(), file.source.stat()
    is_same = old.st_mtime_ns == new.st_mtime_ns
    if file.volume is not None:
        return is_same
    return (
        os.path.samefile(target, file.source) == (request.way == "hardlink") and is_same and old.st_size == new.st_size
    )


def _place(file: Placement, target: Path, request: LayoutRequest) -> None:
    if request.way == "copy":
        state = file.source.stat()
        with atomic_path(target) as temporary:
            shutil.copyfile(file.source, temporary)
            os.utime(temporary, ns=(state.st_atime_ns, state.st_mtime_ns))
        return
    with say_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            if request.way == "symlink":
                os.symlink(_link(file, request), temporary)
            else:
                _hard_link(file.source, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _link(file: Placement, request: LayoutRequest) -> str:
    """A relative link as it reads in the finished folder."""
    place = Path(os.path.realpath(request.out)) / file.target
    return os.path.relpath(file.source.resolve(), place.parent)


def _hard_link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        raise ResourceError(
            "Files cannot be linked there.",
            where=f"{hide_home(str(source))} to {hide_home(str(target.parent))}: {os.strerror(error.errno or 0)}",
            fix="pass --files copy, or choose an output folder on the disk of the source",
            code="link_refused",
        ) from error


def _sweep(folder: Path, plan: Plan) -> None:
    """Delete what an earlier run, cut off and of another plan, has left in the folder."""
    wanted = {folder / file.target for case in plan.cases for file in case.files} | {folder / LOCK, folder / MARKER}
    for here, folders, files in os.walk(folder, topdown=False):
        for name in files:
            if Path(here, name) not in wanted:
                Path(here, name).unlink()
        for name in folders:
            path = Path(here, name)
            if path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()


def _publish(folder: Path, out: Path) -> None:
    """Put the finished folder in its place; what was there goes once the new one stands."""
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
    try:
        with say_disk_errors(out):
            if out.exists():
                os.replace(out, old)
            publish_folder(folder, out)
    except OSError as error:
        raise ResourceError(
            "The finished folder cannot be put in its place.",
            where=f"{hide_home(str(out))}: {error.strerror}; the result lies in {hide_home(str(folder))}",
            fix="choose an output folder that is no mount point and whose parent can be written",
            code="publish_failed",
        ) from error
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
    shutil.rmtree(old, ignore_errors=True)


def _write_tables(result: LayoutResult, folder: Path, plan: Plan) -> None:
    """Tables, descriptions and the report; those of an earlier run that have no successor go."""
    tables = plan.tables()
    rows = [
        (_relative(result.request, file.source), file.target, "" if file.volume is None else file.volume)
        for case in plan.cases
        for file in case.files
    ]
    shutil.rmtree(folder / FOLDS, ignore_errors=True)
    for name in ("train.csv", "val.csv", "test.csv", "labels.csv"):
        if name not in tables:
            (folder / name).unlink(missing_ok=True)
    if plan.folds:
        write_json(folder / FOLDS / MARKER, {"command": COMMAND, "medssl_version": package_version()})
    for name, (header, body) in tables.items():
        write_csv(folder / name, header, body)
    for name, document in plan.documents.items():
        write_json(folder / name, document)
    write_csv(folder / MAP, MAP_HEADER, rows)
    write_failures(folder / "failures.csv", [(f.case_id, f.path, f.reason, f.fix) for f in result.faults])
    write_json(folder / REPORT, result.report())


def _relative(request: LayoutRequest, path: Path) -> str:
    return path.relative_to(request.source_folder).as_posix()


def _unit(plan: Plan) -> str:
    return "picture" if plan.id_column == "image" else "case"
