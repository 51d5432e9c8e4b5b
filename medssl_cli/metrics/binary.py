"""Metrics of one label, present or absent: ranking, decisions at a threshold, calibration.

All of them take weights, how often each case counts, for many draws at once: the plain metric has weights of one, a
bootstrap draw whole numbers. A label that is not known (NaN) counts nowhere. A metric that is not defined is NaN.
Letters: N cases, B draws, T distinct scores.
"""

from __future__ import annotations

import numpy as np

BINS = 10
"""Equal-width bins of the expected calibration error."""

LEAST_PROBABILITY = 1e-15
"""Probabilities are kept this far from 0 and 1 under the logarithm."""

DEFINITIONS: dict[str, str] = {
    "auroc": "area under the ROC curve: probability that a positive scores above a negative, ties count half",
    "average_precision": "area under the precision-recall curve as sum of precision times step of recall",
    "accuracy": "share of cases decided rightly",
    "balanced_accuracy": "mean of sensitivity and specificity",
    "f1": "2 TP / (2 TP + FP + FN)",
    "mcc": "Matthews correlation coefficient of the decisions; 0 where its root is 0",
    "sensitivity": "share of positives that are called positive",
    "specificity": "share of negatives that are called negative",
    "ppv": "share of right ones among the cases called positive",
    "npv": "share of right ones among the cases called negative",
    "brier": "mean squared difference of probability and label, 0 is best",
    "log_loss": "mean negative log-likelihood of the labels, natural logarithm, 0 is best",
    "ece": f"expected calibration error: {BINS} equal-width bins of the probability, mean over cases of the distance "
    "between mean probability and share of positives in their bin; too high with few cases, "
    "more so in bootstrap draws: its interval may lie above it",
    "prevalence": "share of positives",
    "n_positives": "number of positives",
}
"""What each metric of one label is, in words."""

DECIDED = ("accuracy", "balanced_accuracy", "f1", "mcc", "sensitivity", "specificity", "ppv", "npv")
"""Metrics of decisions: they depend on a threshold."""


class RankCurve:
    """The order of scores, from which areas under curves follow for any weights.

    Args:
        scores_N: Higher means more likely positive.
        positive_N: (N,) bool.
    """

    def __init__(self, scores_N: np.ndarray, positive_N: np.ndarray) -> None:
        scores = np.asarray(scores_N, dtype=np.float64)
        self.order_N = np.argsort(-scores, kind="stable")
        ranked = scores[self.order_N]
        self.positive_N = np.asarray(positive_N, dtype=np.float64)[self.order_N]
        last = np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)]
        self.ends_T = np.flatnonzero(last)  # equal scores are one step of the curve

    def areas(self, weights_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Areas under the ROC curve and average precisions, each (B,); NaN where a class has no weight."""
        if not len(self.ends_T):
            return np.full(len(weights_BN), np.nan), np.full(len(weights_BN), np.nan)
        weights = weights_BN[:, self.order_N]
        called_BT = np.cumsum(weights, axis=1)[:, self.ends_T]
        weights *= self.positive_N
        hits_BT = np.cumsum(weights, axis=1)[:, self.ends_T]
        steps_BT = np.diff(hits_BT, axis=1, prepend=0.0)
        positives, negatives = hits_BT[:, -1], called_BT[:, -1] - hits_BT[:, -1]
        # a positive beats the negatives below it and half of those that tie: all, less called ones, plus half of ties
        false_BT = called_BT - hits_BT
        false_before_BT = np.concatenate([np.zeros((len(weights), 1)), false_BT[:, :-1]], axis=1)
        beaten = negatives * positives - np.einsum("bt,bt->b", steps_BT, false_BT + false_before_BT) / 2
        precision_BT = np.divide(hits_BT, called_BT, out=np.zeros_like(hits_BT), where=called_BT > 0)
        gained = np.einsum("bt,bt->b", steps_BT, precision_BT)
        both = (positives > 0) & (negatives > 0)
        return _ratio(beaten, positives * negatives), np.where(both, _ratio(gained, positives), np.nan)


class BinaryScores:
    """Every metric of one label, for any weights.

    Args:
        probability_N: Of the label being present.
        label_N: 0, 1 or NaN for unknown.
        called_N: (N,) bool, whether the case is called positive.
    """

    def __init__(self, probability_N: np.ndarray, label_N: np.ndarray, called_N: np.ndarray) -> None:
        label = np.asarray(label_N, dtype=np.float64)
        self.known_N = ~np.isnan(label)
        self.probability = np.asarray(probability_N, dtype=np.float64)[self.known_N]
        self.positive = label[self.known_N] > 0.5
        self.called = np.asarray(called_N, dtype=bool)[self.known_N]
        self.curve = RankCurve(self.probability, self.positive)
        self.sums_NF = self._columns()

    def _columns(self) -> np.ndarray:
        """What is summed over cases: four outcomes, square, negative log-likelihood, gap in each bin."""
        p, y, called = self.probability, self.positive, self.called
        outcomes = [y & called, ~y & called, y & ~called, ~y & ~called]
        return np.column_stack([*outcomes, (p - y) ** 2, log_losses(p, y), gaps(p, y)]).astype(np.float64)

    def values(self, weights_BN: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric of ``DEFINITIONS``, (B,)."""
        weights = weights_BN if self.known_N.all() else weights_BN[:, self.known_N]
        sums = weights @ self.sums_NF
        total = weights.sum(1)
        auroc, average_precision = self.curve.areas(weights)
        return {
            "auroc": auroc,
            "average_precision": average_precision,
            **decided(*sums[:, :4].T),
            "brier": _ratio(sums[:, 4], total),
            "log_loss": _ratio(sums[:, 5], total),
            "ece": _ratio(np.abs(sums[:, 6:]).sum(1), total),
            "prevalence": _ratio(sums[:, 0] + sums[:, 2], total),
            "n_positives": sums[:, 0] + sums[:, 2],
        }

    def reason(self, name: str) -> str:
        """Why a metric of this label is not defined."""
        if not len(self.positive):
            return "no case has a known label"
        if name == "ppv":
            return "no case is called positive"
        if name == "npv":
            return "no case is called negative"
        if name == "f1":
            return "no case is positive or called positive"
        if name in ("sensitivity", "specificity"):
            return f"no case is {'positive' if name == 'sensitivity' else 'negative'}"
        return f"all cases are {'positive' if self.positive.all() else 'negative'}"


def decided(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of decisions from counts of true and false positives and negatives, each (B,)."""
    sensitivity, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    mcc = np.divide(tp * tn - fp * fn, root, out=np.zeros_like(root), where=root > 0)
    total = tp + fp + fn + tn
    return {
        "accuracy": _ratio(tp + tn, total),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "mcc": np.where(total > 0, mcc, np.nan),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": _ratio(tp, tp + fp),
        "npv": _ratio(tn, tn + fn),
    }


def log_losses(probability_N: np.ndarray, positive_N: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each label, (N,), natural logarithm."""
    probability = np.clip(np.where(positive_N, probability_N, 1 - probability_N), LEAST_PROBABILITY, 1)
    return -np.log(probability)


def gaps(probability_N: np.ndarray, positive_N: np.ndarray) -> np.ndarray:
    """Probability minus label in the column of the case's bin, (N, BINS); summed in a bin it is the bin's gap."""
    gaps_NB = np.zeros((len(probability_N), BINS))
    gaps_NB[np.arange(len(probability_N)), bin_of(probability_N)] = np.asarray(probability_N) - positive_N
    return gaps_NB


def bin_of(probability_N: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Bin i holds [i / bins, (i + 1) / bins), the last one holds 1 too."""
    return np.clip(np.floor(np.asarray(probability_N, dtype=np.float64) * bins).astype(int), 0, bins - 1)


def _ratio(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return np.divide(upper, lower, out=np.full(np.shape(lower), np.nan), where=lower > 0)
