"""The numbers of an evaluation: every metric of the table, a loss for each case, and the names that scripts know.

Letters: N cases, C classes, labels or targets.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np

from medssl_cli.metrics.binary import LEAST_PROBABILITY, log_losses
from medssl_cli.metrics.comparison import delong_interval
from medssl_cli.metrics.evaluation import Evaluation, evaluate_classification, evaluate_regression
from medssl_cli.metrics.intervals import DEFINITION as INTERVAL
from medssl_cli.services.predictions import PredictionTable, any_place

LOSS_DEFINITIONS = {
    "binary": "negative log-likelihood of the label, natural logarithm, mean over cases; probabilities at least "
    f"{LEAST_PROBABILITY:g}",
    "multilabel": "negative log-likelihood, natural logarithm, mean over the known labels of a case, then over cases; "
    f"probabilities at least {LEAST_PROBABILITY:g}",
    "multiclass": "negative logarithm of the probability of the true class, mean over cases; probabilities at least "
    f"{LEAST_PROBABILITY:g}",
    "regression": "squared error, mean over the known targets of a case, then over cases: of one target in the square "
    "of its unit, of several each divided by the variance of its references",
}
_COUNTS = ("tp", "fp", "fn", "tn")
_DECIDED = ("accuracy", "f1", "sensitivity", "specificity", "ppv", "npv")


def measure(table: PredictionTable, thresholds: np.ndarray | None, *, draws: int, seed: int) -> Evaluation:
    """Every metric of a labelled table, with intervals over patients."""
    labels = _labels(table)
    if table.task == "regression":
        return evaluate_regression(
            table.values_NC, labels, targets=table.classes, groups=table.patient_ids, draws=draws, seed=seed
        )
    return evaluate_classification(
        table.values_NC,
        labels,
        task=table.task,
        classes=table.classes,
        groups=table.patient_ids,
        thresholds=None if thresholds is None else [float(value) for value in thresholds],
        draws=draws,
        seed=seed,
    )


def measured_facts(table: PredictionTable, evaluation: Evaluation) -> dict[str, Any]:
    """The part of ``metrics.json`` that the predictions alone decide."""
    found = evaluation.to_json()
    losses = case_losses(table)
    return {
        "n": evaluation.n,
        "n_groups": evaluation.n_groups,
        "bootstrap": {
            "draws": evaluation.draws,
            "seed": evaluation.seed,
            "unit": "patient (column patient_id of per_case.csv)",
            "interval": INTERVAL,
        },
        "metrics": found["metrics"],
        "per_class": found["per_class"],
        "undefined_classes": list(evaluation.undefined_classes),
        "num_defined": evaluation.num_defined,
        "num_samples": evaluation.n,
        "num_classes": len(table.classes),
        "loss": float(losses.mean()),
        "loss_definition": LOSS_DEFINITIONS[table.task],
        **(_named_facts(table, evaluation) if table.task != "regression" else {}),
    }


def case_losses(table: PredictionTable) -> np.ndarray:
    """How far each case is off, (N,): see ``LOSS_DEFINITIONS``."""
    labels, values = _labels(table), table.values_NC
    if table.task == "multiclass":
        own = values[np.arange(len(values)), labels[:, 0].astype(int)]
        return -np.log(np.clip(own, LEAST_PROBABILITY, 1))
    if table.task == "regression":
        each_NC = ((values - labels) / _units(labels)) ** 2
    else:
        each_NC = np.where(np.isnan(labels), math.nan, log_losses(values, labels > 0.5))
    return np.nanmean(each_NC, axis=1)


def _units(references_NT: np.ndarray) -> np.ndarray:
    """(T,): what errors are divided by, so that millilitres do not drown grades; 1 for a single target."""
    spread_T = np.ma.masked_invalid(references_NT).std(axis=0).filled(0.0)
    return np.where(spread_T > 0, spread_T, 1.0) if references_NT.shape[1] > 1 else np.ones(1)


def is_right(table: PredictionTable) -> np.ndarray | None:
    """Whether every known label of a case was decided rightly, (N,) bool; None for numbers."""
    if table.predicted_NC is None:
        return None
    labels = _labels(table)
    return (np.isnan(labels) | (table.predicted_NC == labels)).all(1)


def _labels(table: PredictionTable) -> np.ndarray:
    if table.labels_NC is None:
        raise ValueError("a table without labels cannot be evaluated")
    return table.labels_NC


# --- names that scripts know -----------------------------------------------------------------------------------------


def _named_facts(table: PredictionTable, evaluation: Evaluation) -> dict[str, Any]:
    """Means over classes and counts, as plain numbers under their known names; NaN becomes null."""
    return {
        "macro_auroc": _macro(evaluation, "auroc"),
        "per_class_auroc": {name: metrics["auroc"].value for name, metrics in evaluation.per_class.items()},
        "macro_accuracy": _macro(evaluation, "accuracy"),
        "macro_f1": _macro(evaluation, "f1"),
        "macro_sensitivity": _macro(evaluation, "sensitivity"),
        "macro_definition": "mean over the classes for which the metric is defined",
        "any_class_metrics": _any_class(table),
        "per_class_classification": {
            name: {**_of_class(table, c), **{metric: metrics[metric].value for metric in _DECIDED}}
            for c, (name, metrics) in enumerate(evaluation.per_class.items())
        },
    }


def _macro(evaluation: Evaluation, name: str) -> float:
    values = [metrics[name].value for metrics in evaluation.per_class.values()]
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def _of_class(table: PredictionTable, c: int) -> dict[str, int]:
    label_N, called_N = truth_and_decision(table, c)
    known_N = ~np.isnan(label_N)
    return _outcomes(label_N[known_N] > 0.5, called_N[known_N])


def truth_and_decision(table: PredictionTable, c: int) -> tuple[np.ndarray, np.ndarray]:
    """(label 0, 1 or NaN; called positive) of one class against all others."""
    labels, predicted = _labels(table), cast(np.ndarray, table.predicted_NC)
    if table.task == "multiclass":
        return np.where(np.isnan(labels[:, 0]), math.nan, labels[:, 0] == c), predicted[:, 0] == c
    return labels[:, c], predicted[:, c] > 0


def _outcomes(positive_N: np.ndarray, called_N: np.ndarray) -> dict[str, int]:
    four = (positive_N & called_N, ~positive_N & called_N, positive_N & ~called_N, ~positive_N & ~called_N)
    return {name: int(cells.sum()) for name, cells in zip(_COUNTS, four, strict=True)}


def _any_class(table: PredictionTable) -> dict[str, Any] | None:
    """Decisions on whether a case has anything at all; None where classes exclude one another or there is one only."""
    if table.task != "multilabel":
        return None
    place = any_place(table.classes)
    if place is not None:
        label_N, called_N = truth_and_decision(table, place)
        definition = f"of the class {table.classes[place]}"
    else:
        labels = _labels(table)
        label_N = np.where(np.isnan(labels).any(1), math.nan, 0.0)  # an unknown label may be the positive one
        label_N[(labels > 0.5).any(1)] = 1.0
        called_N = np.asarray((cast(np.ndarray, table.predicted_NC) > 0).any(1))
        definition = "a case is positive, or called positive, if any of its labels is"
    known_N = ~np.isnan(label_N)
    counts = _outcomes(label_N[known_N] > 0.5, called_N[known_N])
    tp, fp, fn, tn = (counts[name] for name in _COUNTS)
    return {
        **counts,
        "accuracy": _share(tp + tn, tp + fp + fn + tn),
        "f1": _share(2 * tp, 2 * tp + fp + fn),
        "sensitivity": _share(tp, tp + fn),
        "specificity": _share(tn, tn + fp),
        "definition": definition,
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


# --- cross-check -----------------------------------------------------------------------------------------------------

DELONG_DEFINITION = "with the 95 % interval of DeLong et al. 1988, which takes cases for independent"


def delong_facts(table: PredictionTable) -> dict[str, Any] | None:
    """AUROC of each class with DeLong's 95 % interval; None for numbers."""
    if table.task == "regression":
        return None
    found = {}
    for c, name in enumerate(table.classes):
        label_N, _ = truth_and_decision(table, c)
        known_N = ~np.isnan(label_N)
        found[name] = _delong_of(table.values_NC[known_N, c], label_N[known_N] > 0.5)
    return found


def _delong_of(scores_N: np.ndarray, positive_N: np.ndarray) -> dict[str, Any]:
    if positive_N.all() or not positive_N.any():
        reason = "without a positive or without a negative case there is no AUROC"
        return {"auc": math.nan, "ci_low": math.nan, "ci_high": math.nan, "reason": reason}
    found = delong_interval(scores_N, positive_N.astype(float))
    facts = {"auc": found.auc, "ci_low": found.low, "ci_high": found.high}
    return {**facts, "reason": "one case of a class has no spread"} if math.isnan(found.low) else facts
