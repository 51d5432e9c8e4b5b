"""Learnable phantoms of prostate MRI: who the patients are, how their scanners measure, and the volumes that result.

Signals follow their equations: T2w = density * exp(-TE / T2); diffusion = density * exp(-TE / T2) * exp(-b * ADC); the
ADC map is fitted to the noisy diffusion images as a scanner would. A lesion is dark on T2 and ADC and bright at high b;
a benign look-alike is dark on T2 alone. Anatomy, vendor, position, gain, coil and noise are drawn without regard to the
label, and each label meets each vendor equally often, so that nothing outside the lesion tells of it.

Case i is a pure function of (seed, i, size): neither the number of cases nor their order matters.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from types import MappingProxyType

import numpy as np

from medssl_cli.core.run import seed_for
from medssl_cli.core.volume import Volume
from medssl_cli.data.phantom_anatomy import (
    Anatomy,
    Emission,
    Layer,
    Tissue,
    draw_anatomy,
    draw_finding,
    occupied,
    render,
)

SIZES = ("small", "full")
CALCULATED_B = 1400
"""High b-value of every protocol, measured or calculated, in s/mm²."""

_PATIENT_OF_CASE = (0, 1, 1, 2, 3, 4, 5)  # of every seven cases two are studies of one patient
_VISIT_OF_CASE = (0, 0, 1, 0, 0, 0, 0)
_CASE_WITHOUT_ADC = 3
_LESION_OF_GRADE = {  # T2 in ms, ADC in 1e-6 mm²/s, radius in mm: (low, high)
    1: ((72, 84), (880, 960), (6.0, 7.2)),
    2: ((64, 76), (740, 840), (6.6, 8.2)),
    3: ((58, 70), (580, 700), (7.4, 9.4)),
}


@dataclass(frozen=True)
class Grid:
    """A block of slices: matrix (columns, rows), voxel edges in mm, and how it lies in the patient.

    Args:
        spacing_mm: From slice centre to slice centre; ``thickness_mm`` may be less.
        tilt_deg: Turn about the left-right axis, ``yaw_deg`` about the head-foot axis.
    """

    columns: int
    rows: int
    pixel_mm: float
    slices: int
    spacing_mm: float
    thickness_mm: float
    tilt_deg: float = 0.0
    yaw_deg: float = 0.0
    plane: str = "axial"


@dataclass(frozen=True)
class Protocol:
    """How one vendor's scanner measures the prostate.

    Args:
        b_values: Measured b-values in s/mm²; those up to 1000 go into the ADC map.
        calculates_high_b: The image at b = 1400 is computed from the fit instead of measured.
    """

    vendor: str
    t2: Mapping[str, Grid]
    diffusion: Mapping[str, Grid]
    b_values: tuple[int, ...]
    calculates_high_b: bool
    t2_echo_ms: float
    diffusion_echo_ms: float


PROTOCOLS = MappingProxyType(
    {
        "siemens": Protocol(
            "siemens",
            {"small": Grid(96, 96, 1.2, 12, 3.6, 3.6, 5.0), "full": Grid(320, 320, 0.6, 24, 3.0, 3.0, 5.0)},
            {"small": Grid(48, 48, 2.4, 12, 3.6, 3.6), "full": Grid(120, 128, 1.6, 24, 3.0, 3.0)},
            (50, 400, 800),
            True,
            101,
            70,
        ),
        "ge": Protocol(
            "ge",
            {"small": Grid(100, 100, 1.15, 12, 3.5, 3.0), "full": Grid(320, 320, 0.5625, 24, 3.3, 3.0)},
            {"small": Grid(52, 52, 2.2, 12, 3.5, 3.0), "full": Grid(128, 128, 1.5625, 24, 3.3, 3.0)},
            (50, 800, CALCULATED_B),
            False,
            96,
            78,
        ),
        "philips": Protocol(
            "philips",
            {
                "small": Grid(92, 92, 1.25, 12, 3.6, 3.3, -4.0, 2.0),
                "full": Grid(320, 320, 0.55, 24, 3.0, 3.0, -4.0, 2.0),
            },
            {
                "small": Grid(48, 44, 2.5, 12, 3.6, 3.3, -4.0, 2.0),
                "full": Grid(112, 104, 1.7, 24, 3.0, 3.0, -4.0, 2.0),
            },
            (0, 800, CALCULATED_B),
            False,
            110,
            74,
        ),
    }
)


@dataclass(frozen=True)
class PhantomCase:
    """One study of one invented patient, before any voxel is drawn.

    Args:
        index: Position in the cohort.
        patient: Number of the patient; ``visit`` 0 or 1 is the study's number.
        study_date: YYYYMMDD.
        grade: 0 without a lesion, else 1 to 3: larger, darker on ADC.
        missing: Stems that were not acquired.
    """

    seed: int
    index: int
    case_id: str
    patient_id: str
    patient: int
    visit: int
    study_date: str
    study_uid: str
    vendor: str
    grade: int
    missing: tuple[str, ...] = ()

    @property
    def label(self) -> int:
        """1 with a lesion, else 0."""
        return int(self.grade > 0)

    @property
    def protocol(self) -> Protocol:
        """How this study was measured."""
        return PROTOCOLS[self.vendor]


@dataclass(frozen=True)
class PhantomImages:
    """The volumes of one case.

    Args:
        volumes: int16 by stem (``ax_t2wi``, ``ax_adc``, ``ax_dwi_b800``, …), missing ones left out.
        roi, lesion: uint8 masks on the grid of T2; the lesion is all zero without one.
        zone: ``peripheral``, ``transition`` or empty.
    """

    volumes: dict[str, Volume]
    roi: Volume
    lesion: Volume
    zone: str

    @property
    def lesion_mm3(self) -> float:
        """Volume of the lesion mask."""
        return float(self.lesion.array.sum() * np.prod(self.lesion.spacing))


def plan_cases(count: int, seed: int) -> list[PhantomCase]:
    """The first ``count`` studies of the cohort of ``seed``.

    Of every six patients three carry a lesion, one of each grade, and each vendor sees one with and one without. A
    patient with two studies in the cohort has the study date in both case ids.
    """
    drafts = [_draft(seed, index) for index in range(count)]
    patients = [case.patient for case in drafts]
    return [
        replace(case, case_id=f"{case.patient_id}_{case.study_date}") if patients.count(case.patient) > 1 else case
        for case in drafts
    ]


def _draft(seed: int, index: int) -> PhantomCase:
    block, place = divmod(index, len(_PATIENT_OF_CASE))
    within, visit = _PATIENT_OF_CASE[place], _VISIT_OF_CASE[place]
    patient = 6 * block + within
    rng = np.random.default_rng(seed_for(seed, "cohort", block))
    positive_first = rng.integers(0, 2, 3)  # of patients 0 and 1, 2 and 3, 4 and 5 one has a lesion
    vendors = [rng.permutation(sorted(PROTOCOLS)) for _ in range(2)]  # of the negative, of the positive
    grades = rng.permutation([1, 2, 3])
    pair, second = divmod(within, 2)
    positive = bool(positive_first[pair]) != bool(second)
    patient_id = f"PT-{patient:04d}"
    days = np.random.default_rng(seed_for(seed, "dates", patient)).integers((0, 180), (900, 500))
    study_date = date(2021, 1, 4) + timedelta(days=int(days[0]) + visit * int(days[1]))
    return PhantomCase(
        seed=seed,
        index=index,
        case_id=patient_id,
        patient_id=patient_id,
        patient=patient,
        visit=visit,
        study_date=study_date.strftime("%Y%m%d"),
        study_uid=uid_for(seed, "study", patient, visit),
        vendor=str(vendors[int(positive)][pair]),
        grade=int(grades[pair]) if positive else 0,
        missing=("ax_adc",) if index == _CASE_WITHOUT_ADC else (),
    )


def uid_for(seed: int, *names: object) -> str:
    """A DICOM unique identifier below 2.25, a pure function of its arguments."""
    text = "/".join(str(part) for part in ("medssl-phantom", seed, *names))
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, text).int}"


# --- one case --------------------------------------------------------------------------------------------------------


def draw_images(case: PhantomCase, size: str = "small") -> PhantomImages:
    """Measure one case: every sequence of its protocol, and the masks on the grid of T2."""
    scan = Scan.of(case)
    t2_grid = case.protocol.t2[size]
    volumes = {"ax_t2wi": scan.t2(t2_grid, "ax_t2wi"), **scan.diffusion(size)}
    gland = scan.mask(t2_grid, Layer(scan.anatomy.gland, Tissue(1, 1, 1)), "ax_t2wi")
    lesion = Volume(np.zeros_like(gland.array), gland.affine)
    if scan.anatomy.lesion is not None:
        lesion = scan.mask(t2_grid, scan.anatomy.lesion, "ax_t2wi")
    kept = {stem: volume for stem, volume in volumes.items() if stem not in case.missing}
    return PhantomImages(kept, gland, lesion, scan.zone)


@dataclass(frozen=True)
class Scan:
    """A patient on the table: the anatomy, where it lies, and the gain and coil of the day.

    Args:
        body: 4x4, mm of the gland's axes -> mm of the scanner, RAS+.
        coil_10: Coefficients of the log receive sensitivity over 1, r, a, s, r², a², s², ra, rs, as (per 100 mm).
    """

    case: PhantomCase
    anatomy: Anatomy
    zone: str
    body: np.ndarray
    t2_gain: float
    diffusion_gain: float
    coil_10: np.ndarray

    @classmethod
    def of(cls, case: PhantomCase) -> Scan:
        """Anatomy and findings belong to the patient; position, gain and coil to the study."""
        anatomy, zone = _with_findings(case, draw_anatomy(case.seed, case.patient))
        rng = np.random.default_rng(seed_for(case.seed, "position", case.index))
        body = np.eye(4)
        body[:3, :3] = _turn(rng.uniform(-4, 4), rng.uniform(-3, 3))
        body[:3, 3] = rng.uniform((-8, -12, -40), (8, 12, 10))
        coil = rng.normal(0, 1, 10) * np.array([0, 0.12, 0.25, 0.15, 0.3, 0.5, 0.3, 0.1, 0.1, 0.1])
        return cls(
            case=case,
            anatomy=anatomy,
            zone=zone,
            body=body,
            t2_gain=2000 * math.exp(rng.normal(0, 0.15)),
            diffusion_gain=2400 * math.exp(rng.normal(0, 0.15)),
            coil_10=coil,
        )

    def t2(self, grid: Grid, stem: str) -> Volume:
        """T2-weighted spin echo, int16."""
        affine = self.affine(grid, stem)
        echo = self.case.protocol.t2_echo_ms

        def emission(tissue: Tissue, factor: np.ndarray) -> np.ndarray:
            return spin_echo(tissue, factor, echo)[None]

        clean = self._render(grid, affine, emission)[0] * self.t2_gain * self._coil(grid, affine)
        noisy = rician(clean, 0.012 * self.t2_gain, self._noise(stem))
        return Volume(_to_int16(noisy), affine)

    def diffusion(self, size: str) -> dict[str, Volume]:
        """``ax_dwi_b…`` of every b-value and ``ax_adc``, all on one grid."""
        protocol = self.case.protocol
        grid = protocol.diffusion[size]
        affine = self.affine(grid, "ax_dwi")

        def emission(tissue: Tissue, factor: np.ndarray) -> np.ndarray:
            return diffusion_signal(tissue, factor, protocol.diffusion_echo_ms, protocol.b_values)

        clean = self._render(grid, affine, emission) * self.diffusion_gain * self._coil(grid, affine)
        sigma = 0.012 * self.diffusion_gain
        measured = {
            b: _to_int16(rician(signal, sigma / math.sqrt(_averages(b)), self._noise(f"ax_dwi_b{b}")))
            for b, signal in zip(protocol.b_values, clean, strict=True)
        }
        adc, s0 = fit_adc({b: signal for b, signal in measured.items() if b <= 1000}, floor=4 * sigma)
        if protocol.calculates_high_b:
            measured[CALCULATED_B] = _to_int16(np.where(adc > 0, s0 * np.exp(-CALCULATED_B * 1e-6 * adc), 0.0))
        volumes = {f"ax_dwi_b{b}": Volume(signal, affine) for b, signal in measured.items()}
        return {"ax_adc": Volume(_to_int16(adc), affine), **volumes}

    def mask(self, grid: Grid, layer: Layer, stem: str) -> Volume:
        """Voxels that belong to ``layer`` by half or more, uint8, on the grid of ``stem``."""
        affine = self.affine(grid, stem)
        shape = (grid.slices, grid.rows, grid.columns)
        inside = occupied(self.anatomy, self._to_body(affine), shape, grid.pixel_mm, _share(grid), layer)
        return Volume(inside.astype(np.uint8), affine)

    def affine(self, grid: Grid, stem: str) -> np.ndarray:
        """4x4, voxel -> mm RAS+; the centre of the block misses the gland by a few mm, as a technologist would."""
        rng = np.random.default_rng(seed_for(self.case.seed, "grid", self.case.index, stem))
        shift = rng.uniform(-4, 4, 3) * (1, 1, 0.5)
        return grid_affine(grid, self.body[:3, 3] + shift)

    def _render(self, grid: Grid, affine: np.ndarray, emission: Emission) -> np.ndarray:
        shape = (grid.slices, grid.rows, grid.columns)
        return render(self.anatomy, self._to_body(affine), shape, grid.pixel_mm, _share(grid), emission)

    def _to_body(self, affine: np.ndarray) -> np.ndarray:
        return np.linalg.inv(self.body) @ affine

    def _coil(self, grid: Grid, affine: np.ndarray) -> np.ndarray:
        to_body = self._to_body(affine) / 100
        z, y, x = np.ogrid[: grid.slices, : grid.rows, : grid.columns]
        r, a, s = (to_body[n, 0] * x + to_body[n, 1] * y + to_body[n, 2] * z + to_body[n, 3] for n in range(3))
        terms = (1.0, r, a, s, r * r, a * a, s * s, r * a, r * s, a * s)
        return np.exp(sum(c * term for c, term in zip(self.coil_10, terms, strict=True)))

    def _noise(self, stem: str) -> np.random.Generator:
        return np.random.default_rng(seed_for(self.case.seed, "noise", self.case.index, stem))


def _with_findings(case: PhantomCase, anatomy: Anatomy) -> tuple[Anatomy, str]:
    """Lesion and look-alike are placed by the same draws, so that a place says nothing about what lies there."""
    rng = np.random.default_rng(seed_for(case.seed, "findings", case.patient))
    side = int(rng.choice((-1, 1)))
    zones = ["peripheral" if rng.random() < 0.6 else "transition" for _ in range(2)]
    t2, adc, radius = _LESION_OF_GRADE[case.grade or int(rng.integers(1, 4))]
    look_alike = Tissue(rng.uniform(66, 82), 0.88, rng.uniform(1320, 1480))
    benign = draw_finding(rng, anatomy, look_alike, rng.uniform(5.5, 8.5), -side, zones[1])
    shown = [benign] if rng.random() < (0.3 if case.grade else 0.4) else []
    lesion_tissue = Tissue(rng.uniform(*t2), 0.9, rng.uniform(*adc))
    lesion = draw_finding(rng, anatomy, lesion_tissue, rng.uniform(*radius), side, zones[0])
    if not case.grade:
        return anatomy.with_findings(shown, None), ""
    return anatomy.with_findings(shown, lesion), lesion.zone


# --- physics ---------------------------------------------------------------------------------------------------------


def spin_echo(tissue: Tissue, factor: np.ndarray, echo_ms: float) -> np.ndarray:
    """density * exp(-TE / T2), with T2 scaled by ``factor``."""
    return tissue.density * np.exp(-echo_ms / (tissue.t2_ms * factor))


def diffusion_signal(tissue: Tissue, factor: np.ndarray, echo_ms: float, b_values: tuple[int, ...]) -> np.ndarray:
    """(B, …): the spin echo times exp(-b * ADC) for each b in s/mm²; fat is suppressed."""
    base = tissue.diffusion_share * spin_echo(tissue, factor, echo_ms)
    adc = tissue.adc * 1e-6 * (1 + (factor - 1) / 2)
    return np.stack([base * np.exp(-b * adc) for b in b_values])


def rician(clean: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Magnitude of a complex signal with Gaussian noise of SD ``sigma`` in both channels (Gudbjartsson & Patz 1995)."""
    real = clean + sigma * rng.standard_normal(clean.shape)
    return np.hypot(real, sigma * rng.standard_normal(clean.shape))


def fit_adc(signals: Mapping[int, np.ndarray], floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares line through the log signal over b.

    Args:
        signals: Measured signal by b-value in s/mm², at least two.
        floor: Where the signal of the lowest b is below it, both results are 0, as in air.

    Returns:
        ADC in 1e-6 mm²/s, clipped to 0…4000, and the signal at b = 0.
    """
    b = np.array(sorted(signals), dtype=np.float64)
    if len(b) < 2:
        raise ValueError(f"an ADC needs two b-values, got {sorted(signals)}")
    logs = np.log(np.maximum(np.stack([signals[int(value)] for value in b]).astype(np.float64), 0.5))
    centred = b - b.mean()
    slope = sum(c * log for c, log in zip(centred, logs, strict=True)) / (centred**2).sum()
    s0 = np.exp(logs.mean(0) - slope * b.mean())
    shown = signals[int(b[0])] >= floor
    return np.where(shown, np.clip(-slope * 1e6, 0, 4000), 0.0), np.where(shown, s0, 0.0)


def grid_affine(grid: Grid, centre: np.ndarray) -> np.ndarray:
    """4x4, voxel (x, y, z, 1) -> mm RAS+, with the middle of the block at ``centre``.

    The columns run to the patient's left (coronal too; sagittal: to the back), the rows up to the front or the head, as
    dcm2niix writes them.
    """
    planes = {  # columns x, y, z: where the voxel axes point, in RAS
        "axial": np.array([[-1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]),
        "coronal": np.array([[-1.0, 0, 0], [0, 0, -1.0], [0, 1.0, 0]]),
        "sagittal": np.array([[0, 0, 1.0], [-1.0, 0, 0], [0, 1.0, 0]]),
    }
    steps = _turn(grid.yaw_deg, grid.tilt_deg) @ planes[grid.plane]
    affine = np.eye(4)
    affine[:3, :3] = steps * (grid.pixel_mm, grid.pixel_mm, grid.spacing_mm)
    middle = np.array([grid.columns - 1, grid.rows - 1, grid.slices - 1]) / 2
    affine[:3, 3] = centre - affine[:3, :3] @ middle
    return affine


def _turn(yaw_deg: float, tilt_deg: float) -> np.ndarray:
    y, t = math.radians(yaw_deg), math.radians(tilt_deg)
    yaw = np.array([[math.cos(y), -math.sin(y), 0], [math.sin(y), math.cos(y), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, math.cos(t), -math.sin(t)], [0, math.sin(t), math.cos(t)]])
    return yaw @ tilt


def _averages(b: int) -> int:
    """Repetitions that a protocol spends on a b-value."""
    return 2 if b < 200 else 4 if b < 1000 else 10


def _share(grid: Grid) -> float:
    return grid.thickness_mm / grid.spacing_mm


def _to_int16(values: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to 4095: a scanner keeps 12 bits."""
    return np.clip(np.rint(values), 0, 4095).astype(np.int16)
