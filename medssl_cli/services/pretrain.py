"""Pretrain a backbone: read, prepare, build, train, export."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch

from medssl_cli.core.config import dump_config, load_config
from medssl_cli.core.errors import ConfigError, PartialFailure
from medssl_cli.core.result import Result
from medssl_cli.core.run import (
    plain,
    provenance,
    result_header,
    worker_count,
    write_failures,
    write_text,
)
from medssl_cli.data.datasets import prepare_store
from medssl_cli.data.store import Store, default_cache, estimate_bytes
from medssl_cli.engine.checkpoint import Checkpoint, Checkpoints, compare_configs
from medssl_cli.engine.telemetry import Telemetry, read_metrics
from medssl_cli.engine.trainer import FitResult
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import save_backbone
from medssl_cli.report.plots import draw_progress
from medssl_cli.services.build import card_facts
from medssl_cli.services.devices import describe_device, resolve_device
from medssl_cli.services.lookup import EXPORT, run_status
from medssl_cli.services.pretrain_config import SAFE_KEYS, PretrainConfig, dataset_string_as_overrides
from medssl_cli.services.pretrain_run import PretrainRun, build_run
from medssl_cli.services.run_folder import HeldLog, RunFolder, stoppable, without_home
from medssl_cli.services.training_data import TrainingData, read_training_data

log = logging.getLogger(__name__)

SMOKE_STEPS = 5
SMOKE_CASES = 4
SMOKE_BATCH = 2  # the least that KoLeo can work on; the documented recipe takes minutes on a CPU even so
SMOKE_ROOT = "PROSTATE_DATA_ROOT"
"""Environment variable with the data root of ``--smoke``, where nothing else names one."""

LEFT_BY_A_RUN = (
    *("checkpoints", "tb", "export", "eval", "training_metrics.jsonl", "training_metrics.json"),
    *("progress.png", "run.json", "log.txt", "config.yaml", "failures.csv"),
)
"""What ``--no-resume`` removes once the new run is built."""

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


def pretrain(request: PretrainRequest, *, progress: Progress | None = None, say: Say = log.info) -> Result:
    """Train as the request says; resume if the run folder holds checkpoints.

    Args:
        request: What the user typed.
        progress: Called with (cases prepared, cases in all).
        say: Receives the lines of ``--smoke`` one by one.

    Raises:
        MedsslError: Each kind with its exit code; see ``core.errors``.
    """
    started = time.time()
    with HeldLog() as lines, stoppable("preparing"):
        config = resolve_config(request)
        _check_request(request)
        device = resolve_device(request.device)
        if request.config is None:
            log.warning("No --config: DINOv2's own values are taken (%s, batch %d); see --list-configs for recipes.",
                        config.student.arch, config.train.batch_size_per_gpu)  # fmt: skip
        for text in config.warnings():
            log.warning("%s", text)
        data = read_training_data(config.data)
        _refuse_without_effect(config, data)
        if request.smoke or request.dry_run:
            with _scratch_run(request, config, device, data, progress) as run:
                return _smoke(run, say, started) if request.smoke else _dry_run(run, data, started)
        out, inputs = _out(request, config), _inputs(request, config)
        with RunFolder(out, "pretrain", lines, overwrite=request.overwrite, inputs=inputs) as folder:
            return _train(request, config, device, data, folder, progress, started)


def _refuse_without_effect(config: PretrainConfig, data: TrainingData) -> None:
    keys = config.without_effect(data.kind)
    if keys:
        raise ConfigError(
            "These keys have no effect on plain pictures.",
            where="\n".join(keys),
            fix="leave them out, or take a recipe for pictures such as images_small",
            code="config_without_effect",
        )


def resolve_config(request: PretrainRequest) -> PretrainConfig:
    """The configuration in force: default < file < flag < KEY=VALUE.

    Raises:
        ConfigError: Unreadable file, unknown keys, wrong types: all of them in one message.
    """
    flags = {
        "data.root": None if request.data is None else str(request.data),
        "data.split_csv": None if request.split_csv is None else str(request.split_csv),
        "data.on_error": request.on_error,
        "train.seed": request.seed,
        "train.num_workers": request.workers,
        "train.output_dir": None if request.out is None else str(request.out),
        "compute_precision.precision": request.precision,
        "MODEL.WEIGHTS": None if request.init is None else str(request.init),
    }
    config = load_config(
        PretrainConfig, request.config, recipes="pretrain", flags=flags, overrides=_spelt_out(request.overrides)
    )
    root = os.environ.get(SMOKE_ROOT)
    if request.smoke and root and not config.data.root:
        log.info("data: %s, as %s says", root, SMOKE_ROOT)
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": root})})
    return config


def _spelt_out(overrides: tuple[str, ...]) -> list[str]:
    """The overrides; a dataset string among them is followed by what it sets, so that it counts as an override."""
    texts = []
    for text in overrides:
        texts.append(text)
        key, _, value = text.partition("=")
        if key.strip() == "train.dataset_path" and value:
            texts += dataset_string_as_overrides(value)
    return texts


def _check_request(request: PretrainRequest) -> None:
    if request.gpus > 1:
        raise ConfigError(
            "One process trains here; several GPUs cannot be used together yet.",
            where=f"--gpus {request.gpus}",
            fix="drop --gpus; train.grad_accumulation gives the same total batch on one GPU",
            code="gpus_unavailable",
        )
    if request.smoke and request.dry_run:
        raise ConfigError("--smoke and --dry-run exclude each other.", fix="pass one of them", code="flags_exclude")


def _out(request: PretrainRequest, config: PretrainConfig) -> Path:
    named = config.train.output_dir
    return Path(named) if named not in ("", ".") else Path("runs") / request.recipe


def _inputs(request: PretrainRequest, config: PretrainConfig) -> list[Path]:
    """What the run reads, and the cache that other runs share."""
    named = (config.data.root, config.data.split_csv, request.config, config.initial_weights)
    return [default_cache(request.cache), *(Path(path) for path in named if path and Path(path).exists())]


# --- training --------------------------------------------------------------------------------------------------------


def _train(
    request: PretrainRequest,
    config: PretrainConfig,
    device: torch.device,
    data: TrainingData,
    folder: RunFolder,
    progress: Progress | None,
    started: float,
) -> Result:
    """Prepare, build, take up the checkpoint if there is one, train, export."""
    checkpoints = Checkpoints(
        folder.path / "checkpoints", config=_comparable(config), keep=config.train.keep_checkpoints
    )
    checkpoint = checkpoints.latest() if request.resume else None
    if checkpoint is not None:
        _refuse_drift(checkpoint, config, data, request)
    store = _prepare(config, data, request, progress)
    weights = config.initial_weights if checkpoint is None else None
    run = build_run(config, device, store, weights=weights, attention=request.attention, workers=request.workers)
    checkpoints.sequence_names = run.sequences or ()
    checkpoints.extra = {"data_digest": store.digest, "split_digest": data.split_digest}
    run.trainer.checkpoints = checkpoints
    if checkpoint is not None:
        _refuse_other_data(checkpoint, store, request)
        run.trainer.restore(checkpoint)
        if _is_finished(run, folder):
            return _finished_before(run, folder, data, started)
    folder.begin(clear=() if request.resume else LEFT_BY_A_RUN)
    folder.facts = _facts(request, run, data, started)
    with folder.telling_the_end(lambda: {"step": run.trainer.steps_done}):
        _open(request, run, folder, data, checkpoint)
        with stoppable("training"):  # the trainer has its own handlers; this is for its first and last moments
            fit = run.trainer.fit()
        with stoppable("exporting"):
            export = _export(run, request.recipe, folder)
            folder.say("finished", step=fit.steps, **_timing(fit, started))
    return _finished(run, fit, folder, export, data, started)


def _open(
    request: PretrainRequest,
    run: PretrainRun,
    folder: RunFolder,
    data: TrainingData,
    checkpoint: Checkpoint | None,
) -> None:
    """Write what stands in the folder from the first step on, and let the trainer log and tell into it."""
    out = folder.path

    def after_checkpoint(step: int) -> None:
        folder.say("running", step=step)
        rows = read_metrics(out / "training_metrics.jsonl")
        draw_progress(rows, out / "progress.png", f"{request.recipe}, step {step}")

    write_text(out / "config.yaml", dump_config(run.config))
    write_failures(out / "failures.csv", _failures(data, run.store))
    if checkpoint is not None:
        log.info("Resuming after step %d from %s", checkpoint.step, checkpoint.path)
    for line in run.introduction():
        log.info("%s", line)
    folder.say("running", step=run.trainer.steps_done)
    run.trainer.telemetry = Telemetry(
        out,
        run.total_steps,
        run.device,
        log_every=run.config.train.log_period_iterations,
        console=log,
        tensorboard=run.config.train.tensorboard,
    )
    run.trainer.on_checkpoint = after_checkpoint


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


def _failures(data: TrainingData, store: Store) -> list[tuple[str, str, str, str]]:
    return [*data.unreadable, *store.failures]


def _facts(request: PretrainRequest, run: PretrainRun, data: TrainingData, started: float) -> dict[str, Any]:
    """What ``run.json`` says from the first step on."""
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
        "n_failed": len(_failures(data, run.store)),
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


def _export(run: PretrainRun, recipe: str, folder: RunFolder) -> Path:
    path = folder.path / EXPORT
    digests = {key: folder.facts[key] for key in ("data_digest", "split_digest")}
    teacher = cast(VisionTransformer, run.objective.teacher["backbone"])
    save_backbone(path, teacher, card_facts(run.config, recipe, run.trainer.steps_done, digests))
    return path


# --- resuming --------------------------------------------------------------------------------------------------------


def _comparable(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as a checkpoint keeps it: it is plain data that may leave this machine."""
    return without_home(config.model_dump(mode="json"))


def _refuse_drift(checkpoint: Checkpoint, config: PretrainConfig, data: TrainingData, request: PretrainRequest) -> None:
    """Refuse a configuration that differs; the list of cases counts by its ids, not by the name of its file."""

    def with_digest(values: dict[str, Any], digest: object) -> dict[str, Any]:
        return {**values, "data": {**values["data"], "split_csv": f"ids {str(digest)[:12]}"}}

    changes = compare_configs(
        with_digest(checkpoint.config, checkpoint.extra.get("split_digest")),
        with_digest(_comparable(config), data.split_digest),
        safe=SAFE_KEYS,
        growing={"optim.epochs"},
        allowed=set(request.allowed_changes),
    )
    for change in changes:
        log.info("Changed since the checkpoint: %s", change)


def _refuse_other_data(checkpoint: Checkpoint, store: Store, request: PretrainRequest) -> None:
    if checkpoint.extra.get("data_digest") != store.digest and not {"data", "data.split_csv"} & {
        *request.allowed_changes
    }:
        raise ConfigError(
            "The images differ from those of the run to be resumed.",
            where=f"data: digest {str(checkpoint.extra.get('data_digest'))[:12]} -> {store.digest[:12]} "
            "(contents, times or places of files changed)",
            fix="restore the files, choose another --out, or pass --allow-config-change data",
            code="config_changed",
        )


def _is_finished(run: PretrainRun, folder: RunFolder) -> bool:
    done = run.trainer.steps_done >= run.total_steps
    return done and run_status(folder.path) == "finished" and (folder.path / EXPORT).is_file()


# --- results ---------------------------------------------------------------------------------------------------------


def _finished_before(run: PretrainRun, folder: RunFolder, data: TrainingData, started: float) -> Result:
    out, steps = folder.path, run.trainer.steps_done
    lines = [
        f"nothing left to do: all {steps} steps of this run were done before",
        f"backbone: {out / EXPORT}",
        "longer:   the same command with a larger optim.epochs goes on; --no-resume starts afresh",
    ]
    facts = {**result_header("pretrain", started), "run": out, "steps": steps, "steps_now": 0, "export": out / EXPORT}
    return Result(lines, plain(facts), _left_out(run, folder, data))


def _finished(
    run: PretrainRun, fit: FitResult, folder: RunFolder, export: Path, data: TrainingData, started: float
) -> Result:
    out = folder.path
    loss = f", last loss {sum(fit.last_losses.values()):.3f}" if fit.last_losses else ""
    speed = f", {fit.images_per_s:.1f} images/s" if fit.images_per_s else ""
    lines = [
        f"{fit.steps} steps in {timedelta(seconds=round(time.time() - started))}{speed}{loss}",
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
    return Result(lines, plain(facts), _left_out(run, folder, data))


def _left_out(run: PretrainRun, folder: RunFolder, data: TrainingData) -> PartialFailure | None:
    failed = len(_failures(data, run.store))
    if not failed:
        return None
    return PartialFailure(
        f"Training finished; {failed} of {failed + len(run.store)} cases were left out.",
        where=str(folder.path / "failures.csv"),
        fix="mend these cases, or take them off the list; the exported backbone was trained without them",
        code="cases_failed",
    )


# --- without a run folder --------------------------------------------------------------------------------------------


@contextmanager
def _scratch_run(
    request: PretrainRequest,
    config: PretrainConfig,
    device: torch.device,
    data: TrainingData,
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
        )
        for line in run.introduction():
            log.info("%s", line)
        yield run


def _smoke(run: PretrainRun, say: Say, started: float) -> Result:
    losses = []
    with contextlib.closing(run.batches(0)) as source:
        for index in range(SMOKE_STEPS):
            losses.append(run.trainer.step(source).total_loss)
            say(f"[step {index}] loss={losses[-1]:.4f}")
    facts = {**result_header("pretrain", started), "smoke": True, "losses": losses}
    return Result([f"smoke test passed: {SMOKE_STEPS} steps on {len(run.store)} cases, nothing written"], facts)


def _dry_run(run: PretrainRun, data: TrainingData, started: float) -> Result:
    """One step (three on a GPU, where the first one only warms up), and what the whole run would take."""
    fit = run.trainer.measure(3 if run.device.type == "cuda" else 1)
    steps = run.config.optim.epochs * run.config.epoch_length(len(data.cases))
    hours = steps * run.config.samples_per_step() / fit.images_per_s / 3600
    cache = math.ceil(run.store.size_bytes / len(run.store) * len(data.cases))
    facts = {
        **result_header("pretrain", started),
        "dry_run": True,
        "images_per_s": fit.images_per_s,
        "hours": hours,
        "steps": steps,
        "peak_memory_gib": fit.peak_memory_gib,
        "cache_bytes": cache,
        "source_bytes": estimate_bytes(data.cases),
        "first_loss": fit.last_losses,
    }
    lines = [
        f"{fit.images_per_s:.2f} images/s: {steps} steps take about {hours:.2f} h",
        f"peak memory {fit.peak_memory_gib:.2f} GiB, cache about {cache / 1e6:.1f} MB for {len(data.cases)} cases",
        f"first loss {sum(fit.last_losses.values()):.3f}; nothing was written",
    ]
    return Result(lines, facts)
