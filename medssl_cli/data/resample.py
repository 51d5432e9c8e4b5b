"""One grid for all sequences of a case: resampling in world coordinates, and registration when the patient moved.

Voxel indices of two sequences never mean the same place by themselves; only millimetres do. SimpleITK does the
interpolation; linear for images, nearest neighbour for label maps.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import seed_for
from medssl_cli.core.volume import Volume, grid_difference

LABEL_TOKENS = ("roi", "mask", "seg", "label", "labels", "segmentation")
"""A stem with one of these words is a label map and keeps its values."""

SAME_GRID_MM = 0.01
"""Grids whose corners agree this far are one grid: nothing is interpolated."""

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def is_label(stem: str) -> bool:
    """Whether a file holds classes rather than intensities, told by its name."""
    return bool(set(re.split(r"[^a-z0-9]+", stem.lower())) & set(LABEL_TOKENS))


def resample_to(volume: Volume, reference: Volume, *, nearest: bool = False, transform: Any = None) -> Volume:
    """The same image on the grid of ``reference``.

    Args:
        volume: (Z, Y, X) or (T, Z, Y, X).
        reference: Its grid is taken, not its voxels.
        nearest: Nearest neighbour, for label maps; else linear.
        transform: SimpleITK transform from reference to volume in mm, as ``register_affine`` gives; identity if None.

    Returns:
        A volume in the type of the input; whole numbers are rounded. Outside the input stands 0, or its minimum
        where that is negative (air in CT).

    Raises:
        DataError: The two do not overlap at all.
    """
    if transform is None and not grid_difference(
        volume.shape, volume.affine, reference.shape, reference.affine, SAME_GRID_MM
    ):
        return Volume(volume.array, reference.affine)
    if transform is None:
        _check_overlap(volume, reference)
    if volume.array.ndim == 4:
        parts = [
            resample_to(Volume(v, volume.affine), reference, nearest=nearest, transform=transform) for v in volume.array
        ]
        return Volume(np.stack([part.array for part in parts]), reference.affine)
    import SimpleITK as sitk

    outside = min(0.0, float(volume.array.min()))
    moved = sitk.Resample(
        _to_itk(volume),
        _grid_of(reference),
        transform if transform is not None else sitk.Transform(3, sitk.sitkIdentity),
        sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear,
        outside,
        sitk.sitkFloat64
        if volume.array.dtype.itemsize > 4 or volume.array.dtype in (np.int32, np.uint32)
        else sitk.sitkFloat32,
    )
    array = sitk.GetArrayFromImage(moved)
    kind = volume.array.dtype
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        array = np.clip(np.rint(array), limits.min, limits.max)
    return Volume(array.astype(kind), reference.affine)


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

    _check_overlap(moving, fixed)
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
    images = _to_itk(fixed, np.float32), _to_itk(moving, np.float32)
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


def _check_overlap(volume: Volume, reference: Volume) -> None:
    (low, high), (other_low, other_high) = _bounds(volume), _bounds(reference)
    if np.any(low > other_high) or np.any(other_low > high):
        raise DataError(
            "A sequence and its reference lie in different places: they do not overlap.",
            where=f"sequence {_box(low, high)}; reference {_box(other_low, other_high)}",
            fix="check that both belong to one visit; --no-align keeps every sequence on its own grid",
            code="no_overlap",
        )


def _bounds(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner in mm, edges of the voxels included."""
    z, y, x = volume.shape
    corners = np.array([[i, j, k, 1.0] for i in (-0.5, x - 0.5) for j in (-0.5, y - 0.5) for k in (-0.5, z - 0.5)])
    world = corners @ volume.affine.T
    return world[:, :3].min(axis=0), world[:, :3].max(axis=0)


def _box(low: np.ndarray, high: np.ndarray) -> str:
    return " x ".join(f"[{a:.0f}, {b:.0f}]" for a, b in zip(low, high, strict=True)) + " mm"


def _to_itk(volume: Volume, kind: type | None = None) -> Any:
    import SimpleITK as sitk

    array = volume.array
    if array.dtype == np.bool_ or array.dtype == np.float16:
        array = array.astype(np.float32)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array if kind is None else array.astype(kind)))
    return _place(image, volume)


def _grid_of(volume: Volume) -> Any:
    import SimpleITK as sitk

    z, y, x = volume.shape
    return _place(sitk.Image(x, y, z, sitk.sitkUInt8), volume)


def _place(image: Any, volume: Volume) -> Any:
    affine = _LPS @ volume.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing([float(s) for s in spacing])
    image.SetDirection([float(d) for d in (affine[:3, :3] / spacing).ravel()])
    image.SetOrigin([float(o) for o in affine[:3, 3]])
    return image
