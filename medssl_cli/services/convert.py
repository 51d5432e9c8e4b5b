"""A folder of DICOM files into a case tree: find the series, convert case by case, report what became of each.

Running again does only what is new or changed: each sidecar holds a digest of its files and options. A case id once
given to a study stays with it, also when more studies of the patient arrive later.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from medssl_cli.core.errors import ConfigError, DataError, MedsslError, PartialFailure
from medssl_cli.core.run import (
    check_out_folder,
    claim_out_folder,
    hide_home,
    locked,
    plain,
    result_header,
    worker_count,
    write_csv,
    write_failures,
    write_json,
)
from medssl_cli.core.wording import counted
from medssl_cli.data.dicom import Scan, SeriesEntry, scan
from medssl_cli.data.dicom_engines import ENGINES, engine_version
from medssl_cli.data.dicom_tags import Pseudonyms, open_pseudonyms, planned_pseudonyms
from medssl_cli.data.series_rules import SeriesRules, read_mapping
from medssl_cli.services.convert_case import CaseOptions, CaseResult, CaseTask, Failure, Output, convert_case, output_of
from medssl_cli.services.wording import first_and_more, up_to_date
from medssl_cli.services.worker_pool import OrderedMap, ordered_map, told_interrupts

logger = logging.getLogger(__name__)

COMMAND = "convert dicom"
CASES_HEADER = ("case_id", "patient_id", "study_uid", "stem", "path", "series_uid", "n_slices", "spacing")


@dataclass(frozen=True)
class ConvertRequest:
    """What the user asked for; the flags of ``medssl convert dicom``."""

    source: Path
    out: Path
    mapping: str | None = None
    convert_all: bool = False
    reference: str | None = None
    align: bool = True
    workers: int | None = None
    dry_run: bool = False
    anonymize: bool = False
    engine: str = "dcm2niix"
    on_error: str = "stop"
    overwrite: bool = False


@dataclass
class ConvertResult:
    """What became of every series."""

    request: ConvertRequest
    started: float
    scan: Scan
    n_cases: int = 0
    outputs: list[Output] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unmatched: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False

    def count(self, status: str) -> int:
        """Outputs of one status."""
        return sum(output.status == status for output in self.outputs)

    @property
    def error(self) -> MedsslError | None:
        """The error to end with: None, partial failure, or data rejected."""
        if not self.failures:
            return None
        first = self.failures[0]
        table = None if self.request.dry_run else self.request.out / "failures.csv"
        where = first_and_more([failure.reason for failure in self.failures], table)
        has_kinds = len({failure.fix for failure in self.failures}) > 1
        fix = f"{first.name}: {first.fix}" if has_kinds else first.fix
        count = f"{len(self.failures)} series {'was' if len(self.failures) == 1 else 'were'} refused"
        if self.stopped:
            return DataError(
                f"{count}, and the run stopped there.",
                where=where,
                fix=f"{fix}; --on-error skip goes on with the other cases",
                code=first.code,
            )
        return PartialFailure(f"{count}; everything else is converted.", where=where, fix=fix, code=first.code)

    def summary(self) -> str:
        """One or two lines for the terminal."""
        other = f", {self.scan.n_other} of them no DICOM image" if self.scan.n_other else ""
        files, cases = counted(self.scan.n_files, "file"), counted(self.n_cases, "case")
        lines = [f"{files}{other}; {len(self.scan.series)} series; {cases}"]
        if self.request.dry_run:
            lines.append(
                f"planned: {counted(len(self.outputs), 'volume')}, {self.count('up_to_date')} of them up to date"
            )
        else:
            lines.append(
                f"converted: {counted(self.count('converted'), 'volume')}{up_to_date(self.count('up_to_date'))}"
            )
        lines[-1] += f"; {len(self.failures)} series refused; {len(self.unmatched)} left alone"
        return "\n".join(lines)

    def report(self) -> dict[str, Any]:
        """``convert_report.json``."""
        request = self.request
        is_private = request.anonymize
        options = {key: value for key, value in asdict(request).items() if key not in ("source", "out", "mapping")}
        return plain(
            {
                **result_header(COMMAND, self.started),
                "source": None if is_private else hide_home(str(request.source)),
                "mapping": Path(request.mapping).name if request.mapping else "default",
                **options,
                "engine_version": engine_version(request.engine),
                "n_files": self.scan.n_files,
                "n_not_dicom_images": self.scan.n_other,
                "n_series": len(self.scan.series),
                "n_cases": self.n_cases,
                "n_converted": self.count("converted"),
                "n_up_to_date": self.count("up_to_date"),
                "n_failed": len(self.failures),
                "n_unmatched": len(self.unmatched),
                "stopped": self.stopped,
                "outputs": [asdict(output) for output in self.outputs],
                "failures": [asdict(failure) for failure in self.failures],
                "unmatched": self.unmatched,
            }
        )


def convert_dicom(
    request: ConvertRequest, progress: Callable[[str, int, int], None] = lambda step, done, total: None
) -> ConvertResult:
    """Convert every chosen series below a folder.

    Args:
        request: Source, output folder and options.
        progress: Called with the step (``reading`` or ``converting``), how far it is, and how much there is.

    Returns:
        The result; refused series stand in it, and ``error`` is what the command has to end with.

    Raises:
        ConfigError: A mapping, option or output folder that cannot be used; nothing has been written.
        DataError: The source holds no DICOM image, or no series that the mapping names.
        ResourceError: The engine is missing, or the disk is full.
    """
    started = time.time()
    _check_request(request)
    rules = read_mapping(request.mapping)
    _check_reference(request, rules)
    version = engine_version(request.engine)
    workers = worker_count(request.workers)
    with told_interrupts(request.out):
        if request.dry_run:
            pseudonyms = planned_pseudonyms(request.out) if request.anonymize else None
            return _run(request, rules, version, pseudonyms, workers, started, progress)
        inputs = _inputs(request)
        would_go = check_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
        with locked(request.out, "output folder"):
            if would_go:  # nothing goes before the source is known to hold something to put in its place
                planned = _run(replace(request, dry_run=True), rules, version, None, workers, started, progress)
                if planned.stopped or not planned.outputs:
                    return planned
            claim_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
            shutil.rmtree(request.out / ".work", ignore_errors=True)
            pseudonyms = open_pseudonyms(request.out) if request.anonymize else None
            try:
                return _run(request, rules, version, pseudonyms, workers, started, progress)
            finally:
                shutil.rmtree(request.out / ".work", ignore_errors=True)


def _inputs(request: ConvertRequest) -> list[Path]:
    mapping = [] if request.mapping is None else [Path(request.mapping)]
    return [request.source, *(path for path in mapping if path.exists())]


def _run(
    request: ConvertRequest,
    rules: SeriesRules,
    version: str,
    pseudonyms: Pseudonyms | None,
    workers: int,
    started: float,
    progress: Callable[[str, int, int], None],
) -> ConvertResult:
    options = CaseOptions(
        rules=rules,
        engine=request.engine,
        engine_version=version,
        convert_unmatched=request.convert_all,
        reference=request.reference,
        align=request.align,
        dry_run=request.dry_run,
        again=request.overwrite,
        pseudonyms=pseudonyms,
    )
    with ordered_map(workers) as run:
        found = _scan(request, rules, run, progress)
        tasks = plan_cases(request, found.series, options)
        result = ConvertResult(request, started, found, n_cases=len(tasks))
        result.failures += _lost_files(request, found)
        result.stopped = bool(result.failures) and request.on_error == "stop"
        if not result.stopped:
            _convert_all(result, tasks, run, progress)
    if not result.outputs and not result.failures:
        raise _nothing_chosen(request, found)
    if not request.dry_run:
        _write_tables(result)
    return result


def _convert_all(
    result: ConvertResult, tasks: list[CaseTask], run: OrderedMap, progress: Callable[[str, int, int], None]
) -> None:
    for done, case in enumerate(run(convert_case, tasks), start=1):
        _add_case(result, case)
        progress("converting", done, len(tasks))
        if case.failures and result.request.on_error == "stop":
            result.stopped = True
            return


def _add_case(result: ConvertResult, case: CaseResult) -> None:
    for message in case.messages:
        logger.info("%s", message)
    for failure in case.failures:
        logger.warning("refused: %s %s", failure.case_id, failure.reason)
    result.outputs += case.outputs
    result.failures += case.failures
    result.unmatched += case.unmatched


def _scan(
    request: ConvertRequest, rules: SeriesRules, run: OrderedMap, progress: Callable[[str, int, int], None]
) -> Scan:
    source = request.source.resolve()
    found = scan(
        source,
        rules.keywords,
        skip=request.out.resolve(),
        run=run,
        progress=lambda done, total: progress("reading", done, total),
    )
    if not found.series and not found.damaged:
        raise DataError(
            "The source holds no DICOM image.",
            where=f"{hide_home(str(request.source))}: {found.n_files} files, none of them a DICOM image",
            fix="check the path; archives (.zip, .tar) have to be unpacked first",
            code="dicom_none",
        )
    return found


# --- checks before ---------------------------------------------------------------------------------------------------


def _check_request(request: ConvertRequest) -> None:
    for name, value, allowed in (
        ("--engine", request.engine, tuple(ENGINES)),
        ("--on-error", request.on_error, ("stop", "skip")),
    ):
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1)
            raise ConfigError(
                f"{name} {value} is not known.",
                where=f"one of {', '.join(allowed)}",
                fix=f"did you mean {near[0]}?" if near else "choose one of them",
                code="option_unknown",
            )
    if not request.source.exists():
        raise DataError(
            "The source is missing.", where=hide_home(str(request.source)), fix="check the path", code="source_missing"
        )
    source, out = request.source.resolve(), request.out.resolve()
    if source == out or source.is_relative_to(out):
        raise ConfigError(
            "The source lies in the output folder, which may be replaced.",
            where=f"SOURCE {hide_home(str(source))}, OUT {hide_home(str(out))}",
            fix="choose an output folder beside the source",
            code="out_holds_source",
        )
    if out.is_relative_to(source):
        raise ConfigError(
            "The output folder lies in the source, whose next search would meet the results.",
            where=f"SOURCE {hide_home(str(source))}, OUT {hide_home(str(out))}",
            fix="choose an output folder beside the source",
            code="out_in_source",
        )
    _check_same_privacy(request)


def _check_same_privacy(request: ConvertRequest) -> None:
    """Refuse to mix named and anonymous cases in one tree."""
    for record in _records(request.out):
        if bool(record.get("anonymized")) != request.anonymize:
            has, asked = ("named", "anonymous") if request.anonymize else ("anonymous", "named")
            raise ConfigError(
                f"The output folder holds {has} cases, and {asked} ones are asked for.",
                where=f"{request.out / str(record.get('case_id', ''))}",
                fix="choose another output folder, or keep to the same --anonymize",
                code="out_privacy_differs",
            )
        return


def _check_reference(request: ConvertRequest, rules: SeriesRules) -> None:
    stems = list(dict.fromkeys(rule.stem for rule in rules.rules))
    reference = request.reference
    if reference is None or request.convert_all or re.sub(r"_b\d+$", "", reference) in stems or reference in stems:
        return
    near = difflib.get_close_matches(reference, stems, n=1)
    raise ConfigError(
        f"--reference {reference}: the mapping names no such sequence.",
        where=f"it names {', '.join(stems)}",
        fix=f"did you mean {near[0]}?" if near else "choose one of them",
        code="reference_unknown",
    )


def _nothing_chosen(request: ConvertRequest, found: Scan) -> DataError:
    examples = found.series[:5]
    named = (f"series {s.number}" + ("" if request.anonymize else f" {s.description}") for s in examples)
    return DataError(
        "No series fits the mapping.",
        where=f"{len(found.series)} series, for example {'; '.join(named)}",
        fix="write a --mapping for these names, or pass --all to convert everything",
        code="mapping_fits_nothing",
    )


def _lost_files(request: ConvertRequest, found: Scan) -> list[Failure]:
    """Unreadable DICOM files in folders without any readable series: nobody else would tell of them."""
    told = {path for entry in found.series for path, _ in entry.damaged}
    lost = [(path, reason) for path, reason in found.damaged if path not in told]
    return [
        Failure(
            case_id="",
            path="" if request.anonymize else path,
            reason=f"an unreadable DICOM file{'' if request.anonymize else ' ' + path}: {reason}",
            fix="remove it, or send it again from the archive",
            code="dicom_truncated",
        )
        for path, reason in lost
    ]


# --- cases -----------------------------------------------------------------------------------------------------------


def plan_cases(request: ConvertRequest, series: Iterable[SeriesEntry], options: CaseOptions) -> list[CaseTask]:
    """One task for each study, sorted by case id.

    The id is the patient id, made safe for a file name; with several studies in the source it is followed by the date
    of the study (its number with ``--anonymize``), and by a count where that is not enough.
    """
    studies: dict[tuple[str, str], list[SeriesEntry]] = {}
    for entry in series:
        studies.setdefault((entry.patient_id, entry.study_uid), []).append(entry)
    known = {(str(r["patient_id"]), str(r["study_uid"])): str(r["case_id"]) for r in _records(request.out)}
    root = request.source.resolve()
    names = _patient_names({patient for patient, _ in studies}, options.pseudonyms)
    per_patient: dict[str, int] = {}
    for patient, _ in studies:
        per_patient[patient] = per_patient.get(patient, 0) + 1
    taken = set(known.values())
    tasks = []
    ordered = sorted(
        studies.items(), key=lambda item: (item[0][0], item[1][0].study_date, item[1][0].study_time, item[0][1])
    )
    for number, ((patient, study_uid), entries) in _numbered(ordered):
        shown_uid = study_uid if options.pseudonyms is None else options.pseudonyms.uid(study_uid)
        name = names[patient] if patient else _nameless(shown_uid or entries[0].paths[0])
        shown_patient = _shown_patient(patient, name, options.pseudonyms)
        case_id = known.get((shown_patient, shown_uid), "")
        if not case_id:
            several = patient and per_patient[patient] > 1
            suffix = (entries[0].study_date or str(number)) if options.pseudonyms is None else str(number)
            case_id = _unused(f"{name}_{safe_name(suffix)}" if several else name, taken)
            taken.add(case_id)
        tasks.append(
            CaseTask(
                root=root.parent if root.is_file() else root,
                out=request.out,
                case_id=case_id,
                patient_id=shown_patient,
                study_uid=shown_uid,
                entries=tuple(entries),
                options=options,
            )
        )
    return sorted(tasks, key=lambda task: task.case_id)


def safe_name(text: str) -> str:
    """A file name of ASCII letters, digits, dots, dashes and underscores, at most 64 long; may be empty."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "_", ascii_text).strip("._-")[:64]


def _patient_names(patients: set[str], pseudonyms: Pseudonyms | None) -> dict[str, str]:
    """A file name for each patient id, never one for two: a changed or clashing name ends in a hash of the id."""
    if pseudonyms is not None:
        return {patient: pseudonyms.patient(patient) for patient in patients}
    names = {}
    owners: dict[str, list[str]] = {}
    for patient in sorted(patients):
        owners.setdefault(safe_name(patient).casefold(), []).append(patient)
    for patient in patients:
        name = safe_name(patient)
        is_readable = name == re.sub(r"\s+", "_", patient.strip())
        if not is_readable or len(owners[name.casefold()]) > 1:
            name = f"{name or 'patient'}-{sha256(patient.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
        names[patient] = name
    return names


def _nameless(identity: str) -> str:
    """Case name of a study without patient id: it stands for a patient of its own."""
    return f"unknown-{sha256(identity.encode()).hexdigest()[:8]}"


def _shown_patient(patient: str, name: str, pseudonyms: Pseudonyms | None) -> str:
    return name if pseudonyms is not None or not patient else patient


def _numbered(
    ordered: Iterable[tuple[tuple[str, str], list[SeriesEntry]]],
) -> Iterator[tuple[int, tuple[tuple[str, str], list[SeriesEntry]]]]:
    """Studies with their number within the patient, from 1."""
    counts: dict[str, int] = {}
    for item in ordered:
        patient = item[0][0]
        counts[patient] = counts.get(patient, 0) + 1
        yield counts[patient], item


def _unused(name: str, taken: set[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


# --- tables ----------------------------------------------------------------------------------------------------------


def _write_tables(result: ConvertResult) -> None:
    out = result.request.out
    write_csv(out / "cases.csv", CASES_HEADER, _case_rows(out))
    failures = [(f.case_id, f.path, f.reason, f.fix) for f in result.failures]
    write_failures(out / "failures.csv", failures, keep_empty=True)
    write_json(out / "convert_report.json", result.report())


def _case_rows(out: Path) -> Iterator[tuple[object, ...]]:
    """A row for each volume in the folder, of this run and of earlier ones."""
    for record in _records(out):
        try:
            row = output_of(record, "converted")
        except (KeyError, TypeError, ValueError):
            continue
        if (out / row.path).is_file():
            spacing = " ".join(f"{s:.6g}" for s in row.spacing)
            yield (
                row.case_id,
                row.patient_id,
                row.study_uid,
                row.stem,
                row.path,
                row.series_uid,
                row.n_slices,
                spacing,
            )


def _records(out: Path) -> Iterator[dict[str, Any]]:
    """The ``medssl`` part of every sidecar of ours, by case and stem."""
    if not out.is_dir():
        return
    for path in sorted(out.glob("[!.]*/[!.]*.json")):  # hidden ones are half-written
        try:
            record = json.loads(path.read_text(encoding="utf-8"))["medssl"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if (
            isinstance(record, dict)
            and record.get("case_id") == path.parent.name
            and {"digest", "patient_id", "study_uid"} <= set(record)
        ):
            yield record
