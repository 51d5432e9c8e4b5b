"""Learnable phantoms of head CT: who bleeds where, how each scanner measures and stores it, and the resulting volumes.

Of every ten studies four show no bleed and each of the five kinds leads one or two of the others, most of which show a
second kind or a third: every kind is in a good fifth of the studies. Head, position, scanner, padding, storage and
noise are drawn without regard to that: the same study without its bleeds has the same voxels everywhere else. So
nothing but blood and its oedema tells of a label.

Study i is a pure function of (seed, i, size): neither the number of studies nor their order matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from medssl_cli.core.run import seed_for
from medssl_cli.core.volume import Volume
from medssl_cli.data.phantom_head import KINDS, Bleed, Head, Place, draw_bleed, paint

LABELS = ("any", *KINDS)
"""Names of the six labels in their fixed order; ``any`` is the largest of the five others."""
MIN_BLEED_MM2 = 30.0
"""A slice carries the label of a kind whose mask covers at least this area in it."""
VENDORS = ("ge", "philips", "siemens")
ORIENTATIONS = ("LAS", "LAS", "RAS", "LPS", "RPI", "LAI", "ASL", "PIR")
"""How series are stored, drawn evenly: most with axial planes third, some cut the other way."""
SCALINGS = ((1.0, 0.0), (1.0, -1024.0), (0.5, -1024.0), (2.0, -1000.0))
"""(slope, intercept) of the stored int16."""

_PATIENT_OF_CASE = (0, 1, 1, 2, 3, 4, 5, 6, 7, 8)  # of every ten studies two are of one patient
_TWO_SERIES = (3, 7)  # places of every ten whose study has a second series
_SECOND_KIND, _THIRD_KIND = 0.7, 0.4  # chance of one more kind, and of yet another: every kind in a good fifth
_SUB_SLICES = 3
_CHUNK_VOXELS = 20_000  # small arrays stay in the cache of the processor: 2.5 times faster than one block
_BLOOD_SHARE = 0.4  # of a voxel, from which the mask holds it


@dataclass(frozen=True)
class HeadCtSeries:
    """One series of a study, before any voxel is drawn.

    Args:
        number: 1, or 2 for a second reconstruction of the same study.
        vendor: Decides field of view, padding and kernel within their ranges.
        slope, inter: HU = slope * stored + inter.
        padding_hu: What lies outside the round field of view; None keeps the air there.
    """

    study_uid: str
    number: int
    vendor: str
    orientation: str
    slope: float
    inter: float
    padding_hu: float | None

    @property
    def series_uid(self) -> str:
        """Unique in the cohort."""
        return f"{self.study_uid}-{self.number}"

    @property
    def rel_dir(self) -> str:
        """Folder of the series below the root of the phantom."""
        return f"{self.study_uid}/{self.series_uid}"

    @property
    def mask_name(self) -> str:
        """File of its bleeds, below ``masks``."""
        return f"{self.study_uid}__{self.series_uid}.nii.gz"


@dataclass(frozen=True)
class HeadCtStudy:
    """One study of one invented patient.

    Args:
        index: Position in the cohort.
        patient: Number of the patient.
        kinds: Kinds of bleeding, none in a healthy head.
        vendor: Of the scanner.
    """

    seed: int
    index: int
    patient: int
    kinds: tuple[str, ...]
    vendor: str

    @property
    def patient_id(self) -> str:
        """Name of the patient."""
        return f"PT-{self.patient:05d}"

    @property
    def study_uid(self) -> str:
        """Name of the study."""
        return f"ST-{self.index:05d}"

    @property
    def case_id(self) -> str:
        """As progress shows it."""
        return self.study_uid

    @property
    def label(self) -> int:
        """1 with any bleed, else 0."""
        return int(bool(self.kinds))

    @property
    def series(self) -> tuple[HeadCtSeries, ...]:
        """Its one or two series."""
        count = 2 if self.index % len(_PATIENT_OF_CASE) in _TWO_SERIES else 1
        return tuple(self._series(number) for number in range(1, count + 1))

    def _series(self, number: int) -> HeadCtSeries:
        rng = np.random.default_rng(seed_for(self.seed, "storage", self.index, number))
        slope, inter = SCALINGS[int(rng.integers(len(SCALINGS)))]
        return HeadCtSeries(
            study_uid=self.study_uid,
            number=number,
            vendor=self.vendor,
            orientation=ORIENTATIONS[int(rng.integers(len(ORIENTATIONS)))],
            slope=slope,
            inter=inter,
            padding_hu=(None, -1024.0, -2000.0)[int(rng.integers(3))],
        )


@dataclass(frozen=True)
class HeadCtImages:
    """The voxels of one series.

    Args:
        stored: int16 before slope and intercept, as the series is oriented.
        mask: uint8 on the same grid: 0, or 1 + position of the kind in ``KINDS``.
        labels_N6: (N, 6) uint8 for the N axial slices from the feet to the head, columns as ``LABELS``.
    """

    stored: Volume
    mask: Volume
    labels_N6: np.ndarray

    @property
    def labels(self) -> tuple[int, ...]:
        """Label of the whole series, columns as ``LABELS``: what any slice carries."""
        return tuple(int(value) for value in self.labels_N6.max(0))


def plan_head_ct(count: int, seed: int) -> list[HeadCtStudy]:
    """The first ``count`` studies of the cohort of ``seed``."""
    return [_study(seed, index) for index in range(count)]


def _study(seed: int, index: int) -> HeadCtStudy:
    block, place = divmod(index, len(_PATIENT_OF_CASE))
    rng = np.random.default_rng(seed_for(seed, "bleeds", block))
    leads = [*rng.permutation(KINDS), str(rng.choice(KINDS)), "", "", "", ""]
    vendors = [*rng.permutation(VENDORS * 2), *rng.permutation(VENDORS), str(rng.choice(VENDORS))]
    order = rng.permutation(len(leads))
    others = [rng.permutation([kind for kind in KINDS if kind != lead]) for lead in leads]
    more = [int((rng.random(2) < (_SECOND_KIND, _THIRD_KIND)).cumprod().sum()) for _ in leads]
    mine = int(order[place])
    chosen = {str(leads[mine]), *map(str, others[mine][: more[mine]])} if leads[mine] else set()
    return HeadCtStudy(
        seed=seed,
        index=index,
        patient=(max(_PATIENT_OF_CASE) + 1) * block + _PATIENT_OF_CASE[place],
        kinds=tuple(kind for kind in KINDS if kind in chosen),
        vendor=str(vendors[mine]),
    )


# --- one series ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadCtGrid:
    """A block of axial slices: matrix, voxel edges in mm, and 4x4 voxel -> mm RAS+ of the block."""

    columns: int
    rows: int
    slices: int
    pixel_mm: float
    spacing_mm: float
    affine: np.ndarray


def draw_head_ct(study: HeadCtStudy, series: HeadCtSeries, size: str = "small") -> HeadCtImages:
    """Measure one series: HU with the noise of its scanner, the mask of its bleeds, and the labels of its slices."""
    head = Head.draw(study.seed, study.patient)
    bleeds = [
        draw_bleed(kind, head, np.random.default_rng(seed_for(study.seed, "bleed", study.index, kind)))
        for kind in study.kinds
    ]
    grid = _grid(study, series, size)
    to_head = np.linalg.inv(_pose(study)) @ grid.affine
    hu, shares = _measure(head, bleeds, grid, to_head)
    hu = _with_noise(hu, study, series, grid)
    mask = _mask(shares, bleeds)
    stored = np.clip(np.rint((hu - series.inter) / series.slope), -32768, 32767).astype(np.int16)
    return HeadCtImages(
        stored=Volume(stored, grid.affine).reoriented(series.orientation),
        mask=Volume(mask, grid.affine).reoriented(series.orientation),
        labels_N6=_slice_labels(mask, grid.pixel_mm**2),
    )


def _grid(study: HeadCtStudy, series: HeadCtSeries, size: str) -> HeadCtGrid:
    """The block lies in RAS order; a gantry that leans tilts its slices."""
    rng = np.random.default_rng(seed_for(study.seed, "grid", study.index, series.number))
    field_mm = {"ge": 222.0, "philips": 230.0, "siemens": 226.0}[series.vendor] * rng.uniform(0.97, 1.03)
    side = {"small": 96, "full": 512}[size]
    pixel = field_mm / side
    rows = side + int(rng.integers(-2, 3)) * (side // 48)
    columns = side + int(rng.integers(-2, 3)) * (side // 48)
    slices = int(rng.integers(20, 29)) + (8 if size == "full" else 0)
    spacing = rng.uniform(148, 156) / slices
    lean = math.radians(rng.uniform(-14, 14)) if rng.random() < 0.3 else 0.0
    cos, sin = math.cos(lean), math.sin(lean)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    affine = np.eye(4)
    affine[:3, :3] = turn * (pixel, pixel, spacing)
    middle = np.array([columns - 1, rows - 1, slices - 1]) / 2
    centre = _pose(study)[:3, 3] + (0.0, -2.0, 14.0) + rng.uniform(-3, 3, 3)
    affine[:3, 3] = centre - affine[:3, :3] @ middle
    return HeadCtGrid(columns, rows, slices, float(pixel), float(spacing), affine)


def _pose(study: HeadCtStudy) -> np.ndarray:
    """4x4, mm of the head -> mm of the scanner, RAS+: how the patient lay on the day."""
    rng = np.random.default_rng(seed_for(study.seed, "pose", study.index))
    yaw, pitch, roll = np.radians(rng.uniform((-8, -9, -6), (8, 9, 6)))
    shift = rng.uniform((-6, -8, -60), (6, 8, 60))
    turn_s = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    turn_r = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    turn_a = np.array([[math.cos(roll), 0, math.sin(roll)], [0, 1, 0], [-math.sin(roll), 0, math.cos(roll)]])
    pose = np.eye(4)
    pose[:3, :3] = turn_s @ turn_r @ turn_a
    pose[:3, 3] = shift
    return pose


def _measure(head: Head, bleeds: list[Bleed], grid: HeadCtGrid, to_head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise-free HU (Z, Y, X) and shares of the bleeds, averaged over the thickness of each slice, in blocks."""
    hu = np.zeros((grid.slices, grid.rows, grid.columns))
    shares = np.zeros((len(bleeds), *hu.shape))
    step = max(1, _CHUNK_VOXELS // (grid.rows * grid.columns))
    for first in range(0, grid.slices, step):
        count = min(step, grid.slices - first)
        for part in range(_SUB_SLICES):
            moved = to_head.copy()
            moved[:3, 3] += (first + (part + 0.5) / _SUB_SLICES - 0.5) * to_head[:3, 2]
            place = Place(head, moved, (count, grid.rows, grid.columns), grid.pixel_mm)
            painted, filled = paint(place, bleeds)
            hu[first : first + count] += painted / _SUB_SLICES
            shares[:, first : first + count] += filled / _SUB_SLICES
    return hu, shares


def _with_noise(hu: np.ndarray, study: HeadCtStudy, series: HeadCtSeries, grid: HeadCtGrid) -> np.ndarray:
    """Kernel of the reconstruction, noise of the dose, and padding outside the round field of view."""
    rng = np.random.default_rng(seed_for(study.seed, "noise", study.index, series.number))
    kernel_mm = {"ge": 0.5, "philips": 0.8, "siemens": 0.65}[series.vendor] * rng.uniform(0.8, 1.2)
    sigma = rng.uniform(3.0, 5.0)
    blurred = ndimage.gaussian_filter(hu, (0, kernel_mm / grid.pixel_mm, kernel_mm / grid.pixel_mm), truncate=3.0)
    noisy = np.maximum(blurred + sigma * rng.standard_normal(hu.shape), -1024.0)
    if series.padding_hu is not None:
        y, x = np.ogrid[: grid.rows, : grid.columns]
        radius = min(grid.rows, grid.columns) / 2
        outside = (y - (grid.rows - 1) / 2) ** 2 + (x - (grid.columns - 1) / 2) ** 2 > radius**2
        noisy[:, outside & np.ones((grid.rows, grid.columns), bool)] = series.padding_hu
    return noisy


def _mask(shares: np.ndarray, bleeds: list[Bleed]) -> np.ndarray:
    """uint8 (Z, Y, X): 1 + kind where blood fills enough of a voxel, the kind that fills most of it."""
    mask = np.zeros(shares.shape[1:], np.uint8)
    if bleeds:
        values = np.array([KINDS.index(bleed.kind) + 1 for bleed in bleeds], np.uint8)
        mask = np.where(shares.sum(0) >= _BLOOD_SHARE, values[shares.argmax(0)], 0).astype(np.uint8)
    return mask


def _slice_labels(mask: np.ndarray, pixel_mm2: float) -> np.ndarray:
    """(N, 6) uint8 of the slices along the first axis."""
    area_N5 = np.stack([(mask == value).sum((1, 2)) for value in range(1, len(KINDS) + 1)], axis=1) * pixel_mm2
    kinds_N5 = (area_N5 >= MIN_BLEED_MM2).astype(np.uint8)
    return np.concatenate([kinds_N5.max(1, keepdims=True), kinds_N5], axis=1)


def without_bleeds(study: HeadCtStudy) -> HeadCtStudy:
    """The same study, had nothing bled."""
    return replace(study, kinds=())
