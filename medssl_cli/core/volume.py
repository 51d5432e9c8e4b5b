"""A 3-D image with its place in the patient, and one plane of it.

Arrays are (Z, Y, X): the last axis is the file's first voxel axis, as numpy users expect of a NIfTI read slice by
slice. The affine keeps NIfTI's own convention: voxel (x, y, z, 1) -> millimetres in RAS+ space. Orientation is changed
here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from medssl_cli.core.errors import DataError

_AXIS_CODES = (("L", "R"), ("P", "A"), ("I", "S"))

AXIAL, CORONAL, SAGITTAL = 0, 1, 2
"""Array axis that is cut through in a volume of orientation RAS: Z, Y, X."""

GRID_TOLERANCE_MM = 0.1
"""Grids whose corners lie no farther apart are one: headers keep float32, pixels are rarely below 0.3 mm."""

AXIS_NAMES = {AXIAL: "axial", CORONAL: "coronal", SAGITTAL: "sagittal"}


class Spacing(NamedTuple):
    """Voxel size in mm, in array order."""

    z: float
    y: float
    x: float


@dataclass(frozen=True)
class Volume:
    """Voxels on a grid in the patient.

    Args:
        array: (Z, Y, X), or (T, Z, Y, X) for a 4-D file, in the data type of the file after its slope and intercept.
        affine: 4x4 float64, voxel (x, y, z, 1) -> mm, RAS+.
    """

    array: np.ndarray
    affine: np.ndarray

    def __post_init__(self) -> None:
        if self.array.ndim not in (3, 4):
            raise ValueError(f"a volume has 3 or 4 axes, got shape {self.array.shape}")
        if self.affine.shape != (4, 4):
            raise ValueError(f"an affine is 4x4, got {self.affine.shape}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        z, y, x = self.array.shape[-3:]
        return z, y, x

    @cached_property
    def spacing(self) -> Spacing:
        """Voxel size (z, y, x) in mm."""
        return affine_spacing(self.affine)

    @cached_property
    def orientation(self) -> str:
        """Where the voxel axes x, y, z point to, nearest to e.g. ``RAS``."""
        return affine_orientation(self.affine)

    def reoriented(self, target: str = "RAS") -> Volume:
        """The same voxels with axes permuted and flipped to ``target``; no interpolation.

        Example: ``volume.reoriented("RAS").reoriented(volume.orientation)`` is the volume itself.
        """
        source = self.orientation
        if source == target:
            return self
        axis_of = [_world_axis(code) for code in source]
        order = [axis_of.index(_world_axis(code)) for code in target]  # target axis i comes from source axis order[i]
        flip = [source[order[i]] != target[i] for i in range(3)]
        nx, ny, nz = self.shape[::-1]
        sizes = (nx, ny, nz)
        transform = np.zeros((4, 4))
        transform[3, 3] = 1.0
        for i, j in enumerate(order):
            transform[j, i] = -1.0 if flip[i] else 1.0
            if flip[i]:
                transform[j, 3] = sizes[j] - 1
        xyz = np.moveaxis(self.array, (-1, -2, -3), (-3, -2, -1))  # (..., X, Y, Z)
        lead = xyz.ndim - 3
        xyz = np.transpose(xyz, (*range(lead), *(lead + j for j in order)))
        xyz = np.flip(xyz, axis=tuple(lead + i for i in range(3) if flip[i]))
        array = np.moveaxis(xyz, (-1, -2, -3), (-3, -2, -1))
        return replace(self, array=np.ascontiguousarray(array), affine=self.affine @ transform)

    def grid_difference(self, other: Volume, tolerance_mm: float = GRID_TOLERANCE_MM) -> str | None:
        """What differs between two grids, in words with both values; None when they agree."""
        return grid_difference(self.shape, self.affine, other.shape, other.affine, tolerance_mm)

    def __str__(self) -> str:
        z, y, x = self.shape
        sz, sy, sx = self.spacing
        return f"{x} x {y} x {z} voxels of {sx:.3g} x {sy:.3g} x {sz:.3g} mm, {self.orientation}"


@dataclass(frozen=True)
class Slice:
    """One plane of a multi-sequence case, as stored.

    Args:
        image_SHW: (S, H, W) intensities, one plane for each sequence; zeros where a sequence is absent.
        roi_HW: Boolean mask on the same plane, or None.
        axis: Array axis that was cut (AXIAL, CORONAL, SAGITTAL).
        index: Position on that axis.
        spacing: Pixel size (y, x) in mm.
        available_S: Which sequences exist.
    """

    image_SHW: np.ndarray
    roi_HW: np.ndarray | None
    axis: int
    index: int
    spacing: tuple[float, float]
    available_S: np.ndarray


def affine_spacing(affine: np.ndarray) -> Spacing:
    """Length of the voxel edges in mm, (z, y, x)."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return Spacing(float(z), float(y), float(x))


def affine_orientation(affine: np.ndarray) -> str:
    """Nearest anatomical codes of the voxel axes x, y, z, each axis used once.

    Raises:
        DataError: The affine is singular or not finite.
    """
    columns = affine[:3, :3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(columns)) < 1e-12:
        raise DataError(
            "The affine is singular.",
            where=np.array2string(affine, precision=3),
            fix="convert the image again from its DICOM series",
            code="affine_singular",
        )
    cosines = columns / np.linalg.norm(columns, axis=0)
    codes = ["", "", ""]
    free_world, free_voxel = [0, 1, 2], [0, 1, 2]
    for _ in range(3):  # greedy: the clearest pairing first, so that oblique axes never share a code
        w, v = max(((w, v) for w in free_world for v in free_voxel), key=lambda p: abs(cosines[p[0], p[1]]))
        codes[v] = _AXIS_CODES[w][int(cosines[w, v] > 0)]
        free_world.remove(w)
        free_voxel.remove(v)
    return "".join(codes)


def grid_difference(
    shape: tuple[int, ...],
    affine: np.ndarray,
    other_shape: tuple[int, ...],
    other_affine: np.ndarray,
    tolerance_mm: float = GRID_TOLERANCE_MM,
) -> str | None:
    """What differs between two grids, in words with both values; None when no corner moves by ``tolerance_mm``."""
    if tuple(shape) != tuple(other_shape):
        return f"shape: {_by(shape[::-1])} and {_by(other_shape[::-1])} voxels"
    here, there = affine_orientation(affine), affine_orientation(other_affine)
    if here != there:
        return f"orientation: {here} and {there}"
    a, b = affine_spacing(affine), affine_spacing(other_affine)
    if max(abs(p - q) * n for p, q, n in zip(a, b, shape, strict=True)) > tolerance_mm:
        return f"spacing: {_by(a[::-1])} and {_by(b[::-1])} mm"
    z, y, x = shape
    corners = np.array([[i, j, k, 1] for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)], dtype=float).T
    shift = np.abs((affine - other_affine) @ corners)[:3].max()
    if shift > tolerance_mm:
        return f"position: corners lie up to {shift:.2f} mm apart"
    return None


def _world_axis(code: str) -> int:
    for axis, pair in enumerate(_AXIS_CODES):
        if code in pair:
            return axis
    raise ValueError(f"orientation codes are of L R P A I S, got {code!r}")


def _by(values: tuple[float, ...]) -> str:
    return " x ".join(f"{v:.4g}" for v in values)
