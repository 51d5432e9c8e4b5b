"""Predictions and references on pictures: which pixel has which colour, and strips of them."""

from __future__ import annotations

import numpy as np
import pytest

from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.report.labels import FILL, label_colour
from medssl_cli.report.mask_overlay import REFERENCE, class_colours, draw_masks, overlay_strip


def square(top: int, left: int, side: int, value: int = 1, size: int = 20) -> np.ndarray:
    labels = np.zeros((size, size), np.uint8)
    labels[top : top + side, left : left + side] = value
    return labels


def test_the_reference_is_an_outline_and_the_prediction_an_area() -> None:
    grey = np.full((20, 20), 100, np.uint8)
    drawn = draw_masks(grey, square(2, 2, 6), square(10, 10, 6))
    assert drawn.shape == (20, 20, 3)
    assert drawn.dtype == np.uint8
    assert tuple(drawn[2, 4]) == tuple(drawn[7, 7]) == REFERENCE
    assert tuple(drawn[4, 4]) == (100, 100, 100)  # inside the reference the picture stays
    red = class_colours(1)[0]
    assert tuple(drawn[10, 12]) == red
    assert tuple(drawn[12, 12]) == tuple(round((1 - FILL) * 100 + FILL * c) for c in red)
    assert tuple(drawn[0, 0]) == (100, 100, 100)
    assert (grey == 100).all()


def test_the_reference_lies_on_top_and_both_may_be_missing() -> None:
    colour = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    both = draw_masks(colour, square(3, 3, 8), square(3, 3, 8) > 0)
    assert tuple(both[3, 5]) == REFERENCE
    assert np.array_equal(draw_masks(colour, None, None), colour)
    assert np.array_equal(draw_masks(colour, np.zeros((20, 20), bool), np.zeros((20, 20), np.int64)), colour)


def test_classes_have_the_colours_of_the_viewer_however_many_there_are() -> None:
    assert class_colours(3) == [label_colour(0), label_colour(1), label_colour(2)] == class_colours(12)[:3]
    assert class_colours(0) == []
    assert len(set(class_colours(40))) == 40
    assert REFERENCE not in class_colours(100)
    black = np.zeros((20, 20), np.uint8)
    prediction = square(1, 1, 5) + square(12, 12, 5, 3)
    drawn = draw_masks(black, None, prediction)
    assert (tuple(drawn[1, 1]), tuple(drawn[12, 12])) == (class_colours(3)[0], class_colours(3)[2])
    named = draw_masks(black, None, prediction, colours={3: (1, 2, 3)})
    assert (tuple(named[1, 1]), tuple(named[12, 12])) == (class_colours(3)[0], (1, 2, 3))


def test_outlines_lie_between_structures_that_touch() -> None:
    reference = square(2, 2, 8)
    reference[2:10, 6:10] = 2
    drawn = draw_masks(np.zeros((20, 20), np.uint8), reference, None)
    assert tuple(drawn[5, 5]) == tuple(drawn[5, 6]) == REFERENCE
    assert tuple(drawn[5, 4]) == (0, 0, 0)


def test_what_does_not_count_is_dimmed_and_no_structure() -> None:
    reference = square(2, 2, 6)
    reference[:, 15:] = IGNORE_LABEL
    drawn = draw_masks(np.full((20, 20), 200, np.uint8), reference, None)
    assert tuple(drawn[4, 17]) == (90, 90, 90)
    assert tuple(drawn[4, 14]) == (200, 200, 200)
    prediction = np.full((20, 20), IGNORE_LABEL, np.uint8)
    assert tuple(draw_masks(np.full((20, 20), 200, np.uint8), None, prediction)[4, 4]) == (200, 200, 200)


def test_enlarged_outlines_stay_one_pixel_wide() -> None:
    drawn = draw_masks(np.full((20, 20), 100, np.uint8), square(5, 5, 6), None, scale=4)
    assert drawn.shape == (80, 80, 3)
    green = (drawn == REFERENCE).all(-1)
    assert green.sum() == 4 * (4 * 6) - 4
    assert green[20:44, 20].all()


def test_numbers_are_windowed_and_misfits_refused() -> None:
    ramp = np.linspace(-1000, 1000, 400).reshape(20, 20)
    drawn = draw_masks(ramp, None, None)
    assert (tuple(drawn[0, 0]), tuple(drawn[-1, -1])) == ((0, 0, 0), (255, 255, 255))
    assert draw_masks(np.stack([ramp] * 3, -1), None, None).shape == (20, 20, 3)
    with pytest.raises(ValueError, match=r"labels \(19, 20\)"):
        draw_masks(ramp, None, np.zeros((19, 20)))
    with pytest.raises(ValueError, match=r"got \(20, 20, 4\)"):
        draw_masks(np.zeros((20, 20, 4), np.uint8), None, None)


def test_strips_have_a_caption_over_each_picture() -> None:
    panels = [np.full((40, 120, 3), value, np.uint8) for value in (50, 150, 250)]
    plain = overlay_strip(panels)
    assert plain.shape == (40, 3 * 120 + 2 * 4, 3)
    named = overlay_strip(panels, ["input", "reference", "a caption that is far too long for this picture"])
    assert named.shape == (40 + 26, plain.shape[1], 3)
    assert np.array_equal(named[26:], plain)
    for left in (0, 124, 248):
        assert (named[:26, left : left + 120] > 128).any()
        assert not named[:26, left + 117 : left + 120].any()  # no letter is cut
    assert overlay_strip(panels, columns=2).shape == (84, 244, 3)


def test_strips_of_different_sizes_keep_proportions() -> None:
    strip = overlay_strip([np.full((10, 30, 3), 255, np.uint8), np.full((60, 60, 3), 255, np.uint8)])
    assert strip.shape == (60, 124, 3)
    assert (strip[20:40, :60] == 255).all()
    assert not strip[:20, :60].any()
    with pytest.raises(ValueError, match="at least one"):
        overlay_strip([])
    with pytest.raises(ValueError, match="1 captions for 2"):
        overlay_strip([strip, strip], ["one"])
