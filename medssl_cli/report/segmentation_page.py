"""The page of one segmented case: its structures with their volumes, a viewer with the label map as a layer.

Letters: Z slices, H W pixels of a slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medssl_cli.core.run import RESEARCH_NOTE
from medssl_cli.report.case_page import TILE_SIDE, CasePictures, add_slices, captioned, with_labels, written
from medssl_cli.report.labels import Labels, label_colour
from medssl_cli.report.overlay import jpeg_bytes, montage, resized
from medssl_cli.report.page import Content, Html, Page, escaped, image
from medssl_cli.report.strip import Strip
from medssl_cli.report.verdict import Flag, add_flags

SHOWN_SLICES = 6
"""Slices beside the viewer and in the overlay picture, at most."""
_LINE = 22


@dataclass(frozen=True)
class StructureRow:
    """One structure of the label map.

    Args:
        name: Of the class.
        voxels: Voxels, or pixels of a picture.
        volume_ml: None for a picture.
        slices: Slices that hold it.
    """

    name: str
    voxels: int
    volume_ml: float | None
    slices: int


def segmentation_page(
    case_id: str,
    pictures: CasePictures,
    rows: Sequence[StructureRow],
    *,
    areas_Z: np.ndarray,
    area_unit: str,
    lead: str,
    decided: str,
    flags: Sequence[Flag],
    facts: Mapping[str, Content],
) -> Page:
    """The report of one segmented case.

    Args:
        case_id: Heading.
        pictures: Its slices, with ``labels``.
        rows: Its structures, label 1 first.
        areas_Z: Segmented area of every slice.
        area_unit: Of the areas.
        lead: What segmented it.
        decided: How probabilities became labels, in a sentence.
        flags: What its reader has to know.
        facts: Provenance.
    """
    page = Page(f"Case {case_id}", lead)
    page.note(RESEARCH_NOTE, "warning")
    add_flags(page, flags)
    page.heading("Structures")
    _add_rows(page, rows, is_picture=pictures.count == 1 and pictures.orientation is None)
    page.text(decided)
    page.heading("Slices" if pictures.count > 1 else "Picture")
    best = [(z, f"{areas_Z[z]:.3g} {area_unit}") for z in shown_slices(pictures, areas_Z)]
    strip = None
    if pictures.count > 1:
        note = "A click jumps to the slice."
        strip = Strip(areas_Z, f"Segmented area, {area_unit}", note, tuple(z for z, _ in best[:1]))
    add_slices(page, pictures, best, title="Through the segmentation, the largest area first", strip=strip)
    page.heading("Provenance")
    page.facts(facts)
    return page


def _add_rows(page: Page, rows: Sequence[StructureRow], *, is_picture: bool) -> None:
    header = ["Structure", "Pixels"] if is_picture else ["Structure", "Volume, ml", "Voxels", "Slices"]
    page.style(_STYLE)
    page.table(
        header,
        [
            [_named(number, row.name), row.voxels]
            if is_picture
            else [_named(number, row.name), row.volume_ml, row.voxels, row.slices]
            for number, row in enumerate(rows)
        ],
    )


def _named(number: int, name: str) -> Html:
    red, green, blue = label_colour(number)
    return Html(f'<span class="key" style="background:rgb({red},{green},{blue})"></span>{escaped(name)}')


def shown_slices(pictures: CasePictures, areas_Z: np.ndarray) -> list[int]:
    """Slices to look at first: the largest area, the largest of each structure, then evenly through all of them."""
    filled = np.flatnonzero(areas_Z)
    if not filled.size or pictures.labels is None:
        return []
    largest = int(areas_Z.argmax())
    even = filled[np.linspace(0, filled.size - 1, min(filled.size, SHOWN_SLICES)).round().astype(int)]
    chosen = dict.fromkeys([*_largest_of_each(pictures.labels, filled), *(int(z) for z in even)])
    chosen.pop(largest, None)
    return [largest, *sorted(list(chosen)[: SHOWN_SLICES - 1])]


def _largest_of_each(labels: Labels, filled: np.ndarray) -> list[int]:
    most: dict[int, tuple[int, int]] = {}
    for z in filled:
        counts = np.bincount(labels.plane(int(z)).ravel(), minlength=len(labels.names) + 1)
        for number in np.flatnonzero(counts[1 : len(labels.names) + 1]) + 1:
            most[int(number)] = max(most.get(int(number), (0, 0)), (int(counts[number]), int(z)))
    return [z for _, z in sorted(most.values(), reverse=True)]


def overlay_picture(pictures: CasePictures, areas_Z: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: slices as they are, below them the same with the label map, and what the colours mean.

    Without any structure the middle slice is shown, so that the picture tells that there is none.
    """
    height, width = pictures.picture_size(TILE_SIDE)
    chosen = sorted(shown_slices(pictures, areas_Z)) or [pictures.count // 2]
    plain = [resized(pictures.shown(z)[0], height, width) for z in chosen]
    covered = [with_labels(picture, pictures, z) for picture, z in zip(plain, chosen, strict=True)]
    named = [captioned(picture, pictures.label(z)) for picture, z in zip(plain, chosen, strict=True)]
    tiles = montage([*named, *(captioned(picture, "") for picture in covered)], columns=len(chosen))
    return np.vstack([tiles, _legend(tiles.shape[1], pictures.labels)])


def _legend(width: int, labels: Labels | None) -> np.ndarray:
    """A line for each structure: its colour and its name."""
    if labels is None:
        return np.zeros((0, width, 3), np.uint8)
    lines = []
    for name, detail, colour in zip(labels.names, labels.details, labels.colours, strict=True):
        line = written(width, _LINE, [(28, "la", f"{name}  {detail}".strip())])
        line[6:18, 8:20] = colour
        lines.append(line)
    return np.vstack(lines)


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairRow:
    """One CT-PET pair.

    Args:
        name: File name.
        share: Segmented share of its pixels.
        pixels: Segmented pixels.
        pictures: (H, W, 3) CT, PET and overlay; None where the page would become too large.
    """

    name: str
    share: float
    pixels: int
    pictures: tuple[np.ndarray, np.ndarray, np.ndarray] | None


def pairs_page(
    title: str, rows: Sequence[PairRow], *, lead: str, decided: str, flags: Sequence[Flag], facts: Mapping[str, Content]
) -> Page:
    """The report of a folder of CT-PET pairs: CT, PET and overlay side by side, and a table of all.

    Args:
        title: Heading.
        rows: In the order of the files.
        lead: What segmented them.
        decided: How probabilities became labels.
        flags: What the reader has to know.
        facts: Provenance.
    """
    page = Page(title, lead)
    page.note(RESEARCH_NOTE, "warning")
    add_flags(page, flags)
    page.text(decided)
    page.heading("Slices")
    shown = [row for row in rows if row.pictures is not None]
    if len(shown) < len(rows):
        page.text(f"Pictures of {len(shown)} of {len(rows)} slices: those with the largest segmented areas.")
    page.style(_STYLE)
    page.style(_PAIRS)
    page.cards((f"pair-{number}", _card(row)) for number, row in enumerate(shown))
    page.heading("All slices")
    page.table(
        ["File", "Segmented pixels", "Share of the slice"],
        [[row.name, row.pixels, f"{row.share:.3%}"] for row in rows],
        right=(2,),
    )
    page.heading("Provenance")
    page.facts(facts)
    return page


def _card(row: PairRow) -> Html:
    assert row.pictures is not None
    pictures = "".join(
        f"<figure>{image(jpeg_bytes(picture, 82), f'{kind} of {row.name}')}<figcaption>{kind}</figcaption></figure>"
        for kind, picture in zip(("CT", "PET", "overlay"), row.pictures, strict=True)
    )
    said = f"{row.pixels} pixels, {row.share:.2%}" if row.pixels else "nothing segmented"
    return Html(f'<h3>{escaped(row.name)}</h3><div class="triple">{pictures}</div><p>{said}</p>')


_STYLE = """
.key{display:inline-block;width:.85rem;height:.85rem;border-radius:3px;margin-right:.55rem;vertical-align:-.08rem;
box-shadow:0 0 0 1px var(--line)}
""".replace("\n", "")
_PAIRS = """
.cards{grid-template-columns:repeat(auto-fill,minmax(min(30rem,100%),1fr))}
.triple{display:grid;grid-template-columns:repeat(3,1fr);gap:.4rem}
.triple figure{margin:0}
.triple img{width:100%}
.triple figcaption{font-size:.8rem}
""".replace("\n", "")
