"""``medssl check-data --task ct-pet``: every slice of a CT-PET data set, before a training meets it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medssl_cli.core import case as core
from medssl_cli.core.case import Case
from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home, worker_count
from medssl_cli.core.wording import counted
from medssl_cli.data.checks import Finding, Severity, check_duplicates, content_digest
from medssl_cli.data.ct_pet import (
    PARTNER_FIX,
    PATIENT_FIX,
    PCLT_FIX,
    CtPetScan,
    DatasetType,
    FoundSlice,
    Kind,
    check_sizes,
    compiled,
    find_patient,
    read_luminance,
    read_pet_ct_mask,
    scan_ct_pet,
    shared_patients,
)
from medssl_cli.report.overlay import contour, draw, fitted, jpeg_bytes, montage, window
from medssl_cli.services.check_data import (
    THUMBNAIL_SIDE,
    CheckResult,
    Gallery,
    Looked,
    Progress,
    folder_for_results,
    report_of,
    write_results,
)
from medssl_cli.services.worker_pool import ordered_map

TASK = "ct-pet"
CAPTION = (
    "CT and PET as stored, each from its darkest to its brightest pixel; the line on the third is the mask, on CT."
)
_SMALL = 32  # so few slices are done before a second process has started
_DEEP = 4096  # grey values of 12 bits: a picture of 16 bits that stays below is nearly black


@dataclass(frozen=True)
class SliceJob:
    """What one worker looks at.

    Args:
        case: Name of the slice, with its part where there are several; patient, empty if unknown; files that exist.
        found: Where the files should lie.
        mask_threshold: As of ``read_pet_ct_mask``.
    """

    case: Case
    found: FoundSlice
    mask_threshold: int | None


@dataclass(frozen=True)
class LookedAt:
    """What comes back of one slice.

    Args:
        looked: Findings, hashes and picture.
        lesion_pixels: Of the mask; None if it cannot be read.
    """

    looked: Looked
    lesion_pixels: int | None


def check_ct_pet(
    source: Path,
    *,
    dataset_type: DatasetType = "auto",
    patient_regex: str | None = None,
    mask_threshold: int | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    on_error: str = "stop",
    workers: int | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Read every file of a CT-PET data set and collect findings; nothing in ``source`` is changed.

    Args:
        source: Its folder.
        dataset_type, patient_regex: As of ``read_ct_pet``.
        mask_threshold: As of ``read_pet_ct_mask``; without it masks hold 0 and 1 or 0 and 255.
        out, overwrite, on_error, workers, progress: As of ``check_data``.

    Raises:
        ConfigError: A pattern that is none, or an output folder that cannot be used.
        DataError: No CT-PET data set.
    """
    started = time.time()
    scan = scan_ct_pet(source, dataset_type=dataset_type)
    jobs = _plan(scan, patient_regex, mask_threshold)
    findings = [*_stranger_findings(scan), *_patient_findings(jobs, patient_regex), *_split_findings(jobs)]
    gallery = Gallery(CAPTION) if out is not None else None
    with folder_for_results(out, overwrite, [source]) as claim:
        answers = _look_at_all(jobs, workers, gallery, progress)
        findings = [finding for answer in answers for finding in answer.looked.findings] + findings
        findings += [*check_duplicates((a.looked.case, a.looked.digests) for a in answers), *_lesion_findings(answers)]
        shown = [replace(f, path=hide_home(f.path), message=hide_home(f.message)) for f in findings]
        parts = {
            part: sum(job.found.part == part for job in jobs) for part in dict.fromkeys(s.part for s in scan.slices)
        }
        ids = [job.case.case_id for job in jobs]
        report = report_of(started, source, TASK, ("CT", "PET"), {} if "all" in parts else parts, ids, shown)
        report |= {
            "layout": scan.layout,
            "n_patients": len({job.case.patient_id for job in jobs if job.case.patient_id}),
            "n_with_lesion": sum(bool(answer.lesion_pixels) for answer in answers),
            "stats": None,
        }
        result = CheckResult(report, shown, out, on_error)
        claim()
        write_results(result, gallery)
    return result


def _look_at_all(
    jobs: Sequence[SliceJob], workers: int | None, gallery: Gallery | None, progress: Progress | None
) -> list[LookedAt]:
    answers = []
    with ordered_map(worker_count(workers) if len(jobs) > _SMALL else 1) as ordered:
        for done, answer in enumerate(ordered(look, jobs), start=1):
            if gallery is not None:
                gallery.add(answer.looked)
            answers.append(replace(answer, looked=replace(answer.looked, thumbnail=None)))  # the page has the picture
            if progress is not None:
                progress(done, len(jobs))
    return answers


# --- planning --------------------------------------------------------------------------------------------------------


def _plan(scan: CtPetScan, patient_regex: str | None, mask_threshold: int | None) -> list[SliceJob]:
    pattern = compiled(patient_regex)
    jobs = []
    for found in scan.slices:
        whole = found.part == "all"
        patient = found.folder if found.folder and pattern is None else find_patient(found.name, pattern)
        files: dict[str, core.Sequence] = {
            kind: core.Sequence(kind, path) for kind, path in found.places.items() if kind in found.there
        }
        case_id = found.name if whole else f"{found.part}/{found.name}"
        case = Case(case_id, patient, files, split="" if whole else found.part)
        jobs.append(SliceJob(case, found, mask_threshold))
    return jobs


def _stranger_findings(scan: CtPetScan) -> list[Finding]:
    message = "The name does not tell which slice of which patient this is."
    return [Finding("error", "pclt_name", "", str(path), message, PCLT_FIX) for path in scan.strangers]


def _patient_findings(jobs: Sequence[SliceJob], patient_regex: str | None) -> list[Finding]:
    message = "The name tells no patient" + ("." if patient_regex is None else f": it does not fit {patient_regex!r}.")
    return [
        Finding("error", "patient_unknown", job.case.case_id, _path(job.case), message, PATIENT_FIX)
        for job in jobs
        if not job.case.patient_id
    ]


def _split_findings(jobs: Sequence[SliceJob]) -> list[Finding]:
    """Patients in several parts, at each of their slices; and parts that a training needs."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for job in jobs:
        parts.setdefault(job.case.split, []).append((job.case.patient_id, job.case.case_id))
    by_id = {job.case.case_id: job.case for job in jobs}
    fix = "split the flat data set again by patient with `medssl split`"
    findings = []
    for patient, sides in shared_patients(parts).items():
        message = f"The patient {patient} stands in {' and '.join(sides)}: scores would be too good."
        findings += [
            Finding("error", "patient_across_splits", case_id, _path(by_id[case_id]), message, fix)
            for ids in sides.values()
            for case_id in ids
        ]
    if "" not in parts and "train" not in parts:
        message = f"There is no folder train, only {', '.join(parts)}."
        findings.append(Finding("warning", "train_missing", "", "", message, "add it before a training"))
    return findings


def _lesion_findings(answers: Iterable[LookedAt]) -> list[Finding]:
    """Parts in which no mask that can be read holds a lesion: nothing is learnt or measured there."""
    pixels: dict[str, int] = {}
    for answer in answers:
        if answer.lesion_pixels is not None:
            pixels[answer.looked.case.split] = pixels.get(answer.looked.case.split, 0) + answer.lesion_pixels
    fix = "see whether the masks are the right ones"
    return [
        Finding("error", "lesion_none", "", "", f"No mask of {part or 'the data set'} holds a lesion.", fix)
        for part, count in pixels.items()
        if count == 0
    ]


def _path(case: Case) -> str:
    return str(next(iter(case.sequences.values())).path)


# --- looking ---------------------------------------------------------------------------------------------------------


def look(job: SliceJob) -> LookedAt:
    """Check one slice and draw its thumbnail; runs in a worker."""
    case, findings = job.case, _missing_findings(job)
    pictures: dict[Kind, np.ndarray] = {}
    for kind in sorted(job.found.there):
        try:
            pictures[kind] = read_luminance(job.found.places[kind])
        except DataError as error:
            findings.append(Finding.of(error, case.case_id, job.found.places[kind]))
    pixels = None
    if "mask" in pictures:
        try:
            pictures["mask"] = read_pet_ct_mask(job.found.places["mask"], threshold=job.mask_threshold)
            pixels = int(pictures["mask"].sum())
        except DataError as error:
            findings.append(Finding.of(error, case.case_id, job.found.places["mask"]))
    fits = _check_size(job, pictures, findings)
    images: dict[Kind, np.ndarray] = {kind: array for kind, array in pictures.items() if kind != "mask"}
    for kind, array in images.items():
        findings += _range_findings(case.case_id, job.found.places[kind], array)
    looked = Looked(
        case=case,
        findings=findings,
        digests={kind: content_digest(array) for kind, array in images.items() if array.min() < array.max()},
        channels=None,
        thumbnail=_thumbnail(images, pictures["mask"] if fits and pixels is not None else None),
        shown=", ".join([*images, *([] if pixels is None else [f"{counted(pixels, 'pixel')} of lesion"])]),
    )
    return LookedAt(looked, pixels)


def _missing_findings(job: SliceJob) -> list[Finding]:
    there = " and ".join(sorted(job.found.there))
    return [
        Finding(
            "error",
            "partner_missing",
            job.case.case_id,
            str(job.found.places[kind]),
            f"The {kind} of this slice is missing; there is {there}.",
            PARTNER_FIX,
        )
        for kind in job.found.missing
    ]


def _check_size(job: SliceJob, pictures: Mapping[Kind, np.ndarray], findings: list[Finding]) -> bool:
    """Whether all pictures that could be read have one size that a network takes; else a finding tells."""
    if not pictures:
        return False
    places = job.found.places
    try:
        check_sizes({kind: (places[kind], array) for kind, array in pictures.items()})
    except DataError as error:
        sizes = ", ".join(f"{kind} {array.shape[1]} x {array.shape[0]}" for kind, array in pictures.items())
        message = f"{error.what} {sizes} pixels."
        path = str(places[next(iter(pictures))])
        findings.append(Finding("error", error.code, job.case.case_id, path, message, error.fix))
        return False
    return True


def _range_findings(case_id: str, path: Path, image_HW: np.ndarray) -> list[Finding]:
    severity: Severity = "error"
    if image_HW.min() == image_HW.max():
        message, code = f"Every pixel has the value {image_HW.flat[0]}.", "image_constant"
        fix = "export it again, or drop the slice"
    elif image_HW.dtype == np.uint16 and image_HW.max() < _DEEP:
        message = f"The picture has 16 bits and no value above {image_HW.max()}: divided by 65535 it is nearly black."
        severity, code, fix = "warning", "range_unused", "export it with its values spread over 8 or 16 bits"
    else:
        return []
    return [Finding(severity, code, case_id, str(path), message, fix)]


def _thumbnail(images: Mapping[Kind, np.ndarray], mask_HW: np.ndarray | None) -> bytes | None:
    """JPEG of CT, PET and the outline of the mask on the first of them; None if nothing is readable."""
    tiles = [fitted(window(image, float(image.min()), float(image.max())), THUMBNAIL_SIDE) for image in images.values()]
    if tiles and mask_HW is not None:
        shape = fitted(window(mask_HW, 0, 1), THUMBNAIL_SIDE, smooth=False)[..., 0] > 0
        tiles.append(draw(tiles[0], contour(shape)))
    return jpeg_bytes(montage(tiles)) if tiles else None
