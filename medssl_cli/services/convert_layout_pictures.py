"""PCLT20K as a CT-PET tree, and class folders as ImageNet has them as pictures with a table of labels."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path, PurePosixPath

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home
from medssl_cli.data.ct_pet import MARKER, PARTNER_FIX, PCLT_FIX, FoundSlice, scan_ct_pet
from medssl_cli.data.images import is_image
from medssl_cli.data.manifest import split_of_folder
from medssl_cli.services.convert_layout_plan import (
    Fault,
    Placement,
    Plan,
    PlannedCase,
    pictures_by_place,
    with_patients,
)

_FOLDERS = {"CT": "CT", "PET": "PET", "mask": "masks"}
_CLASS_FIX = "sort the pictures into one folder for each class: [train|val|test]/CLASS/x.png"


# --- PCLT20K ---------------------------------------------------------------------------------------------------------


def plan_pclt20k(root: Path, group_pattern: str | None = None) -> Plan:
    """``[<split>/]<PPPP>/<PPPP>_<SSS>_CT.png`` becomes ``[<split>/]CT/patient_<PPPP>_slice_<SSS>.png``, and so on.

    Args:
        root: The data set.
        group_pattern: None: the folders are the patients.

    Raises:
        DataError: No such layout, or a folder that leads out of it.
    """
    scan = scan_ct_pet(root, dataset_type="pclt20k")
    faults = [
        Fault(
            path.parent.name,
            path.relative_to(root).as_posix(),
            "the name does not tell what it is",
            PCLT_FIX,
            "pclt_name",
        )
        for path in scan.strangers
    ]
    cases = []
    for found in scan.slices:
        fault = _slice_fault(root, found)
        if fault is None:
            cases.append(_slice(found))
        else:
            faults.append(fault)
    flat = all(case.part == "" for case in cases)
    split = "medssl split OUT --out SPLIT" if flat else "medssl check-data OUT --task ct-pet"
    return Plan(
        product="CT-PET tree",
        id_column="",
        cases=tuple(cases),
        faults=tuple(faults),
        next_steps=(split, "medssl segment --task ct-pet --config cocoseg --data OUT --out RUN"),
        follows_links=True,
    )


def _slice_fault(root: Path, found: FoundSlice) -> Fault | None:
    missing = [found.places[kind].relative_to(root).as_posix() for kind in found.missing]
    if missing:
        there = " and ".join(kind for kind in _FOLDERS if kind in found.there)
        return Fault(_name(found), ", ".join(missing), f"missing (there is {there})", PARTNER_FIX, "partner_missing")
    if MARKER in _number(found):
        place = found.places["CT"].relative_to(root).as_posix()
        return Fault(_name(found), place, f"{MARKER!r} in the number of the slice", PCLT_FIX, "pclt_name")
    return None


def _slice(found: FoundSlice) -> PlannedCase:
    part = "" if found.part == "all" else found.part
    name = _name(found)
    above = f"{part}/" if part else ""
    placed = [Placement(path, f"{above}{_FOLDERS[kind]}/{name}") for kind, path in found.places.items()]
    return PlannedCase(f"{above}{name}", tuple(placed), part, found.folder)


def _name(found: FoundSlice) -> str:
    return f"patient_{found.folder}{MARKER}{_number(found)}{PurePosixPath(found.name).suffix}"


def _number(found: FoundSlice) -> str:
    return PurePosixPath(found.name).stem.removeprefix(f"{found.folder}_")


# --- ImageNet --------------------------------------------------------------------------------------------------------


def plan_imagenet(root: Path, group_pattern: str | None) -> Plan:
    """Class folders, below folders of a split or not, keep their places; the folders of the split get our names.

    Raises:
        DataError: No picture, or a group pattern that misses one.
    """
    found, ignored = pictures_by_place(root, is_image)
    if not found:
        where = f"{hide_home(str(root))}: no PNG, JPEG, TIFF, BMP or NumPy file below it"
        raise DataError("There are no pictures.", where=where, fix="check the path", code="source_unknown")
    is_split = any(len(place.parts) > 1 and split_of_folder(place.parts[0]) for place in found)
    faults: list[Fault] = []
    cases, names = [], []
    for place in found:
        case = _classified(root, place, is_split=is_split)
        if isinstance(case, Fault):
            faults.append(case)
        else:
            cases.append(case)
            names.append(place.as_posix())
    classes = sorted({case.cells[0] for case in cases})
    task = "binary" if len(classes) == 2 else "multiclass"
    split = "medssl split OUT --labels OUT/labels.csv --stratify label --out SPLIT"
    train = f"medssl train-head OUT --task {task} --target label --model BACKBONE --out RUN"
    return Plan(
        product=f"pictures of {len(classes)} classes",
        id_column="image",
        cases=with_patients(cases, names, group_pattern),
        faults=tuple(faults),
        columns=("label",),
        notes=_class_notes(cases, classes),
        ignored=tuple(ignored),
        next_steps=(train,) if is_split else (split, train),
    )


def _classified(root: Path, place: PurePosixPath, *, is_split: bool) -> PlannedCase | Fault:
    part = split_of_folder(place.parts[0]) if is_split else ""
    below = place.parts[1:] if is_split else place.parts
    if len(below) < 2 or (is_split and not part):
        where = "in no folder of the split" if is_split and not part else "in no class folder"
        return Fault(place.as_posix(), place.as_posix(), f"the picture lies {where}", _CLASS_FIX, "class_missing")
    target = "/".join((part, *below) if part else below)
    return PlannedCase(target, (Placement(root / place, target),), part, cells=(below[0],))


def _class_notes(cases: list[PlannedCase], classes: list[str]) -> tuple[str, ...]:
    """Classes that a part lacks: a head never learns, or never meets them."""
    held: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        held[case.part].add(case.cells[0])
    return tuple(
        f"{part} has no picture of {', '.join(lacking[:8])}{' and more' if len(lacking) > 8 else ''}"
        for part, some in held.items()
        if (lacking := [name for name in classes if name not in some])
    )
