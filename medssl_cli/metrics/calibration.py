"""Whether probabilities mean what they say: Brier score, expected calibration error, and scaling that mends them.

A calibrated logit is scale x logit + shift; the scale of temperature scaling is 1 / T. Letters: N cases, C outputs,
V validation cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from medssl_cli.metrics.binary import gaps

Task = Literal["binary", "multiclass", "multilabel"]
Scaling = tuple[np.ndarray, np.ndarray]
"""Scale (C,) and shift (C,) of logits; multiclass: the same scale for all classes."""

Loss = Callable[[float, np.ndarray], float]
"""(scale, shifts) -> mean negative log-likelihood."""

SCALE_BOUNDS = (1e-2, 1e2)
SHIFT_BOUND = 20.0
_NO_SHIFT = np.zeros(1)
Z_95 = 1.959963984540054
"""97.5th percentile of the normal distribution."""


# --- how far off -----------------------------------------------------------------------------------------------------


def brier(probability_N: np.ndarray, label_N: np.ndarray) -> float:
    """Mean squared difference of probability and label; NaN labels are left out, NaN without a case."""
    probability, label = _known(probability_N, label_N)
    return float(((probability - label) ** 2).mean()) if len(label) else math.nan


def ece(probability_N: np.ndarray, label_N: np.ndarray) -> float:
    """Expected calibration error of one label, 10 equal-width bins [0, .1), ..., [.9, 1].

    Mean over cases of the distance between mean probability and share of positives in the bin of the case.

    Args:
        probability_N: Of the label being present; for classes the probability of the most probable one.
        label_N: 0, 1 or NaN for unknown; for classes whether the most probable one is right.

    Source: Naeini et al. 2015, with the probability of the label instead of the confidence for binary labels.
    """
    probability, label = _known(probability_N, label_N)
    return float(np.abs(gaps(probability, label > 0.5).sum(0)).sum() / len(label)) if len(label) else math.nan


def nll(logits_NC: np.ndarray, labels: np.ndarray, task: Task) -> np.ndarray:
    """Mean negative log-likelihood, (C,) for labels, (1,) for classes; NaN where no label is known.

    Args:
        logits_NC: (N, C), binary also (N,).
        labels: Binary and multilabel (N, C) of 0, 1, NaN; multiclass (N,) or (N, 1) of class numbers, NaN for unknown.
        task: Sigmoids, or one softmax.
    """
    logits, labels = _shaped(logits_NC, labels, task)
    if task == "multiclass":
        known = ~np.isnan(labels[:, 0])
        return np.array([_softmax_nll(logits[known], labels[known, 0].astype(int)) if known.any() else math.nan])
    losses = [_sigmoid_nll(z[k], y[k]) if k.any() else math.nan for z, y, k in _columns(logits, labels)]
    return np.array(losses)


# --- scaling ---------------------------------------------------------------------------------------------------------


def fit_temperature(logits_NC: np.ndarray, labels: np.ndarray, task: Task, *, smooth: bool = False) -> Scaling:
    """The scale 1 / T of the logits with the smallest negative log-likelihood, in 1e-2 to 1e2; the shift is 0.

    One scale for binary and multiclass, one for each label of multilabel. The loss is convex in the scale; it is never
    raised, for a scale of 1 is kept where no other is better. Where ``unfit_reasons`` gives a reason the scale is 1.

    Args:
        logits_NC: As for ``nll``.
        labels: As for ``nll``.
        task: As for ``nll``.
        smooth: As for ``fit_platt``.

    Source: Guo et al. 2017.
    """
    logits, labels = _shaped(logits_NC, labels, task)
    scale = np.ones(logits.shape[1])
    unfit = unfit_reasons(labels, task)
    if task == "multiclass":
        if not unfit[0]:
            known = ~np.isnan(labels[:, 0])
            z, y = logits[known], labels[known, 0].astype(int)
            scale[:] = _best_scale(_class_loss(z, y, smooth))
        return scale, np.zeros_like(scale)
    for c, (z, y, known) in enumerate(_columns(logits, labels)):
        if not unfit[c]:
            scale[c] = _best_scale(_label_loss(z[known], y[known], smooth))
    return scale, np.zeros_like(scale)


def fit_platt(logits_NC: np.ndarray, labels: np.ndarray, task: Task, *, smooth: bool = False) -> Scaling:
    """Scale and shift of the logits with the smallest negative log-likelihood.

    One pair for each label; multiclass: one scale, and one shift for each class that occurs. Scales lie in 1e-2 to
    1e2, shifts in -20 to 20, for separable cases have no finite optimum. The loss is never raised. Where
    ``unfit_reasons`` gives a reason scale and shift are 1 and 0.

    Args:
        logits_NC: As for ``nll``.
        labels: As for ``nll``.
        task: As for ``nll``.
        smooth: Take the label of n cases for (n + 1) / (n + 2) sure, the rest shared by the others, so that few cases,
            or cases that are told apart without an error, do not ask for probabilities of 0 and 1.

    Source: Platt 1999; classes: Alexandari et al. 2020.
    """
    logits, labels = _shaped(logits_NC, labels, task)
    scale, shift = np.ones(logits.shape[1]), np.zeros(logits.shape[1])
    unfit = unfit_reasons(labels, task)
    if task == "multiclass":
        if not unfit[0]:
            known = ~np.isnan(labels[:, 0])
            z, y = logits[known], labels[known, 0].astype(int)
            free = np.isin(np.arange(logits.shape[1]), y)
            scale[:], shift[:] = _best_pair(_class_loss(z, y, smooth), free)
        return scale, shift
    for c, (z, y, known) in enumerate(_columns(logits, labels)):
        if not unfit[c]:
            scale[c], shifts = _best_pair(_label_loss(z[known], y[known], smooth), np.array([True]))
            shift[c] = shifts[0]
    return scale, shift


def apply_scaling(logits_NC: np.ndarray, scaling: Scaling) -> np.ndarray:
    """Calibrated logits, (N, C)."""
    return np.asarray(logits_NC) * scaling[0] + scaling[1]


def unfit_reasons(labels: np.ndarray, task: Task) -> tuple[str, ...]:
    """Why nothing can be fitted, one text for each label (multiclass: one in all), empty where it can."""
    labels = np.asarray(labels, dtype=np.float64)
    columns = labels.reshape(len(labels), -1).T
    return tuple(_unfit(column[~np.isnan(column)], "class" if task == "multiclass" else "label") for column in columns)


def _unfit(known: np.ndarray, word: str) -> str:
    if not len(known):
        return f"no case has a known {word}"
    return f"all {len(known)} cases have the same {word}" if (known == known[0]).all() else ""


def _best_scale(loss: Loss) -> float:
    from scipy.optimize import minimize_scalar

    low, high = np.log(SCALE_BOUNDS)
    found = minimize_scalar(
        lambda x: loss(math.exp(x), _NO_SHIFT), bounds=(low, high), method="bounded", options={"xatol": 1e-8}
    )
    return min([1.0, *SCALE_BOUNDS, math.exp(found.x)], key=lambda s: loss(s, _NO_SHIFT))


def _best_pair(loss: Loss, free_S: np.ndarray) -> tuple[float, np.ndarray]:
    """Scale and shifts, (S,); shifts that are not free stay 0."""
    from scipy.optimize import minimize

    start = np.concatenate([[1.0], np.zeros(len(free_S))])
    bounds = [SCALE_BOUNDS, *[(-SHIFT_BOUND, SHIFT_BOUND) if free else (0.0, 0.0) for free in free_S]]
    options = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 1000}
    found = minimize(lambda x: loss(x[0], x[1:]), start, bounds=bounds, method="L-BFGS-B", options=options).x
    best = min([start, found], key=lambda x: loss(x[0], x[1:]))
    return float(best[0]), best[1:]


def _label_loss(logit_N: np.ndarray, label_N: np.ndarray, smooth: bool) -> Loss:
    signed_N, sure_N = np.where(label_N > 0.5, logit_N, -logit_N), _sure(label_N > 0.5, smooth)
    sign_N = np.where(label_N > 0.5, 1.0, -1.0)

    def loss(scale: float, shift: np.ndarray) -> float:
        z_N = scale * signed_N + sign_N * shift
        return float((np.logaddexp(0, -z_N) + (1 - sure_N) * z_N).mean())  # softplus(z) = softplus(-z) + z

    return loss


def _class_loss(logits_NC: np.ndarray, class_N: np.ndarray, smooth: bool) -> Loss:
    sure_N = _sure(class_N, smooth)
    target_NC = np.repeat((1 - sure_N)[:, None] / max(logits_NC.shape[1] - 1, 1), logits_NC.shape[1], 1)
    target_NC[np.arange(len(class_N)), class_N] = sure_N

    def loss(scale: float, shift: np.ndarray) -> float:
        z_NC = scale * logits_NC + shift
        centred_NC = z_NC - z_NC.max(1, keepdims=True)
        return float((np.log(np.exp(centred_NC).sum(1)) - (target_NC * centred_NC).sum(1)).mean())

    return loss


def _sure(class_N: np.ndarray, smooth: bool) -> np.ndarray:
    """(N,) how sure the label of a case is taken to be."""
    if not smooth:
        return np.ones(len(class_N))
    _, place_N, counts = np.unique(class_N, return_inverse=True, return_counts=True)
    return (counts[place_N] + 1) / (counts[place_N] + 2)


def _sigmoid_nll(logit_N: np.ndarray, label_N: np.ndarray) -> float:
    return float(np.logaddexp(0, np.where(label_N > 0.5, -logit_N, logit_N)).mean())


def _softmax_nll(logits_NC: np.ndarray, class_N: np.ndarray) -> float:
    centred = logits_NC - logits_NC.max(1, keepdims=True)
    return float((np.log(np.exp(centred).sum(1)) - centred[np.arange(len(class_N)), class_N]).mean())


def _shaped(logits_NC: np.ndarray, labels: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) and labels (N, C) or (N, 1) in float64."""
    logits, labels = np.asarray(logits_NC, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    logits, labels = logits.reshape(len(logits), -1), labels.reshape(len(labels), -1)
    expected = (len(logits), 1 if task == "multiclass" else logits.shape[1])
    if labels.shape != expected:
        raise ValueError(f"labels {labels.shape} do not fit logits {logits.shape} of task {task}")
    return logits, labels


def _columns(logits_NC: np.ndarray, labels_NC: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [(z, y, ~np.isnan(y)) for z, y in zip(logits_NC.T, labels_NC.T, strict=True)]


def _known(probability_N: np.ndarray, label_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probability, label = np.asarray(probability_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    if probability.shape != label.shape or label.ndim != 1:
        raise ValueError(f"probabilities {probability.shape} and labels {label.shape} are not (N,) alike")
    known = ~np.isnan(label)
    return probability[known], label[known]


# --- how often it was right nearby -----------------------------------------------------------------------------------


class Nearby(NamedTuple):
    """How often a label was present in validation cases with a probability nearby."""

    low: float
    high: float
    """Ends of the 95 % Wilson interval of the share of positives; NaN without a case."""
    n: int
    positives: int


def nearby_frequency(
    probability: float, val_probability_V: np.ndarray, val_label_V: np.ndarray, share: float = 0.1, least: int = 10
) -> Nearby:
    """How often the label was present among the validation cases whose probability is nearest.

    Args:
        probability: Of the case in question.
        val_probability_V: Of the validation cases.
        val_label_V: 0, 1 or NaN for unknown.
        share: Of the validation cases to look at, rounded up; all that are as near as the last one count too.
        least: Cases to look at at least; all if there are fewer.

    Source: Wilson 1927.
    """
    known_probability, label = _known(val_probability_V, val_label_V)
    if not len(label):
        return Nearby(math.nan, math.nan, 0, 0)
    distance = np.abs(known_probability - probability)
    count = min(len(label), max(least, math.ceil(share * len(label))))
    near = distance <= np.partition(distance, count - 1)[count - 1] + 1e-12  # equally near but for rounding
    n, positives = int(near.sum()), int((label[near] > 0.5).sum())
    return Nearby(*wilson_interval(positives, n), n, positives)


def wilson_interval(positives: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a share; NaN without a case. Source: Wilson 1927."""
    if not n:
        return math.nan, math.nan
    share, extra = positives / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    low, high = middle - half, middle + half
    return (0.0 if positives == 0 else low), (1.0 if positives == n else high)  # exact at the ends
