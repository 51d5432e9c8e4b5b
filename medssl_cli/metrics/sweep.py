"""Dice at a row of thresholds, from counts: no probability map is kept.

Each image adds its voxels to a histogram between the thresholds, one for its foreground and one for its background;
the counts at every threshold are sums of it. Letters: T thresholds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.metrics.segmentation import Counts, dice, iou

THRESHOLDS = tuple(round(0.20 + 0.05 * n, 2) for n in range(9))
DEFINITION = (
    "mean over images of Dice at each threshold, a voxel counting as predicted from the threshold on; images where "
    "both are empty count 1; of equal means the threshold nearest to 0.5, then the lower one"
)


class ThresholdSweep:
    """True and false positives and false negatives of each image at each threshold.

    Args:
        thresholds: Probabilities from which on a voxel counts as predicted.
        present_only: Leave out images whose reference is empty, unless all are: where most images are, the threshold
            that predicts nothing would else be the best.
    """

    def __init__(self, thresholds: tuple[float, ...] = THRESHOLDS, *, present_only: bool = False) -> None:
        if not thresholds or list(thresholds) != sorted(set(thresholds)):
            raise ValueError(f"thresholds {thresholds} do not rise")
        self.thresholds = tuple(float(threshold) for threshold in thresholds)
        self.present_only = present_only
        self._counts: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.counts().tp)

    def add(self, probability: np.ndarray, reference: np.ndarray, name: str) -> None:
        """Count one image; what is added under one name, such as the slices of a case, is one image.

        Args:
            probability: Of the foreground, any shape.
            reference: Mask of the same shape; ``IGNORE_LABEL`` counts nowhere.
            name: Of the image.

        Raises:
            ValueError: The shapes differ, or a probability is not finite.
        """
        probability, reference = np.asarray(probability), np.asarray(reference)
        if probability.shape != reference.shape:
            raise ValueError(f"probability {probability.shape} and reference {reference.shape} differ in shape")
        if not np.isfinite(probability).all():
            raise ValueError(f"{name}: probabilities that are not finite")
        found_3T = self._count(probability.reshape(-1), reference.reshape(-1))
        known = self._counts.get(name)
        self._counts[name] = found_3T if known is None else known + found_3T

    def counts(self) -> Counts:
        """Counts (images, T) in the order in which images came; true negatives are not kept (NaN)."""
        stacked = np.stack(list(self._counts.values())) if self._counts else np.zeros((0, 3, len(self.thresholds)), int)
        present = (stacked[:, 0] + stacked[:, 2] > 0).any(1)
        if self.present_only and present.any():
            stacked = stacked[present]
        return Counts(stacked[:, 0], stacked[:, 1], stacked[:, 2], math.nan)

    def best(self) -> tuple[float, float]:
        """(threshold, mean Dice at it).

        Raises:
            ValueError: No image was added.
        """
        if not self._counts:
            raise ValueError("no image was added")
        tp, fp, fn, _ = self.counts()
        means = dice(tp, fp, fn).mean(0)
        # rounding in the ninth digit must not choose
        order = sorted(range(len(means)), key=lambda t: (-round(means[t], 9), self._distance(t), t))
        return self.thresholds[order[0]], float(means[order[0]])

    def table(self) -> list[dict[str, Any]]:
        """For each threshold the mean Dice and IoU over images and their number; None without an image."""
        tp, fp, fn, _ = self.counts()
        n = len(self)
        dices = dice(tp, fp, fn).mean(0) if n else [None] * len(self.thresholds)
        ious = iou(tp, fp, fn).mean(0) if n else [None] * len(self.thresholds)
        rows = zip(self.thresholds, dices, ious, strict=True)
        return [
            {"threshold": t, "dice": None if d is None else float(d), "iou": None if i is None else float(i), "n": n}
            for t, d, i in rows
        ]

    def _distance(self, t: int) -> float:
        return round(abs(self.thresholds[t] - 0.5), 9)

    def _count(self, probability: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """(3, T) int64: true positives, false positives, false negatives."""
        if reference.dtype != bool and (reference == IGNORE_LABEL).any():
            kept = reference != IGNORE_LABEL
            probability, reference = probability[kept], reference[kept]
        kind = probability.dtype if probability.dtype.kind == "f" else np.dtype(np.float64)
        # compared in the map's own precision, as `probability >= threshold` does
        edges = np.asarray(self.thresholds, dtype=kind)
        present = reference != 0
        tp = self._from_on(probability[present], edges)
        predicted = self._from_on(probability, edges)
        return np.stack([tp, predicted - tp, int(np.count_nonzero(present)) - tp])

    def _from_on(self, probability: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """How many values are at least each edge, (T,) int64."""
        bins = np.bincount(np.searchsorted(edges, probability, side="right"), minlength=len(edges) + 1)
        return bins[::-1].cumsum()[::-1][1:].astype(np.int64)
