"""From a data root to cases and a prepared store, with the gates that every training command shares."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.data.checks import check_geometry
from medssl_cli.data.copies import refuse_copies
from medssl_cli.data.datasets import DataConfig, ImageDataset, SliceDataset
from medssl_cli.data.images import IMAGE_SUFFIXES, VOLUME_SUFFIXES, is_image, volume_stem
from medssl_cli.data.layouts import (
    LayoutName,
    detect_layout,
    foreign_layout,
    layout_channels,
    read_layout_cases,
    select_cases,
)
from medssl_cli.data.manifest import (
    IMAGE,
    check_no_overlap,
    read_case,
    read_cases,
    read_ids,
    read_image_cases,
    read_owners,
    read_table_cases,
    say_some,
    split_digest,
)
from medssl_cli.data.modalities import modality_folder
from medssl_cli.data.npy import GEOMETRY_NOTE, is_npy, npy_kind
from medssl_cli.data.store import Store

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
Kind = Literal["volumes", "images"]
Failure = tuple[str, str, str, str]
"""(case_id, path, reason, fix)."""
_SHOWN = 10


@dataclass(frozen=True)
class TrainingData:
    """Cases of a run and what is known of them before a voxel is read.

    Args:
        cases: In order of their ids.
        kind: ``volumes`` or ``images``.
        split_digest: SHA-256 of the sorted ids.
        unreadable: Cases left out with ``on_error: skip``.
        config: As given, with what the data tell: the sequences that a layout names, and whether slices are pictures.
        layout: How the files are named.
    """

    cases: list[Case]
    kind: Kind
    split_digest: str
    unreadable: list[Failure]
    config: DataConfig
    layout: LayoutName


@dataclass(frozen=True)
class _Source:
    """Where cases come from.

    Args:
        root: Folder or table; below ``data.root`` where a modality has a folder of its own.
        layout: How the files are named.
        config: In force.
    """

    root: Path
    layout: LayoutName
    config: DataConfig


def read_training_data(config: DataConfig, *, every_split: bool = False, compare_lists: bool = True) -> TrainingData:
    """Read the cases that a config names, and refuse a split that leaks.

    Args:
        config: In force.
        every_split: Keep the cases of all splits that folders, lists or a column tell, instead of ``data.split``;
            whoever asks for them compares the splits, and calls ``tell_absent`` with all of them.
        compare_lists: Compare with the sibling lists of a split; False for who reads and compares all of them.

    Raises:
        ConfigError: No data root was given, or settings that do not fit what lies there.
        DataError: Missing or unreadable cases, cases without any of the sequences, headers that contradict each other,
            or a leak between splits.
    """
    if not config.root:
        raise ConfigError(
            "No data was named.", where="data.root", fix="pass --data ROOT, or set data.root", code="data_missing"
        )
    root = Path(config.root)
    root = modality_folder(root, config.modality) if config.modality else root
    source = _with_channels(_Source(root, _layout(config, root), config))
    unreadable: list[Failure] = []
    split_csv = None if config.split_csv is None else Path(config.split_csv)
    cases = _read(source, split_csv, unreadable)
    if split_csv is None and not every_split:
        cases = _of_split(source, cases)
    if source.layout not in ("cases", "images"):
        cases = _there(source, cases, unreadable)
    kind = _kind(source, cases)
    config = source.config if kind == "images" else _as_pictures(source)
    if kind == "volumes":
        cases = _with_sequences(config, source.root, cases, unreadable)
        cases = _in_place(config, cases, unreadable)
        if not every_split:
            tell_absent(cases, config.mri_sequences)
    if compare_lists:
        _refuse_leak(source, split_csv, cases)
    digest = split_digest(case.case_id for case in cases)
    return TrainingData(cases, kind, digest, unreadable, config, source.layout)


def build_dataset(store: Store, config: DataConfig, seed: int) -> SliceDataset | ImageDataset:
    """Slices of volumes, or whole pictures."""
    return SliceDataset(store, config, seed) if store.kind == "volumes" else ImageDataset(store)


# --- what lies there -------------------------------------------------------------------------------------------------


def _layout(config: DataConfig, root: Path) -> LayoutName:
    if config.layout != "auto":
        return config.layout
    if config.kind == "auto" or config.template:
        return detect_layout(root, config.template)
    if root.is_file():
        return "table"
    return "images" if config.kind == "images" else foreign_layout(root) or "cases"


def _with_channels(source: _Source) -> _Source:
    """The source with the sequences that its layout names, where the user named none.

    Raises:
        ConfigError: Several sequences for a table, which has one file in each row.
    """
    config, layout = source.config, source.layout
    named = "mri_sequences" in config.model_fields_set
    if layout == "table":
        names: tuple[str, ...] = config.mri_sequences if named else (IMAGE,)
        if len(names) > 1:
            raise ConfigError(
                "A row of a series table is a volume of one sequence.",
                where=f"data.mri_sequences: {', '.join(names)}; {source.root}",
                fix=f"set data.mri_sequences={IMAGE}, or put the sequences of a case into one folder",
                code="table_sequences",
            )
    else:
        names = config.mri_sequences if named else layout_channels(source.root, layout) or config.mri_sequences
    if names == config.mri_sequences:
        return source
    if layout != "table":
        log.info("sequences: %s, as the layout %s names them", ", ".join(names), layout)
    return replace(source, config=config.model_copy(update={"mri_sequences": names}))


def _as_pictures(source: _Source) -> DataConfig:
    """The config, with slices as plain pictures where windows ask for them, or a table of nameless volumes."""
    config = source.config
    plain = source.layout == "table" and config.mri_sequences == (IMAGE,)
    if config.as_pictures is None and (plain or config.windows_hu is not None):
        return config.model_copy(update={"as_pictures": True})
    return config


def _kind(source: _Source, cases: list[Case]) -> Kind:
    if source.layout == "images":
        return "images"
    if source.layout != "table":
        return "volumes"
    if source.config.kind != "auto":
        return source.config.kind
    found: dict[Kind, str] = {}
    for case in cases:
        for sequence in case.sequences.values():
            kind = _kind_of(sequence.path)
            if kind is not None:
                found.setdefault(kind, case.case_id)
    if len(found) > 1:
        raise DataError(
            "A table holds pictures or volumes, not both.",
            where=f"{source.root}: {', '.join(f'{case_id} is of {kind}' for kind, case_id in found.items())}",
            fix="make a table of each, or set data.kind where arrays of three axes are taken for pictures",
            code="table_mixed",
        )
    return next(iter(found), "images")


def _kind_of(path: Path) -> Kind | None:
    """What a file holds; None for an array of three axes of which one may be colours."""
    if not is_npy(path):
        return "volumes" if volume_stem(path) is not None else "images"
    try:
        kinds: dict[str, Kind | None] = {"picture": "images", "volume": "volumes", "either": None}
        return kinds[npy_kind(path)]
    except DataError:  # whoever reads the values says what is wrong with the file
        return None


def _read(source: _Source, split_csv: Path | None, unreadable: list[Failure] | None = None) -> list[Case]:
    """Cases of the source in order of their ids; with ``on_error: skip`` those that cannot be read are listed."""
    root, config = source.root, source.config
    on_fault: Callable[[str, DataError], None] | None = None
    if config.on_error == "skip" and unreadable is not None:

        def on_fault(case_id: str, error: DataError) -> None:
            unreadable.append((case_id, str(root / case_id), error.what, error.fix))

    if source.layout == "images":
        return read_image_cases(root, split_csv=split_csv)
    if source.layout == "cases":
        return read_cases(root, config.mri_sequences, split_csv=split_csv, roi=config.roi, on_fault=on_fault)
    if source.layout == "table":
        rows = read_table_cases(root, sequence=config.mri_sequences[0], split_csv=split_csv)
        return sorted(rows, key=lambda case: case.case_id)
    cases = read_layout_cases(
        root, source.layout, config.mri_sequences, roi=config.roi, template=config.template, on_fault=on_fault
    )
    return cases if split_csv is None else select_cases(cases, split_csv)


def _of_split(source: _Source, cases: list[Case]) -> list[Case]:
    """The cases of ``data.split``, where folders, lists or a column tell the split; else all.

    Raises:
        DataError: No case is of that split, or one image lies in two of them.
    """
    counts = Counter(case.split for case in cases)
    if set(counts) == {""}:
        return cases
    noun, wanted = "picture" if source.layout == "images" else "case", source.config.split.lower()
    chosen = [case for case in cases if case.split == wanted]
    if not chosen:
        move = f"move {noun}s to {source.root / wanted}, " if source.layout == "images" else ""
        raise DataError(
            f"No {noun} is of the split {wanted}.",
            where=f"{source.root}: {_say_counts(counts)}",
            fix=f"set data.split to one of these, {move}or name them in data.split_csv",
            code="split_empty",
        )
    splits = {name: [case for case in cases if case.split == name] for name in counts if name}
    if source.layout not in ("images", "cases"):
        check_no_overlap(splits)
    refuse_copies(splits)
    del counts[wanted]
    if counts:
        log.warning("%d %ss of the split %s are used; left out: %s", len(chosen), noun, wanted, _say_counts(counts))
    return chosen


def _say_counts(counts: Counter[str]) -> str:
    return ", ".join(
        f"{count} {f'of {name}' if name else 'in no split folder'}" for name, count in sorted(counts.items())
    )


def _there(source: _Source, cases: list[Case], unreadable: list[Failure]) -> list[Case]:
    """The cases whose files are there and of a kind that is read; others are refused, or listed with ``skip``."""
    faults: list[Failure] = []
    for case in cases:
        paths = [*(sequence.path for sequence in case.sequences.values()), *([case.roi] if case.roi else [])]
        for path in paths:
            reason = _reason_against(path)
            if reason:
                faults.append((case.case_id, str(path), reason, "correct the path, or leave the case out"))
                break
    if faults and (source.config.on_error == "stop" or len(faults) == len(cases)):
        more = f"\nand {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DataError(
            f"{len(faults)} of {len(cases)} files that {source.root.name} names cannot be used.",
            where="\n".join(f"case {name}: {path}: {reason}" for name, path, reason, _ in faults[:_SHOWN]) + more,
            fix="correct the paths, or leave these cases out; a relative path counts from the folder "
            "of the table, or from the one that the environment variable DATASETS_DIR names",
            code="file_missing",
        )
    unreadable += faults
    bad = {fault[0] for fault in faults}
    return [case for case in cases if case.case_id not in bad]


def _reason_against(path: Path) -> str:
    if not path.exists():
        return "there is no such file"
    if not path.is_file():
        return "it is no file"
    if volume_stem(path) is None and not is_image(path):
        return f"it is none of {', '.join((*VOLUME_SUFFIXES, *IMAGE_SUFFIXES))}"
    return ""


# --- sequences -------------------------------------------------------------------------------------------------------


def _with_sequences(config: DataConfig, root: Path, cases: list[Case], unreadable: list[Failure]) -> list[Case]:
    """The cases that have at least one of the sequences; the others are refused, or listed with ``on_error: skip``."""
    bare = [case for case in cases if not case.sequences]
    if not bare:
        return cases
    asked = ", ".join(config.mri_sequences)
    fix = "check data.mri_sequences and the file names, or leave these cases out"
    if len(bare) == len(cases) or config.on_error == "stop":
        raise DataError(
            f"{len(bare)} of {len(cases)} cases have none of the sequences asked for.",
            where=f"{root}: asked for {asked}; cases {say_some(case.case_id for case in bare)}",
            fix=fix,
            code="sequences_missing",
        )
    for case in bare:
        unreadable.append((case.case_id, str(root / case.case_id), f"none of the sequences {asked}", fix))
    return [case for case in cases if case.sequences]


def _in_place(config: DataConfig, cases: list[Case], unreadable: list[Failure]) -> list[Case]:
    """The cases whose headers agree; others are refused, all in one message, or listed with ``on_error: skip``."""
    faults, told = [], Counter[str]()
    for case in cases:
        findings = check_geometry(case)
        told.update(finding.code for finding in findings if finding.severity == "warning")
        faults += [finding for finding in findings if finding.severity == "error"][:1]
    if any(is_npy(sequence.path) for case in cases for sequence in case.sequences.values()):
        log.warning("%s", GEOMETRY_NOTE)
    for code, count in told.items():
        log.warning("%s: %d files; `medssl check-data` tells more", code, count)
    if faults and config.on_error == "stop":
        more = f"\nand {len(faults) - 10} more" if len(faults) > 10 else ""
        raise DataError(
            f"{len(faults)} of {len(cases)} cases have headers that contradict each other.",
            where="\n".join(f"case {f.case_id}: {f.path}: {f.message}" for f in faults[:10]) + more,
            fix=faults[0].fix or "convert these cases again, or leave them out",
            code=faults[0].code,
        )
    unreadable += [(f.case_id, f.path, f.message, f.fix) for f in faults]
    bad = {finding.case_id for finding in faults}
    return [case for case in cases if case.case_id not in bad]


def tell_absent(
    cases: list[Case],
    names: tuple[str, ...],
    effect: str = "Its tokens are masked there and are never a target.",
) -> None:
    """One line for each sequence that some cases lack; a sequence that no case has is refused.

    Args:
        cases: All of them.
        names: Sequences asked for.
        effect: What a missing sequence means, for the reader.

    Raises:
        DataError: No case has it: its name is wrong.
    """
    absent = {name: [case.case_id for case in cases if name not in case.sequences] for name in names}
    unknown = [name for name, ids in absent.items() if cases and len(ids) == len(cases)]
    if unknown:
        raise DataError(
            f"No case has the sequence {' or '.join(unknown)}.",
            where=f"asked for {', '.join(names)}; {len(cases)} cases, e.g. {cases[0].case_id}",
            fix="correct or drop it in data.mri_sequences: it is the stem of the file, e.g. ax_adc for ax_adc.nii.gz",
            code="sequence_unknown",
        )
    for name, ids in absent.items():
        if ids:
            log.warning("%s is absent in %d of %d cases: %s. %s", name, len(ids), len(cases), say_some(ids), effect)


# --- leaks -----------------------------------------------------------------------------------------------------------


def _refuse_leak(source: _Source, split_csv: Path | None, cases: list[Case]) -> None:
    """Compare with the sibling lists that `medssl split` wrote beside the one in use, or beside the table itself.

    A list that holds something else is compared as far as it can be read: a sibling may name cases that were never
    copied to this disk.
    """
    used = split_csv or (source.root if source.layout == "table" else None)
    if used is None or used.stem not in SPLITS:
        return
    splits = {used.stem: cases}
    for name in SPLITS:
        sibling = used.with_name(f"{name}{used.suffix}")
        if name != used.stem and sibling.is_file():
            splits[name] = _sibling_cases(source, sibling, is_table=split_csv is None)
    check_no_overlap(splits)
    refuse_copies(splits)


def _sibling_cases(source: _Source, sibling: Path, *, is_table: bool) -> list[Case]:
    if source.layout == "cases":
        return _sibling_folders(source, sibling)
    try:
        return _read(replace(source, root=sibling), None) if is_table else _read(source, sibling)
    except DataError as error:  # it names what is not here, or is another kind of table
        log.debug("%s is compared by its names alone: %s", sibling, error.what)
        return [Case(name, name) for name in read_ids(sibling).ids]


def _sibling_folders(source: _Source, sibling: Path) -> list[Case]:
    root, config = source.root, source.config
    owners = read_owners(root)
    cases = []
    for name in read_ids(sibling).ids:
        owner = owners.get(name)
        case = Case(name, owner.patient_id if owner and owner.patient_id else name)
        try:
            case = read_case(root, name, config.mri_sequences, roi=config.roi, owners=owners)
        except DataError as error:  # not here, or unreadable: its names still count
            log.debug("%s: %s is compared by its name alone: %s", sibling, name, error.what)
        cases.append(case)
    return cases
