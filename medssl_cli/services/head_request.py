"""What the user asked `medssl train-head` for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medssl_cli.data.feature_store import is_features
from medssl_cli.data.store import default_cache
from medssl_cli.services.lookup import model_paths

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

    def inputs(self) -> list[Path]:
        """What is read, and must not be deleted."""
        named = (self.data, self.labels, self.splits, self.split_csv, self.config)
        paths = [Path(path) for path in named if path is not None and Path(path).exists()]
        models = [] if is_features(self.data) else model_paths(self.model)
        return [*paths, *models, default_cache(self.cache)]
