"""A slice into overlapping tiles, and stitched back: where they lie, how they count, and their weighted mean.

Letters: C channels of what is stitched, H W pixels of the slice, h w of a tile.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Blend = Literal["gaussian", "constant"]

SIGMA_SHARE = 0.125
"""Standard deviation of the Gaussian weights in tile sides (Isensee et al. 2021, nnU-Net)."""
LEAST_WEIGHT = 1e-3
"""Of the corners, where the Gaussian all but vanishes: a pixel that only a corner sees has a value too."""


def tile_starts(size: int, tile: int, overlap: float) -> list[int]:
    """First pixels of the tiles along one axis; the last one ends with the axis, and together they cover it.

    Args:
        size: Pixels of the axis, at least ``tile``.
        tile: Pixels of a tile.
        overlap: Share of a tile that the next one sees again, from 0 to below 1; more where the axis ends.

    Raises:
        ValueError: The axis is shorter than a tile.
    """
    if size < tile:
        raise ValueError(f"an axis of {size} pixels holds no tile of {tile}: pad it first")
    step = max(1, int(tile * (1 - overlap)))
    count = math.ceil((size - tile) / step) + 1
    return [min(number * step, size - tile) for number in range(count)]


def tile_places(size: tuple[int, int], tile: tuple[int, int], overlap: float) -> list[tuple[int, int]]:
    """(top, left) of every tile of a slice, row by row."""
    rows, columns = (tile_starts(n, side, overlap) for n, side in zip(size, tile, strict=True))
    return [(top, left) for top in rows for left in columns]


@functools.lru_cache(maxsize=16)
def tile_weights(tile: tuple[int, int], blend: Blend) -> Tensor:
    """(h, w) float32, how much each pixel of a tile counts: 1 in its middle; not to be changed.

    ``gaussian`` trusts the middle, which sees most of what lies around it; ``constant`` counts all alike.
    """
    if blend == "constant":
        return torch.ones(tile)
    rows, columns = (_bell(side) for side in tile)
    return (rows[:, None] * columns[None, :]).clamp_min(LEAST_WEIGHT)


def _bell(side: int) -> Tensor:
    place = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    return torch.exp(-(place**2) / (2 * (SIGMA_SHARE * side) ** 2))


def padded_to(image_SHW: Tensor, tile: tuple[int, int]) -> Tensor:
    """The slice with zeros at the bottom and right, where it is smaller than a tile: as training pads its batches."""
    below, right = (max(0, side - n) for n, side in zip(image_SHW.shape[-2:], tile, strict=True))
    return functional.pad(image_SHW, (0, right, 0, below)) if below or right else image_SHW


class Stitch:
    """The weighted mean of the tiles of one slice, in float32.

    Args:
        channels: C.
        size: (H, W) of the slice.
        tile: (h, w).
        blend: How the pixels of a tile count.
        device: Where the sum lies.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], tile: tuple[int, int], blend: Blend, device: torch.device
    ) -> None:
        self._sum_CHW = torch.zeros(channels, *size, device=device)
        self._weight_HW = torch.zeros(size, device=device)
        self._weights_hw = tile_weights(tile, blend).to(device)

    def add(self, tile_Chw: Tensor, place: tuple[int, int]) -> None:
        """Lay one tile at (top, left)."""
        height, width = self._weights_hw.shape
        rows, columns = slice(place[0], place[0] + height), slice(place[1], place[1] + width)
        self._sum_CHW[:, rows, columns] += tile_Chw.float() * self._weights_hw
        self._weight_HW[rows, columns] += self._weights_hw

    def mean(self) -> Tensor:
        """(C, H, W); every pixel has to be covered."""
        return self._sum_CHW / self._weight_HW
