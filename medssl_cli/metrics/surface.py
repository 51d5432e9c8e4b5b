"""Distances between the boundaries of two regions, in the unit of the spacing: mm as a rule.

A boundary is the set of mask voxels that have a background voxel, or the outside of the image, at one of their faces.
Distances go from the centre of each boundary voxel of one mask to the nearest boundary voxel centre of the other, never
to its inside: a hole counts. Both directions are put together before a percentile or mean is taken. Programs that
weight by surface area, or take the larger of two percentiles, give other numbers under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

HdEmpty = Literal["nan", "diagonal"]

BOUNDARY = (
    "boundary = mask voxels with a background voxel or the image's outside at a face; an axis of one voxel is no "
    "dimension; distances between voxel centres from each boundary voxel to the nearest one of the other boundary, "
    "both directions pooled, every boundary voxel with weight 1"
)
DEFINITIONS = {
    "hd95": f"95th percentile (linear interpolation) of the boundary distances; {BOUNDARY}",
    "assd": f"mean of the boundary distances; {BOUNDARY}",
    "nsd": "share of the boundary voxels of both masks whose boundary distance is at most the tolerance; 0 if one "
    f"mask is empty, undefined if both are; {BOUNDARY}",
}
EMPTY_RULES = {
    "nan": "HD95 and ASSD are undefined if prediction or reference is empty; such cases are counted in n_missed "
    "(prediction empty) and n_empty_truth, and stand in no mean",
    "diagonal": "HD95 and ASSD are the diagonal of the image if one mask is empty, 0 if both are",
}


class SurfaceDistances(NamedTuple):
    """Distance of each boundary voxel of one mask to the boundary of the other; empty if either mask is."""

    from_prediction: np.ndarray
    """One value for each boundary voxel of the prediction, float64."""
    from_reference: np.ndarray
    """One value for each boundary voxel of the reference, float64."""
    n_prediction: int
    """Boundary voxels of the prediction, also where there is nothing to measure to."""
    n_reference: int

    @property
    def pooled(self) -> np.ndarray:
        """Both directions together."""
        return np.concatenate([self.from_prediction, self.from_reference])

    def percentile(self, percent: float) -> float:
        """Percentile of the pooled distances; NaN if either mask is empty."""
        pooled = self.pooled
        return float(np.percentile(pooled, percent)) if len(pooled) else math.nan

    def mean(self) -> float:
        """Mean of the pooled distances; NaN if either mask is empty."""
        pooled = self.pooled
        return float(pooled.mean()) if len(pooled) else math.nan

    def share_within(self, tolerance: float) -> float:
        """Share of the boundary voxels of both at most ``tolerance`` away; 0 if one mask is empty, NaN if both.

        Source: Nikolov et al. 2018, with voxels of the boundary in place of surface elements.
        """
        total = self.n_prediction + self.n_reference
        if not total:
            return math.nan
        # distances are square roots of sums: 2 mm may come out as 2.0000000000000004
        return int(np.count_nonzero(self.pooled <= tolerance * (1 + 1e-12))) / total


def surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
    """Distances between two boundaries, both ways.

    Args:
        prediction: Boolean mask, (Z, Y, X) or (Y, X).
        reference: Boolean mask on the same grid.
        spacing: Voxel size in the order of the axes.

    Raises:
        ValueError: The grids differ, or the spacing does not fit them.

    The work is done inside the bounding box of each mask: what lies outside of it is background, as beyond an image's
    border, so the result is the same to the last bit.
    """
    prediction, reference, sizes = _dimensions(prediction, reference, spacing)
    from_prediction, from_reference = _boundary_mm(prediction, sizes), _boundary_mm(reference, sizes)
    n_prediction, n_reference = len(from_prediction), len(from_reference)
    if not n_prediction or not n_reference:
        return SurfaceDistances(np.empty(0), np.empty(0), n_prediction, n_reference)
    forward, backward = _nearest(from_prediction, from_reference), _nearest(from_reference, from_prediction)
    return SurfaceDistances(forward, backward, n_prediction, n_reference)


def hausdorff_95(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], *, percentile: float = 95
) -> float:
    """95th percentile of the distances between two boundaries, both ways pooled.

    Args:
        prediction: Boolean mask, (Z, Y, X) or (Y, X).
        reference: Boolean mask on the same grid.
        spacing: Voxel size in the order of the axes, in mm.
        percentile: 100 for the Hausdorff distance itself.

    Returns:
        Distance in mm; NaN if either mask is empty: the caller decides what a miss costs.

    Raises:
        ValueError: The two grids differ.

    Source: Huttenlocher et al. 1993; the percentile as in Metrics Reloaded (Maier-Hein et al. 2024), of the pooled
    distances.
    """
    return surface_distances(prediction, reference, spacing).percentile(percentile)


def boundary(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask with background, or the outside of the array, at one of their faces; boolean, same shape."""
    mask = np.asarray(mask, dtype=bool)
    inner = mask.copy()
    for axis in range(mask.ndim):
        ahead, behind = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        ahead[1:] &= behind[:-1]
        ahead[:-1] &= behind[1:]
        ahead[0] = False
        ahead[-1] = False
    return mask & ~inner


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length of the diagonal of a grid, in the unit of the spacing; axes of one voxel are no dimension."""
    return math.hypot(*(n * size for n, size in zip(shape, spacing, strict=True) if n > 1))


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box that holds a mask; None of an empty one."""
    box = []
    for axis in range(mask.ndim):
        hit = mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis))
        places = np.flatnonzero(hit)
        if not len(places):
            return None
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(box)


def _dimensions(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The masks and spacing without axes of one voxel: of a single plane every voxel would lie at the outside."""
    prediction, reference = np.asarray(prediction, dtype=bool), np.asarray(reference, dtype=bool)
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")
    sizes = np.asarray(spacing, dtype=np.float64)
    if sizes.shape != (prediction.ndim,) or not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError(f"spacing {tuple(spacing)} does not fit a grid of {prediction.ndim} axes")
    single = tuple(axis for axis, n in enumerate(prediction.shape) if n == 1)
    if len(single) == prediction.ndim:
        single = single[1:]
    kept = [axis for axis in range(prediction.ndim) if axis not in single]
    return prediction.squeeze(single), reference.squeeze(single), sizes[kept]


def _boundary_mm(mask: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Centres of the boundary voxels, (n, axes), in the unit of the spacing."""
    box = bounding_box(mask)
    if box is None:
        return np.empty((0, mask.ndim))
    places = np.argwhere(boundary(mask[box])) + [side.start for side in box]
    return np.asarray(places * sizes)


def _nearest(from_points: np.ndarray, to_points: np.ndarray) -> np.ndarray:
    """Distance of each point to the nearest of others, float64."""
    from scipy.spatial import cKDTree

    # unbalanced and not compact: built twice as fast on a grid of points, and asked as fast
    tree = cKDTree(to_points, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(from_points)[0])
