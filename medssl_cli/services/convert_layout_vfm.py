"""The trees of VisionFM: pictures by modality, pictures with label files, pictures beside label maps.

Which of them lies there is told by what is in it: label files first, then folders of label maps, then folders that are
named as modalities.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from medssl_cli.core.case import Case
from medssl_cli.core.errors import DataError
from medssl_cli.core.run import contained, hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.images import VOLUME_SUFFIXES, is_image, volume_stem
from medssl_cli.data.label_lines import LabelLine, LabelLines, read_label_lines
from medssl_cli.data.labelled_cases import find_label_pictures, holds_labelled_pictures
from medssl_cli.data.manifest import (
    IMAGE,
    PATIENT_ALIASES,
    label_id_column,
    match_image_ids,
    read_table,
    split_of_folder,
)
from medssl_cli.data.modalities import find_modality, unknown_modality
from medssl_cli.data.npy import is_npy, open_npy
from medssl_cli.services.convert_layout_plan import (
    Fault,
    Placement,
    Plan,
    PlannedCase,
    flat_name,
    pictures_by_place,
    with_patients,
)

LABEL_FILES = (
    ("training_labels.txt", "train"),
    ("training_labels.csv", "train"),
    ("val_labels.txt", "val"),
    ("val_labels.csv", "val"),
    ("test_labels.txt", "test"),
    ("test_labels.csv", "test"),
)
"""Label files of a data set, and the part that each labels."""
GROUPS = "groups.csv"
"""Beside the label files: whose each picture is."""

_LINE_FIX = "correct the line; paths count from the folder of the label file"


def plan_vfm(root: Path, group_pattern: str | None) -> Plan:
    """Whichever tree of VisionFM lies in ``root``.

    Raises:
        DataError: None of them, label files that cannot be read, or label maps that fit several pictures.
    """
    datasets = [root] if _label_files(root) else [path for path in _folders(root) if _label_files(path)]
    if datasets:
        return _plan_labelled(root, datasets, group_pattern)
    if holds_labelled_pictures(root):
        return _plan_label_maps(root, group_pattern)
    if any(find_modality(path.name) for path in _folders(root)):
        return _plan_modalities(root, group_pattern)
    raise DataError(
        "This is no tree of VisionFM.",
        where=f"{hide_home(str(root))}: no training_labels.txt, no images beside labels, no folder of a modality",
        fix="name the folder of one task (TASK/DATASET/training_labels.txt), or the one above the modalities",
        code="source_unknown",
    )


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _label_files(folder: Path) -> dict[Path, str]:
    return {folder / name: part for name, part in LABEL_FILES if (folder / name).is_file()}


# --- pictures by modality --------------------------------------------------------------------------------------------


def _plan_modalities(root: Path, group_pattern: str | None) -> Plan:
    """``<Modality>/…`` under any of its names becomes ``<modality>/…``."""
    found, ignored = pictures_by_place(root, is_image)
    counts = Counter(place.parts[0] if len(place.parts) > 1 else "" for place in found)
    faults = [
        Fault(name, name, unknown_modality(name), "rename the folder, or take it away", "modality_unknown")
        for name in sorted(counts)
        if name and find_modality(name) is None
    ]
    cases, names = [], []
    for place in found:
        modality = find_modality(place.parts[0]) if len(place.parts) > 1 else None
        if modality is not None:
            target = "/".join((modality.name, *place.parts[1:]))
            cases.append(PlannedCase(target, (Placement(root / place, target),)))
            names.append(place.as_posix())
        elif len(place.parts) == 1:
            ignored.append(place.as_posix())
    modalities = sorted({case.case_id.partition("/")[0] for case in cases})
    return Plan(
        product=f"pictures of {', '.join(modalities)}",
        id_column="image",
        cases=with_patients(cases, names, group_pattern),
        faults=tuple(faults),
        ignored=tuple(ignored),
        next_steps=tuple(
            f"medssl pretrain --config visionfm_{name} --data OUT --out runs/{name}" for name in modalities
        ),
    )


# --- pictures with label files ---------------------------------------------------------------------------------------


@dataclass
class _Labelled:
    """What the label files of all data sets tell together."""

    root: Path
    several: bool
    faults: list[Fault] = field(default_factory=list)
    cases: list[PlannedCase] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    seen: dict[Path, tuple[str, int, LabelLine, str]] = field(default_factory=dict)

    def fault(self, lines: LabelLines, entry: LabelLine, reason: str, code: str = "label_lines") -> None:
        """A line that cannot be taken."""
        place = f"{lines.path.relative_to(self.root).as_posix()}, line {entry.line}"
        self.faults.append(Fault(f"{place}", place, f"{reason}: {entry.image[:120]}", _LINE_FIX, code))


def _plan_labelled(root: Path, datasets: Sequence[Path], group_pattern: str | None) -> Plan:
    read = [
        (folder, part, read_label_lines(path)) for folder in datasets for path, part in _label_files(folder).items()
    ]
    first = read[0][2]
    _refuse_other_tasks(root, [lines for _, _, lines in read])
    found = _Labelled(root, several=len(datasets) > 1)
    listed: set[Path] = set()
    for folder in datasets:
        groups = _groups(folder)
        for _, part, lines in (entry for entry in read if entry[0] == folder):
            for line in lines.entries:
                _add_line(found, folder, part, lines, line, groups)
    listed.update(found.seen)
    ignored = _unlisted(root, datasets, listed)
    columns = (
        *first.columns,
        *(("label_name",) if first.class_names else ()),
        *(("dataset",) if found.several else ()),
    )
    cases = with_patients(found.cases, found.places, group_pattern)
    has_parts = {case.part for case in cases} >= {"train", "val"}
    held = () if has_parts else ("there is no validation part: training holds a share of the patients back",)
    targets = ",".join(first.columns)
    return Plan(
        product=f"pictures with {_kind(first)}",
        id_column="image",
        cases=cases,
        faults=tuple(found.faults),
        columns=columns,
        notes=held,
        ignored=tuple(ignored),
        next_steps=(f"medssl train-head OUT --task {_task(read)} --target {targets} --model BACKBONE --out RUN",),
    )


def _refuse_other_tasks(root: Path, read: Sequence[LabelLines]) -> None:
    """Label files of one folder belong to one task.

    Raises:
        DataError: They have other numbers of labels, or other names.
    """
    first = read[0]
    odd = [x for x in read if (x.columns, x.class_names) != (first.columns, first.class_names)]
    if odd:
        told = [
            f"{lines.path.relative_to(root).as_posix()}: {counted(lines.width, 'label')}"
            + f", {', '.join(lines.class_names or lines.columns)[:80]}"
            for lines in (first, *odd)
        ]
        raise DataError(
            "The label files are of different tasks.",
            where=f"{hide_home(str(root))}: " + "\n".join(told),
            fix="convert each task by itself; all data sets below a task have the same labels in the same order",
            code="label_tasks",
        )


def _add_line(
    found: _Labelled, folder: Path, part: str, lines: LabelLines, entry: LabelLine, groups: Mapping[str, str]
) -> None:
    """One picture with its labels, or a fault."""
    try:
        path = _picture(found.root, folder, entry.image)
    except DataError as error:
        found.fault(lines, entry, f"{error.what[:-1]}, {error.where}", error.code)
        return
    if not path.is_file() or not is_image(path):
        found.fault(lines, entry, "no such picture" if not path.exists() else "no picture", "file_missing")
        return
    known = found.seen.get(path.resolve())
    if known is not None:
        before, line, same, where = known
        if before != part:
            found.fault(lines, entry, f"the picture is in {before} and {part}", "split_leak")
        elif same.values != entry.values:
            found.fault(lines, entry, f"the picture has another label in {where}, line {line}", "label_conflict")
        return
    class_name = _class_name(found, lines, entry)
    if class_name is None:
        return
    found.seen[path.resolve()] = (part, entry.line, entry, lines.path.name)
    relative = path.relative_to(folder)
    target = f"{part}/{flat_name(_below_split(found, folder, relative))}"
    patient = entry.patient_id or groups.get(relative.as_posix(), "")
    if patient and found.several:
        patient = f"{folder.name}/{patient}"
    cells = (*entry.values, *((class_name,) if lines.class_names else ()), *((folder.name,) if found.several else ()))
    found.cases.append(PlannedCase(target, (Placement(path, target),), part, patient, cells))
    found.places.append(path.relative_to(found.root).as_posix())


def _picture(root: Path, folder: Path, text: str) -> Path:
    """The file that a line names: from the folder of the label file, as an absolute path below the root, or from the
    working directory, as long as it lies below the root.

    Raises:
        DataError: It leaves the root.
    """
    for base in (folder, Path.cwd()):
        path = Path(text) if os.path.isabs(text) else Path(os.path.normpath(base / text))
        for top in (root, root.absolute(), root.resolve()):
            if path.is_relative_to(top) and "\0" not in text:
                inside = contained(root, path.relative_to(top), "path of a label line")
                if inside.is_file():
                    return inside
    return contained(folder, text, "path of a label line")


def _class_name(found: _Labelled, lines: LabelLines, entry: LabelLine) -> str | None:
    """Name of the class that the one value counts; empty where nothing names classes, None for a fault."""
    names = lines.class_names
    if not names:
        return ""
    text = entry.values[0]
    if text.isdecimal() and int(text) < len(names):
        return names[int(text)]
    found.fault(lines, entry, f"{text or 'nan'} is none of {len(names)} classes, which count from 0")
    return None


def _below_split(found: _Labelled, folder: Path, relative: Path) -> tuple[str, ...]:
    parts = relative.parts[1:] if len(relative.parts) > 1 and split_of_folder(relative.parts[0]) else relative.parts
    return (folder.name, *parts) if found.several else parts


def _groups(folder: Path) -> dict[str, str]:
    """Patient of each picture, as ``groups.csv`` tells; a path relative to the folder.

    Raises:
        DataError: The table has no column of groups.
    """
    if not (folder / GROUPS).is_file():
        return {}
    table = read_table(folder / GROUPS)
    image = label_id_column(table, of_images=True)
    others = [name for name in table.header if name != image]
    group = next((name for name in ("group", *PATIENT_ALIASES) if name in others), others[0] if others else "")
    if not group:
        where = f"{hide_home(str(folder / GROUPS))}: {', '.join(table.header)}"
        raise DataError("The table has no column of groups.", where=where, fix="image,group", code="column_missing")
    of_id = dict(zip(table.column(image), table.column(group), strict=True))
    known = [place.as_posix() for place in pictures_by_place(folder, is_image)[0]]
    return {name: of_id[given] for name, given in match_image_ids(folder, of_id, known).items()}


def _unlisted(root: Path, datasets: Sequence[Path], listed: set[Path]) -> list[str]:
    """Pictures without a label, relative to the root."""
    return [
        (folder / place).relative_to(root).as_posix()
        for folder in datasets
        for place in pictures_by_place(folder, is_image)[0]
        if (folder / place).resolve() not in listed
    ]


def _kind(lines: LabelLines) -> str:
    if lines.is_forecast:
        return "labels and intervals"
    return "one label each" if lines.width == 1 else f"{lines.width} labels each"


def _task(read: Sequence[tuple[Path, str, LabelLines]]) -> str:
    """The task of `medssl train-head` that fits the numbers."""
    values = {value for _, _, lines in read for entry in lines.entries for value in entry.values} - {""}
    whole = all(value.isdecimal() for value in values)
    if read[0][2].width == 1:
        return "regression" if not whole else "binary" if len(values) == 2 else "multiclass"
    return "multilabel" if values <= {"0", "1"} else "regression"


# --- pictures beside label maps --------------------------------------------------------------------------------------


def _plan_label_maps(root: Path, group_pattern: str | None) -> Plan:
    """``<dataset>/{training,test}/{images,labels}/`` becomes ``{train,test}/{images,labels}/`` of all data sets."""
    found = find_label_pictures(root, require=False)
    above = {case.case_id: _dataset(case) for case in found}
    several = len(set(above.values())) > 1
    unlabelled = {case.case_id for case in found if case.roi is None and _is_test_set(case, found)}
    faults = [*_orphans(root, found)]
    cases, names = [], []
    for case in found:
        reason = _label_fault(case) if case.roi is not None else "" if case.case_id in unlabelled else "no label map"
        if reason:
            fix = "add a label map of its name in labels/, with one class for every pixel, or take the picture away"
            faults.append(Fault(case.case_id, case.case_id, reason, fix, "label_missing"))
            continue
        cases.append(_labelled_picture(case, above[case.case_id] if several else ()))
        names.append(case.case_id)
    chosen = with_patients(cases, names, group_pattern)
    grouped = any(case.patient_id for case in chosen)
    keep = "--split-csv OUT/train.csv " if grouped and any(case.part == "train" for case in chosen) else ""
    return Plan(
        product="pictures with label maps",
        id_column="image",
        cases=chosen,
        faults=tuple(faults),
        next_steps=(f"medssl segment --task semantic --data OUT {keep}--model BACKBONE --out RUN",),
    )


def _dataset(case: Case) -> tuple[str, ...]:
    """Folders above the pictures, without those of the split and of the images."""
    folders = PurePosixPath(case.case_id).parent.parts
    kept = [name for name in folders if not split_of_folder(name)]
    return tuple(kept[:-1]) if kept and kept[-1].lower().startswith("im") else tuple(kept)


def _labelled_picture(case: Case, above: Sequence[str]) -> PlannedCase:
    image = case.sequences[IMAGE].path
    stem = flat_name((*above, image.stem))
    folder = f"{case.split}/" if case.split else ""
    target = f"{folder}images/{stem}{image.suffix}"
    placed = [Placement(image, target)]
    if case.roi is not None:
        placed.append(Placement(case.roi, f"{folder}labels/{stem}{_suffix(case.roi)}"))
    return PlannedCase(target, tuple(placed), case.split)


def _suffix(path: Path) -> str:
    return next((end for end in VOLUME_SUFFIXES if path.name.lower().endswith(end)), path.suffix)


def _is_test_set(case: Case, found: Sequence[Case]) -> bool:
    """Whether a picture is of a test folder of which no picture has a label map."""
    folder = case.sequences[IMAGE].path.parent
    return case.split == "test" and all(o.roi is None for o in found if o.sequences[IMAGE].path.parent == folder)


def _label_fault(case: Case) -> str:
    assert case.roi is not None
    try:
        if is_npy(case.roi) and open_npy(case.roi).ndim > 2:
            return "the array has a channel for each point: landmarks are not trained here"
    except DataError as error:
        return f"{error.what} {hide_home(error.where)}"
    return ""


def _orphans(root: Path, found: Sequence[Case]) -> Iterator[Fault]:
    """Label maps without a picture."""
    used = {case.roi for case in found if case.roi is not None}
    for folder in sorted({path.parent for path in used}):
        for path in sorted(folder.iterdir()):
            is_label = is_image(path) or volume_stem(path) is not None or path.suffix.lower() == ".gif"
            if is_label and path not in used and not path.name.startswith("."):
                place = path.relative_to(root).as_posix()
                yield Fault(
                    place, place, "the label map has no picture", "add its picture, or remove it", "partner_missing"
                )
