"""Learnable phantoms of CT-PET: slices of a chest with tumours that no grey value of one modality tells apart.

A tumour takes up tracer, and so do the heart and the kidneys; a benign mass looks on CT as a tumour does and takes up
none. Who has a tumour, where it lies and how large it is are drawn without regard to body, scanner and noise, so that
the label hides in the two images together and nowhere else. Grey values are those of exported pictures: CT -160 to
240 HU, PET SUV 0 to 20, both as 0 to 255.

Letters: H W pixels of a square slice. Lengths are shares of half the picture's side: the slice spans -1 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from medssl_cli.core.run import seed_for

CT_HU = (-160.0, 240.0)
PET_SUV = (0.0, 20.0)
SLICES = 6
"""Slices of a patient, evenly spaced from -0.5 to 0.5 along the body."""
SIDES = {"small": 96, "full": 512}
VENDORS = {"Aquila": (9.0, 0.16), "Boreal": (14.0, 0.24)}
"""Scanner -> standard deviation of the noise of CT in HU, and of PET as a share of the root of the SUV."""

_PSF = 0.035
"""Standard deviation of the blur of PET."""
_GRAIN = 0.012
"""Standard deviation of the blur of its noise."""
_LESION_SHARE, _BENIGN_SHARE, _NECROTIC_SHARE = 0.8, 0.5, 0.35
_AIR, _LUNG, _FAT, _MUSCLE, _BLOOD, _BONE = -1000.0, -780.0, -95.0, 52.0, 46.0, 420.0


@dataclass(frozen=True)
class Blob:
    """A roundish body with an uneven surface.

    Args:
        centre: (x, y, z).
        radius: Mean radius in its middle plane.
        half_height: Half of its extent along the body.
        waves: (amplitude, phase) of the unevenness with 2, 3, ... waves around.
        stretch: Radius along x over the one along y.
    """

    centre: tuple[float, float, float]
    radius: float
    half_height: float
    waves: tuple[tuple[float, float], ...] = ()
    stretch: float = 1.0

    def distance(self, x_HW: np.ndarray, y_HW: np.ndarray, z: float) -> np.ndarray:
        """Distance to the border within the plane ``z``, negative inside; everything is outside beyond its height."""
        height = 1.0 - ((z - self.centre[2]) / self.half_height) ** 2
        dx, dy = (x_HW - self.centre[0]) / self.stretch, y_HW - self.centre[1]
        if height <= 0:
            return np.full(x_HW.shape, 1.0)
        angle = np.arctan2(dy, dx)
        uneven = sum((a * np.cos(k * angle + p) for k, (a, p) in enumerate(self.waves, start=2)), np.zeros(x_HW.shape))
        return np.hypot(dx, dy) - self.radius * math.sqrt(height) * (1.0 + uneven)


@dataclass(frozen=True)
class CtPetPatient:
    """One invented patient: a pure function of seed and index."""

    seed: int
    index: int

    @property
    def patient(self) -> int:
        """Its number."""
        return self.index

    @property
    def patient_id(self) -> str:
        """As the file names have it."""
        return f"{self.index + 1:04d}"

    @property
    def case_id(self) -> str:
        """As progress shows it."""
        return f"patient_{self.patient_id}"

    @property
    def vendor(self) -> str:
        """Of its scanner."""
        return list(VENDORS)[int(self._rng("scanner").integers(len(VENDORS)))]

    @property
    def label(self) -> int:
        """1 with a tumour, else 0."""
        return int(self._rng("label").random() < _LESION_SHARE)

    @property
    def slices(self) -> tuple[int, ...]:
        """Numbers of its slices, as the file names have them."""
        return tuple(range(1, SLICES + 1))

    def file_name(self, number: int) -> str:
        """The one name of a slice in all three folders."""
        return f"{self.case_id}_slice_{number:03d}.png"

    def _rng(self, what: str, *more: object) -> np.random.Generator:
        return np.random.default_rng(seed_for(self.seed, "ct-pet", what, self.index, *more))


@dataclass(frozen=True)
class CtPetSlice:
    """What is measured in one plane.

    Args:
        ct_HW, pet_HW: uint8 grey values.
        mask_HW: uint8, 255 in the tumour, else 0.
    """

    ct_HW: np.ndarray
    pet_HW: np.ndarray
    mask_HW: np.ndarray


def plan_ct_pet(count: int, seed: int) -> list[CtPetPatient]:
    """The first ``count`` patients of the cohort of ``seed``."""
    return [CtPetPatient(seed, index) for index in range(count)]


def draw_ct_pet(patient: CtPetPatient, number: int, size: str = "small") -> CtPetSlice:
    """Measure one slice of a patient.

    Args:
        patient: Whose.
        number: One of its ``slices``.
        size: ``small`` (96 x 96 pixels) or ``full`` (512 x 512).
    """
    side = SIDES[size]
    z = (number - 1) / (SLICES - 1) - 0.5
    ticks = (np.arange(side) + 0.5) / side * 2 - 1
    y_HW, x_HW = np.meshgrid(ticks, ticks, indexing="ij")
    hu_HW, suv_HW, is_tumour_HW = _tissue(patient, x_HW, y_HW, z)
    noise_hu, noise_suv = VENDORS[patient.vendor]
    rng = patient._rng("noise", number, side)
    ct_HW = gaussian_filter(hu_HW, 0.006 * side / 2) + noise_hu * rng.standard_normal(hu_HW.shape)
    pet_HW = gaussian_filter(suv_HW, _PSF * side / 2)
    pet_HW += noise_suv * np.sqrt(np.maximum(pet_HW, 0)) * _grain(rng, side)
    mask_HW = np.where(is_tumour_HW, np.uint8(255), np.uint8(0))
    return CtPetSlice(_grey(ct_HW, CT_HU), _grey(pet_HW, PET_SUV), mask_HW)


def _tissue(
    patient: CtPetPatient, x_HW: np.ndarray, y_HW: np.ndarray, z: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(HU, SUV, tumour) of a plane, painted from the back to the front."""
    rng = patient._rng("anatomy")
    wide, deep = rng.uniform(0.78, 0.9), rng.uniform(0.55, 0.66)
    body = np.hypot(x_HW / wide, y_HW / deep)
    hu_HW = np.where(body < 1, _FAT, _AIR)
    suv_HW = np.where(body < 1, 0.3, 0.0)
    muscle = body < rng.uniform(0.88, 0.94)
    hu_HW, suv_HW = np.where(muscle, _MUSCLE, hu_HW), np.where(muscle, rng.uniform(0.6, 1.0), suv_HW)

    def paint(shape: Blob, hu: float, suv: float) -> np.ndarray:
        nonlocal hu_HW, suv_HW
        inside = (shape.distance(x_HW, y_HW, z) < 0) & (body < 1)
        hu_HW, suv_HW = np.where(inside, hu, hu_HW), np.where(inside, suv, suv_HW)
        return inside

    for place in (-0.42, 0.42):
        lung = Blob((place * wide, -0.05, 0.1), rng.uniform(0.3, 0.36), 0.9, _waves(rng), stretch=0.85)
        paint(lung, _LUNG, rng.uniform(0.3, 0.6))
    paint(Blob((0.0, 0.36, 0.0), 0.12, 9.0, _waves(rng)), _BONE, rng.uniform(0.8, 1.4))
    heart = Blob((rng.uniform(0.02, 0.14), -0.18, -0.35), rng.uniform(0.2, 0.26), 0.5, _waves(rng))
    paint(heart, _BLOOD + rng.uniform(8, 18), rng.uniform(3.0, 7.5))
    for place in (-0.3, 0.3):
        kidney = Blob((place, 0.3, 0.45), rng.uniform(0.09, 0.12), 0.3, _waves(rng))
        paint(kidney, rng.uniform(70, 110), rng.uniform(6.0, 16.0))
    mass_hu = _MUSCLE - rng.uniform(14, 24)
    benign, has_benign = _mass(rng, wide), rng.random() < _BENIGN_SHARE
    tumour, uptake = _mass(rng, wide), rng.uniform(4.0, 11.0)
    is_necrotic = rng.random() < _NECROTIC_SHARE
    if has_benign:
        paint(benign, mass_hu, rng.uniform(0.6, 1.2))
    is_tumour_HW = np.zeros(x_HW.shape, bool)
    if patient.label:
        is_tumour_HW = paint(tumour, mass_hu, uptake)
        if is_necrotic:
            core = Blob(tumour.centre, 0.5 * tumour.radius, 0.5 * tumour.half_height)
            paint(core, mass_hu - 18, 1.0)
    return hu_HW, suv_HW, is_tumour_HW


def _mass(rng: np.random.Generator, wide: float) -> Blob:
    """A tumour or a benign mass: both are drawn alike."""
    angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.35, 0.62)
    centre = (far * wide * math.cos(angle), 0.7 * far * math.sin(angle), rng.uniform(-0.3, 0.3))
    return Blob(centre, rng.uniform(0.1, 0.2), rng.uniform(0.25, 0.5), _waves(rng, 0.12), rng.uniform(0.8, 1.25))


def _waves(rng: np.random.Generator, amplitude: float = 0.05) -> tuple[tuple[float, float], ...]:
    return tuple((amplitude * rng.uniform(0.2, 1) / k, rng.uniform(0, 2 * math.pi)) for k in (1, 2, 3))


def _grain(rng: np.random.Generator, side: int) -> np.ndarray:
    """Noise of standard deviation 1 with the grain of a reconstruction."""
    grain = gaussian_filter(rng.standard_normal((side, side)), _GRAIN * side / 2, mode="wrap")
    return grain / grain.std()


def _grey(values_HW: np.ndarray, limits: Sequence[float]) -> np.ndarray:
    low, high = limits
    return np.rint(np.clip((values_HW - low) / (high - low), 0, 1) * 255).astype(np.uint8)
