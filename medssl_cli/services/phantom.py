"""Write a phantom cohort: learnable toy data, the same bytes for the same seed."""

from __future__ import annotations

import difflib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medssl_cli.core.errors import ConfigError
from medssl_cli.core.run import (
    MARKER,
    check_out_folder,
    claim_out_folder,
    locked,
    publish_folder,
    result_header,
    say_disk_errors,
    temporary_folder,
    write_csv,
    write_json,
)
from medssl_cli.data.images import write_image, write_volume
from medssl_cli.data.phantom_ct_pet import CtPetPatient, draw_ct_pet, plan_ct_pet
from medssl_cli.data.phantom_dicom import write_study
from medssl_cli.data.phantom_head import KINDS
from medssl_cli.data.phantom_head_ct import LABELS, HeadCtImages, HeadCtSeries, HeadCtStudy, draw_head_ct, plan_head_ct
from medssl_cli.data.phantoms import SIZES, PhantomCase, PhantomImages, draw_images, plan_cases

LABEL_COLUMNS = (
    "case_id",
    "patient_id",
    "study_uid",
    "study_date",
    "vendor",
    "label",
    "grade",
    "zone",
    "lesion_mm3",
)
SERIES_COLUMNS = (
    "rel_dir",
    "patient_id",
    "study_uid",
    "series_uid",
    "nifti_path",
    *(f"label_{name}" for name in LABELS),
    "mask_path",
    "vendor",
    "orientation",
)
SLICE_COLUMNS = ("patient_id", "study_uid", "series_uid", "slice_index", *(f"label_{name}" for name in LABELS))
CT_PET_COLUMNS = ("file", "patient_id", "slice", "has_tumour", "tumour_pixels", "vendor")
MASKS = "masks"
"""Folder of the bleeds of head CT, which no reader of cases enters."""
MAX_CASES = 60_000
"""Six-sevenths of it are patients, whose number has four digits."""

Progress = Callable[[int, int, str], None]
"""Cases done, cases in all, id of the last one."""


Rows = dict[str, list[tuple[object, ...]]]
"""Rows of each table, by its file name."""


class Planned(Protocol):
    """A study before any voxel is drawn, of whichever phantom."""

    @property
    def case_id(self) -> str:
        """Its name."""
        ...

    @property
    def patient(self) -> int:
        """Number of its patient."""
        ...

    @property
    def vendor(self) -> str:
        """Of its scanner."""
        ...

    @property
    def label(self) -> int:
        """1 with a finding, else 0."""
        ...


@dataclass(frozen=True)
class Task:
    """One phantom: who is in it, how a study is written, and what is told of it.

    Args:
        plan: (number of cases, seed) -> studies.
        write: (out, study, size, overwrite) -> rows of the tables; what is there already is left alone.
        tables: Header of each table, by its file name; the first is the one of labels.
        facts: What the result tells beyond the common facts.
        lines: The same for people.
    """

    plan: Callable[[int, int], Sequence[Any]]
    write: Callable[[Path, Any, str, bool], Rows]
    tables: Mapping[str, tuple[str, ...]]
    facts: Callable[[Sequence[Any]], dict[str, Any]]
    lines: Callable[[Sequence[Any]], list[str]]


@dataclass(frozen=True)
class PhantomResult:
    """What was written."""

    task: str
    out: Path
    seed: int
    size: str
    cases: tuple[Planned, ...]
    started: float

    def summary(self) -> str:
        """Lines for the terminal."""
        task = TASKS[self.task]
        positive = sum(case.label for case in self.cases)
        finding = {"head-ct": "bleed", "ct-pet": "tumour"}.get(self.task, "lesion")
        sizes = f"{len(self.cases)} cases of {len({case.patient for case in self.cases})} patients"
        return "\n".join(
            [
                f"{self.task}: {sizes}, {positive} with a {finding}, in {self.out}",
                *task.lines(self.cases),
                f"labels: {self.out / next(iter(task.tables))}",
            ]
        )

    def json(self) -> dict[str, Any]:
        """The result as one JSON document."""
        return {**result_header("phantom", self.started), **self.facts()}

    def facts(self) -> dict[str, Any]:
        """What depends on the arguments alone."""
        task = TASKS[self.task]
        return {
            "task": self.task,
            "seed": self.seed,
            "size": self.size,
            "n_cases": len(self.cases),
            "n_patients": len({case.patient for case in self.cases}),
            "n_positive": sum(case.label for case in self.cases),
            "vendors": sorted({case.vendor for case in self.cases}),
            **task.facts(self.cases),
            "labels": next(iter(task.tables)),
        }


def make_phantom(
    task: str,
    out: Path,
    *,
    cases: int = 24,
    seed: int = 0,
    size: str = "small",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PhantomResult:
    """Write ``cases`` studies of ``task`` below ``out``; the same command again goes on where it was interrupted.

    Raises:
        ConfigError: Unknown task or size, a number of cases out of range, or ``out`` holds something else.
        ResourceError: The disk is full; finished cases are intact.
    """
    started = time.time()
    what = _task(task)
    _check_numbers(cases, seed, size)
    command = f"phantom {task} --cases {cases} --seed {seed} --size {size}"
    check_out_folder(out, command, overwrite=overwrite)
    planned = what.plan(cases, seed)
    with locked(out, "phantom"):
        claim_out_folder(out, command, overwrite=overwrite)
        for leftover in out.glob(".tmp-*"):
            shutil.rmtree(leftover)
        rows: Rows = {name: [] for name in what.tables}
        for done, case in enumerate(planned, start=1):
            with say_disk_errors(out):
                written = what.write(out, case, size, overwrite)
            for name, more in written.items():
                rows[name] += more
            if progress is not None:
                progress(done, cases, case.case_id)
        for name, header in what.tables.items():
            write_csv(out / name, header, rows[name])
        result = PhantomResult(task, out, seed, size, tuple(planned), started)
        write_json(out / "phantom.json", {**_timeless_header(started), **result.facts()})
        (out / ".lock").unlink()
    return result


def _task(task: str) -> Task:
    if task in TASKS:
        return TASKS[task]
    near = difflib.get_close_matches(task, TASKS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"There is no phantom {task!r}.",
        where=f"available: {', '.join(TASKS)}",
        fix=f"{hint}name one of them: medssl phantom {near[0] if near else next(iter(TASKS))} OUT",
        code="phantom_unknown",
    )


def _check_numbers(cases: int, seed: int, size: str) -> None:
    faults = []
    if not 1 <= cases <= MAX_CASES:
        faults.append(f"--cases {cases}: from 1 to {MAX_CASES}")
    if seed < 0:
        faults.append(f"--seed {seed}: 0 or more")
    if size not in SIZES:
        faults.append(f"--size {size}: one of {', '.join(SIZES)}")
    if faults:
        raise ConfigError(
            "The phantom cannot be made like this.",
            where="\n".join(faults),
            fix="correct the option; nothing was written",
            code="phantom_options",
        )


def _timeless_header(started: float) -> Mapping[str, Any]:
    header = result_header("phantom", started)
    return {
        **header,
        "started_at": None,
        "elapsed_s": None,
        "reason": "no clock in this file: the same seed gives the same bytes",
    }


# --- prostate --------------------------------------------------------------------------------------------------------


def _write_prostate(out: Path, case: PhantomCase, size: str, overwrite: bool) -> Rows:
    """``<case_id>/<stem>.nii.gz`` with the masks beside the images."""
    images = draw_images(case, size)

    def fill(folder: Path) -> None:
        for stem, volume in images.volumes.items():
            write_volume(folder / f"{stem}.nii.gz", volume)
        _write_masks(folder, images)

    _fill_folder(out, out / case.case_id, fill, overwrite)
    return {"labels.csv": [_label_row(case, images)]}


def _write_prostate_dicom(out: Path, case: PhantomCase, size: str, overwrite: bool) -> Rows:
    """``<patient_id>/<study_date>/…`` as the vendor exports it, and the masks as NIfTI under ``masks/<case_id>``."""
    images = draw_images(case, size)
    _fill_folder(out, out / "masks" / case.case_id, lambda folder: _write_masks(folder, images), overwrite)
    study = out / case.patient_id / case.study_date
    _fill_folder(out, study, lambda folder: write_study(folder, case, images, size), overwrite)
    return {"labels.csv": [_label_row(case, images)]}


def _write_masks(folder: Path, images: PhantomImages) -> None:
    write_volume(folder / "roi_Prostate.nii.gz", images.roi)
    write_volume(folder / "lesion.nii.gz", images.lesion)


def _label_row(case: PhantomCase, images: PhantomImages) -> tuple[object, ...]:
    return (
        case.case_id,
        case.patient_id,
        case.study_uid,
        case.study_date,
        case.vendor,
        case.label,
        case.grade,
        images.zone,
        f"{images.lesion_mm3:.1f}",
    )


def _prostate_facts(cases: Sequence[PhantomCase]) -> dict[str, Any]:
    return {"incomplete": {case.case_id: list(case.missing) for case in cases if case.missing}}


def _prostate_lines(cases: Sequence[PhantomCase]) -> list[str]:
    return [f"meant to be incomplete: {case.case_id} has no {stem}" for case in cases for stem in case.missing]


# --- head CT ---------------------------------------------------------------------------------------------------------


def _write_head_ct(out: Path, study: HeadCtStudy, size: str, overwrite: bool) -> Rows:
    """``<study>/<series>/ct.nii.gz`` of each series, and its bleeds under ``masks``."""
    write_json(out / MASKS / MARKER, {"command": "phantom head-ct", "holds": "masks, no cases"})
    series_rows: list[tuple[object, ...]] = []
    slice_rows: list[tuple[object, ...]] = []
    for series in study.series:
        images = draw_head_ct(study, series, size)
        _write_series(out, series, images, overwrite)
        owner = (study.patient_id, study.study_uid, series.series_uid)
        mask, path = f"{MASKS}/{series.mask_name}", f"{series.rel_dir}/ct.nii.gz"
        series_rows.append((series.rel_dir, *owner, path, *images.labels, mask, series.vendor, series.orientation))
        slice_rows += [(*owner, index, *(int(v) for v in row)) for index, row in enumerate(images.labels_N6)]
    return {"series.csv": series_rows, "slices.csv": slice_rows}


def _write_series(out: Path, series: HeadCtSeries, images: HeadCtImages, overwrite: bool) -> None:
    mask = out / MASKS / series.mask_name
    if overwrite or not mask.exists():
        write_volume(mask, images.mask)
    scaling = (series.slope, series.inter)
    folder = out / series.rel_dir
    _fill_folder(out, folder, lambda f: write_volume(f / "ct.nii.gz", images.stored, scaling=scaling), overwrite)


def _head_ct_facts(studies: Sequence[HeadCtStudy]) -> dict[str, Any]:
    return {
        "n_series": sum(len(study.series) for study in studies),
        "n_by_kind": {kind: sum(kind in study.kinds for study in studies) for kind in KINDS},
        "slice_labels": "slices.csv",
        "mask_values": {kind: value for value, kind in enumerate(KINDS, start=1)},
    }


def _head_ct_lines(studies: Sequence[HeadCtStudy]) -> list[str]:
    facts = _head_ct_facts(studies)
    kinds = ", ".join(f"{kind} {count}" for kind, count in facts["n_by_kind"].items())
    return [f"{facts['n_series']} series; {kinds}", "labels of single slices: slices.csv; bleeds as masks: masks/"]


# --- CT-PET ----------------------------------------------------------------------------------------------------------


def _write_ct_pet(out: Path, patient: CtPetPatient, size: str, overwrite: bool) -> Rows:
    """``CT``, ``PET`` and ``masks`` with one name for the three pictures of a slice; the mask comes last."""
    rows: list[tuple[object, ...]] = []
    for number in patient.slices:
        drawn, name = draw_ct_pet(patient, number, size), patient.file_name(number)
        pictures = {"CT": drawn.ct_HW, "PET": drawn.pet_HW, MASKS: drawn.mask_HW}
        for folder, picture_HW in pictures.items():
            path = out / folder / name
            if overwrite or not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_image(path, picture_HW)
        pixels = int((drawn.mask_HW > 0).sum())
        rows.append((name, patient.case_id, number, int(pixels > 0), pixels, patient.vendor))
    return {"slices.csv": rows}


def _ct_pet_facts(patients: Sequence[CtPetPatient]) -> dict[str, Any]:
    return {"n_slices": sum(len(patient.slices) for patient in patients), "mask_values": {"tumour": 255}}


def _ct_pet_lines(patients: Sequence[CtPetPatient]) -> list[str]:
    return [f"{_ct_pet_facts(patients)['n_slices']} slices as PNG: CT/, PET/ and masks/ with equal names"]


# --- folders ---------------------------------------------------------------------------------------------------------


def _fill_folder(out: Path, final: Path, fill: Callable[[Path], object], overwrite: bool) -> None:
    """Fill a hidden folder and move it into place, so that a case is complete or absent."""
    if final.exists():
        if not overwrite:
            return
        shutil.rmtree(final)
    temporary = temporary_folder(out, final.name)
    try:
        temporary.chmod(0o755)  # made for its owner alone
        fill(temporary)
        final.parent.mkdir(parents=True, exist_ok=True)
        publish_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_PROSTATE_TABLES = {"labels.csv": LABEL_COLUMNS}

TASKS: dict[str, Task] = {
    "prostate": Task(plan_cases, _write_prostate, _PROSTATE_TABLES, _prostate_facts, _prostate_lines),
    "prostate-dicom": Task(plan_cases, _write_prostate_dicom, _PROSTATE_TABLES, _prostate_facts, _prostate_lines),
    "head-ct": Task(
        plan_head_ct,
        _write_head_ct,
        {"series.csv": SERIES_COLUMNS, "slices.csv": SLICE_COLUMNS},
        _head_ct_facts,
        _head_ct_lines,
    ),
    "ct-pet": Task(plan_ct_pet, _write_ct_pet, {"slices.csv": CT_PET_COLUMNS}, _ct_pet_facts, _ct_pet_lines),
}
"""Every phantom that can be made, by its name on the command line."""
