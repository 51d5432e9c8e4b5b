"""Pretrain a backbone: read, prepare, build, train, export."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from medssl_cli.core.config import dump_config, load_config
from medssl_cli.core.errors import ConfigError, Interrupted, MedsslError, PartialFailure
from medssl_cli.core.protocols import Batch, SliceBatch
from medssl_cli.core.run import (
    claim_out_folder,
    locked,
    plain,
    provenance,
    result_header,
    seed_everything,
    seed_for,
    to_json,
    worker_count,
    write_failures,
    write_json,
    write_text,
)
from medssl_cli.data.datasets import ImageDataset, SliceDataset, build_loader, prepare_store
from medssl_cli.data.store import Store, default_cache, estimate_bytes
from medssl_cli.engine.checkpoint import Checkpoint, Checkpoints, compare_configs
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.telemetry import Telemetry, read_metrics
from medssl_cli.engine.trainer import FitResult, Trainer
from medssl_cli.models.zoo import save_backbone
from medssl_cli.objectives.self_distillation import SelfDistillation, expected_first_loss
from medssl_cli.report.plots import draw_progress
from medssl_cli.services.build import (
    build_objective,
    build_optimizer,
    build_schedules,
    build_views,
    card_facts,
    select_attention,
)
from medssl_cli.services.devices import describe_device, resolve_device
from medssl_cli.services.lookup import EXPORT
from medssl_cli.services.pretrain_config import SAFE_KEYS, PretrainConfig
from medssl_cli.services.training_data import TrainingData, build_dataset, read_training_data

log = logging.getLogger(__name__)

SMOKE_STEPS = 5
SMOKE_CASES = 4

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class PretrainRequest:
    """What the user typed. Names as the options of ``medssl pretrain``."""

    config: str | None = None
    overrides: tuple[str, ...] = ()
    data: Path | None = None
    split_csv: Path | None = None
    out: Path | None = None
    gpus: int = 1
    resume: bool = True
    init: Path | None = None
    device: str = "auto"
    precision: str | None = None
    attention: str | None = None
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
        return Path(self.config).stem if self.config else "pretrain"


@dataclass(frozen=True)
class PretrainResult:
    """What a call did, for people and for scripts."""

    lines: list[str]
    facts: dict[str, Any]

    def summary(self) -> str:
        """A few lines for people."""
        return "\n".join(self.lines)

    def to_json(self) -> str:
        """Strict JSON with the common header."""
        return to_json(self.facts)


def pretrain(request: PretrainRequest, *, progress: Progress | None = None, say: Say = log.info) -> PretrainResult:
    """Train as the request says; resume if the run folder holds checkpoints.

    Args:
        request: What the user typed.
        progress: Called with (cases prepared, cases in all).
        say: Receives the lines of ``--smoke`` one by one.

    Raises:
        MedsslError: Each kind with its exit code; see ``core.errors``.
    """
    started = time.time()
    config = resolve_config(request)
    device = resolve_device(request.device)
    if request.gpus > 1:
        raise ConfigError(
            "One process trains here; several GPUs cannot be used together yet.",
            where=f"--gpus {request.gpus}",
            fix="drop --gpus; train.grad_accumulation gives the same total batch on one GPU",
            code="gpus_unavailable",
        )
    for text in config.warnings():
        log.warning("%s", text)
    data = read_training_data(config.data)
    if request.smoke or request.dry_run:
        with _scratch_run(request, config, device, data, progress) as run:
            return _smoke(run, say, started) if request.smoke else _dry_run(run, data, started)
    out = request.out or Path("runs") / request.recipe
    claim_out_folder(out, "pretrain", overwrite=request.overwrite)
    with locked(out, "run folder"), _log_file(out / "log.txt"):
        return _train(request, config, device, data, out, progress, started)


def resolve_config(request: PretrainRequest) -> PretrainConfig:
    """The configuration in force: default < file < flag < KEY=VALUE."""
    flags = {
        "data.root": None if request.data is None else str(request.data),
        "data.split_csv": None if request.split_csv is None else str(request.split_csv),
        "data.on_error": request.on_error,
        "train.seed": request.seed,
        "train.num_workers": request.workers,
        "compute_precision.precision": request.precision,
        "MODEL.WEIGHTS": None if request.init is None else str(request.init),
    }
    return load_config(
        PretrainConfig, request.config, recipes="pretrain", flags=flags, overrides=request.overrides
    )


# --- the parts of a run ----------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """Everything built, nothing trained yet."""

    config: PretrainConfig
    device: torch.device
    store: Store
    dataset: SliceDataset | ImageDataset
    objective: SelfDistillation
    trainer: Trainer
    sequences: tuple[str, ...] | None
    attention: str
    epoch_steps: int
    workers: int
    notes: list[str] = field(default_factory=list)

    @property
    def total_steps(self) -> int:
        return self.trainer.total_steps


def _build_run(
    request: PretrainRequest, config: PretrainConfig, device: torch.device, store: Store, weights: Path | None
) -> _Run:
    seed_everything(config.train.seed)
    dataset = build_dataset(store, config.data, config.train.seed)
    sequences = config.data.mri_sequences if isinstance(dataset, SliceDataset) else None
    attention = select_attention(request.attention, device, config.compute_precision.precision)
    objective, report = build_objective(config, sequences, device, weights)
    epoch_steps = config.epoch_length(len(dataset))
    schedules = build_schedules(config, epoch_steps)
    workers = min(config.train.num_workers, worker_count())
    views = build_views(config, 1 if sequences is None else len(sequences))
    seed = config.train.seed

    def batches(step: int) -> Iterator[SliceBatch]:
        return build_loader(
            dataset,
            batch_size=config.train.batch_size_per_gpu,
            accumulation=config.train.grad_accumulation,
            workers=workers,
            seed=seed,
            start_step=step,
            timeout_s=config.train.loader_timeout_s,
            pin_memory=device.type == "cuda",
            prefetch=config.train.prefetch_factor,
        )

    def make_views(slices: SliceBatch, step: int, micro: int) -> Batch:
        return views(slices, seed_for(seed, "views", step, micro, 0))

    trainer = Trainer(
        objective=objective,
        optimizer=build_optimizer(config, objective, device),
        schedules=schedules,
        batches=batches,
        views=make_views,
        total_steps=schedules.total_steps,
        device=device,
        precision=Precision(config.compute_precision.precision, device),
        accumulation=config.train.grad_accumulation,
        clip_grad=config.optim.clip_grad,
        seed=seed,
        checkpoint_every=config.train.checkpoint_period_iterations or config.train.saveckp_freq * epoch_steps,
        loader_timeout_s=config.train.loader_timeout_s,
    )
    notes = [] if report is None else report.lines()
    notes += schedules.warnings()
    return _Run(
        config, device, store, dataset, objective, trainer, sequences, attention, epoch_steps, workers, notes
    )


def _introduction(run: _Run) -> list[str]:
    """What will happen, in numbers, before the first step."""
    config = run.config
    images = 1 if run.sequences is None else len(run.sequences)
    tokens = [
        1 + config.student.num_register_tokens + images * (size // config.student.patch_size) ** 2
        for size in (config.crops.global_crops_size, config.crops.local_crops_size)
    ]
    expected = expected_first_loss(
        config.dino, config.ibot, config.crops.local_crops_number, config.train.batch_size_per_gpu
    )
    terms = ", ".join(f"{name.removesuffix('_loss')} {value:.1f}" for name, value in expected.items())
    return [
        *run.notes,
        f"{len(run.store)} cases, {describe_device(run.device)}, {config.compute_precision.precision}, attention {run.attention}, "
        f"{run.workers} loader workers",
        f"{run.total_steps} steps of {config.samples_per_step()} samples, {run.epoch_steps} an epoch; "
        f"effective learning rate {run.trainer.schedules.at(min(run.total_steps, _peak_step(run)))['lr']:.3g}",
        f"{tokens[0]} tokens a global crop, {tokens[1]} a local crop; expected first loss about {sum(expected.values()):.1f} ({terms})",
    ]


def _peak_step(run: _Run) -> int:
    return min(run.config.optim.warmup_epochs * run.epoch_steps, run.total_steps - 1)


# --- training --------------------------------------------------------------------------------------------------------


def _train(
    request: PretrainRequest,
    config: PretrainConfig,
    device: torch.device,
    data: TrainingData,
    out: Path,
    progress: Progress | None,
    started: float,
) -> PretrainResult:
    checkpoints = Checkpoints(out / "checkpoints", config=config.model_dump(mode="json"), keep=config.train.keep_checkpoints)
    checkpoint = checkpoints.latest() if request.resume else None
    if not request.resume:
        _clear(out)
    if checkpoint is not None:
        _refuse_drift(checkpoint, config, data, request)
    store = _prepare(config, data, request, progress)
    write_failures(out / "failures.csv", [*data.unreadable, *store.failures])
    weights = Path(config.MODEL.WEIGHTS or config.student.pretrained_weights or "") if checkpoint is None else None
    run = _build_run(request, config, device, store, weights if weights and weights.name else None)
    checkpoints.sequence_names = run.sequences or ()
    checkpoints.extra = {"data_digest": store.digest, "split_digest": data.split_digest}
    run.trainer.checkpoints = checkpoints
    run.trainer.telemetry = Telemetry(
        out,
        run.total_steps,
        device,
        log_every=config.train.log_period_iterations,
        console=log,
        tensorboard=config.train.tensorboard,
    )
    run.trainer.on_checkpoint = lambda step: draw_progress(
        read_metrics(out / "training_metrics.jsonl"), out / "progress.png", f"{request.recipe}, step {step}"
    )
    if checkpoint is not None:
        _refuse_other_data(checkpoint, store, request)
        run.trainer.restore(checkpoint)
        log.info("Resuming after step %d from %s", checkpoint.step, checkpoint.path)
    write_text(out / "config.yaml", dump_config(config))
    for line in _introduction(run):
        log.info("%s", line)
    record = _record(request, run, data, started)
    fit = _fit(run, out, record)
    export = _export(run, request.recipe, out, record)
    write_json(out / "run.json", {**record, "status": "finished", "step": fit.steps, **_timing(fit, started)})
    return _finished(run, fit, out, export, data, store, started)


def _fit(run: _Run, out: Path, record: dict[str, Any]) -> FitResult:
    """Train with ``run.json`` telling at any time how it stands."""
    write_json(out / "run.json", {**record, "status": "running"})
    try:
        return run.trainer.fit()
    except BaseException as error:
        status = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        reason = error.what if isinstance(error, MedsslError) else type(error).__name__
        write_json(
            out / "run.json", {**record, "status": status, "reason": reason, "step": run.trainer.steps_done}
        )
        raise


def _prepare(config: PretrainConfig, data: TrainingData, request: PretrainRequest, progress: Progress | None) -> Store:
    store = prepare_store(
        data.cases,
        config.data,
        default_cache(request.cache),
        kind=data.kind,
        workers=worker_count(request.workers),
        progress=progress,
    )
    log.info("Prepared %d cases in %s (%.1f MB)", len(store), store.folder, store.size_bytes / 1e6)
    return store


def _refuse_drift(checkpoint: Checkpoint, config: PretrainConfig, data: TrainingData, request: PretrainRequest) -> None:
    allowed = set(request.allowed_changes)
    changes = compare_configs(
        checkpoint.config,
        config.model_dump(mode="json"),
        safe=SAFE_KEYS,
        growing={"optim.epochs"},
        allowed=allowed,
    )
    for change in changes:
        log.info("Changed since the checkpoint: %s", change)
    if checkpoint.extra.get("split_digest") != data.split_digest and not allowed & {"data", "data.split_csv"}:
        raise ConfigError(
            "The cases differ from those of the run to be resumed.",
            where=f"data.split_csv: digest {str(checkpoint.extra.get('split_digest'))[:12]} -> {data.split_digest[:12]}",
            fix="restore the list of cases, choose another --out, or pass --allow-config-change data.split_csv",
            code="config_changed",
        )


def _refuse_other_data(checkpoint: Checkpoint, store: Store, request: PretrainRequest) -> None:
    if checkpoint.extra.get("data_digest") != store.digest and "data" not in request.allowed_changes:
        raise ConfigError(
            "The images differ from those of the run to be resumed.",
            where=f"data: digest {str(checkpoint.extra.get('data_digest'))[:12]} -> {store.digest[:12]} "
            "(contents, times or places of files changed)",
            fix="restore the files, choose another --out, or pass --allow-config-change data",
            code="config_changed",
        )


def _clear(out: Path) -> None:
    """Remove what an earlier run left, for --no-resume."""
    for name in ("checkpoints", "tb", "export", "eval"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("training_metrics.jsonl", "training_metrics.json", "progress.png", "run.json", "log.txt"):
        (out / name).unlink(missing_ok=True)


def _record(request: PretrainRequest, run: _Run, data: TrainingData, started: float) -> dict[str, Any]:
    header = result_header("pretrain", started)
    header.pop("elapsed_s")
    return {
        **header,
        **provenance(),
        "recipe": request.recipe,
        "device": describe_device(run.device),
        "attention": run.attention,
        "precision": run.config.compute_precision.precision,
        "n_cases": len(run.store),
        "sequences": list(run.sequences or ()),
        "data_digest": run.store.digest,
        "split_digest": data.split_digest,
        "total_steps": run.total_steps,
    }


def _timing(fit: FitResult, started: float) -> dict[str, Any]:
    return {
        "elapsed_s": round(time.time() - started, 3),
        "images_per_s": fit.images_per_s,
        "peak_memory_gib": fit.peak_memory_gib,
        "last_losses": fit.last_losses,
    }


def _export(run: _Run, recipe: str, out: Path, record: dict[str, Any]) -> Path:
    path = out / EXPORT
    digests = {key: record[key] for key in ("data_digest", "split_digest")}
    save_backbone(
        path, run.objective.teacher["backbone"], card_facts(run.config, recipe, run.trainer.steps_done, digests)
    )
    return path


def _finished(
    run: _Run, fit: FitResult, out: Path, export: Path, data: TrainingData, store: Store, started: float
) -> PretrainResult:
    failed = len(data.unreadable) + len(store.failures)
    if failed:
        raise PartialFailure(
            f"Training finished; {failed} of {failed + len(store)} cases were left out.",
            where=str(out / "failures.csv"),
            fix="mend these cases, or take them off the list; the exported backbone was trained without them",
            code="cases_failed",
        )
    loss = sum(fit.last_losses.values())
    lines = [
        f"{fit.steps} steps in {timedelta(seconds=round(time.time() - started))}"
        + (f", {fit.images_per_s:.1f} images/s, last loss {loss:.3f}" if fit.last_losses else ", nothing was left to do"),
        f"backbone: {export}",
        f"curves:   {out / 'progress.png'}",
        f"next:     medssl infer CASE --model {out} --heatmap",
    ]
    facts = {
        **result_header("pretrain", started),
        "run": out,
        "steps": fit.steps,
        "images_per_s": fit.images_per_s,
        "peak_memory_gib": fit.peak_memory_gib,
        "last_losses": fit.last_losses,
        "export": export,
    }
    return PretrainResult(lines, plain(facts))


# --- without a run folder --------------------------------------------------------------------------------------------


@contextmanager
def _scratch_run(
    request: PretrainRequest,
    config: PretrainConfig,
    device: torch.device,
    data: TrainingData,
    progress: Progress | None,
) -> Iterator[_Run]:
    """A run on the first few cases with a store that vanishes."""
    few = max(SMOKE_CASES, min(config.train.batch_size_per_gpu, 16)) if request.dry_run else SMOKE_CASES
    with tempfile.TemporaryDirectory(prefix="medssl-") as folder:
        store = prepare_store(data.cases[:few], config.data, Path(folder), kind=data.kind, progress=progress)
        if request.smoke:
            batch = min(config.train.batch_size_per_gpu, len(store))
            config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size_per_gpu": batch})})
        weights = Path(config.MODEL.WEIGHTS) if config.MODEL.WEIGHTS else None
        run = _build_run(request, config, device, store, weights)
        for line in _introduction(run):
            log.info("%s", line)
        yield run


def _smoke(run: _Run, say: Say, started: float) -> PretrainResult:
    losses = []
    source = run.trainer.batches(0)
    for index in range(SMOKE_STEPS):
        losses.append(run.trainer.step(source).total_loss)
        say(f"[step {index}] loss={losses[-1]:.4f}")
    facts = {**result_header("pretrain", started), "smoke": True, "losses": losses}
    return PretrainResult([f"smoke test passed: {SMOKE_STEPS} steps on {len(run.store)} cases, nothing written"], facts)


def _dry_run(run: _Run, data: TrainingData, started: float) -> PretrainResult:
    fit = run.trainer.measure(3 if run.device.type == "cuda" else 1)
    steps = run.config.optim.epochs * run.config.epoch_length(len(data.cases))
    seconds = steps * run.config.samples_per_step() / fit.images_per_s
    per_case = run.store.size_bytes / max(len(run.store), 1)
    cache = int(math.ceil(per_case * len(data.cases)))
    facts = {
        **result_header("pretrain", started),
        "dry_run": True,
        "images_per_s": fit.images_per_s,
        "hours": seconds / 3600,
        "steps": steps,
        "peak_memory_gib": fit.peak_memory_gib,
        "cache_bytes": cache,
        "source_bytes": estimate_bytes(data.cases),
        "first_loss": fit.last_losses,
    }
    lines = [
        f"{fit.images_per_s:.2f} images/s: {steps} steps take about {seconds / 3600:.2f} h",
        f"peak memory {fit.peak_memory_gib:.2f} GiB, cache about {cache / 1e6:.1f} MB for {len(data.cases)} cases",
        f"first loss {sum(fit.last_losses.values()):.3f}; nothing was written",
    ]
    return PretrainResult(lines, facts)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Everything logged goes to ``log.txt`` too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
