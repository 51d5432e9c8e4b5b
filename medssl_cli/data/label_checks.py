"""Checks of label maps: is there one, does it lie on its image, and do its values mean what they should.

A label map on another grid is brought to the image by the nearest voxel in training, so that is worth a warning only;
one that lies somewhere else, or holds anything but whole numbers, is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import Volume, grid_difference
from medssl_cli.core.wording import counted
from medssl_cli.data.checks import CheckedCase, Finding, header_findings
from medssl_cli.data.images import check_finite, read_header, read_volume
from medssl_cli.data.label_maps import (
    LabelSpec,
    label_4d,
    read_label_picture,
    size_difference,
    spec_of_values,
    whole_values,
)
from medssl_cli.data.resample import coverage, resample_to

_LOW_COVERAGE = 0.5
_NAME_THEM = "name what its values mean, e.g. --classes lesion=1+2,ignore=255, or correct the file"


@dataclass(frozen=True)
class LabelRules:
    """What is asked of the label map of a case.

    Args:
        path: The file; None if there is none.
        stem: What it would be called, for messages.
        min_pixels: A structure whose largest slice has fewer pixels is too small to be meant.
        optional: The case belongs to a test set, which may come without labels.
    """

    path: Path | None = None
    stem: str = ""
    min_pixels: int = 1
    optional: bool = False


def check_label_map(checked: CheckedCase, rules: LabelRules, folder: Path) -> None:
    """Look at the label map of a case whose images are checked; what is found goes into ``checked``.

    Args:
        checked: With its readable volumes or picture.
        rules: What is asked of the label map.
        folder: Where it was looked for.
    """
    case_id, path = checked.case.case_id, rules.path
    if path is None:
        name = f" {rules.stem}" if rules.stem else ""
        message, where = f"There is no label map{name}.", str(folder)
        fix = "add it, or leave the case out; an empty label map says that nothing is there"
        missing = Finding("error", "label_missing", case_id, where, message, fix)
        unlabelled = Finding("info", "label_absent", case_id, where, message)
        checked.findings.append(unlabelled if rules.optional else missing)
        return
    try:
        values = _check_picture(checked, path) if checked.pictures else _check_volume(checked, path)
    except DataError as error:
        checked.findings.append(Finding.of(error, case_id, path))
        return
    counts = np.bincount(values.ravel(), minlength=256)
    checked.label_voxels = {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    checked.findings += _extent_findings(case_id, path, values, rules.min_pixels)


def _check_picture(checked: CheckedCase, path: Path) -> np.ndarray:
    values_HW = read_label_picture(path)
    picture = next(iter(checked.pictures.values()))
    if picture.shape[1:] != values_HW.shape:
        raise size_difference(path, picture.shape[1:], values_HW.shape)
    checked.labels_HW = values_HW
    return values_HW


def _check_volume(checked: CheckedCase, path: Path) -> np.ndarray:
    """Values of the label map as stored; its copy on the grid of the first image becomes ``checked.roi``."""
    header = read_header(path)
    checked.findings += [f for f in header_findings(header, checked.case.case_id) if f.code != "dtype"]
    if len(header.shape) != 3:
        raise label_4d(path)
    volume = read_volume(path)
    check_finite(path, volume.array)
    values = whole_values(volume.array, str(path))
    for name, image in list(checked.volumes.items())[:1]:
        checked.roi = _on_image(checked, path, Volume(values, volume.affine), name, image)
    return values


def _on_image(checked: CheckedCase, path: Path, label: Volume, name: str, image: Volume) -> Volume:
    difference = grid_difference(image.shape, image.affine, label.shape, label.affine)
    if difference is None:
        return label

    def warn(code: str, message: str, fix: str) -> None:
        checked.findings.append(Finding("warning", code, checked.case.case_id, str(path), message, fix))

    if coverage(label, image) == 0 and coverage(image, label) == 0:
        raise DataError(
            f"The label map does not overlap with {name}.",
            where=f"{path}: {difference}",
            fix="check that both belong to one patient and visit, and that no header was lost on the way",
            code="grids_apart",
        )
    warn(
        "label_grid",
        f"The label map lies on another grid than {name}: {difference}. Training takes the nearest voxel.",
        f"if that is not meant, draw it on {name}, or: medssl convert align ROOT OUT --reference {name}",
    )
    share = coverage(label, image)
    if share < _LOW_COVERAGE:
        message = f"The label map covers {100 * share:.0f} % of {name}; the rest counts as background."
        warn("label_coverage", message, "extend it to the whole image")
    moved = resample_to(label, image, nearest=True)
    lost = sorted(set(np.unique(label.array).tolist()) - set(np.unique(moved.array).tolist()))
    if lost:
        message = f"On the grid of {name} nothing is left of the value {', '.join(map(str, lost))}."
        warn("label_lost", message, "keep the image as fine as the label map")
    return moved


def _extent_findings(case_id: str, path: Path, values: np.ndarray, min_pixels: int) -> list[Finding]:
    filled = np.count_nonzero(values, axis=(-2, -1))
    if not filled.any():
        fix = "fine where nothing is to be seen; draw it otherwise"
        return [Finding("warning", "label_empty", case_id, str(path), "The label map holds no structure.", fix)]
    if (values != 0).all():
        fix = "check that the file is a label map, and that 0 is background"
        return [Finding("warning", "label_full", case_id, str(path), "The label map holds no background.", fix)]
    largest = int(filled.max())
    if largest < min_pixels:
        message = f"The largest slice of the label map has {counted(largest, 'pixel')}, {min_pixels} are asked for."
        return [Finding("warning", "label_small", case_id, str(path), message, "draw it again, or drop the case")]
    return []


# --- all cases together ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundLabels:
    """The label map of one case: its file, and voxels by value."""

    case_id: str
    path: Path
    voxels: Mapping[int, int]


def class_findings(
    found: Sequence[FoundLabels], described: LabelSpec | None, names: Sequence[str], source: Path, label: str = ""
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """What only the values of all label maps together show, and the classes with their cases and voxels.

    Args:
        found: Readable label maps.
        described: Classes of a dataset.json.
        names: Classes that the user names; they win.
        source: The data set, for findings that belong to no case.
        label: Stem of the label maps, after which a single structure is called.
    """
    if not found:
        return [], []
    values = {value for labels in found for value in labels.voxels}
    if described is not None and not names:
        spec = described
    else:
        try:
            spec = spec_of_values(_known(values, found, names), names, label=label)
        except DataError as error:
            return [Finding.of(error, "", source)], []
    findings = _unknown_values(found, spec)
    classes = _classes(found, spec)
    for entry in classes[1:]:
        if not entry["n_cases"]:
            message = f"No label map holds {entry['name']} ({entry['values']})."
            findings.append(
                Finding("warning", "class_absent", "", str(source), message, "check the classes, or add cases")
            )
    return findings, classes


def _known(values: set[int], found: Sequence[FoundLabels], names: Sequence[str]) -> set[int]:
    """Values by which classes are told: with names only those that fit them, so that others count case by case."""
    if not names:
        return values
    if any("=" in name for name in names):
        return set()
    structures = values - {0}
    fitting = set(range(1, len(names) + 1))
    return structures if structures == {255} and len(names) == 1 else structures & fitting


def _unknown_values(found: Sequence[FoundLabels], spec: LabelSpec) -> list[Finding]:
    known = {*spec.values, *spec.ignore_values}
    findings = []
    for labels in found:
        unknown = {value: n for value, n in labels.voxels.items() if value not in known}
        if unknown:
            shown = ", ".join(f"{value} ({counted(n, 'voxel')})" for value, n in list(unknown.items())[:8])
            message = f"The label map holds values of no class: {shown}; known are {spec.describe()}."
            findings.append(Finding("error", "label_values", labels.case_id, str(labels.path), message, _NAME_THEM))
    return findings


def _classes(found: Sequence[FoundLabels], spec: LabelSpec) -> list[dict[str, Any]]:
    """Name, values, cases and voxels of each class."""
    cases: Counter[int] = Counter()
    voxels: Counter[int] = Counter()
    for labels in found:
        present = {spec.values[value] for value in labels.voxels if value in spec.values}
        cases.update(present)
        for value, n in labels.voxels.items():
            if value in spec.values:
                voxels[spec.values[value]] += n
    of_class: dict[int, list[int]] = {}
    for value, index in spec.values.items():
        of_class.setdefault(index, []).append(value)
    return [
        {
            "name": name,
            "values": "+".join(map(str, sorted(of_class[index]))),
            "n_cases": cases[index],
            "n_voxels": voxels[index],
        }
        for index, name in enumerate(spec.classes)
    ]
