"""Decoders on the maps of a backbone: linear, UNETR and multi-scale, for any patch size.

Each takes the maps of some blocks, shallow to deep, and the padded images, and gives logits at sizes of its own, the
finest first; more than one only where coarser ones are supervised too, in training.

Letters: B samples, D width of a map, S channels of the images, C outputs, H W space, h w places of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["batch", "instance", "group"]
LEVELS = 4
"""Maps that a UNETR or a multi-scale decoder joins."""


class LinearDecoder(nn.Module):
    """One 1 x 1 convolution on the concatenated maps.

    Args:
        widths: D of each map.
        outputs: C.
        dropout: Share of the channels left out in training.

    Source: the linear probe of DINOv2 (Oquab et al. 2023) on the maps of several blocks, as in VisionFM (2024).
    """

    def __init__(self, widths: Sequence[int], outputs: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(sum(widths), outputs, 1)

    def forward(self, maps: Sequence[Tensor], images_BSHW: Tensor) -> list[Tensor]:
        """Maps (B, D, h, w) -> [(B, C, h, w)] at the size of the first map."""
        size = maps[0].shape[-2:]
        return [self.head(self.dropout(torch.cat([resized(each, size) for each in maps], dim=1)))]


class UnetrDecoder(nn.Module):
    """Four up-steps from the deepest map, joined with shallower maps and at last with the image.

    An up-step is a 2 x 2 transposed convolution of stride 2, a block a 3 x 3 convolution with norm and ReLU. After the
    first three up-steps a map that was brought to the same size by up-steps and blocks of its own is joined by two
    blocks; after the last one two blocks on the image, which is resized if 16 places of the deepest map are another
    size. Widths are 4, 2, 1 and 1/2 times ``base``.

    Args:
        widths: D of the four maps.
        strides: Pixels of the padded image a place of each map, shallow to deep.
        channels: S.
        outputs: C.
        base: Width after the third up-step, even.
        norm: After every 3 x 3 convolution.
        dropout: Share of the channels left out before the last convolution.
        deep_supervision: Give logits after the first three up-steps too, in training.

    Source: Hatamizadeh et al. 2022 (UNETR), in two dimensions and with the widths of VisionFM (2024).
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        channels: int,
        outputs: int,
        *,
        base: int = 32,
        norm: NormKind = "group",
        dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        steps = (4 * base, 2 * base, base, base // 2)
        self.ups = nn.ModuleList(_up(a, b) for a, b in zip((widths[-1], *steps), steps, strict=False))
        self.joins = nn.ModuleList(nn.Sequential(_block(2 * w, w, norm), _block(w, w, norm)) for w in steps)
        self.skips = nn.ModuleList(
            _skip(
                widths[-2 - step], steps[step], int(math.log2(strides[-2 - step] * 2 ** (step + 1) / strides[-1])), norm
            )
            for step in range(3)
        )
        self.image = nn.Sequential(_block(channels, steps[3], norm), _block(steps[3], steps[3], norm))
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(steps[3], outputs, 1)
        self.coarse_heads = nn.ModuleList(nn.Conv2d(w, outputs, 1) for w in steps[:3]) if deep_supervision else None

    def forward(self, maps: Sequence[Tensor], images_BSHW: Tensor) -> list[Tensor]:
        """Four maps (B, D, h, w), shallow to deep -> [(B, C, 16 h, 16 w), …] of the deepest map's h and w."""
        x, joined = maps[-1], []
        for step in range(3):
            skip = self.skips[step](maps[-2 - step])
            x = self.joins[step](torch.cat([self.ups[step](x), skip], dim=1))
            joined.append(x)
        x = self.ups[3](x)
        image = self.image(resized(images_BSHW, x.shape[-2:], antialias=True))
        logits = [self.head(self.dropout(self.joins[3](torch.cat([x, image], dim=1))))]
        if self.coarse_heads is not None and self.training:
            logits += [head(each) for head, each in zip(reversed(self.coarse_heads), reversed(joined), strict=True)]
        return logits


class MultiscaleDecoder(nn.Module):
    """A pyramid of four sizes from four maps, summed from coarse to fine, concatenated, one head.

    Maps of one size become a quarter, a half, one and two times its stride (1/4, 1/8, 1/16 and 1/32 of the image for
    patches of 16 pixels), the shallowest map the finest; maps that are a pyramid already keep their sizes.

    Args:
        widths: D of the four maps.
        strides: Pixels a place of each map, shallow to deep.
        outputs: C.
        base: A quarter of the width of the pyramid.
        norm: After every 3 x 3 and transposed convolution.
        dropout: Share of the channels left out before the last convolution.
        deep_supervision: Give logits of the three coarser sizes too, in training.

    Source: Lin et al. 2017 (FPN) with the fusion of Xiao et al. 2018 (UPerNet); the pyramid of one map as in Li et al.
    2022 (ViTDet).
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        *,
        base: int = 32,
        norm: NormKind = "group",
        dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        width = 4 * base
        shifts = (2, 1, 0, -1) if len(set(strides)) == 1 else (0, 0, 0, 0)
        self.laterals = nn.ModuleList(
            _lateral(before, width, shift, norm) for before, shift in zip(widths, shifts, strict=True)
        )
        self.smooth = nn.ModuleList(_block(width, width, norm) for _ in range(LEVELS - 1))
        self.fuse = _block(LEVELS * width, width, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(width, outputs, 1)
        coarse = [nn.Conv2d(width, outputs, 1) for _ in range(LEVELS - 1)]
        self.coarse_heads = nn.ModuleList(coarse) if deep_supervision else None

    def forward(self, maps: Sequence[Tensor], images_BSHW: Tensor) -> list[Tensor]:
        """Four maps (B, D, h, w), shallow to deep -> [(B, C, h, w), …] at the sizes of the pyramid, finest first."""
        laterals = [lateral(each) for lateral, each in zip(self.laterals, maps, strict=True)]
        pyramid = [laterals[-1]]
        for lateral, smooth in zip(reversed(laterals[:-1]), self.smooth, strict=True):
            pyramid.insert(0, smooth(lateral + resized(pyramid[0], lateral.shape[-2:])))
        size = pyramid[0].shape[-2:]
        logits = [self.head(self.dropout(self.fuse(torch.cat([resized(each, size) for each in pyramid], dim=1))))]
        if self.coarse_heads is not None and self.training:
            logits += [head(each) for head, each in zip(self.coarse_heads, pyramid[1:], strict=True)]
        return logits


def resized(x_BCHW: Tensor, size: Sequence[int], *, antialias: bool = False) -> Tensor:
    """Bilinear, corners not aligned; the tensor itself where it has that size."""
    if tuple(x_BCHW.shape[-2:]) == tuple(size):
        return x_BCHW
    return F.interpolate(x_BCHW, list(size), mode="bilinear", align_corners=False, antialias=antialias)


def _up(channels: int, width: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, width, kernel_size=2, stride=2)


def _block(channels: int, width: int, norm: NormKind) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), _norm(width, norm), nn.ReLU(inplace=True))


def _norm(width: int, norm: NormKind) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width)
    return nn.InstanceNorm2d(width, affine=True) if norm == "instance" else nn.GroupNorm(math.gcd(8, width), width)


def _skip(channels: int, width: int, ups: int, norm: NormKind) -> nn.Module:
    """A map brought to ``width`` by so many up-steps, each with a block; one block alone if it has its size already."""
    layers: list[nn.Module] = []
    for _ in range(ups):
        layers += [_up(channels, width), _block(width, width, norm)]
        channels = width
    return nn.Sequential(*(layers or [_block(channels, width, norm)]))


def _lateral(channels: int, width: int, shift: int, norm: NormKind) -> nn.Module:
    """A map at ``width`` channels and 2**shift times its size, halved by pooling where that is negative."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 1)]
    for _ in range(shift):
        layers += [_up(width, width), _norm(width, norm), nn.ReLU(inplace=True)]
    if shift < 0:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers)
