"""Deterministic and invertible: orientation, one grid for all sequences, intensity limits. Travels with the checkpoint.

A sequence that already lies on the grid of the reference keeps its voxels untouched; any other is interpolated once,
in world coordinates, straight onto the final grid. Intensities are never changed here: what is stored are the limits
between which a slice is later scaled to [0, 1], so that one preparation serves every scaling.

Letters: S sequences, Z Y X voxels (array order), N slices along one axis, C H W channels and pixels of a picture.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import PositiveInt, field_validator

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.config import Config
from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import Volume, affine_orientation, affine_spacing, grid_difference
from medssl_cli.data.images import check_finite, read_image, read_volume, refuse_absent_volume
from medssl_cli.data.label_maps import label_4d, whole_values
from medssl_cli.data.resample import Grid, coverage, is_whole, resample_to

log = logging.getLogger(__name__)

_LOW_COVERAGE = 0.5


class PreprocessConfig(Config):
    """From files to one grid and to intensity limits; the same at training and at inference."""

    orientation: Literal["RAS", "LAS", "RPS", "LPS", "RAI", "LAI", "RPI", "LPI"] = "RAS"
    """Where the voxel axes x, y, z point to. Axial, coronal and sagittal keep their array axes in all of these."""
    reference: str | None = None
    """Sequence whose grid all others are brought to; the first of the list that a case has, if not given or absent."""
    percentiles: tuple[float, float] = (1.0, 99.0)
    """Lower and upper percentile of a slice that become 0 and 1."""
    adc_scale: Literal["percentile", "fixed"] = "percentile"
    """Scaling of sequences with `adc` in their name: by slice, or by `adc_range`, which keeps the units comparable."""
    adc_range: tuple[float, float] = (0.0, 3000.0)
    """Values that become 0 and 1 with `adc_scale: fixed`, in the units of the files (10⁻⁶ mm²/s)."""
    window_hu: tuple[float, float] | None = None
    """CT: the values in HU that become 0 and 1 in every slice, e.g. [-1000, 1000], instead of percentiles. What lies
    outside is clipped, among it air and padding of -1024, -2000 or -3024."""
    window_sequences: tuple[str, ...] | None = None
    """Sequences that `window_hu` counts for; all of them when not given."""
    resample_mm: tuple[float, float, float] | None = None
    """Voxel size (z, y, x) in mm of the prepared grid; None keeps that of the reference. Needed for random axes when
    the slices are thick."""
    picture_side: PositiveInt | None = 512
    """Photographs whose shorter side is longer than this are reduced to it. 512 keeps every pixel that a 224 px crop
    of 32 % or a 98 px crop of 5 % of the area needs; None keeps the originals."""

    @field_validator("percentiles")
    @classmethod
    def _percentiles_ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 100:
            raise ValueError("two rising percentiles between 0 and 100 are needed")
        return value

    @field_validator("adc_range", "window_hu")
    @classmethod
    def _range_ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("the lower end must be below the upper end")
        return value

    @field_validator("resample_mm")
    @classmethod
    def _spacing_sensible(cls, value: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        if value is not None and not all(0.05 <= mm <= 50 for mm in value):
            raise ValueError("voxel sizes lie between 0.05 and 50 mm")
        return value


@dataclass(frozen=True)
class Restore:
    """The way back from the prepared grid to that of the file it came from."""

    source: Grid
    prepared: Grid

    def restore(self, map_ZYX: np.ndarray, *, nearest: bool | None = None) -> Volume:
        """(Z, Y, X) on the prepared grid -> Volume with the shape and affine of the reference file, exactly.

        Args:
            map_ZYX: Label map, mask or heat map.
            nearest: Interpolation where the grid was resampled; None takes nearest for integers and masks, linear
                for floats. Without resampling nothing is interpolated. Outside the prepared grid the map is 0.
        """
        if map_ZYX.shape != self.prepared.shape:
            raise ValueError(f"the map is {map_ZYX.shape}, the prepared grid {self.prepared.shape}")
        nearest = map_ZYX.dtype.kind in "biu" if nearest is None else nearest
        volume = Volume(map_ZYX, self.prepared.affine)
        volume = resample_to(volume, self.source, nearest=nearest, outside=0.0)
        return Volume(volume.array.astype(map_ZYX.dtype, copy=False), self.source.affine)


@dataclass(frozen=True)
class Prepared:
    """All sequences of one case on one grid.

    Args:
        case_id: Whose.
        images_SZYX: uint8, int16, uint16, int32 or float32; all zeros where a sequence is absent.
        affine: 4x4 float64 of the prepared grid.
        roi_ZYX: Boolean mask, or uint8 label map where its values were asked for; None when the case has none.
        available_S: Which sequences exist.
        resampled_S: Which sequences were interpolated.
        restore: The way back.
    """

    case_id: str
    images_SZYX: np.ndarray
    affine: np.ndarray
    roi_ZYX: np.ndarray | None
    available_S: np.ndarray
    resampled_S: np.ndarray
    restore: Restore


@dataclass(frozen=True)
class Picture:
    """One photograph as it is stored.

    Args:
        image_CHW: uint8, uint16 or float32, C 1 or 3.
        low, high: Values that become 0 and 1: the range of the type for 8 bits, else percentiles of the whole picture
            with all its channels together, so that colours keep their ratio.
    """

    image_CHW: np.ndarray
    low: float
    high: float


def prepare_case(
    case: Case, sequences: tuple[str, ...], config: PreprocessConfig, *, roi_values: bool = False
) -> Prepared:
    """Read the sequences of a case and bring them, and the region of interest, onto one grid.

    Args:
        case: Files of one patient.
        sequences: Names in channel order; those that the case lacks become zeros and are marked.
        config: How.
        roi_values: The region of interest is a label map, which the case must have and whose values are kept.

    Raises:
        DataError: With case and path: no sequence at all, unreadable, 4-D, flat, constant or non-finite voxels, or
            grids that do not overlap; no label map, or one of other values than whole numbers from 0 to 255.
    """
    with naming_case(case):
        present = [name for name in sequences if name in case.sequences]
        if not present:
            raise DataError(
                "A case has none of the sequences asked for.",
                where=f"asked for {', '.join(sequences)}; there are: {', '.join(case.sequences) or 'none'}",
                fix="check data.mri_sequences and the file names, or leave the case out",
                code="sequences_missing",
            )
        if roi_values and case.roi is None:
            raise DataError(
                "A case has no label map.",
                fix="add its label map, or leave the case out",
                code="label_missing",
            )
        reference = config.reference if config.reference in present else present[0]
        volumes = _read_sequences([case.sequences[name] for name in present])
        source = Grid(volumes[reference].shape, volumes[reference].affine)
        grid = prepared_grid(source, config)
        # each volume is let go of when it is moved: one of 512 x 512 x 300 voxels takes 150 MB or more
        moved = {name: _onto(volumes.pop(name), grid, str(case.sequences[name].path)) for name in present}
        resampled = {name: interpolated for name, (_, interpolated) in moved.items()}
        images = _stack([moved.pop(name)[0] if name in moved else None for name in sequences], grid.shape)
        return Prepared(
            case_id=case.case_id,
            images_SZYX=images,
            affine=grid.affine,
            roi_ZYX=None if case.roi is None else (_read_labels if roi_values else _read_roi)(case.roi, grid),
            available_S=np.array([name in resampled for name in sequences]),
            resampled_S=np.array([resampled.get(name, False) for name in sequences]),
            restore=Restore(source, grid),
        )


def prepare_picture(case: Case, config: PreprocessConfig) -> Picture:
    """Read the one photograph of an image case.

    Pictures of 8 bits are later scaled by 255; those of 16 bits or floats by the percentiles of the whole picture,
    because their used range is not told by the type.

    Raises:
        DataError: With case and path: missing, damaged, constant or non-finite.
    """
    with naming_case(case):
        if not case.sequences:
            raise DataError("An image case has no picture.", fix="check the image tree", code="sequences_missing")
        path = next(iter(case.sequences.values())).path
        image = read_image(path)
        check_finite(path, image)
        _refuse_constant(path, image)
        return to_picture(image, config)


def to_picture(image_CHW: np.ndarray, config: PreprocessConfig) -> Picture:
    """The picture as it is stored, with its limits; see ``prepare_picture``."""
    image = _reduced(image_CHW, config.picture_side)
    if image.dtype == np.uint8:
        return Picture(image, 0.0, 255.0)
    low, high = slice_limits(image.reshape(1, 1, -1), 0, config.percentiles)
    return Picture(image, float(low[0]), float(high[0]))


def prepared_grid(source: Grid, config: PreprocessConfig) -> Grid:
    """The grid of the reference file, turned to the wanted orientation and voxel size, about the same centre."""
    grid = source.reoriented(config.orientation)
    spacing = affine_spacing(grid.affine)
    if config.resample_mm is None or np.allclose(spacing, config.resample_mm, rtol=1e-3):
        return grid
    ratio = np.array(spacing) / config.resample_mm  # (z, y, x)
    shape = tuple(max(1, round(float(n * r))) for n, r in zip(grid.shape, ratio, strict=True))
    affine = grid.affine.copy()
    affine[:3, :3] /= ratio[::-1]
    old_centre = grid.affine @ [*((np.array(grid.shape[::-1]) - 1) / 2), 1]
    new_centre = affine @ [*((np.array(shape[::-1]) - 1) / 2), 1]
    affine[:3, 3] += old_centre[:3] - new_centre[:3]
    return Grid((shape[0], shape[1], shape[2]), affine)


def sequence_limits(
    name: str, volume_ZYX: np.ndarray, axis: int, config: PreprocessConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(low_N, high_N): the values of every slice along ``axis`` that become 0 and 1, for the sequence ``name``.

    With ``window_hu`` a slice without content, one value only or nothing above the window, has low = high.
    """
    count = volume_ZYX.shape[axis]
    if _is_windowed(name, config) and config.window_hu is not None:
        low, high = config.window_hu
        smallest, largest = (reduce(volume_ZYX, _others(axis)) for reduce in (np.min, np.max))
        empty = (smallest == largest) | (largest <= low)
        return np.full(count, low), np.where(empty, low, high)
    if config.adc_scale == "fixed" and "adc" in name.lower():
        return np.full(count, config.adc_range[0]), np.full(count, config.adc_range[1])
    return slice_limits(volume_ZYX, axis, config.percentiles)


def _is_windowed(name: str, config: PreprocessConfig) -> bool:
    """Whether ``window_hu`` counts for a sequence; ADC with a fixed scale must be named in ``window_sequences``."""
    if config.window_hu is None or config.window_sequences is not None:
        return config.window_hu is not None and name in (config.window_sequences or ())
    return not (config.adc_scale == "fixed" and "adc" in name.lower())


def _others(axis: int) -> tuple[int, ...]:
    return tuple(n for n in range(3) if n != axis)


def slice_limits(volume_ZYX: np.ndarray, axis: int, percentiles: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Two percentiles of every slice along ``axis``, linearly interpolated as ``numpy.percentile`` does.

    Where the two coincide (nearly all of a slice is one value), smallest and largest value stand in; a slice of one
    value only has low = high.

    Returns:
        (low_N, high_N) float64.
    """
    rows = np.moveaxis(volume_ZYX, axis, 0).reshape(volume_ZYX.shape[axis], -1)
    rows = np.sort(rows, axis=1)  # a radix sort for 8 and 16 bits: ten times faster than numpy.percentile
    low, high = (_interpolated(rows, q) for q in percentiles)
    flat = high <= low
    return np.where(flat, rows[:, 0], low).astype(np.float64), np.where(flat, rows[:, -1], high).astype(np.float64)


def scale_to_unit(image_SHW: np.ndarray, low_S: np.ndarray, high_S: np.ndarray) -> np.ndarray:
    """(S, H, W) float32: low -> 0, high -> 1, clipped; zeros where low = high (an absent or empty plane)."""
    width = np.asarray(high_S, np.float32) - np.asarray(low_S, np.float32)
    factor = np.divide(1.0, width, out=np.zeros_like(width), where=width > 0)
    scaled = image_SHW.astype(np.float32)
    scaled -= np.asarray(low_S, np.float32)[:, None, None]
    scaled *= factor[:, None, None]
    return np.clip(scaled, 0.0, 1.0, out=scaled)


@contextlib.contextmanager
def naming_case(case: Case) -> Iterator[None]:
    """Put the case id in front of the place that a DataError names."""
    try:
        yield
    except DataError as error:
        where = f"case {case.case_id}" + (f": {error.where}" if error.where else "")
        raise DataError(error.what, where=where, fix=error.fix, code=error.code) from error


# ---------------------------------------------------------------------------------------------------------------------


def _read_sequences(sequences: list[Sequence]) -> dict[str, Volume]:
    """Volumes by name; a 4-D file that holds several of the sequences is read once."""
    files = {path: read_volume(path) for path in dict.fromkeys(sequence.path for sequence in sequences)}
    return {sequence.name: _checked(_as_3d(files[sequence.path], sequence), sequence.path) for sequence in sequences}


def _checked(volume: Volume, path: Path) -> Volume:
    """The same 3-D volume, unless it is flat, constant or not finite."""
    if min(volume.shape) < 2:
        raise DataError(
            "The image is flat: a volume needs at least two voxels along each axis.",
            where=f"{path}: {' x '.join(str(n) for n in volume.shape[::-1])} voxels",
            fix="leave the case out, or train on pictures (data.kind=images)",
            code="volume_flat",
        )
    check_finite(path, volume.array)
    _refuse_constant(path, volume.array)
    return volume


def _as_3d(volume: Volume, sequence: Sequence) -> Volume:
    count = volume.array.shape[0] if volume.array.ndim == 4 else 1
    refuse_absent_volume(sequence.path, count, sequence.volume_index)
    if volume.array.ndim == 3:
        return volume
    if sequence.volume_index is None:
        raise DataError(
            "The image is 4-D where one volume is expected.",
            where=f"{sequence.path}: {count} volumes",
            fix="split it by b-value with `medssl convert dicom`, or put its .bval file beside it",
            code="volume_4d",
        )
    return Volume(volume.array[sequence.volume_index], volume.affine)


def _read_roi(path: Path, grid: Grid) -> np.ndarray:
    volume = read_volume(path)
    if volume.array.ndim != 3:
        raise DataError("The mask is 4-D.", where=str(path), fix="give one 3-D mask", code="volume_4d")
    check_finite(path, volume.array)
    mask = Volume((volume.array > 0.5).astype(np.uint8), volume.affine)
    return _moved(mask, grid, str(path), nearest=True).array.astype(bool)


def _read_labels(path: Path, grid: Grid) -> np.ndarray:
    """(Z, Y, X) uint8 values of a label map on the grid; 0 beyond the label map."""
    volume = read_volume(path)
    if volume.array.ndim != 3:
        raise label_4d(path)
    check_finite(path, volume.array)
    values = whole_values(volume.array, str(path))
    moved = _moved(Volume(values, volume.affine), grid, str(path), nearest=True, what="label map").array
    lost = np.setdiff1d(np.unique(values), np.unique(moved))
    if lost.size:
        log.warning(
            "%s: on the grid of the image nothing is left of the value%s %s",
            path,
            "s" * (lost.size > 1),
            ", ".join(str(value) for value in lost),
        )
    return moved


def _refuse_constant(path: Path, array: np.ndarray) -> None:
    if array.min() == array.max():
        raise DataError(
            "The image is constant.",
            where=f"{path}: every value is {array.flat[0]}",
            fix="convert it again, or leave the case out",
            code="volume_constant",
        )


def _onto(volume: Volume, grid: Grid, path: str) -> tuple[np.ndarray, bool]:
    """(voxels on the grid, whether they were interpolated)."""
    turned = Grid(volume.shape, volume.affine).reoriented(affine_orientation(grid.affine))
    interpolated = grid_difference(turned.shape, turned.affine, grid.shape, grid.affine) is not None
    return _moved(volume, grid, path, nearest=False).array, interpolated


def _moved(volume: Volume, grid: Grid, path: str, *, nearest: bool, what: str = "image") -> Volume:
    try:
        moved = resample_to(volume, grid, nearest=nearest)
    except DataError as error:
        told = error.what.replace("image", what, 1)
        raise DataError(told, where=f"{path}: {error.where}", fix=error.fix, code=error.code) from error
    covered = coverage(volume, grid)
    if covered < _LOW_COVERAGE:
        log.warning("%s covers only %.0f %% of the grid it is brought to", path, 100 * covered)
    return moved


def _stack(volumes: list[np.ndarray | None], shape: tuple[int, int, int]) -> np.ndarray:
    """(S, Z, Y, X) in the smallest type that holds every sequence; zeros for None. ``volumes`` is empty afterwards."""
    dtype = _storage_dtype([v for v in volumes if v is not None])
    if len(volumes) == 1:
        (only,) = volumes
        volumes.clear()
        return np.ascontiguousarray(only, dtype)[None]
    images = np.zeros((len(volumes), *shape), dtype)
    for plane in images:
        volume = volumes.pop(0)
        if volume is not None:
            plane[...] = volume
    return images


def _storage_dtype(volumes: list[np.ndarray]) -> np.dtype:
    """uint8, int16, uint16 or int32 for whole numbers, however the file writes them; else float32."""
    if all(is_whole(v) for v in volumes):
        low, high = min(float(v.min()) for v in volumes), max(float(v.max()) for v in volumes)
        for kind in (np.uint8, np.int16, np.uint16, np.int32):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return np.dtype(kind)
    if any(max(abs(float(v.min())), abs(float(v.max()))) > float(np.finfo(np.float32).max) for v in volumes):
        raise DataError(
            "The image has values beyond the range of 32-bit floats.",
            where=f"largest magnitude {max(float(np.abs(v).max()) for v in volumes):.3g}",
            fix="scale it to sensible units",
            code="values_huge",
        )
    return np.dtype(np.float32)


def _interpolated(sorted_rows: np.ndarray, percentile: float) -> np.ndarray:
    place = percentile / 100 * (sorted_rows.shape[1] - 1)
    below = int(place)
    above = min(below + 1, sorted_rows.shape[1] - 1)
    a, b = sorted_rows[:, below].astype(np.float64), sorted_rows[:, above].astype(np.float64)
    return a + (b - a) * (place - below)


def _reduced(image_CHW: np.ndarray, side: int | None) -> np.ndarray:
    """The picture with its shorter side at most ``side``, antialiased, in the same data type."""
    height, width = image_CHW.shape[1:]
    if side is None or min(height, width) <= side:
        return image_CHW
    scale = side / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    wide = image_CHW if image_CHW.dtype == np.uint8 else image_CHW.astype(np.float32)
    planes = [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)) for plane in wide]
    reduced = np.stack(planes)  # bilinear: Pillow widens the filter when it reduces, and it never overshoots
    return (np.rint(reduced) if image_CHW.dtype.kind in "iu" else reduced).astype(image_CHW.dtype)
