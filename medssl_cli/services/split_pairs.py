"""The split of a CT-PET data set: slices by patient, and the tree of the parts as links or copies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from medssl_cli.core.errors import ConfigError
from medssl_cli.core.run import atomic_path, publish_folder, say_disk_errors, temporary_folder, write_json
from medssl_cli.data.ct_pet import CtPetData, Triple, pair_folders, read_ct_pet
from medssl_cli.data.split import SPLITS, Item

Files = Literal["none", "link", "copy"]
HEADER = ("patient_id", "name")
_FOLDERS = {"CT": "CT", "PET": "PET", "mask": "masks"}


def is_pairs(source: Path) -> bool:
    """Whether a folder is a flat CT-PET data set: CT and PET side by side."""
    return source.is_dir() and pair_folders(source) is not None


def read_pairs(source: Path, patient_regex: str | None) -> CtPetData:
    """The slices of a data set that is not split yet.

    Raises:
        DataError: Files without their partner, or names that tell no patient.
        ConfigError: It has folders of a split already.
    """
    data = read_ct_pet(source, patient_regex=patient_regex)
    if "all" not in data.parts:
        raise ConfigError(
            "The data set is split already.",
            where=f"{source} has the folders {', '.join(data.parts)}",
            fix="train on it as it is, or name the flat folder that it was made of",
            code="split_already",
        )
    return data


def items_of(data: CtPetData) -> tuple[Item, ...]:
    """One item a slice, grouped by patient."""
    return tuple(Item(triple.name, triple.patient_id) for triple in data.parts["all"])


def rows_of(data: CtPetData) -> dict[str, tuple[str, ...]]:
    """What the lists tell of each slice."""
    return {triple.name: (triple.patient_id, triple.name) for triple in data.parts["all"]}


def write_tree(out: Path, data: CtPetData, parts: Mapping[str, Sequence[str]], files: Files) -> None:
    """``OUT/<part>/{CT,PET,masks}/<name>``, or the folders of PCLT20K, part by part; each part whole or not at all.

    Args:
        out: Folder of the split.
        data: As found.
        parts: Names of slices by part.
        files: Relative links, copies, or nothing: then parts of an earlier split go.
    """
    by_name = {triple.name: triple for triple in data.parts["all"]}
    for part in SPLITS:
        if (out / part).exists():
            shutil.rmtree(out / part)
        if files == "none" or not parts[part]:
            continue
        temporary = temporary_folder(out, part)
        try:
            temporary.chmod(0o755)  # made for its owner alone
            with say_disk_errors(out):
                for name in parts[part]:
                    _place(temporary, out / part, by_name[name], data.layout, files)
            publish_folder(temporary, out / part)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_info(out: Path, data: CtPetData, parts: Mapping[str, Sequence[str]], facts: Mapping[str, Any]) -> None:
    """``split_info.json``: the settings, how much there is, and whose slices each part holds."""
    patient_of = {triple.name: triple.patient_id for triple in data.parts["all"]}
    sets: dict[str, Any] = {}
    for part in SPLITS:
        patients = sorted({patient_of[name] for name in parts[part]})
        sets[f"{part}_set"] = {
            "patient_count": len(patients),
            "file_count": len(parts[part]),
            "patient_ids": patients,
            "sha256": facts["sha256"][part],
        }
    statistics = {"total_patients": len(set(patient_of.values())), "total_files": len(patient_of)}
    config = {key: facts[key] for key in ("ratios", "seed", "files", "layout")}
    write_json(out / "split_info.json", {"split_config": config, "statistics": statistics, **sets})


def _place(temporary: Path, final: Path, triple: Triple, layout: str, files: Files) -> None:
    for kind, path in triple.files.items():
        inside = Path(path.parent.name, path.name) if layout == "pclt20k" else Path(_FOLDERS[kind], triple.name)
        target = temporary / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        if files == "link":
            os.symlink(os.path.relpath(path.resolve(), (final / inside).parent.resolve()), target)
        else:
            with atomic_path(target) as writing:
                shutil.copyfile(path, writing)
