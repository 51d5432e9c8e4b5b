"""nnU-Net and the Medical Segmentation Decathlon as a tree of cases, or, of pictures, as pictures beside label maps.

Files are taken as they are; only a 4-D image is cut into its channels. The names of the classes go into a
``dataset.json``, where `segment`, `eval` and `check-data` look for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl_cli.core.case import Case
from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home
from medssl_cli.data.images import IMAGE_SUFFIXES, VOLUME_SUFFIXES, read_header
from medssl_cli.data.label_maps import IGNORE, spec_of_names
from medssl_cli.data.layouts import layout_channels, layout_labels, read_layout_cases
from medssl_cli.data.manifest import read_owners, say_some
from medssl_cli.services.convert_layout_plan import Fault, Placement, Plan, PlannedCase, with_patients

DESCRIPTION = "dataset.json"
LABEL = "label"
"""Stem of the label map in the folder of a case."""

_FOLDS = "splits_final.json"
_NUMBERED = re.compile(r"(?P<id>.+)_(?P<channel>\d{4})")
_SPLITS = (("Tr", "train"), ("Ts", "test"))
_NAME_FIX = "name it <case>_0000, the number being that of its channel; files without numbers are --source decathlon"


def plan_nnunet(root: Path, group_pattern: str | None) -> Plan:
    """The raw data of nnU-Net 1 or 2: volumes become a tree of cases, pictures go beside their label maps.

    Raises:
        DataError: A damaged description, no images, or a group pattern that misses a case.
    """
    channels = layout_channels(root, "nnunet")
    ending = str(_description(root).get("file_ending", ".nii.gz"))
    is_volume = ending in VOLUME_SUFFIXES
    if not is_volume and ending.lower() not in IMAGE_SUFFIXES:
        detail = f"file_ending {ending!r}; there are readers for {', '.join((*VOLUME_SUFFIXES, *IMAGE_SUFFIXES))}"
        raise _fault(root, "Files of this kind are not read.", detail, "convert them to .nii.gz or .png first")
    if not (root / "imagesTr").is_dir():
        raise _fault(root, "There are no training images.", "no folder imagesTr", "name the raw folder of one data set")
    faults: list[Fault] = []
    cases: list[PlannedCase] = []
    for suffix, part in _SPLITS:
        found = _numbered_files(root / f"images{suffix}", ending, root, faults)
        labels = dict(_files(root / f"labels{suffix}", ending))
        wanted = tuple(range(len(channels))) if is_volume else (0,)
        for case_id, files in sorted(found.items()):
            label = labels.pop(case_id, None)
            reasons = _incomplete(files, wanted, label is None and part == "train")
            if reasons:
                faults.append(_missing(case_id, files, reasons, is_volume=is_volume))
            elif is_volume:
                cases.append(_volumes(case_id, [files[number] for number in wanted], channels, label, part, ending))
            else:
                cases.append(_picture(case_id, files[0], label, part, ending))
        faults += [_without_image(root, case_id, path) for case_id, path in sorted(labels.items())]
    if is_volume:
        cases = _three_axes(root, cases, faults)
    names = [_stem_of(case, ending) for case in cases]
    owners = read_owners(root)
    owned = [
        PlannedCase(c.case_id, c.files, c.part, owners[n].patient_id if n in owners else "")
        for c, n in zip(cases, names, strict=True)
    ]
    chosen = with_patients(owned, names, group_pattern)
    of_name = {name: case.case_id for name, case in zip(names, chosen, strict=True)}
    left_out = {fault.case_id for fault in faults}
    return _plan(root, channels, chosen, faults, is_volume=is_volume, folds=_folds(root, of_name, left_out))


def plan_decathlon(root: Path, group_pattern: str | None) -> Plan:
    """A task of the Decathlon: 4-D images are cut into their channels, everything else stays as it is.

    Raises:
        DataError: A damaged description, paths that leave the folder, no case, a group pattern that misses a case.
    """
    channels = layout_channels(root, "decathlon")
    faults: list[Fault] = []
    cases = []
    for case in read_layout_cases(root, "decathlon", channels, roi=LABEL):
        fault = _decathlon_fault(root, case, channels)
        if fault is None:
            cases.append(_of_decathlon(case, channels))
        else:
            faults.append(fault)
    chosen = with_patients(cases, [case.case_id for case in cases], group_pattern)
    return _plan(root, channels, chosen, faults, is_volume=True, folds=())


def _plan(
    root: Path,
    channels: Sequence[str],
    cases: Sequence[PlannedCase],
    faults: Sequence[Fault],
    *,
    is_volume: bool,
    folds: tuple[Mapping[str, Sequence[str]], ...],
) -> Plan:
    labels, notes = class_values(root)
    document: dict[str, Any] = {"name": str(_description(root).get("name") or root.name)}
    if is_volume:
        document["channel_names"] = {str(number): name for number, name in enumerate(channels)}
    if labels:
        document["labels"] = labels
    n_images = len(channels) if is_volume else 1
    has_tests = any(case.part == "test" and len(case.files) == n_images for case in cases)
    return Plan(
        product="tree of cases with label maps" if is_volume else "pictures with label maps",
        id_column="case_id" if is_volume else "image",
        cases=tuple(cases),
        faults=tuple(faults),
        documents={DESCRIPTION: document},
        folds=folds,
        notes=notes,
        next_steps=_next_steps(channels, is_volume=is_volume, has_tests=has_tests, has_folds=bool(folds)),
    )


def _next_steps(channels: Sequence[str], *, is_volume: bool, has_tests: bool, has_folds: bool) -> tuple[str, ...]:
    """How training reads the result; a test set without label maps is kept out by the list of training cases."""
    lists = "--splits OUT/folds/fold_0 " if has_folds else "--split-csv OUT/train.csv " if has_tests else ""
    if not is_volume:
        return (f"medssl segment --task semantic --data OUT {lists}--out RUN",)
    named = f"data.label={LABEL} data.mri_sequences={','.join(channels)}"
    return (f"medssl segment --task semantic --data OUT {lists}--out RUN {named}",)


# --- descriptions ----------------------------------------------------------------------------------------------------


def class_values(root: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """({class: value in the label maps}, notes) as the ``dataset.json`` of the source tells.

    Regions, which are lists of values that overlap, become single values: each is called as the entry that holds it
    alone, else ``class_<value>``.

    Raises:
        DataError: Labels that cannot be read.
    """
    labels = layout_labels(root)
    if not labels:
        return {}, ("dataset.json names no classes: training finds them in the label maps",)
    notes: tuple[str, ...] = ()
    if any(isinstance(value, (list, tuple)) for value in labels.values()):
        labels, notes = _without_regions(root, labels)
    try:
        spec = spec_of_names(labels)
    except DataError as error:
        where = f"{hide_home(str(root / DESCRIPTION))}: {error.where}"
        raise DataError(error.what, where=where, fix=error.fix, code=error.code) from error
    values = {spec.classes[index]: value for value, index in sorted(spec.values.items())}
    values.update((IGNORE, value) for value in spec.ignore_values)
    return values, notes


def _without_regions(root: Path, labels: Mapping[str, Any]) -> tuple[dict[str, int], tuple[str, ...]]:
    single: dict[int, str] = {}
    every: set[int] = set()
    for name, entry in labels.items():
        values = entry if isinstance(entry, (list, tuple)) else [entry]
        try:
            numbers = [int(value) for value in values]
        except (TypeError, ValueError) as error:
            detail = f"labels: {name!r}: {entry!r}"[:200]
            raise _fault(root, "The classes of the data set cannot be read.", detail, "values are numbers") from error
        every.update(numbers)
        if len(numbers) == 1:
            single.setdefault(numbers[0], str(name))
    regions = [str(name) for name, entry in labels.items() if isinstance(entry, (list, tuple)) and len(entry) > 1]
    note = f"regions are kept as the values that they consist of, not as regions: {say_some(regions)}"
    return {single.get(value, f"class_{value}" if value else "background"): value for value in sorted(every)}, (note,)


def _description(root: Path) -> dict[str, Any]:
    """``dataset.json``, which ``layout_channels`` has found sound."""
    found = json.loads((root / DESCRIPTION).read_text(encoding="utf-8-sig"))
    assert isinstance(found, dict)
    return found


def _folds(root: Path, of_name: Mapping[str, str], left_out: set[str]) -> tuple[Mapping[str, Sequence[str]], ...]:
    """Folds of nnU-Net, where the folder has them.

    Raises:
        DataError: A damaged list, or names without a case.
    """
    path = root / _FOLDS
    if not path.is_file():
        return ()
    try:
        folds = json.loads(path.read_text(encoding="utf-8-sig"))
        named = [{part: [str(name) for name in fold[part]] for part in ("train", "val")} for fold in folds]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"{_FOLDS}: {type(error).__name__}: {str(error)[:150]}"
        raise _fault(root, "The list of folds is damaged.", detail, "mend it, or take it away") from error
    unknown = {name for fold in named for part in fold.values() for name in part} - set(of_name) - left_out
    if unknown:
        detail = f"{_FOLDS}: {say_some(sorted(unknown))}"
        raise _fault(root, "Folds name cases that are not there.", detail, "take the list of this very data set")
    return tuple(
        {part: [of_name[name] for name in names if name in of_name] for part, names in fold.items()} for fold in named
    )


def _fault(root: Path, what: str, detail: str, fix: str) -> DataError:
    return DataError(what, where=f"{hide_home(str(root))}: {detail}", fix=fix, code="layout_files")


# --- nnU-Net ---------------------------------------------------------------------------------------------------------


def _files(folder: Path, ending: str) -> Iterable[tuple[str, Path]]:
    """(name without the ending, path) of the files of a folder, sorted."""
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(p.name[: -len(ending)], p) for p in names if p.name.endswith(ending) and not p.name.startswith(".")]


def _numbered_files(folder: Path, ending: str, root: Path, faults: list[Fault]) -> dict[str, dict[int, Path]]:
    """Files by case and channel."""
    found: dict[str, dict[int, Path]] = {}
    for stem, path in _files(folder, ending):
        match = _NUMBERED.fullmatch(stem)
        if match is None:
            place = path.relative_to(root).as_posix()
            faults.append(Fault(stem, place, "the file has no channel number", _NAME_FIX, "layout_files"))
        else:
            found.setdefault(match["id"], {})[int(match["channel"])] = path
    return found


def _incomplete(files: Mapping[int, Path], wanted: Sequence[int], lacks_label: bool) -> list[str]:
    reasons = [f"channel {number:04d} is missing" for number in wanted if number not in files]
    extra = sorted(set(files) - set(wanted))
    reasons += [f"channel {number:04d} is one too many" for number in extra]
    return [*reasons, *(["there is no label map"] if lacks_label else [])]


def _missing(case_id: str, files: Mapping[int, Path], reasons: list[str], *, is_volume: bool) -> Fault:
    place = next(iter(files.values())).parent.name
    fix = "each case needs every channel of dataset.json, and a label map in labelsTr"
    if not is_volume and any("too many" in reason for reason in reasons):
        fix = "a picture is one file <case>_0000 with one or three channels: join its channels first"
    code = "label_missing" if reasons == ["there is no label map"] else "partner_missing"
    return Fault(case_id, f"{place}/{case_id}", ", ".join(reasons), fix, code)


def _without_image(root: Path, case_id: str, path: Path) -> Fault:
    place = path.relative_to(root).as_posix()
    return Fault(case_id, place, "the label map has no image", "add its image, or remove it", "partner_missing")


def _volumes(
    case_id: str, files: Sequence[Path], channels: Sequence[str], label: Path | None, part: str, ending: str
) -> PlannedCase:
    placed = [Placement(path, f"{case_id}/{name}{ending}") for name, path in zip(channels, files, strict=True)]
    if label is not None:
        placed.append(Placement(label, f"{case_id}/{LABEL}{ending}"))
    return PlannedCase(case_id, tuple(placed), part)


def _picture(case_id: str, file: Path, label: Path | None, part: str, ending: str) -> PlannedCase:
    image = f"{part}/images/{case_id}{ending}"
    placed = [Placement(file, image)]
    if label is not None:
        placed.append(Placement(label, f"{part}/labels/{case_id}{ending}"))
    return PlannedCase(image, tuple(placed), part)


def _stem_of(case: PlannedCase, ending: str) -> str:
    """The name of a case in the source, also of a picture, whose id is a path."""
    return case.case_id.rpartition("/")[2].removesuffix(ending)


def _three_axes(root: Path, cases: Sequence[PlannedCase], faults: list[Fault]) -> list[PlannedCase]:
    """The cases whose files are sound volumes of three axes, by their headers."""
    kept = []
    for case in cases:
        found = [fault for file in case.files if (fault := _axes_fault(root, case.case_id, file.source, 1))]
        faults += found
        if not found:
            kept.append(case)
    return kept


def _axes_fault(root: Path, case_id: str, path: Path, volumes: int) -> Fault | None:
    place = path.relative_to(root).as_posix()
    try:
        shape = read_header(path).shape
    except DataError as error:
        return Fault(case_id, place, hide_home(f"{error.what} {error.where}"), error.fix, error.code)
    count = shape[3] if len(shape) == 4 else 1
    if count == volumes:
        return None
    reason = f"{count} volumes in one file, {volumes} expected"
    return Fault(case_id, place, reason, "correct the channels of dataset.json, or the file", "volume_absent")


# --- Decathlon -------------------------------------------------------------------------------------------------------


def _decathlon_fault(root: Path, case: Case, channels: Sequence[str]) -> Fault | None:
    image = case.sequences[channels[0]].path
    if case.roi is None and case.split == "train":
        place = image.relative_to(root).as_posix()
        fix = "name it in dataset.json, or leave the case out"
        return Fault(case.case_id, place, "there is no label map", fix, "label_missing")
    files = [(image, len(channels)), *([(case.roi, 1)] if case.roi else [])]
    return next((fault for path, n in files if (fault := _axes_fault(root, case.case_id, path, n))), None)


def _of_decathlon(case: Case, channels: Sequence[str]) -> PlannedCase:
    placed = []
    for name in channels:
        entry = case.sequences[name]
        ending = ".nii.gz" if entry.volume_index is not None else _ending(entry.path)
        placed.append(Placement(entry.path, f"{case.case_id}/{name}{ending}", entry.volume_index))
    if case.roi is not None:
        placed.append(Placement(case.roi, f"{case.case_id}/{LABEL}{_ending(case.roi)}"))
    patient = case.patient_id if case.patient_id != case.case_id else ""
    return PlannedCase(case.case_id, tuple(placed), case.split, patient)


def _ending(path: Path) -> str:
    return next((ending for ending in VOLUME_SUFFIXES if path.name.lower().endswith(ending)), path.suffix)
