"""What ``medssl segment`` trains: the parts that the two tasks build and that one training run takes.

Letters: B samples, K neighbouring slices, S sequences, H W pixels, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from medssl_cli.core.config import Config
from medssl_cli.core.protocols import LabelledBatch
from medssl_cli.engine.memory import KeyNames
from medssl_cli.engine.precision import PrecisionName
from medssl_cli.services.segment_request import SegmentTask

if TYPE_CHECKING:
    from medssl_cli.data.labelled_slices import LabelledSource
    from medssl_cli.objectives.segmentation import SegmentationLoss

TRAIN_FIGURES = ("train_loss", "train_dice", "train_iou", "train_f1", "train_hd95")
"""Of an epoch, from ``SupervisedSegmentation.epoch_figures``."""
VAL_FIGURES = ("val_loss", "val_dice", "val_iou", "val_f1", "val_hd95", "val_best_dice", "val_best_threshold")
"""Of a validation, from ``SegmentJob.validate``."""
SCORE = "score"
"""What selects the best epoch: greater is better, strictly."""
THRESHOLD_RESULTS = "threshold_results"
"""Optional table of a validation, threshold by threshold: plain data for ``model.json``."""


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained, whatever the task.

    Args:
        epochs: Length of the run.
        batch_size: Samples of one process and micro-batch.
        accumulation: Micro-batches of an update.
        lr, min_lr: Learning rate at its highest and at the end.
        warmup_epochs: In which the rate rises from 0; with ``per: step`` only.
        weight_decay: Of AdamW.
        per: The cosine falls once an epoch, or with every step.
        ema_decay: Highest decay of the averaged network; 0: none is kept.
        val_freq: Epochs between validations; the last epoch always has one.
        save_freq: Epochs between files in ``checkpoints/``; 0 for none.
        patience: Validations without a better score after which training ends; 0: never.
        precision: Number format.
        clip_grad: Largest gradient norm of each trained part; 0 for none.
        num_workers: Loader processes; None: as many as this machine has CPUs to spare.
        seed: Of the run.
        log_every: Steps between lines of the log.
        freeze_backbone_epochs: Epochs in which a part called ``backbone`` stays as it is.
        loader_timeout_s: Longest wait for a batch.
    """

    epochs: int
    batch_size: int
    lr: float
    accumulation: int = 1
    min_lr: float = 1e-6
    warmup_epochs: float = 0.0
    weight_decay: float = 1e-4
    per: Literal["epoch", "step"] = "epoch"
    ema_decay: float = 0.999
    val_freq: int = 1
    save_freq: int = 5
    patience: int = 0
    precision: PrecisionName = "fp32"
    clip_grad: float = 0.0
    num_workers: int | None = None
    seed: int = 42
    log_every: int = 10
    freeze_backbone_epochs: int = 0
    loader_timeout_s: float = 600.0


@dataclass
class SegmentJob:
    """Everything that a training run needs to know of its task.

    Args:
        task: As typed.
        recipe: Name of the config, for people.
        config: Resolved, for ``config.yaml``, the checkpoints and their comparison on resume.
        settings: Of the training.
        network: A ``SegmentationNetwork`` on the device.
        loss: Its loss.
        classes: Names, the background first.
        groups: For ``engine.optim.build_optimizer``, as ``parameter_groups`` gives them.
        train: Training samples.
        views: (batch on the device, step, micro-batch) -> what the network takes: augmented and normalised, with all
            draws seeded by (seed, step, micro, rank).
        validate: Averaged network -> the figures ``VAL_FIGURES`` (None where not defined) and ``SCORE``, perhaps
            ``THRESHOLD_RESULTS``; called in the first process, must leave the network as it was.
        overlays: (averaged network, empty folder, threshold of the probability or None) -> some PNG there: input,
            reference (green), prediction (red).
        card: What ``model.json`` holds beyond the facts of every model: ``network`` (name and constructor arguments),
            preprocessing, mean, std, sequences, ...
        data_facts: For ``run.json`` and ``model.json``: counts by part, ``split_digest``, ``data_digest``, ``layout``.
        keys: What the keys of ``config`` are called, for advice.
        distance_unit: Of ``val_hd95``: ``px`` or ``mm``. That of the training batch is in pixels, always.
        seen: (part, case_id, patient_id) of every case that was trained or selected on, for ``cases.csv``.
        introduction: Lines for the log, e.g. counts by part and parameters.
        outputs: C, logits of a pixel.
        safe_keys: Keys of ``config`` that may change on resume: whole dotted names or last parts.
        growing_keys: Dotted names of numbers that may rise on resume.
        batch_keys: Dotted names of the numbers whose product with the processes is the samples of an update; they may
            change on resume where the product does not.
        location_keys: Dotted names of the paths of the data: in their place, ``data_digest`` and ``split_digest`` of
            ``data_facts`` are compared on resume.
        digests: Of what other paths among the keys lead to, under their dotted names; compared in their place.
        notes: What is legal and yet unlikely to be meant.
        failures: (case_id, path, reason, fix) of cases that were left out, with ``--on-error skip``.
    """

    task: SegmentTask
    recipe: str
    config: Config
    settings: TrainSettings
    network: nn.Module
    loss: SegmentationLoss
    classes: tuple[str, ...]
    groups: list[dict[str, Any]]
    train: LabelledSource
    views: Callable[[LabelledBatch, int, int], LabelledBatch]
    validate: Callable[[nn.Module], Mapping[str, Any]]
    overlays: Callable[[nn.Module, Path, float | None], None]
    card: dict[str, Any]
    data_facts: dict[str, Any]
    keys: KeyNames
    distance_unit: Literal["px", "mm"]
    seen: Sequence[tuple[str, str, str]] = ()
    introduction: Sequence[str] = ()
    outputs: int = 1
    safe_keys: frozenset[str] = frozenset()
    growing_keys: frozenset[str] = frozenset()
    batch_keys: frozenset[str] = frozenset()
    location_keys: frozenset[str] = frozenset()
    digests: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    failures: Sequence[tuple[str, str, str, str]] = ()

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.network.parameters()).device

    def parameter_counts(self) -> dict[str, int]:
        """``total``, ``trainable`` and ``frozen`` parameters of the network."""
        trainable = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.network.parameters())
        return {"total": total, "trainable": trainable, "frozen": total - trainable}
