"""Rotary positions in two dimensions, as in DINOv3: queries and keys of patch tokens are turned by angles that tell
their place in the picture.

The tables are made on the CPU from the settings alone, every intermediate in the number type that the weights were
trained with, and kept for each grid and device. The first tokens of a sample (cls, registers) are left as they are.

Letters: B samples, N tokens of one sample, T tokens of all groups together, A heads, E width of one head, J = E / 4
periods.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from medssl_cli.models.attention import Groups

RopeDtype = Literal["fp32", "bf16", "mixed"]
Normalize = Literal["separate", "max", "min"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.float32}

Grid = tuple[int, int, int]
"""(sequences, rows, columns); every sequence has the positions of one picture."""


class RopeEmbedding(nn.Module):
    """Cosines and sines for the tokens of one sample.

    Args:
        head_dim: Width E of one head, a multiple of 4.
        base: Period of the last pair of channels is close to it; the first has 1.
        dtype: fp32, bf16 or mixed. With bf16 coordinates, periods, angles, sines and cosines are all rounded to it,
            and the rotation too: angles near 2 pi are then off by about 0.01, so it belongs to the weights. With
            mixed the periods alone are.
        normalize_coords: Divide rows and columns each by their own number, or both by the larger or smaller one.
        shift_coords: While training, move the coordinates by U(-s, s) along each axis.
        jitter_coords: While training, stretch each axis by a factor log-uniform in [1 / j, j].
        rescale_coords: While training, stretch both axes by one factor log-uniform in [1 / r, r].

    Source: Su et al. 2021 (rotary positions); Heo et al. 2024 (two dimensions); Simeoni et al. 2025 (DINOv3).
    """

    periods: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 100.0,
        dtype: RopeDtype = "fp32",
        normalize_coords: Normalize = "separate",
        shift_coords: float | None = None,
        jitter_coords: float | None = None,
        rescale_coords: float | None = None,
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rotary positions need heads whose width is a multiple of 4, got {head_dim}")
        for name, factor in (("jitter_coords", jitter_coords), ("rescale_coords", rescale_coords)):
            if factor is not None and factor < 1:
                raise ValueError(f"{name} is the largest factor, at least 1, got {factor}")
        self.head_dim, self.base, self.dtype, self.normalize_coords = head_dim, base, dtype, normalize_coords
        self.shift_coords, self.jitter_coords, self.rescale_coords = shift_coords, jitter_coords, rescale_coords
        # for the file alone: the tables come from the settings, so that a model cast to half precision keeps them
        self.register_buffer("periods", rope_periods(head_dim, base, dtype))

    @property
    def is_augmented(self) -> bool:
        """Whether the coordinates are drawn anew in every pass of training."""
        return any(v is not None for v in (self.shift_coords, self.jitter_coords, self.rescale_coords))

    def table(self, grid: Grid, prefix: int, device: torch.device) -> Tensor:
        """(2, N, E): cosines and sines of ``prefix`` resting tokens and of each sequence's patches.

        While training with shift, jitter or rescale the coordinates are drawn from torch's CPU generator, one draw a
        call; everywhere else the table is kept.
        """
        key = (grid, prefix, self.head_dim, self.base, self.dtype, self.normalize_coords)
        if not (self.training and self.is_augmented):
            return _kept_table(*key, str(device))
        return _table(*key, self._draw()).to(device, non_blocking=True)

    def _draw(self) -> tuple[Tensor, Tensor]:
        """What is added to (y, x) coordinates, and what they are then multiplied with, each (2,)."""
        dtype = DTYPES[self.dtype]
        shift, factor = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
        if self.shift_coords is not None:
            shift = torch.empty(2).uniform_(-self.shift_coords, self.shift_coords).to(dtype)
        for largest, count in ((self.jitter_coords, 2), (self.rescale_coords, 1)):
            if largest is not None:
                drawn = torch.empty(count).uniform_(-math.log(largest), math.log(largest)).to(dtype)
                factor = factor * drawn.exp()
        return shift, factor


def rope_periods(head_dim: int, base: float, dtype: RopeDtype) -> Tensor:
    """(J,): ``base ** (2 j / (E / 2))`` for j below E / 4, in the number type of the weights."""
    number = torch.float32 if dtype == "fp32" else torch.bfloat16
    exponents = 2 * torch.arange(head_dim // 4, dtype=number, device="cpu") / (head_dim // 2)
    return (base**exponents).to(DTYPES[dtype])


def _coordinates(count: int, divisor: int, dtype: torch.dtype) -> Tensor:
    """(count,): centres of patches along one axis, -1 to 1 when divided by their own number."""
    centres = torch.arange(count, dtype=torch.float32, device="cpu").add_(0.5).to(dtype)
    return 2.0 * (centres / divisor) - 1.0


def _table(
    grid: Grid,
    prefix: int,
    head_dim: int,
    base: float,
    dtype: RopeDtype,
    normalize: Normalize,
    augment: tuple[Tensor, Tensor] | None,
) -> Tensor:
    sequences, rows, columns = grid
    number, sides = DTYPES[dtype], (rows, columns)
    divisors = {"separate": sides, "max": (max(sides),) * 2, "min": (min(sides),) * 2}[normalize]
    y, x = (_coordinates(count, divisor, number) for count, divisor in zip(sides, divisors, strict=True))
    coordinates_N2 = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    if augment is not None:
        coordinates_N2 = (coordinates_N2 + augment[0]) * augment[1]
    # (N, 2, J): first all angles of y, then all of x; twice, for the two halves of a head
    angles = 2 * math.pi * coordinates_N2[:, :, None] / rope_periods(head_dim, base, dtype)
    angles_NE = angles.flatten(1).tile(2)
    patches_2NE = torch.stack([angles_NE.cos(), angles_NE.sin()]).repeat(1, sequences, 1)
    resting_2PE = torch.tensor([1.0, 0.0], dtype=number, device="cpu")[:, None, None].expand(2, prefix, head_dim)
    return torch.cat([resting_2PE, patches_2NE], dim=1)


@functools.lru_cache(maxsize=64)
def _kept_table(
    grid: Grid, prefix: int, head_dim: int, base: float, dtype: RopeDtype, normalize: Normalize, device: str
) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # kept beyond this call
        return _table(grid, prefix, head_dim, base, dtype, normalize, None).to(device)


def packed_table(tables: tuple[Tensor, ...], groups: Groups) -> Tensor:
    """(2, T, 1, E): the table of each group repeated for its samples, end to end as the tokens lie."""
    pieces = [
        table_2NE[:, None].expand(2, samples, *table_2NE.shape[1:]).flatten(1, 2)
        for table_2NE, (samples, _) in zip(tables, groups, strict=True)
    ]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).unsqueeze(2)


def rotate(x_TAE: Tensor, table_2T1E: Tensor) -> Tensor:
    """Queries or keys turned by the angles of their tokens, computed in the table's number type: (T, A, E) -> same."""
    turned = x_TAE.to(table_2T1E.dtype)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * table_2T1E[0] + torch.cat([-second, first], dim=-1) * table_2T1E[1]
    return turned.to(x_TAE.dtype)
