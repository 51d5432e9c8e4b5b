"""What is done after each epoch of a segmentation training: validation, the best model, history and pictures.

Only the averaged network is looked at, and the raw one is as it was before. The model that lies in the run folder is
the one truth about the best epoch: its card tells epoch and score, and a later epoch replaces it if it is better.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from medssl_cli.core.run import (
    SCHEMA_VERSION,
    atomic_path,
    package_version,
    plain,
    say_disk_errors,
    temporary_folder,
)
from medssl_cli.engine.checkpoint import Checkpoint, Checkpoints
from medssl_cli.engine.distributed import from_first, rank
from medssl_cli.metrics.surface import hausdorff_95
from medssl_cli.report.segment_plots import draw_segment_progress
from medssl_cli.services.lookup import SEGMENTER_CARD, SEGMENTER_WEIGHTS
from medssl_cli.services.run_folder import RunFolder, without_home
from medssl_cli.services.segment_history import DEFINITIONS, History, read_history
from medssl_cli.services.segment_job import SCORE, THRESHOLD_RESULTS, VAL_FIGURES
from medssl_cli.services.segment_request import COMMAND
from medssl_cli.services.segment_training import SegmentTraining
from medssl_cli.services.segmenter import write_model

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

EPOCHS, OVERLAYS = "checkpoints", "val_overlays"
STILL, FALLEN = 5, 0.01
"""A training loss that has not fallen by this share after so many epochs is told: once, for it may yet fall."""
DRAW_EVERY_S = 20.0
"""Least time between two pictures of the curves: a small run has epochs of less than it takes to draw one."""


class EnoughError(Exception):
    """No validation was better for as long as ``patience`` allows; ends the training in order."""


@dataclass(frozen=True)
class Kept:
    """The epoch whose model lies in the run folder."""

    epoch: int
    score: float


@dataclass
class SegmentWatch:
    """Looks on; with several processes the first one does, and the others wait.

    Args:
        training: What is looked at.
        folder: Of the run.
        checkpoints: Which keep the history.
    """

    training: SegmentTraining
    folder: RunFolder
    checkpoints: Checkpoints
    history: History = field(default_factory=History)
    kept: Kept | None = None
    stopped_early: bool = False
    _writer: SummaryWriter | None = None
    _drawn_at: float = field(default_factory=time.monotonic)

    # --- beginning and end ---

    def take_up(self, checkpoint: Checkpoint, *, same_run: bool) -> None:
        """The history up to the checkpoint, and the best model so far.

        A checkpoint is saved before its epoch is validated; the run folder may know of that validation.
        """
        epoch = self.training.epoch
        self.history = History(checkpoint.extra.get("history")).up_to(epoch)
        known = read_history(self.folder.path) if same_run else None
        if known is not None and known.up_to(len(self.history)).to_json() == self.history.to_json():
            self.history = known.up_to(epoch)
        self.kept = _read_kept(self.folder.path, self.history)
        if self.kept is None:
            if self.history["val_epoch"] and rank() == 0:
                log.warning("The best model so far is not in the run folder: the next validation writes one.")
            if self.training.trainer.steps_done == epoch * self.training.epoch_steps:
                self.history = self.history.up_to(epoch - 1)  # this epoch is validated again

    def is_finished(self) -> bool:
        """Nothing is left to train or to validate; the same in all processes."""
        trainer = self.training.trainer
        epoch = self.training.epoch
        done = trainer.steps_done >= trainer.total_steps and self.history.validated(epoch)
        return from_first(lambda: self.kept is not None and (done or self._has_enough()))

    def open(self) -> None:
        """Begin to write: TensorBoard's curves of epochs, in a folder of their own, for their steps are epochs."""
        from torch.utils.tensorboard import SummaryWriter  # costs half a second

        out, epoch = self.folder.path, self.training.epoch
        self._writer = SummaryWriter(log_dir=str(out / "tb" / "epochs"), purge_step=epoch + 1)
        if epoch:
            self.history.write(out)
        self._remember()

    def close(self) -> None:
        """Draw what has come since the last picture, and close the TensorBoard file; in the first process alone."""
        if self._writer is not None:
            self._writer.close()
            if len(self.history):
                self._draw(self.history["epoch"][-1])

    def figures(self) -> dict[str, Any]:
        """The best epoch and its figures."""
        if self.kept is None:
            return {"best_epoch": None, "best": None}
        row = self.history.row(self.kept.epoch)
        return {"best_epoch": self.kept.epoch, "best": {name: row.get(name) for name in (*VAL_FIGURES, SCORE)}}

    # --- after an epoch ---

    def after_checkpoint(self, step: int) -> None:
        """Called by the trainer in every process.

        Raises:
            EnoughError: In all processes: it has not become better for too long.
        """
        if step % self.training.epoch_steps:
            return
        epoch, settings = self.training.epoch, self.training.job.settings
        if rank() == 0 and epoch not in self.history["epoch"]:
            self._end_epoch(epoch, step)
        if from_first(self._has_enough) and epoch < settings.epochs:
            self.stopped_early = True
            log.info("Nothing better in %d validations: the training ends after epoch %d.", settings.patience, epoch)
            raise EnoughError

    def _end_epoch(self, epoch: int, step: int) -> None:
        settings = self.training.job.settings
        figures = self.training.objective.epoch_figures(_distance_px)
        self.history.add_epoch(epoch, self.training.schedule.at(step - 1)["lr"], figures)
        if epoch % settings.val_freq == 0 or epoch == settings.epochs:
            self._validate(epoch)
        if epoch == STILL:
            self._say_still()
        if settings.save_freq and epoch % settings.save_freq == 0:
            self._save_weights(self.folder.path / EPOCHS / f"epoch_{epoch:04d}.safetensors")
        self._remember()
        self._show(epoch)
        self.folder.say("running", step=step, epoch=epoch, **self.figures())
        self.history.write(self.folder.path)  # last: whoever finds the epoch here finds all else of it

    def _say_still(self) -> None:
        losses = [loss for loss in self.history["train_loss"] if loss is not None]
        if losses and min(losses) > (1 - FALLEN) * losses[0]:
            log.warning(
                "The training loss has hardly moved in %d epochs (%.4g, now %.4g): try a tenth of the learning rate "
                "(--lr), and see with `medssl check-data` whether images and label maps are the right ones.",
                STILL, losses[0], losses[-1],
            )  # fmt: skip

    def _has_enough(self) -> bool:
        patience, kept = self.training.job.settings.patience, self.kept
        if not patience or kept is None:
            return False
        return sum(epoch > kept.epoch for epoch in self.history["val_epoch"]) >= patience

    def _validate(self, epoch: int) -> None:
        """Look at the averaged network, and keep it if it is better than the one that is kept."""
        with self._averaged() as network:
            found = dict(self.training.job.validate(network))
        score = -math.inf if found.get(SCORE) is None else float(found[SCORE])
        self.history.add_validation(epoch, found)
        better = self.kept is None or score > self.kept.score
        log.info("epoch %d: %s%s", epoch, _say_row(self.history.row(epoch)), "  (best)" if better else "")
        if better:
            self._keep(epoch, found)
            self.kept = Kept(epoch, score)

    @contextmanager
    def _averaged(self) -> Iterator[nn.Module]:
        """The averaged network in eval mode; without averaging it is the trained one, which is then as it was."""
        network = self.training.objective.averaged
        modes = {name: module.training for name, module in network.named_modules()}
        network.eval()
        try:
            with torch.no_grad():
                yield network
        finally:
            for name, module in network.named_modules():
                module.training = modes[name]

    def _keep(self, epoch: int, found: Mapping[str, Any]) -> None:
        """``best.safetensors``, ``model.json`` and ``val_overlays/`` of this epoch."""
        out, card = self.folder.path, self._card(epoch, found)
        write_model(out, self.training.objective.weights(), plain(without_home(card)))
        stage = temporary_folder(out, OVERLAYS)
        try:
            with self._averaged() as network, say_disk_errors(out / OVERLAYS):
                self.training.job.overlays(network, stage, card["threshold"])
                shutil.rmtree(out / OVERLAYS, ignore_errors=True)
                os.replace(stage, out / OVERLAYS)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _card(self, epoch: int, found: Mapping[str, Any]) -> dict[str, Any]:
        job, objective = self.training.job, self.training.objective
        digests = {key: job.data_facts.get(key) for key in ("split_digest", "data_digest")}
        return {
            "schema_version": SCHEMA_VERSION,
            "medssl_version": package_version(),
            "command": COMMAND,
            "task": job.task,
            "recipe": job.recipe,
            "classes": list(job.classes),
            "outputs": job.outputs,
            "n_parameters": job.parameter_counts(),
            "threshold": found.get("val_best_threshold") if job.outputs == 1 else None,
            THRESHOLD_RESULTS: found.get(THRESHOLD_RESULTS),
            "epoch": epoch,
            "step": self.training.trainer.steps_done,
            SCORE: found.get(SCORE),
            "val": {name: found.get(name) for name in VAL_FIGURES},
            "distance_unit": job.distance_unit,
            "weights": "raw" if objective.averaged is objective.network else "ema",
            **digests,
            "data": job.data_facts,
            "config": job.config.model_dump(mode="json"),
            "definitions": {name: DEFINITIONS[name] for name in (*VAL_FIGURES, SCORE)},
            **job.card,
        }

    def _save_weights(self, path: Path) -> None:
        tensors = self.training.objective.weights()
        size = sum(tensor.nbytes for tensor in tensors.values())
        with atomic_path(path) as temporary, say_disk_errors(path, size):
            save_file(tensors, temporary, metadata={"format": "pt"})

    def _remember(self) -> None:
        """What the next checkpoint keeps of the past."""
        facts = {key: self.training.job.data_facts.get(key) for key in ("data_digest", "split_digest")}
        self.checkpoints.extra = {**facts, "history": self.history.to_json()}

    def _show(self, epoch: int) -> None:
        """TensorBoard's curves, and ``progress.png`` where it is not fresh."""
        if self._writer is not None:
            for name, value in self.history.row(epoch).items():
                if isinstance(value, (int, float)) and not name.endswith("epoch"):
                    self._writer.add_scalar(f"epoch/{name}", value, epoch)
            self._writer.flush()
        if time.monotonic() - self._drawn_at > DRAW_EVERY_S:
            self._draw(epoch)

    def _draw(self, epoch: int) -> None:
        job = self.training.job
        title = f"{job.recipe}, epoch {epoch} of {job.settings.epochs}"
        draw_segment_progress(
            self.history.to_json(),
            self.folder.path / "progress.png",
            title,
            chosen=None if self.kept is None else self.kept.epoch,
            distance_unit=job.distance_unit,
        )
        self._drawn_at = time.monotonic()


def _read_kept(run: Path, history: History) -> Kept | None:
    """The model in a run folder, if it is of one of the epochs of the history."""
    try:
        card = json.loads((run / SEGMENTER_CARD).read_text(encoding="utf-8"))
        epoch, score = int(card["epoch"]), card[SCORE]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (run / SEGMENTER_WEIGHTS).is_file() or not history.validated(epoch) or history.row(epoch)[SCORE] != score:
        return None
    return Kept(epoch, -math.inf if score is None else float(score))


def _distance_px(prediction_HW: Any, reference_HW: Any) -> float:
    return hausdorff_95(prediction_HW, reference_HW, (1.0, 1.0))


def _say_row(row: Mapping[str, Any]) -> str:
    names = ("train_loss", "train_dice", "val_loss", "val_dice", "val_best_dice", "val_best_threshold", "val_hd95")
    shown: list[tuple[str, Any]] = [(name, row.get(name)) for name in names]
    return "  ".join(f"{name} {value:.4g}" for name, value in shown if isinstance(value, (int, float)))
