"""Data sets named by other programs' rules, read as they stand: nnU-Net, Decathlon, mm-dinov2, and a path template.

Every layout gives the same: its channels in order, and cases as paths and facts. Paths stay below the data root; a
folder of macOS ghosts (``._x.nii.gz``) is none.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import contained
from medssl_cli.data.images import VOLUME_SUFFIXES, volume_stem
from medssl_cli.data.manifest import (
    Owner,
    contained_id,
    detect_kind,
    nearest_id,
    read_ids,
    read_owners,
    read_table,
    say_some,
)
from medssl_cli.data.sequences import resolve_sequence

log = logging.getLogger(__name__)

LayoutChoice = Literal["auto", "cases", "images", "table", "nnunet", "decathlon", "mmdinov2", "template"]
LayoutName = Literal["cases", "images", "table", "nnunet", "decathlon", "mmdinov2", "template"]
FOREIGN = ("nnunet", "decathlon", "mmdinov2", "template")
"""The layouts that this file reads; the others are read by ``manifest``."""

OnFault = Callable[[str, DataError], None]

_MAX_JSON_BYTES = 2**26
_SPLITS = ("train", "val", "test")
_GLIOMA_FILE = re.compile(r"sub-(?P<id>.+)_ses-preop_space-sri_(?P<name>[A-Za-z0-9]+)\.nii(\.gz)?")
_GLIOMA_SEQUENCES = ("t1", "t1c", "t2", "flair")
_GLIOMA_ROI = "seg"
_GLIOMA_TABLE = "phenoData.csv"
_CHANNEL_FILE = re.compile(r"(?P<id>.+)_(?P<channel>\d{4})")
_FIELDS = ("subject", "dataset", "relative", "sequence")
_SHOWN = 8


def asked_layout(root: Path, layout: LayoutChoice, template: str) -> LayoutName:
    """The layout that ``--layout`` and ``--template`` ask for; what lies there with ``auto``.

    Raises:
        ConfigError: A faulty template, none where one is needed, or one beside another layout.
        DataError: There is nothing that could be read.
    """
    try:
        if template or layout == "template":
            check_template(template)
        if template and layout not in ("auto", "template"):
            raise ValueError(f"it has no effect with --layout {layout}")
    except ValueError as error:
        raise ConfigError(
            "The template cannot be used.",
            where=f"--template {template!r}: {error}",
            fix="e.g. --template '{subject}/{sequence}.nii.gz' alone",
            code="template",
        ) from error
    return detect_layout(root, template) if layout == "auto" or template else layout


def detect_layout(root: Path, template: str = "") -> LayoutName:
    """How the files under ``root`` are named.

    Raises:
        DataError: There is nothing that could be read.
    """
    return "template" if template else foreign_layout(root) or detect_kind(root)


def foreign_layout(root: Path) -> LayoutName | None:
    """nnU-Net, Decathlon or mm-dinov2 by what lies in ``root``; None for anything else.

    Raises:
        DataError: The description of the data set is damaged.
    """
    if not root.is_dir():
        return None
    if (root / "dataset.json").is_file() and (root / "imagesTr").is_dir():
        return "nnunet" if _is_nnunet(root, _read_json(root / "dataset.json")) else "decathlon"
    return "mmdinov2" if any(_glioma_folders(root)) else None


def layout_channels(root: Path, layout: LayoutName) -> tuple[str, ...]:
    """The sequences that a layout names itself, in its order; empty where the names are the user's.

    Raises:
        DataError: The description of the data set is damaged.
    """
    if layout in ("nnunet", "decathlon"):
        return _stems(_channel_names(root / "dataset.json", _read_json(root / "dataset.json")))
    if layout == "mmdinov2":
        found = {name for _, folder in _glioma_folders(root) for name in _glioma_files(folder)}
        return tuple(name for name in _GLIOMA_SEQUENCES if name in found)
    return ()


def layout_labels(root: Path) -> Mapping[str, Any] | None:
    """``labels`` of the ``dataset.json`` in ``root``: names and values of structures; None where nothing tells them.

    Raises:
        DataError: The description is damaged.
    """
    path = root / "dataset.json"
    labels = _read_json(path).get("labels") if path.is_file() else None
    if labels is not None and not isinstance(labels, dict):
        raise _damaged(path, "labels is no mapping")
    return labels


def read_layout_cases(
    root: Path,
    layout: LayoutName,
    sequences: tuple[str, ...],
    *,
    roi: str = "",
    template: str = "",
    on_fault: OnFault | None = None,
) -> list[Case]:
    """All cases of a data set, sorted by id, each with its split where the layout tells it.

    Args:
        root: Folder of the data set.
        layout: One of ``FOREIGN``.
        sequences: Names asked for: those of ``layout_channels``, ``0000`` for the first channel of nnU-Net, or what
            stands for {sequence} in a template; none where the cases alone are wanted.
        roi: Whether, and for a template under which name, a region of interest is looked for; empty for none. nnU-Net
            and Decathlon: the label map, all classes together.
        template: Path of a sequence, for the layout ``template``.
        on_fault: Called for a case that cannot be read, which is then left out; without it the first fault is raised.

    Raises:
        DataError: No case, a damaged description, paths that leave the root, one id twice.
    """
    readers: dict[str, Callable[[], Iterator[Case]]] = {
        "nnunet": lambda: _nnunet_cases(root, sequences, bool(roi)),
        "decathlon": lambda: _decathlon_cases(root, sequences, bool(roi)),
        "mmdinov2": lambda: _glioma_cases(root, sequences, bool(roi)),
        "template": lambda: _template_cases(root, sequences, roi, Template.parse(template), on_fault),
    }
    owners = read_owners(root) if root.is_dir() else {}
    cases: dict[str, Case] = {}
    for case in readers[layout]():
        if case.case_id in cases:
            places = {case.split, cases[case.case_id].split}
            code = "split_leak" if len(places) > 1 else "layout_id"
            detail = f"{case.case_id} in {' and '.join(sorted(places))}"
            raise _fault(root, "One case id stands for two cases.", detail, code, "keep one of them, or rename it")
        cases[case.case_id] = _owned(case, owners)
    if not cases:
        fix = "check the data root, data.layout and data.template"
        raise _fault(root, f"The layout {layout} has no case here.", "no file fits it", "source_unknown", fix)
    return [cases[name] for name in sorted(cases)]


def cases_beside(file: Path, sequences: tuple[str, ...] = ()) -> list[Case]:
    """The cases of nnU-Net or the Decathlon in whose folder of images a volume lies; none where it lies elsewhere.

    Args:
        file: In imagesTr or imagesTs.
        sequences: Of each case, as for ``read_layout_cases``; those that the data set names are always among them.

    Raises:
        DataError: As ``read_layout_cases``.
    """
    folder = file.absolute().parent
    if folder.name not in ("imagesTr", "imagesTs") or volume_stem(file) is None:
        return []
    layout = foreign_layout(folder.parent)
    if layout not in ("nnunet", "decathlon"):
        return []
    names = dict.fromkeys((*layout_channels(folder.parent, layout), *sequences))
    found = read_layout_cases(folder.parent, layout, tuple(names))
    return [case for case in found if any(s.path.parent.name == folder.name for s in case.sequences.values())]


def select_cases(cases: list[Case], split_csv: Path) -> list[Case]:
    """The cases that a list names, each by its id.

    Raises:
        DataError: An id without a case, with the nearest one.
    """
    known = {case.case_id: case for case in cases}
    ids = read_ids(split_csv).ids
    unknown = [name for name in ids if name not in known]
    if unknown:
        near = ", ".join(f"{name!r}{nearest_id(name, list(known))}" for name in unknown[:_SHOWN])
        raise DataError(
            f"{len(unknown)} of {len(ids)} ids have no case.",
            where=f"{split_csv}: {near}",
            fix="ids are the names of cases in the data set, without channel number and suffix",
            code="id_unknown",
        )
    return [known[name] for name in ids]


def _owned(case: Case, owners: Mapping[str, Owner]) -> Case:
    owner = owners.get(case.case_id)
    if owner is None:
        return case
    return replace(case, patient_id=owner.patient_id or case.patient_id, study_uid=owner.study_uid)


# --- descriptions ----------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"over {_MAX_JSON_BYTES} bytes")
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(data, dict):
        raise _damaged(path, "it holds no mapping")
    return data


def _channel_names(path: Path, data: Mapping[str, Any]) -> list[str]:
    """Names by channel number: ``channel_names`` of nnU-Net 2, ``modality`` of nnU-Net 1 and the Decathlon."""
    named = data.get("channel_names", data.get("modality"))
    if isinstance(named, list):
        named = dict(enumerate(named))
    if not isinstance(named, dict) or not named:
        raise _damaged(path, "channel_names or modality is missing")
    try:
        by_number = {int(number): str(name) for number, name in named.items()}
    except (TypeError, ValueError) as error:
        raise _damaged(path, f"channel numbers: {error}") from error
    if sorted(by_number) != list(range(len(by_number))):
        raise _damaged(path, f"channels are numbered {sorted(by_number)}, not from 0 without gaps")
    return [by_number[number] for number in range(len(by_number))]


def _stems(names: list[str]) -> tuple[str, ...]:
    """Names as stems: lower case, words joined by ``_``; a name that comes twice gets its channel number."""
    plain = [re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_") or f"{i:04d}" for i, name in enumerate(names)]
    return tuple(name if plain.count(name) == 1 else f"{name}_{i:04d}" for i, name in enumerate(plain))


def _channels_asked(path: Path, data: Mapping[str, Any], sequences: tuple[str, ...]) -> dict[str, int]:
    """Channel number of each name that the data set knows, by its stem, as spelt there, or as ``0000``."""
    names = _channel_names(path, data)
    known = {f"{number:04d}": number for number in range(len(names))}
    known.update({name: number for number, name in enumerate(names) if names.count(name) == 1})
    known.update({stem: number for number, stem in enumerate(_stems(names))})
    return {name: known[name] for name in sequences if name in known}


def _damaged(path: Path, detail: str) -> DataError:
    fix = "mend it after the rules of nnU-Net or the Decathlon, or name data.layout"
    return _fault(path, "The description of the data set is damaged.", detail, "layout_json", fix)


def _fault(path: Path, what: str, detail: str, code: str, fix: str) -> DataError:
    return DataError(what, where=f"{path}: {' '.join(detail.split())[:300]}", fix=fix, code=code)


# --- nnU-Net ---------------------------------------------------------------------------------------------------------


def _is_nnunet(root: Path, data: Mapping[str, Any]) -> bool:
    """Version 2 by its keys; version 1 shares them with the Decathlon, but its files end in a channel number."""
    if "channel_names" in data:
        return True
    names = (name for name, _ in _files(root / "imagesTr", ".nii.gz"))
    return any(_CHANNEL_FILE.fullmatch(name) for name in names)


def _nnunet_cases(root: Path, sequences: tuple[str, ...], roi: bool) -> Iterator[Case]:
    path = root / "dataset.json"
    data = _read_json(path)
    ending = str(data.get("file_ending", ".nii.gz"))
    if ending not in VOLUME_SUFFIXES:
        fix = "convert them to .nii.gz; pictures can be read with data.layout=images and the folder imagesTr"
        raise _fault(path, "Only NIfTI files are read in this layout.", f"file_ending {ending!r}", "layout_files", fix)
    asked = _channels_asked(path, data, sequences)
    for suffix, split in (("Tr", "train"), ("Ts", "test")):
        found: dict[str, dict[int, Path]] = {}
        for stem, file in _files(root / f"images{suffix}", ending):
            match = _CHANNEL_FILE.fullmatch(stem)
            if match is None:
                fix = "name it <case>_0000, the number being that of its channel"
                raise _fault(file, "A file has no channel number.", stem, "layout_files", fix)
            contained(root, file.relative_to(root), "file")
            found.setdefault(match["id"], {})[int(match["channel"])] = file
        for case_id, files in found.items():
            label = root / f"labels{suffix}" / f"{case_id}{ending}"
            chosen = {name: Sequence(name, files[number]) for name, number in asked.items() if number in files}
            yield Case(case_id, case_id, chosen, roi=_label(root, label) if roi else None, split=split)


def _files(folder: Path, ending: str) -> Iterator[tuple[str, Path]]:
    """(name without ``ending``, path) of the files of a folder, sorted; hidden ones are left out."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.name.endswith(ending) and not path.name.startswith("."):
                yield path.name[: -len(ending)], path


def _label(root: Path, path: Path) -> Path | None:
    if not path.is_file():
        return None
    return contained(root, path.relative_to(root), "label")


# --- Medical Segmentation Decathlon ----------------------------------------------------------------------------------


def _decathlon_cases(root: Path, sequences: tuple[str, ...], roi: bool) -> Iterator[Case]:
    path = root / "dataset.json"
    data = _read_json(path)
    asked = _channels_asked(path, data, sequences)
    several = len(_channel_names(path, data)) > 1
    for split, entries in (("train", data.get("training", [])), ("test", data.get("test", []))):
        if not isinstance(entries, list):
            raise _damaged(path, f"{split} is no list")
        for entry in entries:
            image, label = _entry(path, entry)
            if PurePosixPath(image).name.startswith("."):
                continue
            file = contained(root, image, "image of dataset.json")
            case_id = volume_stem(file) or file.name
            chosen = {n: Sequence(n, file, volume_index=number if several else None) for n, number in asked.items()}
            mask = contained(root, label, "label of dataset.json") if roi and label else None
            yield Case(case_id, case_id, chosen, roi=mask, split=split)


def _entry(path: Path, entry: object) -> tuple[str, str]:
    """(image, label) of a training entry, a mapping, or of a test entry, a path alone."""
    if isinstance(entry, str):
        return entry, ""
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise _damaged(path, f"an entry without image: {str(entry)[:80]}")
    return entry["image"], str(entry.get("label") or "")


# --- mm-dinov2 -------------------------------------------------------------------------------------------------------


def _glioma_folders(root: Path) -> Iterator[tuple[str, Path]]:
    """(split, folder of the scan before surgery) of each case below train, val and test."""
    for split in _SPLITS:
        if (root / split).is_dir():
            for folder in sorted((root / split).iterdir()):
                if (folder / "preop").is_dir() and not folder.name.startswith("."):
                    yield split, folder / "preop"


def _glioma_files(folder: Path) -> dict[str, Path]:
    """Files by sequence; ``.nii`` before ``.nii.gz``."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _GLIOMA_FILE.fullmatch(path.name)
        if match and path.is_file():
            found.setdefault(match["name"].lower(), path)
    return found


def _glioma_cases(root: Path, sequences: tuple[str, ...], roi: bool) -> Iterator[Case]:
    labels = _glioma_labels(root)
    for split, folder in _glioma_folders(root):
        files = _glioma_files(folder)
        for path in files.values():
            contained(root, path.relative_to(root), "file")
        case_id = folder.parent.name
        chosen = {name: Sequence(name, files[name]) for name in sequences if name in files}
        mask = files.get(_GLIOMA_ROI) if roi else None
        yield Case(case_id, case_id, chosen, roi=mask, label=labels.get(case_id, ""), split=split)


def _glioma_labels(root: Path) -> dict[str, str]:
    path = root / _GLIOMA_TABLE
    if not path.is_file():
        return {}
    table = read_table(path)
    return dict(zip(table.column("Patient"), table.column("WHO2021_Int"), strict=True))


# --- a template ------------------------------------------------------------------------------------------------------


def check_template(text: str) -> None:
    """Refuse a template with unknown fields or without {sequence}.

    Raises:
        ValueError: With the fields that there are.
    """
    fields = re.findall(r"\{([^{}]*)\}", text)
    unknown = [name for name in fields if name not in _FIELDS]
    rest = re.sub(r"\{[^{}]*\}", "", text)
    if unknown or "sequence" not in fields or "{" in rest or "}" in rest:
        wrong = f"unknown field {{{unknown[0]}}}" if unknown else "the field {sequence} is needed"
        raise ValueError(f"{wrong}; fields are {', '.join(f'{{{name}}}' for name in _FIELDS)}")
    if os.path.isabs(text) or ".." in PurePosixPath(text).parts:
        raise ValueError("a template is a path below the data root")


@dataclass(frozen=True)
class Template:
    """A path with fields.

    Args:
        text: Relative to the data root, or to the folder of a case where no field names one.
        in_case: Whether it is relative to the folder of a case.
    """

    text: str
    in_case: bool

    @classmethod
    def parse(cls, text: str) -> Template:
        """Raises ValueError as ``check_template``."""
        check_template(text)
        return cls(text, not any(f"{{{name}}}" in text for name in ("subject", "dataset", "relative")))

    def path(self, relative: str, sequence: str) -> PurePosixPath:
        """Path below the root of one sequence of the case whose folder is ``relative``."""
        first, *more = PurePosixPath(relative).parts
        values = {
            "subject": more[-1] if more else first,
            "dataset": first if more or "{subject}" not in self.text else "",
            "relative": relative,
            "sequence": sequence,
        }
        path = PurePosixPath(re.sub(r"\{(\w+)\}", lambda match: values[match[1]], self.text).lstrip("/"))
        return PurePosixPath(relative) / path if self.in_case else path

    def relatives(self, root: Path, names: tuple[str, ...]) -> set[str]:
        """The cases that files below ``root`` show: dataset and subject, or relative folder, of each that fits."""
        pattern = self._pattern(names)
        found = set()
        for path in _every_path(root):
            match = pattern.fullmatch(path)
            if match:
                fields = match.groupdict()
                parts = [fields.get("relative") or "", fields.get("dataset") or "", fields.get("subject") or ""]
                found.add(parts[0] or "/".join(part for part in parts[1:] if part))
        return found

    def _pattern(self, names: tuple[str, ...]) -> re.Pattern[str]:
        text = "{relative}/" + self.text if self.in_case else self.text
        sequences = "|".join(re.escape(name) for name in names) or "[^/]+"
        one_of = {"relative": r".+", "sequence": sequences, "subject": r"[^/]+", "dataset": r"[^/]+"}
        seen: set[str] = set()
        out = ""
        for literal, field in re.findall(r"([^{}]*)(?:\{(\w+)\})?", text):
            out += re.escape(literal)
            if field:
                out += f"(?P={field})" if field in seen else f"(?P<{field}>{one_of[field]})"
                seen.add(field)
        return re.compile(re.sub(r"\\\.nii(\\\.gz)?$", r"\\.nii(?:\\.gz)?", out))


def _every_path(root: Path) -> Iterator[str]:
    """Relative POSIX paths of all files below ``root``, and of folders that are named as a file; no hidden ones."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(folder)
        as_files = [name for name in folders if volume_stem(Path(name)) is not None]
        for name in sorted([*files, *as_files]):
            if not name.startswith("."):
                yield (here / name).relative_to(root).as_posix()


def _template_cases(
    root: Path, sequences: tuple[str, ...], roi: str, template: Template, on_fault: OnFault | None
) -> Iterator[Case]:
    names = (*sequences, *([roi] if roi else []))
    for relative, split in _template_places(root, names, template):
        try:
            contained_id(root, relative)
            found = {name: _template_file(root, relative, name, template) for name in names}
        except DataError as error:
            if on_fault is None:
                raise
            on_fault(relative, error)
            continue
        chosen = {name: found[name] for name in sequences}
        mask = found.get(roi) if roi else None
        yield Case(
            case_id=relative,
            patient_id=relative,
            sequences={name: sequence for name, sequence in chosen.items() if sequence is not None},
            roi=None if mask is None else mask.path,
            split=split,
        )


def _template_places(root: Path, names: tuple[str, ...], template: Template) -> Iterator[tuple[str, str]]:
    """(relative folder, split) of each case: of the lists ``splits/*.txt`` where there are any, else as files show."""
    lists = [(split, root / "splits" / f"{split}.txt") for split in _SPLITS]
    lists = [(split, path) for split, path in lists if path.is_file()]
    seen: dict[str, str] = {}
    for split, path in lists:
        for name in read_ids(path).ids:
            relative = PurePosixPath(name).as_posix()
            if seen.setdefault(relative, split) != split:
                detail = f"{relative} stands in {seen[relative]}.txt and {split}.txt"
                raise DataError(
                    "The splits share a case: scores would be too good.",
                    where=f"{path.parent}: {detail}",
                    fix="keep it in one list",
                    code="split_leak",
                )
    if lists:
        yield from sorted(seen.items())
    else:
        yield from ((relative, "") for relative in sorted(template.relatives(root, names)))


def _template_file(root: Path, relative: str, name: str, template: Template) -> Sequence | None:
    """The file of one sequence, None if there is none: at its place, or anywhere below the folder of the case.

    Raises:
        DataError: Several files of that name, or a path that leaves the root.
    """
    place = contained(root, template.path(relative, name).as_posix(), "path of a template")
    stem = volume_stem(place)
    if stem == name and place.parent.is_dir():  # by name: capitals, suffixes and b-values as in a case tree
        chosen = resolve_sequence(place.parent, name)
        if chosen is not None:
            return _inside(root, chosen)
    spellings = [place] if stem is None else [place.with_name(stem + suffix) for suffix in (".nii", ".nii.gz")]
    for path in spellings:
        if path.is_file():
            return _inside(root, Sequence(name, path))
        if path.is_dir():
            return _inside(root, _only_volume(path, name))
    return _found_below(root, root / relative, {path.name for path in spellings}, name)


def _inside(root: Path, sequence: Sequence) -> Sequence:
    contained(root, sequence.path.relative_to(root), "file")
    return sequence


def _only_volume(folder: Path, name: str) -> Sequence:
    files = [path for path in sorted(folder.iterdir()) if volume_stem(path) is not None and path.is_file()]
    if len(files) != 1:
        raise DataError(
            "The folder of a sequence does not hold one volume.",
            where=f"{folder}: {say_some(path.name for path in files) or 'none'}",
            fix="leave exactly one NIfTI file in it",
            code="sequence_ambiguous",
        )
    return Sequence(name, files[0], note=f"{folder.name}/{files[0].name}")


def _found_below(root: Path, folder: Path, wanted: set[str], name: str) -> Sequence | None:
    if not folder.is_dir() or folder == root:
        return None
    found = [folder / path for path in _every_path(folder) if PurePosixPath(path).name in wanted]
    if len(found) > 1:
        raise DataError(
            "Several files could be the sequence.",
            where="\n".join(str(path) for path in found[:_SHOWN]),
            fix="tell them apart in data.template",
            code="sequence_ambiguous",
        )
    if not found:
        return None
    path = found[0]
    return _inside(root, _only_volume(path, name) if path.is_dir() else Sequence(name, path))
