"""Padding to a multiple and back, against numpy's own padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medssl_cli.models.padding import Frame, pad_to_multiple


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 31), (20, 33), (32, 18)])
def test_padding_mirrors_with_the_smaller_half_first(height: int, width: int) -> None:
    image = torch.arange(2.0 * height * width).view(1, 2, height, width)
    padded, frame = pad_to_multiple(image, 16)
    missing_y, missing_x = -height % 16, -width % 16
    before = (missing_y // 2, missing_x // 2)
    pads = [(0, 0), (0, 0), (before[0], missing_y - before[0]), (before[1], missing_x - before[1])]
    np.testing.assert_array_equal(padded.numpy(), np.pad(image.numpy(), pads, mode="reflect"))
    assert frame == Frame(*before, height, width)
    assert torch.equal(frame.crop(padded), image)


def test_an_axis_too_short_to_mirror_repeats_its_edge() -> None:
    image = torch.tensor([[[[1.0, 2.0, 3.0]]]])  # one row, three columns; 13 more are needed
    padded, frame = pad_to_multiple(image, 16)
    expected = np.pad(image.numpy(), [(0, 0), (0, 0), (7, 8), (6, 7)], mode="edge")
    np.testing.assert_array_equal(padded.numpy(), expected)
    assert torch.equal(frame.crop(padded), image)


def test_a_fitting_picture_is_not_copied() -> None:
    image = torch.zeros(1, 1, 32, 16)
    assert pad_to_multiple(image, 16)[0] is image
