"""What a series must be before it may become a volume, and what the volume must be before it may be written.

Before: readable files, one orientation, one pixel grid, no sheared stack, even slice positions, each position once in
each volume. After: the engine's volume lies on exactly the grid that the headers promise. A converter's return code is
never taken for an answer: all three engines report success on series with missing slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import Volume, affine_spacing, grid_difference
from medssl_cli.data.dicom import Frame, SeriesFacts
from medssl_cli.data.diffusion import round_b

COSINE_TOLERANCE = 1e-3
"""Largest difference of a direction cosine within one volume: scanners write between 4 and 16 digits."""

POSITION_TOLERANCE_MM = 0.1
"""How far a slice may lie from its place on the straight line from first to last, or a quarter of thinner gaps."""

SHEAR_TOLERANCE_MM = 0.2
"""How far a slice may be shifted within its plane before the stack counts as sheared (gantry tilt)."""

_RESEND = "send the series again from the archive, or leave it out with the mapping"


@dataclass(frozen=True)
class VolumePlan:
    """One 3-D image of a series.

    Args:
        frames: Its planes, by position along the normal.
        b: b-value in s/mm2, None when no plane states one.
        direction: Gradient direction as text.
        image_type: Of its first plane.
    """

    frames: tuple[Frame, ...]
    b: float | None
    direction: str
    image_type: str

    @property
    def files(self) -> tuple[int, ...]:
        """Indices of its files, in slice order, each once."""
        return tuple(dict.fromkeys(frame.file for frame in self.frames))


@dataclass(frozen=True)
class SeriesGeometry:
    """A series that has passed the gates before conversion.

    Args:
        volumes: One, or several of a 4-D series in order of acquisition.
        shape: (Z, Y, X) of one volume, Z slices.
        affine: 4x4, voxel (column, row, slice) -> mm, RAS+.
    """

    volumes: tuple[VolumePlan, ...]
    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(between slices, between rows, between columns) in mm."""
        return affine_spacing(self.affine)


def check_series(facts: SeriesFacts) -> SeriesGeometry:
    """Group the planes of a series into volumes that lie on one regular grid.

    Raises:
        DataError: With ``code`` naming the gate that refused, and the files or positions concerned.
    """
    _check_faults(facts)
    if not facts.frames:
        raise _refuse("The series holds no image.", "dicom_empty", "", _RESEND)
    _check_one_grid(facts)
    normal, distances = _distances(facts.frames)
    _check_shear(facts, normal, distances)
    places = _places(distances)
    n_slices = len(set(places))
    if n_slices == 1:
        raise _refuse(
            f"All {len(places)} images lie at one position: they are no volume.",
            "dicom_one_position",
            f"position {distances[0]:.2f} mm along the normal",
            "leave the series out with the mapping",
        )
    groups = _group_volumes(facts, places, n_slices)
    _check_gaps(facts, np.array(sorted(dict(zip(places, distances, strict=True)).values())))
    order = np.argsort(distances, kind="stable")
    volumes = tuple(_plan(facts, [i for i in order if i in members]) for members in map(set, groups))
    first = volumes[0].frames
    shape = (n_slices, first[0].rows, first[0].columns)
    return SeriesGeometry(volumes, shape, _affine(first))


def check_converted(volume: Volume, geometry: SeriesGeometry, engine: str) -> None:
    """Refuse a converted volume that is not the one that the headers describe.

    Raises:
        DataError: Slice count, spacing, orientation or position differ; both values are shown.
    """
    given = volume.reoriented("RAS")
    z, y, x = geometry.shape
    expected = Volume(np.broadcast_to(np.int8(0), (z, y, x)), geometry.affine).reoriented("RAS")
    difference = grid_difference(expected.shape, expected.affine, given.shape, given.affine)
    if difference:
        raise _refuse(
            f"The volume that {engine} made is not the one that the headers describe.",
            "dicom_engine_disagrees",
            f"headers and result: {difference}",
            "try another --engine; the series was not written",
        )


# --- gates before ----------------------------------------------------------------------------------------------------


def _check_faults(facts: SeriesFacts) -> None:
    if not facts.faults:
        return
    what = {
        "dicom_truncated": "Files of the series are cut off or damaged.",
        "dicom_unreadable": "Files of the series cannot be opened.",
        "dicom_missing_tag": "Tags that place the images are missing.",
        "dicom_colour": "The series is not greyscale.",
        "dicom_damaged_neighbour": "A file that may be a slice of the series cannot be put into it.",
    }
    code = facts.faults[0][0]
    texts = list(dict.fromkeys(text for kind, text in facts.faults if kind == code))
    more = [f"and {len(texts) - 5} more"] if len(texts) > 5 else []
    fix = "remove or replace the file" if code == "dicom_damaged_neighbour" else _RESEND
    raise _refuse(what[code], code, "\n".join(texts[:5] + more), fix)


def _check_one_grid(facts: SeriesFacts) -> None:
    first = facts.frames[0]
    cosines = np.array([frame.plane.row_cosines + frame.plane.column_cosines for frame in facts.frames])
    turned = np.abs(cosines - cosines[0]).max(axis=1) > COSINE_TOLERANCE
    if turned.any():
        raise _refuse(
            "The series holds images of several orientations.",
            "dicom_mixed_orientation",
            f"{int(turned.sum())} of {len(turned)} differ: {_name(facts, 0)} and {_name(facts, int(turned.argmax()))}",
            "a localizer is no volume: leave it out with the mapping; otherwise split the series at the scanner",
        )
    for i, frame in enumerate(facts.frames):
        spacing_differs = np.abs(np.subtract(frame.plane.pixel_spacing, first.plane.pixel_spacing)).max() > 1e-4
        if (frame.rows, frame.columns) != (first.rows, first.columns) or spacing_differs:
            raise _refuse(
                "The images of the series differ in size.",
                "dicom_mixed_grid",
                f"{_name(facts, 0)}: {_size(first)}; {_name(facts, i)}: {_size(frame)}",
                _RESEND,
            )


def _distances(frames: Sequence[Frame]) -> tuple[np.ndarray, np.ndarray]:
    """Unit normal, and the distance of each plane along it in mm."""
    normal = np.cross(frames[0].plane.row_cosines, frames[0].plane.column_cosines)
    normal /= np.linalg.norm(normal)
    return normal, np.array([frame.plane.position for frame in frames]) @ normal


def _check_shear(facts: SeriesFacts, normal: np.ndarray, distances: np.ndarray) -> None:
    positions = np.array([frame.plane.position for frame in facts.frames])
    within = positions - np.outer(distances, normal)
    shift = np.linalg.norm(within - within[0], axis=1)
    worst = int(shift.argmax())
    travel = abs(distances[worst] - distances[0])
    angle = np.degrees(np.arctan2(shift[worst], travel)) if travel else 90.0
    says_tilt = facts.modality == "CT" and facts.is_original and abs(facts.tilt) > 0.5
    if shift[worst] <= SHEAR_TOLERANCE_MM and not says_tilt:
        return
    if shift[worst] <= SHEAR_TOLERANCE_MM:
        where = f"the header states a tilt of {facts.tilt:g} degrees, the positions are straight"
    else:
        where = f"{_name(facts, worst)} is shifted by {shift[worst]:.2f} mm within its plane, {angle:.1f} degrees"
    raise _refuse(
        "The slices are not stacked along their normal: gantry tilt or a mixed series.",
        "dicom_gantry_tilt",
        where,
        "have the scanner reformat the series without tilt; a sheared stack has no NIfTI affine of true angles",
    )


def _places(distances: np.ndarray) -> list[int]:
    """Number of the slice position of each plane; planes closer than 0.01 mm share one."""
    order = np.argsort(distances, kind="stable")
    step = np.diff(distances[order], prepend=distances[order[0]])
    places = np.empty(len(distances), dtype=int)
    places[order] = np.cumsum(step > 0.01)
    return [int(place) for place in places]


def _check_gaps(facts: SeriesFacts, distances: np.ndarray) -> None:
    n = len(distances)
    gap = (distances[-1] - distances[0]) / (n - 1)
    away = np.abs(distances - np.linspace(distances[0], distances[-1], n))
    if away.max() > min(POSITION_TOLERANCE_MM, gap / 4):
        gaps = np.diff(distances)
        worst = int(gaps.argmax())
        raise _refuse(
            "The slices are not evenly spaced: slices are missing or the series is mixed.",
            "dicom_uneven_slices",
            f"gaps from {gaps.min():.2f} to {gaps.max():.2f} mm, the largest after position {distances[worst]:.2f} mm",
            _RESEND,
        )
    stated = facts.slice_gap or 0.0
    ratio = gap / stated if stated > 0 else 1.0
    thickness = facts.slice_thickness or 0.0
    # some scanners state the gap between edges; where it equals the thickness, touching slices are the likelier reading
    means_distance_between_edges = abs(gap - stated - thickness) < 0.05 * gap and abs(stated - thickness) > 0.05 * gap
    if round(ratio) >= 2 and abs(ratio - round(ratio)) < 0.02 * ratio and not means_distance_between_edges:
        raise _refuse(
            f"Only one slice in {round(ratio)} is there.",
            "dicom_slices_missing",
            f"positions lie {gap:.2f} mm apart, the header states {stated:.2f} mm between slices",
            _RESEND,
        )


def _group_volumes(facts: SeriesFacts, places: list[int], n_slices: int) -> list[list[int]]:
    """Planes of each volume, so that each has every position exactly once."""
    if len(places) == n_slices:
        _check_one_contrast(facts)
        return [list(range(n_slices))]
    for key in (_contrast, _contrast_and_acquisition, _contrast_and_trigger):
        groups: dict[Any, list[int]] = {}
        for i, frame in enumerate(facts.frames):
            groups.setdefault(key(frame), []).append(i)
        if all(len(g) == n_slices and len({places[i] for i in g}) == n_slices for g in groups.values()):
            return sorted(groups.values(), key=lambda g: (min(_instance(facts.frames[i]) for i in g), min(g)))
    if len(places) % n_slices == 0 and (facts.n_temporal > 1 or facts.is_mosaic or facts.is_multi_frame):
        blocks = _instance_blocks(facts, places, n_slices)
        if blocks:
            return blocks
    raise _duplicate(facts, places, n_slices)


def _contrast(frame: Frame) -> tuple[Any, ...]:
    return (
        _whole_b(frame),
        frame.direction,
        frame.temporal,
        frame.echo,
        frame.image_type,
        frame.inversion,
        frame.kernel,
    )


def _whole_b(frame: Frame) -> int:
    """b-value without the noise of a scanner's floating point, -1 if none is stated."""
    return -1 if frame.b is None else round_b(frame.b)


def _contrast_and_acquisition(frame: Frame) -> tuple[Any, ...]:
    return (*_contrast(frame), frame.acquisition)


def _contrast_and_trigger(frame: Frame) -> tuple[Any, ...]:
    return (*_contrast(frame), frame.trigger)


def _instance(frame: Frame) -> int:
    return 0 if frame.instance is None else frame.instance


def _instance_blocks(facts: SeriesFacts, places: list[int], n_slices: int) -> list[list[int]]:
    """Volumes of a time series that only the instance number tells apart; empty when that fails."""
    numbered = {(frame.instance, frame.file) for frame in facts.frames}
    instances = {instance for instance, _ in numbered}
    if len(numbered) > 1 and (None in instances or len(instances) < len(numbered)):
        return []
    order = sorted(range(len(places)), key=lambda i: (_instance(facts.frames[i]), facts.frames[i].file, i))
    blocks = [order[i : i + n_slices] for i in range(0, len(order), n_slices)]
    return blocks if all(len({places[i] for i in block}) == n_slices for block in blocks) else []


def _check_one_contrast(facts: SeriesFacts) -> None:
    kinds = sorted({_whole_b(frame) for frame in facts.frames})
    if len(kinds) > 1:
        raise _refuse(
            "One volume holds slices of several b-values: slices are missing.",
            "dicom_mixed_contrast",
            f"b = {', '.join('none' if b < 0 else str(b) for b in kinds)}",
            _RESEND,
        )


def _duplicate(facts: SeriesFacts, places: list[int], n_slices: int) -> DataError:
    seen: dict[tuple[Any, ...], int] = {}
    where = f"{len(places)} images at {n_slices} positions"
    for i, frame in enumerate(facts.frames):
        key = (places[i], _contrast(frame))
        if key in seen:
            z = float(_distances(facts.frames)[1][i])
            where += f"; {_name(facts, seen[key])} and {_name(facts, i)} at {z:.2f} mm"
            break
        seen[key] = i
    return _refuse(
        "Several images lie at one position, and no tag makes whole volumes of them.",
        "dicom_duplicate_position",
        where,
        "keep one copy of each slice, and all slices of each volume",
    )


# --- results ---------------------------------------------------------------------------------------------------------


def _plan(facts: SeriesFacts, members: Sequence[int]) -> VolumePlan:
    frames = tuple(facts.frames[i] for i in members)
    return VolumePlan(frames, frames[0].b, frames[0].direction, frames[0].image_type)


def _affine(frames: Sequence[Frame]) -> np.ndarray:
    """Voxel (column, row, slice) -> mm, RAS+, of planes in slice order."""
    first, last = frames[0].plane, frames[-1].plane
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.row_cosines) * first.pixel_spacing[1]
    affine[:3, 1] = np.array(first.column_cosines) * first.pixel_spacing[0]
    affine[:3, 2] = (np.array(last.position) - np.array(first.position)) / (len(frames) - 1)
    affine[:3, 3] = first.position
    return (
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    )  # DICOM counts to the left and the back, NIfTI to the right and front


def _name(facts: SeriesFacts, frame: int) -> str:
    return facts.files[facts.frames[frame].file].name


def _size(frame: Frame) -> str:
    return f"{frame.columns} x {frame.rows} of {frame.plane.pixel_spacing[1]:g} x {frame.plane.pixel_spacing[0]:g} mm"


def _refuse(what: str, code: str, where: str, fix: str) -> DataError:
    return DataError(what, where=where, fix=fix, code=code)
