"""Which predicted label map belongs to which reference: folders matched by the names of their files.

A folder holds one file a case (``case.nii.gz``, ``case_segmentation.nii.gz``), or one folder a case with its label map
inside. What has no partner is named, never paired by position.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.images import volume_stem
from medssl_cli.data.label_maps import LabelSpec, spec_of_names
from medssl_cli.data.manifest import nearest_id, read_ids, say_some
from medssl_cli.services.evaluate_masks_request import is_mask_file

log = logging.getLogger(__name__)

SEGMENTATION, PROBABILITIES = "_segmentation", "_probabilities"
"""What `medssl infer` appends to the name of a case."""
RESULTS = "predictions"
"""Folder of masks in the results of `medssl infer` on pictures and of `medssl eval --save-predictions`."""
_LABEL_STEMS = ("label", "labels", "mask", "masks", "seg", "segmentation", "gt", "roi", "lesion")
"""Of a folder of a case with several files, the first of these that there is."""
_ENDING = re.compile(
    r"[_-](?:segmentations?|seg|masks?|labels?|gt|annotations?|manual\d*|\d(?:st|nd|rd|th)[_-]?(?:HO|observer|manual))$",
    re.IGNORECASE,
)
_IMAGE_FOLDERS = ("images", "image", "imagesTr", "imagesTs", "img", "imgs", "CT", "ct")


@dataclass(frozen=True)
class MaskPair:
    """The files of one case.

    Args:
        case_id: Name of the reference without its suffix.
        name: The reference below its folder.
        prediction: Label map, or probabilities of one structure or of each class.
        reference: Label map.
        probability: Probabilities beside a label map.
    """

    case_id: str
    name: str
    prediction: Path
    reference: Path
    probability: Path | None = None


@dataclass(frozen=True)
class Pairs:
    """Cases with both label maps, and what is left over.

    Args:
        pairs: In order of the case ids.
        missing: (case id, reference, what is missing) of references without a prediction.
        extra: Predictions without a reference.
    """

    pairs: tuple[MaskPair, ...]
    missing: tuple[tuple[str, Path, str], ...]
    extra: tuple[str, ...]


def find_pairs(
    prediction: Path,
    reference: Path,
    probabilities: Path | None = None,
    label: str | None = None,
    split_csv: Path | None = None,
) -> Pairs:
    """Match predictions to references.

    Args:
        prediction, reference: Two folders, or two files.
        probabilities: Folder (or file) of probability maps of the same cases.
        label: Name, without suffix, of the label map in the folder of a case of the references; of the predictions
            too where it is there.
        split_csv: Which references; all if None. Predictions of others are passed over.

    Raises:
        DataError: Nothing there, one case with two files, or an id of the list without a reference.
    """
    if (prediction / RESULTS).is_dir():
        prediction = prediction / RESULTS
        log.info("Predictions: %s", hide_home(str(prediction)))
    if prediction.is_file() and reference.is_file():
        probability = probabilities if probabilities is None or probabilities.is_file() else None
        pair = MaskPair(_stem(reference), reference.name, prediction, reference, probability)
        return _with_probabilities(Pairs((pair,), (), ()), None if probability else probabilities)
    references = _named(reference, label, "references")
    predictions = _named(prediction, label, "predictions")
    found = _matched(references, predictions, SEGMENTATION)
    if split_csv is not None:
        chosen = _listed(split_csv, references)
        passed = {found[case] for case in references if case in found and case not in chosen}
        predictions = {name: path for name, path in predictions.items() if path not in passed}
        references = {case: path for case, path in references.items() if case in chosen}
        found = {case: path for case, path in found.items() if case in chosen}
    references, found = _by_shared_name(references, predictions, found)
    pairs = tuple(
        MaskPair(case, _below(path, reference), found[case], path)
        for case, path in sorted(references.items())
        if case in found
    )
    used = set(found.values())
    hints = [name for name, path in predictions.items() if path not in used]
    missing = tuple(
        (case, path, f"no prediction in {hide_home(str(prediction))}{nearest_id(case, hints)}")
        for case, path in sorted(references.items())
        if case not in found
    )
    extra = tuple(sorted(_below(path, prediction) for path in predictions.values() if path not in used))
    return _with_probabilities(Pairs(pairs, missing, extra), probabilities)


def _listed(split_csv: Path, references: Mapping[str, Path]) -> set[str]:
    """The references that a list names: by case, by file with or without suffix, or by the picture of that name.

    Raises:
        DataError: An id that names none, or several.
    """
    named: dict[str, set[str]] = defaultdict(set)
    for case, path in references.items():
        for name in (case, path.name, core_name(PurePosixPath(case).name)):
            named[name].add(case)
    chosen, wrong = set(), []
    for given in read_ids(split_csv).ids:
        options = named.get(given) or named.get(core_name(_stem(Path(PurePosixPath(given).name))), set())
        if len(options) == 1:
            chosen |= options
        else:
            wrong.append(given)
    if wrong:
        raise DataError(
            f"{counted(len(wrong), 'id')} of the list {'tells' if len(wrong) == 1 else 'tell'} no one reference.",
            where=f"{hide_home(str(split_csv))}: {say_some(wrong)}",
            fix="ids are cases or names of files; take the list of this very data set",
            code="id_unknown",
        )
    return chosen


def _by_shared_name(
    references: Mapping[str, Path], predictions: Mapping[str, Path], found: Mapping[str, Path]
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Both under the name that two files share where endings tell them apart: ``a_1stHO`` and ``a_2ndHO`` are ``a``."""
    stems = {path: name for name, path in predictions.items()}
    shared = {}
    for case in references:
        alike = case in found and stems[found[case]] in (case, f"{case}{SEGMENTATION}")
        core = core_name(case)
        shared[case] = core if case in found and not alike and core not in references else case
    renamed = {shared[case]: path for case, path in references.items()}
    return renamed, {shared[case]: path for case, path in found.items()}


def _with_probabilities(pairs: Pairs, folder: Path | None) -> Pairs:
    """Each pair with its probability map; a case without one is missing."""
    if folder is None:
        return pairs
    known = _named(folder, None, "probabilities", PROBABILITIES)
    found = _matched({pair.case_id: pair.reference for pair in pairs.pairs}, known, PROBABILITIES)
    kept = tuple(replace(pair, probability=found[pair.case_id]) for pair in pairs.pairs if pair.case_id in found)
    where = hide_home(str(folder))
    lost = tuple(
        (p.case_id, p.reference, f"no probabilities in {where}") for p in pairs.pairs if p.case_id not in found
    )
    return Pairs(kept, (*pairs.missing, *lost), pairs.extra)


def _matched(references: Mapping[str, Path], others: Mapping[str, Path], ending: str) -> dict[str, Path]:
    """Reference -> the file of its name, with or without ``ending``; of the rest those alike but for usual endings.

    Raises:
        DataError: Two files for one reference.
    """
    found: dict[str, Path] = {}
    for case in references:
        options = [others[name] for name in (case, f"{case}{ending}") if name in others]
        if len(options) > 1:
            raise _two_files(case, options)
        if options:
            found[case] = options[0]
    used = set(found.values())
    left = _by_core(name for name in references if name not in found)
    right = _by_core(name for name, path in others.items() if path not in used)
    for core, names in left.items():
        if len(names) == 1 and len(right.get(core, ())) == 1:
            found[names[0]] = others[right[core][0]]
    return found


def _by_core(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what remains without endings such as ``_mask``."""
    cores: dict[str, list[str]] = defaultdict(list)
    for name in names:
        cores[core_name(name)].append(name)
    return cores


def core_name(name: str) -> str:
    """A name without the endings that label maps have: ``Image_01L_1stHO`` -> ``Image_01L``."""
    while (shorter := _ENDING.sub("", name)) != name and shorter:
        name = shorter
    return name


def _stem(path: Path) -> str:
    return volume_stem(path) or path.stem


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if root.is_dir() else path.name


def _named(root: Path, label: str | None, what: str, ending: str = SEGMENTATION) -> dict[str, Path]:
    """Files by name of their case.

    Raises:
        DataError: None, or two of one name.
    """
    if root.is_file():
        return {_stem(root): root}
    if not root.is_dir():
        raise DataError(
            f"The {what} are missing.", where=hide_home(str(root)), fix="check the path", code="root_missing"
        )
    files = _flat(root, ending)
    if not files:
        only_label = bool(label) and what == "references"
        files = [entry for folder in _folders(root) for entry in _of_folder(folder, root, label, ending, only_label)]
    if not files:
        raise DataError(
            f"The folder of {what} holds no label map.",
            where=hide_home(str(root)),
            fix="name a folder of .nii.gz, .png or .npy files, one a case, or of one folder a case",
            code="masks_missing",
        )
    named: dict[str, list[Path]] = defaultdict(list)
    for name, path in files:
        named[name].append(path)
    for name, paths in named.items():
        if len(paths) > 1:
            raise _two_files(name, paths)
    return {name: paths[0] for name, paths in named.items()}


def _flat(root: Path, ending: str) -> list[tuple[str, Path]]:
    files = [(_stem(path), path) for path in sorted(root.iterdir()) if path.is_file() and is_mask_file(path)]
    other = PROBABILITIES if ending == SEGMENTATION else SEGMENTATION
    return [(stem, path) for stem, path in files if not stem.endswith(other)]


def _folders(root: Path) -> list[Path]:
    return [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]


def _of_folder(
    folder: Path, root: Path, label: str | None, ending: str, only_label: bool = False
) -> list[tuple[str, Path]]:
    """(name of the case, file) of a folder: its one label map, or every picture of a folder of pictures.

    ``only_label``: nothing but the file called ``label`` counts.

    Raises:
        DataError: Several volumes of which none is known to be the label map.
    """
    name = folder.relative_to(root).as_posix()
    files = _flat(folder, ending)
    by_stem = dict(files)
    usual = [f"{name}{ending}", name, *(_LABEL_STEMS if ending == SEGMENTATION else ("probabilities",))]
    for stem in [*([label] if label else []), *([] if only_label else usual)]:
        if stem in by_stem:
            return [(name, by_stem[stem])]
    if only_label or not files:
        return []
    if len(files) == 1:
        return [(name, files[0][1])]
    if any(volume_stem(path) is not None for _, path in files):
        raise DataError(
            "Several volumes lie in the folder of a case, and none is known to be its label map.",
            where=f"{hide_home(str(folder))}: {say_some(stem for stem, _ in files)}",
            fix="name the label map without its suffix, e.g. --label lesion",
            code="label_ambiguous",
        )
    return [(f"{name}/{stem}", path) for stem, path in files]


def _two_files(case: str, paths: Iterable[Path]) -> DataError:
    return DataError(
        "One case has two files.",
        where=f"{case}: {', '.join(hide_home(str(path)) for path in paths)}",
        fix="keep one of them in the folder",
        code="case_twice",
    )


# --- what lies beside label maps -------------------------------------------------------------------------------------


def spec_beside(reference: Path) -> tuple[LabelSpec, Path] | None:
    """Classes told by a ``dataset.json`` in the folder of the references or above it, and that file.

    Raises:
        DataError: Its labels cannot be read.
    """
    folder = reference if reference.is_dir() else reference.parent
    for path in (folder / "dataset.json", folder.parent / "dataset.json"):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        labels = data.get("labels") if isinstance(data, dict) else None
        if isinstance(labels, dict) and labels:
            return spec_of_names(labels), path
    return None


def image_beside(pair: MaskPair) -> Path | None:
    """The image that a label map was drawn on, as far as the folders tell; only for pictures in the report."""
    folder = pair.reference.parent
    core = core_name(_stem(pair.reference))
    for name in _IMAGE_FOLDERS:
        near = folder.parent / name
        if near.is_dir() and near != folder:
            for path in sorted(near.iterdir()):
                if is_mask_file(path) and _stem(path) in (core, _stem(pair.reference), f"{core}_0000"):
                    return path
    if folder.name == pair.case_id:
        beside = [path for path in sorted(folder.iterdir()) if is_mask_file(path) and path != pair.reference]
        beside = [path for path in beside if _stem(path) not in _LABEL_STEMS]
        return beside[0] if beside else None
    return None


def say_missing(missing: Iterable[tuple[str, Path, str]]) -> DataError:
    """The error of references without a prediction."""
    entries = [f"{case}: {why}" for case, _, why in missing]
    more = f"\nand {len(entries) - 8} more" if len(entries) > 8 else ""
    return DataError(
        f"{counted(len(entries), 'case')} of the reference without a prediction.",
        where="\n".join(entries[:8]) + more,
        fix="predict every case, name those to be evaluated with --split-csv, or list what is missing with "
        "--on-error skip: a case left out is no case segmented",
        code="prediction_missing",
    )
