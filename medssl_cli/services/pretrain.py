"""Pretrain a backbone: read, prepare, build, train, export."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch

from medssl_cli.core.config import dump_config
from medssl_cli.core.errors import ConfigError, PartialFailure
from medssl_cli.core.result import Result
from medssl_cli.core.run import plain, provenance, result_header, worker_count, write_failures, write_text
from medssl_cli.data.datasets import prepare_store
from medssl_cli.data.store import Store, default_cache
from medssl_cli.engine.checkpoint import Checkpoint, Checkpoints
from medssl_cli.engine.distributed import (
    find_place,
    from_first,
    in_turns,
    joined,
    rank,
    refuse_differences,
    world_size,
)
from medssl_cli.engine.memory import saying_out_of_memory
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.telemetry import Telemetry
from medssl_cli.engine.trainer import FitResult
from medssl_cli.models.zoo import save_backbone
from medssl_cli.services.build import build_monitor, card_facts, check_weights
from medssl_cli.services.class_labels import ClassLabels, read_class_labels
from medssl_cli.services.devices import describe_device
from medssl_cli.services.labelled_data import LabelledData, read_labelled_data
from medssl_cli.services.lookup import EXPORT, run_status
from medssl_cli.services.online_evaluation import Look, Network, OnlineEvaluation, prepare_evaluation, read_history
from medssl_cli.services.pretrain_config import PretrainConfig
from medssl_cli.services.pretrain_group import (
    device_of,
    first_speaks,
    is_batch_shell,
    launch_group,
    open_folder,
    refuse_different_commands,
    refuse_unshared,
    submit_job,
)
from medssl_cli.services.pretrain_request import (
    PretrainRequest,
    check_request,
    inputs_of,
    resolve_config,
    run_folder_of,
)
from medssl_cli.services.pretrain_resume import comparable, refuse_drift, refuse_other_data, refuse_other_labels
from medssl_cli.services.pretrain_run import PretrainRun, build_run
from medssl_cli.services.pretrain_trial import Progress, Say, dry_run, scratch_run, smoke, smoke_lines
from medssl_cli.services.run_folder import HeldLog, RunFolder, stoppable
from medssl_cli.services.run_watch import RunWatch
from medssl_cli.services.training_data import TrainingData, read_training_data

log = logging.getLogger(__name__)

LEFT_BY_A_RUN = (
    *("checkpoints", "tb", "export", "eval", "training_metrics.jsonl", "training_metrics.json"),
    *("progress.png", "run.html", "run.json", "log.txt", "config.yaml", "failures.csv"),
)
"""What ``--no-resume`` removes once the new run is built."""


def pretrain(request: PretrainRequest, *, progress: Progress | None = None, say: Say = log.info) -> Result:
    """Train as the request says; resume if the run folder holds checkpoints.

    With ``--gpus`` this process only starts those that train; in one that torchrun or srun started it joins the group.

    Args:
        request: What the user typed.
        progress: Called with (cases prepared, cases in all); not with ``--gpus``.
        say: Receives the lines of ``--smoke`` one by one.

    Returns:
        What was done; empty in all processes of a group but the first.

    Raises:
        MedsslError: Each kind with its exit code; see ``core.errors``.
    """
    if request.submit is not None:
        return submit_job(request)
    place = find_place(os.environ)
    if request.gpus > 1 and (place is None or is_batch_shell(place)):
        result = launch_group(request, _pretrain_in_group)
        for line in smoke_lines(result.facts.get("losses", ())):
            say(line)
        return result
    started = time.time()
    device = device_of(request, place)
    with joined(place, device):
        result = _pretrain(request, device, progress if rank() == 0 else None, say, started)
    return result if place is None or place.rank == 0 else Result([], {})


def _pretrain(
    request: PretrainRequest, device: torch.device, progress: Progress | None, say: Say, started: float
) -> Result:
    with first_speaks(), HeldLog() as lines, stoppable("preparing"):
        config = resolve_config(request)
        check_request(request)
        refuse_different_commands(request, config)
        if request.config is None:
            log.warning("No --config: DINOv2's own values are taken (%s, batch %d); see --list-configs for recipes.",
                        config.student.arch, config.train.batch_size_per_gpu)  # fmt: skip
        for text in config.warnings():
            log.warning("%s", text)
        data = from_first(lambda: read_training_data(config.data))
        config = config.model_copy(update={"data": data.config})
        _refuse_without_effect(config, data)
        labels = from_first(lambda: read_class_labels(config, data))
        labelled = None if request.smoke else from_first(lambda: _read_labelled(config))
        with saying_out_of_memory(device):
            if request.smoke or request.dry_run:
                with scratch_run(request, config, device, data, labels, progress) as run:
                    return smoke(run, say, started) if request.smoke else dry_run(run, data, started)
            out, inputs = run_folder_of(request, config), inputs_of(request, config)
            with open_folder(out, lines, request, inputs) as folder:
                return _train(request, config, device, data, labels, labelled, folder, progress, started)


def _pretrain_in_group(request: PretrainRequest) -> Result:
    return pretrain(request, say=log.debug)  # the process that the user looks at says it


def _read_labelled(config: PretrainConfig) -> LabelledData | None:
    """The cases to be scored; faults of their lists and labels show before anything is written or prepared."""
    return read_labelled_data(config.evaluation, config.data) if config.evaluation.is_on else None


def _refuse_without_effect(config: PretrainConfig, data: TrainingData) -> None:
    keys = config.without_effect(data.kind)
    if keys:
        raise ConfigError(
            "These keys have no effect on plain pictures.",
            where="\n".join(keys),
            fix="leave them out, or take a recipe for pictures such as images_small",
            code="config_without_effect",
        )


# --- training --------------------------------------------------------------------------------------------------------


def _train(
    request: PretrainRequest,
    config: PretrainConfig,
    device: torch.device,
    data: TrainingData,
    labels: ClassLabels,
    labelled: LabelledData | None,
    folder: RunFolder,
    progress: Progress | None,
    started: float,
) -> Result:
    """Prepare, build, take up the checkpoint if there is one, train, export."""
    checkpoints = Checkpoints(
        folder.path / "checkpoints", config=comparable(config), keep=config.train.keep_checkpoints
    )
    checkpoint = from_first(checkpoints.latest) if request.resume else None
    if checkpoint is not None:
        refuse_drift(checkpoint, config, data, request)
        refuse_other_labels(checkpoint, labels, request)
    weights = config.initial_weights if checkpoint is None else None
    if weights is not None:
        check_weights(config, weights, data.kind)
    store = _prepare(config, data, request, progress)
    evaluation = _prepare_evaluation(config, data, labelled, folder, request, device, progress)
    run = build_run(
        config,
        device,
        store,
        weights=weights,
        attention=request.attention,
        used_before=None if checkpoint is None else checkpoint.extra.get("attention"),
        workers=request.workers,
        labels=labels,
    )
    checkpoints.sequence_names = run.sequences or ()
    checkpoints.extra = _remembered(run, data, labels)
    run.trainer.checkpoints = checkpoints
    if checkpoint is not None:
        refuse_other_data(checkpoint, store, request)
        run.trainer.restore(checkpoint)
        if _is_finished(run, folder):
            return _finished_before(run, folder, data, started)
    folder.begin(clear=() if request.resume else LEFT_BY_A_RUN)
    refuse_unshared(folder.path)
    folder.facts = _facts(request, run, data, started)
    watch = RunWatch(
        folder,
        request.recipe,
        lambda: run.parallel.whole(run.objective.teacher["backbone"]),
        build_monitor(config, run.schedules),
    )
    watch.period, watch.evaluation = run.trainer.evaluate_every, evaluation
    with folder.telling_the_end(lambda: {"step": run.trainer.steps_done}):
        if run.first:
            _open(run, folder, data, checkpoint, watch)
        run.trainer.on_checkpoint = watch.after_checkpoint
        with stoppable("training"):  # the trainer has its own handlers; this is for its first and last moments
            watch.start(run.trainer.steps_done)
            fit = run.trainer.fit()
        with stoppable("exporting"):
            export = _export(run, request.recipe, folder)
            watch.finish(fit.steps)
            folder.say("finished", step=fit.steps, **_timing(fit, started))
            if run.first:
                watch.show(f"{request.recipe}, {fit.steps} steps")
    return _finished(run, fit, folder, export, data, started)


def _prepare_evaluation(
    config: PretrainConfig,
    data: TrainingData,
    labelled: LabelledData | None,
    folder: RunFolder,
    request: PretrainRequest,
    device: torch.device,
    progress: Progress | None,
) -> OnlineEvaluation | None:
    """Images of the labelled cases to score on, prepared before anything is trained; in the first process alone."""
    if not config.evaluation.is_on:
        return None
    prepared: list[OnlineEvaluation] = []
    autocast = Precision(config.compute_precision.precision, device).autocast

    def prepare() -> None:
        prepared.append(
            prepare_evaluation(
                config.evaluation,
                config.data,
                folder.path,
                cache=default_cache(request.cache),
                look=Look(config.crops.mean, config.crops.std, autocast),
                card=lambda step: card_facts(config, request.recipe, step, {"split_digest": data.split_digest}),
                labelled=labelled,
                pretraining=data.cases,
                workers=worker_count(request.workers),
                progress=progress,
            )
        )

    from_first(prepare)
    return prepared[0] if prepared else None


def _open(
    run: PretrainRun, folder: RunFolder, data: TrainingData, checkpoint: Checkpoint | None, watch: RunWatch
) -> None:
    """Write what stands in the folder from the first step on, and let the trainer log into it."""
    out = folder.path
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
        monitor=watch.monitor,
    )


def _prepare(config: PretrainConfig, data: TrainingData, request: PretrainRequest, progress: Progress | None) -> Store:
    """The store, prepared by one process of each cache and opened by the others; the same images in all of them."""

    def prepare() -> Store:
        return prepare_store(
            data.cases,
            config.data,
            default_cache(request.cache),
            kind=data.kind,
            workers=worker_count(request.workers),
            progress=progress,
        )

    store = in_turns(prepare)
    log.info("Prepared %d cases in %s (%.1f MB)", len(store), store.folder, store.size_bytes / 1e6)
    refuse_differences(
        {"digest of the data": store.digest},
        "The processes of this run have different images before them.",
        "give all machines the same data under the same path; copies must keep the times of files (cp -a, rsync -a)",
    )
    return store


def _remembered(run: PretrainRun, data: TrainingData, labels: ClassLabels) -> dict[str, Any]:
    """What each checkpoint keeps besides the configuration, so that a resumed run can be compared."""
    facts: dict[str, Any] = {"data_digest": run.store.digest, "split_digest": data.split_digest}
    facts["attention"] = run.attention
    if world_size() > 1:
        facts["world"] = world_size()
    if labels.digest is not None:
        facts["labels_digest"] = labels.digest
    return facts


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
    teacher = cast(Network, run.parallel.whole(run.objective.teacher["backbone"]))

    def write() -> Path:
        save_backbone(path, teacher, card_facts(run.config, recipe, run.trainer.steps_done, digests))
        return path

    return from_first(write)


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
    if run.config.evaluation.is_on and not read_history(out):
        lines.insert(1, "scores:   none: nothing was scored while it trained, and a finished run is not scored")
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
