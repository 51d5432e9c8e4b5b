"""Cases with their label maps: case trees, nnU-Net, the Decathlon, and pictures beside a folder of labels.

A label map is found by where it lies and what its file is called, never by replacing a text in a path. Every case that
lacks one is named at once. Nothing but names and descriptions is read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from medssl_cli.core import case as core
from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import contained, hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.images import is_image, volume_stem
from medssl_cli.data.label_maps import LabelSpec, spec_of_names
from medssl_cli.data.layouts import (
    LayoutChoice,
    LayoutName,
    detect_layout,
    layout_labels,
    read_layout_cases,
    select_cases,
)
from medssl_cli.data.manifest import (
    IMAGE,
    case_ids,
    groups_by_pattern,
    match_image_ids,
    nearest_id,
    read_cases,
    read_ids,
    read_table,
    say_some,
    split_of_folder,
)

log = logging.getLogger(__name__)

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
LABEL_FOLDERS = (
    "labels",
    "label",
    "1st_manual",
    "manual1",
    "manual",
    "masks",
    "mask",
    "annotations",
    "ground_truth",
    "groundtruth",
    "gt",
    "segmentations",
)
"""Folders beside the images, the first that is there; ``mask`` comes late, for DRIVE keeps its field of view there."""
LABEL_SUFFIXES = (
    "",
    "_1stho",
    "_2ndho",
    "_mask",
    "_seg",
    "_segmentation",
    "_manual1",
    "_manual",
    "_label",
    "_labels",
    "_gt",
)
"""What the stem of a label map may add to that of its picture, in small letters."""

_DESCRIPTION = "dataset.json"
_PICTURE_SUFFIXES = ("_training", "_test")
"""What the stem of a picture of DRIVE has instead: ``21_training.tif`` goes with ``21_manual1.gif``."""
_SHOWN = 8

OnFault = Callable[[str, DataError], None]


# --- volumes ---------------------------------------------------------------------------------------------------------


def find_label_cases(
    root: Path,
    layout: LayoutChoice,
    sequences: tuple[str, ...],
    label: str,
    *,
    template: str = "",
    split_csv: Path | None = None,
    split: str = "",
    group_pattern: str | None = None,
    require: bool = True,
    on_fault: OnFault | None = None,
) -> list[Case]:
    """Cases of volumes whose ``roi`` is the file of their label map, sorted by id.

    Args:
        root: Folder of the data set.
        layout: Case tree, nnU-Net, Decathlon, mm-dinov2 or template; auto looks.
        sequences: Names in channel order.
        label: Stem of the label map in a case tree or template (``lesion``); nnU-Net and the Decathlon name it
            themselves, so it counts nothing there.
        template: Path of a sequence, for the layout ``template``.
        split_csv: Which cases; all if None.
        split: Written into each case; what the layout tells if empty.
        group_pattern: Regular expression that finds the patient in the id, see ``groups_by_pattern``.
        require: Every case needs its label map; test cases of nnU-Net and the Decathlon without one are left out and
            counted. Otherwise such cases come without ``roi``.
        on_fault: Called for a case that cannot be read or has no label map, which is then left out; without it all
            faults are raised together.

    Raises:
        DataError: No case; ``label_missing`` with the cases that lack a label map, or with the nearest stems where no
            case has one; all faults of ``read_cases`` and ``read_layout_cases``.
        ConfigError: A layout without label maps of volumes, or no stem where one is needed.
    """
    name = detect_layout(root, template) if layout == "auto" or template else layout
    if name in ("table", "images"):
        raise ConfigError(
            "Label maps of volumes are read from a tree of cases, nnU-Net, the Decathlon or a template.",
            where=f"{hide_home(str(root))}: layout {name}",
            fix="put each case into a folder with its images and its label map",
            code="label_layout",
        )
    if not label and name in ("cases", "template"):
        raise ConfigError(
            "The label map has no name.",
            where="--label",
            fix="e.g. --label lesion for lesion.nii.gz",
            code="label_name",
        )
    if name == "cases":
        cases = read_cases(root, sequences, split_csv=split_csv, roi=label, split=split, on_fault=on_fault)
    else:
        found = read_layout_cases(root, name, sequences, roi=label or "label", template=template, on_fault=on_fault)
        cases = found if split_csv is None else select_cases(found, split_csv)
        cases = [replace(case, split=split) for case in cases] if split else cases
    if group_pattern is not None:
        groups = groups_by_pattern([case.case_id for case in cases], group_pattern)
        cases = [replace(case, patient_id=groups[case.case_id]) for case in cases]
    return _with_labels(root, name, cases, label, on_fault) if require else cases


def _with_labels(root: Path, layout: LayoutName, cases: list[Case], label: str, on_fault: OnFault | None) -> list[Case]:
    """The cases that have a label map; those of a test set without labels are counted, all others are faults."""
    lacking = [case for case in cases if case.roi is None]
    if cases and len(lacking) == len(cases):
        raise _no_label_anywhere(root, layout, cases, label)
    unlabelled = [case for case in lacking if case.split == "test" and layout in ("nnunet", "decathlon")]
    if unlabelled:
        log.info(
            "%s without a label map: %s", counted(len(unlabelled), "test case"), say_some(c.case_id for c in unlabelled)
        )
    faults = [case for case in lacking if case not in unlabelled]
    if faults and on_fault is None:
        raise _lacking(faults, len(cases), label)
    for case in faults:
        if on_fault is not None:
            on_fault(case.case_id, _lacking([case], len(cases), label))
    return [case for case in cases if case.roi is not None]


def _lacking(faults: Sequence[Case], count: int, label: str) -> DataError:
    return DataError(
        "A case has no label map." if len(faults) == 1 else f"{len(faults)} of {count} cases have no label map.",
        where=say_some(case.case_id for case in faults) + (f": there is no {label!r}" if label else ""),
        fix="add them, or leave these cases out with --split-csv; an empty label map says that nothing is there",
        code="label_missing",
    )


def _no_label_anywhere(root: Path, layout: LayoutName, cases: Sequence[Case], label: str) -> DataError:
    if layout not in ("cases", "template"):
        where = f"{hide_home(str(root))}: {layout} keeps them in labelsTr"
        return DataError("No case has a label map.", where=where, fix="check the folder", code="label_missing")
    stems = label_stems(root, [case.case_id for case in cases])
    return DataError(
        f"No case has a label map {label!r}{nearest_id(label, stems)}.",
        where=f"{hide_home(str(root))}: there are {', '.join(stems[:_SHOWN]) or 'no volumes'}"
        + (f" and {len(stems) - _SHOWN} more" if len(stems) > _SHOWN else ""),
        fix="name the file of the label map without suffix with --label",
        code="label_missing",
    )


def label_stems(root: Path, ids: Sequence[str] | None = None, *, most: int = 50) -> list[str]:
    """Stems of the volumes of the first cases of a tree, the most frequent first: what ``--label`` could name."""
    counts: dict[str, int] = {}
    for name in (case_ids(root) if ids is None else ids)[:most]:
        if (root / name).is_dir():
            for path in (root / name).iterdir():
                stem = volume_stem(path)
                if stem is not None and not stem.startswith("."):
                    counts[stem] = counts.get(stem, 0) + 1
    return sorted(counts, key=lambda stem: (-counts[stem], stem))


def described_spec(root: Path) -> LabelSpec | None:
    """Classes that a ``dataset.json`` in ``root`` names; None where there is none, or it names no labels.

    Raises:
        DataError: A damaged description, or labels that cannot be trained; see ``spec_of_names``.
    """
    labels = layout_labels(root)
    if labels is None:
        return None
    try:
        return spec_of_names(labels)
    except DataError as error:
        where = f"{hide_home(str(root / _DESCRIPTION))}: {error.where}"
        raise DataError(error.what, where=where, fix=error.fix, code=error.code) from error


# --- pictures --------------------------------------------------------------------------------------------------------


def holds_labelled_pictures(root: Path) -> bool:
    """Whether there are pictures beside a folder of labels, or an nnU-Net data set of pictures, below ``root``."""
    return root.is_dir() and next(iter(_image_folders(root, "")), None) is not None


def find_label_pictures(
    root: Path,
    *,
    label: str = "",
    split_csv: Path | None = None,
    split: str = "",
    group_pattern: str | None = None,
    require: bool = True,
    on_fault: OnFault | None = None,
) -> list[Case]:
    """Pictures whose ``roi`` is the file of their label map, sorted by id, the path relative to ``root``.

    A folder ``images`` stands beside ``labels``, ``masks``, ``manual1`` or another of ``LABEL_FOLDERS``, at the root,
    below folders of data sets and splits, or itself divided by split. Picture and label map have one stem, to which the
    label map may add one of ``LABEL_SUFFIXES``. The raw folder of nnU-Net has pictures ``<case>_0000.png`` in imagesTr
    and ``<case>.png`` in labelsTr.

    Args:
        root: The data set.
        label: Folder of the labels, where several are there or it has another name.
        split_csv: Which pictures: paths or names; all if None. A column ``group`` tells patients.
        split: Written into each case; that of the folders if empty.
        group_pattern: Regular expression that finds the patient in the path, see ``groups_by_pattern``.
        require: Every picture needs its label map; those of a test folder without one are left out and counted.
        on_fault: Called for a picture without a label map, which is then left out; else all are raised together.

    Raises:
        DataError: No pictures with labels; ``label_missing``; two label maps for one picture; ids without a picture.
    """
    folders = list(_image_folders(root, label)) if root.is_dir() else []
    if not folders:
        raise _no_pictures(root, label)
    pairs: dict[str, tuple[Path, Path | None]] = {}
    for folder in folders:
        pairs.update(folder.pairs(root))
    groups: dict[str, str] = {}
    if split_csv is not None:
        chosen, groups = _selected(root, split_csv, pairs)
        pairs = {name: pairs[name] for name in chosen}
    if group_pattern is not None:
        groups = groups_by_pattern(list(pairs), group_pattern)
    cases = [
        Case(
            case_id=name,
            patient_id=groups.get(name) or name,
            sequences={IMAGE: core.Sequence(IMAGE, image)},
            roi=mask,
            split=split or _split_of(name),
        )
        for name, (image, mask) in sorted(pairs.items())
    ]
    return _with_label_pictures(root, folders, cases, on_fault) if require else cases


@dataclass(frozen=True)
class _ImageFolder:
    """Pictures and the folder of their labels; ``numbered`` names end in the channel number of nnU-Net."""

    images: Path
    labels: Path | None
    numbered: bool = False

    def pairs(self, root: Path) -> dict[str, tuple[Path, Path | None]]:
        """{path relative to the root: (picture, its label map)}."""
        below: dict[PurePosixPath, dict[str, list[Path]]] = {}
        for path in _files(self.labels) if self.labels is not None else ():
            if is_image(path) or volume_stem(path) is not None or path.suffix.lower() == ".gif":
                where = PurePosixPath(path.parent.relative_to(self.labels or root).as_posix())
                below.setdefault(where, {}).setdefault(_stem(path).lower(), []).append(path)
        found = {}
        stems: dict[tuple[PurePosixPath, str], Path] = {}
        for path in _files(self.images):
            if not is_image(path):
                continue
            relative = path.relative_to(root)
            where, stem = PurePosixPath(path.parent.relative_to(self.images).as_posix()), _stem(path)
            if self.numbered:
                stem, _, number = stem.rpartition("_")
                if number != "0000":
                    raise _channels(path)
            if stems.setdefault((where, stem.lower()), path) is not path:
                raise _twice("Two pictures have one name.", [stems[where, stem.lower()], path])
            contained(root, relative, "picture")
            mask = _only(path, _candidates(stem.lower(), below.get(where, {})))
            if mask is not None:
                contained(root, mask.relative_to(root), "label map")
            found[relative.as_posix()] = (path, mask)
        return found


def _candidates(stem: str, by_stem: Mapping[str, list[Path]]) -> list[Path]:
    """Label maps that a picture could have; ``stem`` in small letters."""
    bases = [stem, *(stem.removesuffix(end) for end in _PICTURE_SUFFIXES if stem.endswith(end))]
    return [path for base in bases for end in LABEL_SUFFIXES for path in by_stem.get(base + end, ())]


def _image_folders(root: Path, label: str) -> Iterator[_ImageFolder]:
    """Folders of pictures that have labels beside them, sorted; what lies in one is not looked at again."""
    if (root / _DESCRIPTION).is_file() and (root / "imagesTr").is_dir():
        if any(is_image(path) for path in _files(root / "imagesTr")):
            for part in ("Tr", "Ts"):
                if (root / f"images{part}").is_dir():
                    beside = root / f"labels{part}"
                    yield _ImageFolder(root / f"images{part}", beside if beside.is_dir() else None, numbered=True)
        return
    with_labels: list[_ImageFolder] = []
    without: list[_ImageFolder] = []
    for place, folders, _ in os.walk(root):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = {name.lower(): name for name in reversed(folders)}
        images = next((names[name] for name in IMAGE_FOLDERS if name in names), None)
        if images is None:
            continue
        labels = _label_folder(here, names, label)
        folders[:] = [name for name in folders if name not in (images, *([labels] if labels else []))]
        found = _ImageFolder(here / images, None if labels is None else here / labels)
        (with_labels if labels else without).append(found)
    if with_labels:  # a test set may come without labels, a data set may not
        yield from sorted([*with_labels, *without], key=lambda found: found.images.as_posix())


def _label_folder(here: Path, names: Mapping[str, str], label: str) -> str | None:
    """The folder of labels among those beside the pictures."""
    if label:
        return names.get(label.lower())
    known = [names[name] for name in LABEL_FOLDERS if name in names]
    if len(known) > 1:
        log.info("%s: labels are taken from %s, not from %s", hide_home(str(here)), known[0], ", ".join(known[1:]))
    return known[0] if known else None


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, sorted; hidden ones are left out."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here) / name for name in sorted(files) if not name.startswith("."))


def _stem(path: Path) -> str:
    """The file name without its one suffix: ``a.b.png`` is ``a.b``."""
    return volume_stem(path) or path.stem


def _only(picture: Path, masks: Sequence[Path]) -> Path | None:
    """The label map of a picture; one whose stem is equal comes first.

    Raises:
        DataError: Several could be meant.
    """
    exact = [path for path in masks if _stem(path) == _stem(picture)]
    best = exact or list(masks)
    if len(best) > 1:
        raise _twice(f"Several label maps could belong to {picture.name}.", best)
    return best[0] if best else None


def _twice(what: str, paths: Sequence[Path]) -> DataError:
    where = "\n".join(hide_home(str(path)) for path in paths)
    return DataError(what, where=where, fix="keep one of them in this folder", code="label_ambiguous")


def _channels(path: Path) -> DataError:
    return DataError(
        "Pictures of several files are not read.",
        where=hide_home(str(path)),
        fix="pictures of nnU-Net have one file a case, <case>_0000.png, with one or three channels",
        code="layout_files",
    )


def _split_of(name: str) -> str:
    """train, val or test by the folders of a path, the innermost first; empty where none tells it."""
    parts = [part.lower() for part in PurePosixPath(name).parent.parts]
    named = {"imagestr": "train", "imagests": "test"}
    return next((found for part in reversed(parts) if (found := named.get(part) or split_of_folder(part))), "")


def _selected(root: Path, split_csv: Path, pairs: Mapping[str, object]) -> tuple[list[str], dict[str, str]]:
    """(paths that a list names, patient of each where it tells); label maps that stand in the list are passed over."""
    ids = read_ids(split_csv)
    matched = match_image_ids(root, dict.fromkeys(ids.ids, ""), list(pairs))
    unknown = sorted(set(ids.ids) - set(matched.values()))
    unknown = [name for name in unknown if not _is_label_file(root, name)]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(ids.ids)} pictures are missing.",
            where=f"{hide_home(str(split_csv))}: "
            + ", ".join(f"{name!r}{nearest_id(name, list(pairs))}" for name in unknown[:_SHOWN]),
            fix=f"ids are paths relative to {hide_home(str(root))}, or names of pictures",
            code="id_unknown",
        )
    groups: dict[str, str] = {}
    if ids.column:
        table = read_table(split_csv)
        if "group" in table.header:
            of_id = dict(zip(table.column(ids.column), table.column("group"), strict=True))
            groups = {name: of_id[given] for name, given in matched.items()}
    return sorted(matched), groups


def _is_label_file(root: Path, name: str) -> bool:
    """Whether an id names a file in a folder of labels: a split of the whole tree lists these, too."""
    parts = {part.lower() for part in PurePosixPath(name.replace("\\", "/")).parent.parts}
    return (
        bool(parts & {*LABEL_FOLDERS, "labelstr", "labelsts", "manual2", "2nd_manual"})
        and contained(root, name, "picture").is_file()
    )


def _with_label_pictures(
    root: Path, folders: Sequence[_ImageFolder], cases: list[Case], on_fault: OnFault | None
) -> list[Case]:
    lacking = [case for case in cases if case.roi is None]
    unlabelled = {place.images for place in folders if place.labels is None}
    known = [case for case in lacking if unlabelled & {*next(iter(case.sequences.values())).path.parents}]
    if known:
        log.info(
            "%s without a folder of labels: %s", counted(len(known), "picture"), say_some(c.case_id for c in known)
        )
    faults = [case for case in lacking if case not in known]
    if faults and (on_fault is None or len(lacking) == len(cases)):
        raise _lacking(faults, len(cases), "")
    if len(known) == len(cases):
        raise _no_pictures(root, "")
    for case in faults:
        if on_fault is not None:
            on_fault(case.case_id, _lacking([case], len(cases), ""))
    return [case for case in cases if case.roi is not None]


def _no_pictures(root: Path, label: str) -> DataError:
    if not root.is_dir():
        detail = "it does not exist"
    elif label:
        detail = f"no folder {label!r} beside a folder of images"
    else:
        detail = f"no folder images beside one of {', '.join(LABEL_FOLDERS[:6])}"
    return DataError(
        "There are no pictures with label maps.",
        where=f"{hide_home(str(root))}: {detail}",
        fix="put them into images/ and labels/, a label map having the name of its picture, or name it with --label",
        code="label_missing",
    )
