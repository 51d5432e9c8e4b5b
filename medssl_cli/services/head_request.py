"""What the user asked `medssl train-head` for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

COMMAND = "train-head"


@dataclass(frozen=True)
class TrainHeadRequest:
    """Names as the options of ``medssl train-head``.

    Args:
        data: Features of `medssl extract`, or raw data.
        task: As typed; not yet checked.
        out: Run folder.
        config: Path or name of a recipe.
        overrides: ``KEY=VALUE``.
        labels, target: Table of labels and its columns.
        model: Backbone, for raw data.
        splits, split_csv: Lists of the cases of raw data.
        sequence: The one sequence of raw data.
        finetune: Train the backbone too.
        backbone_lr_scale: Learning rate of the backbone over that of the head; None: the default of fine-tuning.
    """

    data: Path
    task: str
    out: Path
    config: str | None = None
    overrides: tuple[str, ...] = ()
    labels: Path | None = None
    target: tuple[str, ...] = ()
    model: Path | None = None
    splits: Path | None = None
    split_csv: Path | None = None
    sequence: str | None = None
    finetune: bool = False
    backbone_lr_scale: float | None = None
    device: str = "auto"
    seed: int | None = None
    cache: Path | None = None
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False
