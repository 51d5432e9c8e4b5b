"""Checks of images, cases and splits; each returns findings and changes nothing.

ERROR is what would stop or spoil a training, WARNING what someone should look at, INFO what is worth knowing. Every
fault has one code, a path and a way to mend it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from medssl_cli.core import case as core
from medssl_cli.core.case import Case
from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import GRID_TOLERANCE_MM, Volume, affine_spacing, grid_difference
from medssl_cli.core.wording import counted
from medssl_cli.data.images import (
    ImageHeader,
    check_finite,
    is_image,
    read_header,
    read_image,
    read_volume,
    refuse_absent_volume,
)
from medssl_cli.data.manifest import IMAGE, Ids, Owner, read_case
from medssl_cli.data.npy import GEOMETRY_NOTE, is_npy, npy_kind
from medssl_cli.data.sequences import choose_sequence

Severity = Literal["error", "warning", "info"]

MAX_ANISOTROPY = 3.0
MIN_IMAGE_SIDE = 32

_GRID_CODES = {
    "shape": "grid_shape",
    "orientation": "grid_orientation",
    "spacing": "grid_spacing",
    "position": "grid_position",
}


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Args:
        severity: ``error``, ``warning`` or ``info``.
        code: Stable name of the fault.
        case_id: The case concerned; empty for the data set as a whole.
        path: The file or folder concerned.
        message: What was found, with values.
        fix: What to do about it.
    """

    severity: Severity
    code: str
    case_id: str
    path: str
    message: str
    fix: str = ""

    @classmethod
    def of(cls, error: DataError, case_id: str, path: Path) -> Finding:
        """The finding that an error of a reader means."""
        detail = error.where.removeprefix(str(path)).removeprefix(":").strip()
        return cls("error", error.code or "unreadable", case_id, str(path), f"{error.what} {detail}".strip(), error.fix)


@dataclass
class CheckedCase:
    """One case after its checks.

    Args:
        case: Names and facts.
        findings: In the order found.
        digests: Hash of the voxels by sequence, for the search for duplicates.
        volumes: Readable volumes by sequence, for a thumbnail; pictures as (C, H, W) under ``pictures``.
        roi: Mask of the region of interest, if readable.
        labels_HW: Values of the label map of a picture, if readable.
        label_voxels: Voxels by value of the label map, if readable.
    """

    case: Case
    findings: list[Finding] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    volumes: dict[str, Volume] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    roi: Volume | None = None
    labels_HW: np.ndarray | None = None
    label_voxels: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseRules:
    """What is asked of a case of a tree.

    Args:
        sequences: Names in order; the first that exists is the reference grid.
        roi: Stem of the mask.
        min_roi_pixels: A mask whose largest slice has fewer pixels is too small.
        missing_allowed: A missing sequence is a warning instead of an error.
        windows_hu: (low, high) of each window that training will take, in HU; none for percentiles.
    """

    sequences: tuple[str, ...]
    roi: str = "roi_Prostate"
    min_roi_pixels: int = 1
    missing_allowed: bool = False
    windows_hu: tuple[tuple[float, float], ...] = ()


# --- one case --------------------------------------------------------------------------------------------------------


def check_case_folder(
    root: Path, case_id: str, rules: CaseRules, *, owners: Mapping[str, Owner] | None = None, split: str = ""
) -> CheckedCase:
    """Everything about one folder of a case tree; reads every voxel of the sequences asked for."""
    try:
        case = read_case(root, case_id, (), roi="", owners=owners, split=split)
    except DataError as error:
        return CheckedCase(Case(case_id, case_id, split=split), [Finding.of(error, case_id, root / case_id)])
    checked = CheckedCase(case)
    blocked: set[str] = set()
    for name in rules.sequences:
        try:
            case.sequences.update(read_case(root, case_id, (name,), roi="").sequences)
        except DataError as error:
            checked.findings.append(Finding.of(error, case_id, root / case_id))
            blocked.add(name)
    checked.findings += _choice_findings(root / case_id, case)
    checked.findings += _missing_findings(root / case_id, case, rules, blocked)
    headers = _check_volumes(checked, rules)
    if rules.roi:
        try:
            roi = read_case(root, case_id, (), roi=rules.roi).roi
        except DataError as error:
            checked.findings.append(Finding.of(error, case_id, root / case_id))
        else:
            _check_roi(checked, roi, root / case_id, rules, headers)
    return checked


def check_named_case(case: Case, rules: CaseRules, root: Path) -> CheckedCase:
    """One case whose files are known, as of a foreign layout: all that is asked of a case of a tree."""
    checked = CheckedCase(case)
    checked.findings += _missing_findings(root, case, rules, set())
    headers = _check_volumes(checked, rules)
    if rules.roi:
        _check_roi(checked, case.roi, root, rules, headers)
    return checked


def check_case(case: Case, rules: CaseRules | None = None, *, only_pictures: bool = False) -> CheckedCase:
    """One row of a series table or one image: every file that it names.

    Args:
        case: The files.
        rules: The window in HU counts.
        only_pictures: As in an image tree, where a volume is an error, because training reads pictures there.
    """
    checked = CheckedCase(case)
    for sequence in case.sequences.values():
        if only_pictures or _is_picture(sequence.path):
            _check_picture(checked, sequence)
        else:
            header = _check_volume(checked, sequence)
            if header is not None:
                checked.findings += _anisotropy_findings(case.case_id, {sequence.name: header})
    checked.findings += _unit_findings(checked, () if rules is None else rules.windows_hu)
    return checked


def _is_picture(path: Path) -> bool:
    if not is_npy(path):
        return is_image(path)
    try:
        return npy_kind(path) != "volume"
    except DataError:  # the reader says what is wrong with it
        return True


def _check_volumes(checked: CheckedCase, rules: CaseRules) -> dict[str, ImageHeader]:
    """Voxels of every sequence, and the grids of all against each other; headers of the readable ones."""
    headers = _check_sequences(checked)
    checked.findings += _grid_findings(checked.case.case_id, headers)
    checked.findings += _anisotropy_findings(checked.case.case_id, headers)
    checked.findings += _unit_findings(checked, rules.windows_hu)
    return headers


def _unit_findings(checked: CheckedCase, windows_hu: Sequence[tuple[float, float]]) -> list[Finding]:
    """Volumes that a window in HU does not fit: 8 bits from 0 on are grey values of a picture."""
    lowest = min((low for low, _ in windows_hu), default=0.0)
    found = []
    for name, volume in checked.volumes.items():
        low, high = float(volume.array.min()), float(volume.array.max())
        if lowest < 0 <= low and high <= 255:
            message = f"{name} holds values from {low:g} to {high:g}, but a window begins at {lowest:g} HU."
            fix = "leave the window out, or convert the CT again from DICOM, where -1000 is air"
            path = str(checked.case.sequences[name].path)
            found.append(Finding("warning", "ct_not_hu", checked.case.case_id, path, message, fix))
    return found


def check_geometry(case: Case) -> list[Finding]:
    """What the headers of a case say, and say against each other; no voxel is read.

    Sequences may lie on grids of their own, for they are resampled in world coordinates. But as many voxels of the same
    size at another place, or turned, are what a damaged header looks like. A header that cannot be read is left to the
    reader of its voxels.
    """
    headers: dict[str, ImageHeader] = {}
    findings: list[Finding] = []
    seen: set[Path] = set()
    for name, sequence in case.sequences.items():
        try:
            headers[name] = read_header(sequence.path)
        except DataError:
            continue
        findings += header_findings(headers[name], case.case_id) if sequence.path not in seen else []
        seen.add(sequence.path)  # a 4-D file may hold several sequences
    by_shape: dict[tuple[int, ...], dict[str, ImageHeader]] = {}
    for name, header in headers.items():
        by_shape.setdefault(header.shape[:3], {})[name] = header
    alike = [finding for same in by_shape.values() for finding in _grid_findings(case.case_id, same)]
    findings += [finding for finding in alike if finding.code in ("grid_orientation", "grid_position")]
    reference = next(iter(headers), "")
    for name, header in headers.items():
        if header.shape[:3] != headers[reference].shape[:3]:
            message = f"{name} is resampled to the grid of {reference}."
            findings.append(Finding("warning", "grid_resampled", case.case_id, str(header.path), message))
    return findings


def _choice_findings(folder: Path, case: Case) -> list[Finding]:
    found = []
    for name, sequence in case.sequences.items():
        choice = choose_sequence(folder, name)
        index = "" if sequence.volume_index is None else f", volume {sequence.volume_index}"
        warnings = dict(choice.warnings) if choice else {}
        for code, message in warnings.items():
            message += index if code == "dwi_candidates" else ""
            fix = "keep one file for each sequence, named as asked for, or leave it as it is"
            found.append(Finding("warning", code, case.case_id, str(sequence.path), message, fix))
        if "dwi" in name.lower() and "dwi_candidates" not in warnings:  # which tells the choice as well
            message = f"{name}: {sequence.path.name}{index}"
            found.append(Finding("info", "dwi_choice", case.case_id, str(sequence.path), message))
    return found


def _missing_findings(folder: Path, case: Case, rules: CaseRules, blocked: set[str]) -> list[Finding]:
    lost = [name for name in case.missing(rules.sequences) if name not in blocked]
    severity: Severity = "warning" if rules.missing_allowed and case.sequences else "error"
    return [
        Finding(
            severity,
            "sequence_missing",
            case.case_id,
            str(folder),
            f"There is no {name}.",
            f"add {name}.nii.gz, leave {name} out of --sequences, or pass --allow-missing",
        )
        for name in lost
    ]


def _check_sequences(checked: CheckedCase) -> dict[str, ImageHeader]:
    """Headers of the readable sequences, in the order asked for."""
    found = {name: _check_volume(checked, sequence) for name, sequence in checked.case.sequences.items()}
    return {name: header for name, header in found.items() if header is not None}


# --- one volume ------------------------------------------------------------------------------------------------------


def _check_volume(checked: CheckedCase, sequence: core.Sequence) -> ImageHeader | None:
    """Check one file; its header, if geometry can be compared, and its voxels go into ``checked``."""
    case_id, path = checked.case.case_id, sequence.path
    try:
        header = read_header(path)
        checked.findings += header_findings(header, case_id)
        _refuse_shape(header, sequence)
        _refuse_size(header)
        volume = read_volume(path, volume_index=sequence.volume_index)
        check_finite(path, volume.array)
    except DataError as error:
        checked.findings.append(Finding.of(error, case_id, path))
        return None
    if volume.array.min() == volume.array.max():
        message = f"Every voxel has the value {volume.array.flat[0]:g}."
        fix = "convert it again from its source, or drop the case"
        checked.findings.append(Finding("error", "volume_constant", case_id, str(path), message, fix))
        return header
    checked.digests[sequence.name] = content_digest(volume.array)
    checked.volumes[sequence.name] = volume
    return header


def header_findings(header: ImageHeader, case_id: str) -> list[Finding]:
    """What a NIfTI header says that a reader should know: two geometries, scaling, byte order, data type."""
    found = []

    def add(severity: Severity, code: str, message: str, fix: str = "") -> None:
        found.append(Finding(severity, code, case_id, str(header.path), message, fix))

    shift = _form_shift(header)
    if shift is not None and np.isnan(shift):
        add("warning", "sform_qform", "The qform is no rotation; the sform is used.", "convert the image again")
    elif shift is not None and shift > GRID_TOLERANCE_MM:
        far = shift >= min(affine_spacing(header.affine))
        message = f"sform and qform lie up to {shift:.3g} mm apart; the sform is used."
        add("error" if far else "warning", "sform_qform", message, "set both to the true one, e.g. convert again")
    if not np.isfinite(header.slope) or not np.isfinite(header.inter):
        add(
            "warning", "scl_slope", f"scl_slope {header.slope:g}, scl_inter {header.inter:g}: voxels are taken unscaled"
        )
    elif header.slope == 0:
        add("info", "scl_slope", "scl_slope is 0: voxels are taken unscaled, as NIfTI says")
    if is_npy(header.path):
        add("info", "npy_geometry", f"{GEOMETRY_NOTE}.")
    if header.big_endian:
        add("info", "big_endian", "The file has big-endian byte order.")
    if (header.dtype.kind == "f" and header.dtype.itemsize != 4) or header.dtype.name in ("uint16", "uint32", "int64"):
        add("info", "dtype", f"Voxels are stored as {header.dtype.name}.")
    return found


def _form_shift(header: ImageHeader) -> float | None:
    """How far the corners of the two affines of a header lie apart, in mm; NaN where one is unusable."""
    if header.sform is None or header.qform is None:
        return None
    x, y, z = header.shape[:3]
    corners = np.array([[i, j, k, 1] for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)], dtype=float).T
    return float(np.abs((header.sform - header.qform) @ corners)[:3].max())


def _refuse_shape(header: ImageHeader, sequence: core.Sequence) -> None:
    size = " x ".join(map(str, header.shape))
    if header.dtype.kind not in "iuf":
        raise _refused(header, "The voxels are not plain numbers.", "dtype_unsupported", str(header.dtype))
    if header.n_axes < 3:
        raise _refused(header, "The file holds a plane, not a volume.", "volume_2d", f"{header.n_axes} axes, {size}")
    if min(header.shape[:3]) < 2:
        raise _refused(header, "The volume is one voxel thick.", "axis_single", size)
    refuse_absent_volume(header.path, header.shape[3] if len(header.shape) == 4 else 1, sequence.volume_index)
    if len(header.shape) == 4 and sequence.volume_index is None:
        raise _refused(header, "The file is 4-D where one volume is expected.", "volume_4d", size)


def _refuse_size(header: ImageHeader) -> None:
    needed = int(np.prod(header.shape, dtype=np.int64)) * header.dtype.itemsize
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    if needed > limit:
        detail = f"{needed / 2**30:.1f} GiB of voxels, a quarter of this machine's memory is {limit / 2**30:.1f} GiB"
        raise _refused(header, "The volume is too large for this machine.", "volume_too_large", detail)


def _refused(header: ImageHeader, what: str, code: str, detail: str) -> DataError:
    fix = "convert it again as one 3-D file, e.g. with `medssl convert dicom`"
    return DataError(what, where=f"{header.path}: {detail}", fix=fix, code=code)


def content_digest(array: np.ndarray) -> str:
    """Hash of shape and voxels, so that a copy is known under any name, compression or header."""
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# --- several volumes -------------------------------------------------------------------------------------------------


def _grid_findings(case_id: str, headers: Mapping[str, ImageHeader]) -> list[Finding]:
    if not headers:
        return []
    (reference, first), *others = headers.items()
    found = []
    for name, header in others:
        difference = _difference(first, header)
        if difference:
            code = _GRID_CODES[difference.partition(":")[0]]
            message = f"{reference} and {name} lie on different grids: {difference}."
            fix = f"medssl convert align ROOT OUT --reference {reference}"
            found.append(Finding("error", code, case_id, str(header.path), message, fix))
    return found


def _difference(one: ImageHeader, other: ImageHeader) -> str | None:
    shapes = [header.shape[2::-1] for header in (one, other)]  # file order (x, y, z) to array order
    return grid_difference(shapes[0], one.affine, shapes[1], other.affine)


def _anisotropy_findings(case_id: str, headers: Mapping[str, ImageHeader]) -> list[Finding]:
    """One finding a case, on its reference."""
    for name, header in headers.items():
        sizes = header.spacing
        if max(sizes) > MAX_ANISOTROPY * min(sizes):
            shown = " x ".join(f"{mm:.3g}" for mm in sizes[::-1])
            ratio = max(sizes) / min(sizes)
            message = f"{name} has voxels of {shown} mm: the longest edge is {ratio:.2f} times the shortest."
            fix = "keep to axial slices, or let training resample for random axes"
            return [Finding("warning", "anisotropy", case_id, str(header.path), message, fix)]
        break
    return []


def _check_roi(
    checked: CheckedCase, mask: Path | None, folder: Path, rules: CaseRules, headers: Mapping[str, ImageHeader]
) -> None:
    case_id = checked.case.case_id
    if mask is None:
        message = f"There is no {rules.roi}: slices and crops take the middle of the image."
        checked.findings.append(Finding("info", "roi_absent", case_id, str(folder), message))
        return
    try:
        header = read_header(mask)
        checked.findings += [f for f in header_findings(header, case_id) if f.code != "dtype"]  # any type holds 0 and 1
        _refuse_shape(header, core.Sequence(rules.roi, mask))
        _refuse_size(header)
        volume = read_volume(mask)
        check_finite(mask, volume.array)
    except DataError as error:
        checked.findings.append(Finding.of(error, case_id, mask))
        return
    checked.roi = volume
    checked.findings += _roi_findings(case_id, mask, volume, rules.min_roi_pixels)
    for reference, first in list(headers.items())[:1]:
        difference = _difference(first, header)
        if difference:
            message = f"The ROI lies on another grid than {reference}: {difference}."
            fix = f"resample it with nearest neighbours: medssl convert align ROOT OUT --reference {reference}"
            checked.findings.append(Finding("error", "roi_grid", case_id, str(mask), message, fix))


def _roi_findings(case_id: str, path: Path, roi: Volume, min_pixels: int) -> list[Finding]:
    largest = int((roi.array > 0).sum(axis=(1, 2)).max())
    if largest == 0:
        fix = "draw it again, or remove the file: the middle of the image is used then"
        return [Finding("warning", "roi_empty", case_id, str(path), "The ROI holds no voxel.", fix)]
    if largest < min_pixels:
        message = f"The largest slice of the ROI has {counted(largest, 'pixel')}, {min_pixels} are asked for."
        return [Finding("warning", "roi_small", case_id, str(path), message, "draw it again, or drop the case")]
    return []


# --- pictures --------------------------------------------------------------------------------------------------------


def _check_picture(checked: CheckedCase, sequence: core.Sequence) -> None:
    case_id, path = checked.case.case_id, sequence.path

    def add(severity: Severity, code: str, message: str, fix: str = "") -> None:
        checked.findings.append(Finding(severity, code, case_id, str(path), message, fix))

    try:
        if path.is_file() and path.stat().st_size == 0:
            raise DataError("The file is empty.", where=str(path), fix="export it again", code="file_empty")
        image = read_image(path)
        check_finite(path, image)
    except DataError as error:
        checked.findings.append(Finding.of(error, case_id, path))
        return
    height, width = image.shape[1:]
    if image.min() == image.max():
        add("error", "image_constant", f"Every pixel has the value {image.flat[0]:g}.", "export it again, or drop it")
    if min(height, width) < MIN_IMAGE_SIDE:
        add("warning", "image_small", f"The image has {width} x {height} pixels.", "use the image at full size")
    if image.dtype != np.uint8:
        add("info", "dtype", f"Pixels are stored as {image.dtype.name}.")
    turned = _exif_orientation(path)
    if turned not in (None, 1):
        add("warning", "exif_orientation", f"The file asks to be turned (EXIF orientation {turned}); it is not.")
    checked.digests[sequence.name] = content_digest(image)
    checked.pictures[sequence.name] = image


def _exif_orientation(path: Path) -> int | None:
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as image:
            return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the pixels were read well: a damaged EXIF block says nothing
        return None


def check_channels(channels: Mapping[str, int]) -> list[Finding]:
    """Grey and colour images in one set; ``channels`` is the count by case id."""
    kinds = Counter(channels.values())
    if len(kinds) < 2:
        return []
    rare = min(kinds, key=lambda n: (kinds[n], n))
    shown = ", ".join(name for name, n in channels.items() if n == rare)[:200]
    shares = (f"{counted(n, 'image')} of {counted(c, 'channel')}" for c, n in sorted(kinds.items()))
    message = f"{' and '.join(shares)}; the fewer: {shown}"
    return [Finding("warning", "channels_mixed", "", "", message, "convert all to grey or all to colour")]


# --- labels and splits -----------------------------------------------------------------------------------------------


def check_labels(labels: Mapping[str, str], source: Path) -> list[Finding]:
    """``labels`` is the label by case id, empty where there is none."""
    found = [
        Finding("error", "label_missing", name, str(source), "The case has no label.", "add a row for it")
        for name, label in labels.items()
        if not label
    ]
    counts = Counter(label for label in labels.values() if label)
    if len(counts) == 1:
        message = f"Every case has the label {next(iter(counts))!r}: there is nothing to learn."
        found.append(Finding("error", "label_single", "", str(source), message, "check --target"))
    for label, n in sorted(counts.items()):
        if n < 3 and len(counts) > 1:
            message = f"The class {label!r} has {counted(n, 'case')}: it cannot stand in train, val and test."
            found.append(Finding("warning", "label_rare", "", str(source), message, "join classes or add cases"))
    return found


def check_splits(splits: Mapping[str, tuple[Path, Ids]], patient_of: Mapping[str, str]) -> list[Finding]:
    """Ids and patients that stand in more than one split, and ids that stand twice in one.

    Args:
        splits: File and ids by the name of the split.
        patient_of: Patient by case id; a case that is not in it is its own patient.
    """
    found = []
    for name, (path, ids) in splits.items():
        for twice in ids.duplicates:
            message = f"The id stands more than once in {name}; it counts once."
            found.append(Finding("warning", "id_duplicate", twice, str(path), message, "remove the second row"))
    fix = "make the split again with `medssl split`, which keeps each patient on one side"
    for code, what, owner in (
        ("id_across_splits", "case", lambda case_id: case_id),
        ("patient_across_splits", "patient", lambda case_id: patient_of.get(case_id, case_id)),
    ):
        places: dict[str, dict[str, list[str]]] = {}
        for name, (_, ids) in splits.items():
            for case_id in ids.ids:
                places.setdefault(owner(case_id), {}).setdefault(name, []).append(case_id)
        for key, sides in places.items():
            if len(sides) < 2 or (code == "patient_across_splits" and _one_case(sides)):
                continue
            message = f"The {what} {key} stands in {' and '.join(sides)}: scores would be too good."
            paths = ", ".join(str(splits[name][0]) for name in sides)
            cases = sorted({case_id for ids in sides.values() for case_id in ids})
            found += [Finding("error", code, case_id, paths, message, fix) for case_id in cases]
    return found


def _one_case(sides: Mapping[str, Sequence[str]]) -> bool:
    """Whether the sides share a single case, which is told as such."""
    return len({case_id for ids in sides.values() for case_id in ids}) == 1


def check_duplicates(checked: Iterable[tuple[Case, Mapping[str, str]]]) -> list[Finding]:
    """Images of equal content: an error across splits, a warning within one."""
    places: dict[str, list[tuple[Case, str]]] = {}
    for case, digests in checked:
        for name, digest in digests.items():
            places.setdefault(digest, []).append((case, name))
    found = []
    for copies in places.values():
        if len(copies) < 2:
            continue
        splits = {case.split for case, _ in copies}
        cases = {case.case_id for case, _ in copies}
        code = "duplicate_across_splits" if len(splits) > 1 else "duplicate_content"
        code = "duplicate_within_case" if len(cases) == 1 else code
        severity: Severity = "error" if code == "duplicate_across_splits" else "warning"
        fix = "keep one of them" if len(splits) < 2 else "keep it in one split only"
        for case, name in copies:
            others = [_place(c, n) for c, n in copies if (c.case_id, n) != (case.case_id, name)]
            more = f" and {len(others) - 4} more" if len(others) > 4 else ""
            message = f"{_place(case, name)} has the same content as {', '.join(others[:4])}{more}."
            found.append(Finding(severity, code, case.case_id, str(case.sequences[name].path), message, fix))
    return found


def _place(case: Case, name: str) -> str:
    where = case.case_id if name == IMAGE else f"{case.case_id}/{name}"
    return f"{where} ({case.split})" if case.split else where
