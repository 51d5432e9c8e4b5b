"""What is drawn of an evaluation: points of curves, bins of a reliability diagram, confusion matrix, Bland-Altman.

Curves have a point for each distinct score, none is dropped: areas taken from them equal the metrics of ``binary``.
Letters: N cases, T distinct scores, K classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from medssl_cli.metrics.binary import BINS, bin_of
from medssl_cli.metrics.regression import LIMIT_SD


def roc_points(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ROC curve: false-positive rate, true-positive rate and threshold, (T + 1,) each, from (0, 0) to (1, 1).

    A point is what ``score >= threshold`` gives; the first threshold is infinite. Rates of a class that is absent are
    NaN. Labels are 0, 1 or NaN for unknown.
    """
    hits, called, thresholds = _steps(scores_N, labels_N)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (called - hits) / (called[-1] - hits[-1]), hits / hits[-1], thresholds


def pr_points(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision-recall curve: recall, precision and threshold, (T + 1,) each, from recall 0 to 1.

    The first point, where nothing is called positive, has precision 1 and an infinite threshold. Recall is NaN without
    a positive. Labels are 0, 1 or NaN for unknown.
    """
    hits, called, thresholds = _steps(scores_N, labels_N)
    precision = np.divide(hits, called, out=np.ones_like(hits), where=called > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return hits / hits[-1], precision, thresholds


def _steps(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positives and cases at or above each distinct score in descending order, after a first step of none."""
    scores, labels = np.asarray(scores_N, dtype=np.float64), np.asarray(labels_N, dtype=np.float64)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} are not (N,) alike")
    known = ~np.isnan(labels)
    distinct, place = np.unique(-scores[known], return_inverse=True)
    called = np.bincount(place, minlength=len(distinct))
    hits = np.bincount(place, weights=labels[known] > 0.5, minlength=len(distinct))
    counts = [np.concatenate([[0.0], np.cumsum(part)]) for part in (hits, called)]
    return counts[0], counts[1], np.concatenate([[math.inf], -distinct])


class ReliabilityBin(NamedTuple):
    """Cases whose probability lies in [low, high), the last bin with its upper end."""

    low: float
    high: float
    n: int
    mean_p: float
    """Mean probability; NaN for an empty bin."""
    share: float
    """Share of positives; NaN for an empty bin."""


def reliability_bins(probability_N: np.ndarray, label_N: np.ndarray, bins: int = BINS) -> list[ReliabilityBin]:
    """Mean probability and share of positives in bins of equal width; NaN labels are left out."""
    probability, label = np.asarray(probability_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    known = ~np.isnan(label)
    probability, positive = probability[known], label[known] > 0.5
    place = bin_of(probability, bins)
    found = []
    for i in range(bins):
        inside = place == i
        n = int(inside.sum())
        means = (float(probability[inside].mean()), float(positive[inside].mean())) if n else (math.nan, math.nan)
        found.append(ReliabilityBin(i / bins, (i + 1) / bins, n, *means))
    return found


def confusion(prediction_N: np.ndarray, reference_N: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts (K, K), rows are true classes, columns predicted ones; cases with a NaN reference are left out."""
    prediction, reference = np.asarray(prediction_N), np.asarray(reference_N, dtype=np.float64)
    known = ~np.isnan(reference)
    cells = reference[known].astype(int) * n_classes + prediction[known].astype(int)
    return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)


class BlandAltman(NamedTuple):
    """Agreement of two measurements, in their unit."""

    bias: float
    sd: float
    """Standard deviation of the differences (n - 1); NaN with fewer than two cases."""
    low: float
    high: float
    """Limits of agreement: bias -/+ 1.96 sd."""
    means_N: np.ndarray
    differences_N: np.ndarray
    """Prediction minus reference against the mean of both."""


def bland_altman(prediction_N: np.ndarray, reference_N: np.ndarray) -> dict[str, float | np.ndarray]:
    """Points and limits of a Bland-Altman plot, the fields of ``BlandAltman``; NaN references are left out.

    Source: Bland and Altman 1986.
    """
    prediction, reference = np.asarray(prediction_N, dtype=np.float64), np.asarray(reference_N, dtype=np.float64)
    known = ~np.isnan(reference)
    prediction, reference = prediction[known], reference[known]
    difference = prediction - reference
    bias = float(difference.mean()) if len(difference) else math.nan
    sd = float(difference.std(ddof=1)) if len(difference) > 1 else math.nan
    limits = bias - LIMIT_SD * sd, bias + LIMIT_SD * sd
    return BlandAltman(bias, sd, *limits, (prediction + reference) / 2, difference)._asdict()
