"""What is told of a trained head: calibration, thresholds and figures on validation cases, limits, and its card.

Made of logits and labels alone, so that a head on stored features and one that was fine-tuned with its backbone are
told of in the same way.

Letters: V validation cases, B training cases, P pooled width, C outputs, L columns of encoded labels.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.run import RESEARCH_NOTE, hide_home, seed_for
from medssl_cli.data.feature_store import ImageFacts
from medssl_cli.metrics.calibration import apply_scaling, ece, fit_platt, fit_temperature, nll, unfit_reasons
from medssl_cli.metrics.evaluation import Evaluation, evaluate_classification, evaluate_regression
from medssl_cli.metrics.thresholds import choose_threshold, parse_rule
from medssl_cli.services.head import PoolMode, probabilities
from medssl_cli.services.head_config import HeadConfig, Task
from medssl_cli.services.head_targets import Targets
from medssl_cli.services.head_training import Trained

log = logging.getLogger(__name__)

DEFAULT_THRESHOLD = 0.5
MOST_RELIABILITY_ROWS = 2000
"""Validation cases that are kept with the head, to tell how often it was right with such a probability."""
EXPLANATION = {
    "probabilities": "Probabilities of a head that was trained with class weights, or that is not calibrated, rank "
    "cases but are no frequencies; `calibrated` tells whether they were fitted to the validation cases.",
    "thresholds": "A probability at or above the threshold is positive.",
    "calibration": "nll: mean negative log-likelihood; ece: expected calibration error of 10 equal bins; both on the "
    "validation cases, which the calibration was fitted to. A label of n cases counts as (n + 1) / (n + 2) in the fit "
    "(Platt 1999), so that a few cases that are told apart do not make a probability of 0 or 1.",
    "ranges": "Lowest and highest value of each fact of the training cases: spacing in mm, slices, pixels, and the "
    "1st, 50th and 99th percentile of each sequence in units of the file.",
}
"""What the figures of ``head.json`` mean."""


@dataclass(frozen=True)
class Finished:
    """What validation cases say of a head.

    Args:
        calibration: As in ``head.json``.
        thresholds: (C,) of a binary or multilabel head, else None.
        rule: How they were chosen.
        reliability: Probabilities and labels (V, C); None without validation, and for measurements.
        evaluation: Metrics on the validation cases, without intervals; None without validation.
        notes: What is to be said to the user.
    """

    calibration: dict[str, Any]
    thresholds: tuple[float, ...] | None
    rule: str | None
    reliability: tuple[np.ndarray, np.ndarray] | None = None
    evaluation: Evaluation | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def calibrated(self) -> bool:
        """Whether every output was fitted."""
        return self.calibration["method"] != "none" and not any(self.calibration["reasons"])


def finish_head(
    targets: Targets,
    config: HeadConfig,
    val_logits_VC: np.ndarray | None,
    val_labels_VL: np.ndarray | None,
    patients: Sequence[str] = (),
) -> Finished:
    """Calibrate a head, choose its thresholds and judge it, all on validation cases.

    Args:
        targets: Its outputs.
        config: Settings: ``calibration``, ``threshold_rule``, ``refit``.
        val_logits_VC: Of whole validation cases, before calibration; standardised values of a regression. None without
            validation.
        val_labels_VL: Encoded labels.
        patients: Of the validation cases.
    """
    notes: list[str] = []
    if val_logits_VC is None or val_labels_VL is None:
        return _without_validation(targets, config, notes)
    if targets.task == "regression":
        values = val_logits_VC * np.asarray(targets.scale_T) + np.asarray(targets.mean_T)
        judged = evaluate_regression(values, val_labels_VL, targets=targets.classes, groups=patients, draws=0)
        return Finished(_no_calibration(targets, len(val_labels_VL)), None, None, None, judged)
    calibration = calibrate(val_logits_VC, val_labels_VL, targets, _method(config, targets.task))
    notes += [f"{name}: not calibrated, for {why}" for name, why in _unfit(targets, calibration)]
    values = probabilities(val_logits_VC, targets.task, calibration)
    thresholds, said = _thresholds(values, val_labels_VL, targets, config.threshold_rule)
    notes += said
    judged = evaluate_classification(
        values,
        val_labels_VL,
        task=_classes_task(targets),
        classes=targets.classes,
        groups=patients,
        thresholds=thresholds,
        draws=0,
    )
    rule = None if thresholds is None else config.threshold_rule
    kept = _kept_rows(len(values), config.seed)
    reliability = values[kept], targets.one_hot(val_labels_VL)[kept]
    return Finished(calibration, thresholds, rule, reliability, judged, notes)


def calibrate(logits_VC: np.ndarray, labels_VL: np.ndarray, targets: Targets, method: str) -> dict[str, Any]:
    """Scale and shift of the logits, with what they change, as in ``head.json``."""
    task = _classes_task(targets)
    if method == "none":
        return _no_calibration(targets, len(labels_VL))
    fit = fit_temperature if method == "temperature" else fit_platt
    scale_C, shift_C = fit(logits_VC, labels_VL, task, smooth=True)
    after = apply_scaling(logits_VC, (scale_C, shift_C))
    return {
        "method": method,
        "scale": np.broadcast_to(scale_C, targets.outputs).tolist(),
        "shift": np.broadcast_to(shift_C, targets.outputs).tolist(),
        "n": len(labels_VL),
        "nll_before": nll(logits_VC, labels_VL, task).tolist(),
        "nll_after": nll(after, labels_VL, task).tolist(),
        "ece_before": _ece(probabilities(logits_VC, task), labels_VL, targets),
        "ece_after": _ece(probabilities(after, task), labels_VL, targets),
        "reasons": list(unfit_reasons(labels_VL, task)),
    }


def _no_calibration(targets: Targets, n: int) -> dict[str, Any]:
    ones, zeros = [1.0] * targets.outputs, [0.0] * targets.outputs
    empty = dict.fromkeys(("nll_before", "nll_after", "ece_before", "ece_after"))
    return {"method": "none", "scale": ones, "shift": zeros, "n": n, **empty, "reasons": []}


def _classes_task(targets: Targets) -> Any:
    return targets.task


def _method(config: HeadConfig, task: Task) -> str:
    if config.refit:
        return "none"
    return config.calibration or ("platt" if config.weights_classes(task) else "temperature")


def _ece(values_VC: np.ndarray, labels_VL: np.ndarray, targets: Targets) -> list[float]:
    """Of each label, or one of the most probable class."""
    if targets.task == "multiclass":
        right = np.where(np.isnan(labels_VL[:, 0]), np.nan, values_VC.argmax(1) == labels_VL[:, 0])
        return [ece(values_VC.max(1), right)]
    return [ece(p, y) for p, y in zip(values_VC.T, labels_VL.T, strict=True)]


def _unfit(targets: Targets, calibration: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = targets.classes if targets.task != "multiclass" else targets.names
    return [(name, why) for name, why in zip(names, calibration["reasons"], strict=False) if why]


def _thresholds(
    values_VC: np.ndarray, labels_VL: np.ndarray, targets: Targets, rule: str
) -> tuple[tuple[float, ...] | None, list[str]]:
    """One for each label, with what there is to say of them; None for exclusive classes."""
    if targets.task == "multiclass":
        return None, []
    found = [choose_threshold(p, y, rule) for p, y in zip(values_VC.T, labels_VL.T, strict=True)]
    notes = []
    for name, t, p_V, y_V in zip(targets.classes, found, values_VC.T, labels_VL.T, strict=True):
        positive = p_V[~np.isnan(y_V)] >= t.value
        if t.note:
            notes.append(f"{name}: {t.note}")
        elif positive.all() or not positive.any():
            which = "every" if positive.all() else "no"
            notes.append(f"{name}: {which} validation case is positive at the threshold {t.value:.3g} ({rule})")
    return tuple(float(t.value) for t in found), notes


def _without_validation(targets: Targets, config: HeadConfig, notes: list[str]) -> Finished:
    thresholds = None
    rule = None
    if targets.task in ("binary", "multilabel"):
        name, number = parse_rule(config.threshold_rule)
        fixed = number if name == "fixed" and number is not None else DEFAULT_THRESHOLD
        thresholds, rule = (fixed,) * targets.outputs, f"fixed={fixed:g}"
        if name != "fixed":
            notes.append(f"no validation cases: the threshold is {fixed:g}, and nothing is calibrated")
    return Finished(_no_calibration(targets, 0), thresholds, rule, notes=notes)


def _kept_rows(count: int, seed: int) -> np.ndarray:
    if count <= MOST_RELIABILITY_ROWS:
        return np.arange(count)
    rng = np.random.default_rng(seed_for(seed, "reliability", count))
    return np.sort(rng.choice(count, MOST_RELIABILITY_ROWS, replace=False))


# --- the card --------------------------------------------------------------------------------------------------------


def head_card(
    targets: Targets,
    config: HeadConfig,
    finished: Finished,
    trained: Trained,
    *,
    kind: str,
    pool_mode: PoolMode,
    slice_dim: int,
    preprocessing: Mapping[str, Any],
    model: Mapping[str, Any],
    run: Path,
    facts: Sequence[ImageFacts] = (),
    feature_digest: str | None = None,
    split_digests: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """``head.json`` without its header and the digest of the weights.

    Args:
        targets: Outputs of the head.
        config: Its settings.
        finished: What validation cases say.
        trained: How it was chosen.
        kind: ``logistic``, ``linear``, ``mlp``, ``attention_mil`` or ``knn``.
        pool_mode: How slices become one vector.
        slice_dim: Width of a slice vector.
        preprocessing: ``Embedder.settings``.
        model: Of the backbone: ``path`` of its weights, ``sha256``, ``arch``, ``sequences``.
        run: Run folder of the head, from which the place of the backbone is told as well.
        facts: Of the training cases.
        feature_digest: Of the stored features.
        split_digests: Of the parts that were used.
    """
    thresholds = finished.thresholds
    width = slice_dim * (2 if pool_mode == "meanmax" else 1)
    return {
        **targets.facts(),
        "kind": kind,
        "hidden_dim": config.hidden_dim if kind in ("mlp", "attention_mil") else 0,
        "dropout": config.dropout if kind in ("mlp", "attention_mil") else 0.0,
        "knn_k": config.knn_k if kind == "knn" else None,
        "slice_dim": slice_dim,
        "input_width": width,
        "pool_mode": pool_mode,
        "level": config.level,
        "case_rule": config.case_rule if config.level == "slice" else None,
        "thresholds": None if thresholds is None else list(thresholds),
        "threshold": thresholds[0] if thresholds is not None and targets.task == "binary" else None,
        "threshold_rule": finished.rule,
        "calibration": finished.calibration,
        "calibrated": finished.calibrated,
        "class_weights": "balanced" if config.weights_classes(targets.task) else "none",
        "refit": config.refit,
        "feature_digest": feature_digest,
        "split_digests": dict(split_digests or {}),
        "preprocessing": dict(preprocessing),
        "model": _model_facts(model, run),
        "sequences": list(model.get("sequences") or ()),
        "selection": selection_facts(trained),
        "ranges": ranges_of(facts),
        "missing_in_training": _missing(facts),
        "seed": config.seed,
        "explanation": EXPLANATION,
        "note": RESEARCH_NOTE,
    }


def selection_facts(trained: Trained) -> dict[str, Any]:
    """What chose the epoch or C, and which; loss is told as a positive number."""
    score = -trained.score if trained.criterion == "loss" else trained.score
    return {
        "criterion": trained.criterion,
        "value": None if math.isnan(score) else score,
        "epoch": trained.epoch or None,
        "c": list(trained.c_of) or None,
        "reason": None if trained.criterion else "no validation cases: the last epoch, or C = 1, is kept",
    }


def ranges_of(facts: Sequence[ImageFacts]) -> dict[str, list[float]]:
    """[lowest, highest] of each number that is known of the cases; names as the columns of the stored facts."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        low, high = found.get(name, [value, value])
        found[name] = [min(low, value), max(high, value)]

    for fact in facts:
        for axis, mm in zip("zyx", fact.spacing_mm or (), strict=False):
            note(f"spacing_{axis}_mm", float(mm))
        for name, count in zip(("slices", "height", "width"), fact.shape, strict=True):
            note(name, float(count))
        for sequence, values in fact.intensity.items():
            for label, value in zip(("p01", "p50", "p99"), values, strict=True):
                note(f"{sequence}_{label}", float(value))
    return found


def _missing(facts: Sequence[ImageFacts]) -> dict[str, int]:
    """Training cases that lack each sequence."""
    names = sorted({name for fact in facts for name in fact.missing})
    return {name: sum(name in fact.missing for fact in facts) for name in names}


def _model_facts(model: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The place of the backbone in two ways, so that a project may move as a whole."""
    facts = dict(model)
    if model.get("path"):
        path = Path(str(model["path"])).expanduser()
        facts["path"] = hide_home(str(path.absolute()))
        relative = os.path.relpath(path.absolute(), run.absolute())
        facts["path_from_run"] = relative if hide_home(relative) == relative else None  # a run outside the home folder
    return facts
