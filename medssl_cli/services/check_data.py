"""``medssl check-data``: look at every case before a training does, and say what is wrong with each."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError, PartialFailure
from medssl_cli.core.run import (
    check_out_folder,
    claim_out_folder,
    hide_home,
    locked,
    result_header,
    to_json,
    worker_count,
    write_csv,
    write_failures,
    write_json,
)
from medssl_cli.core.volume import AXIAL, Volume
from medssl_cli.core.wording import counted
from medssl_cli.data.checks import (
    CaseRules,
    CheckedCase,
    Finding,
    check_case,
    check_case_folder,
    check_channels,
    check_duplicates,
    check_labels,
    check_named_case,
    check_splits,
)
from medssl_cli.data.ct_pet import DatasetType
from medssl_cli.data.label_checks import FoundLabels, LabelRules, check_label_map, class_findings
from medssl_cli.data.layouts import (
    FOREIGN,
    LayoutChoice,
    LayoutName,
    asked_layout,
    layout_channels,
    read_layout_cases,
    select_cases,
)
from medssl_cli.data.manifest import (
    PRETRAIN_SEQUENCES,
    ROI_STEM,
    Ids,
    Owner,
    case_ids,
    joined_cells,
    label_id_column,
    match_image_ids,
    nearest_id,
    read_ids,
    read_image_cases,
    read_labels,
    read_owners,
    read_table,
    read_table_cases,
    row_columns,
)
from medssl_cli.data.modalities import modality_folder
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.data.statistics import Moments, picture_moments, volume_moments
from medssl_cli.report.overlay import (
    contour,
    draw,
    fitted,
    jpeg_bytes,
    montage,
    percentile_window,
    radiological,
    window,
)
from medssl_cli.report.page import Html, Page, chip, escaped, image, joined, link, path_text
from medssl_cli.services.check_segment import (
    SEGMENT,
    LabelledSet,
    LabelQuestion,
    read_labelled_set,
    refuse_idle_options,
)
from medssl_cli.services.worker_pool import ordered_map

log = logging.getLogger(__name__)

COMMAND = "check-data"
REPORT, PAGE, FAILURES = "check_data.json", "check_data.html", "failures.csv"
CT_PET = "ct-pet"
TASKS = ("pretrain", "images", "classify", SEGMENT, CT_PET)
LATER_TASKS = ("coco",)
SEVERITIES = ("error", "warning", "info")
THUMBNAIL_SIDE = 128
MAX_CARDS = 400
"""Cases shown with a picture: those with an error first, then the others, each in their order."""
CAPTION = "Slices as radiologists look at them: the patient's right is on the left. The line is the ROI."
_SMALL = 4  # so few cases are done before a second process has started
_SHOWN_CASES = 8
_SPLIT_NAMES = ("train", "val", "test")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What one worker looks at.

    Args:
        case: Its names, and its files unless it is a folder of a tree.
        rules: What is asked of it.
        root: Of the data set.
        owners: Patient and study by case id, for a folder of a tree.
        how: ``folder`` of a case tree, case whose files are ``named`` by another layout, a ``row`` of a table, or a
            ``picture``.
        stats: Whether the means of its images are wanted.
        labels: What is asked of its label map; None where none is looked at.
    """

    case: Case
    rules: CaseRules
    root: Path
    owners: Mapping[str, Owner] = field(default_factory=dict)
    how: Literal["folder", "named", "row", "picture"] = "row"
    stats: bool = False
    labels: LabelRules | None = None


@dataclass(frozen=True)
class Looked:
    """What comes back of one case; small, whatever the case weighs."""

    case: Case
    findings: list[Finding]
    digests: dict[str, str]
    channels: int | None
    thumbnail: bytes | None
    shown: str
    moments: dict[str, Moments] = field(default_factory=dict)
    labels: FoundLabels | None = None


@dataclass(frozen=True)
class CheckResult:
    """All findings of a run.

    Args:
        report: Contents of ``check_data.json``.
        findings: In case order, those of the whole set last.
        out: Where the files lie, if any were asked for.
        on_error: ``stop`` or ``skip``.
    """

    report: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    out: Path | None = None
    on_error: str = "stop"

    def to_json(self) -> str:
        """One strict JSON document."""
        return to_json(self.report)

    def counts(self) -> list[tuple[str, str, int, int, Finding]]:
        """(severity, code, findings, cases, first finding), worst first."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.severity, finding.code), []).append(finding)
        rows = [(s, c, len(g), len({f.case_id for f in g}), g[0]) for (s, c), g in groups.items()]
        return sorted(rows, key=lambda row: (SEVERITIES.index(row[0]), -row[3], row[1]))

    def summary(self) -> str:
        """The last lines for a terminal: how many cases are fine, and what was written."""
        r = self.report
        lines = [f"{r['n_ok']} of {counted(r['n_cases'], 'case')} without error ({r['task']})"]
        if self.out is not None:
            files = [REPORT, PAGE, *([FAILURES] if r["errors"] else [])]
            lines.append(f"written to {self.out}: {', '.join(files)}")
        if r["stats"] is not None:
            means, deviations = (", ".join(f"{v:.8f}" for v in r["stats"][key]) for key in ("mean", "std"))
            lines.append(f"# {', '.join(r['stats']['channels'])}: of {counted(r['stats']['n_cases'], 'case')}")
            lines.append(f"crops: {{mean: [{means}], std: [{deviations}]}}")
        for entry in r.get("classes", [])[1:]:
            of_cases = f"in {entry['n_cases']} of {counted(r['n_cases'], 'case')}"
            lines.append(f"class {entry['name']} (value {entry['values']}): {of_cases}, {entry['n_voxels']} voxels")
        return "\n".join(lines)

    def raise_if_bad(self) -> None:
        """End with exit code 3 when there is an error; 4 when bad cases were to be skipped.

        Raises:
            DataError: There is an error.
            PartialFailure: With ``on_error`` ``skip``, when every error belongs to one case and to no split.
        """
        errors = [f for f in self.findings if f.severity == "error"]
        if not errors:
            return
        bad = {f.case_id for f in errors if f.case_id}
        of_all = f"{len(bad)} of {counted(self.report['n_cases'], 'case')}"
        what = f"{counted(len(errors), 'error')} in {of_all if bad else 'the data set'}."
        every = f"all in {hide_home(str(self.out / REPORT))}" if self.out is not None else "--out DIR writes them all"
        where = f"first: {errors[0].case_id or 'the data set'} {errors[0].code}; {every}"
        own = {f.fix for f in errors}
        mend = own.pop() if len(own) == 1 and "" not in own else "mend the files"
        skippable = all(f.case_id and not f.code.endswith("_across_splits") for f in errors)
        has_csv = self.report["task"] != CT_PET
        if self.on_error == "skip" and skippable and len(bad) < self.report["n_cases"]:
            others = "; or train on the others with --split-csv and the file of --fix-csv" if has_csv else ""
            raise PartialFailure(what, where=where, fix=mend + others, code="check_failed")
        others = "; or write a CSV without these cases with --fix-csv FILE" if has_csv else ""
        raise DataError(what, where=where, fix=mend + others, code="check_failed")


def check_data(
    source: Path,
    *,
    task: str | None = None,
    sequences: tuple[str, ...] | None = None,
    split_csv: Sequence[Path] = (),
    labels: Path | None = None,
    target: str | None = None,
    roi: str = ROI_STEM,
    min_roi_pixels: int = 1,
    missing_allowed: bool = False,
    out: Path | None = None,
    fix_csv: Path | None = None,
    overwrite: bool = False,
    on_error: str = "stop",
    workers: int | None = None,
    progress: Progress | None = None,
    layout: LayoutChoice = "auto",
    template: str = "",
    modality: str = "",
    windows_hu: Sequence[tuple[float, float]] = (),
    stats: bool = False,
    dataset_type: DatasetType = "auto",
    patient_regex: str | None = None,
    mask_threshold: int | None = None,
    label: str = "",
    classes: Sequence[str] = (),
) -> CheckResult:
    """Read every case of a tree or table and collect findings; nothing in ``source`` is changed.

    Args:
        source: Case tree, image tree, series table, CT-PET slices, or a data set in another layout.
        task: ``pretrain``, ``images``, ``classify``, ``segment`` or ``ct-pet``; None takes ``segment`` where a label
            map or classes are named, ``images`` for an image tree, else ``pretrain``.
        sequences: Sequences of each case, the first is the reference grid; None takes those that the layout names, else
            T2w, ADC and diffusion of the prostate.
        split_csv: CSVs of ids, or folders that hold train.csv, val.csv, test.csv; each file is a split of that name.
        labels, target: CSV and column of the labels, for ``classify``.
        roi: Stem of the mask.
        min_roi_pixels: Smallest mask, in pixels of its largest slice.
        missing_allowed: A missing sequence is a warning.
        out: Folder for check_data.json, check_data.html and failures.csv.
        fix_csv: CSV to write with the cases that have no error.
        overwrite: Replace what lies in ``out``.
        on_error: ``stop`` ends with exit code 3 when there is an error, ``skip`` with 4.
        workers: Processes; None as many as the machine has CPUs, less one.
        progress: Called with (done, all).
        layout, template: As ``data.layout`` and ``data.template`` of a training.
        modality: Kind of pictures; a folder of that name below ``source`` is taken.
        windows_hu: (low, high) of each window in HU that training will take.
        stats: Mean and standard deviation of all images, scaled as for training.
        dataset_type, patient_regex, mask_threshold: For ``ct-pet`` alone, as of ``check_ct_pet``.
        label, classes: For ``segment`` alone: stem of the label map, or folder of those of pictures; names of the
            structures.

    Raises:
        ConfigError: A task that is not built, options that do not fit it, or an output folder that cannot be used.
        DataError: Nothing to check, unreadable tables, unknown ids.
    """
    pairs = {
        "--dataset-type": dataset_type != "auto",
        "--patient-regex": patient_regex is not None,
        "--mask-threshold": mask_threshold is not None,
    }
    if task == CT_PET:
        from medssl_cli.services.check_ct_pet import check_ct_pet  # which draws its page with the parts of this file

        _refuse_idle(
            task,
            {
                "--sequences": sequences is not None,
                "--split-csv": bool(split_csv),
                "--labels": labels is not None,
                "--target": target is not None,
                "--roi": roi != ROI_STEM,
                "--min-roi-pixels": min_roi_pixels != 1,
                "--allow-missing": missing_allowed,
                "--fix-csv": fix_csv is not None,
                "--layout": layout != "auto",
                "--template": bool(template),
                "--modality": bool(modality),
                "--window-hu": bool(windows_hu),
                "--stats": stats,
                "--label": bool(label),
                "--classes": bool(classes),
            },
        )
        return check_ct_pet(
            source,
            dataset_type=dataset_type,
            patient_regex=patient_regex,
            mask_threshold=mask_threshold,
            out=out,
            overwrite=overwrite,
            on_error=on_error,
            workers=workers,
            progress=progress,
        )
    _refuse_idle(task or "no task", pairs)
    started = time.time()
    source = modality_folder(source, modality) if modality else source
    kind = asked_layout(source, layout, template)
    question = LabelQuestion(label, tuple(classes), min_roi_pixels)
    task = SEGMENT if task is None and (label or classes) else task
    task = _checked_task(task, "cases" if kind in FOREIGN else kind, labels)
    others = {"--labels": labels is not None, "--target": target is not None, "--roi": roi != ROI_STEM}
    refuse_idle_options(task, question, others)
    if sequences is None:
        sequences = layout_channels(source, kind) or PRETRAIN_SEQUENCES
    if not sequences:
        raise ConfigError(
            "No sequence is named.", where="--sequences", fix="e.g. ax_t2wi,ax_adc,ax_dwi", code="sequences"
        )
    splits = _read_splits(split_csv)
    if fix_csv is not None and len(splits) > 1 and len(split_csv) > 1:
        raise ConfigError(
            "One file cannot replace several.",
            where="--fix-csv with several --split-csv",
            fix="run once for each split",
            code="fix_csv_many",
        )
    _check_windows(windows_hu, kind, sequences)
    rules = CaseRules(sequences, roi, min_roi_pixels, missing_allowed, tuple(windows_hu))
    if kind == "table":
        splits = _row_splits(source, splits)
    labelled: LabelledSet | None = None
    if task == SEGMENT:
        labelled = read_labelled_set(source, kind, sequences, question, splits, template)
        kind = "images" if labelled.pictures else kind
        jobs, findings = _plan_labelled(source, kind, replace(rules, roi=""), splits, labelled)
    else:
        jobs, findings = _plan(source, kind, rules, splits, template)
    jobs = [replace(job, stats=stats) for job in jobs]
    findings += _label_findings(source, kind, task, labels, target, jobs)
    caption = CAPTION if labelled is None else CAPTION.replace("the ROI", "the label map")
    page = Gallery(caption) if out is not None else None
    with folder_for_results(out, overwrite, _inputs(source, splits, labels, jobs)) as claim:
        sums, label_maps = _Sums(), _LabelMaps()
        kept = _look_at_all(jobs, workers, page, progress, findings, sums, label_maps)
        if labelled is not None:
            kept += label_maps.findings(labelled, source)
        shown = [replace(f, path=hide_home(f.path), message=hide_home(f.message)) for f in kept]
        asked = sequences if kind == "cases" or kind in FOREIGN else ()
        counts = {name: len(ids.ids) for name, (_, ids) in splits.items()}
        ids = [job.case.case_id for job in jobs]
        report = report_of(started, source, task, asked, counts, ids, shown)
        report["layout"] = kind
        report["stats"] = sums.report(sequences, windows_hu) if stats else None
        if labelled is not None:
            report["classes"] = label_maps.classes
        result = CheckResult(report, shown, out, on_error)
        claim()
        if fix_csv is not None:
            _write_fixed(fix_csv, source, kind, split_csv, jobs, shown)
        write_results(result, page)
    return result


@contextlib.contextmanager
def folder_for_results(out: Path | None, overwrite: bool, inputs: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """Hold ``out``, if any, and give what makes it ready: only that deletes what lay in it."""
    if out is None:
        yield lambda: None
        return
    check_out_folder(out, COMMAND, overwrite=overwrite, inputs=inputs)
    with locked(out, "output folder"):
        yield lambda: claim_out_folder(out, COMMAND, overwrite=overwrite, inputs=inputs)


def _inputs(
    source: Path, splits: Mapping[str, tuple[Path, Ids]], labels: Path | None, jobs: Sequence[Job]
) -> list[Path]:
    """All that is read: the source, tables, and the files that they name."""
    tables = [*(path for path, _ in splits.values()), *([] if labels is None else [labels])]
    masks = [job.labels.path for job in jobs if job.labels is not None and job.labels.path is not None]
    return [source, *tables, *masks, *(entry.path for job in jobs for entry in job.case.sequences.values())]


def _look_at_all(
    jobs: Sequence[Job],
    workers: int | None,
    page: Gallery | None,
    progress: Progress | None,
    findings: Sequence[Finding],
    sums: _Sums,
    label_maps: _LabelMaps,
) -> list[Finding]:
    """Findings of each case, then ``findings`` and those that only all cases together show."""
    cases, kept, channels = [], [], {}
    with ordered_map(worker_count(workers) if len(jobs) > _SMALL else 1) as ordered:
        for done, looked in enumerate(ordered(look, jobs), start=1):
            kept += looked.findings
            cases.append((looked.case, looked.digests))
            if looked.channels is not None:
                channels[looked.case.case_id] = looked.channels
            sums.add(looked)
            label_maps.add(looked)
            if page is not None:
                page.add(looked)
            if progress is not None:
                progress(done, len(jobs))
    return [*kept, *findings, *check_channels(channels), *check_duplicates(cases)]


# --- planning --------------------------------------------------------------------------------------------------------


def _check_windows(windows_hu: Sequence[tuple[float, float]], kind: LayoutName, sequences: Sequence[str]) -> None:
    wrong = [f"{low:g},{high:g}" for low, high in windows_hu if not -math.inf < low < high < math.inf]
    if wrong:
        raise ConfigError(
            "The lower end of a window must be below its upper end.",
            where=f"--window-hu {wrong[0]}",
            fix="e.g. --window-hu=-1000,1000",
            code="window_hu",
        )
    if len(windows_hu) > 1 and kind != "table" and len(sequences) > 1:
        raise ConfigError(
            "Several windows are channels of a picture of one sequence.",
            where=f"--window-hu with {', '.join(sequences)}",
            fix="name the CT alone with --sequences",
            code="window_hu",
        )


def _refuse_idle(task: str, given: Mapping[str, bool]) -> None:
    """Refuse options that would do nothing.

    Raises:
        ConfigError: Those that were given.
    """
    idle = [name for name, is_given in given.items() if is_given]
    if idle:
        own = "they belong to" if len(idle) > 1 else "it belongs to"
        fix = f"leave it out; {own} --task {CT_PET}" if task != CT_PET else "leave it out; the files tell"
        raise ConfigError(
            f"{counted(len(idle), 'option')} would have no effect.",
            where=f"{', '.join(idle)} with --task {task}" if task != "no task" else f"{', '.join(idle)} without --task",
            fix=fix,
            code="option_idle",
        )


def _checked_task(task: str | None, kind: LayoutName, labels: Path | None) -> str:
    if task is None:
        return "classify" if labels is not None else "images" if kind == "images" else "pretrain"
    if task in LATER_TASKS:
        raise ConfigError(
            f"The checks of {task!r} are not part of this version.",
            where=f"--task {task}",
            fix=f"check what there is: {', '.join(TASKS)}",
            code="task_unbuilt",
        )
    if task not in TASKS:
        near = nearest_id(task, TASKS)
        raise ConfigError(
            f"There is no task {task!r}{near}.", where="--task", fix=f"one of {', '.join(TASKS)}", code="task_unknown"
        )
    if (task, kind) in (("pretrain", "images"), ("images", "cases")):
        other = "images" if kind == "images" else "pretrain"
        raise ConfigError(
            f"The task {task!r} does not fit a tree of {kind}.", where="--task", fix=f"--task {other}", code="task_kind"
        )
    if task == "classify" and labels is None and kind == "cases":
        raise ConfigError(
            "Nothing tells the labels.", where="--task classify", fix="pass --labels CSV", code="labels_missing"
        )
    return task


def _read_splits(paths: Sequence[Path]) -> dict[str, tuple[Path, Ids]]:
    """Ids by split; the siblings train.csv, val.csv and test.csv of a named file are read for overlap as well."""
    files: dict[str, Path] = {}
    for path in paths:
        named = (
            [path / f"{name}.csv" for name in _SPLIT_NAMES if (path / f"{name}.csv").is_file()]
            if path.is_dir()
            else [path]
        )
        if not named:
            raise DataError(
                "The folder holds no split.",
                where=str(path),
                fix="it should hold train.csv, val.csv, test.csv",
                code="ids_none",
            )
        for file in named:
            if file.stem in files:
                raise ConfigError(
                    "Two splits have one name.", where=str(file), fix="rename one file", code="split_name"
                )
            files[file.stem] = file
    return {name: (path, read_ids(path)) for name, path in files.items()}


def _siblings(splits: Mapping[str, tuple[Path, Ids]]) -> dict[str, tuple[Path, Ids]]:
    """train.csv, val.csv and test.csv beside the files of ``splits``, which were not named."""
    found: dict[str, tuple[Path, Ids]] = {}
    for path, _ in splits.values():
        for name in _SPLIT_NAMES:
            beside = path.with_name(f"{name}.csv")
            if path.stem in _SPLIT_NAMES and name not in splits and beside.is_file():
                table = read_table(beside)
                if table.rows:
                    found[name] = (beside, read_ids(beside))
    return found


def _row_splits(source: Path, splits: Mapping[str, tuple[Path, Ids]]) -> dict[str, tuple[Path, Ids]]:
    """For a table: the ids of the rows that each split names, be it by row, patient or study."""
    found = {}
    for name, (path, _) in splits.items():
        ids = sorted(case.case_id for case in read_table_cases(source, split_csv=path))
        found[name] = (path, Ids(tuple(ids), (), ""))
    return found


def _plan(
    source: Path, kind: LayoutName, rules: CaseRules, splits: Mapping[str, tuple[Path, Ids]], template: str
) -> tuple[list[Job], list[Finding]]:
    """The cases to look at, and what can be found without looking."""
    if kind == "cases":
        return _plan_folders(source, rules, splits)
    every = {**splits, **_siblings(splits)}
    if kind == "images":
        cases = _image_cases(source, splits)
    elif kind == "table":
        cases = read_table_cases(source)
        every = {**splits, **_row_splits(source, _known_rows(source, _siblings(splits)))}
    else:
        cases = read_layout_cases(source, kind, rules.sequences, roi=rules.roi, template=template)
        for path, _ in splits.values():
            select_cases(cases, path)  # refuses unknown ids
    patients = {case.case_id: case.patient_id for case in cases}
    if splits and kind != "images":
        split_of = {case_id: name for name, (_, ids) in splits.items() for case_id in ids.ids}
        cases = [replace(case, split=split_of[case.case_id]) for case in cases if case.case_id in split_of]
    root = source.parent if kind == "table" else source
    how: Literal["named", "row", "picture"] = "named" if kind in FOREIGN else "picture" if kind == "images" else "row"
    return [Job(case, rules, root, how=how) for case in cases], check_splits(every, patients)


def _plan_folders(
    source: Path, rules: CaseRules, splits: Mapping[str, tuple[Path, Ids]]
) -> tuple[list[Job], list[Finding]]:
    owners = read_owners(source)
    split_of = {case_id: name for name, (_, ids) in splits.items() for case_id in ids.ids}
    ids = sorted(split_of) if splits else case_ids(source)
    cases = [
        Case(name, owners[name].patient_id if name in owners else name, split=split_of.get(name, "")) for name in ids
    ]
    patients = {name: owner.patient_id or name for name, owner in owners.items()}
    jobs = [Job(case, rules, source, owners, "folder") for case in cases]
    return jobs, check_splits({**splits, **_siblings(splits)}, patients)


def _plan_labelled(
    source: Path, kind: LayoutName, rules: CaseRules, splits: Mapping[str, tuple[Path, Ids]], labelled: LabelledSet
) -> tuple[list[Job], list[Finding]]:
    """The cases of a data set with label maps, and what can be found without looking."""
    owners = read_owners(source) if kind == "cases" else {}
    how: Literal["folder", "named", "picture"] = (
        "folder" if kind == "cases" else "picture" if labelled.pictures else "named"
    )
    jobs = [Job(case, rules, source, owners, how, labels=labelled.rules_of(case)) for case in labelled.cases]
    return jobs, [*labelled.findings, *check_splits({**splits, **_siblings(splits)}, labelled.patients)]


def _known_rows(source: Path, siblings: Mapping[str, tuple[Path, Ids]]) -> dict[str, tuple[Path, Ids]]:
    """The sibling lists that name rows of this table; another list beside a split is none of it."""
    known = {}
    for name, (path, ids) in siblings.items():
        try:
            read_table_cases(source, split_csv=path)
        except DataError as error:
            log.debug("%s names no rows of %s: %s", path, source, error.what)
            continue
        known[name] = (path, ids)
    return known


def _image_cases(source: Path, splits: Mapping[str, tuple[Path, Ids]]) -> list[Case]:
    if not splits:
        return read_image_cases(source)
    return [case for name, (path, _) in splits.items() for case in read_image_cases(source, split_csv=path, split=name)]


def _label_findings(
    source: Path, kind: LayoutName, task: str, labels: Path | None, target: str | None, jobs: Sequence[Job]
) -> list[Finding]:
    if task != "classify":
        return []
    ids = [job.case.case_id for job in jobs]
    if labels is None:
        return check_labels({job.case.case_id: job.case.label for job in jobs}, source)
    of_images = kind == "images"
    table = read_table(labels)
    column = target or _only_target(labels, table.header, label_id_column(table, of_images=of_images))
    found = read_labels(labels, column, of_images=of_images)
    given = match_image_ids(source, found, ids) if of_images else {name: name for name in ids}
    return check_labels({name: found.get(given.get(name, ""), "") for name in ids}, labels)


def _only_target(path: Path, header: Sequence[str], id_column: str) -> str:
    others = [name for name in header if name != id_column]
    if "label" in others:
        return "label"
    if len(others) != 1:
        raise ConfigError(
            "Which column is the label?",
            where=f"{path}: {', '.join(others)}",
            fix="pass --target COLUMN",
            code="target_missing",
        )
    return others[0]


# --- looking ---------------------------------------------------------------------------------------------------------


def look(job: Job) -> Looked:
    """Check one case and draw its thumbnail; runs in a worker."""
    if job.how == "folder":
        checked = check_case_folder(job.root, job.case.case_id, job.rules, owners=job.owners, split=job.case.split)
    elif job.how == "named":
        checked = check_named_case(job.case, job.rules, job.root)
    else:
        checked = check_case(job.case, job.rules, only_pictures=job.how == "picture")
    if job.labels is not None:
        check_label_map(checked, job.labels, job.root)
    pictures = list(checked.pictures.values())
    return Looked(
        case=checked.case,
        findings=checked.findings,
        digests=checked.digests,
        channels=pictures[0].shape[0] if pictures else None,
        thumbnail=_thumbnail(checked),
        shown=", ".join([*checked.volumes, *checked.pictures]),
        moments=_moments(checked, job.rules) if job.stats else {},
        labels=_found_labels(checked, job.labels),
    )


def _found_labels(checked: CheckedCase, rules: LabelRules | None) -> FoundLabels | None:
    if rules is None or rules.path is None or not checked.label_voxels:
        return None
    return FoundLabels(checked.case.case_id, rules.path, checked.label_voxels)


def _moments(checked: CheckedCase, rules: CaseRules) -> dict[str, Moments]:
    """Sums of the images of a case without error, by sequence, window or number of channels of a picture."""
    if any(finding.severity == "error" for finding in checked.findings):
        return {}
    pictures = list(checked.pictures.values())
    if pictures:
        return {f"{len(image)} channels": picture_moments(image, PreprocessConfig()) for image in pictures[:1]}
    several = rules.windows_hu if len(rules.windows_hu) > 1 else ()
    window_hu = rules.windows_hu[0] if len(rules.windows_hu) == 1 else None
    names = tuple(name for name in rules.sequences if name in checked.volumes) or tuple(checked.volumes)
    return volume_moments(checked.case, names, PreprocessConfig(window_hu=window_hu), several)


def _thumbnail(checked: CheckedCase) -> bytes | None:
    """JPEG of all sequences side by side: the slice with most ROI, or the middle one; None if nothing is readable."""
    tiles = [_picture_tile(picture, checked.labels_HW) for picture in checked.pictures.values()]
    volumes = {name: volume.reoriented("RAS") for name, volume in checked.volumes.items() if volume.array.ndim == 3}
    roi = None if checked.roi is None else checked.roi.reoriented("RAS")
    tiles += [_volume_tile(volume, roi) for volume in volumes.values()]
    return jpeg_bytes(montage(tiles)) if tiles else None


def _volume_tile(volume: Volume, roi: Volume | None) -> np.ndarray:
    same = roi is not None and roi.grid_difference(volume) is None
    areas = (roi.array > 0).sum(axis=(1, 2)) if roi is not None and same else np.zeros(1)
    index = int(areas.argmax()) if areas.any() else volume.shape[0] // 2
    plane = np.take(volume.array, index, axis=AXIAL)
    spacing = (volume.spacing.y, volume.spacing.x)
    picture = fitted(window(radiological(plane), *percentile_window(plane)), THUMBNAIL_SIDE, spacing)
    if roi is None or not areas.any():
        return picture
    mask = window(radiological(roi.array[index] > 0), 0, 1)
    return draw(picture, contour(fitted(mask, THUMBNAIL_SIDE, spacing, smooth=False)[..., 0] > 0))


def _picture_tile(image_CHW: np.ndarray, labels_HW: np.ndarray | None) -> np.ndarray:
    if image_CHW.shape[0] == 3 and image_CHW.dtype == np.uint8:
        tile = fitted(np.ascontiguousarray(image_CHW.transpose(1, 2, 0)), THUMBNAIL_SIDE)
    else:
        grey = image_CHW.mean(axis=0)
        tile = fitted(window(grey, float(grey.min()), float(grey.max())), THUMBNAIL_SIDE)
    if labels_HW is None:
        return tile
    mask = fitted(window(labels_HW > 0, 0, 1), THUMBNAIL_SIDE, smooth=False)[..., 0] > 0
    return draw(tile, contour(mask))


class _LabelMaps:
    """Voxels by value of all label maps, kept until the last is known."""

    def __init__(self) -> None:
        self._found: list[FoundLabels] = []
        self.classes: list[dict[str, Any]] = []

    def add(self, looked: Looked) -> None:
        """Keep those of one case."""
        if looked.labels is not None:
            self._found.append(looked.labels)

    def findings(self, labelled: LabelledSet, source: Path) -> list[Finding]:
        """What all of them together show; ``classes`` is filled."""
        question = labelled.question
        stem = "" if labelled.pictures else question.label  # that of pictures is a folder
        found, self.classes = class_findings(self._found, labelled.spec, question.classes, source, stem)
        return found


class _Sums:
    """Moments of all cases, added up as they come in."""

    def __init__(self) -> None:
        self._by_name: dict[str, Moments] = {}
        self._cases = 0

    def add(self, looked: Looked) -> None:
        """Add those of one case."""
        self._cases += bool(looked.moments)
        for name, moments in looked.moments.items():
            known = self._by_name.get(name)
            self._by_name[name] = moments if known is None else known + moments

    def report(self, sequences: Sequence[str], windows_hu: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
        """Names of the channels, mean and standard deviation of each; None when no image could be counted."""
        sums = self._by_name
        if "3 channels" in sums:  # as in training, grey pictures among coloured ones have three equal channels
            grey = sums.get("1 channels")
            colour = sums["3 channels"] + grey.repeated(3) if grey is not None else sums["3 channels"]
            return self._entry(["red", "green", "blue"], [colour])
        if "1 channels" in sums:
            return self._entry(["grey"], [sums["1 channels"]])
        if len(windows_hu) > 1:
            names = [f"{low:g} to {high:g} HU" for low, high in windows_hu]
            return self._entry(names, [sums[str(n)] for n in range(len(names)) if str(n) in sums])
        known = [name for name in sequences if name in sums] or list(sums)
        return self._entry(known, [sums[name] for name in known])

    def _entry(self, channels: list[str], parts: Sequence[Moments]) -> dict[str, Any] | None:
        if not parts or any(part.count == 0 for part in parts):
            return None
        return {
            "channels": channels,
            "mean": [float(value) for part in parts for value in part.mean_C],
            "std": [float(value) for part in parts for value in part.std_C],
            "pixels": [part.count for part in parts],
            "n_cases": self._cases,
        }


# --- writing ---------------------------------------------------------------------------------------------------------


def report_of(
    started: float,
    source: Path,
    task: str,
    sequences: Sequence[str],
    splits: Mapping[str, int],
    case_ids: Sequence[str],
    findings: Sequence[Finding],
) -> dict[str, Any]:
    """Contents of ``check_data.json``, less what belongs to one task; ``splits`` counts the cases of each."""
    bad = _bad_cases(findings)
    lists = {s: [_entry(f) for f in findings if f.severity == s] for s in SEVERITIES}
    return {
        **result_header("check-data", started),
        "source": hide_home(str(source)),
        "task": task,
        "sequences": list(sequences),
        "splits": dict(splits),
        "n_cases": len(case_ids),
        "n_ok": sum(name not in bad for name in case_ids),
        "errors": lists["error"],
        "warnings": lists["warning"],
        "infos": lists["info"],
    }


def write_results(result: CheckResult, gallery: Gallery | None) -> None:
    """check_data.json, failures.csv and check_data.html, if there is a folder for them."""
    if result.out is None or gallery is None:
        return
    write_json(result.out / REPORT, result.report)
    errors = [(f.case_id, f.path, f.message, f.fix) for f in result.findings if f.severity == "error"]
    write_failures(result.out / FAILURES, errors)
    gallery.write(result.out / PAGE, result)


def _entry(finding: Finding) -> dict[str, str]:
    entry = asdict(finding)
    del entry["severity"]
    return entry


def _bad_cases(findings: Sequence[Finding]) -> set[str]:
    return {f.case_id for f in findings if f.severity == "error"}


def _write_fixed(
    path: Path,
    source: Path,
    kind: LayoutName,
    split_csv: Sequence[Path],
    jobs: Sequence[Job],
    findings: Sequence[Finding],
) -> None:
    """The rows without error: of the one split CSV or the table as they were, else a column ``patient_id``."""
    bad = _bad_cases(findings)
    good = [job.case.case_id for job in jobs if job.case.case_id not in bad]
    origin = split_csv[0] if len(split_csv) == 1 and split_csv[0].is_file() else source if kind == "table" else None
    if not good:
        log.warning("%s is not written: no case is without error", path)
        return
    if origin is None or origin.suffix.lower() == ".txt":
        write_csv(path, ("patient_id",), ((name,) for name in good))
        return
    table = read_table(origin)
    columns = row_columns(read_table(source)) if kind == "table" else ()
    if origin == source:
        names = [case.case_id for case in read_table_cases(source)]
    elif columns and all(column in table.header for column in columns):
        names = joined_cells(table, columns)
    else:
        names = table.column(read_ids(origin).column)
        if kind == "table":  # a list of its patients or studies: one bad row costs them all
            failed = [job.case for job in jobs if job.case.case_id in bad]
            bad |= {name for case in failed for name in (case.patient_id, case.study_uid) if name}
    write_csv(
        path, table.header, (row for row, name in zip(table.rows, names, strict=True) if _is_good(name, bad, kind))
    )


def _is_good(name: str, bad: set[str], kind: LayoutName) -> bool:
    if kind != "images":
        return name not in bad
    return not any(case_id == name or case_id.endswith(f"/{name}") or name.endswith(f"/{case_id}") for case_id in bad)


class Gallery:
    """Cards of the page, collected while cases come in; bounded, so that a large cohort keeps a readable page.

    Args:
        caption: How the pictures are to be read.
    """

    def __init__(self, caption: str = CAPTION) -> None:
        self._caption = caption
        self._cards: list[tuple[str, Html, bool]] = []
        self._left_out = 0

    def add(self, looked: Looked) -> None:
        """Keep the card of a case; beyond ``MAX_CARDS`` a case without error gives way to one with."""
        bad = any(f.severity == "error" for f in looked.findings)
        if len(self._cards) >= MAX_CARDS:
            self._left_out += 1
            fine = next((i for i in reversed(range(len(self._cards))) if not self._cards[i][2]), None)
            if not bad or fine is None:
                return
            del self._cards[fine]
        self._cards.append((looked.case.case_id, _card(looked), bad))

    def write(self, path: Path, result: CheckResult) -> None:
        """The whole page: numbers, findings by kind, errors and warnings one by one, cases with pictures."""
        r = result.report
        n_bad = r["n_cases"] - r["n_ok"]
        verdict = (
            "No error was found."
            if not r["errors"]
            else f"{n_bad} of {counted(r['n_cases'], 'case')} {'has' if n_bad == 1 else 'have'} an error."
        )
        page = Page(f"Data check of {Path(r['source']).name}", lead=verdict)
        page.facts(
            {
                "Source": r["source"],
                "Task": r["task"],
                "Sequences": ", ".join(r["sequences"]) or None,
                "Cases": r["n_cases"],
                "Cases without error": r["n_ok"],
                "Errors, warnings, notes": f"{len(r['errors'])}, {len(r['warnings'])}, {len(r['infos'])}",
            }
        )
        cards = sorted(self._cards, key=lambda card: not card[2])
        anchors = {case_id: f"case-{i}" for i, (case_id, _, _) in enumerate(cards)}
        page.heading("Findings by kind")
        rows = [(chip(s, s), code, n, cases, first.message) for s, code, n, cases, first in result.counts()]
        page.table(("Severity", "Code", "Findings", "Cases", "For example"), rows)
        serious = [f for f in result.findings if f.severity != "info"]
        if serious:
            page.heading("Errors and warnings")
            page.table(
                ("Severity", "Case", "What", "File", "How to mend it"), [_row(g, anchors) for g in _alike(serious)]
            )
        if r.get("classes"):
            page.heading("Classes")
            keys = ("name", "values", "n_cases", "n_voxels")
            rows = [tuple(entry[key] for key in keys) for entry in r["classes"]]
            page.table(("Class", "Value", "Cases", "Voxels"), rows, right=range(1, 4))
        page.heading("Cases")
        page.text(self._caption)
        if self._left_out:
            page.note(f"Without room here, in check_data.json: {counted(self._left_out, 'case')}.", "info")
        page.cards((anchors[case_id], content) for case_id, content, _ in cards)
        page.write(path)


def _alike(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings with the same words in one row, worst first."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for f in findings:
        groups.setdefault((f.severity, f.code, f.message, f.fix), []).append(f)
    return sorted(groups.values(), key=lambda group: SEVERITIES.index(group[0].severity))


def _row(group: Sequence[Finding], anchors: Mapping[str, str]) -> tuple[str, ...]:
    first = group[0]
    ids = list(dict.fromkeys(f.case_id for f in group))
    places = [link(i, anchors[i]) if i in anchors else escaped(i) for i in ids[:_SHOWN_CASES]]
    more = f" and {len(ids) - _SHOWN_CASES} more" if len(ids) > _SHOWN_CASES else ""
    what = joined([Html(f"<code>{escaped(first.code)}</code>"), first.message], Html("<br>"))
    files = joined([path_text(first.path), f"and {len(group) - 1} more"] if len(group) > 1 else [path_text(first.path)])
    return chip(first.severity, first.severity), joined([joined(places, ", "), more], ""), what, files, first.fix


def _card(looked: Looked) -> Html:
    counts: Counter[str] = Counter(f.severity for f in looked.findings)
    chips = [chip(f"{counts[s]} {s}{'s' * (counts[s] > 1)}", s) for s in SEVERITIES if counts[s]]
    if not counts["error"]:
        chips.insert(0, chip("ok", "ok"))
    parts = [Html(f"<h3>{escaped(looked.case.case_id)}</h3>")]
    if looked.thumbnail is not None:
        parts.append(image(looked.thumbnail, f"{looked.shown} of {looked.case.case_id}"))
        parts.append(Html(f"<p>{escaped(looked.shown)}</p>"))
    else:
        parts.append(Html("<p>nothing readable to show</p>"))
    parts.append(Html(f"<p>{joined(chips)}</p>"))
    return joined(parts, "")
