"""Which lesions were found, at the price of how many false alarms: candidates, their match, FROC and precision.

The rule is that of the PI-CAI challenge: a candidate is a connected region of the prediction with one confidence; it
finds a lesion if their intersection over union is at least 0.1; a lesion is found by one candidate at most. A lesion
that no candidate finds stays in the table with confidence 0, so that it can never be found by lowering a threshold.
Letters: K candidates, L lesions, M rows of the table, N cases, B bootstrap draws of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medssl_cli.metrics.binary import RankCurve

MIN_IOU = 0.1
FP_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives a case at which the sensitivity is told."""

_MATCH = (
    "candidates and lesions are regions connected at faces, edges or corners; a candidate finds a lesion from an "
    "intersection over union of {min_iou:g} on, each lesion by one candidate and each candidate for one lesion, chosen "
    "so that most lesions are found and then the overlap is largest; further candidates on a found lesion are neither "
    "right nor wrong (PI-CAI)"
)
DEFINITIONS = {
    "average_precision": "area under the lesion-level precision-recall curve of all cases' candidates together, as sum "
    "of precision times step of recall; lesions never found count in the recall (PI-CAI)",
    "auroc": "area under the case-level ROC curve: a case is positive if its reference holds a lesion, its score is "
    "its highest candidate confidence, 0 without a candidate",
    "ranking_score": "mean of auroc and average_precision (PI-CAI)",
    "sensitivity": "share of lesions found by any candidate, whatever its confidence",
    "precision": "share of right ones among the candidates that count, whatever their confidence",
    "false_positives_per_case": "candidates that find no lesion, whatever their confidence, for each case, also of the "
    "cases without a lesion",
    **{
        f"sensitivity_at_{rate:g}_fp": f"largest share of lesions found at any confidence threshold with at most "
        f"{rate:g} false positives a case (FROC, without interpolation)"
        for rate in FP_RATES
    },
}
_CELLS = 2_000_000  # draws x candidates in memory at a time


def match_definition(min_iou: float = MIN_IOU) -> str:
    """The rule of the match, in words."""
    return _MATCH.format(min_iou=min_iou)


class Candidates(NamedTuple):
    """Connected regions of a map.

    Args:
        regions: Number of the region of each voxel, 1 to K; 0 outside, int32.
        confidences_K: Highest value of each region.
        voxels_K: Size of each region.
    """

    regions: np.ndarray
    confidences_K: np.ndarray
    voxels_K: np.ndarray


class CaseLesions(NamedTuple):
    """What became of the lesions and candidates of one case.

    Args:
        is_lesion_M: True for a lesion, found or not; False for a false positive.
        confidence_M: Of the candidate; 0 for a lesion that was not found.
        overlap_M: Intersection over union of a found lesion and its candidate; 0 otherwise.
        score: Of the case: the highest confidence of all candidates.
        n_unjudged: Candidates on a lesion that another candidate has found.
    """

    is_lesion_M: np.ndarray
    confidence_M: np.ndarray
    overlap_M: np.ndarray
    score: float
    n_unjudged: int

    @property
    def n_lesions(self) -> int:
        """Lesions of the reference."""
        return int(self.is_lesion_M.sum())

    @property
    def n_found(self) -> int:
        """Lesions that a candidate found."""
        return int((self.is_lesion_M & (self.confidence_M > 0)).sum())

    @property
    def n_false(self) -> int:
        """Candidates that found no lesion."""
        return int((~self.is_lesion_M).sum())


def lesion_candidates(probability: np.ndarray, threshold: float = 0.0, *, min_voxels: int = 1) -> Candidates:
    """Connected regions of the voxels that are above 0 and at least ``threshold``.

    Args:
        probability: (Z, Y, X) or (Y, X), or a mask: then every confidence is 1. In space regions hang together at
            faces, edges and corners (26 neighbours), in a plane at edges and corners of pixels (8).
        threshold: 0 for a detection map, which is 0 outside of its candidates.
        min_voxels: Smaller regions are no candidates.

    Raises:
        ValueError: Values that are negative or not finite.

    One pass over the voxels, whatever the number of regions.
    """
    from scipy.ndimage import label

    values = np.asarray(probability)
    if values.size and not (float(values.min()) >= 0 and math.isfinite(float(values.max()))):
        raise ValueError("confidences are finite and not negative")
    present = (values > 0) & (values >= threshold)
    regions, n = label(present, structure=np.ones((3,) * values.ndim), output=np.int32)
    numbers = regions[present] - 1
    voxels = np.bincount(numbers, minlength=n)
    confidences = np.zeros(n)
    np.maximum.at(confidences, numbers, values[present].astype(np.float64))
    kept = voxels >= min_voxels
    if not kept.all():
        renumbered = np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)]).astype(np.int32)
        regions = renumbered[regions]
    return Candidates(regions, confidences[kept], voxels[kept])


def match(candidates: Candidates, reference: np.ndarray, *, min_iou: float = MIN_IOU) -> CaseLesions:
    """Judge the candidates of one case.

    Args:
        candidates: Of the prediction.
        reference: Mask of the lesions on the same grid.
        min_iou: Least intersection over union of a candidate and the lesion that it finds, above 0.

    Raises:
        ValueError: The grids differ.

    Source: Saha et al. 2024 (PI-CAI); the assignment is that of Kuhn 1955.
    """
    reference = np.asarray(reference, dtype=bool)
    if candidates.regions.shape != reference.shape:
        raise ValueError(f"candidates {candidates.regions.shape} and reference {reference.shape} differ in shape")
    iou_LK = _overlaps(candidates, lesion_candidates(reference))
    enough_LK = iou_LK >= min_iou
    lesions, found_by = _assigned(iou_LK, enough_LK)
    false_K: np.ndarray = np.logical_not(enough_LK.any(axis=0))
    n_missed = len(iou_LK) - len(lesions)
    confidence = [candidates.confidences_K[found_by], np.zeros(n_missed), candidates.confidences_K[false_K]]
    n_false = int(false_K.sum())
    return CaseLesions(
        np.repeat([True, False], [len(iou_LK), n_false]),
        np.concatenate(confidence),
        np.concatenate([iou_LK[lesions, found_by], np.zeros(n_missed + n_false)]),
        float(candidates.confidences_K.max(initial=0.0)),
        len(false_K) - n_false - len(found_by),
    )


def _overlaps(candidates: Candidates, lesions: Candidates) -> np.ndarray:
    """Intersection over union of each lesion and candidate, (L, K), from one pass over the shared voxels."""
    n_lesions, n_candidates = len(lesions.voxels_K), len(candidates.voxels_K)
    both = (lesions.regions > 0) & (candidates.regions > 0)
    pairs = (lesions.regions[both].astype(np.int64) - 1) * n_candidates + candidates.regions[both] - 1
    shared_LK = np.bincount(pairs, minlength=n_lesions * n_candidates).reshape(n_lesions, n_candidates)
    return np.asarray(shared_LK / np.maximum(lesions.voxels_K[:, None] + candidates.voxels_K - shared_LK, 1))


def _assigned(iou_LK: np.ndarray, enough_LK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lesions, their candidates): as many as there can be, then of the largest overlap."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = np.flatnonzero(enough_LK.any(1)), np.flatnonzero(enough_LK.any(0))
    # one more pair outweighs any gain of overlap among the others, which are at most min(L, K) times 1
    weight = np.where(enough_LK, iou_LK + min(len(rows), len(columns)) + 1, 0.0)[np.ix_(rows, columns)]
    chosen, by = linear_sum_assignment(weight, maximize=True)
    kept = weight[chosen, by] > 0
    return rows[chosen[kept]], columns[by[kept]]


class LesionScores:
    """Every lesion metric of a set of cases, for any weights.

    Args:
        cases: Judged candidates of each case.
    """

    def __init__(self, cases: Sequence[CaseLesions]) -> None:
        self.n_lesions_N = np.array([case.n_lesions for case in cases], dtype=np.float64)
        self.curve = RankCurve(np.array([case.score for case in cases]), self.n_lesions_N > 0)
        confidence = np.concatenate([np.zeros(0), *(case.confidence_M for case in cases)])
        case_of = np.repeat(np.arange(len(cases)), [len(case.confidence_M) for case in cases])
        is_lesion = np.concatenate([np.zeros(0, bool), *(case.is_lesion_M for case in cases)])
        order = np.argsort(-confidence, kind="stable")
        order = order[confidence[order] > 0]  # a lesion that was not found is none at any threshold
        ranked = confidence[order]
        self.case_of_M, self.is_lesion_M = case_of[order], is_lesion[order]
        self.ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)])
        self.thresholds = ranked[self.ends]
        """Confidences from the highest on; equal ones are one step of the curves."""

    def values(self, weights_BN: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric of ``DEFINITIONS``, (B,); NaN where it is not defined."""
        rows = max(1, _CELLS // max(1, len(self.case_of_M)))
        blocks = [self._block(weights_BN[start : start + rows]) for start in range(0, len(weights_BN), rows)]
        return {name: np.concatenate([block[name] for block in blocks]) for name in DEFINITIONS}

    def froc(self) -> list[tuple[float, float, float]]:
        """(confidence threshold, false positives a case, sensitivity) from the highest threshold on."""
        found, false, n_lesions, n_cases = self._curves(np.ones((1, len(self.n_lesions_N))))
        if not n_lesions[0]:
            return []
        points = zip(self.thresholds, false[0] / n_cases[0], found[0] / n_lesions[0], strict=True)
        return [(float(t), float(rate), float(share)) for t, rate, share in points]

    def _curves(self, weights_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Lesions found and false positives from each threshold on (B, T), lesions and cases (B,), all weighted."""
        weights = weights_BN[:, self.case_of_M]
        found = np.cumsum(weights * self.is_lesion_M, axis=1)[:, self.ends]
        false = np.cumsum(weights * ~self.is_lesion_M, axis=1)[:, self.ends]
        return found, false, weights_BN @ self.n_lesions_N, weights_BN.sum(1)

    def _block(self, weights_BN: np.ndarray) -> dict[str, np.ndarray]:
        found, false, n_lesions, n_cases = self._curves(weights_BN)
        nothing = np.zeros((len(weights_BN), 1))
        found, false = np.hstack([nothing, found]), np.hstack([nothing, false])
        precision = np.divide(found, found + false, out=np.zeros_like(found), where=found + false > 0)
        average_precision = _ratio((np.diff(found, axis=1) * precision[:, 1:]).sum(1), n_lesions)
        auroc, _ = self.curve.areas(weights_BN)
        return {
            "average_precision": average_precision,
            "auroc": auroc,
            "ranking_score": (auroc + average_precision) / 2,
            "sensitivity": _ratio(found[:, -1], n_lesions),
            "precision": _ratio(found[:, -1], found[:, -1] + false[:, -1]),
            "false_positives_per_case": _ratio(false[:, -1], n_cases),
            **{f"sensitivity_at_{rate:g}_fp": _at_rate(found, false, n_lesions, n_cases, rate) for rate in FP_RATES},
        }


def _at_rate(
    found: np.ndarray, false: np.ndarray, n_lesions: np.ndarray, n_cases: np.ndarray, rate: float
) -> np.ndarray:
    allowed = false <= rate * n_cases[:, None] * (1 + 1e-12)
    return _ratio(np.where(allowed, found, 0.0).max(1), n_lesions)


def _ratio(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return np.divide(upper, lower, out=np.full(np.shape(lower), np.nan), where=lower > 0)
