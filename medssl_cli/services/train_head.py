"""A head on frozen features: read, train, choose on validation cases, and write a run that `infer` and `eval` take."""

from __future__ import annotations

import logging
import math
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from medssl_cli.core.config import dump_config, load_config
from medssl_cli.core.errors import ConfigError, PartialFailure
from medssl_cli.core.result import Result
from medssl_cli.core.run import (
    hide_home,
    plain,
    provenance,
    result_header,
    seed_everything,
    seed_for,
    write_csv,
    write_failures,
    write_json,
    write_text,
)
from medssl_cli.core.wording import counted
from medssl_cli.data.feature_store import write_features
from medssl_cli.data.split import Item, split_items
from medssl_cli.metrics.novelty import Novelty
from medssl_cli.report.head_plots import draw_head_progress
from medssl_cli.services.devices import describe_device, resolve_device
from medssl_cli.services.head import PoolMode, head_tensors, save_head, write_tensors
from medssl_cli.services.head_config import HeadConfig, Task, check_head_config
from medssl_cli.services.head_data import HeadData, read_head_data
from medssl_cli.services.head_examples import Examples, build_examples, case_rows, pool_mode_of, refuse_leak
from medssl_cli.services.head_fitting import fit_head, refit_logistic_head
from medssl_cli.services.head_request import COMMAND, TrainHeadRequest
from medssl_cli.services.head_results import Finished, finish_head, head_card
from medssl_cli.services.head_targets import Targets, check_consistent, prepare_targets
from medssl_cli.services.head_training import Trained, logits_of_cases
from medssl_cli.services.run_folder import HeldLog, RunFolder, stoppable

__all__ = ["HeadConfig", "TrainHeadRequest", "train_head"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
LAST_WEIGHTS = "last.safetensors"
_REFUSED = {
    "landmark": "Landmarks are places in an image: feature vectors of whole slices do not hold where things are.",
    "forecast": "A forecast needs the interval to the event or to the next visit, which stored features do not hold.",
}


def train_head(request: TrainHeadRequest, *, progress: Progress | None = None) -> Result:
    """Train one head; ``progress`` is told cases done and in all while vectors are made of raw data.

    Raises:
        ConfigError: A task that features cannot serve, contradicting settings, or features that do not fit the head.
        DataError: Missing or contradicting labels, or patients on both sides.
        NonFiniteError: A loss became non-finite.
        ResourceError: No such device, or no room on the disk.
    """
    started = time.time()
    task = check_task(request.task)
    config = load_head_config(request, task)
    device = resolve_device(request.device)
    seed_everything(config.seed)
    with (
        HeldLog() as lines,
        RunFolder(request.out, COMMAND, lines, overwrite=request.overwrite, inputs=request.inputs()) as folder,
        stoppable("training a head"),
    ):
        data = read_head_data(request, config, task, progress)
        job = prepare_job(data, config, task)
        outcome = run_job(job, device)
        folder.facts = _run_facts(request, job, device, started)
        folder.begin()
        with folder.telling_the_end(dict):
            facts = write_run(folder.path, job, outcome, device, started)
            _remove_leftovers(folder.path, data)
            folder.say("finished", elapsed_s=round(time.time() - started, 3))
    return Result(_lines(request, job, outcome), facts, _partial(data, request.out))


def _remove_leftovers(out: Path, data: HeadData) -> None:
    """What another run left here and does not belong to this one: a fine-tuned backbone would be taken for its own."""
    names = ["export"] if data.is_made else ["export", "features"]
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)


def _partial(data: HeadData, out: Path) -> PartialFailure | None:
    if not data.failures:
        return None
    cases = len(data.failures) + sum(len(found.part.case_ids) for found in (data.train, data.val) if found is not None)
    return PartialFailure(
        f"{len(data.failures)} of {cases} cases failed.",
        where=hide_home(str(out / "failures.csv")),
        fix="see the reasons there; the head was trained on the others",
        code="cases_failed",
    )


def check_task(text: str) -> Task:
    """The task, or why there is none.

    Raises:
        ConfigError: Unknown, or one that vectors of whole slices cannot serve.
    """
    if text in get_args(Task):
        return text  # type: ignore[return-value]
    known = ", ".join(get_args(Task))
    raise ConfigError(
        _REFUSED.get(text, f"There is no task {text!r}."),
        where=f"--task {text}",
        fix=f"heads on features do: {known}",
        code="task_refused" if text in _REFUSED else "task_unknown",
    )


def load_head_config(request: TrainHeadRequest, task: Task) -> HeadConfig:
    """The settings, checked against the task.

    Raises:
        ConfigError: Every fault at once.
    """
    if request.backbone_lr_scale is not None:
        raise ConfigError(
            "A frozen backbone has no learning rate.",
            where=f"--backbone-lr-scale {request.backbone_lr_scale:g}",
            fix="add --finetune, or leave it out",
            code="flags_without_effect",
        )
    config = load_config(
        HeadConfig, request.config, recipes="train_head", flags={"seed": request.seed}, overrides=request.overrides
    )
    check_head_config(config, task)
    return config


# --- the steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """All that a head is trained on.

    Args:
        data: Features and labels.
        config: Settings.
        targets: Outputs of the head.
        pool_mode: How slices become one vector.
        train: Training units.
        val: Validation units; None without.
        inconsistent: Rows whose label ``any`` contradicts the others.
    """

    data: HeadData
    config: HeadConfig
    targets: Targets
    pool_mode: PoolMode
    train: Examples
    val: Examples | None
    inconsistent: int

    @property
    def kind(self) -> str:
        """Of the head."""
        return self.config.kind(self.targets.task)


@dataclass(frozen=True)
class Outcome:
    """A trained head and what is told of it.

    Args:
        trained: As validation chose it.
        module: What is kept: the same, or refitted to all cases.
        finished: Calibration, thresholds, figures.
        used: Training units that it learned from.
        targets: Its outputs; of few-shot measurements with the scale of these units.
        repeats: Facts of each draw of few-shot learning.
        kept: Position of the draw that is kept.
    """

    trained: Trained
    module: nn.Module
    finished: Finished
    used: Examples
    targets: Targets
    repeats: list[dict[str, Any]]
    kept: int


def prepare_job(data: HeadData, config: HeadConfig, task: Task) -> Job:
    """Labels to outputs, rows to units; leaks and contradictions are refused.

    Raises:
        ConfigError: Head and features are pooled in different ways.
        DataError: Labels that the task cannot use, or patients on both sides.
    """
    pool_mode = pool_mode_of(data.info, config.pool, config.kind(task), config.level)
    targets = prepare_targets(task, data.names, data.train.labels_RT, data.label_values, positive=config.positive)
    encoded = {"train": targets.encode(data.train.labels_RT, data.label_values)}
    train = build_examples(data.train.part, encoded["train"], pool_mode, by_slice=data.by_slice)
    val = None
    if data.val is not None:
        encoded["val"] = targets.encode(data.val.labels_RT, data.label_values)
        val = build_examples(data.val.part, encoded["val"], pool_mode, by_slice=data.by_slice).plain()
    refuse_leak(train, val)
    inconsistent = check_consistent(targets, np.concatenate(list(encoded.values())))
    return Job(data, config, targets, pool_mode, train, val, inconsistent)


def run_job(job: Job, device: torch.device) -> Outcome:
    """Train the head, several times for few-shot learning, and judge the one that is kept."""
    best: Outcome | None = None
    repeats: list[dict[str, Any]] = []
    for number in range(job.config.repeats):
        outcome = _one_draw(job, number, device)
        repeats.append(_draw_facts(number, outcome))
        if best is None or outcome.trained.score > best.trained.score:
            best = replace(outcome, kept=number)
    assert best is not None
    best.finished.notes.extend(training_notes(best.trained, job.config))
    return replace(best, repeats=repeats)


def training_notes(trained: Trained, config: HeadConfig) -> list[str]:
    """What the course of the training suggests."""
    if trained.criterion is not None and trained.epoch == config.epochs > 1:
        return [f"the last epoch is the best one: more may do better, e.g. epochs={2 * config.epochs}"]
    return []


def _one_draw(job: Job, number: int, device: torch.device) -> Outcome:
    """One head on one draw of the training cases; the first draw of all cases has the seed of the run itself."""
    config, targets = job.config, job.targets
    used = few_shot(job.train, targets, config, number)
    if used is not job.train and targets.task == "regression":  # the scale of labels that are not used is not known
        targets = prepare_targets("regression", targets.names, used.labels_BL)
    seed = config.seed if number == 0 else seed_for(config.seed, "repeat", number)
    trained = fit_head(used, job.val, targets, config, seed=seed, device=device)
    logits = labels = None
    patients: Sequence[str] = ()
    if job.val is not None:
        logits = logits_of_cases(trained.module, job.val, job.pool_mode, config.case_rule)
        labels, patients = job.val.labels_BL, job.val.patient_ids
    finished = finish_head(targets, config, logits, labels, patients)
    module = trained.module
    if config.refit and job.val is not None:
        module = refit_logistic_head(trained, used, job.val, targets, config)
    return Outcome(trained, module, finished, used, targets, [], number)


def few_shot(train: Examples, targets: Targets, config: HeadConfig, number: int) -> Examples:
    """A share of the training patients, drawn by class; every class keeps one at least."""
    share = config.percentage_labels
    if share >= 1:
        return train
    classes = targets.one_hot(train.labels_BL) if targets.task != "regression" else np.zeros((len(train.case_ids), 0))
    strata = [_strata_of(label, targets) for label in classes]
    items = [Item(*three) for three in zip(train.case_ids, train.patient_ids, strata, strict=True)]
    seed = seed_for(config.seed, "few shot", number)
    kept = set(split_items(items, (share, 1 - share, 0.0), seed % 2**32)["train"])
    missing = {stratum for item in items for stratum in item.strata}
    missing -= {stratum for item in items if item.item_id in kept for stratum in item.strata}
    order = np.random.default_rng(seed).permutation(len(items))
    for stratum in sorted(missing):
        one = next(items[i] for i in order if stratum in items[i].strata)
        kept |= {item.item_id for item in items if item.group == one.group}
    return train.chosen(kept)


def _strata_of(label_C: np.ndarray, targets: Targets) -> tuple[str, ...]:
    found = tuple(name for name, value in zip(targets.classes, label_C, strict=True) if value > 0)
    return found or (() if targets.task == "regression" else ("none",))


def _draw_facts(number: int, outcome: Outcome) -> dict[str, Any]:
    """What is told of one draw."""
    evaluation = outcome.finished.evaluation
    metrics = {} if evaluation is None else {name: m.value for name, m in evaluation.metrics.items()}
    score = outcome.trained.score
    return {
        "repeat": number + 1,
        "num_train": len(outcome.used.case_ids),
        "score": -score if outcome.trained.criterion == "loss" else score,
        "epoch": outcome.trained.epoch or None,
        "c": list(outcome.trained.c_of) or None,
        "metrics": metrics,
    }


# --- what is written -------------------------------------------------------------------------------------------------


def write_run(out: Path, job: Job, outcome: Outcome, device: torch.device, started: float) -> dict[str, Any]:
    """Every file of the run but ``run.json``; the facts that the command prints."""
    data, config = job.data, job.config
    if data.is_made:
        parts = [data.features.part(name) for name in data.features.names if name != "test"]
        write_features(out / "features", data.info, parts)
    card = head_card(
        outcome.targets,
        config,
        outcome.finished,
        outcome.trained,
        kind=job.kind,
        pool_mode=job.pool_mode,
        slice_dim=int(data.info["slice_dim"]),
        preprocessing=data.info.get("extraction") or {},
        model=data.info.get("model") or {},
        run=out,
        facts=[data.train.part.facts[c] for c in outcome.used.case_ids if c in data.train.part.facts],
        feature_digest=data.info.get("feature_digest"),
        split_digests=data.split_digests(),
    )
    novelty = Novelty.fit(outcome.used.case_vectors(job.pool_mode), outcome.used.patient_ids, seed=config.seed)
    summary = train_summary(job, outcome, device, started)
    write_text(out / "config.yaml", dump_config(config))
    write_csv(out / "cases.csv", ("part", "case_id", "patient_id"), case_rows(outcome.used, job.val))
    write_json(out / "train_summary.json", summary)
    write_failures(out / "failures.csv", data.failures)
    _draw(out, job, outcome)
    write_tensors(out / LAST_WEIGHTS, head_tensors(outcome.trained.last))
    header = result_header(COMMAND, started)
    card = save_head(out, {**header, **card}, outcome.module, novelty=novelty, reliability=outcome.finished.reliability)
    facts = {**header, **{key: summary[key] for key in _PRINTED}, "head": card, "out": hide_home(str(out))}
    return plain(facts)


_PRINTED = ("num_train", "num_val", "selection", "best_score", "validation", "few_shot", "notes")


def train_summary(job: Job, outcome: Outcome, device: torch.device, started: float) -> dict[str, Any]:
    """``train_summary.json``."""
    trained, evaluation = outcome.trained, outcome.finished.evaluation
    score = -trained.score if trained.criterion == "loss" else trained.score
    return {
        **result_header(COMMAND, started),
        "config": job.config.model_dump(mode="json"),
        "task": job.targets.task,
        "head": job.kind,
        "device": describe_device(device),
        "input_dim": int(outcome.used.rows_RP.shape[1]),
        "num_classes": outcome.targets.outputs,
        "classes": list(outcome.targets.classes),
        "num_train": len(outcome.used.case_ids),
        "num_val": 0 if job.val is None else len(job.val.case_ids),
        "num_train_units": len(outcome.used),
        "split": job.data.split,
        "parts_opened": dict(job.data.features.accesses),
        "inconsistent_labels": job.inconsistent,
        "selection": selection_words(trained),
        "best_score": score,
        "history": trained.history,
        "sweep": [[{"c": c, "score": value} for c, value in sweep] for sweep in trained.sweep] or None,
        "few_shot": few_shot_facts(job.config, outcome),
        "validation": None if evaluation is None else evaluation.to_json(),
        "notes": outcome.finished.notes,
        "best_checkpoint": "best.safetensors",
        "last_checkpoint": LAST_WEIGHTS,
        "seconds": round(time.time() - started, 3),
        "definitions": _DEFINITIONS,
    }


_DEFINITIONS = {
    "best_score": "value of selection.criterion on the validation units at the chosen epoch or C",
    "train_loss": "mean loss over the training units, with class weights; of an epoch while the weights move",
    "val_loss": "the same loss on the validation units, with the class weights of the training part",
    "val_macro_auroc": "mean area under the ROC curve over the classes for which it is defined",
    "validation": "metrics on the validation cases that also chose epoch, C, calibration and thresholds; `medssl eval` "
    "tells of cases that nothing was chosen on",
    "few_shot.std": "standard deviation over the repeats, n - 1",
}


def selection_words(trained: Trained) -> dict[str, Any]:
    """The criterion of the whole run and what it chose."""
    return {"criterion": trained.criterion, "epoch": trained.epoch or None, "c": list(trained.c_of) or None}


def few_shot_facts(config: HeadConfig, outcome: Outcome) -> dict[str, Any] | None:
    """Mean and standard deviation over the repeats; None for one run on all labels."""
    if config.repeats == 1 and config.percentage_labels == 1:
        return None
    names = list(dict.fromkeys(name for repeat in outcome.repeats for name in repeat["metrics"]))
    columns = {name: [repeat["metrics"].get(name, math.nan) for repeat in outcome.repeats] for name in names}
    columns["score"] = [repeat["score"] for repeat in outcome.repeats]
    defined = {name: [v for v in values if math.isfinite(v)] for name, values in columns.items()}
    return {
        "percentage_labels": config.percentage_labels,
        "repeats": outcome.repeats,
        "kept": outcome.kept + 1,
        "mean": {name: float(np.mean(v)) if v else None for name, v in defined.items()},
        "std": {name: float(np.std(v, ddof=1)) if len(v) > 1 else None for name, v in defined.items()},
        "n": {name: len(v) for name, v in defined.items()},
    }


def _draw(out: Path, job: Job, outcome: Outcome) -> None:
    trained = outcome.trained
    draw_head_progress(
        out / "progress.png",
        f"{job.kind} head, {job.targets.task}: {len(outcome.used.case_ids)} training and "
        f"{0 if job.val is None else len(job.val.case_ids)} validation cases",
        classes=outcome.targets.classes,
        history=plain(trained.history),
        criterion=trained.criterion,
        chosen=trained.c_of or trained.epoch,
        sweeps=trained.sweep,
    )


def _run_facts(request: TrainHeadRequest, job: Job, device: torch.device, started: float) -> dict[str, Any]:
    """``run.json`` without the status."""
    return {
        **result_header(COMMAND, started),
        "task": job.targets.task,
        "head": job.kind,
        "classes": list(job.targets.classes),
        "data": str(request.data),
        "labels": None if request.labels is None else str(request.labels),
        "split_digests": job.data.split_digests(),
        "feature_digest": job.data.info.get("feature_digest"),
        "sequences": (job.data.info.get("model") or {}).get("sequences"),
        "device": describe_device(device),
        **provenance(),
    }


# --- what is printed -------------------------------------------------------------------------------------------------


def _lines(request: TrainHeadRequest, job: Job, outcome: Outcome) -> list[str]:
    """Figures, threshold, where, and what to type next."""
    cases = f"{counted(len(outcome.used.case_ids), 'training case')}"
    held = 0 if job.val is None else len(job.val.case_ids)
    lines = [
        f"{job.kind} head, {job.targets.task}: {', '.join(outcome.targets.classes[:8])}; {cases}, {held} for validation"
    ]
    lines += metric_lines(outcome.finished, job.targets)
    few = few_shot_facts(job.config, outcome)
    if few is not None and few["mean"].get("score") is not None:
        spread = few["std"]["score"]
        lines.append(
            f"few-shot:   {outcome.trained.criterion} {few['mean']['score']:.3f}"
            + (f" ± {spread:.3f}" if spread is not None else "")
            + f" over {counted(job.config.repeats, 'draw')} of {job.config.percentage_labels:g} of the labels"
        )
    lines += [f"note:       {note}" for note in outcome.finished.notes]
    lines.append(f"run:        {shlex.quote(str(request.out))}  (head.json, progress.png, train_summary.json)")
    return lines + next_lines(request, has_test=job.data.has_test)


def next_lines(request: TrainHeadRequest, *, has_test: bool) -> list[str]:
    """What to type next; `medssl eval` only where the data hold cases that nothing was chosen on."""
    lines = [f"next:       medssl infer CASE --model {shlex.quote(str(request.out))} --heatmap"]
    if has_test:
        words = ["medssl", "eval", "--model", request.out, "--data", request.data, "--split", "test"]
        named = {"--splits": request.splits, "--labels": request.labels, "--sequence": request.sequence}
        words += [word for pair in named.items() if pair[1] is not None for word in pair]
        lines.append(f"            {shlex.join(map(str, [*words, '--out', f'{request.out}-eval']))}")
    return lines


def metric_lines(finished: Finished, targets: Targets) -> list[str]:
    """The figures on validation cases that a person looks at first."""
    if finished.evaluation is None:
        return ["validation: none"]
    metrics = finished.evaluation.metrics
    wanted = ("macro_auroc", "auroc", "macro_average_precision", "mcc", "accuracy", "r2", "macro_r2", "mae")
    told = [
        f"{name} {metrics[name].value:.3f}" for name in wanted if name in metrics and math.isfinite(metrics[name].value)
    ]
    lines = [f"validation: {', '.join(told) or 'nothing is defined on so few cases'}"]
    if finished.thresholds is not None:
        shown = [f"{name} {t:.3f}" for name, t in zip(targets.classes[:8], finished.thresholds, strict=False)]
        lines.append(f"threshold:  {', '.join(shown)} ({finished.rule})")
    if targets.task != "regression":
        fit = finished.calibration
        how = f"{fit['method']} on {counted(fit['n'], 'case')}" if finished.calibrated else "no"
        lines.append(f"calibrated: {how}")
    return lines
