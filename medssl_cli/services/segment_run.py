"""Training of a segmentation network, whatever its task: begun or resumed, trained, validated, the best epoch kept.

The state of a run is ``last/``: raw and averaged weights, the optimizer, the sums of the epoch and the history up to
it. Each epoch ends with a checkpoint, then a validation of the averaged network in the first process; a run that was
cut off between the two validates again.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from datetime import timedelta
from typing import Any

from medssl_cli.core.config import dump_config
from medssl_cli.core.errors import PartialFailure
from medssl_cli.core.result import Result
from medssl_cli.core.run import hide_home, plain, provenance, result_header, write_csv, write_failures, write_text
from medssl_cli.core.wording import counted
from medssl_cli.engine.checkpoint import Checkpoint, Checkpoints
from medssl_cli.engine.distributed import from_first, rank
from medssl_cli.engine.telemetry import Telemetry
from medssl_cli.services.devices import describe_device
from medssl_cli.services.lookup import SEGMENTER_CARD, SEGMENTER_WEIGHTS, run_status
from medssl_cli.services.pretrain_group import refuse_unshared
from medssl_cli.services.run_folder import RunFolder, stoppable
from medssl_cli.services.segment_history import HISTORY
from medssl_cli.services.segment_job import SCORE, SegmentJob
from medssl_cli.services.segment_request import COMMAND, SegmentRequest
from medssl_cli.services.segment_resume import LAST, comparable, find_checkpoint, refuse_drift
from medssl_cli.services.segment_training import SegmentTraining, build_training
from medssl_cli.services.segment_watch import EPOCHS, OVERLAYS, EnoughError, SegmentWatch

log = logging.getLogger(__name__)

LEFT_BY_A_RUN = (
    *(SEGMENTER_CARD, SEGMENTER_WEIGHTS, LAST, EPOCHS, OVERLAYS, HISTORY, "tb", "progress.png", "cases.csv"),
    *("training_metrics.jsonl", "training_metrics.json", "run.json", "log.txt", "config.yaml", "failures.csv"),
)
"""What ``--no-resume`` removes once the new run is built."""


def train_job(job: SegmentJob, folder: RunFolder, request: SegmentRequest, started: float) -> Result:
    """Build, take up the checkpoint if there is one, train, validate, keep the best.

    Args:
        job: What to train.
        folder: Run folder in the hands of the first process.
        request: As typed.
        started: ``time.time()`` at the start.

    Raises:
        ConfigError: The configuration differs from that of the checkpoint.
        CheckpointError: No checkpoint, or none that fits, where one was named or must be.
        NonFiniteError: A loss, gradient or image is not finite; the parameters are those before the step.
        Interrupted: A signal came; the state is saved.
        ResourceError: A loader worker died, or memory or the disk is full.
    """
    checkpoints = Checkpoints(
        folder.path / LAST, config=comparable(job), sequence_names=list(job.card.get("sequences") or ()), keep=1
    )
    checkpoint = from_first(lambda: find_checkpoint(checkpoints, folder.path, request))
    if checkpoint is not None:
        refuse_drift(checkpoint, job, request.allowed_changes)
    training = build_training(job)
    training.trainer.checkpoints = checkpoints
    watch = SegmentWatch(training, folder, checkpoints)
    if checkpoint is not None:
        training.trainer.restore(checkpoint)
        watch.take_up(checkpoint, same_run=request.resume_ckpt is None)
        if watch.is_finished() and run_status(folder.path) == "finished":
            return _finished_before(watch, started)
    folder.begin(clear=() if request.resume else LEFT_BY_A_RUN)
    refuse_unshared(folder.path)
    folder.facts = _run_facts(training, request, started)
    with folder.telling_the_end(lambda: {"step": training.trainer.steps_done, "epoch": training.epoch}):
        if rank() == 0:
            _open(watch, checkpoint)
        facts = _fit(watch)
        facts = {"stopped_early": watch.stopped_early, **facts, **watch.figures()}
        facts["elapsed_s"] = round(time.time() - started, 3)
        folder.say("finished", step=training.trainer.steps_done, epoch=training.epoch, **facts)
    return _finished(watch, facts, request, started)


def _open(watch: SegmentWatch, checkpoint: Checkpoint | None) -> None:
    """Write what stands in the folder from the first step on, and let the trainer log into it."""
    training, out = watch.training, watch.folder.path
    job, trainer = training.job, training.trainer
    write_text(out / "config.yaml", dump_config(job.config))
    write_csv(out / "cases.csv", ("part", "case_id", "patient_id"), job.seen)
    write_failures(out / "failures.csv", job.failures)
    if checkpoint is not None:
        log.info("Resuming after step %d, in epoch %d, from %s", checkpoint.step, training.epoch + 1, checkpoint.path)
    for line in training.introduction():
        log.info("%s", line)
    watch.folder.say("running", step=trainer.steps_done, epoch=training.epoch)
    trainer.telemetry = Telemetry(out, trainer.total_steps, job.device, log_every=job.settings.log_every, console=log)
    watch.open()


def _fit(watch: SegmentWatch) -> dict[str, Any]:
    """Train to the end, or until it is enough; speed and memory."""
    trainer = watch.training.trainer
    trainer.on_checkpoint = watch.after_checkpoint
    with contextlib.closing(watch), stoppable("training"):  # the trainer has its own handlers for most of it
        try:
            fit = trainer.fit()
        except EnoughError:
            return {}
    return {"images_per_s": fit.images_per_s, "peak_memory_gib": fit.peak_memory_gib}


def _run_facts(training: SegmentTraining, request: SegmentRequest, started: float) -> dict[str, Any]:
    """What ``run.json`` says from the first step on."""
    job = training.job
    header = result_header(COMMAND, started)
    header.pop("elapsed_s")
    return {
        **header,
        **provenance(),
        "task": job.task,
        "recipe": job.recipe,
        "device": describe_device(job.device),
        "precision": job.settings.precision,
        "seed": job.settings.seed,
        "classes": list(job.classes),
        "n_parameters": job.parameter_counts(),
        "n_failed": len(job.failures),
        "distance_unit": job.distance_unit,
        "total_steps": training.trainer.total_steps,
        "epoch_steps": training.epoch_steps,
        "resumed_from": None if request.resume_ckpt is None else str(request.resume_ckpt),
        **job.data_facts,
    }


# --- results ---------------------------------------------------------------------------------------------------------


def _finished_before(watch: SegmentWatch, started: float) -> Result:
    out, epoch = watch.folder.path, watch.training.epoch
    lines = [
        f"nothing left to do: all {counted(epoch, 'epoch')} of this run were done before",
        *_best_lines(watch),
        "longer:   the same command with more epochs goes on; --no-resume starts afresh",
    ]
    facts = {**result_header(COMMAND, started), "run": hide_home(str(out)), "epochs": epoch, "epochs_now": 0}
    return Result(lines, plain({**facts, **watch.figures()}), _left_out(watch))


def _finished(watch: SegmentWatch, facts: dict[str, Any], request: SegmentRequest, started: float) -> Result:
    out, epoch = watch.folder.path, watch.training.epoch
    speed = f", {facts['images_per_s']:.1f} images/s" if facts.get("images_per_s") else ""
    early = ", ended early: nothing better came" if watch.stopped_early else ""
    lines = [
        f"{counted(epoch, 'epoch')} in {timedelta(seconds=round(time.time() - started))}{speed}{early}",
        *_best_lines(watch),
        f"curves:   {out / 'progress.png'}",
        f"next:     medssl eval --model {shlex.quote(str(out))} {_unseen(watch.training.job, request)} --out eval",
    ]
    header = {**result_header(COMMAND, started), "run": hide_home(str(out)), "epochs": epoch}
    return Result(lines, plain({**header, **facts}), _left_out(watch))


def _unseen(job: SegmentJob, request: SegmentRequest) -> str:
    """Which data the model is to be judged on: the test part, or others where there is none."""
    if "test" not in job.data_facts.get("counts", {"test": {}}) or request.data is None:
        return "--data OTHER_PATIENTS --split all"
    splits = f" --splits {shlex.quote(str(request.splits))}" if request.splits else ""
    return f"--data {shlex.quote(str(request.data))}{splits} --split test"


def _best_lines(watch: SegmentWatch) -> list[str]:
    """Which epoch is kept, and how good it is."""
    if watch.kept is None:
        return []
    row = watch.history.row(watch.kept.epoch)
    shown = {
        "Dice": row["val_dice"],
        "IoU": row["val_iou"],
        "HD95": row["val_hd95"],
        "best Dice": row["val_best_dice"],
        "threshold": row["val_best_threshold"],
    }
    if row["val_best_dice"] is None:
        shown[SCORE] = row[SCORE]
    units = {"HD95": f" {watch.training.job.distance_unit}"}
    figures = ", ".join(
        f"{name} {value:.3f}{units.get(name, '')}" for name, value in shown.items() if value is not None
    )
    return [
        f"best:     epoch {watch.kept.epoch}, on the validation images: {figures}",
        f"model:    {watch.folder.path / SEGMENTER_WEIGHTS} and {SEGMENTER_CARD}",
    ]


def _left_out(watch: SegmentWatch) -> PartialFailure | None:
    failed = len(watch.training.job.failures)
    if not failed:
        return None
    return PartialFailure(
        f"Training finished; {counted(failed, 'case')} {'was' if failed == 1 else 'were'} left out.",
        where=hide_home(str(watch.folder.path / "failures.csv")),
        fix="mend these cases, or take them off the list; the model was trained without them",
        code="cases_failed",
    )
