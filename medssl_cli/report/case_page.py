"""The page of one case: what a head says, a viewer with the heat map as a layer, the best slices, patch similarity.

Planes of a volume are turned to the way they are read: the patient's right on the left, anterior up.

Letters: Z slices, S sequences, H W pixels of a slice, h w patches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medssl_cli.core.run import RESEARCH_NOTE
from medssl_cli.report.grey_values import Greys, Window, fitting_side, levels, measured, packed, reduced
from medssl_cli.report.labels import Labels, label_layers, painted
from medssl_cli.report.overlay import blend, jpeg_bytes, montage, png_bytes, resized, window
from medssl_cli.report.page import Page
from medssl_cli.report.strip import Strip
from medssl_cli.report.verdict import Finding as Finding
from medssl_cli.report.verdict import Flag as Flag
from medssl_cli.report.verdict import Verdict as Verdict
from medssl_cli.report.verdict import add_flags, add_verdict
from medssl_cli.report.viewer import Layer, Stack, Structure, Thumbnail, ViewerSlice, add_viewer

VIEWER_SLICES = 64
"""Slices in the viewer at most, evenly spaced, the best always among them: keeps the page below some ten MB."""
VIEWER_PICTURES = 192
"""Slices times sequences at most, but no fewer than ``LEAST_SLICES`` slices."""
LEAST_SLICES = 16
VIEWER_SIDE = 512
FALLBACK_SIDE = 384
"""Pictures beside measured values: seen without scripts only."""
TILE_SIDE = 320
THUMBNAIL_SIDE = 168
SIMILARITY_SIDE = 384
_LAYER_SIDE = 112
LABEL_SIDE = 1024
"""Label maps with a longer side are shown with fewer pixels."""
_HEAT_QUANTILES = (0.5, 0.999)
_BAR = 256
_FLAT_SPAN = 0.05


@dataclass(frozen=True)
class Heat:
    """A heat map, one value a patch.

    Args:
        grid_Zhw: All slices.
        unit: What its numbers are, e.g. ``× average``.
        definition: What it shows, in a sentence.
        top: The hottest slices, best first: dictionaries with ``rank``, ``slice_index``, ``score``.
    """

    grid_Zhw: np.ndarray
    unit: str
    definition: str
    top: tuple[dict[str, Any], ...]

    @functools.cached_property
    def limits(self) -> tuple[float, float]:
        """Values that are shown as nothing and as the hottest colour, over the whole case."""
        low, high = np.quantile(self.grid_Zhw, _HEAT_QUANTILES)
        return float(low), float(high)

    @property
    def is_flat(self) -> bool:
        """Whether the colours span so little that they should not be made much of."""
        low, high = self.limits
        return high - low < _FLAT_SPAN

    def unit_hw(self, z: int) -> np.ndarray:
        """Heat of a slice, from 0 to 1."""
        low, high = self.limits
        return np.clip((self.grid_Zhw[z] - low) / max(high - low, 1e-12), 0, 1)


@dataclass(frozen=True)
class CasePictures:
    """The slices of a case as pictures.

    Args:
        names: Sequences that exist, in channel order.
        plane: Index of a slice to (S, H, W) in [0, 1].
        count: Slices.
        spacing: Pixel size (y, x) in mm.
        orientation: Where the voxel axes point to, e.g. ``RAS``; None for a photograph, which is shown as it is.
        colour: The channels of a plane are colours of one picture, not sequences.
        heat: The heat map, if there is one.
        stored: Index of a slice to its measured values, (S, H, W) in ``value_unit``; with them the page can window what
            was measured. None: the pictures alone.
        value_unit: ``HU`` brings the windows of a CT.
        window_presets: Windows of the values, the first one shown at the start; empty for those of the unit.
        stored_names: Names of the S stored sequences, if they are not ``names`` (several windows of one CT).
        labels: The label map, if there is one, on the pixels of ``plane``.
    """

    names: tuple[str, ...]
    plane: Callable[[int], np.ndarray]
    count: int
    spacing: tuple[float, float]
    orientation: str | None
    colour: bool
    heat: Heat | None = None
    stored: Callable[[int], np.ndarray] | None = None
    value_unit: str = ""
    window_presets: tuple[Window, ...] = ()
    stored_names: tuple[str, ...] = ()
    labels: Labels | None = None

    @property
    def shown_names(self) -> tuple[str, ...]:
        """Sequences that the viewer offers."""
        return self.names if self.stored is None else self.stored_names or self.names

    def turned(self, map_HW: np.ndarray) -> np.ndarray:
        """A plane as it is read: the patient's right on the left, anterior up."""
        if self.orientation is None:
            return map_HW
        rows = slice(None, None, -1 if self.orientation[1] == "A" else 1)
        columns = slice(None, None, -1 if self.orientation[0] == "R" else 1)
        return map_HW[rows, columns]

    def pictures(self, z: int) -> list[np.ndarray]:
        """One picture (H, W, 3) for each sequence, turned; a photograph is one picture."""
        plane = self.plane(z)
        if self.colour and len(plane) == 3:
            return [np.rint(255 * plane.transpose(1, 2, 0)).astype(np.uint8)]
        return [window(self.turned(channel), 0.0, 1.0) for channel in plane]

    @functools.cached_property
    def greys(self) -> tuple[Greys, ...]:
        """What the measured values of each sequence span; empty without them, and for colours."""
        if self.stored is None or (self.colour and not self._is_grey):
            return ()
        channels = len(self.values(0))
        if channels != len(self.shown_names):
            raise ValueError(f"{channels} sequences are stored, {len(self.shown_names)} have names")
        return tuple(
            measured((self.values(z)[s] for z in range(self.count)), self.value_unit, self.window_presets)
            for s in range(channels)
        )

    @functools.cached_property
    def _is_grey(self) -> bool:
        """Whether the colours of every slice are one and the same: a volume before a network that takes colours."""
        stored = self.stored
        return stored is not None and all((stored(z) == stored(z)[:1]).all() for z in range(self.count))

    def values(self, z: int) -> np.ndarray:
        """(S, H, W) measured values of a slice, one channel of a grey one in colours."""
        if self.stored is None:
            raise ValueError("there are no measured values")
        return self.stored(z)[:1] if self.colour else self.stored(z)

    def shown(self, z: int) -> list[np.ndarray]:
        """One picture (H, W, 3) for each sequence of the viewer: windowed as it starts."""
        if not self.greys:
            return self.pictures(z)
        return [
            window(self.turned(channel), *greys.windows[0].ends)
            for channel, greys in zip(self.values(z), self.greys, strict=True)
        ]

    def picture_size(self, side: int) -> tuple[int, int]:
        """(height, width) in square pixels with the longer one ``side``."""
        height, width = self.plane(0).shape[-2:]
        height_mm, width_mm = height * self.spacing[0], width * self.spacing[1]
        scale = side / max(height_mm, width_mm)
        return max(1, round(height_mm * scale)), max(1, round(width_mm * scale))

    def label(self, z: int) -> str:
        """What a slice is called: counted from 1."""
        return f"slice {z + 1} of {self.count}" if self.orientation is not None or self.count > 1 else "picture"


# --- pictures that are files -----------------------------------------------------------------------------------------


def heat_picture(pictures: CasePictures) -> np.ndarray:
    """The hottest slices, above as they are, below with the heat laid over, and what the colours mean."""
    heat = _heat_of(pictures)
    height, width = pictures.picture_size(TILE_SIDE)
    plain, warm = [], []
    for entry in heat.top:
        z = entry["slice_index"]
        picture = resized(pictures.shown(z)[0], height, width)
        plain.append(captioned(picture, f"{pictures.label(z)}"))
        warm.append(captioned(_laid_over(picture, pictures, z), f"{entry['score']:.4g} {heat.unit}"))
    tiles = montage([*plain, *warm], columns=len(plain))
    return np.vstack([tiles, _legend(tiles.shape[1], heat)])


def similarity_picture(similarity_hw: np.ndarray, pictures: CasePictures) -> np.ndarray:
    """The similarity map in viridis, its smallest value dark, 1 bright; one square a patch."""
    height, width = pictures.picture_size(SIMILARITY_SIDE)
    return resized(_viridis(pictures.turned(similarity_hw)), height, width, smooth=False)


def _heat_of(pictures: CasePictures) -> Heat:
    if pictures.heat is None:
        raise ValueError("there is no heat map to draw")
    return pictures.heat


def _laid_over(picture: np.ndarray, pictures: CasePictures, z: int) -> np.ndarray:
    unit = _smooth(pictures.turned(_heat_of(pictures).unit_hw(z)), *picture.shape[:2])
    return blend(picture, unit, 0.75 * unit)


def _smooth(unit_hw: np.ndarray, height: int, width: int) -> np.ndarray:
    grid = Image.fromarray(np.ascontiguousarray(unit_hw, np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BILINEAR))


def _viridis(similarity_hw: np.ndarray) -> np.ndarray:
    low = float(similarity_hw.min())
    unit = (similarity_hw - low) / max(1.0 - low, 1e-12)
    return blend(np.zeros((*unit.shape, 3), np.uint8), unit, 1.0, colormap="viridis")


def captioned(picture: np.ndarray, text: str) -> np.ndarray:
    """The picture with a line of text below it."""
    strip = written(picture.shape[1], 24, [(picture.shape[1] // 2, "ma", text)])
    return np.vstack([picture, strip])


def _legend(width: int, heat: Heat) -> np.ndarray:
    """A strip with the colour bar and the numbers at its ends."""
    low, high = heat.limits
    bar_width = min(_BAR, width // 2)
    left = (width - bar_width) // 2
    texts = [(left - 8, "ra", f"≤ {low:.4g}"), (left + bar_width + 8, "la", f"≥ {high:.4g} {heat.unit}")]
    strip = written(width, 34, texts)
    unit = np.broadcast_to(np.linspace(0, 1, bar_width), (14, bar_width))
    strip[6:20, left : left + bar_width] = blend(np.full((14, bar_width, 3), 60, np.uint8), unit, unit)
    return strip


def written(width: int, height: int, texts: Sequence[tuple[int, str, str]]) -> np.ndarray:
    """A black strip with (x, anchor, text) in it."""
    strip = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(strip)
    for x, anchor, text in texts:
        draw.text((x, 4), text, fill=(225, 225, 225), anchor=anchor, font=_font())
    return np.array(strip)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 14)


# --- the page --------------------------------------------------------------------------------------------------------


def case_page(
    case_id: str,
    pictures: CasePictures,
    *,
    similarity_hw: np.ndarray | None,
    similarity_slice: int,
    reference_patch: tuple[int, int],
    missing: Sequence[str],
    facts: Mapping[str, str],
    verdict: Verdict | None = None,
    flags: Sequence[Flag] = (),
) -> Page:
    """The report of one case.

    Args:
        case_id: Heading.
        pictures: Its slices.
        similarity_hw: Cosine of every patch with the reference patch; None leaves the section out.
        similarity_slice: On which slice.
        reference_patch: (row, column) of that patch.
        missing: Sequences of the model that the case lacks.
        facts: Provenance.
        verdict: What a head says of it; None without a head.
        flags: What its reader has to know.
    """
    page = Page(f"Case {case_id}", _lead(verdict))
    page.note(RESEARCH_NOTE, "warning")
    if missing and verdict is None:  # under a head a flag tells, which knows what the head has seen
        page.note(f"Missing: {', '.join(missing)}. Mask tokens stand in, as in training.", "info")
    add_flags(page, flags)
    if verdict is not None:
        page.heading("Values" if verdict.is_regression else "Findings")
        add_verdict(page, verdict)
    page.heading("Slices" if pictures.count > 1 else "Picture")
    heat = pictures.heat
    page.text(heat.definition if heat else "No heat map was asked for; --heatmap adds one.")
    if heat is not None and heat.is_flat:
        low, high = heat.limits
        page.note(f"The map is nearly even: its colours span only {low:.4g} to {high:.4g} {heat.unit}.", "info")
    by_score = verdict is not None and bool(verdict.top_slices)
    title = "Slices with the highest scores" if by_score else "Hottest slices"
    add_slices(page, pictures, _best(pictures, verdict), title=title, strip=_strip(verdict))
    if similarity_hw is not None:
        _add_similarity(page, pictures, similarity_hw, similarity_slice, reference_patch)
    page.heading("Provenance")
    page.facts(facts)
    return page


def _lead(verdict: Verdict | None) -> str:
    if verdict is None:
        return "Seen through a self-supervised backbone. It was never told what disease looks like."
    return f"What a trained head says of it: {verdict.head}."


def _add_similarity(
    page: Page, pictures: CasePictures, similarity_hw: np.ndarray, z: int, patch: tuple[int, int]
) -> None:
    page.heading("Patch similarity")
    page.figure(
        _similarity_pair(pictures, similarity_hw, z, patch),
        f"{pictures.label(z).capitalize()}. Left: the reference patch, row {patch[0]}, column {patch[1]}. "
        f"Right: cosine of every patch with it, from {similarity_hw.min():.2f} (dark) to 1 (bright). It shows what "
        "looks alike to the network; it is no map of lesions.",
        alt="reference patch on its slice, and the map of similarity to it",
    )


def add_slices(
    page: Page,
    pictures: CasePictures,
    best: Sequence[tuple[int, str]],
    *,
    title: str,
    strip: Strip | None = None,
) -> None:
    """Put the viewer with its thumbnails into the page.

    Args:
        page: Where.
        pictures: What.
        best: Slices to look at first, with what their thumbnails say; the first one is shown at the start.
        title: Above the thumbnails.
        strip: A chart along the slices.
    """
    top = [z for z, _ in best]
    first = top[0] if top else pictures.count // 2
    room = max(LEAST_SLICES, min(VIEWER_SLICES, VIEWER_PICTURES // len(pictures.shown_names)))
    even = np.linspace(0, pictures.count - 1, min(pictures.count, room)).round().astype(int)
    chosen = sorted({int(z) for z in even} | set(top) | {first})
    if len(chosen) < pictures.count:
        page.text(
            f"{len(chosen)} of {pictures.count} slices are in this page, evenly spaced, the best ones among them."
        )
    height, width = pictures.picture_size(1000)
    side = _grey_side(pictures, chosen)
    if pictures.greys and side is None:
        page.text(
            "The measured values would make this page too large: the slices are pictures, whose window is fixed; "
            "brightness and contrast can be changed."
        )
    slices = tuple(_viewer_slice(pictures, z, side) for z in chosen)
    stack = Stack(
        slices=slices,
        first=chosen.index(first),
        names=pictures.shown_names,
        proportions=(width, height),
        sides=None if pictures.orientation is None else ("R", "L", "A", "P"),
        greys=() if side is None else pictures.greys,
        grid=(0, 0) if side is None else _grid(pictures, side),
    )
    heat = pictures.heat
    layer = None
    if heat is not None:
        low, high = heat.limits
        layer = Layer("heat map", f"≤ {low:.4g}", f"≥ {high:.4g} {heat.unit}", _bar())
    thumbnails = tuple(_thumbnail(pictures, z, detail, chosen) for z, detail in best if pictures.count > 1)
    add_viewer(
        page, stack, layer, thumbnails, thumbnails_title=title, strip=strip, structures=_structures(pictures.labels)
    )


def _structures(labels: Labels | None) -> tuple[Structure, ...]:
    if labels is None:
        return ()
    return tuple(map(Structure, labels.names, labels.colours, labels.details))


def _best(pictures: CasePictures, verdict: Verdict | None) -> list[tuple[int, str]]:
    """The slices to look at first and what their thumbnails say: by the head's scores, else by heat."""
    if verdict is not None and verdict.slice_scores_Z is not None:
        scores = verdict.slice_scores_Z
        return [(z, f"{verdict.slice_score_name} {scores[z]:.3g}") for z in verdict.top_slices]
    heat = pictures.heat
    return [(entry["slice_index"], f"{entry['score']:.4g} {heat.unit}") for entry in heat.top] if heat else []


def _strip(verdict: Verdict | None) -> Strip | None:
    if verdict is None or verdict.slice_scores_Z is None or len(verdict.slice_scores_Z) < 2:
        return None
    return Strip(
        verdict.slice_scores_Z,
        verdict.slice_score_name,
        _SCORES_FROM.get(verdict.slice_scores_from, ""),
        verdict.top_slices,
    )


_SCORES_FROM = {
    "volume_head": "The head learned from whole cases; applied to single slices its scores rank them and are no "
    "probabilities of a slice.",
    "slice_head": "The head learned from labelled slices.",
}


def _grey_side(pictures: CasePictures, chosen: Sequence[int]) -> int | None:
    """Longer side of the measured values in the page; None without them."""
    return fitting_side(pictures.values, chosen, pictures.greys) if pictures.greys else None


def _grid(pictures: CasePictures, side: int) -> tuple[int, int]:
    height, width = reduced(pictures.plane(0)[0], side).shape
    return height, width


def _viewer_slice(pictures: CasePictures, z: int, side: int | None) -> ViewerSlice:
    layer = None
    if pictures.heat is not None:
        unit = pictures.turned(pictures.heat.unit_hw(z))
        scale = max(1, _LAYER_SIDE // max(unit.shape))
        layer = png_bytes(_heat_colours(_smooth(unit, *(scale * n for n in unit.shape))))
    most, quality = (VIEWER_SIDE, 85) if side is None else (FALLBACK_SIDE, 78)
    images = tuple(jpeg_bytes(_reduced(picture, most), quality) for picture in pictures.shown(z))
    greys = () if side is None else _greys_of(pictures, z, side)
    return ViewerSlice(pictures.label(z), images, layer, z, greys, _label_layers(pictures, z))


def _label_layers(pictures: CasePictures, z: int) -> tuple[bytes | None, ...]:
    """Voxel for voxel up to ``LABEL_SIDE``."""
    if pictures.labels is None:
        return ()
    labels_HW = _fewer_labels(pictures.turned(pictures.labels.plane(z)), LABEL_SIDE)
    return label_layers(labels_HW, pictures.labels.colours)


def _fewer_labels(labels_HW: np.ndarray, side: int) -> np.ndarray:
    scale = side / max(labels_HW.shape)
    if scale >= 1:
        return labels_HW
    return resized(np.ascontiguousarray(labels_HW), *(max(1, round(n * scale)) for n in labels_HW.shape), smooth=False)


def _greys_of(pictures: CasePictures, z: int, side: int) -> tuple[str, ...]:
    return tuple(
        packed(levels(reduced(pictures.turned(channel), side), greys))
        for channel, greys in zip(pictures.values(z), pictures.greys, strict=True)
    )


def _reduced(picture: np.ndarray, side: int) -> np.ndarray:
    scale = side / max(picture.shape[:2])
    if scale >= 1:
        return picture
    return resized(picture, *(max(1, round(n * scale)) for n in picture.shape[:2]))


def _heat_colours(unit_HW: np.ndarray) -> np.ndarray:
    """(H, W, 4): the hotter, the less transparent."""
    colours = blend(np.zeros((*unit_HW.shape, 3), np.uint8), unit_HW, 1.0)
    return np.dstack([colours, np.rint(255 * unit_HW).astype(np.uint8)])


def _bar() -> bytes:
    return png_bytes(_heat_colours(np.linspace(0, 1, _BAR)[None]))


def _thumbnail(pictures: CasePictures, z: int, detail: str, chosen: Sequence[int]) -> Thumbnail:
    height, width = pictures.picture_size(THUMBNAIL_SIDE)
    picture = resized(pictures.shown(z)[0], height, width)
    if pictures.heat is not None:
        picture = _laid_over(picture, pictures, z)
    picture = with_labels(picture, pictures, z)
    return Thumbnail(chosen.index(z), f"slice {z + 1}", detail, jpeg_bytes(picture, 85))


def with_labels(picture: np.ndarray, pictures: CasePictures, z: int) -> np.ndarray:
    """A picture (H, W, 3) of a slice, of any size, with its label map laid over; as it is without one."""
    if pictures.labels is None:
        return picture
    labels_HW = np.ascontiguousarray(pictures.turned(pictures.labels.plane(z)))
    return painted(picture, resized(labels_HW, *picture.shape[:2], smooth=False), pictures.labels.colours)


def _similarity_pair(pictures: CasePictures, similarity_hw: np.ndarray, z: int, patch: tuple[int, int]) -> bytes:
    height, width = pictures.picture_size(SIMILARITY_SIDE)
    picture = resized(pictures.shown(z)[0], height, width)
    here = np.zeros(similarity_hw.shape, np.uint8)
    here[patch] = 255
    box = Image.fromarray(np.ascontiguousarray(pictures.turned(here))).resize((width, height), Image.Resampling.NEAREST)
    left, top, right, bottom = box.getbbox() or (0, 0, 0, 0)
    marked = Image.fromarray(picture)
    draw = ImageDraw.Draw(marked)
    for inset, colour in ((-2, (0, 0, 0)), (0, (255, 255, 255))):  # seen on dark and on bright
        draw.rectangle((left + inset, top + inset, right - 1 - inset, bottom - 1 - inset), outline=colour, width=2)
    return jpeg_bytes(montage([np.array(marked), similarity_picture(similarity_hw, pictures)], columns=2, gap=8), 92)
