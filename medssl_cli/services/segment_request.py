"""What the user typed for ``medssl segment``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medssl_cli.core.errors import ConfigError

COMMAND = "segment"

SegmentTask = Literal["semantic", "ct-pet"]
TASKS: tuple[SegmentTask, ...] = ("semantic", "ct-pet")


@dataclass(frozen=True)
class SegmentRequest:
    """What the user typed. Names as the options of ``medssl segment``; None where an option was not given.

    Args:
        task: ``semantic`` or ``ct-pet``.
        splits: Folder of ``medssl split`` with ``train.csv`` and ``val.csv``.
        split_csv: Table of the cases to use, some of which are held back for validation.
        model: Backbone of the semantic task: run or weight file.
        label, classes, group_pattern: Flags of the semantic task over the keys of the same name under ``data``.
        resume_ckpt: Checkpoint to go on from: a run folder, its ``last``, or one ``step_…`` folder in it.
        epochs, lr, batch_size, loss_type, dice_weight, ce_weight, pos_weight, val_ratio, val_freq, save_freq: Flags
            over the keys of the same meaning in the config.
        dataset_type, patient_regex, mask_threshold, vgg_weights: Flags of the ct-pet task.
        allowed_changes: Keys of ``--allow-config-change``.
    """

    task: str
    config: str | None = None
    overrides: tuple[str, ...] = ()
    data: Path | None = None
    splits: Path | None = None
    split_csv: Path | None = None
    out: Path | None = None
    model: Path | None = None
    label: str | None = None
    classes: str | None = None
    group_pattern: str | None = None
    gpus: int = 1
    resume: bool = True
    resume_ckpt: Path | None = None
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    loss_type: str | None = None
    dice_weight: float | None = None
    ce_weight: float | None = None
    pos_weight: float | None = None
    val_ratio: float | None = None
    val_freq: int | None = None
    save_freq: int | None = None
    dataset_type: str | None = None
    patient_regex: str | None = None
    mask_threshold: int | None = None
    vgg_weights: str | None = None
    device: str = "auto"
    precision: str | None = None
    seed: int | None = None
    workers: int | None = None
    cache: Path | None = None
    on_error: str | None = None
    dry_run: bool = False
    smoke: bool = False
    allowed_changes: tuple[str, ...] = ()
    overwrite: bool = False

    @property
    def recipe(self) -> str:
        """Name of the recipe or config file, for people."""
        return Path(self.config).stem if self.config else f"segment-{self.task}"

    def run_folder(self) -> Path:
        """Where the run goes: ``--out``, or ``runs/NAME OF CONFIG``."""
        return self.out or Path("runs") / self.recipe

    def inputs(self) -> list[Path]:
        """What the run reads and never replaces."""
        named = (self.data, self.splits, self.split_csv, self.model, self.resume_ckpt, self.cache)
        files = [Path(text) for text in (self.config, self.vgg_weights) if text is not None]
        return [path for path in (*named, *files) if path is not None and path.exists()]


def check_segment_request(request: SegmentRequest) -> None:
    """Refuse a task that is not there, and options that exclude each other or have no effect on the task.

    Raises:
        ConfigError: Naming them all.
    """
    _check_task(request.task)
    faults = []
    if request.smoke and request.dry_run:
        faults.append("--smoke and --dry-run exclude each other")
    if request.resume_ckpt is not None and not request.resume:
        faults.append("--resume-ckpt and --no-resume exclude each other")
    if request.splits is not None and request.split_csv is not None:
        faults.append("--splits and --split-csv exclude each other")
    faults += [f"{option} has no effect with --task {request.task}" for option in _without_effect(request)]
    if faults:
        raise ConfigError(
            "The options do not go together.",
            where="\n".join(faults),
            fix="leave out what you do not need; `medssl segment --help` tells what each is for",
            code="flags_exclude",
        )


def _check_task(task: str) -> None:
    if task == "instances":
        raise ConfigError(
            "Instances cannot be segmented yet: only semantic and ct-pet are there.",
            where="--task instances",
            fix="take --task semantic: one label map an image, in which touching instances of a class are one region",
            code="task_missing",
        )
    if task not in TASKS:
        raise ConfigError(
            f"There is no task {task!r}.",
            where=f"--task {task}",
            fix=f"choose one of: {', '.join(TASKS)}",
            code="task_unknown",
        )


def _without_effect(request: SegmentRequest) -> list[str]:
    """Options of the other task that were given."""
    of_ct_pet = {
        "--dataset-type": request.dataset_type,
        "--patient-regex": request.patient_regex,
        "--mask-threshold": request.mask_threshold,
        "--vgg-weights": request.vgg_weights,
    }
    of_semantic = {
        "--model": request.model,
        "--label": request.label,
        "--classes": request.classes,
        "--group-pattern": request.group_pattern,
        "--split-csv": request.split_csv,
        "--cache": request.cache,
        "--on-error": request.on_error,
    }
    others = of_semantic if request.task == "ct-pet" else of_ct_pet
    return [option for option, value in others.items() if value is not None]
