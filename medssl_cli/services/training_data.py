"""From a data root to cases and a prepared store, with the gates that every training command shares."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.data.datasets import DataConfig, ImageDataset, SliceDataset
from medssl_cli.data.manifest import check_no_overlap, detect_kind, read_cases, read_image_cases, split_digest
from medssl_cli.data.store import Store

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class TrainingData:
    """Cases of a run and what is known of them before a voxel is read.

    Args:
        cases: In order of their ids.
        kind: ``volumes`` or ``images``.
        split_digest: SHA-256 of the sorted ids.
        unreadable: (case_id, path, reason, fix) of cases left out with ``on_error: skip``.
    """

    cases: list[Case]
    kind: Literal["volumes", "images"]
    split_digest: str
    unreadable: list[tuple[str, str, str, str]]


def read_training_data(config: DataConfig) -> TrainingData:
    """Read the cases that a config names, and refuse a split that leaks.

    Raises:
        ConfigError: No data root was given.
        DataError: Missing or unreadable cases, a volume without any of the sequences, or a leak between splits.
    """
    if not config.root:
        raise ConfigError(
            "No data was named.", where="data.root", fix="pass --data ROOT, or set data.root", code="data_missing"
        )
    root = Path(config.root)
    kind = _kind(config, root)
    split_csv = None if config.split_csv is None else Path(config.split_csv)
    unreadable: list[tuple[str, str, str, str]] = []
    cases = _read(config, root, kind, split_csv, unreadable)
    if split_csv is not None:
        _refuse_leak(config, root, kind, split_csv, cases)
    return TrainingData(cases, kind, split_digest(case.case_id for case in cases), unreadable)


def build_dataset(store: Store, config: DataConfig, seed: int) -> SliceDataset | ImageDataset:
    """Slices of volumes, or whole pictures."""
    return SliceDataset(store, config, seed) if store.kind == "volumes" else ImageDataset(store)


def _kind(config: DataConfig, root: Path) -> Literal["volumes", "images"]:
    if config.kind != "auto":
        return config.kind
    found = detect_kind(root)
    if found == "table":
        raise ConfigError(
            "A series table is no input of this command yet.",
            where=str(root),
            fix="name the folder of cases; `medssl convert dicom` makes one",
            code="data_kind",
        )
    return "volumes" if found == "cases" else "images"


def _read(
    config: DataConfig,
    root: Path,
    kind: Literal["volumes", "images"],
    split_csv: Path | None,
    unreadable: list[tuple[str, str, str, str]] | None,
) -> list[Case]:
    if kind == "images":
        return read_image_cases(root, split_csv=split_csv)
    on_fault: Callable[[str, DataError], None] | None = None
    if config.on_error == "skip" and unreadable is not None:

        def on_fault(case_id: str, error: DataError) -> None:
            unreadable.append((case_id, str(root / case_id), error.what, error.fix))

    return read_cases(root, config.mri_sequences, split_csv=split_csv, roi=config.roi, on_fault=on_fault)


def _refuse_leak(
    config: DataConfig, root: Path, kind: Literal["volumes", "images"], split_csv: Path, cases: list[Case]
) -> None:
    """Compare with the sibling lists that `medssl split` wrote beside the one in use."""
    if split_csv.stem not in SPLITS:
        return
    splits = {split_csv.stem: cases}
    for name in SPLITS:
        sibling = split_csv.with_name(f"{name}{split_csv.suffix}")
        if name != split_csv.stem and sibling.is_file():
            splits[name] = _read(config.model_copy(update={"on_error": "skip"}), root, kind, sibling, [])
    check_no_overlap(splits)
