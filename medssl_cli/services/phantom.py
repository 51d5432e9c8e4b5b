"""Write a phantom cohort: learnable toy data, the same bytes for the same seed."""

from __future__ import annotations

import difflib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl_cli.core.errors import ConfigError
from medssl_cli.core.run import (
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
from medssl_cli.data.images import write_volume
from medssl_cli.data.phantom_dicom import write_study
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
MAX_CASES = 60_000
"""Six-sevenths of it are patients, whose number has four digits."""

Progress = Callable[[int, int, str], None]
"""Cases done, cases in all, id of the last one."""


@dataclass(frozen=True)
class PhantomResult:
    """What was written."""

    task: str
    out: Path
    seed: int
    size: str
    cases: tuple[PhantomCase, ...]
    started: float

    def summary(self) -> str:
        """Lines for the terminal."""
        positive = sum(case.label for case in self.cases)
        patients = len({case.patient for case in self.cases})
        missing = [f"{case.case_id} has no {stem}" for case in self.cases for stem in case.missing]
        return "\n".join(
            [
                f"{self.task}: {len(self.cases)} cases of {patients} patients, {positive} with a lesion, in {self.out}",
                *(f"meant to be incomplete: {line}" for line in missing),
                f"labels: {self.out / 'labels.csv'}",
            ]
        )

    def json(self) -> dict[str, Any]:
        """The result as one JSON document."""
        return {**result_header("phantom", self.started), **self.facts()}

    def facts(self) -> dict[str, Any]:
        """What depends on the arguments alone."""
        return {
            "task": self.task,
            "seed": self.seed,
            "size": self.size,
            "n_cases": len(self.cases),
            "n_patients": len({case.patient for case in self.cases}),
            "n_positive": sum(case.label for case in self.cases),
            "vendors": sorted({case.vendor for case in self.cases}),
            "incomplete": {case.case_id: list(case.missing) for case in self.cases if case.missing},
            "labels": "labels.csv",
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
    write_case = _writer(task)
    _check_numbers(cases, seed, size)
    command = f"phantom {task} --cases {cases} --seed {seed} --size {size}"
    check_out_folder(out, command, overwrite=overwrite)
    planned = plan_cases(cases, seed)
    with locked(out, "phantom"):
        claim_out_folder(out, command, overwrite=overwrite)
        for leftover in out.glob(".tmp-*"):
            shutil.rmtree(leftover)
        rows = []
        for done, case in enumerate(planned, start=1):
            images = draw_images(case, size)
            with say_disk_errors(out):
                write_case(out, case, images, size, overwrite)
            rows.append(_label_row(case, images))
            if progress is not None:
                progress(done, cases, case.case_id)
        write_csv(out / "labels.csv", LABEL_COLUMNS, rows)
        result = PhantomResult(task, out, seed, size, tuple(planned), started)
        write_json(out / "phantom.json", {**_timeless_header(started), **result.facts()})
        (out / ".lock").unlink()
    return result


def _writer(task: str) -> Callable[[Path, PhantomCase, PhantomImages, str, bool], None]:
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


# --- one case --------------------------------------------------------------------------------------------------------


def _write_prostate(out: Path, case: PhantomCase, images: PhantomImages, size: str, overwrite: bool) -> None:
    """``<case_id>/<stem>.nii.gz`` with the masks beside the images."""

    def fill(folder: Path) -> None:
        for stem, volume in images.volumes.items():
            write_volume(folder / f"{stem}.nii.gz", volume)
        _write_masks(folder, images)

    _fill_folder(out, out / case.case_id, fill, overwrite)


def _write_prostate_dicom(out: Path, case: PhantomCase, images: PhantomImages, size: str, overwrite: bool) -> None:
    """``<patient_id>/<study_date>/…`` as the vendor exports it, and the masks as NIfTI under ``masks/<case_id>``."""
    _fill_folder(out, out / "masks" / case.case_id, lambda folder: _write_masks(folder, images), overwrite)
    study = out / case.patient_id / case.study_date
    _fill_folder(out, study, lambda folder: write_study(folder, case, images, size), overwrite)


def _write_masks(folder: Path, images: PhantomImages) -> None:
    write_volume(folder / "roi_Prostate.nii.gz", images.roi)
    write_volume(folder / "lesion.nii.gz", images.lesion)


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


TASKS: dict[str, Callable[[Path, PhantomCase, PhantomImages, str, bool], None]] = {
    "prostate": _write_prostate,
    "prostate-dicom": _write_prostate_dicom,
}
"""Every phantom that can be made, by its name on the command line."""
