"""One grid for all sequences of a case: resampling in world coordinates, and registration when the patient moved.

Voxel indices of two sequences never mean the same place by themselves; only millimetres do. SimpleITK does the
interpolation; linear for images, nearest neighbour for label maps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import seed_for
from medssl_cli.core.volume import Volume, affine_orientation, affine_spacing, grid_difference

LABEL_TOKENS = ("roi", "mask", "seg", "label", "labels", "segmentation")
"""A stem with one of these words is a label map and keeps its values."""

REGION_TOKENS = ("lesion", "gland", "prostate", "tumor", "tumour", "pz", "tz")
"""So is a stem with the name of a region, if the file holds few whole numbers: an image may be named after it, too."""

MAX_CLASSES = 64
"""A file named after a region that holds more values than these is an image."""

MIN_WHOLE_RANGE = 100
"""Interpolated whole numbers are rounded back only if a step is at most 1 % of what they span."""

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK counts x to the left and y to the back, our affines to the right and front


@dataclass(frozen=True)
class Grid:
    """Places of voxels without their values.

    Args:
        shape: (Z, Y, X).
        affine: 4x4 float64, voxel (x, y, z, 1) -> mm, RAS+.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def reoriented(self, target: str) -> Grid:
        """The same places in another order."""
        turned = Volume(np.broadcast_to(np.uint8(0), self.shape), self.affine).reoriented(target)
        return Grid(turned.shape, turned.affine)


def is_label(stem: str) -> bool:
    """Whether a file tells where something is rather than how bright, by its name: nothing to register by."""
    return bool(_words(stem) & {*LABEL_TOKENS, *REGION_TOKENS})


def holds_classes(stem: str, array: np.ndarray) -> bool:
    """Whether values between two others mean nothing in a file, so that it is never interpolated.

    A probability map ``lesion`` and an image ``t2_prostate`` hold no classes, whatever their names say.
    """
    words = _words(stem)
    if words & set(LABEL_TOKENS) or not words & set(REGION_TOKENS):
        return bool(words & set(LABEL_TOKENS))
    return is_whole(array) and np.unique(array).size <= MAX_CLASSES


def _words(stem: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", stem.lower()))


def resample_to(
    volume: Volume,
    reference: Volume | Grid,
    *,
    nearest: bool = False,
    transform: Any = None,
    outside: float | None = None,
) -> Volume:
    """The same image on the grid of ``reference``; on one grid, in whatever order its axes lie, voxels stay untouched.

    Voxels are interpolated in the order RAS, whatever the order of the two, so that the same places give the same
    bits: an aligned file that is turned afterwards equals one that is brought straight onto the turned grid.

    Args:
        volume: (Z, Y, X) or (T, Z, Y, X), finite.
        reference: Its grid is taken, not its voxels.
        nearest: Nearest neighbour, for label maps; else linear.
        transform: SimpleITK transform from reference to volume in mm, as ``register_affine`` gives; identity if None.
        outside: Value beyond the volume. None takes 0 for ``nearest``, else the smallest value of the volume: 0 in
            nearly every MR image, -1024 in CT; it never widens the range by which slices are scaled later.

    Returns:
        A volume in the type of the input. Whole numbers are rounded where they span ``MIN_WHOLE_RANGE`` or more; else
        integers become float32 (float64 where that holds them and float32 does not).

    Raises:
        DataError: The two have no place in common.
    """
    turned = volume.reoriented(affine_orientation(reference.affine))
    if transform is None:
        if not grid_difference(turned.shape, turned.affine, reference.shape, reference.affine):
            return Volume(turned.array, reference.affine)
        _refuse_apart(volume, reference)
    if volume.array.ndim == 3:
        return _interpolated(volume, reference, nearest, transform, outside)
    parts = [_interpolated(Volume(v, volume.affine), reference, nearest, transform, outside) for v in volume.array]
    return Volume(np.stack([part.array for part in parts]), reference.affine)


def is_whole(array: np.ndarray) -> bool:
    """Whether every value is a whole number, however it is stored; looked at plane by plane, so that none is copied."""
    planes = array if array.ndim > 1 else array[None]
    return array.dtype.kind in "biu" or all(bool((plane == np.rint(plane)).all()) for plane in planes)


def coverage(volume: Volume | Grid, reference: Volume | Grid) -> float:
    """Share of the places of ``reference`` that lie inside ``volume``, from at most 64 samples along each axis."""
    there = np.linalg.inv(volume.affine) @ reference.affine  # voxel of the reference -> voxel of the volume
    counts = reference.shape[::-1]
    ticks = [np.unique(np.linspace(0, n - 1, min(n, 64)).round()) for n in counts]
    inside = np.ones([len(t) for t in ticks], dtype=bool)
    for row, size in enumerate(volume.shape[::-1]):
        x, y, z = (there[row, axis] * ticks[axis] for axis in range(3))
        place = x[:, None, None] + y[None, :, None] + z[None, None, :] + there[row, 3]
        inside &= (place >= -0.5) & (place <= size - 0.5)
    return float(inside.mean())


def register_affine(moving: Volume, fixed: Volume, *, seed: int = 0) -> tuple[Any, float]:
    """Affine transform that brings ``moving`` onto ``fixed``, by mutual information.

    Mattes mutual information of 50 bins on 10 % of the voxels, drawn once with a fixed seed; 200 steps of gradient
    descent on each of three levels, shrunk by 4, 2, 1 and smoothed by 2, 1, 0 mm. It starts from the scanner's
    own coordinates, in which the sequences of one visit nearly agree, and a search that ends no better than it began
    is dropped. One thread, so that sums have one order.

    Returns:
        SimpleITK transform from fixed to moving space in mm, and the final metric (more negative is better).

    Raises:
        DataError: The images do not overlap, or the search failed.

    Source: Mattes et al. 2003; settings of the system's specification, P41.
    """
    import SimpleITK as sitk

    _refuse_apart(moving, fixed)
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        return _search(moving, fixed, seed)
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def transform_matrix(transform: Any) -> np.ndarray:
    """4x4 matrix of an affine SimpleITK transform in RAS+ millimetres, reference -> moving, for the record."""
    points = np.vstack([np.zeros(3), np.eye(3)]) * 100.0
    moved = np.array([transform.TransformPoint(tuple(float(v) for v in p)) for p in points])
    matrix = np.eye(4)
    matrix[:3, :3] = ((moved[1:] - moved[0]) / 100.0).T
    matrix[:3, 3] = moved[0]
    return _LPS @ matrix @ _LPS


def _search(moving: Volume, fixed: Volume, seed: int) -> tuple[Any, float]:
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(50)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(0.1, seed_for(seed, "register") % (2**31 - 1) + 1)
    method.SetInterpolator(sitk.sitkLinear)
    # a rate of 1 mm kept as it is: rescaled by the first gradient, ADC maps of patients who lay still moved by 8 mm
    method.SetOptimizerAsGradientDescent(
        learningRate=1.0,
        numberOfIterations=200,
        convergenceMinimumValue=1e-6,
        convergenceWindowSize=10,
        estimateLearningRate=method.Never,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1, 0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    start = sitk.AffineTransform(3)
    centre = fixed.affine @ np.array([*(np.array(fixed.shape[::-1]) - 1) / 2, 1.0])
    start.SetCenter([float(v) for v in (_LPS @ centre)[:3]])
    method.SetInitialTransform(start, inPlace=False)
    images = tuple(_to_itk(v.array.astype(np.float32), v.affine) for v in (fixed, moving))
    try:
        transform = method.Execute(*images)
        found = float(method.GetMetricValue())
        method.SetInitialTransform(start, inPlace=False)
        unmoved = float(method.MetricEvaluate(*images))
    except RuntimeError as error:
        raise DataError(
            "The registration failed.",
            where=str(error).splitlines()[-1].strip()[:300],
            fix="leave --register out for this case, or check that both images show the same region",
            code="registration_failed",
        ) from error
    return (transform, found) if found < unmoved else (start, unmoved)


def _interpolated(
    volume: Volume, reference: Volume | Grid, nearest: bool, transform: Any, outside: float | None
) -> Volume:
    """One 3-D volume on another grid."""
    import SimpleITK as sitk

    grid = Grid(reference.shape, reference.affine).reoriented("RAS")
    source = volume.reoriented("RAS")
    array = _computable(source.array, nearest)
    if outside is None:
        outside = 0.0 if nearest else float(array.min())
    spacing, direction, origin = _itk_geometry(grid.affine)
    moved = sitk.Resample(
        _to_itk(array, source.affine),
        [int(n) for n in grid.shape[::-1]],
        sitk.Transform() if transform is None else transform,
        sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear,
        origin,
        spacing,
        direction,
        outside,
    )
    values = _in_type_of(sitk.GetArrayFromImage(moved), source.array, nearest)
    back = Volume(values, grid.affine).reoriented(affine_orientation(reference.affine))
    return Volume(back.array, reference.affine)


def _computable(array: np.ndarray, nearest: bool) -> np.ndarray:
    """In a type that ITK knows; for linear interpolation a float that holds the values."""
    if nearest:
        return array.astype({"?": np.uint8, "e": np.float32}.get(array.dtype.char, array.dtype), copy=False)
    return array.astype(np.float32 if np.can_cast(array.dtype, np.float32) else np.float64, copy=False)


def _in_type_of(moved: np.ndarray, before: np.ndarray, nearest: bool) -> np.ndarray:
    """Interpolated values as ``resample_to`` returns them."""
    if nearest or before.dtype.kind == "f":
        rounds = not nearest and _spans_whole(before)
        return (np.rint(moved) if rounds else moved).astype(before.dtype, copy=False)
    return np.rint(moved).astype(before.dtype) if _spans_whole(before) else moved


def _spans_whole(array: np.ndarray) -> bool:
    return float(array.max()) - float(array.min()) >= MIN_WHOLE_RANGE and is_whole(array)


def _refuse_apart(volume: Volume | Grid, reference: Volume | Grid) -> None:
    # both ways: samples of a fine grid may all miss a thin volume, which then has its own inside the grid
    if coverage(volume, reference) == 0 and coverage(reference, volume) == 0:
        raise DataError(
            "The image does not overlap with the grid it is to be brought to.",
            where=f"it lies at {_box(volume)} mm, the grid at {_box(reference)} mm",
            fix="check that the files belong to one patient and visit, and convert them again; "
            "`medssl convert dicom --no-align` keeps every sequence on its own grid",
            code="grids_apart",
        )


def _box(grid: Volume | Grid) -> str:
    ends = np.array([[0, 0, 0, 1], [*(n - 1 for n in grid.shape[::-1]), 1]]).T
    corners = (grid.affine @ ends)[:3]
    return ", ".join(f"{c} {a:.0f}..{b:.0f}" for c, a, b in zip("xyz", corners.min(1), corners.max(1), strict=True))


def _itk_geometry(affine: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """(spacing, direction, origin) in ITK's convention, x first, L P S."""
    lps = _LPS @ affine
    spacing = np.array(affine_spacing(affine)[::-1])
    return spacing.tolist(), (lps[:3, :3] / spacing).ravel().tolist(), lps[:3, 3].tolist()


def _to_itk(array_ZYX: np.ndarray, affine: np.ndarray) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array_ZYX)
    spacing, direction, origin = _itk_geometry(affine)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    image.SetOrigin(origin)
    return image
