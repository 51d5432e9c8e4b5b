"""A run on the first few cases that leaves nothing behind: the smoke test and the estimate of ``--dry-run``."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from medssl_cli.core.result import Result
from medssl_cli.core.run import result_header
from medssl_cli.data.datasets import prepare_store
from medssl_cli.data.store import estimate_bytes
from medssl_cli.engine.distributed import world_size
from medssl_cli.engine.estimate import estimate
from medssl_cli.services.class_labels import ClassLabels
from medssl_cli.services.pretrain_config import PretrainConfig
from medssl_cli.services.pretrain_request import PretrainRequest
from medssl_cli.services.pretrain_run import PretrainRun, build_run
from medssl_cli.services.training_data import TrainingData

log = logging.getLogger(__name__)

SMOKE_STEPS = 5
SMOKE_CASES = 4
SMOKE_BATCH = 2  # the least that KoLeo can work on; the documented recipe takes minutes on a CPU even so

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


@contextmanager
def scratch_run(
    request: PretrainRequest,
    config: PretrainConfig,
    device: torch.device,
    data: TrainingData,
    labels: ClassLabels,
    progress: Progress | None,
) -> Iterator[PretrainRun]:
    """A run on the first few cases with a store that vanishes."""
    few = max(SMOKE_CASES, min(config.train.batch_size_per_gpu, 16)) if request.dry_run else SMOKE_CASES
    with tempfile.TemporaryDirectory(prefix="medssl-") as place:
        store = prepare_store(data.cases[:few], config.data, Path(place), kind=data.kind, progress=progress)
        if request.smoke:
            batch = min(config.train.batch_size_per_gpu, SMOKE_BATCH)
            config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size_per_gpu": batch})})
        run = build_run(
            config,
            device,
            store,
            weights=config.initial_weights,
            attention=request.attention,
            workers=request.workers,
            labels=labels,
            cases=len(data.cases) if request.dry_run else None,
        )
        for line in run.introduction():
            log.info("%s", line)
        yield run


def smoke(run: PretrainRun, say: Say, started: float) -> Result:
    """A few steps, told one by one."""
    losses: list[float] = []
    with contextlib.closing(run.batches(0)) as source, run.trainer.say_out_of_memory():
        for _ in range(SMOKE_STEPS):
            losses.append(run.trainer.step(source).total_loss)
            if run.first:
                say(smoke_lines(losses)[-1])
    facts = {**result_header("pretrain", started), "smoke": True, "losses": losses}
    return Result([f"smoke test passed: {SMOKE_STEPS} steps on {len(run.store)} cases, nothing written"], facts)


def smoke_lines(losses: Sequence[float]) -> list[str]:
    """``[step i] loss=…`` of each step."""
    return [f"[step {index}] loss={loss:.4f}" for index, loss in enumerate(losses)]


def dry_run(run: PretrainRun, data: TrainingData, started: float) -> Result:
    """A few steps and batches, and what the whole run would take."""
    train, cases = run.config.train, len(data.cases)
    found = estimate(
        run.trainer,
        batch=train.batch_size_per_gpu,
        samples_per_step=run.samples_per_step,
        steps=run.config.optim.epochs * run.config.epoch_length(cases, world_size()),
        cases=cases,
        cache_bytes=math.ceil(run.store.size_bytes / len(run.store) * cases),
        workers=run.workers,
        prefetch=train.prefetch_factor,
    )
    facts = {**result_header("pretrain", started), "dry_run": True, **found.facts()}
    return Result(found.lines(), {**facts, "source_bytes": estimate_bytes(data.cases)})
