"""How well classes are told apart: agreement of classes, areas under ROC curves; probes on frozen features.

Everything is numpy in, numbers out. A value that is not defined is NaN. Arguments come as (prediction, reference).
Letters: N cases, M cases to be told, K classes, L labels that exclude one another not, D width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Score = Callable[[np.ndarray, np.ndarray], float]
"""(probabilities (N, K), reference (N,)) -> number, higher is better, NaN where it is not defined."""

MAX_ITERATIONS = 1000
_TOLERANCE = 1e-6  # of the gradient: with 1e-4, where scikit-learn stops, probabilities are off by up to 0.01
_BLOCK = 4096


# --- agreement of classes --------------------------------------------------------------------------------------------


def mcc(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Matthews correlation coefficient of K classes: 1 for agreement, 0 for chance.

    (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)) with c correct, s in all, p_k predicted and t_k true
    cases of class k; 0 when the root is 0, NaN without a case.

    Args:
        prediction: (N,) classes.
        reference: (N,) classes.

    Source: Gorodkin 2004.
    """
    prediction, reference = _pair(prediction, reference)
    if not len(reference):
        return math.nan
    classes = np.union1d(prediction, reference)
    predicted = [int((prediction == k).sum()) for k in classes]
    true = [int((reference == k).sum()) for k in classes]
    correct, total = int((prediction == reference).sum()), len(reference)  # whole numbers: no rounding before the root
    root = (total**2 - sum(p * p for p in predicted)) * (total**2 - sum(t * t for t in true))
    if not root:
        return 0.0
    return (correct * total - sum(p * t for p, t in zip(predicted, true, strict=True))) / math.sqrt(root)


def f1(prediction: np.ndarray, reference: np.ndarray, n_classes: int) -> np.ndarray:
    """F1 of each class, (K,): 2 TP / (2 TP + FP + FN); NaN for a class that is neither predicted nor true."""
    prediction, reference = _pair(prediction, reference)
    values = np.full(n_classes, math.nan)
    for k in range(n_classes):
        both = ((prediction == k) & (reference == k)).sum()
        either = (prediction == k).sum() + (reference == k).sum()
        if either:
            values[k] = 2 * both / either
    return values


def macro_f1(prediction: np.ndarray, reference: np.ndarray, n_classes: int) -> float:
    """Mean F1 over the classes for which it is defined."""
    return _mean_defined(f1(prediction, reference, n_classes))


def mean_accuracy(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Share of cases whose class is right."""
    prediction, reference = _pair(prediction, reference)
    return float((prediction == reference).mean()) if len(reference) else math.nan


def mean_per_class_accuracy(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Share of right cases within each class that occurs, averaged over these classes."""
    prediction, reference = _pair(prediction, reference)
    return _mean_defined(np.array([(prediction[reference == k] == k).mean() for k in np.unique(reference)]))


# --- areas under ROC curves ------------------------------------------------------------------------------------------


class MacroAuc(NamedTuple):
    """A mean of areas and what it leaves out."""

    value: float
    skipped: tuple[int, ...]
    """Columns without a positive or without a negative: their area is not defined."""


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, ties counting half.

    Args:
        scores: (N,), higher means more likely positive.
        labels: (N,) of 0 and 1.

    Returns:
        Area in [0, 1]; NaN when a class is absent, for then it is not defined.

    Source: Mann-Whitney U; Hanley and McNeil 1982.
    """
    from scipy.stats import rankdata

    positive = np.asarray(labels).astype(bool)
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the precision-recall curve as the sum of precision times step of recall, without interpolation.

    Args:
        scores: (N,), higher means more likely positive; equal scores are one step.
        labels: (N,) of 0 and 1.

    Returns:
        Area in (0, 1]; NaN when a class is absent, as for ``auroc``, so that both are means over the same classes.
    """
    scores, positive = np.asarray(scores), np.asarray(labels).astype(bool)
    if positive.all() or not positive.any():
        return math.nan
    distinct, place = np.unique(-scores, return_inverse=True)
    hits = np.bincount(place, weights=positive, minlength=len(distinct))
    precision = np.cumsum(hits) / np.cumsum(np.bincount(place, minlength=len(distinct)))
    return float((hits * precision).sum() / positive.sum())


def binary_auc(probabilities: np.ndarray, reference: np.ndarray) -> float:
    """Area under the ROC curve of two classes.

    Args:
        probabilities: (N, 2), or (N,) of class 1.
        reference: (N,) of 0 and 1.
    """
    scores = np.asarray(probabilities)
    return auroc(scores[:, 1] if scores.ndim == 2 else scores, reference)


def multiclass_auc(probabilities_NK: np.ndarray, reference: np.ndarray) -> MacroAuc:
    """Area of each class against all others, averaged over the classes that occur among several."""
    reference = np.asarray(reference)
    return _macro_auc(probabilities_NK, np.stack([reference == k for k in range(np.shape(probabilities_NK)[1])], 1))


def multilabel_auc(probabilities_NL: np.ndarray, reference_NL: np.ndarray) -> MacroAuc:
    """Area of each label, averaged over the labels for which it is defined; NaN in the reference is left out."""
    return _macro_auc(probabilities_NL, reference_NL)


def multilabel_accuracy(probabilities_NL: np.ndarray, reference_NL: np.ndarray, threshold: float = 0.5) -> float:
    """Share of right answers for each label, averaged over labels; NaN in the reference is left out.

    A probability at the threshold counts as positive.
    """
    probabilities, reference = np.asarray(probabilities_NL), np.asarray(reference_NL, dtype=float)
    right = np.where(np.isnan(reference), math.nan, (probabilities >= threshold) == (reference > 0.5))
    return _mean_defined(np.array([_mean_defined(column) for column in right.T]))


def _macro_auc(scores_NL: np.ndarray, reference_NL: np.ndarray) -> MacroAuc:
    scores, reference = np.asarray(scores_NL), np.asarray(reference_NL, dtype=float)
    if scores.shape != reference.shape:
        raise ValueError(f"scores {scores.shape} and reference {reference.shape} differ in shape")
    known = ~np.isnan(reference)
    areas = np.array([auroc(scores[k, i], reference[k, i] > 0.5) for i, k in enumerate(known.T)])
    return MacroAuc(_mean_defined(areas), tuple(int(i) for i in np.flatnonzero(np.isnan(areas))))


def _pair(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if prediction.shape != reference.shape or prediction.ndim != 1:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} are not (N,) alike")
    return prediction, reference


def _mean_defined(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


# --- by name ---------------------------------------------------------------------------------------------------------

DEFINITIONS: Mapping[str, str] = {
    "mcc": "Matthews correlation coefficient of the most probable class; 0 when it is undefined for one class",
    "f1": "F1 of the most probable class, mean over the classes that occur or are predicted",
    "mean_accuracy": "share of cases whose most probable class is right",
    "mean_per_class_accuracy": "share of right cases within each class, mean over the classes that occur",
    "multiclass_auc": "area under the ROC curve of each class against the rest, mean over the classes that occur",
    "binary_auc": "area under the ROC curve of the second class",
}
"""What each metric of exclusive classes is, in words."""

MULTILABEL = ("multilabel_auc", "multilabel_accuracy")
"""Metrics of labels that do not exclude one another."""


def score_classes(name: str, probabilities_NK: np.ndarray, reference: np.ndarray) -> float:
    """One metric of exclusive classes by its name in ``DEFINITIONS``.

    Returns:
        NaN where it is not defined, as ``binary_auc`` of three classes.
    """
    n_classes = probabilities_NK.shape[1]
    if name == "binary_auc":
        return binary_auc(probabilities_NK, reference) if n_classes == 2 else math.nan
    if name == "multiclass_auc":
        return multiclass_auc(probabilities_NK, reference).value
    prediction = probabilities_NK.argmax(1) if len(probabilities_NK) else np.zeros(0, int)
    if name == "f1":
        return macro_f1(prediction, reference, n_classes)
    return {"mcc": mcc, "mean_accuracy": mean_accuracy, "mean_per_class_accuracy": mean_per_class_accuracy}[name](
        prediction, reference
    )


# --- nearest neighbours ----------------------------------------------------------------------------------------------


def knn_probabilities(
    train_ND: np.ndarray, train_labels: np.ndarray, test_MD: np.ndarray, n_classes: int, k: int = 20
) -> np.ndarray:
    """Share of each class in the votes of the ``k`` nearest training features, (M, K).

    Votes weigh exp(similarity / 0.07), as in DINO (Caron et al. 2021) and Wu et al. 2018.

    Args:
        train_ND: Features of known cases.
        train_labels: (N,) classes, 0 to K - 1.
        test_MD: Features of the cases to be told.
        n_classes: K.
        k: Neighbours; all cases if there are fewer.
    """
    train, test = _normalised(train_ND), _normalised(test_MD)
    k = min(k, len(train))
    votes = np.eye(n_classes)[np.asarray(train_labels)]
    parts = [np.zeros((0, n_classes))]
    for block in np.split(test, range(_BLOCK, len(test), _BLOCK)):  # one block of similarities in memory at a time
        similarity = block @ train.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weights = np.exp((np.take_along_axis(similarity, nearest, axis=1).astype(float) - 1) / 0.07)
        parts.append((weights[:, :, None] * votes[nearest]).sum(1) / weights.sum(1, keepdims=True))
    return np.concatenate(parts)


def _normalised(features_ND: np.ndarray) -> np.ndarray:
    features = np.asarray(features_ND, dtype=np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


# --- logistic regression ---------------------------------------------------------------------------------------------


def linear_scores(train_ND: np.ndarray, train_labels: np.ndarray, test_MD: np.ndarray, c: float = 1.0) -> np.ndarray:
    """Probability of class 1 by L2 logistic regression on standardised features, (M,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
    return model.fit(train_ND, train_labels).predict_proba(test_MD)[:, 1]


def c_grid(count: int = 45) -> np.ndarray:
    """``count`` values of C, log-spaced from 1e-6 to 1e5; 45 is the published sweep."""
    return np.logspace(-6, 5, count)


@dataclass(frozen=True)
class LogisticProbe:
    """L2 logistic regression on standardised features, fitted once with a chosen C.

    Args:
        mean_D, scale_D: Of the training features; a constant feature has scale 1.
        coefficients_KD: (K, D), one row a class.
        intercepts_K: (K,).
        c: Inverse strength of the penalty.
        converged: False if the last fit stopped after ``MAX_ITERATIONS``.
        sweep: (C, score on the held part) of each value tried; empty if there was no choice.
        n_train: Cases of the last fit.
    """

    mean_D: np.ndarray
    scale_D: np.ndarray
    coefficients_KD: np.ndarray
    intercepts_K: np.ndarray
    c: float
    converged: bool
    sweep: tuple[tuple[float, float], ...]
    n_train: int

    def probabilities(self, features_MD: np.ndarray) -> np.ndarray:
        """(M, K), each row sums to 1."""
        standard = (np.asarray(features_MD, dtype=np.float64) - self.mean_D) / self.scale_D
        return _softmax(standard @ self.coefficients_KD.T + self.intercepts_K)


def fit_logistic(
    train_ND: np.ndarray,
    train_labels: np.ndarray,
    n_classes: int,
    *,
    held_N: np.ndarray | None = None,
    c_values: Sequence[float] | np.ndarray = (1.0,),
    score: Score | None = None,
    class_weight: Mapping[int, float] | None = None,
) -> LogisticProbe:
    """Choose C on a held part of the training cases, then fit to all of them.

    The sweep goes from strong to weak penalties, each fit starting from the last one; the final fit starts afresh, so
    it is a function of C and the data alone. Equal scores: the C nearest to 1. If no score is defined, as when the
    held part or the rest has one class only, C is 1.

    Args:
        train_ND: Features of all training cases.
        train_labels: (N,) classes, 0 to K - 1, at least two of them present.
        n_classes: K; a class without a case gets probability 0.
        held_N: (N,) bool, the cases on which C is chosen; None or a single value of C: no choice.
        c_values: Values to try.
        score: What is to be high on the held part.
        class_weight: What a case of each class weighs in the fits; 1 each if not given.

    Source: the sweep of DINOv2's logistic regression (Oquab et al. 2023); penalty and solver as in scikit-learn.
    """
    features, labels = np.asarray(train_ND, dtype=np.float64), np.asarray(train_labels)
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(f"features {features.shape} do not fit {len(labels)} labels")
    if len(np.unique(labels)) < 2:
        raise ValueError("logistic regression needs cases of two classes")
    candidates = sorted(float(c) for c in c_values)
    sweep: tuple[tuple[float, float], ...] = ()
    if len(candidates) > 1 and held_N is not None and score is not None:
        sweep = _sweep(features, labels, n_classes, np.asarray(held_N, dtype=bool), candidates, score, class_weight)
    c = _best_c(sweep) if sweep else (candidates[0] if len(candidates) == 1 else 1.0)
    return _Fit(features, labels, n_classes, class_weight).probe(c, sweep)


def _sweep(
    features_ND: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    held_N: np.ndarray,
    c_values: Sequence[float],
    score: Score,
    class_weight: Mapping[int, float] | None,
) -> tuple[tuple[float, float], ...]:
    if not held_N.any() or len(np.unique(labels[~held_N])) < 2:
        return ()
    fit = _Fit(features_ND[~held_N], labels[~held_N], n_classes, class_weight)
    scores = [score(fit.probe(c).probabilities(features_ND[held_N]), labels[held_N]) for c in c_values]
    return tuple(zip(c_values, scores, strict=True))


def _best_c(sweep: Sequence[tuple[float, float]]) -> float:
    defined = [(value, -abs(math.log(c)), c) for c, value in sweep if not math.isnan(value)]
    return max(defined)[2] if defined else 1.0


class _Fit:
    """Logistic regression on one set of cases for several C, each fit starting from the one before.

    The penalty does not see a rotation, so the features are first turned onto the directions that the cases span:
    with fewer cases than features the problem gets smaller and the solution stays the same.
    """

    def __init__(
        self,
        features_ND: np.ndarray,
        labels: np.ndarray,
        n_classes: int,
        class_weight: Mapping[int, float] | None = None,
    ) -> None:
        from sklearn.linear_model import LogisticRegression

        self.mean_D = features_ND.mean(0)
        spread_D = features_ND.std(0)
        constant_D = spread_D <= 1e-12 * np.maximum(np.abs(self.mean_D), 1e-12)
        self.scale_D = np.where(constant_D, 1.0, spread_D)
        standard = (features_ND - self.mean_D) / self.scale_D
        self.basis_RD: np.ndarray | None = None
        if len(standard) < standard.shape[1]:
            _, _, self.basis_RD = np.linalg.svd(standard, full_matrices=False)
            standard = standard @ self.basis_RD.T
        self.standard, self.labels, self.n_classes = standard, labels, n_classes
        weights = None if class_weight is None else dict(class_weight)
        self.model = LogisticRegression(max_iter=MAX_ITERATIONS, tol=_TOLERANCE, warm_start=True, class_weight=weights)

    def probe(self, c: float, sweep: tuple[tuple[float, float], ...] = ()) -> LogisticProbe:
        """Fit with one C; slow convergence is noted, not warned of."""
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.set_params(C=c).fit(self.standard, self.labels)
        coefficients, intercepts = self._in_full()
        return LogisticProbe(
            mean_D=self.mean_D,
            scale_D=self.scale_D,
            coefficients_KD=coefficients,
            intercepts_K=intercepts,
            c=c,
            converged=int(np.max(self.model.n_iter_)) < MAX_ITERATIONS,
            sweep=sweep,
            n_train=len(self.labels),
        )

    def _in_full(self) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients (K, D) and intercepts (K,): two classes are two rows too, an absent class is never told."""
        rows, offsets = self.model.coef_, self.model.intercept_
        if self.basis_RD is not None:
            rows = rows @ self.basis_RD
        if len(rows) == 1:  # a sigmoid is the softmax of 0 and the logit
            rows = np.concatenate([np.zeros_like(rows), rows])
            offsets = np.array([0.0, offsets[0]])
        coefficients = np.zeros((self.n_classes, rows.shape[1]))
        intercepts = np.full(self.n_classes, -np.inf)
        coefficients[self.model.classes_], intercepts[self.model.classes_] = rows, offsets
        return coefficients, intercepts


def _softmax(logits_MK: np.ndarray) -> np.ndarray:
    powers = np.exp(logits_MK - logits_MK.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
