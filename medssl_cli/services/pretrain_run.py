"""A pretraining run, built and not yet trained: its parts, and what they promise in numbers before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from medssl_cli.core.protocols import Batch, SliceBatch
from medssl_cli.core.run import seed_everything, seed_for, usable_cpus, worker_count
from medssl_cli.data.datasets import ImageDataset, Loader, SliceDataset, build_loader
from medssl_cli.data.store import Store
from medssl_cli.engine.distributed import Parallel, local_world, rank, world_size
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.schedules import Schedules
from medssl_cli.engine.trainer import Trainer
from medssl_cli.objectives.self_distillation import SelfDistillation, expected_first_loss
from medssl_cli.services.build import (
    build_acceleration,
    build_gradients,
    build_objective,
    build_optimizer,
    build_schedules,
    build_views,
    packed_groups,
    select_attention,
)
from medssl_cli.services.class_labels import ClassLabels
from medssl_cli.services.devices import describe_device
from medssl_cli.services.pretrain_config import PretrainConfig
from medssl_cli.services.training_data import build_dataset


@dataclass
class PretrainRun:
    """Everything built, nothing trained.

    Args:
        batches: Step -> endless stream of micro-batches from there on.
        sequences: Names in channel order; None for plain pictures.
        attention: Backend in use.
        epoch_steps: Optimizer steps an epoch.
        workers: Loader processes.
        parallel: What makes the gradients of several processes one.
        notes: What is legal and yet unlikely to be meant.
    """

    config: PretrainConfig
    device: torch.device
    store: Store
    dataset: SliceDataset | ImageDataset
    objective: SelfDistillation
    schedules: Schedules
    trainer: Trainer
    batches: Callable[[int], Loader]
    sequences: tuple[str, ...] | None
    attention: str
    epoch_steps: int
    workers: int
    parallel: Parallel
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return rank() == 0

    @property
    def samples_per_step(self) -> int:
        """Samples of one update over all processes."""
        return self.config.samples_per_step(world_size())

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.trainer.total_steps

    def introduction(self) -> list[str]:
        """What will happen, in numbers."""
        config, optim = self.config, self.config.optim
        rule = "" if optim.scaling_rule == "identity" else f" by {optim.scaling_rule}"
        others = f" x {world_size()} processes ({self.config.compute_precision.parallel})" if world_size() > 1 else ""
        return [
            *self.notes,
            f"{len(self.store)} cases, {describe_device(self.device)}{others}, {config.compute_precision.precision}, "
            f"attention {self.attention}, {self.workers} loader workers",
            f"{self.total_steps} steps of {self.samples_per_step} samples, {self.epoch_steps} an epoch; "
            f"effective learning rate {self.schedules.lr:.3g} (base_lr {optim.base_lr:g}{rule})",
            f"{self._tokens()}; {_expectation(config, self._images(), self.schedules.at(0)['teacher_temp'])}",
        ]

    def _images(self) -> int:
        return self.dataset.n_sequences

    def _tokens(self) -> str:
        groups = packed_groups(self.config, self._images())
        local = f", {groups[1][1]} a local crop" if len(groups) > 1 else ""
        return f"{groups[0][1]} tokens a global crop{local}"


def build_run(
    config: PretrainConfig,
    device: torch.device,
    store: Store,
    *,
    weights: Path | None,
    attention: str | None = None,
    used_before: str | None = None,
    workers: int | None = None,
    labels: ClassLabels | None = None,
    cases: int | None = None,
) -> PretrainRun:
    """Dataset, networks, optimizer and trainer; the same tensors for the same seed.

    Args:
        config: The whole run.
        device: Where to train.
        store: Prepared cases.
        weights: File for the student's backbone; None starts afresh, or is filled by a checkpoint.
        attention: Backend asked for; None takes the fastest that works.
        used_before: Backend of the part of the run that is resumed, which is taken again if it works.
        workers: Loader processes asked for; None takes ``train.num_workers``, or fewer CPUs.
        labels: Classes for a semi-supervised loss.
        cases: Of the run that these few stand for; None: they are all.

    Raises:
        ConfigError: Slices of these volumes would be distorted.
        CheckpointError: The weights do not fit.
    """
    seed_everything(config.train.seed)
    dataset = build_dataset(store, config.data, config.train.seed)
    labels = ClassLabels() if labels is None else labels
    backend, notes = select_attention(config, device, dataset.n_sequences, asked=attention, before=used_before)
    objective = build_objective(
        config,
        dataset.sequences,
        device,
        weights,
        in_chans=_input_channels(dataset),
        class_counts=labels.counts,
    )
    epoch_steps = config.epoch_length(cases or len(dataset), world_size())
    notes += build_acceleration(config, objective, device, config.optim.epochs * epoch_steps)
    parallel = build_gradients(config, objective, device)
    schedules = build_schedules(config, epoch_steps, world_size())
    workers = min(config.train.num_workers, _spare_cpus()) if workers is None else workers
    batches = _loader_of(config, device, dataset, workers)
    trainer = _build_trainer(config, device, dataset, objective, schedules, batches, labels)
    trainer.parallel = parallel
    return PretrainRun(
        config=config,
        device=device,
        store=store,
        dataset=dataset,
        objective=objective,
        schedules=schedules,
        trainer=trainer,
        batches=batches,
        sequences=dataset.sequences,
        attention=backend,
        epoch_steps=epoch_steps,
        workers=workers,
        parallel=parallel,
        notes=[*notes, *schedules.warnings()],
    )


def _input_channels(dataset: SliceDataset | ImageDataset) -> int:
    """Channels of the patch convolution: 3, which takes one grey channel too, unless pictures have another number."""
    odd = dataset.sequences is None and dataset.channels not in (1, 3)
    return dataset.channels if odd else 3


def _spare_cpus() -> int:
    """Loader processes that this machine has CPUs for, shared among the processes that train on it."""
    if local_world() == 1 or os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return worker_count()
    return min(8, max(1, usable_cpus() // local_world() - 1))


def _loader_of(
    config: PretrainConfig, device: torch.device, dataset: SliceDataset | ImageDataset, workers: int
) -> Callable[[int], Loader]:
    train = config.train

    def batches(step: int) -> Loader:
        return build_loader(
            dataset,
            batch_size=train.batch_size_per_gpu,
            accumulation=train.grad_accumulation,
            workers=workers,
            seed=train.seed,
            start_step=step,
            rank=rank(),
            world=world_size(),
            timeout_s=train.loader_timeout_s,
            pin_memory=device.type == "cuda",
            prefetch=train.prefetch_factor,
        )

    return batches


def _build_trainer(
    config: PretrainConfig,
    device: torch.device,
    dataset: SliceDataset | ImageDataset,
    objective: SelfDistillation,
    schedules: Schedules,
    batches: Callable[[int], Loader],
    labels: ClassLabels,
) -> Trainer:
    train, seed = config.train, config.train.seed
    multi_crop = build_views(config, dataset.n_sequences)

    def views(slices: SliceBatch, step: int, micro: int) -> Batch:
        masking = config.ibot.masks_at(step, schedules.epoch_steps)
        batch = multi_crop(slices, seed_for(seed, "views", step, micro, rank()), masking=masking)
        labels_B = labels.of_batch(slices.case_ids)
        return batch if labels_B is None else replace(batch, labels_B=labels_B.to(device))

    return Trainer(
        objective=objective,
        optimizer=build_optimizer(config, objective, device),
        schedules=schedules,
        batches=batches,
        views=views,
        total_steps=schedules.total_steps,
        device=device,
        precision=Precision(config.compute_precision.precision, device),
        accumulation=train.grad_accumulation,
        clip_grad=config.optim.clip_grad,
        clip_mode=config.optim.clip_mode,
        seed=seed,
        evaluate_every=config.evaluation.eval_period_iterations if config.evaluation.is_on else 0,
        checkpoint_every=train.checkpoint_period_iterations or train.saveckp_freq * schedules.epoch_steps,
    )


def _expectation(config: PretrainConfig, n_sequences: int, teacher_temperature: float) -> str:
    expected = expected_first_loss(
        config.dino,
        config.ibot,
        config.crops.local_crops_number,
        config.train.batch_size_per_gpu,
        n_sequences=n_sequences,
        teacher_temperature=teacher_temperature,
        layerscale=config.student.layerscale,
        centering=config.train.centering,
    )
    terms = ", ".join(f"{name.removesuffix('_loss')} {value:.1f}" for name, value in expected.items())
    return f"expected first loss about {sum(expected.values()):.1f} ({terms})"
