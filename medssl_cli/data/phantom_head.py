"""A head as CT shows it: skull, brain, the spaces of the fluid, and bleeds of five kinds, each a function of position.

Positions are those of the head: origin at the third ventricle, axes R, A, S in mm. Bodies are told by their signed
distance in mm, negative inside, exact at the border and of first order around it; a smooth random displacement bends
them all together. Bleeds are laid over a head that was drawn without knowing of them.

Letters: Z Y X voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from medssl_cli.core.run import seed_for
from medssl_cli.data.phantom_anatomy import Ellipsoid, Waves

KINDS = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
"""Kinds of bleeding in the order of the label columns; the mask of kind i holds i + 1."""

AIR, SKIN, FAT, MUSCLE, FACE = -1000.0, 35.0, -95.0, 52.0, 38.0
FLUID, GREY, WHITE, FALX, SINUS_BLOOD = 8.0, 38.0, 29.0, 46.0, 48.0
OEDEMA, OLD_INFARCT = 20.0, 16.0

_BASE_MM = 5.0
_EDGE_MM = 1.5  # a crescent ends where it is thinner: a film below that is seen by no one and in no mask

_DISTENDED_MM = 1.5  # blood widens the spaces of the fluid on either side


@dataclass(frozen=True)
class Egg:
    """An ellipsoid that is wider behind than in front and longer downwards than up.

    Args:
        half: Half axes (R, A, S up) in mm.
        down: Half axis downwards in mm.
        taper: Share by which the front is narrower and the back wider than the middle.
    """

    half: tuple[float, float, float]
    down: float
    taper: float

    def distance(self, position_3ZYX: np.ndarray, inset_mm: float = 0.0) -> np.ndarray:
        """Signed distance in mm to the border moved inwards by ``inset_mm``."""
        r, a, s = position_3ZYX
        wide, long, up = (axis - inset_mm for axis in self.half)
        wide_here = wide * np.clip(1.0 - self.taper * a / long, 0.5, 1.5)
        high = np.where(s > 0, up, self.down - inset_mm)
        q = (r / wide_here, a / long, s / high)
        squared = q[0] ** 2 + q[1] ** 2 + q[2] ** 2
        slope = np.sqrt((q[0] / wide_here) ** 2 + (q[1] / long) ** 2 + (q[2] / high) ** 2)
        return (squared - 1.0) / (2.0 * np.maximum(slope, 0.3 / long))


@dataclass(frozen=True)
class Head:
    """One patient's head without any bleed.

    Args:
        skull: Outer border of the bone.
        bone_mm, scalp_mm: Thickness of the vault and of skin with fat.
        gap_mm: Fluid between bone and brain; wide in old age, and the furrows with it.
        ventricles: Their size, about 1.
        bone_hu: Of the outer and inner table.
        hu_shift: Calibration of tissues, in HU.
        bend, furrows, mottle: Random fields.
        calcified: Spots of chalk that look like small bleeds: plexus, pineal gland, falx.
        infarct: An old infarct, or None.
    """

    skull: Egg
    bone_mm: float
    scalp_mm: float
    gap_mm: float
    ventricles: float
    bone_hu: float
    hu_shift: float
    bend: tuple[Waves, Waves, Waves]
    furrows: Waves
    mottle: Waves
    calcified: tuple[tuple[Ellipsoid, float], ...]
    infarct: Ellipsoid | None

    @classmethod
    def draw(cls, seed: int, patient: int) -> Head:
        """The head of one patient: a pure function of the two numbers."""
        rng = np.random.default_rng(seed_for(seed, "head", patient))
        size = rng.uniform(0.95, 1.05)
        half = (rng.uniform(69, 75) * size, rng.uniform(87, 95) * size, rng.uniform(80, 88) * size)
        age = rng.uniform(0.0, 1.0)
        calcified = []
        for place, chance in (((17, -26, 10), 0.04), ((-17, -26, 10), 0.04), ((0, -17, 2), 0.04), ((0, 52, 38), 0.03)):
            shape = Ellipsoid(place, _three(rng, 1.5, 3.0))
            hu = rng.uniform(95, 190)
            if rng.random() < chance:
                calcified.append((shape, float(hu)))
        side = rng.choice((-1.0, 1.0))
        where = (side * rng.uniform(24, 46), rng.uniform(-45, 40), rng.uniform(2, 36))
        infarct = Ellipsoid(where, _three(rng, 6, 12))
        return cls(
            skull=Egg(half, 108 * size, rng.uniform(0.08, 0.15)),
            bone_mm=rng.uniform(5.0, 7.5),
            scalp_mm=rng.uniform(4.0, 8.0),
            gap_mm=1.4 + 1.8 * age,
            ventricles=rng.uniform(1.0, 1.15) + 0.35 * age,
            bone_hu=rng.uniform(1000, 1400),
            hu_shift=rng.normal(0, 0.8),
            bend=(Waves.draw(rng, 5, 110.0), Waves.draw(rng, 5, 110.0), Waves.draw(rng, 5, 110.0)),
            furrows=Waves.draw(rng, 16, 26.0),
            mottle=Waves.draw(rng, 16, 9.0),
            calcified=tuple(calcified),
            infarct=infarct if rng.random() < 0.1 else None,
        )


class Place:
    """What lies where on one set of planes: positions in the head, and the distances that several tissues share."""

    def __init__(self, head: Head, to_head: np.ndarray, shape: tuple[int, int, int], pixel_mm: float) -> None:
        self.head, self.to_head, self.shape, self.pixel_mm = head, to_head, shape, pixel_mm
        z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
        self.position_3ZYX = np.stack(
            [
                to_head[n, 0] * x + to_head[n, 1] * y + to_head[n, 2] * z + to_head[n, 3]
                + 1.8 * head.bend[n].on_grid(to_head, shape)
                for n in range(3)
            ]
        )  # fmt: skip

    @cached_property
    def mottle(self) -> np.ndarray:
        """Fine variation of a tissue, mean 0, SD 1."""
        return self.head.mottle.on_grid(self.to_head, self.shape)

    @cached_property
    def floor(self) -> np.ndarray:
        """Distance to the base of the skull, which falls in three steps from the forehead to the neck."""
        r, a, s = self.position_3ZYX
        middle = 1.0 / (1.0 + np.exp(-(a - 32) / 4.0))  # above it the frontal lobes rest on the orbits
        back = 1.0 / (1.0 + np.exp((a + 12) / 4.0))
        side = np.clip((np.abs(r) - 12) / 10, 0, 1)  # the sella stands between the temporal poles
        level = -30 - 16 * (1 - middle) * side - 34 * back + 6 * middle
        return level - s

    @cached_property
    def inside_skull(self) -> np.ndarray:
        """Distance to the inner table, negative in the cavity."""
        return np.maximum(self.head.skull.distance(self.position_3ZYX, self.head.bone_mm), self.floor)

    @cached_property
    def brain(self) -> np.ndarray:
        """Distance to the surface of the brain, furrows not counted."""
        return self.inside_skull + self.head.gap_mm

    @cached_property
    def ventricles(self) -> np.ndarray:
        """Distance to the nearest ventricle."""
        k = self.head.ventricles
        lateral = [
            Ellipsoid((side * x, a, s), (wide * k, deep, high * k), yaw_deg=side * yaw)
            for side in (-1, 1)
            for x, a, s, wide, deep, high, yaw in (
                (9, 27, 9, 4.6, 13, 9, 14),  # frontal horn
                (11, 2, 19, 5.6, 27, 6.5, -3),  # body
                (20, -31, 9, 6.6, 17, 9.5, -18),  # trigone and occipital horn
            )
        ]
        middle = [Ellipsoid((0, 2, 0), (2.4 * k, 13, 9)), Ellipsoid((0, -42, -38), (7 * k, 5 * k, 9))]
        return _union(self, [*lateral, *middle])

    @cached_property
    def furrows(self) -> np.ndarray:
        """Distance to the nearest furrow of the surface: sheets where a random field is 0, to a depth of 15 mm."""
        slope = 2 * math.pi / 26.0 / math.sqrt(1.5)  # of a field of SD 1, in 1/mm
        sheet = np.abs(self.head.furrows.on_grid(self.to_head, self.shape)) / slope - 0.55 * self.head.gap_mm
        return np.maximum(np.maximum(sheet, self.brain), -self.brain - 15.0)

    @cached_property
    def cisterns(self) -> np.ndarray:
        """Distance to the fissures and the cisterns at the base."""
        r = self.position_3ZYX[0]
        wide = 0.5 * self.head.gap_mm
        core = Ellipsoid((0, -6, 6), (60, 46, 30)).distance(self.position_3ZYX)
        between = np.maximum(np.maximum(np.abs(r) - wide, -core), -14 - self.position_3ZYX[2])
        bodies = [
            Ellipsoid((0, 13, -21), (12, 9, 6)),  # suprasellar
            Ellipsoid((0, 3, -34), (11, 4, 12)),  # before the pons
            Ellipsoid((0, -13, -15), (16, 14, 13), shell_mm=3.4),  # around the midbrain
            Ellipsoid((0, -28, -8), (9, 5, 5)),  # quadrigeminal
            Ellipsoid((0, -70, -52), (11, 7, 8)),  # magna
        ]
        for side in (-1, 1):
            bodies.append(Ellipsoid((side * 39, 7, 0), (wide + 1.0, 17, 12), yaw_deg=side * 8))  # over the insula
            bodies.append(Ellipsoid((side * 50, 8, -3), (13, wide + 0.9, 9), yaw_deg=-side * 12))  # Sylvian fissure
        return np.minimum(np.maximum(_union(self, bodies), self.inside_skull), np.maximum(between, self.inside_skull))

    @cached_property
    def subarachnoid(self) -> np.ndarray:
        """Distance to the fluid around the brain: the gap below the bone, furrows and cisterns."""
        gap = np.maximum(self.inside_skull, -self.brain)
        return np.minimum(np.minimum(gap, np.maximum(self.furrows, self.inside_skull)), self.cisterns)

    def share(self, distance_ZYX: np.ndarray) -> np.ndarray:
        """Share of each voxel, 0 to 1, that lies inside."""
        return np.clip(0.5 - distance_ZYX / self.pixel_mm, 0.0, 1.0)


def _three(rng: np.random.Generator, low: float, high: float) -> tuple[float, float, float]:
    x, y, z = rng.uniform(low, high, 3)
    return float(x), float(y), float(z)


def _union(place: Place, bodies: Sequence[Ellipsoid]) -> np.ndarray:
    nearest = bodies[0].distance(place.position_3ZYX)
    for body in bodies[1:]:
        nearest = np.minimum(nearest, body.distance(place.position_3ZYX))
    return nearest


# --- bleeds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bleed:
    """A bleed of one kind: fresh blood of ``hu`` where ``distance`` is negative."""

    kind: str
    hu: float

    def distance(self, place: Place) -> np.ndarray:
        """Signed distance in mm to the border of the blood."""
        raise NotImplementedError(self.kind)

    def oedema(self, place: Place) -> np.ndarray | None:
        """Distance to the swelling around it, if it has one."""
        return None


@dataclass(frozen=True)
class Lens(Bleed):
    """Epidural: a lens on the inner table, bounded by the bone outside and bulging into the brain."""

    shape: Ellipsoid

    def distance(self, place: Place) -> np.ndarray:
        """As ``Bleed.distance``."""
        return np.maximum(self.shape.distance(place.position_3ZYX), place.inside_skull + 0.3)


@dataclass(frozen=True)
class Crescent(Bleed):
    """Subdural: a layer along the inner table that thins out over a long way.

    Args:
        azimuth_deg: Of its middle, from the front to the patient's right.
        spread_deg: From the middle to where it ends.
        level_mm, height_mm: Middle and half height along S.
        thick_mm: In the middle.
    """

    azimuth_deg: float
    spread_deg: float
    level_mm: float
    height_mm: float
    thick_mm: float

    def distance(self, place: Place) -> np.ndarray:
        """As ``Bleed.distance``."""
        r, a, s = place.position_3ZYX
        turn = np.degrees(np.arctan2(r, a)) - self.azimuth_deg
        turn = (turn + 180.0) % 360.0 - 180.0
        away = (turn / self.spread_deg) ** 2 + ((s - self.level_mm) / self.height_mm) ** 2
        thick = self.thick_mm * np.clip(1.0 - away, -1.0, 1.0)
        sheet = np.maximum(-place.inside_skull - thick, place.inside_skull + 0.3)
        return np.maximum(sheet, _EDGE_MM - thick)


@dataclass(frozen=True)
class Film(Bleed):
    """Subarachnoid: blood in place of the fluid of furrows and cisterns within a region."""

    region: Ellipsoid

    def distance(self, place: Place) -> np.ndarray:
        """As ``Bleed.distance``."""
        return np.maximum(place.subarachnoid - _DISTENDED_MM, self.region.distance(place.position_3ZYX))


@dataclass(frozen=True)
class Clot(Bleed):
    """Intraparenchymal: a roundish clot within the brain, with a rim of oedema."""

    shape: Ellipsoid
    rim_mm: float

    def distance(self, place: Place) -> np.ndarray:
        """As ``Bleed.distance``."""
        rough = self.shape.distance(place.position_3ZYX) + 1.0 * np.clip(place.mottle, -2, 2)
        return np.maximum(rough, place.brain + 3.0)

    def oedema(self, place: Place) -> np.ndarray | None:
        """As ``Bleed.oedema``."""
        return np.maximum(self.shape.distance(place.position_3ZYX) - self.rim_mm, place.brain + 1.5)


@dataclass(frozen=True)
class Pool(Bleed):
    """Intraventricular: blood that has sunk to the back of the ventricles, up to a level.

    Args:
        level_mm: A coordinate up to which it stands; the patient lies on the back.
        sides: From and to which R coordinate: one ventricle or both.
    """

    level_mm: float
    sides: tuple[float, float]

    def distance(self, place: Place) -> np.ndarray:
        """As ``Bleed.distance``."""
        r, a, _ = place.position_3ZYX
        cut = np.maximum(np.maximum(self.sides[0] - r, r - self.sides[1]), a - self.level_mm)
        return np.maximum(place.ventricles, cut)


def draw_bleed(kind: str, head: Head, rng: np.random.Generator) -> Bleed:
    """A bleed of ``kind`` somewhere in ``head``; the number of draws is the same for every head."""
    hu = float(rng.uniform(66, 82))
    side = float(rng.choice((-1.0, 1.0)))
    u = rng.uniform(0, 1, 8)
    if kind == "epidural":
        return Lens(kind, hu, _on_inner_table(head, side * (35 + 85 * u[0]), -6 + 40 * u[1], u[2:]))
    if kind == "subdural":
        return Crescent(
            kind, hu, side * (70 + 40 * u[0]), 62 + 26 * u[1], 18 + 16 * u[2], 46 + 14 * u[3], 11 + 5 * u[4]
        )
    if kind == "subarachnoid":
        if u[0] < 0.5:  # an aneurysm: the basal cisterns and a Sylvian fissure
            return Film(kind, hu, Ellipsoid((side * 14, 8, -14), (38 + 10 * u[1], 34 + 8 * u[2], 22 + 8 * u[3])))
        place = (side * (30 + 16 * u[4]), -30 + 60 * u[5], 22 + 18 * u[6])  # over the convexity
        return Film(kind, hu, Ellipsoid(place, (30 + 8 * u[1], 34 + 10 * u[2], 24 + 8 * u[3])))
    if kind == "intraparenchymal":
        deep = u[0] < 0.5  # basal ganglia, else a lobe
        place = (side * (20 + 8 * u[4]), -8 + 22 * u[5], 4 + 8 * u[6]) if deep else (
            side * (28 + 12 * u[4]), -48 + 86 * u[5], 14 + 22 * u[6]
        )  # fmt: skip
        axes = (13 + 6 * u[1], 14 + 8 * u[2], 13 + 6 * u[3])
        return Clot(kind, hu, Ellipsoid(place, axes, yaw_deg=180 * float(u[7])), 3.5 + 3.0 * float(u[1]))
    sides = ((-60.0, 60.0), (-60.0, 60.0), (1.0, 60.0) if side > 0 else (-60.0, -1.0))[int(3 * u[0])]
    return Pool(kind, hu, -10 + 40 * float(u[1]), sides)


def _on_inner_table(head: Head, azimuth_deg: float, level_mm: float, u: np.ndarray) -> Ellipsoid:
    """A lens whose middle lies on the inner table, its short axis along the normal."""
    turn = math.radians(azimuth_deg)
    wide, long, up = (axis - head.bone_mm for axis in head.skull.half)
    low = max(0.1, 1 - (level_mm / (up if level_mm > 0 else head.skull.down)) ** 2) ** 0.5
    wide_here = wide * (1 - head.skull.taper * math.cos(turn))
    reach = low / math.hypot(math.sin(turn) / wide_here, math.cos(turn) / long)
    r, a = reach * math.sin(turn), reach * math.cos(turn)
    normal = math.degrees(math.atan2(a / long**2, r / wide_here**2))
    axes = (16 + 7 * float(u[0]), 27 + 11 * float(u[1]), 24 + 10 * float(u[2]))
    return Ellipsoid((r, a, level_mm), axes, yaw_deg=normal)


# --- painting --------------------------------------------------------------------------------------------------------


def paint(place: Place, bleeds: Sequence[Bleed]) -> tuple[np.ndarray, np.ndarray]:
    """What CT measures without noise.

    Returns:
        HU (Z, Y, X), and the share of each voxel that each bleed fills, (bleeds, Z, Y, X); where two overlap the later
        one has it.
    """
    hu = np.full(place.shape, AIR)
    _paint_shell(hu, place)
    _paint_brain(hu, place)
    shares = np.zeros((len(bleeds), *place.shape))
    for n, bleed in enumerate(bleeds):
        rim = bleed.oedema(place)
        if rim is not None:
            _over(hu, place.share(rim) * (1 - shares.sum(0)), OEDEMA)
        share = place.share(bleed.distance(place))
        shares[:n] *= 1 - share
        shares[n] = share
        _over(hu, share, bleed.hu + 2.5 * place.mottle)
    return hu, shares


def _over(hu: np.ndarray, share: np.ndarray, value: float | np.ndarray) -> None:
    hu += share * (value - hu)


def _paint_shell(hu: np.ndarray, place: Place) -> None:
    """Skin, fat, muscle, the vault with its spongy middle, and the face below the base."""
    head, p, share = place.head, place.position_3ZYX, place.share
    _over(hu, share(head.skull.distance(p, -head.scalp_mm)), SKIN)
    _over(hu, share(head.skull.distance(p, -head.scalp_mm + 2.0)), FAT + 6 * place.mottle)
    for side in (-1, 1):
        temple = Ellipsoid((side * (head.skull.half[0] + 1), 22, -22), (9, 30, 34), yaw_deg=side * 14)
        inside = np.maximum(temple.distance(p), head.skull.distance(p, -head.scalp_mm + 2.5))
        _over(hu, share(inside), MUSCLE + 3 * place.mottle)
    outer = head.skull.distance(p)
    _over(hu, share(outer), head.bone_hu)
    inner = head.skull.distance(p, head.bone_mm)
    spongy = np.maximum(outer + 0.33 * head.bone_mm, -inner + 0.33 * head.bone_mm)
    _over(hu, share(spongy), 0.55 * head.bone_hu)
    below = np.maximum(-place.floor + _BASE_MM, head.skull.distance(p, 9.0))
    _over(hu, share(below), FACE + 8 * place.mottle)
    _paint_face(hu, place)


def _paint_face(hu: np.ndarray, place: Place) -> None:
    """Orbits, sinuses and mastoid cells: they tell front from back and left from right."""
    p, share = place.position_3ZYX, place.share
    long = place.head.skull.half[1]
    for side in (-1, 1):
        orbit = Ellipsoid((side * 31, long - 26, -42), (17, 24, 16), yaw_deg=side * 20)
        _over(hu, share(orbit.distance(p) - 2.0), 900.0)
        _over(hu, share(orbit.distance(p)), -85.0)
        _over(hu, share(Ellipsoid((side * 31, long - 14, -43), (12, 12, 12)).distance(p)), 22.0)
        cells = Ellipsoid((side * 52, -26, -54), (11, 15, 13)).distance(p)
        _over(hu, share(cells), 500.0)
        _over(hu, share(np.maximum(cells + 2, 0.3 - 1.2 * place.mottle)), -700.0)
    for air in (Ellipsoid((0, long - 26, -42), (11, 20, 12)), Ellipsoid((0, 24, -46), (12, 11, 9))):
        _over(hu, share(air.distance(p) - 1.5), 700.0)
        _over(hu, share(air.distance(p)), -950.0)
    frontal = Ellipsoid((2, long - 5.5, -12), (14, 3.0, 10))
    _over(hu, share(frontal.distance(p)), -900.0)


def _paint_brain(hu: np.ndarray, place: Place) -> None:
    """Fluid, grey and white matter, deep nuclei, ventricles, falx, venous blood; then what is old or calcified."""
    head, p, share, shift = place.head, place.position_3ZYX, place.share, place.head.hu_shift
    mottle = 1.2 * place.mottle
    _over(hu, share(place.inside_skull), FLUID)
    _over(hu, share(place.brain), GREY + shift + mottle)
    ribbon = np.minimum(-place.brain, place.furrows)
    white = np.maximum(place.brain + 4.0, 3.4 - ribbon)
    _over(hu, share(white), WHITE + shift + mottle)
    nuclei = [Ellipsoid((0, -14, -22), (13, 12, 24))]  # the brain stem
    for side in (-1, 1):
        nuclei.append(Ellipsoid((side * 14, 20, 9), (4.5, 9, 9)))  # caudate
        nuclei.append(Ellipsoid((side * 25, 5, 3), (6.5, 15, 9), yaw_deg=side * 14))  # lentiform
        nuclei.append(Ellipsoid((side * 10, -11, 5), (8, 13, 9), yaw_deg=side * 20))  # thalamus
    _over(hu, share(np.maximum(_union(place, nuclei), place.brain)), GREY + shift + mottle)
    _over(hu, share(np.minimum(place.subarachnoid, np.maximum(place.ventricles, place.brain))), FLUID)
    _paint_base(hu, place)
    _paint_dura(hu, place)
    if head.infarct is not None:
        _over(hu, share(np.maximum(head.infarct.distance(p) + place.mottle, place.brain + 1)), OLD_INFARCT)
    for shape, value in head.calcified:
        _over(hu, share(shape.distance(p)), value)


def _paint_base(hu: np.ndarray, place: Place) -> None:
    """Petrous and sphenoid ridges, which stand into the cavity."""
    p, share, bone = place.position_3ZYX, place.share, place.head.bone_hu
    for side in (-1, 1):
        petrous = Ellipsoid((side * 36, -10, -42), (8, 26, 8), yaw_deg=side * 52)
        _over(hu, share(np.maximum(petrous.distance(p), place.head.skull.distance(p))), 0.9 * bone)
        wing = Ellipsoid((side * 36, 28, -26), (5, 22, 5), yaw_deg=side * 68)
        _over(hu, share(np.maximum(wing.distance(p), place.head.skull.distance(p))), 0.8 * bone)


def _paint_dura(hu: np.ndarray, place: Place) -> None:
    """The falx, and blood in the large sinuses, which is as dense as a thin bleed and always there."""
    p, share = place.position_3ZYX, place.share
    core = Ellipsoid((0, -2, -4), (60, 56, 46)).distance(p)
    falx = np.maximum(np.maximum(np.abs(p[0]) - 0.6, -core), np.maximum(place.inside_skull, -4 - p[2]))
    _over(hu, share(falx), FALX)
    rim = place.head.skull.distance(p, place.head.bone_mm)
    sagittal = np.maximum(
        np.maximum(np.abs(p[0]) - 3.5, -rim - 4.5), np.maximum(rim, np.maximum(p[1] + 20, -18 - p[2]))
    )
    across = np.maximum(np.maximum(-rim - 4.0, rim), np.maximum(np.abs(p[2] + 24) - 4.0, p[1] + 48))
    _over(hu, share(np.minimum(sagittal, across)), SINUS_BLOOD)
