"""Metrics of predicted numbers, in the unit of the target where they have one.

They take weights, how often each case counts, for many draws at once. A reference that is not known (NaN) counts
nowhere; a metric that is not defined is NaN. Letters: N cases, B draws.
"""

from __future__ import annotations

import numpy as np

LIMIT_SD = 1.96
"""Standard deviations between the bias and the limits of agreement."""

DEFINITIONS: dict[str, str] = {
    "mae": "mean absolute error, in the unit of the target",
    "rmse": "root of the mean squared error, in the unit of the target",
    "r2": "coefficient of determination: 1 - squared errors / squared distances of the references from their mean",
    "pearson": "Pearson correlation of prediction and reference",
    "relative_error": "mean absolute error divided by the mean absolute reference",
    "bias": "mean of prediction minus reference, in the unit of the target",
    "limit_low": f"lower limit of agreement: bias - {LIMIT_SD} standard deviations of the difference (Bland, Altman)",
    "limit_high": f"upper limit of agreement: bias + {LIMIT_SD} standard deviations of the difference",
}
"""What each metric of one target is, in words."""

UNITLESS = ("r2", "pearson", "relative_error")
"""Metrics that can be averaged over targets of different units."""


class RegressionScores:
    """Every metric of one target, for any weights.

    Args:
        prediction_N: In the unit of the target.
        reference_N: NaN for unknown.
    """

    def __init__(self, prediction_N: np.ndarray, reference_N: np.ndarray) -> None:
        reference = np.asarray(reference_N, dtype=np.float64)
        self.known_N = ~np.isnan(reference)
        self.reference = reference[self.known_N]
        self.prediction = np.asarray(prediction_N, dtype=np.float64)[self.known_N]
        # moments about the means of all cases: raw squares of large numbers would cancel
        self.x = self.prediction - (self.prediction.mean() if len(self.prediction) else 0.0)
        self.y = self.reference - (self.reference.mean() if len(self.reference) else 0.0)
        error = self.prediction - self.reference
        self.error_mean = float(error.mean()) if len(error) else 0.0
        moments = [self.x, self.y, self.x**2, self.y**2, self.x * self.y]
        errors = [np.abs(error), error**2, np.abs(self.reference), error, (error - self.error_mean) ** 2]
        self.sums_NF = np.column_stack([*errors, *moments])

    def values(self, weights_BN: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric of ``DEFINITIONS``, (B,)."""
        weights = weights_BN if self.known_N.all() else weights_BN[:, self.known_N]
        total = weights.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = weights @ self.sums_NF / total[:, None]
            absolute, square, size, bias, scatter, x, y, xx, yy, xy = means.T
            spread_x, spread_y = _spread(xx, x, self._noise(self.x)), _spread(yy, y, self._noise(self.y))
            variance = (
                np.maximum(scatter - (bias - self.error_mean) ** 2, 0) * total / np.where(total > 1, total - 1, np.nan)
            )
            limit = LIMIT_SD * np.sqrt(variance)
            correlation = np.clip((xy - x * y) / np.sqrt(spread_x * spread_y), -1, 1)
            return {
                "mae": absolute,
                "rmse": np.sqrt(square),
                "r2": 1 - square / spread_y,
                "pearson": correlation,
                "relative_error": absolute / np.where(size > 0, size, np.nan),
                "bias": bias,
                "limit_low": bias - limit,
                "limit_high": bias + limit,
            }

    @staticmethod
    def _noise(centred_N: np.ndarray) -> float:
        """A variance below this is rounding."""
        return 1e-20 * float((centred_N**2).max()) if len(centred_N) else 0.0

    def reason(self, name: str) -> str:
        """Why a metric of this target is not defined."""
        if not len(self.reference):
            return "no case has a known reference"
        if name == "relative_error":
            return "all references are 0"
        if name in ("limit_low", "limit_high"):
            return "a standard deviation needs two cases"
        constant = "predictions" if name == "pearson" and np.ptp(self.reference) else "references"
        return f"all {constant} are equal"


def _spread(square: np.ndarray, mean: np.ndarray, noise: float) -> np.ndarray:
    """Variance from moments; NaN where it is 0."""
    variance = square - mean**2
    return np.where(variance > noise, variance, np.nan)
