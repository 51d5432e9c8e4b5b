"""Metrics of classes that exclude one another, over all classes at once; each class alone is in ``binary``.

Like those they take weights for many draws at once. The decision is the most probable class, the first one of equals.
Letters: N cases, K classes, B draws.
"""

from __future__ import annotations

import numpy as np

from medssl_cli.metrics.binary import BINS, LEAST_PROBABILITY, BinaryScores, gaps

DEFINITIONS: dict[str, str] = {
    "accuracy": "share of cases whose most probable class is right",
    "balanced_accuracy": "share of right cases within each class, mean over the classes that occur",
    "mcc": "Matthews correlation coefficient of K classes (Gorodkin 2004); 0 where its root is 0",
    "log_loss": "mean negative logarithm of the probability of the true class, 0 is best",
    "brier": "mean over cases of the squared differences of probability and label, summed over classes; 0 is best",
    "ece": f"expected calibration error of the most probable class: {BINS} equal-width bins of its probability, mean "
    "over cases of the distance between mean probability and share of right cases in their bin; too high with few "
    "cases, more so in bootstrap draws: its interval may lie above it",
    "quadratic_kappa": "Cohen's kappa with quadratic weights of the class numbers; meant for classes that are grades",
}
"""What each metric over all classes is, in words."""


class MulticlassScores:
    """Every metric of exclusive classes, for any weights.

    Args:
        probabilities_NK: Of each class.
        class_N: True class, 0 to K - 1; NaN for unknown.

    Attributes:
        each: One ``BinaryScores`` a class, this class against all others.
    """

    def __init__(self, probabilities_NK: np.ndarray, class_N: np.ndarray) -> None:
        probabilities, truth = np.asarray(probabilities_NK, dtype=np.float64), np.asarray(class_N, dtype=np.float64)
        self.known_N = ~np.isnan(truth)
        decision = probabilities.argmax(1) if len(probabilities) else np.zeros(0, int)
        self.each = [
            BinaryScores(probabilities[:, k], np.where(self.known_N, truth == k, np.nan), decision == k)
            for k in range(probabilities.shape[1])
        ]
        self.sums_NF = _columns(probabilities[self.known_N], truth[self.known_N].astype(int), decision[self.known_N])

    def values(self, weights_BN: np.ndarray, each: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Each metric of ``DEFINITIONS`` but ``balanced_accuracy``, which is the mean sensitivity of ``each``, (B,)."""
        weights = weights_BN if self.known_N.all() else weights_BN[:, self.known_N]
        total = weights.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = weights @ self.sums_NF / total[:, None]
        right, square, nll, p, t, pp, tt, far = means[:, :8].T
        return {
            "accuracy": right,
            "mcc": self._mcc(weights, total),
            "log_loss": nll,
            "brier": square,
            "ece": np.abs(means[:, 8:]).sum(1),
            "quadratic_kappa": _kappa(far, pp + tt - 2 * p * t),
        }

    def _mcc(self, weights_BN: np.ndarray, total: np.ndarray) -> np.ndarray:
        """(c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)), with counts."""
        called = weights_BN @ np.column_stack([scores.called for scores in self.each]).astype(np.float64)
        true = weights_BN @ np.column_stack([scores.positive for scores in self.each]).astype(np.float64)
        right = weights_BN @ self.sums_NF[:, 0]
        root = np.sqrt((total**2 - (called**2).sum(1)) * (total**2 - (true**2).sum(1)))
        upper = right * total - (called * true).sum(1)
        value = np.divide(upper, root, out=np.zeros_like(root), where=root > 0)
        return np.where(total > 0, value, np.nan)

    def reason(self, name: str) -> str:
        """Why a metric over all classes is not defined."""
        if not self.known_N.any():
            return "no case has a known class"
        return "all cases are of one class, and all are called it" if name == "quadratic_kappa" else "no class occurs"


def _columns(probabilities_NK: np.ndarray, class_N: np.ndarray, decision_N: np.ndarray) -> np.ndarray:
    """What is averaged over cases, (N, 8 + BINS)."""
    rows = np.arange(len(class_N))
    own, top = probabilities_NK[rows, class_N], probabilities_NK[rows, decision_N]
    right = decision_N == class_N
    square = ((probabilities_NK - np.eye(probabilities_NK.shape[1])[class_N]) ** 2).sum(1)
    nll = -np.log(np.clip(own, LEAST_PROBABILITY, 1))
    grades = [decision_N, class_N, decision_N**2, class_N**2, (decision_N - class_N) ** 2]
    return np.column_stack([right, square, nll, *grades, gaps(top, right)]).astype(np.float64)


def _kappa(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """1 - observed / expected squared distance of decision and class; the expected one of independent classes."""
    ratio = np.divide(observed, expected, out=np.full_like(expected, np.nan), where=expected > 1e-12)
    return 1 - ratio
