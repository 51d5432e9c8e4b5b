"""A segmentation training, built and not yet run: objective, optimizer, schedule, loader, and what a few steps tell."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from medssl_cli.core.protocols import LabelledBatch
from medssl_cli.core.result import Result
from medssl_cli.core.run import plain, result_header, usable_cpus
from medssl_cli.core.wording import counted
from medssl_cli.data.labelled_slices import EpochSampler, build_labelled_loader
from medssl_cli.engine.distributed import NetworkShardingConfig, build_parallel, local_world, rank, world_size
from medssl_cli.engine.estimate import estimate
from medssl_cli.engine.optim import build_optimizer
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.trainer import Trainer
from medssl_cli.objectives.supervised import EpochCosine, SupervisedSegmentation
from medssl_cli.services.devices import describe_device
from medssl_cli.services.pretrain_trial import SMOKE_STEPS, smoke_lines
from medssl_cli.services.segment_job import SegmentJob
from medssl_cli.services.segment_request import COMMAND

Say = Callable[[str], None]


@dataclass
class SegmentTraining:
    """Everything built, nothing trained.

    Args:
        job: What is trained.
        objective: With the network and its average.
        trainer: Of it.
        schedule: Learning rate by step.
        epoch_steps: Optimizer steps of an epoch.
        workers: Loader processes.
    """

    job: SegmentJob
    objective: SupervisedSegmentation
    trainer: Trainer
    schedule: EpochCosine
    epoch_steps: int
    workers: int

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.trainer.steps_done // self.epoch_steps

    def introduction(self) -> list[str]:
        """What will happen, in numbers."""
        job, settings = self.job, self.job.settings
        counts = job.parameter_counts()
        processes = f" x {world_size()} processes" if world_size() > 1 else ""
        return [
            *job.notes,
            *job.introduction,
            f"parameters: {counts['total']:,} in all, {counts['trainable']:,} trained, {counts['frozen']:,} frozen",
            f"{describe_device(job.device)}{processes}, {settings.precision}, {self.workers} loader workers",
            f"{counted(settings.epochs, 'epoch')} of {counted(self.epoch_steps, 'step')} of up to "
            f"{counted(samples_per_update(job), 'sample')}",
        ]


def samples_per_update(job: SegmentJob) -> int:
    """Samples of one full update over all processes."""
    return job.settings.batch_size * job.settings.accumulation * world_size()


def build_training(job: SegmentJob) -> SegmentTraining:
    """Objective, optimizer, schedule and trainer; the same for the same job."""
    settings, device = job.settings, job.device
    precision = Precision(settings.precision, device)
    objective = SupervisedSegmentation(job.network, job.loss, ema_decay=settings.ema_decay)
    sharding = NetworkShardingConfig()
    parallel = build_parallel(
        objective, fsdp=False, student=sharding, teacher=sharding, precision=settings.precision, device=device
    )
    epoch_steps = EpochSampler(
        len(job.train), settings.batch_size, settings.seed, 0, rank(), world_size(), settings.accumulation
    ).epoch_steps
    schedule = EpochCosine(
        settings.epochs,
        epoch_steps,
        settings.lr,
        settings.min_lr,
        settings.weight_decay,
        warmup_epochs=settings.warmup_epochs,
        per=settings.per,
        freeze_backbone_epochs=settings.freeze_backbone_epochs,
    )
    workers = _workers(job)

    def views(batch: LabelledBatch, step: int, micro: int) -> LabelledBatch:
        if step % epoch_steps == 0 and micro == 0:  # in the step, so that a resumed epoch keeps its sums
            objective.start_epoch()
        return job.views(batch, step, micro)

    trainer = Trainer(
        objective=objective,
        optimizer=build_optimizer("adamw", job.groups, device),
        schedules=schedule,
        batches=lambda step: _loader(job, step, workers),
        views=views,
        total_steps=settings.epochs * epoch_steps,
        device=device,
        precision=precision,
        accumulation=settings.accumulation,
        clip_grad=settings.clip_grad,
        seed=settings.seed,
        checkpoint_every=epoch_steps,
        parallel=parallel,
        keys=job.keys,
    )
    return SegmentTraining(job, objective, trainer, schedule, epoch_steps, workers)


def _loader(job: SegmentJob, step: int, workers: int) -> Iterator[LabelledBatch]:
    settings = job.settings
    return build_labelled_loader(
        job.train,
        batch_size=settings.batch_size,
        seed=settings.seed,
        start_step=step,
        accumulation=settings.accumulation,
        workers=workers,
        rank=rank(),
        world=world_size(),
        timeout_s=settings.loader_timeout_s,
        pin_memory=job.device.type == "cuda",
    )


def _workers(job: SegmentJob) -> int:
    """Loader processes: as set, but no more than this machine has CPUs for."""
    spare = max(1, usable_cpus() // local_world() - 1)
    asked = job.settings.num_workers
    return min(8, spare) if asked is None else min(asked, spare)


# --- a few steps -----------------------------------------------------------------------------------------------------


def dry_run(job: SegmentJob, started: float) -> Result:
    """A few steps and batches, and what the whole run would take; writes nothing."""
    training = build_training(job)
    found = estimate(
        training.trainer,
        batch=min(job.settings.batch_size, len(job.train)),  # the first batch of fewer samples is smaller
        samples_per_step=min(samples_per_update(job), len(job.train)),
        steps=training.trainer.total_steps,
        cases=len(job.seen),
        cache_bytes=int(job.data_facts.get("cache_bytes") or 0),
        workers=training.workers,
    )
    kept = job.data_facts.get("cache_bytes")
    lines = [line for line in found.lines() if kept or not line.startswith("cache ")]  # nothing is kept on the disk
    facts = {
        **result_header(COMMAND, started),
        "dry_run": True,
        **found.facts(),
        "n_parameters": job.parameter_counts(),
    }
    return Result([*training.introduction(), *lines], plain(facts))


def smoke(job: SegmentJob, say: Say, started: float) -> Result:
    """A few steps, told one by one; writes nothing."""
    trainer = build_training(job).trainer
    losses: list[float] = []
    with contextlib.ExitStack() as closing, trainer.say_out_of_memory():
        source = trainer.batches(0)
        closing.callback(getattr(source, "close", lambda: None))
        for _ in range(SMOKE_STEPS):
            losses.append(trainer.step(source).total_loss)
            if rank() == 0:
                say(smoke_lines(losses)[-1])
    facts = {**result_header(COMMAND, started), "smoke": True, "losses": losses}
    return Result([f"smoke test passed: {SMOKE_STEPS} steps, nothing written"], plain(facts))
