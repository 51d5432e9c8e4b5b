"""How unlike the training cases an embedding is: mean cosine distance to its nearest training rows.

Rows are centred on the training mean, for the embeddings of one backbone share a large common part that would make all
of them alike. A constant coordinate, as large as a training row is on average, is then appended before rows get unit
length: without it the cosine would not see how far out a row lies, only in which direction, and the mean itself would
have no direction at all. Letters: N training rows, P width, M rows kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medssl_cli.core.run import seed_for
from medssl_cli.metrics.intervals import number_groups

NEIGHBOURS = 5
MOST_ROWS = 2000
LIMIT_PERCENTILE = 99.0
"""Percentile of the training distances beyond which a case counts as unlike the training cases."""

PREFIX = "novelty."
_NOISE = 1e-9  # cosines of equal float32 rows differ by rounding
_BLOCK = 512

DEFINITION = (
    f"mean cosine distance to the {NEIGHBOURS} nearest training rows, centred on the training mean, with a constant "
    "coordinate appended that is as large as a training row on average; its percentile among the same distances of "
    f"training rows to rows of other patients; outside: beyond percentile {LIMIT_PERCENTILE:g}"
)


@dataclass(frozen=True)
class NoveltyScore:
    """How unlike the training cases one case is.

    Args:
        distance: 0 for the same as training rows, at most 2.
        percentile: Share of training rows that lie at most as far from the rows of other groups, 0 to 1; NaN where
            the training rows are of one group.
        limit: The distance beyond which a case counts as outside; NaN likewise.
        is_outside: Whether the distance is beyond the limit; None where there is no limit.
    """

    distance: float
    percentile: float
    limit: float
    is_outside: bool | None


@dataclass(frozen=True)
class Novelty:
    """Training rows and how far they lie from one another.

    Args:
        mean_P: Of all training rows.
        scale: Root mean square length of centred training rows; if all are equal, the length of their mean.
        rows_MP: (M, P + 1) rows of unit length.
        reference_M: For each row kept the mean distance to its nearest rows of other groups, ascending; empty if all
            rows are of one group, for then no distance to unseen patients is known.
        k: Neighbours.
    """

    mean_P: np.ndarray
    scale: float
    rows_MP: np.ndarray
    reference_M: np.ndarray
    k: int = NEIGHBOURS

    @classmethod
    def fit(
        cls,
        embeddings_NP: np.ndarray,
        groups: Sequence[str],
        *,
        k: int = NEIGHBOURS,
        most: int = MOST_ROWS,
        seed: int = 42,
    ) -> Novelty:
        """Keep training rows and measure their distances, each row from the rows of other groups.

        Args:
            embeddings_NP: Training rows as the head sees them.
            groups: (N,) patients.
            k: Neighbours; all rows of other groups if there are fewer.
            most: M at most; more rows are thinned at random, as a function of ``seed`` and N.
            seed: Of the run.

        Raises:
            ValueError: No rows, not finite, or groups of another number.
        """
        embeddings = np.asarray(embeddings_NP)
        if embeddings.ndim != 2 or not len(embeddings) or len(groups) != len(embeddings):
            raise ValueError(f"embeddings {embeddings.shape} with {len(groups)} groups")
        if not np.isfinite(embeddings).all():
            raise ValueError("an embedding is not finite")
        mean = embeddings.mean(0, dtype=np.float64)
        scale = _scale(embeddings, mean)
        numbers, _ = number_groups(groups)
        chosen = _chosen(len(embeddings), most, seed)
        novelty = cls(mean, scale, np.zeros((0, 0)), np.zeros(0), k)
        rows = novelty._unit(embeddings[chosen]).astype(np.float32)
        return cls(mean, scale, rows, _reference(rows, numbers[chosen], k), k)

    @property
    def limit(self) -> float:
        """The distance beyond which a case counts as outside; NaN if the training rows are of one group."""
        return float(np.percentile(self.reference_M, LIMIT_PERCENTILE)) if len(self.reference_M) else math.nan

    @property
    def reason(self) -> str:
        """Why there is no limit; empty if there is one."""
        return "" if len(self.reference_M) else "the training rows are of one group (patient)"

    def score(self, embedding_P: np.ndarray) -> NoveltyScore:
        """Compare one case with the training rows.

        Raises:
            ValueError: The width differs.
        """
        embedding = np.asarray(embedding_P, dtype=np.float64)
        if embedding.shape != self.mean_P.shape:
            raise ValueError(f"embedding {embedding.shape}, training rows {self.mean_P.shape}")
        cosine = self.rows_MP.astype(np.float64) @ self._unit(embedding[None])[0]
        distance = _mean_nearest(1 - cosine[None], self.k)[0]
        limit = self.limit
        if math.isnan(limit):
            return NoveltyScore(distance, math.nan, math.nan, None)
        below = int(np.searchsorted(self.reference_M, distance + _NOISE, side="right"))
        return NoveltyScore(distance, below / len(self.reference_M), limit, bool(distance > limit + _NOISE))

    def nearest(self, embeddings_NP: np.ndarray) -> np.ndarray:
        """Cosine distance of each row to its nearest training row, (N,): 0 for the same image."""
        blocks = range(0, len(embeddings_NP), _BLOCK)
        rows = self.rows_MP.astype(np.float64)
        found = [1 - (self._unit(embeddings_NP[start : start + _BLOCK]) @ rows.T).max(1) for start in blocks]
        return np.concatenate([np.zeros(0), *found])

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything as arrays, for a weight file; names without ``PREFIX``."""
        return {
            "mean": self.mean_P,
            "scale": np.array([self.scale]),
            "rows": self.rows_MP,
            "reference": self.reference_M,
            "k": np.array([self.k], dtype=np.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Novelty:
        """From ``tensors()``, or from the arrays of a whole file in which its names begin with ``novelty.``.

        Raises:
            ValueError: An array is missing or does not fit the others.
        """
        own = {
            name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)
        } or tensors
        missing = [name for name in ("mean", "scale", "rows", "reference", "k") if name not in own]
        if missing:
            raise ValueError(f"novelty: {', '.join(missing)} missing")
        mean, rows = np.asarray(own["mean"], dtype=np.float64), np.asarray(own["rows"])
        reference = np.asarray(own["reference"], dtype=np.float64)
        if (
            rows.ndim != 2
            or not len(rows)
            or rows.shape[1:] != (len(mean) + 1,)
            or len(reference) not in (0, len(rows))
        ):
            raise ValueError(
                f"novelty: rows {rows.shape}, mean {mean.shape} and reference {reference.shape} do not fit"
            )
        return cls(mean, float(own["scale"][0]), rows, reference, int(own["k"][0]))

    def _unit(self, embeddings_NP: np.ndarray) -> np.ndarray:
        """(N, P + 1) rows of unit length."""
        centred = (np.asarray(embeddings_NP, dtype=np.float64) - self.mean_P) / self.scale
        rows = np.concatenate([centred, np.ones((len(centred), 1))], axis=1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _scale(embeddings_NP: np.ndarray, mean_P: np.ndarray) -> float:
    square = float(np.mean([np.sum((row.astype(np.float64) - mean_P) ** 2) for row in embeddings_NP]))
    length = float(np.linalg.norm(mean_P))
    return math.sqrt(square) if math.sqrt(square) > 1e-6 * length else (length or 1.0)  # below is rounding


def _chosen(n: int, most: int, seed: int) -> np.ndarray:
    """Positions of the rows kept, ascending."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed_for(seed, "novelty", n)).choice(n, most, replace=False))


def _reference(rows_MP: np.ndarray, numbers_M: np.ndarray, k: int) -> np.ndarray:
    """Mean distance of each row to its nearest rows of other groups, ascending; empty for one group."""
    if len(np.unique(numbers_M)) < 2:
        return np.zeros(0)
    wide = rows_MP.astype(np.float64)
    parts = []
    for start in range(0, len(wide), _BLOCK):
        block = slice(start, start + _BLOCK)
        distances = 1 - wide[block] @ wide.T
        distances[numbers_M[block, None] == numbers_M[None]] = np.inf
        parts.append(_mean_nearest(distances, k))
    return np.sort(np.concatenate(parts))


def _mean_nearest(distances_NM: np.ndarray, k: int) -> np.ndarray:
    """Mean of the k smallest finite distances of each row, or of all if there are fewer, (N,)."""
    k = min(k, distances_NM.shape[1])
    nearest = np.maximum(np.partition(distances_NM, k - 1, axis=1)[:, :k], 0)
    finite = np.isfinite(nearest)
    return np.where(finite, nearest, 0).sum(1) / finite.sum(1)
