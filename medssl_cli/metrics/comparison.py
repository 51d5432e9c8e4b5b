"""Whether two sets of predictions of the same cases differ: paired permutation by patient, and DeLong's test.

The permutation test swaps the predictions of the two runs for whole patients; a run is then the same cases twice, once
with each prediction, under weights of 0 and 1, so that the metrics of ``evaluation`` serve unchanged. DeLong's test
holds for independent cases only: one case a patient. Letters: N cases, C outputs, G groups, B swaps of a block,
P positives, M negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from medssl_cli.core.run import seed_for
from medssl_cli.metrics.evaluation import (
    OVERALL,
    ClassificationTable,
    Key,
    RegressionTable,
    Table,
    all_values,
)
from medssl_cli.metrics.intervals import DRAWS, LEVEL, number_groups

Task = Literal["binary", "multiclass", "multilabel", "regression"]
Score = Callable[[np.ndarray, np.ndarray], float]
"""(predictions (N, C), labels) -> number."""

_BLOCK_CELLS = 1_000_000
_ROUNDING = 1e-12

PERMUTATION_DEFINITION = (
    "two-sided paired permutation test of the difference: the predictions of both runs are swapped for whole groups "
    "(patients); all swaps if there are no more than draws, else random ones; p = (1 + swaps with a difference at "
    "least as large) / (1 + swaps), where a swap that leaves the metric undefined counts as at least as large"
)


class Permutation(NamedTuple):
    """Paired permutation test of one metric."""

    difference: float
    """Metric of the first run minus that of the second; NaN if one of them is not defined."""
    p: float
    draws: int
    """Swaps beside the runs as they are: 2^G - 1 of an exact test."""
    reason: str = ""
    """Why ``p`` is NaN."""


def paired_permutation(
    a_NC: np.ndarray,
    b_NC: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    metric: str | Score,
    draws: int = DRAWS,
    seed: int = 42,
    *,
    task: Task | None = None,
    thresholds_a: Sequence[float] | None = None,
    thresholds_b: Sequence[float] | None = None,
) -> Permutation:
    """Paired permutation test of one metric of all classes.

    Args:
        a_NC: Predictions of the first run, (N, C); one output also (N,).
        b_NC: Those of the second run for the same cases.
        labels: As for ``evaluate_classification`` or ``evaluate_regression``.
        groups: N names, as a rule of patients.
        metric: Name in ``Evaluation.metrics``, or a function.
        draws: Most swaps.
        seed: Of the run.
        task: From the shapes if not given; regression has to be.
        thresholds_a, thresholds_b: For each class; each run's decisions travel with its predictions.

    Raises:
        ValueError: No metric of this name, or shapes differ.

    Source: Fisher 1935; Phipson and Smyth 2010 for the 1 that is added.
    """
    if callable(metric):
        return _by_function(a_NC, b_NC, labels, groups, metric, draws, seed)
    options = {"task": task, "thresholds_a": thresholds_a, "thresholds_b": thresholds_b}
    tests = paired_permutations(a_NC, b_NC, labels, groups, draws, seed, **options)  # type: ignore[arg-type]
    if (OVERALL, metric) not in tests:
        names = sorted(name for label, name in tests if label == OVERALL)
        raise ValueError(f"metric {metric!r} is none of {', '.join(names)}")
    return tests[OVERALL, metric]


def paired_permutations(
    a_NC: np.ndarray,
    b_NC: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    draws: int = DRAWS,
    seed: int = 42,
    *,
    task: Task | None = None,
    thresholds_a: Sequence[float] | None = None,
    thresholds_b: Sequence[float] | None = None,
) -> dict[Key, Permutation]:
    """The test for every metric at once: of class c under (c, name), of all under (OVERALL, name).

    Arguments are those of ``paired_permutation``. A mean over classes runs over those defined in both runs.
    """
    a, b = _alike(a_NC, b_NC)
    task = task or _task_of(a, np.asarray(labels))
    both = _both(a, b, np.asarray(labels, dtype=np.float64), task, thresholds_a, thresholds_b)
    averaged = _common_classes(both, len(a))
    first = all_values(both, _weights(np.zeros((1, len(a)), bool)), averaged)
    second = all_values(both, _weights(np.ones((1, len(a)), bool)), averaged)
    observed = {key: float(first[key][0] - second[key][0]) for key in first}
    count, larger = 0, dict.fromkeys(observed, 0)
    for swapped_BN in _swaps(groups, draws, seed):
        one, other = all_values(both, _weights(swapped_BN), averaged), all_values(both, _weights(~swapped_BN), averaged)
        count += len(swapped_BN)
        for key, difference in observed.items():
            larger[key] += _at_least(one[key] - other[key], difference)
    return {key: _permutation(difference, larger[key], count) for key, difference in observed.items()}


def _alike(a_NC: np.ndarray, b_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a_NC, dtype=np.float64), np.asarray(b_NC, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"predictions of two runs differ in shape: {a.shape} and {b.shape}")
    return a.reshape(len(a), -1), b.reshape(len(b), -1)


def _task_of(a_NC: np.ndarray, labels: np.ndarray) -> Task:
    if a_NC.shape[1] == 1:
        return "binary"
    return "multilabel" if labels.shape == a_NC.shape else "multiclass"


def _both(
    a_NC: np.ndarray,
    b_NC: np.ndarray,
    labels: np.ndarray,
    task: Task,
    thresholds_a: Sequence[float] | None,
    thresholds_b: Sequence[float] | None,
) -> Table:
    """A table of 2 N rows: every case with the first run's prediction, then with the second's."""
    predictions, twice = np.concatenate([a_NC, b_NC]), np.concatenate([labels, labels])
    if task == "regression":
        return RegressionTable(predictions, twice, n_targets=a_NC.shape[1])
    thresholds = None
    if thresholds_a is not None or thresholds_b is not None:
        default = [0.5] * a_NC.shape[1]
        runs = [default if run is None else run for run in (thresholds_a, thresholds_b)]
        thresholds = np.repeat(np.asarray(runs, dtype=np.float64), len(a_NC), axis=0)
    return ClassificationTable(predictions, twice, task=task, n_classes=a_NC.shape[1], thresholds=thresholds)


def _common_classes(both: Table, n: int) -> dict[str, tuple[int, ...]]:
    """For each mean the classes for which its metric is defined in both runs."""
    values = both.values(_weights(np.stack([np.zeros(n, bool), np.ones(n, bool)])))
    return {
        name: tuple(c for c in range(len(both.each)) if not np.isnan(values[c, metric]).any())
        for name, metric in both.means.items()
    }


def _weights(swapped_BN: np.ndarray) -> np.ndarray:
    """Weights (B, 2 N) of a run that takes the second prediction where swapped."""
    return np.concatenate([~swapped_BN, swapped_BN], axis=1).astype(np.float64)


def _swaps(groups: Sequence[str], draws: int, seed: int) -> Iterator[np.ndarray]:
    """Swaps in blocks, (B, N): each but none at all if these are fewer than ``draws``, else random ones."""
    numbers, n_groups = number_groups(groups)
    exact = n_groups <= 62 and 2**n_groups <= draws
    total = 2**n_groups - 1 if exact else draws
    size = max(1, _BLOCK_CELLS // max(1, 2 * len(numbers)))
    for start in range(0, total, size):
        block = range(start, min(start + size, total))
        if exact:
            codes = np.arange(block.start + 1, block.stop + 1)  # 0 is the runs as they are
            swapped_BG = (codes[:, None] >> np.arange(n_groups)) & 1
        else:
            rngs = [np.random.default_rng(seed_for(seed, "permutation", draw)) for draw in block]
            swapped_BG = np.stack([rng.integers(0, 2, n_groups) for rng in rngs])
        yield swapped_BG.astype(bool)[:, numbers]


def _at_least(differences_B: np.ndarray, observed: float) -> int:
    return int((~(np.abs(differences_B) < abs(observed) - _ROUNDING)).sum())  # NaN counts


def _permutation(difference: float, larger: int, count: int) -> Permutation:
    if math.isnan(difference):
        return Permutation(math.nan, math.nan, count, "the metric is not defined in both runs")
    if not count:
        return Permutation(difference, math.nan, 0, "no swaps were asked for")
    return Permutation(difference, (1 + larger) / (1 + count), count)


def _by_function(
    a_NC: np.ndarray, b_NC: np.ndarray, labels: np.ndarray, groups: Sequence[str], score: Score, draws: int, seed: int
) -> Permutation:
    a, b = _alike(a_NC, b_NC)
    observed, count, larger = float(score(a, labels) - score(b, labels)), 0, 0
    for swapped_BN in _swaps(groups, draws, seed):
        for swapped_N in swapped_BN:
            one, other = np.where(swapped_N[:, None], b, a), np.where(swapped_N[:, None], a, b)
            larger += _at_least(np.array([score(one, labels) - score(other, labels)]), observed)
            count += 1
    return _permutation(observed, larger, count)


# --- DeLong ----------------------------------------------------------------------------------------------------------


class DeLong(NamedTuple):
    """Difference of two areas under ROC curves of the same cases; NaN if a class is absent or has one case."""

    auc_a: float
    auc_b: float
    difference: float
    se: float
    z: float
    p: float
    """Two-sided; 1 for equal areas, and 0 for different ones without spread."""


class AreaInterval(NamedTuple):
    """An area under the ROC curve with its normal interval, cut to [0, 1]."""

    auc: float
    se: float
    low: float
    high: float


def delong(scores_a_N: np.ndarray, scores_b_N: np.ndarray, labels_N: np.ndarray) -> DeLong:
    """Compare two areas under ROC curves of the same, independent cases.

    Args:
        scores_a_N, scores_b_N: Higher means more likely positive.
        labels_N: 0, 1 or NaN for unknown.

    Source: DeLong et al. 1988; mid-ranks as in Sun and Xu 2014, O(N log N).
    """
    areas, covariance = _areas(np.stack([scores_a_N, scores_b_N]), labels_N)
    difference = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    se = math.sqrt(max(variance, 0.0)) if not math.isnan(variance) else math.nan
    if abs(difference) <= _ROUNDING:
        z = 0.0
    elif se <= _ROUNDING:
        z = math.copysign(math.inf, difference)
    else:
        z = difference / se
    p = math.erfc(abs(z) / math.sqrt(2)) if not math.isnan(se) else math.nan
    return DeLong(float(areas[0]), float(areas[1]), difference, se, math.nan if math.isnan(se) else z, p)


def delong_interval(scores_N: np.ndarray, labels_N: np.ndarray, level: float = LEVEL) -> AreaInterval:
    """Area under the ROC curve of independent cases with its normal interval; NaN ends if a class has one case."""
    from scipy.stats import norm

    areas, covariance = _areas(np.asarray(scores_N)[None], labels_N)
    area, se = float(areas[0]), float(np.sqrt(np.maximum(covariance[0, 0], 0)))
    half = float(norm.ppf((1 + level) / 2)) * se
    ends = (math.nan, math.nan) if math.isnan(se) else (max(0.0, area - half), min(1.0, area + half))
    return AreaInterval(area, se, *ends)


def _areas(scores_RN: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas (R,) of R scores and their covariance (R, R)."""
    from scipy.stats import rankdata

    labels = np.asarray(labels_N, dtype=np.float64)
    scores = np.asarray(scores_RN, dtype=np.float64)
    if scores.shape[1:] != labels.shape:
        raise ValueError(f"scores {scores.shape[1:]} and labels {labels.shape} differ in shape")
    known = ~np.isnan(labels)
    scores, positive = scores[:, known], labels[known] > 0.5
    p, m, r = int(positive.sum()), int((~positive).sum()), len(scores)
    if not p or not m:
        return np.full(r, math.nan), np.full((r, r), math.nan)
    ranks = rankdata(scores, axis=1)
    beaten_RP = (ranks[:, positive] - rankdata(scores[:, positive], axis=1)) / m
    lost_RM = (ranks[:, ~positive] - rankdata(scores[:, ~positive], axis=1)) / p
    areas = beaten_RP.mean(1)
    if p < 2 or m < 2:
        return areas, np.full((r, r), math.nan)
    covariance = np.atleast_2d(np.cov(beaten_RP)) / p + np.atleast_2d(np.cov(lost_RM)) / m
    return areas, covariance
