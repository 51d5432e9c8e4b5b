"""What each epoch of a segmentation training gave: lists by name, as plain data and as ``history.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssl_cli.core.run import plain, write_json
from medssl_cli.services.segment_job import SCORE, TRAIN_FIGURES, VAL_FIGURES

HISTORY = "history.json"
_OF_EPOCH = ("epoch", "lr", *TRAIN_FIGURES)
_OF_VALIDATION = ("val_epoch", *VAL_FIGURES, SCORE)
_NAMES = (*_OF_EPOCH, *_OF_VALIDATION)

DEFINITIONS = {
    "epoch": "number of the epoch, from 1; the lists train_... and lr have one entry for each",
    "lr": "learning rate of the last update of the epoch",
    "train_loss": "mean over the training samples of the epoch, augmented, while the weights move",
    "train_dice": "mean over the same samples at probability 0.5; not over batches",
    "train_iou": "as train_dice",
    "train_f1": "as train_dice",
    "train_hd95": "of the last batch of the epoch alone, in pixels; null where a side is empty in all its samples, and "
    "for an epoch after which the run was cut off before its figures were taken",
    "val_epoch": "epochs after which the averaged network was validated; the lists val_... and score have one entry "
    "for each",
    "val_loss": "mean over the validation images",
    "val_dice": "mean over the validation images at probability 0.5",
    "val_iou": "as val_dice",
    "val_f1": "as val_dice",
    "val_hd95": "mean of the 95th percentile Hausdorff distance over the images in which neither side is empty, in "
    "pixels or mm as distance_unit of model.json says",
    "val_best_dice": "highest mean Dice over the swept thresholds",
    "val_best_threshold": "threshold of that Dice",
    "score": "what selects the best epoch; greater is better, of equal ones the first stays",
}
"""Of each list; they stand in ``model.json``."""


class History:
    """Lists that grow with the epochs.

    Args:
        columns: As ``to_json`` gives them; None for a run that begins.
    """

    def __init__(self, columns: Mapping[str, Any] | None = None) -> None:
        given = columns or {}
        self._columns: dict[str, list[Any]] = {name: list(given.get(name, ())) for name in _NAMES}

    def __len__(self) -> int:
        return len(self._columns["epoch"])

    def __getitem__(self, name: str) -> list[Any]:
        return self._columns[name]

    def add_epoch(self, epoch: int, lr: float, figures: Mapping[str, float | None]) -> None:
        """Take note of a finished epoch."""
        self._add(_OF_EPOCH, {"epoch": epoch, "lr": lr, **figures})

    def add_validation(self, epoch: int, figures: Mapping[str, Any]) -> None:
        """Take note of a validation."""
        self._add(_OF_VALIDATION, {"val_epoch": epoch, **figures})

    def _add(self, names: tuple[str, ...], values: Mapping[str, Any]) -> None:
        for name in names:
            self._columns[name].append(plain(values.get(name)))

    def up_to(self, epoch: int) -> History:
        """The same without what came after an epoch."""
        epochs = sum(number <= epoch for number in self["epoch"])
        validations = sum(number <= epoch for number in self["val_epoch"])
        kept = {name: self[name][:epochs] for name in _OF_EPOCH}
        return History(kept | {name: self[name][:validations] for name in _OF_VALIDATION})

    def validated(self, epoch: int) -> bool:
        """Whether an epoch was validated."""
        return epoch in self["val_epoch"]

    def row(self, epoch: int) -> dict[str, Any]:
        """All figures of one epoch by name."""
        at = self["epoch"].index(epoch)
        row = {name: self[name][at] for name in _OF_EPOCH}
        if self.validated(epoch):
            at = self["val_epoch"].index(epoch)
            row |= {name: self[name][at] for name in _OF_VALIDATION}
        return row

    def to_json(self) -> dict[str, list[Any]]:
        """Lists by name, plain data."""
        return {name: list(values) for name, values in self._columns.items()}

    def write(self, run: Path) -> None:
        """``history.json``, whole or not at all."""
        write_json(run / HISTORY, self.to_json())


def read_history(run: Path) -> History | None:
    """The history of a run; None where there is none, or it is no such file."""
    try:
        data = json.loads((run / HISTORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(data, dict) and all(isinstance(data.get(name), list) for name in _NAMES)
    return History(data) if whole else None
