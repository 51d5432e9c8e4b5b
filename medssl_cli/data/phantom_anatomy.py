"""A male pelvis as layered ellipsoids of tissue, and what a voxel grid sees of it.

Everything is a function of the position in mm, never of a voxel, so that T2, diffusion and masks on different grids
show one and the same body. Positions are those of the gland: its centre is the origin, axes R, A, S. Straight
ellipsoids look like geometry; a smooth random displacement bends them all together into something like a patient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medssl_cli.core.run import seed_for

SUB_SLICES = 3
"""Planes averaged over the thickness of a slice; within the plane the partial volume is analytic."""

_REACH_MM = 10.0  # displacement, roughness and edge together do not move a border further than this


@dataclass(frozen=True)
class Tissue:
    """What a voxel of one tissue emits at 3 T.

    Args:
        t2_ms: Transverse relaxation time, in ms.
        density: Proton density, water 1.
        adc: Apparent diffusion coefficient, in 1e-6 mm²/s.
        diffusion_share: Share of the signal left in diffusion images, small where fat suppression works.
        mottle: Relative SD of T2 within the tissue; the ADC varies half as much.
    """

    t2_ms: float
    density: float
    adc: float
    diffusion_share: float = 1.0
    mottle: float = 0.06


AIR = Tissue(1.0, 0.0, 1000, mottle=0.0)
FAT = Tissue(112, 0.95, 300, 0.045, mottle=0.07)
MUSCLE = Tissue(37, 0.85, 1350, mottle=0.08)
FASCIA = Tissue(30, 0.55, 1100, 0.6)
CORTEX = Tissue(12, 0.25, 600, 0.1)
MARROW = Tissue(78, 0.80, 400, 0.06, mottle=0.12)
URINE = Tissue(520, 1.0, 2900, mottle=0.0)
BOWEL_WALL = Tissue(58, 0.85, 1450)
STOOL = Tissue(48, 0.60, 1500, 0.5, mottle=0.25)
VEINS = Tissue(128, 0.90, 1900, 0.55, mottle=0.30)
SEMINAL = Tissue(190, 0.95, 1850, mottle=0.30)
CAPSULE = Tissue(40, 0.75, 1250)
PERIPHERAL = Tissue(150, 0.92, 1750, mottle=0.10)
TRANSITION = Tissue(88, 0.88, 1400, mottle=0.16)
FIBROMUSCULAR = Tissue(44, 0.82, 1200)
URETHRA = Tissue(140, 0.92, 1700)


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid, or a part of one.

    Args:
        centre, axes: (R, A, S) in mm.
        yaw_deg: Turn about S.
        shell_mm: Only a shell of this thickness on the border, 0 for the whole body.
        front_mm: Only what lies behind this A coordinate.
    """

    centre: tuple[float, float, float]
    axes: tuple[float, float, float]
    yaw_deg: float = 0.0
    shell_mm: float = 0.0
    front_mm: float = math.inf

    def distance(self, position_3ZYX: np.ndarray) -> np.ndarray:
        """Signed distance to the border in mm, negative inside; exact at the border, first order around it."""
        cos, sin = math.cos(math.radians(self.yaw_deg)), math.sin(math.radians(self.yaw_deg))
        r, a, s = (position_3ZYX[n] - self.centre[n] for n in range(3))
        q = ((cos * r + sin * a) / self.axes[0], (cos * a - sin * r) / self.axes[1], s / self.axes[2])
        squared = q[0] ** 2 + q[1] ** 2 + q[2] ** 2
        slope = np.sqrt(sum((part / axis) ** 2 for part, axis in zip(q, self.axes, strict=True)))
        distance = (squared - 1.0) / (2.0 * np.maximum(slope, 0.3 / max(self.axes)))
        if self.shell_mm:
            distance = np.abs(distance) - self.shell_mm / 2
        if math.isfinite(self.front_mm):
            distance = np.maximum(distance, position_3ZYX[1] - self.front_mm)
        return distance


@dataclass(frozen=True)
class Layer:
    """One tissue, painted over what lies there already.

    Args:
        roughness_mm: SD by which the border is frayed.
        within: The layer is cut off ``margin_mm`` inside this body.
    """

    shape: Ellipsoid
    tissue: Tissue
    roughness_mm: float = 0.0
    within: Ellipsoid | None = None
    margin_mm: float = 0.0


@dataclass(frozen=True)
class Waves:
    """A smooth random function of the position with mean 0 and SD 1: K plane waves added up."""

    waves_K3: np.ndarray
    phases_K: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, length_mm: float) -> Waves:
        """Waves of all directions, with lengths around ``length_mm``."""
        direction = rng.standard_normal((count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length = length_mm * np.exp(0.35 * rng.standard_normal((count, 1)))
        return cls(2 * np.pi * direction / length, rng.uniform(0, 2 * np.pi, count))

    def on_grid(self, to_body: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
        """(Z, Y, X) values; ``to_body`` is 4x4, voxel (x, y, z, 1) -> mm."""
        z, y, x = (np.arange(n, dtype=np.float64) for n in shape)
        step_K3 = self.waves_K3 @ to_body[:3, :3]
        start_K = self.waves_K3 @ to_body[:3, 3] + self.phases_K
        total = np.zeros(shape)
        # Element by element rather than as a matrix product, whose last bits depend on the number of threads.
        for (kx, ky, kz), start in zip(step_K3, start_K, strict=True):
            plane = (start + kz * z)[:, None] + (ky * y)[None, :]
            total += np.cos(plane)[..., None] * np.cos(kx * x)
            total -= np.sin(plane)[..., None] * np.sin(kx * x)
        return total * math.sqrt(2 / len(self.phases_K))


@dataclass(frozen=True)
class Finding:
    """A lesion, or a benign place that looks like one on T2."""

    shape: Ellipsoid
    tissue: Tissue
    zone: str


@dataclass(frozen=True)
class Anatomy:
    """One patient: layers from the back to the front, and the random fields that make them uneven."""

    gland: Ellipsoid
    layers: tuple[Layer, ...]
    bend: tuple[Waves, Waves, Waves]
    mottle: Waves
    lesion: Layer | None = None
    bend_mm: float = 1.6

    def with_findings(self, findings: Sequence[Finding], lesion: Finding | None) -> Anatomy:
        """The same patient with benign findings, and with or without a lesion."""
        layers = [*self.layers, *(self._inside_gland(finding) for finding in findings)]
        painted = None if lesion is None else self._inside_gland(lesion)
        return replace(self, layers=tuple(layers if painted is None else [*layers, painted]), lesion=painted)

    def _inside_gland(self, finding: Finding) -> Layer:
        return Layer(finding.shape, finding.tissue, roughness_mm=0.7, within=self.gland, margin_mm=1.0)


Emission = Callable[[Tissue, np.ndarray], np.ndarray]
"""Tissue, mottle factor (Z, Y, X) -> signal (C, Z, Y, X)."""


def draw_anatomy(seed: int, patient: int) -> Anatomy:
    """The healthy pelvis of one patient: a pure function of the two numbers."""
    rng = np.random.default_rng(seed_for(seed, "anatomy", patient))
    half = (_between(rng, 20.5, 27.0), _between(rng, 14.0, 19.5), _between(rng, 16.5, 22.0))
    gland = Ellipsoid((0.0, 0.0, 0.0), half, yaw_deg=_between(rng, -4, 4))
    layers = (
        _pelvic_wall(rng)
        + _floor_and_rectum(rng, half)
        + _bladder_and_vesicles(rng, half)
        + _vessels(rng, half)
        + _prostate(rng, gland)
    )
    bend = tuple(Waves.draw(rng, 6, 55.0) for _ in range(3))
    return Anatomy(gland, tuple(layers), (bend[0], bend[1], bend[2]), Waves.draw(rng, 28, 6.5))


def draw_finding(
    rng: np.random.Generator, anatomy: Anatomy, tissue: Tissue, radius_mm: float, side: int, zone: str
) -> Finding:
    """A roundish place in ``zone`` (``peripheral`` or ``transition``) on one side: -1 left, 1 right."""
    wide, deep, high = anatomy.gland.axes
    height = _between(rng, -0.4, 0.4) * high
    if zone == "peripheral":
        angle = _between(rng, math.radians(15), math.radians(68))  # from straight back to the side
        centre = (side * 0.70 * wide * math.sin(angle), -0.70 * deep * math.cos(angle), height)
    else:
        centre = (side * _between(rng, 0.25, 0.5) * wide, _between(rng, 0.0, 0.5) * deep, height)
    stretch = np.exp(0.12 * rng.standard_normal(3))
    axes = radius_mm * stretch / np.prod(stretch) ** (1 / 3)
    shape = Ellipsoid(centre, (float(axes[0]), float(axes[1]), float(axes[2])), yaw_deg=_between(rng, 0, 180))
    return Finding(shape, tissue, zone)


def render(
    anatomy: Anatomy,
    to_body: np.ndarray,
    shape: tuple[int, int, int],
    pixel_mm: float,
    thickness_share: float,
    emission: Emission,
) -> np.ndarray:
    """Noise-free signal (C, Z, Y, X) of a grid.

    Args:
        to_body: 4x4, voxel (x, y, z, 1) -> mm in the gland's axes.
        pixel_mm: In-plane voxel size: width over which borders fade.
        thickness_share: Slice thickness over slice spacing.
        emission: Signal of a tissue.
    """
    total: np.ndarray | None = None
    for offset in _sub_slices(thickness_share):
        canvas = _Canvas(anatomy, _shifted(to_body, offset), shape, pixel_mm)
        signal = emission(FAT, 1.0 + FAT.mottle * canvas.mottle)
        for layer in anatomy.layers:
            canvas.paint(signal, layer, emission)
        total = signal if total is None else total + signal
    assert total is not None
    return total / SUB_SLICES


def occupied(
    anatomy: Anatomy,
    to_body: np.ndarray,
    shape: tuple[int, int, int],
    pixel_mm: float,
    thickness_share: float,
    layer: Layer,
) -> np.ndarray:
    """Boolean mask (Z, Y, X) of the voxels that belong to ``layer`` by half or more."""
    total = np.zeros(shape)
    for offset in _sub_slices(thickness_share):
        canvas = _Canvas(anatomy, _shifted(to_body, offset), shape, pixel_mm)
        window, share = canvas.share(layer)
        total[window] += share
    return total >= SUB_SLICES / 2


class _Canvas:
    """Positions and random fields of one set of planes."""

    def __init__(self, anatomy: Anatomy, to_body: np.ndarray, shape: tuple[int, int, int], pixel_mm: float) -> None:
        self.to_body, self.shape, self.pixel_mm = to_body, shape, pixel_mm
        self.mottle = anatomy.mottle.on_grid(to_body, shape)
        z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
        self.position = np.stack(
            [
                to_body[n, 0] * x + to_body[n, 1] * y + to_body[n, 2] * z + to_body[n, 3]
                + anatomy.bend_mm * anatomy.bend[n].on_grid(to_body, shape)
                for n in range(3)
            ]
        )  # fmt: skip

    def paint(self, signal: np.ndarray, layer: Layer, emission: Emission) -> None:
        window, share = self.share(layer)
        if share.size and share.any():
            there = signal[:, window[0], window[1], window[2]]
            factor = 1.0 + layer.tissue.mottle * self.mottle[window]
            there += share * (emission(layer.tissue, np.maximum(factor, 0.3)) - there)

    def share(self, layer: Layer) -> tuple[tuple[slice, slice, slice], np.ndarray]:
        """Window of the grid that can hold the layer, and its share of each voxel there, 0 to 1."""
        window = self._window(layer.shape)
        position = self.position[:, window[0], window[1], window[2]]
        distance = layer.shape.distance(position)
        if layer.roughness_mm:
            distance = distance + layer.roughness_mm * np.clip(self.mottle[window], -2.5, 2.5)
        if layer.within is not None:
            distance = np.maximum(distance, layer.within.distance(position) + layer.margin_mm)
        return window, np.clip(0.5 - distance / self.pixel_mm, 0.0, 1.0)

    def _window(self, shape: Ellipsoid) -> tuple[slice, slice, slice]:
        wide, deep, high = shape.axes
        if shape.yaw_deg:
            wide = deep = max(wide, deep)
        half = np.array([wide, deep, high]) + shape.shell_mm / 2 + _REACH_MM
        to_voxel = np.linalg.inv(self.to_body)
        centre = to_voxel[:3, :3] @ np.array(shape.centre) + to_voxel[:3, 3]
        reach = np.abs(to_voxel[:3, :3]) @ half
        low = np.maximum(0, np.floor(centre - reach)).astype(int)[::-1]
        high_end = np.maximum(low, np.ceil(centre + reach).astype(int)[::-1] + 1)
        z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high_end, strict=True))
        return z, y, x


def _sub_slices(thickness_share: float) -> np.ndarray:
    return ((np.arange(SUB_SLICES) + 0.5) / SUB_SLICES - 0.5) * thickness_share


def _shifted(to_body: np.ndarray, slices: float) -> np.ndarray:
    moved = to_body.copy()
    moved[:3, 3] += slices * to_body[:3, 2]
    return moved


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


# --- parts of the pelvis, from the back to the front -----------------------------------------------------------------


def _pelvic_wall(rng: np.random.Generator) -> list[Layer]:
    size = _between(rng, 0.94, 1.08)
    layers = [
        Layer(Ellipsoid((0, 118 * size, 0), (150, 26, 200)), Tissue(105, 0.9, 260, 0.08, mottle=0.14)),  # skin fat
        Layer(Ellipsoid((0, 88 * size, 20), (42, 9, 60)), MUSCLE),  # rectus abdominis
        Layer(Ellipsoid((0, -72 * size, 4), (11, 9, 30)), CORTEX),  # coccyx
        Layer(Ellipsoid((0, -72 * size, 4), (8, 6, 28)), MARROW),
    ]
    for side in (-1, 1):
        yaw = -side * _between(rng, 12, 18)
        layers += [
            Layer(Ellipsoid((side * 52 * size, -82 * size, -5), (44, 22, 80), side * 18), MUSCLE, 1.0),  # gluteus
            *_bone(Ellipsoid((side * 84 * size, 12, 6), (30, 34, 60))),  # hip bone
            Layer(Ellipsoid((side * 94 * size, 10, 6), (25.5, 25.5, 27)), FASCIA),  # joint
            *_bone(Ellipsoid((side * 94 * size, 10, 6), (23.5, 23.5, 25))),  # femoral head
            *_bone(Ellipsoid((side * 24 * size, 47 * size, -8), (24, 9, 17), -side * 24)),  # pubis
            Layer(Ellipsoid((side * 47 * size, 2, 2), (8.5, 42, 70), yaw), MUSCLE, 0.5),  # obturator internus
            Layer(Ellipsoid((side * 62 * size, 52 * size, 0), (22, 10, 40), side * 20), MUSCLE, 0.7),
            Layer(Ellipsoid((side * 76 * size, 66 * size, 0), (6, 6, 90)), FASCIA),  # femoral vessels: flow void
        ]
    return [*layers, Layer(Ellipsoid((0, 47 * size, -8), (2.6, 9, 15)), FASCIA)]  # symphysis


def _bone(outer: Ellipsoid) -> list[Layer]:
    inner = replace(outer, axes=(outer.axes[0] - 2.0, outer.axes[1] - 2.0, outer.axes[2] - 2.0))
    return [Layer(outer, CORTEX), Layer(inner, MARROW)]


def _floor_and_rectum(rng: np.random.Generator, half: tuple[float, float, float]) -> list[Layer]:
    wide, deep, high = half
    radius = _between(rng, 11.0, 16.0)
    centre = (_between(rng, -3, 3), -deep - radius - _between(rng, 0.5, 2.0), 0.0)
    lumen = (radius - 3.2, (radius - 3.2) * _between(rng, 0.7, 1.0), 80.0)
    floor = Ellipsoid((0, -14, -14), (wide + 9, deep + 30, 46), shell_mm=3.6, front_mm=6)
    return [
        Layer(floor, MUSCLE, 0.4),  # levator ani
        Layer(Ellipsoid((0, 1, -high - 9), (11, 10, 11)), MUSCLE, 0.4),  # sphincter below the apex
        Layer(Ellipsoid((0, 1, -high - 9), (3.5, 3.5, 12)), URETHRA),
        Layer(Ellipsoid(centre, (radius, radius, 80)), BOWEL_WALL, 0.3),
        Layer(Ellipsoid(centre, lumen), STOOL if rng.random() < 0.35 else AIR),
    ]


def _bladder_and_vesicles(rng: np.random.Generator, half: tuple[float, float, float]) -> list[Layer]:
    _, deep, high = half
    wall = _between(rng, 2.5, 4.5)
    axes = (_between(rng, 26, 38), _between(rng, 18, 26), _between(rng, 16, 24))
    centre = (_between(rng, -3, 3), _between(rng, 8, 14), high + axes[2] - 4)
    inner = (axes[0] - wall, axes[1] - wall, axes[2] - wall)
    layers = [Layer(Ellipsoid(centre, axes), MUSCLE), Layer(Ellipsoid(centre, inner), URINE)]
    for side in (-1, 1):
        place = (side * _between(rng, 13, 18), -0.75 * deep, high + _between(rng, 1, 4))
        layers.append(Layer(Ellipsoid(place, (15, 5.5, 7), side * 12), SEMINAL, 0.6))
    return layers


def _vessels(rng: np.random.Generator, half: tuple[float, float, float]) -> list[Layer]:
    wide, deep, high = half
    layers = [Layer(Ellipsoid((0, deep + 3, -2), (11, 3.6, 0.8 * high)), VEINS, 1.2)]  # dorsal venous complex
    for side in (-1, 1):
        for _ in range(3):
            place = (
                side * (wide + _between(rng, 0, 4)),
                _between(rng, -0.8, 0.2) * deep,
                _between(rng, -0.7, 0.7) * high,
            )
            layers.append(Layer(Ellipsoid(place, (2.6, 4.0, 9.0)), VEINS, 0.8))
    return layers


def _prostate(rng: np.random.Generator, gland: Ellipsoid) -> list[Layer]:
    wide, deep, high = gland.axes
    inner = replace(gland, axes=(wide - 0.9, deep - 0.9, high - 0.9))
    growth = _between(rng, 0.72, 1.0)  # benign hyperplasia
    layers = [
        Layer(gland, CAPSULE),
        Layer(inner, _varied(rng, PERIPHERAL, 0.08)),
        Layer(
            Ellipsoid((0, 0.78 * deep, 0.1 * high), (0.45 * wide, 0.3 * deep, 0.75 * high)), FIBROMUSCULAR, 0.5, inner
        ),
    ]
    lobes = []
    for side in (-1, 1):
        uneven = growth * _between(rng, 0.9, 1.1)
        axes = (0.44 * wide * uneven, 0.56 * deep * uneven, 0.66 * high * uneven)
        lobes.append(Ellipsoid((side * 0.36 * wide * growth, 0.24 * deep, 0.12 * high), axes, -side * 8))
    for lobe in lobes:
        layers.append(Layer(lobe, CAPSULE, 0.4, inner, 0.6))
    stroma = _varied(rng, TRANSITION, 0.08)
    for lobe in lobes:
        core = replace(lobe, axes=(lobe.axes[0] - 0.9, lobe.axes[1] - 0.9, lobe.axes[2] - 0.9))
        layers.append(Layer(core, stroma, 0.4, inner, 0.6))
    for lobe in lobes:
        layers += _nodules(rng, lobe)
    return [*layers, Layer(Ellipsoid((0, -0.12 * deep, 0), (2.4, 2.8, 0.8 * high)), URETHRA, 0.3, inner)]


def _nodules(rng: np.random.Generator, lobe: Ellipsoid) -> list[Layer]:
    """Nodules of hyperplasia: glandular ones are bright, stromal ones dark with an ADC well above a lesion's."""
    layers: list[Layer] = []
    for _ in range(int(rng.integers(2, 5))):
        place = [c + _between(rng, -0.55, 0.55) * a for c, a in zip(lobe.centre, lobe.axes, strict=True)]
        radius = _between(rng, 2.6, 4.8)
        shape = Ellipsoid((place[0], place[1], place[2]), (radius, radius, radius * _between(rng, 0.9, 1.3)))
        if rng.random() < 0.5:
            core = replace(shape, axes=(radius - 0.8, radius - 0.8, radius - 0.8))
            layers.append(Layer(shape, CAPSULE, 0.2, lobe))
            layers.append(Layer(core, Tissue(_between(rng, 115, 150), 0.9, _between(rng, 1550, 1750)), 0.2, lobe))
        else:
            layers.append(Layer(shape, Tissue(_between(rng, 52, 66), 0.86, _between(rng, 1120, 1280)), 0.3, lobe))
    return layers


def _varied(rng: np.random.Generator, tissue: Tissue, share: float) -> Tissue:
    by = 1 + share * float(np.clip(rng.standard_normal(), -2, 2))
    return replace(tissue, t2_ms=tissue.t2_ms * by, adc=tissue.adc * (1 + (by - 1) / 2))
