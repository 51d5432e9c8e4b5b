from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from medssl_cli.report.case_page import CasePictures
from medssl_cli.report.labels import FILL, Labels, label_colour, label_layers, painted
from medssl_cli.report.overlay import contour
from medssl_cli.report.page import Page
from medssl_cli.report.segmentation_page import (
    PairRow,
    StructureRow,
    overlay_picture,
    pairs_page,
    segmentation_page,
    shown_slices,
)
from medssl_cli.report.verdict import Flag

EVIL = "<img src=x onerror=alert(1)>\"'"
COUNT, SIZE = 9, (24, 20)


def labels_ZHW() -> np.ndarray:
    labels = np.zeros((COUNT, *SIZE), np.uint8)
    labels[2:7, 4:14, 3:9] = 1
    labels[4, 16:22, 12:18] = 2
    labels[4, 4:15, 3:10] = 1
    return labels


def pictures(
    labels: np.ndarray, names: tuple[str, ...] = ("gland", "lesion"), orientation: str = "RAS"
) -> CasePictures:
    planes = np.random.default_rng(0).random((len(labels), 1, *SIZE)).astype(np.float32)
    return CasePictures(
        names=("t2",),
        plane=lambda z: planes[z],
        count=len(labels),
        spacing=(1.0, 1.0),
        orientation=orientation,
        colour=False,
        labels=Labels(names, tuple(f"{n} ml" for n in range(len(names))), lambda z: labels[z]),
    )


def areas_Z(labels: np.ndarray) -> np.ndarray:
    return (labels > 0).sum((1, 2)).astype(float)


def page_of(labels: np.ndarray, names: tuple[str, ...] = ("gland", "lesion"), **keys: str) -> str:
    return segmentation_page(
        "P1",
        pictures(labels, names, **keys),
        [StructureRow(name, 1000 * n, 1.5 * n, n) for n, name in enumerate(names, start=1)],
        areas_Z=areas_Z(labels),
        area_unit="cm²",
        lead="Label map of a network.",
        decided="Every voxel has its most probable class.",
        flags=[Flag("warning", "Unusual voxel size", "z: 3 mm, in training 1 mm.")],
        facts={"model": "runs/x"},
    ).render()


def decoded(text: str) -> list[tuple[int, int, np.ndarray]]:
    """(slice, structure, RGBA) of every layer in a page."""
    found = []
    for index, body in re.findall(r'<figure class="plane" data-index="(\d+)"(.*?)</figure>', text, re.DOTALL):
        layers = re.findall(
            r'<img class="structure-layer" data-structure="(\d+)" src="data:image/png;base64,([^"]+)"', body
        )
        for structure, data in layers:
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                found.append((int(index), int(structure), np.asarray(picture.convert("RGBA"))))
    return found


def test_layers_hold_each_structure_pixel_for_pixel() -> None:
    labels = labels_ZHW()
    layers = label_layers(labels[4], (label_colour(0), label_colour(1), label_colour(2)))
    assert layers[2] is None
    for number, data in enumerate(layers[:2], start=1):
        assert data is not None
        with Image.open(io.BytesIO(data)) as picture:
            rgba = np.asarray(picture.convert("RGBA"))
        mask = labels[4] == number
        np.testing.assert_array_equal(rgba[..., 3] > 0, mask)
        np.testing.assert_array_equal(rgba[..., 3] == 255, contour(mask))
        assert (rgba[mask][:, :3] == label_colour(number - 1)).all()
        assert set(np.unique(rgba[..., 3])) <= {0, round(255 * FILL), 255}


@pytest.mark.parametrize(
    ("orientation", "turn"), [("RAS", np.s_[::-1, ::-1]), ("LPS", np.s_[:, :]), ("LAS", np.s_[::-1])]
)
def test_the_page_lays_the_label_map_over_each_slice_as_it_is_read(orientation: str, turn: tuple[slice, ...]) -> None:
    labels = labels_ZHW()
    found = decoded(page_of(labels, orientation=orientation))
    assert {(z, number) for z, number, _ in found} == {(2, 0), (3, 0), (4, 0), (4, 1), (5, 0), (6, 0)}
    for z, number, rgba in found:
        np.testing.assert_array_equal(rgba[..., 3] > 0, (labels[z] == number + 1)[turn])


def test_the_legend_names_each_structure_with_its_volume() -> None:
    text = page_of(labels_ZHW())
    items = re.findall(
        r'<input type="checkbox" checked disabled data-structure="(\d)"><span class="swatch" '
        r'style="background:rgb\(([\d,]+)\)"></span><span class="name">([^<]+)</span><span class="detail">([^<]+)',
        text,
    )
    colours = [",".join(map(str, label_colour(number))) for number in range(2)]
    assert items == [("0", colours[0], "gland", "0 ml"), ("1", colours[1], "lesion", "1 ml")]
    assert 'id="cover"' in text
    assert "Unusual voxel size" in text
    assert "research use only" in text


def test_names_are_escaped() -> None:
    text = page_of(labels_ZHW(), (EVIL, "b"))
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text


def test_slices_to_look_at_begin_with_the_largest_area_and_show_each_structure() -> None:
    labels = labels_ZHW()
    chosen = shown_slices(pictures(labels), areas_Z(labels))
    assert chosen[0] == 4
    assert sorted(chosen) == [2, 3, 4, 5, 6]
    labels[8, 0, 0] = 3
    assert 8 in shown_slices(pictures(labels, ("a", "b", "c")), areas_Z(labels))


def test_a_case_without_any_structure_has_a_page_and_an_overlay() -> None:
    labels = np.zeros((COUNT, *SIZE), np.uint8)
    assert not shown_slices(pictures(labels), areas_Z(labels))
    assert not decoded(page_of(labels))
    assert overlay_picture(pictures(labels), areas_Z(labels)).ndim == 3


def test_the_overlay_picture_has_the_colours_of_the_legend() -> None:
    labels = labels_ZHW()
    picture = overlay_picture(pictures(labels), areas_Z(labels))
    for number in range(2):
        assert (picture == np.array(label_colour(number))).all(-1).sum() > 50


def test_paint_leaves_other_pixels_alone() -> None:
    grey = np.full((*SIZE, 3), 100, np.uint8)
    labels = labels_ZHW()[4]
    result = painted(grey, labels, (label_colour(0), label_colour(1)))
    np.testing.assert_array_equal((result != 100).any(-1), labels > 0)
    inside = (labels == 1) & ~contour(labels == 1)
    expected = np.rint((1 - FILL) * 100 + FILL * np.array(label_colour(0)))
    np.testing.assert_array_equal(result[inside], np.broadcast_to(expected, (inside.sum(), 3)))


def test_colours_differ() -> None:
    colours = [label_colour(number) for number in range(40)]
    assert len(set(colours)) == 40
    assert all(0 <= value <= 255 for colour in colours for value in colour)


def test_pairs_stand_side_by_side() -> None:
    small = np.zeros((8, 8, 3), np.uint8)
    rows = [PairRow(f"{EVIL}.png", 0.25, 16, (small, small, small)), PairRow("b.png", 0.0, 0, None)]
    page = pairs_page("2 pairs", rows, lead="", decided="A pixel …", flags=[], facts={})
    assert isinstance(page, Page)
    text = page.render()
    assert text.count("<figure>") == 3
    assert "<img src=x" not in text
    assert "Pictures of 1 of 2 slices" in text
    assert "25.000%" in text
