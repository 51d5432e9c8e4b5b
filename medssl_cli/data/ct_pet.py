"""Pairs of CT and PET slices with a lesion mask: found by name, read as luminance, split by patient.

Three layouts: a *pre-split* tree ``{train,val,test}/{CT,PET,masks}/patient_<ID>_slice_<n>.png``, the same *flat*
without the folders of the split, and *pclt20k* ``[<split>/]<PPPP>/<PPPP>_<SSS>_{CT,PET,mask}.png``. Folder names are
read in any case; a triple is defined by equal names, never by its place in a list.

Links: a folder must lie inside the root, also behind a link. A file may be a link to anywhere, if it leads to a regular
file: a split tree is made of links to the flat data set beside it, and whoever laid the link into the tree named that
one file, whereas a linked folder brings in whatever lies there.

Letters: H W pixels; 2 is CT, then PET.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import contained, worker_count
from medssl_cli.core.wording import counted
from medssl_cli.data.images import IMAGE_SUFFIXES, read_image
from medssl_cli.data.manifest import say_some, split_digest
from medssl_cli.data.split import Item, split_items

log = logging.getLogger(__name__)

Layout = Literal["presplit", "flat", "pclt20k"]
DatasetType = Literal["auto", "flat", "presplit", "pclt", "pclt20k"]
Kind = Literal["CT", "PET", "mask"]

PARTS = ("train", "val", "test")
MIN_SIDE = 16
"""Pixels; below it the deepest map of the network is a single one, which instance normalisation turns to 0."""
MARKER = "_slice_"
TEST_SHARE = 0.2
"""Share of the patients of a PCLT20K tree without folders of a split that is kept for the test."""

PARTNER_FIX = "add it under the same name, or remove the slice; pairs are never made by order"
PATIENT_FIX = r"name the files <patient>_slice_<number>.png, or pass --patient-regex, e.g. '(STS_\d+)_'"
PCLT_FIX = "name them <patient>/<patient>_<slice>_CT.png, …_PET.png and …_mask.png"

_KINDS: tuple[Kind, ...] = ("CT", "PET", "mask")
_FOLDERS: dict[Kind, tuple[str, ...]] = {"CT": ("ct",), "PET": ("pet",), "mask": ("masks", "mask")}
_PART_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix != ".npy")
_PCLT = re.compile(r"(?P<stem>.+)_(?P<kind>CT|PET|mask)(?P<suffix>\.[^.]+)", re.IGNORECASE)
_PCLT_KINDS: dict[str, Kind] = {"ct": "CT", "pet": "PET", "mask": "mask"}
_SHOWN = 100
_EXPECTED = (
    "lay the files out as {CT,PET,masks}/*.png, {train,val,test}/{CT,PET,masks}/*.png or "
    "[<split>/]<patient>/<patient>_<slice>_{CT,PET,mask}.png; dataset_type says which it is"
)


@dataclass(frozen=True)
class Triple:
    """One slice: files of CT, PET and mask.

    Args:
        name: File name with suffix, the same for all three; of PCLT20K without the ending ``_CT``.
        patient_id: Whose; empty for a pair of folders, which needs no patients.
        ct, pet: Pictures of one size.
        mask: Lesion; None where masks were not asked for.
    """

    name: str
    patient_id: str
    ct: Path
    pet: Path
    mask: Path | None = None

    @property
    def files(self) -> dict[Kind, Path]:
        """The files by kind."""
        pair: dict[Kind, Path] = {"CT": self.ct, "PET": self.pet}
        return pair if self.mask is None else {**pair, "mask": self.mask}


@dataclass(frozen=True)
class CtPetData:
    """A data set as found.

    Args:
        root: Its folder.
        layout: How the files lie.
        parts: Triples sorted by name, of ``train``, ``val`` and ``test`` where folders split them, else of ``all``.
    """

    root: Path
    layout: Layout
    parts: dict[str, tuple[Triple, ...]]


@dataclass(frozen=True)
class FoundSlice:
    """One name in a tree, complete or not.

    Args:
        part: ``train``, ``val``, ``test`` or ``all``.
        name: As of ``Triple``.
        places: Where each file that is asked for should lie.
        there: Kinds whose file exists.
        folder: Patient by the folder, for PCLT20K; else empty.
    """

    part: str
    name: str
    places: Mapping[Kind, Path]
    there: frozenset[Kind]
    folder: str = ""

    @property
    def missing(self) -> tuple[Kind, ...]:
        """Kinds without a file."""
        return tuple(kind for kind in self.places if kind not in self.there)

    def triple(self, patient_id: str) -> Triple:
        """The slice with its patient; it must be complete."""
        return Triple(self.name, patient_id, self.places["CT"], self.places["PET"], self.places.get("mask"))


@dataclass(frozen=True)
class CtPetScan:
    """All names of a tree; nothing is opened, and what is incomplete is still in it.

    Args:
        root, layout: As of ``CtPetData``.
        slices: By part, then by name.
        strangers: Pictures in the folder of a patient whose names are not those of PCLT20K.
    """

    root: Path
    layout: Layout
    slices: tuple[FoundSlice, ...]
    strangers: tuple[Path, ...] = ()


# --- finding ---------------------------------------------------------------------------------------------------------


def read_ct_pet(
    root: Path, *, dataset_type: DatasetType = "auto", patient_regex: str | None = None, masks: bool = True
) -> CtPetData:
    """Find all triples below ``root``.

    Args:
        root: Folder of one of the three layouts.
        dataset_type: Which of them; ``auto`` looks, and folders of a split win.
        patient_regex: Searched for in each name; its first group is the patient. Without it a patient is what stands
            before the last ``_slice_``, of PCLT20K the folder.
        masks: Whether each slice needs a mask; if not, masks are not looked for.

    Raises:
        DataError: No such layout, files without their partner, or names that tell no patient: each time all of them.
        ConfigError: A regular expression without a group.
    """
    scan = scan_ct_pet(root, dataset_type=dataset_type, masks=masks)
    _refuse_strangers(scan)
    _refuse_incomplete(scan.root, scan.slices)
    patients = patients_of(scan.slices, patient_regex)
    parts: dict[str, list[Triple]] = {}
    for found in scan.slices:
        parts.setdefault(found.part, []).append(found.triple(patients[found.name]))
    return CtPetData(scan.root, scan.layout, {part: tuple(triples) for part, triples in parts.items()})


def scan_ct_pet(root: Path, *, dataset_type: DatasetType = "auto", masks: bool = True) -> CtPetScan:
    """All names below ``root``, by part and then by name, whether or not their files are complete.

    Raises:
        DataError: No such layout, two folders of one meaning, a folder that leads out of ``root``, or no name at all.
    """
    if not root.is_dir():
        raise DataError("The data set is no folder.", where=str(root), fix="check the path", code="root_missing")
    kinds = _KINDS if masks else _KINDS[:2]
    asked: Layout | None = {"auto": None, "pclt": "pclt20k"}.get(dataset_type, dataset_type)
    layout, folders = _detect(root, asked)
    slices: list[FoundSlice] = []
    strangers: list[Path] = []
    for part, folder in folders.items():
        if layout == "pclt20k":
            slices += _pclt_slices(root, folder, part, kinds, strangers)
        else:
            slices += _slices(root, folder, part, kinds)
    if not slices:
        raise DataError(
            "The data set holds no picture.", where=f"{root} (layout {layout})", fix=_EXPECTED, code="slices_none"
        )
    return CtPetScan(root, layout, tuple(slices), tuple(strangers))


def find_pairs(ct_dir: Path, pet_dir: Path) -> list[Triple]:
    """Pairs of two folders by equal names, sorted by name; without masks and patients.

    Raises:
        DataError: A file without its partner, all of them in one message; a folder that is none; no picture.
    """
    folders: dict[Kind, Path] = {"CT": ct_dir, "PET": pet_dir}
    for kind, folder in folders.items():
        if not folder.is_dir():
            raise DataError(f"The {kind} folder is none.", where=str(folder), fix="name a folder", code="root_missing")
    slices = _matched(folders, "all")
    if not slices:
        fix = f"name folders of pictures ({', '.join(_SUFFIXES)})"
        raise DataError("The folders hold no picture.", where=f"{ct_dir} and {pet_dir}", fix=fix, code="slices_none")
    _refuse_incomplete(None, slices)
    return [found.triple("") for found in slices]


def pair_folders(root: Path) -> tuple[Path, Path] | None:
    """The CT and the PET folder directly below ``root``, their names in any case; None unless both are there.

    Raises:
        DataError: Two folders of one meaning, or one that leads out of ``root``.
    """
    ct, pet = _child(root, _FOLDERS["CT"], "CT folder"), _child(root, _FOLDERS["PET"], "PET folder")
    return None if ct is None or pet is None else (_inside(root, ct), _inside(root, pet))


def _detect(root: Path, asked: Layout | None) -> tuple[Layout, dict[str, Path]]:
    """The layout and the folder of each part; folders of a split win over what else lies there."""
    parts = {part: _child(root, names, f"{part} folder") for part, names in _PART_NAMES.items()}
    there = {part: folder for part, folder in parts.items() if folder is not None}
    kinds = {_kind_of(folder) for folder in there.values()} - {None}
    if len(kinds) > 1:
        names = ", ".join(folder.name for folder in there.values())
        fix = "keep one layout in all folders of the split"
        raise DataError("The folders of the split have two layouts.", where=f"{root}: {names}", fix=fix, code="layout")
    options: list[tuple[Layout, dict[str, Path]]] = []
    if kinds:
        options.append(("presplit" if kinds == {"flat"} else "pclt20k", there))
    own = _kind_of(root)
    if own is not None:
        options.append(("flat" if own == "flat" else "pclt20k", {"all": root}))
    fitting = [option for option in options if asked in (None, option[0])]
    if not fitting:
        found = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())[:8]) or "no folder"
        what = "The folder holds no CT-PET data set." if asked is None else f"The folder has not the layout {asked}."
        raise DataError(what, where=f"{root} holds {found}", fix=_EXPECTED, code="layout")
    if len(fitting) > 1:
        log.warning("%s: the folders of the split are read, what else lies beside them is not", root)
    return fitting[0]


def _kind_of(folder: Path) -> Literal["flat", "pclt20k"] | None:
    """What lies directly in a folder: CT or PET folders, or those of patients as in PCLT20K."""
    if _child(folder, _FOLDERS["CT"], "CT folder") or _child(folder, _FOLDERS["PET"], "PET folder"):
        return "flat"
    for patient in _subfolders(folder):
        if any(_PCLT.fullmatch(name) for name in _picture_names(patient, tell=False)):
            return "pclt20k"
    return None


def _slices(root: Path, folder: Path, part: str, kinds: Sequence[Kind]) -> list[FoundSlice]:
    folders: dict[Kind, Path] = {}
    absent = []
    for kind in kinds:
        child = _child(folder, _FOLDERS[kind], f"{kind} folder")
        if child is None:
            absent.append(str(folder / _folder_name(kind)))
        else:
            folders[kind] = _inside(root, child)
    if absent:
        raise DataError(
            f"{counted(len(absent), 'folder')} {'is' if len(absent) == 1 else 'are'} missing.",
            where="\n".join(absent),
            fix="each part needs CT, PET and masks, with equal file names in all three",
            code="folder_missing",
        )
    return _matched(folders, part)


def _matched(folders: Mapping[Kind, Path], part: str) -> list[FoundSlice]:
    """One entry for each name that any of the folders holds."""
    names = {kind: set(_picture_names(folder)) for kind, folder in folders.items()}
    return [
        FoundSlice(
            part,
            name,
            {kind: folder / name for kind, folder in folders.items()},
            frozenset(kind for kind, found in names.items() if name in found),
        )
        for name in sorted(set().union(*names.values()))
    ]


def _pclt_slices(root: Path, folder: Path, part: str, kinds: Sequence[Kind], strangers: list[Path]) -> list[FoundSlice]:
    slices: list[FoundSlice] = []
    for patient in _subfolders(folder):
        files: dict[str, dict[Kind, Path]] = {}
        for name in _picture_names(_inside(root, patient)):
            match = _PCLT.fullmatch(name)
            if match is None or not match["stem"].startswith(f"{patient.name}_"):
                strangers.append(patient / name)
                continue
            kind = _PCLT_KINDS[match["kind"].lower()]
            if kind in kinds:
                files.setdefault(match["stem"] + match["suffix"], {})[kind] = patient / name
        slices += [_pclt_slice(name, found, patient, part, kinds) for name, found in sorted(files.items())]
    return slices


def _pclt_slice(name: str, files: Mapping[Kind, Path], patient: Path, part: str, kinds: Sequence[Kind]) -> FoundSlice:
    stem, _, suffix = name.rpartition(".")
    places = {kind: files.get(kind, patient / f"{stem}_{kind}.{suffix}") for kind in kinds}
    return FoundSlice(part, name, places, frozenset(files), patient.name)


def _child(folder: Path, names: Sequence[str], what: str) -> Path | None:
    """The one folder below ``folder`` with one of the names, in any case."""
    found = [child for child in _subfolders(folder) if child.name.casefold() in names]
    if len(found) > 1:
        raise DataError(
            f"The {what} is ambiguous.",
            where=", ".join(str(child) for child in found),
            fix="keep one of them",
            code="folder_ambiguous",
        )
    return found[0] if found else None


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _inside(root: Path, folder: Path) -> Path:
    return contained(root, folder.relative_to(root), "folder")


def _picture_names(folder: Path, *, tell: bool = True) -> list[str]:
    """Names of the pictures of a folder, sorted; a link that leads nowhere is no picture, as its file is missing."""
    names: list[str] = []
    others: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_picture = entry.name.lower().endswith(_SUFFIXES) and entry.is_file()
            (names if is_picture else others).append(entry.name)
    if others and tell:
        log.warning("%s: not read, as they are no pictures: %s", folder, say_some(sorted(others)))
    return sorted(names)


def _folder_name(kind: Kind) -> str:
    return "masks" if kind == "mask" else kind


def _listed(lines: Sequence[str]) -> str:
    more = f"\nand {len(lines) - _SHOWN} more; `medssl check-data --task ct-pet` lists them all"
    return "\n".join(lines[:_SHOWN]) + (more if len(lines) > _SHOWN else "")


def _refuse_strangers(scan: CtPetScan) -> None:
    if scan.strangers:
        raise DataError(
            "Pictures of PCLT20K have names that do not tell what they are.",
            where=_listed([str(path.relative_to(scan.root)) for path in scan.strangers]),
            fix=PCLT_FIX,
            code="pclt_name",
        )


def _refuse_incomplete(root: Path | None, slices: Iterable[FoundSlice]) -> None:
    lines = []
    for found in slices:
        there = " and ".join(kind for kind in _KINDS if kind in found.there)
        for kind in found.missing:
            place = found.places[kind]
            lines.append(f"{place if root is None else place.relative_to(root)} (there is {there})")
    if lines:
        raise DataError(
            f"{counted(len(lines), 'file')} of CT, PET or mask {'is' if len(lines) == 1 else 'are'} missing.",
            where=_listed(lines),
            fix=PARTNER_FIX,
            code="partner_missing",
        )


def _no_patient(names: Sequence[str], patient_regex: str | None) -> DataError:
    why = f"have no {MARKER!r}" if patient_regex is None else f"do not fit {patient_regex!r}"
    return DataError(
        f"{counted(len(names), 'name')} of files {'tells' if len(names) == 1 else 'tell'} no patient.",
        where=_listed([f"these {why}:", *names]),
        fix=PATIENT_FIX,
        code="patient_unknown",
    )


# --- patients and parts ----------------------------------------------------------------------------------------------


def patients_of(slices: Sequence[FoundSlice], patient_regex: str | None = None) -> dict[str, str]:
    """Patient by name; of PCLT20K the folder, unless a pattern is given.

    Raises:
        DataError: Names that tell no patient, all of them.
        ConfigError: A pattern that is none, or has no group.
    """
    pattern = compiled(patient_regex)
    patients = {
        found.name: found.folder if found.folder and pattern is None else find_patient(found.name, pattern)
        for found in slices
    }
    unknown = [name for name, patient in patients.items() if not patient]
    if unknown:
        raise _no_patient(unknown, patient_regex)
    return patients


def find_patient(name: str, pattern: re.Pattern[str] | None) -> str:
    """The patient that a file name tells: what stands before its last ``_slice_``, or the first group of the pattern.

    Empty if it tells none.
    """
    if pattern is None:
        return name.rpartition(MARKER)[0]
    match = pattern.search(name)
    return "" if match is None else match[1] or ""


def compiled(patient_regex: str | None) -> re.Pattern[str] | None:
    """The pattern of ``--patient-regex``.

    Raises:
        ConfigError: It is none, or has no group.
    """
    if patient_regex is None:
        return None
    try:
        pattern = re.compile(patient_regex)
        fault = "" if pattern.groups else "it has no group"
    except re.error as error:
        fault = str(error)
    if fault:
        fix = r"put the part that is the patient in brackets, e.g. '(STS_\d+)_'"
        raise ConfigError(
            "The pattern of patients is none.", where=f"{patient_regex!r}: {fault}", fix=fix, code="patient_regex"
        )
    return pattern


def split_triples(data: CtPetData, *, val_ratio: float = 0.2, seed: int = 42) -> dict[str, tuple[Triple, ...]]:
    """Triples by part; no patient is in two of them.

    Folders of a split win. Where they have no ``val``, it is drawn from the patients of ``train``, never from those of
    ``test``. A flat tree is split into ``train`` and ``val``; PCLT20K without folders of a split also keeps
    ``TEST_SHARE`` of the patients for ``test``, so 60/20/20 by default.

    Args:
        data: As found.
        val_ratio: Share of the patients that becomes ``val``; of PCLT20K of all, else of those that are divided.
        seed: Of the draw; the same names and seed give the same parts.

    Raises:
        DataError: Folders of a split that share a patient, no ``train``, or too few patients.
        ConfigError: ``val_ratio`` outside of 0 and 1.
    """
    if "all" in data.parts:
        test = TEST_SHARE if data.layout == "pclt20k" else 0.0
        parts = _divided(data.parts["all"], val_ratio, test, seed)
    else:
        parts = dict(data.parts)
        if "train" in parts and "val" not in parts:
            log.warning("%s has no folder val: %g of the patients of train become it", data.root, val_ratio)
            parts |= _divided(parts["train"], val_ratio, 0.0, seed)
    _refuse_shared(parts)
    if not parts.get("train"):
        raise DataError(
            "There is no part to train on.",
            where=f"{data.root}: {', '.join(parts) or 'nothing'}",
            fix="add a folder train",
            code="train_missing",
        )
    return {part: parts[part] for part in PARTS if parts.get(part)}


def parts_digest(parts: Mapping[str, Sequence[Triple]]) -> dict[str, str]:
    """SHA-256 of the sorted names of each part."""
    return {part: split_digest(triple.name for triple in triples) for part, triples in parts.items()}


def shared_patients(parts: Mapping[str, Iterable[tuple[str, str]]]) -> dict[str, dict[str, list[str]]]:
    """Names by part of each patient who is in several; ``parts`` holds (patient, name)."""
    places: dict[str, dict[str, list[str]]] = {}
    for part, named in parts.items():
        for patient, name in named:
            places.setdefault(patient, {}).setdefault(part, []).append(name)
    return {patient: sides for patient, sides in places.items() if patient and len(sides) > 1}


def _divided(
    triples: Sequence[Triple], val_ratio: float, test_ratio: float, seed: int
) -> dict[str, tuple[Triple, ...]]:
    if not 0 < val_ratio < 1 - test_ratio:
        raise ConfigError(
            "The share of the validation is none.",
            where=f"val_ratio={val_ratio:g}",
            fix=f"choose a share above 0 and below {1 - test_ratio:g}, e.g. 0.2",
            code="val_ratio",
        )
    n_patients, n_parts = len({triple.patient_id for triple in triples}), 3 if test_ratio else 2
    if n_patients < n_parts:
        raise DataError(
            "There are too few patients for a split.",
            where=f"{counted(n_patients, 'patient')} for {n_parts} parts, e.g. {triples[0].patient_id!r}",
            fix="add patients, or see whether the names tell them apart (--patient-regex); none is cut in two",
            code="too_few_groups",
        )
    by_name = {triple.name: triple for triple in triples}
    items = [Item(triple.name, triple.patient_id) for triple in triples]
    split = split_items(items, (1 - val_ratio - test_ratio, val_ratio, test_ratio), seed)
    return {part: tuple(by_name[name] for name in names) for part, names in split.items() if names}


def _refuse_shared(parts: Mapping[str, Sequence[Triple]]) -> None:
    shared = shared_patients({part: [(t.patient_id, t.name) for t in triples] for part, triples in parts.items()})
    if shared:
        lines = [f"{patient}: {' and '.join(sides)}" for patient, sides in sorted(shared.items())]
        raise DataError(
            f"{counted(len(shared), 'patient')} {'is' if len(shared) == 1 else 'are'} in several parts of the split.",
            where=_listed(lines),
            fix="split the flat data set again by patient, or name the patients with --patient-regex",
            code="split_leak",
        )


# --- reading ---------------------------------------------------------------------------------------------------------


def read_luminance(path: Path) -> np.ndarray:
    """(H, W) uint8 or uint16: grey as stored, colours as the luminance of ITU-R BT.601, as Pillow's mode L rounds it.

    Raises:
        DataError: Missing, damaged, or of a type without a largest value.
    """
    image_CHW = read_image(path)
    if image_CHW.dtype not in (np.uint8, np.uint16):
        fix = "export it as grey of 8 or 16 bits"
        raise DataError(
            "The picture has no fixed range.", where=f"{path}: {image_CHW.dtype}", fix=fix, code="image_depth"
        )
    if image_CHW.shape[0] == 1:
        return image_CHW[0]
    red, green, blue = image_CHW.astype(np.uint64)  # the sum is below 2**32, its rounding must not wrap
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(image_CHW.dtype)


def to_unit(image_HW: np.ndarray) -> np.ndarray:
    """float32 in [0, 1]: always divided by the largest value of the type, whatever the picture's own maximum."""
    return image_HW.astype(np.float32) / np.float32(np.iinfo(image_HW.dtype).max)


def read_planes(triple: Triple) -> tuple[np.ndarray, np.ndarray]:
    """CT and PET (H, W) as stored, of one size.

    Raises:
        DataError: As ``read_luminance``; two sizes, or a side below ``MIN_SIDE``.
    """
    ct, pet = read_luminance(triple.ct), read_luminance(triple.pet)
    check_sizes({"CT": (triple.ct, ct), "PET": (triple.pet, pet)})
    return ct, pet


def read_pair(triple: Triple) -> np.ndarray:
    """(2, H, W) float32 in [0, 1]: CT, then PET; of training and inference alike.

    Raises:
        DataError: As ``read_planes``.
    """
    return np.stack([to_unit(plane) for plane in read_planes(triple)])


def read_pet_ct_mask(path: Path, *, threshold: int | None = None) -> np.ndarray:
    """(H, W) uint8 of 0 and 1.

    Args:
        path: Picture of 0 and 1 or of 0 and 255.
        threshold: Values above it are the lesion, whatever they are.

    Raises:
        DataError: As ``read_luminance``; other values without a threshold, telling which were found.
    """
    mask_HW = read_luminance(path)
    if threshold is not None:
        return (mask_HW > threshold).astype(np.uint8)
    values, counts = np.unique(mask_HW, return_counts=True)
    if not (set(values.tolist()) <= {0, 1} or set(values.tolist()) <= {0, 255}):
        found = ", ".join(f"{value} ({count} px)" for value, count in zip(values[:8], counts[:8], strict=True))
        more = f" and {len(values) - 8} more" if len(values) > 8 else ""
        raise DataError(
            "The mask holds other values than 0 and 1 or 0 and 255.",
            where=f"{path}: {found}{more}",
            fix="mend it, or tell above which value a pixel is lesion with --mask-threshold",
            code="mask_values",
        )
    return (mask_HW > 0).astype(np.uint8)


def read_labelled(triple: Triple, *, mask_threshold: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CT, PET (H, W) as stored and mask (H, W) uint8 of 0 and 1, all of one size.

    Raises:
        DataError: As ``read_planes`` and ``read_pet_ct_mask``.
        ValueError: A triple without mask.
    """
    if triple.mask is None:
        raise ValueError(f"{triple.name} was found without masks")
    ct, pet = read_planes(triple)
    mask = read_pet_ct_mask(triple.mask, threshold=mask_threshold)
    check_sizes({"CT": (triple.ct, ct), "PET": (triple.pet, pet), "mask": (triple.mask, mask)})
    return ct, pet, mask


def check_sizes(pictures: Mapping[str, tuple[Path, np.ndarray]]) -> None:
    """Refuse pictures of one slice that differ in size, or are too small.

    Raises:
        DataError: With all sizes.
    """
    sizes = {array.shape for _, array in pictures.values()}
    where = "\n".join(f"{path}: {array.shape[0]} x {array.shape[1]} px" for path, array in pictures.values())
    if len(sizes) > 1:
        fix = "export them again on one grid; nothing is resized here"
        raise DataError(f"{' and '.join(pictures)} differ in size.", where=where, fix=fix, code="size_mismatch")
    if min(sizes.pop()) < MIN_SIDE:
        raise DataError(
            "The slice is too small.", where=where, fix=f"use {MIN_SIDE} px a side or more", code="size_small"
        )


def read_all_labelled(
    triples: Sequence[Triple], *, mask_threshold: int | None = None, workers: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``read_labelled`` of each triple in order, by several threads; bad files are told together, after the last.

    Raises:
        DataError: One bad file, or all of them in one message, once the good ones were given.
    """
    faults: list[DataError] = []

    def read(triple: Triple) -> tuple[np.ndarray, np.ndarray, np.ndarray] | DataError:
        try:
            return read_labelled(triple, mask_threshold=mask_threshold)
        except DataError as error:
            return error

    threads = max(1, worker_count(workers))
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(triples), 16 * threads):  # so that few decoded pictures wait at a time
            for answer in pool.map(read, triples[start : start + 16 * threads]):
                if isinstance(answer, DataError):
                    faults.append(answer)
                else:
                    yield answer
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise DataError(
            f"{len(faults)} slices cannot be used.",
            where=_listed([f"{fault.what} {fault.where}".replace("\n", "; ") for fault in faults]),
            fix="mend or remove them; " + "; ".join(dict.fromkeys(fault.fix for fault in faults)),
            code="slices_bad",
        )
