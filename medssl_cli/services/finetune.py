"""Fine-tuning: a backbone and its head trained end to end on labelled images, and the epoch kept that validation chose.

The run is one of `medssl train-head`, with the backbone in its `export/`, so that `extract`, `infer` and `eval` take it
as they take any. Nothing is saved on the way: a run that ended early keeps its best epoch so far, and the same command
starts over.
"""

from __future__ import annotations

import logging
import shlex
import time
from pathlib import Path

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError, MedsslError, PartialFailure
from medssl_cli.core.result import Result
from medssl_cli.core.run import hide_home, seed_everything
from medssl_cli.core.wording import counted
from medssl_cli.services.backbone import open_backbone
from medssl_cli.services.devices import resolve_device
from medssl_cli.services.finetune_config import FinetuneConfig, check_finetune_config
from medssl_cli.services.finetune_data import FinetuneJob, read_job
from medssl_cli.services.finetune_results import Written, run_facts, write_run
from medssl_cli.services.finetune_training import Progress, Tuned, Tuner
from medssl_cli.services.head import is_head_run
from medssl_cli.services.head_config import Task
from medssl_cli.services.head_request import COMMAND, TrainHeadRequest
from medssl_cli.services.lookup import find_backbone
from medssl_cli.services.run_folder import HeldLog, RunFolder, stoppable
from medssl_cli.services.train_head import check_task, metric_lines, next_lines

__all__ = ["FinetuneConfig", "finetune"]

log = logging.getLogger(__name__)


def finetune(request: TrainHeadRequest, *, progress: Progress | None = None) -> Result:
    """Train a head together with its backbone; ``progress`` is told steps done and in all.

    Raises:
        ConfigError: Contradicting settings, features instead of images, or no model to be found.
        DataError: Bad cases (with ``on_error: stop``), missing or contradicting labels, or patients on both sides.
        NonFiniteError: A loss or gradient became non-finite; the step was not taken.
        ResourceError: No such device, or no room in memory or on the disk.
        Interrupted: A signal came.
    """
    started = time.time()
    task = check_task(request.task)
    config = load_finetune_config(request, task)
    device = resolve_device(request.device)
    seed_everything(config.seed)
    with (
        HeldLog() as lines,
        RunFolder(request.out, COMMAND, lines, overwrite=request.overwrite, inputs=request.inputs()) as folder,
        stoppable("fine-tuning"),
    ):
        backbone = open_backbone(find_backbone(request.model), device)
        origin = dict(backbone.card)
        job = read_job(request, backbone, config, task)
        tuner = build_tuner(job)
        folder.facts = run_facts(request, job, origin, device, started)
        folder.begin()
        with folder.telling_the_end(lambda: {"step": tuner.steps_done}):
            folder.say("running")
            earlier = is_head_run(folder.path)
            tuned = tuner.fit(progress)
            if tuned.stopped is not None and earlier:
                raise _ended(tuned.stopped, "the head of an earlier run in this folder is as it was")
            written = write_run(folder.path, job, tuner, tuned, origin, started)
            if tuned.stopped is not None:
                raise _ended(
                    tuned.stopped, f"the best epoch so far, {tuned.trained.epoch}, is in {hide_home(str(folder.path))}"
                )
            folder.say("finished", elapsed_s=round(time.time() - started, 3))
    return Result(_lines(request, job, tuned, written), written.facts, _partial(job, folder.path))


def load_finetune_config(request: TrainHeadRequest, task: Task) -> FinetuneConfig:
    """The settings, checked against the task.

    Raises:
        ConfigError: An option without effect, or every fault of the keys at once.
    """
    if request.cache is not None:
        raise ConfigError(
            "Fine-tuning keeps no vectors: they change with every step.",
            where=f"--cache {hide_home(str(request.cache))}",
            fix="leave it out; cache_gb says how many decoded images are kept in memory",
            code="flags_without_effect",
        )
    flags = {"seed": request.seed, "backbone_lr_scale": request.backbone_lr_scale}
    config = load_config(FinetuneConfig, request.config, recipes="train_head", flags=flags, overrides=request.overrides)
    check_finetune_config(config, task)
    return config


def build_tuner(job: FinetuneJob) -> Tuner:
    """Network, head, loss and optimizer."""
    return Tuner(
        job.embedder,
        job.images,
        job.targets,
        job.config,
        job.cases_of(job.train),
        None if job.val is None else job.cases_of(job.val),
        pool_mode=job.pool_mode,
        pictures=job.pictures,
    )


def _ended(error: MedsslError, also: str) -> MedsslError:
    """The same error, telling what is kept."""
    return type(error)(error.what, where=error.where, fix=f"{error.fix}; {also}", code=error.code)


def _partial(job: FinetuneJob, out: Path) -> PartialFailure | None:
    if not job.failures:
        return None
    count = len(job.failures) + len(job.train) + (0 if job.val is None else len(job.val))
    return PartialFailure(
        f"{len(job.failures)} of {count} cases failed.",
        where=hide_home(str(out / "failures.csv")),
        fix="see the reasons there; the head was trained on the others",
        code="cases_failed",
    )


def _lines(request: TrainHeadRequest, job: FinetuneJob, tuned: Tuned, written: Written) -> list[str]:
    """Figures, threshold, where, and what to type next."""
    held = 0 if job.val is None else len(job.val)
    names = ", ".join(job.targets.classes[:8])
    return [
        f"{job.kind} head and backbone, {job.targets.task}: {names}; "
        f"{counted(len(job.train), 'training case')}, {held} for validation",
        f"epoch:      {tuned.trained.epoch} of {len(tuned.trained.history)}, "
        + (f"chosen by {tuned.trained.criterion}" if tuned.trained.criterion else "the last one"),
        *metric_lines(written.finished, job.targets),
        *(f"note:       {note}" for note in written.finished.notes),
        f"run:        {shlex.quote(str(request.out))}  (head.json, export/, progress.png, train_summary.json)",
        *next_lines(request, has_test="test" in job.cohort.parts),
    ]
