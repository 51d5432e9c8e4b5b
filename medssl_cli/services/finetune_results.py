"""What a fine-tuning leaves: the backbone of the chosen epoch, the head on it, and how it came about.

Files are made in a hidden folder first and then take their places, the card of the head last: weights and cards carry
digests of one another, so that a crash in between is noticed by whoever reads them.

Letters: B training cases, P width of the vector of a case.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl_cli.core.config import dump_config
from medssl_cli.core.errors import Interrupted, MedsslError
from medssl_cli.core.run import (
    hide_home,
    plain,
    provenance,
    result_header,
    say_disk_errors,
    temporary_folder,
    write_csv,
    write_failures,
    write_json,
    write_text,
)
from medssl_cli.data.feature_store import ImageFacts
from medssl_cli.engine.trainer import StopSignal
from medssl_cli.metrics.novelty import Novelty
from medssl_cli.models.zoo import card_path, save_backbone
from medssl_cli.report.head_plots import draw_head_progress
from medssl_cli.services.backbone import open_backbone
from medssl_cli.services.devices import describe_device
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.finetune_data import FinetuneJob
from medssl_cli.services.finetune_training import Tuned, Tuner
from medssl_cli.services.head import head_tensors, novelty_vector, save_head, write_tensors
from medssl_cli.services.head_examples import case_rows
from medssl_cli.services.head_request import COMMAND, TrainHeadRequest
from medssl_cli.services.head_results import Finished, finish_head, head_card
from medssl_cli.services.lookup import EXPORT, HEAD_CARD, FoundModel
from medssl_cli.services.train_head import LAST_WEIGHTS, selection_words, training_notes

log = logging.getLogger(__name__)

LAST_EXPORT = EXPORT.with_name("last_backbone.safetensors")
_OF_CARD_ITSELF = (
    *("schema_version", "medssl_version", "kind", "family", "arch", "sequences", "img_size", "patch_size"),
    *("embed_dim", "weights", "sha256", "n_parameters", "dtype", "interpolate_offset", "interpolate_antialias"),
)  # fmt: skip
"""What ``save_backbone`` writes of the network itself; all else of the card is handed on."""

_DEFINITIONS = {
    "best_score": "value of selection.criterion on the validation cases at the chosen epoch",
    "train_loss": "mean loss over the training cases as random views show them, with class weights, while the weights "
    "move",
    "val_loss": "the same loss on the whole validation cases, with the class weights of the training part",
    "val_macro_auroc": "mean area under the ROC curve over the classes for which it is defined",
    "lr": "learning rate of the head at the first step of the epoch",
    "rates": "share of that rate, and of the weight decay, that each tensor has; lowest rate first",
    "validation": "metrics on the validation cases that also chose epoch, calibration and thresholds; `medssl eval` "
    "tells of cases that nothing was chosen on",
}


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        finished: Calibration, thresholds and figures on the validation cases.
        facts: For scripts.
    """

    finished: Finished
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Seen:
    """The training cases as the chosen backbone sees them.

    Args:
        novelty: How far a new case may lie from them.
        facts: Of their images.
    """

    novelty: Novelty | None
    facts: list[ImageFacts]


def write_run(
    out: Path, job: FinetuneJob, tuner: Tuner, tuned: Tuned, origin: Mapping[str, Any], started: float
) -> Written:
    """Judge the chosen epoch and write every file of the run but ``run.json``.

    A signal meanwhile leaves the distances of the training cases out, which take a pass over all of them; it is put
    into ``tuned.stopped``.

    Args:
        out: Run folder, which may hold an earlier run of the command.
        job: Data and settings.
        tuner: The network.
        tuned: What training made of it.
        origin: Card of the backbone before.
        started: ``time.time()`` at the start.

    Raises:
        ResourceError: The disk is full.
    """
    labels = patients = None
    if job.val is not None:
        labels, patients = job.val.labels_BL, job.val.patient_ids
    finished = finish_head(job.targets, job.config, tuned.val_logits_VC, labels, patients or ())
    finished.notes.extend(training_notes(tuned.trained, job.config))
    header = result_header(COMMAND, started)
    with say_disk_errors(out):
        stage = temporary_folder(out, "finetune")
    try:
        embedder = _write_backbones(stage, out, job, tuner, tuned, origin)
        seen = _see_again(job, embedder, tuned)
        for note in finished.notes:
            log.warning("%s", note)
        card = {**header, **_card(out, job, embedder, tuned, finished, seen)}
        summary = train_summary(job, tuner, tuned, finished, started)
        write_text(stage / "config.yaml", dump_config(job.config))
        write_csv(stage / "cases.csv", ("part", "case_id", "patient_id"), case_rows(job.train, job.val))
        write_json(stage / "train_summary.json", summary)
        _draw(stage, job, tuned)
        write_tensors(stage / LAST_WEIGHTS, head_tensors(tuned.trained.last))
        card = save_head(stage, card, tuned.trained.module, novelty=seen.novelty, reliability=finished.reliability)
        _publish(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    write_failures(out / "failures.csv", job.failures)
    printed = ("num_train", "num_val", "selection", "best_score", "validation", "notes")
    facts = {**header, **{key: summary[key] for key in printed}, "head": card, "out": hide_home(str(out))}
    return Written(finished, plain({**facts, "failures": len(job.failures)}))


def run_facts(
    request: TrainHeadRequest, job: FinetuneJob, origin: Mapping[str, Any], device: torch.device, started: float
) -> dict[str, Any]:
    """``run.json`` without the status."""
    return {
        **result_header(COMMAND, started),
        "task": job.targets.task,
        "head": job.kind,
        "finetune": True,
        "classes": list(job.targets.classes),
        "data": str(request.data),
        "labels": None if request.labels is None else str(request.labels),
        "backbone_sha256": origin.get("sha256"),
        "split_digests": job.split_digests,
        "sequences": list(job.embedder.backbone.sequences),
        "device": describe_device(device),
        **provenance(),
    }


def train_summary(job: FinetuneJob, tuner: Tuner, tuned: Tuned, finished: Finished, started: float) -> dict[str, Any]:
    """``train_summary.json``."""
    trained = tuned.trained
    return {
        **result_header(COMMAND, started),
        "config": job.config.model_dump(mode="json"),
        "task": job.targets.task,
        "head": job.kind,
        "finetune": True,
        "device": describe_device(tuner.device),
        "input_dim": int(job.embedder.width * (2 if job.pool_mode == "meanmax" else 1)),
        "num_classes": job.targets.outputs,
        "classes": list(job.targets.classes),
        "num_train": len(job.train),
        "num_val": 0 if job.val is None else len(job.val),
        "steps": tuner.steps_done,
        "stopped": None if tuned.stopped is None else tuned.stopped.what,
        "split": job.split,
        "inconsistent_labels": job.inconsistent,
        "selection": selection_words(trained),
        "best_score": -trained.score if trained.criterion == "loss" else trained.score,
        "history": trained.history,
        "rates": tuner.rates,
        "validation": None if finished.evaluation is None else finished.evaluation.to_json(),
        "notes": finished.notes,
        "best_checkpoint": "best.safetensors",
        "last_checkpoint": LAST_WEIGHTS,
        "best_backbone": EXPORT.as_posix(),
        "last_backbone": LAST_EXPORT.as_posix() if job.config.keep_last else None,
        "seconds": round(time.time() - started, 3),
        "definitions": _DEFINITIONS,
    }


# --- steps of it -----------------------------------------------------------------------------------------------------


def _write_backbones(
    stage: Path, out: Path, job: FinetuneJob, tuner: Tuner, tuned: Tuned, origin: Mapping[str, Any]
) -> Embedder:
    """The backbones of the chosen and of the last epoch; the embedder of the chosen one, read back from its file."""
    wanted = [(LAST_EXPORT, tuned.last_backbone, len(tuned.trained.history))] if job.config.keep_last else []
    wanted.append((EXPORT, tuned.backbone, tuned.trained.epoch))
    for name, tensors, epoch in wanted:
        tuner.model.load_state_dict(tensors)
        save_backbone(stage / name, tuner.model, _backbone_card(job, origin, epoch))
    backbone = open_backbone(FoundModel(stage / EXPORT, out, "fine-tuned"), tuner.device)
    return Embedder(backbone, job.config.extract)


def _backbone_card(job: FinetuneJob, origin: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    handed_on = {key: value for key, value in origin.items() if key not in _OF_CARD_ITSELF}
    finetuned = {
        "from_sha256": origin.get("sha256"),
        "task": job.targets.task,
        "targets": list(job.targets.names),
        "classes": list(job.targets.classes),
        "epoch": epoch,
        "cases": len(job.train),
        "seed": job.config.seed,
    }
    return {**handed_on, "finetuned": finetuned}


def _see_again(job: FinetuneJob, embedder: Embedder, tuned: Tuned) -> _Seen:
    """The training cases through the chosen backbone, whole, as new cases will come."""
    if tuned.stopped is not None:
        return _Seen(None, [])
    vectors: list[np.ndarray] = []
    facts: list[ImageFacts] = []
    plain_settings = job.config.extract.model_copy(update={"digest": "fast"})  # nothing is kept: no file need be hashed
    looking = Embedder(embedder.backbone, plain_settings)
    with StopSignal() as stop:
        for _, _, found in looking.embed_many(job.cases_of(job.train).cases):
            if isinstance(found, MedsslError):
                raise found
            vectors.append(novelty_vector(found.slices_ND, job.pool_mode))
            facts.append(found.facts)
            if stop.received is not None:
                tuned.stopped = Interrupted(
                    f"{stop.received} came after the last step.",
                    where=f"{len(vectors)} of {len(job.train)} training cases were looked at again",
                    fix="run the same command again to know how far new cases lie from the training cases",
                    code="interrupted",
                )
                return _Seen(None, [])
    return _Seen(Novelty.fit(np.stack(vectors), job.train.patient_ids, seed=job.config.seed), facts)


def _card(
    out: Path, job: FinetuneJob, embedder: Embedder, tuned: Tuned, finished: Finished, seen: _Seen
) -> dict[str, Any]:
    backbone = embedder.backbone
    model = {
        "path": str((out / EXPORT).absolute()),
        "sha256": backbone.card["sha256"],
        "arch": backbone.card.get("arch"),
        "sequences": list(backbone.sequences),
        "finetuned": True,
    }
    return head_card(
        job.targets,
        job.config,
        finished,
        tuned.trained,
        kind=job.kind,
        pool_mode=job.pool_mode,
        slice_dim=embedder.width,
        preprocessing=embedder.settings,
        model=model,
        run=out,
        facts=seen.facts,
        split_digests=job.split_digests,
    )


def _draw(stage: Path, job: FinetuneJob, tuned: Tuned) -> None:
    trained = tuned.trained
    draw_head_progress(
        stage / "progress.png",
        f"{job.kind} head and backbone, {job.targets.task}: {len(job.train)} training and "
        f"{0 if job.val is None else len(job.val)} validation cases",
        classes=job.targets.classes,
        history=plain(trained.history),
        criterion=trained.criterion,
        chosen=trained.epoch,
    )


def _publish(stage: Path, out: Path) -> None:
    """Put the files into their places; what an earlier run has in others goes."""
    (out / HEAD_CARD).unlink(missing_ok=True)
    shutil.rmtree(out / "features", ignore_errors=True)
    (out / EXPORT).parent.mkdir(exist_ok=True)
    for weights in (EXPORT, LAST_EXPORT):
        for path in (weights, card_path(weights)):
            if (stage / path).is_file():
                os.replace(stage / path, out / path)
            else:
                (out / path).unlink(missing_ok=True)
    names = sorted(path.name for path in stage.iterdir() if path.is_file() and path.name != HEAD_CARD)
    for name in (*names, HEAD_CARD):
        os.replace(stage / name, out / name)
