"""Random geometry and intensity of a whole batch of crops, on whatever device it lies: draw, apply, remember.

Every transform has ``draw``, which takes numbers from an explicit NumPy generator on the host, and ``apply``, which
takes what was drawn and touches no generator: so CPU and CUDA make the same crops, and a recorded draw makes a crop
again. Boxes depend on the region of interest, and are therefore worked out where the batch lies.

Letters: B samples, V crops (view-major, crop v is of sample v mod B), S sequences or colour channels, H W space,
G side of a crop, K taps of a filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[float, float]

AREA_TRIES = 10
"""Boxes tried before a plain crop falls back to the centre."""

BLUR_TAPS = 9
"""Kernel of the Gaussian blur, in pixels."""

LEAKY_SLOPE = 0.01
"""Slope of the random net's leaky ReLU below zero."""

FILTER_BYTES = 2 * 2**30
"""Memory that the activations of random nets may take on an accelerator at a time; on a CPU one crop runs at a time,
so that its activations stay in the cache."""


def put(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """A drawn value on ``device``, without waiting for what the device still has to do."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def keep_heap() -> None:
    """Let glibc keep up to 62 MB of freed memory for the next tensors of this process.

    Without it every large result is returned to the system and faulted in again, which takes as long as the arithmetic.
    Freeing a block of 31 MB raises the allocator's threshold; the block is never touched, so it costs microseconds.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _uniform(rng: np.random.Generator, bounds: Range, *shape: int) -> np.ndarray:
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random(shape)


# --- geometry --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AreaCrop:
    """Plain crop: a share of the image's area, of random aspect, anywhere inside (Szegedy et al. 2015).

    Args:
        scale: Range of the share of the area.
        aspect: Range of width over height, drawn log-uniformly.
    """

    scale: Range
    aspect: Range

    def draw(self, n_views: int, sizes_B2: Tensor, roi_rank_BHW: Tensor | None, rng: np.random.Generator) -> Tensor:
        """Boxes (V, 4) int64: top, left, height, width. The region of interest is not looked at."""
        n_crops, device = n_views * len(sizes_B2), sizes_B2.device
        root_share = np.sqrt(_uniform(rng, self.scale, n_crops, AREA_TRIES))
        log_aspect = _uniform(rng, (math.log(self.aspect[0]), math.log(self.aspect[1])), n_crops, AREA_TRIES)
        root_aspect = np.exp(0.5 * log_aspect)
        place_V2 = put(rng.random((n_crops, 2)), device)
        sides_V2 = sizes_B2.double().repeat(n_views, 1)
        root_area = sides_V2.prod(1, keepdim=True).sqrt()
        height = (root_area * put(root_share / root_aspect, device)).round()
        width = (root_area * put(root_share * root_aspect, device)).round()
        fits = (height >= 1) & (height <= sides_V2[:, :1]) & (width >= 1) & (width <= sides_V2[:, 1:])
        first = fits.int().argmax(1, keepdim=True)
        box_V2 = torch.cat([height.gather(1, first), width.gather(1, first)], 1)
        found = fits.any(1, keepdim=True)
        box_V2 = torch.where(found, box_V2, self._largest(sides_V2))
        room_V2 = sides_V2 - box_V2
        corner_V2 = torch.where(found, (place_V2 * (room_V2 + 1)).floor().minimum(room_V2), (room_V2 / 2).floor())
        return torch.cat([corner_V2, box_V2], 1).long()

    def _largest(self, sides_V2: Tensor) -> Tensor:
        """The largest box of an allowed aspect, for images so narrow that no try fitted."""
        height, width = sides_V2.unbind(1)
        return torch.stack(
            [
                torch.minimum(height, (width / self.aspect[0]).round().clamp_min(1)),
                torch.minimum(width, (height * self.aspect[1]).round().clamp_min(1)),
            ],
            1,
        )


@dataclass(frozen=True)
class SideCrop:
    """Crop around a random pixel of the region of interest; around the image's centre where there is none.

    Args:
        scale: Range of the share of each **side**: 0.5 means a quarter of the area.
        aspect: Range of the factor, drawn uniformly, by which one of the two sides is changed.
    """

    scale: Range
    aspect: Range

    def draw(self, n_views: int, sizes_B2: Tensor, roi_rank_BHW: Tensor | None, rng: np.random.Generator) -> Tensor:
        """Boxes (V, 4) int64: top, left, height, width; moved, never cut, to lie inside.

        Args:
            n_views: Crops of each sample.
            sizes_B2: (height, width) of each image.
            roi_rank_BHW: What ``rank_pixels`` made of the regions of interest; None without any.
            rng: Source of every draw.
        """
        n_crops, device = n_views * len(sizes_B2), sizes_B2.device
        factor_V2 = np.repeat(_uniform(rng, self.scale, n_crops, 1), 2, axis=1)
        factor_V2[np.arange(n_crops), rng.integers(2, size=n_crops)] *= _uniform(rng, self.aspect, n_crops)
        pick_V = put(rng.random(n_crops), device)
        sides_V2 = sizes_B2.double().repeat(n_views, 1)
        box_V2 = (sides_V2 * put(factor_V2, device)).round().clamp_min(1).minimum(sides_V2)
        centre_V2 = (sides_V2 / 2).floor()
        if roi_rank_BHW is not None:
            centre_V2 = _random_pixels(roi_rank_BHW, pick_V, centre_V2)
        corner_V2 = (centre_V2 - (box_V2 / 2).floor()).clamp_min(0).minimum(sides_V2 - box_V2)
        return torch.cat([corner_V2, box_V2], 1).long()


def rank_pixels(roi_BHW: Tensor) -> Tensor:
    """(B, H, W) int32: how many pixels of a mask lie at or before each pixel, row by row; once a batch is enough."""
    return roi_BHW.flatten(1).cumsum(1, dtype=torch.int32).view(roi_BHW.shape)


def _random_pixels(roi_rank_BHW: Tensor, pick_V: Tensor, otherwise_V2: Tensor) -> Tensor:
    """(row, column) of the mask pixel at share ``pick`` of all mask pixels; ``otherwise`` where the mask is empty."""
    n_samples, _, width = roi_rank_BHW.shape
    rank_BN = roi_rank_BHW.flatten(1)
    count_B = rank_BN[:, -1]
    pick_BV = pick_V.view(-1, n_samples).T
    wanted_BV = (pick_BV * count_B[:, None]).floor().int().minimum((count_B[:, None] - 1).clamp_min(0)) + 1
    index_V = torch.searchsorted(rank_BN, wanted_BV.contiguous()).T.reshape(-1)
    pixel_V2 = torch.stack([index_V // width, index_V % width], 1).double()
    return torch.where((count_B > 0).repeat(len(pick_V) // n_samples)[:, None], pixel_V2, otherwise_V2)


def resize_crops(images_BSHW: Tensor, boxes_V4: Tensor, flip_V: np.ndarray, size: int) -> Tensor:
    """Cut boxes out, resize them, mirror some: (B, S, H, W) -> (V, S, size, size), clamped to [0, 1].

    Bicubic (a = -0.5) and antialiased, as ``torch.nn.functional.interpolate`` does it, as two matrix products a crop
    for all crops at once; pixels outside a box never enter it. A mirror is columns read backwards.
    """
    device = images_BSHW.device
    height, width = images_BSHW.shape[-2:]
    rows_VGH = resampling_matrices(boxes_V4[:, 0], boxes_V4[:, 2], size, height)
    columns_VGW = resampling_matrices(boxes_V4[:, 1], boxes_V4[:, 3], size, width, put(flip_V, device))
    resample = _resample_each if device.type == "cpu" else _resample_all
    return resample(images_BSHW, rows_VGH, columns_VGW, boxes_V4).clamp_(0, 1)


def resampling_matrices(
    start_V: Tensor, length_V: Tensor, size: int, extent: int, flip_V: Tensor | None = None
) -> Tensor:
    """Matrices (V, size, extent) float32 that resize ``length`` pixels from ``start`` on to ``size`` pixels.

    Row i holds the weights of output pixel i; each row sums to 1 and is zero outside the box.
    """
    device = start_V.device
    scale_V1 = length_V.double()[:, None] / size
    widen_V1 = scale_V1.clamp_min(1)  # antialiasing: the kernel grows with the pixels of the output
    position_VG = torch.arange(size, device=device).expand(len(start_V), size)
    if flip_V is not None:
        position_VG = torch.where(flip_V[:, None], size - 1 - position_VG, position_VG)
    centre_VG = scale_V1 * (position_VG + 0.5)
    first_VG = (centre_VG - 2 * widen_V1 + 0.5).floor()
    n_taps = math.ceil(4 * max(extent / size, 1)) + 1
    tap_VGK = first_VG.long()[..., None] + torch.arange(n_taps, device=device)
    # the fraction is taken in double and small, so that single precision is enough from here on
    offset_VGK = (first_VG - centre_VG + 0.5).float()[..., None] + torch.arange(n_taps, device=device)
    weight_VGK = _cubic(offset_VGK / widen_V1.float()[..., None])
    inside = (tap_VGK >= 0) & (tap_VGK < length_V[:, None, None])
    weight_VGK = torch.where(inside, weight_VGK, 0.0)
    weight_VGK = weight_VGK / weight_VGK.sum(-1, keepdim=True)
    column_VGK = torch.where(inside, tap_VGK + start_V[:, None, None], extent)  # the last column is waste
    matrices = torch.zeros(len(start_V), size, extent + 1, device=device)
    return matrices.scatter_(2, column_VGK, weight_VGK)[..., :extent]


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5 (Keys 1981)."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _resample_each(images_BSHW: Tensor, rows_VGH: Tensor, columns_VGW: Tensor, boxes_V4: Tensor) -> Tensor:
    """One crop after another, on its own pixels only: the least arithmetic, for a CPU."""
    n_crops, size = rows_VGH.shape[:2]
    n_samples, n_sequences = images_BSHW.shape[:2]
    crops_VSGG = images_BSHW.new_empty(n_crops, n_sequences, size, size)
    for v, (top, left, height, width) in enumerate(boxes_V4.tolist()):
        rows, columns = slice(top, top + height), slice(left, left + width)
        pixels_SHW = images_BSHW[v % n_samples, :, rows, columns]
        across_SHG = torch.matmul(pixels_SHW, columns_VGW[v, :, columns].T)
        torch.matmul(rows_VGH[v, :, rows], across_SHG, out=crops_VSGG[v])
    return crops_VSGG


def _resample_all(images_BSHW: Tensor, rows_VGH: Tensor, columns_VGW: Tensor, boxes_V4: Tensor) -> Tensor:
    """All crops in two batched products over whole images, for an accelerator: nothing is read back to the host."""
    n_samples, n_sequences, height, width = images_BSHW.shape
    n_crops, size = rows_VGH.shape[:2]
    n_views = n_crops // n_samples
    rows = rows_VGH.view(n_views, n_samples, size, height).transpose(0, 1).reshape(n_samples, -1, height)
    down = torch.bmm(rows, images_BSHW.transpose(1, 2).reshape(n_samples, height, -1))  # (B, views*G, S*W)
    down = down.view(n_samples * n_views, size * n_sequences, width)
    columns = columns_VGW.view(n_views, n_samples, size, width).transpose(0, 1).reshape(-1, size, width)
    across = torch.bmm(down, columns.transpose(1, 2)).view(n_samples, n_views, size, n_sequences, size)
    return across.permute(1, 0, 3, 2, 4).reshape(n_crops, n_sequences, size, size)


# --- intensity -------------------------------------------------------------------------------------------------------


class Intensity(Protocol):
    """A random change of intensities; ``apply`` keeps the shape and the range [0, 1]."""

    def draw(self, n_crops: int, n_channels: int, rng: np.random.Generator) -> Any:
        """What ``apply`` needs for ``n_crops`` crops."""

    def apply(self, crops_VSGG: Tensor, draws: Any, available_VS: Tensor) -> Tensor:
        """(V, S, G, G) in [0, 1] -> the same shape; absent sequences hold zeros and influence nothing."""


@dataclass
class FilterDraws:
    """``kernels``: for each layer (V, out, in, 3, 3); ``alpha_V``: share of the filtered image, 0 for none."""

    kernels: list[np.ndarray]
    alpha_V: np.ndarray


@dataclass(frozen=True)
class RandomConvolution:
    """A fresh random net for each crop, shared by its sequences, mixed with the crop by one factor (``rc``).

    Four 3x3 convolutions (1 -> 4 -> 4 -> 4 -> 1 channels, normal weights, no bias, edges repeated, leaky ReLU between)
    at ``size`` x ``size`` pixels; the answer is scaled to [0, 1] over all sequences together, and exact zeros stay.

    Args:
        probability: Share of the crops that are filtered.
        size: Side in pixels at which the net works; a multiple of 4.

    Source: Xu et al. 2021 (random convolutions), Ouyang et al. 2022 (the net of several layers).
    """

    probability: float = 1.0
    size: int = 512

    def draw(self, n_crops: int, n_channels: int, rng: np.random.Generator) -> FilterDraws:
        """Weights of a net and a mixing factor for each crop."""
        alpha_V = rng.random(n_crops)
        alpha_V[rng.random(n_crops) >= self.probability] = 0
        widths = ((4, 1), (4, 4), (4, 4), (1, 4))
        return FilterDraws([rng.standard_normal((n_crops, *width, 3, 3), np.float32) for width in widths], alpha_V)

    def apply(self, crops_VSGG: Tensor, draws: FilterDraws, available_VS: Tensor) -> Tensor:
        """(V, S, G, G) -> the same, mixed with its filtered self; no net runs for the crops that stay."""
        device, size = crops_VSGG.device, self.size
        chosen = np.flatnonzero(draws.alpha_V)
        if len(chosen) < len(crops_VSGG):
            return self._apply_chosen(crops_VSGG, draws, available_VS, chosen)
        shapes = ((2, 1, 2), (2, 2, 2), (2, 2, 2), (4, 2, 2))  # sides of blocks: out, in along y, in along x
        kernels = [_block_kernels(put(k, device), *shape) for k, shape in zip(draws.kernels, shapes, strict=True)]
        taps = _PixelTaps(size, crops_VSGG.shape[-1], device)
        alpha_V111 = put(draws.alpha_V, device).float()[:, None, None, None]
        available_VS11 = available_VS[:, :, None, None]
        mixed = torch.empty_like(crops_VSGG)
        per_crop = crops_VSGG.shape[1] * 16 * size**2 * 3  # four channels of float32, three buffers alive
        step = 1 if device.type == "cpu" else max(1, FILTER_BYTES // per_crop)
        for start in range(0, len(crops_VSGG), step):
            part = slice(start, start + step)
            x = crops_VSGG[part]
            filtered = taps.read(_filter(x * 2 - 1, [kernel[part] for kernel in kernels], size))
            filtered = _rescale_jointly(filtered.transpose(0, 1), available_VS11[part])
            y = torch.lerp(x, filtered, alpha_V111[part])
            mixed[part] = torch.where(x == 0, x, y)
        return mixed

    def _apply_chosen(self, crops_VSGG: Tensor, draws: FilterDraws, available_VS: Tensor, chosen: np.ndarray) -> Tensor:
        mixed = crops_VSGG.clone()
        if len(chosen):
            some = FilterDraws([kernel[chosen] for kernel in draws.kernels], draws.alpha_V[chosen])
            index = put(chosen, crops_VSGG.device)
            mixed[index] = self.apply(crops_VSGG[index], some, available_VS[index])
        return mixed


def _filter(crops_NSGG: Tensor, kernels: list[Tensor], size: int) -> Tensor:
    """Random nets on crops at ``size`` pixels: (N, S, G, G) -> (S, N * 16, size / 4, size / 4), blocks of 4x4 pixels.

    Pixels are held in blocks of 2x2, so that a 3x3 convolution of 4 channels becomes a 2x2 convolution of 16: a block
    of output, moved by one pixel against the blocks of input, needs exactly four of these. Vector units are then full,
    and the same sums take a third of the time. The last layer, of one channel, fills them with blocks of 4x4.
    """
    n_crops, n_sequences = crops_NSGG.shape[:2]
    x = F.interpolate(crops_NSGG.transpose(0, 1), (size, size), mode="bilinear", align_corners=True)
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")
    x = x.view(n_sequences, n_crops, size + 4, size // 2 + 2, 2).permute(0, 1, 4, 2, 3)
    x = x.reshape(n_sequences, n_crops * 2, size + 4, size // 2 + 2).contiguous(memory_format=torch.channels_last)
    first, second, third, last = (kernel.flatten(0, 1) for kernel in kernels)
    x = _repeat_edge_pixel(_act(F.conv2d(x, first, groups=n_crops, stride=(2, 1))))  # from pixel -1
    x = _repeat_edge_block(_act(F.conv2d(x, second, groups=n_crops, padding=1)))  # from pixel -2, its ring unset
    x = _repeat_edge_pixel(_act(F.conv2d(x, third, groups=n_crops)))  # from pixel -1
    return F.conv2d(x, last, groups=n_crops, stride=2)  # from pixel 0


class _PixelTaps:
    """Where the pixels of a smaller image lie in an image of 4x4 blocks, for bilinear reading with aligned corners."""

    def __init__(self, size: int, side: int, device: torch.device) -> None:
        position = torch.arange(side, device=device, dtype=torch.float64) * ((size - 1) / max(side - 1, 1))
        low = position.floor().long()
        both = torch.stack([low, (low + 1).clamp_max(size - 1)])  # (2, side)
        block, inside = both // 4, both % 4
        y = (block * (size // 4) * 16 + inside * 4)[:, None, :, None]
        x = (block * 16 + inside)[None, :, None, :]
        self.index = (y + x).flatten()
        self.share = (position - low).float()
        self.side = side

    def read(self, blocks: Tensor) -> Tensor:
        """(S, N * 16, r, r) -> (S, N, side, side)."""
        pixels = blocks.unflatten(1, (-1, 16)).permute(0, 1, 3, 4, 2).flatten(2)
        corners = pixels.flatten(0, 1).index_select(1, self.index).view(*pixels.shape[:2], 2, 2, self.side, self.side)
        rows = torch.lerp(corners[:, :, 0], corners[:, :, 1], self.share[:, None])
        return torch.lerp(rows[:, :, 0], rows[:, :, 1], self.share)


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu_(x, LEAKY_SLOPE)


def _pixels_of_blocks(x: Tensor) -> Tensor:
    """(S, N*16, r, r) -> (S, N, row in block, column in block, 4, r, r), the same memory."""
    return x.unflatten(1, (-1, 2, 2, 4))


def _repeat_edge_pixel(x: Tensor) -> Tensor:
    """Blocks that begin one pixel outside the image: that pixel becomes the image's edge, in place."""
    pixels = _pixels_of_blocks(x)
    pixels[:, :, 0, :, :, 0] = pixels[:, :, 1, :, :, 0]
    pixels[:, :, 1, :, :, -1] = pixels[:, :, 0, :, :, -1]
    pixels[:, :, :, 0, :, :, 0] = pixels[:, :, :, 1, :, :, 0]
    pixels[:, :, :, 1, :, :, -1] = pixels[:, :, :, 0, :, :, -1]
    return x


def _repeat_edge_block(x: Tensor) -> Tensor:
    """A whole block outside the image on each side becomes the image's edge, in place."""
    pixels = _pixels_of_blocks(x)
    pixels[:, :, :, :, :, 0] = pixels[:, :, :1, :, :, 1]
    pixels[:, :, :, :, :, -1] = pixels[:, :, 1:, :, :, -2]
    pixels[..., 0] = pixels[:, :, :, :1, :, :, 1]
    pixels[..., -1] = pixels[:, :, :, 1:, :, :, -2]
    return x


def _block_kernels(kernels_VOIKK: Tensor, side_out: int, side_in_y: int, side_in_x: int) -> Tensor:
    """3x3 kernels (V, O, I, 3, 3) as kernels on blocks of pixels: (V, side_out² * O, side_in_y * side_in_x * I, …).

    Pixel a of an output block needs input pixels a, a + 1 and a + 2; those are pixel b of block c, c * side_in + b.
    """
    y, x = (_taps(side_out, side_in).to(kernels_VOIKK) for side_in in (side_in_y, side_in_x))
    blocks = torch.einsum("voiyx,abcy,defx->vadobeicf", kernels_VOIKK, y, x)
    return blocks.flatten(4, 6).flatten(1, 3)


def _taps(side_out: int, side_in: int) -> Tensor:
    """(a, b, c, k) bool: pixel b of input block c is tap k of pixel a of an output block."""
    a, b, c, k = (torch.arange(n) for n in (side_out, side_in, (side_out + 2) // side_in, 3))
    return a[:, None, None, None] + k == side_in * c[:, None] + b[:, None, None]


def _rescale_jointly(x_NSGG: Tensor, available_NS11: Tensor) -> Tensor:
    """To [0, 1] over all available sequences of a crop together; a constant image becomes zeros."""
    low = torch.where(available_NS11, x_NSGG, torch.inf).amin((1, 2, 3), keepdim=True)
    high = torch.where(available_NS11, x_NSGG, -torch.inf).amax((1, 2, 3), keepdim=True)
    return ((x_NSGG - low) / (high - low).clamp_min(1e-12)).clamp_(0, 1)


@dataclass
class JitterDraws:
    """``factor_V4``: brightness, contrast, saturation, hue; ``order_V4``: which of them comes first, second, …"""

    factor_V4: np.ndarray
    order_V4: np.ndarray
    changed_V: np.ndarray
    grey_V: np.ndarray


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue in random order, then grey for some (Chen et al. 2020).

    Three channels are taken as red, green and blue; a single one knows brightness and contrast only.

    Args:
        probability: Share of the crops that are changed.
        strength: Of brightness, contrast, saturation and hue: factors lie in 1 ± strength, the hue shift in ± strength.
        grey_probability: Share of the crops of three channels that become grey.
    """

    probability: float = 0.8
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grey_probability: float = 0.2

    def draw(self, n_crops: int, n_channels: int, rng: np.random.Generator) -> JitterDraws:
        """Factors and their order for each crop."""
        centre = np.array([1, 1, 1, 0])
        low = np.maximum(centre - self.strength, [0, 0, 0, -0.5])
        factor_V4 = low + (centre + self.strength - low) * rng.random((n_crops, 4))
        order_V4 = rng.permuted(np.tile(np.arange(4), (n_crops, 1)), axis=1)
        changed_V = rng.random(n_crops) < self.probability
        return JitterDraws(factor_V4, order_V4, changed_V, rng.random(n_crops) < self.grey_probability)

    def apply(self, crops_VSGG: Tensor, draws: JitterDraws, available_VS: Tensor) -> Tensor:
        """(V, S, G, G) -> the same, S 1 or 3."""
        crops = crops_VSGG.clone()
        changes = (_brightness, _contrast, _saturation, _hue) if crops.shape[1] == 3 else (_brightness, _contrast)
        for turn in range(4):
            for kind, change in enumerate(changes):
                chosen = np.flatnonzero(draws.changed_V & (draws.order_V4[:, turn] == kind))
                if len(chosen):
                    index = put(chosen, crops.device)
                    factor = put(draws.factor_V4[chosen, kind], crops.device).float()[:, None, None, None]
                    crops[index] = change(crops[index], factor)
        if crops.shape[1] == 3 and draws.grey_V.any():
            index = put(np.flatnonzero(draws.grey_V), crops.device)
            crops[index] = _grey(crops[index]).expand(-1, 3, -1, -1)
        return crops


def _grey(x: Tensor) -> Tensor:
    """(V, 1, G, G) luma of ITU-R BT.601."""
    if x.shape[1] == 1:
        return x
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(x).mean((1, 2, 3), keepdim=True).expand_as(x), x, factor).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(x).expand_as(x), x, factor).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by ``shift`` of a full circle; lightness and saturation (HSV) stay."""
    value, span = x.amax(1), x.amax(1) - x.amin(1)
    red, green, blue = x.unbind(1)
    safe = torch.where(span > 0, span, 1.0)
    past_green = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sector = torch.where(value == red, (green - blue) / safe, past_green)
    hue = sector / 6 + shift[:, 0]
    # each channel is value - span * clamp(min(k, 4 - k), 0, 1) with k its distance from the hue around the circle
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None] + 6 * hue[:, None]) % 6
    return value[:, None] - span[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


@dataclass
class CurveDraws:
    """``curve``: numbers that describe one curve a crop; ``changed_V``: bool, which crops it is for."""

    curve: np.ndarray
    changed_V: np.ndarray


@dataclass(frozen=True)
class SplineCurve:
    """Intensities through a cubic spline of five knots, 0 -> 0 and 1 -> 1; exact zeros stay (``bspline``).

    The knots lie evenly; the three heights between are random and sorted, so that the curve mostly rises. The answer is
    clamped to [0, 1].
    """

    probability: float = 0.75

    def draw(self, n_crops: int, n_channels: int, rng: np.random.Generator) -> CurveDraws:
        """Polynomials (V, 4 pieces, 4 coefficients, the highest power first)."""
        from scipy.interpolate import CubicSpline  # most of a second to import, and few runs use it

        height_V5 = np.sort(rng.random((n_crops, 5)), axis=1)
        height_V5[:, 0], height_V5[:, -1] = 0, 1
        pieces = CubicSpline(np.linspace(0, 1, 5), height_V5, axis=1).c  # (coefficient, piece, V)
        return CurveDraws(np.ascontiguousarray(pieces.transpose(2, 1, 0)), rng.random(n_crops) < self.probability)

    def apply(self, crops_VSGG: Tensor, draws: CurveDraws, available_VS: Tensor) -> Tensor:
        """(V, S, G, G) -> the same."""
        coefficients = put(draws.curve, crops_VSGG.device).float()
        piece = (crops_VSGG * 4).long().clamp_(max=3)
        x = crops_VSGG - piece / 4
        a, b, c, d = (_look_up(coefficients[:, :, i], piece) for i in range(4))
        y = (((a * x + b) * x + c) * x + d).clamp_(0, 1)
        keep = (crops_VSGG == 0) | ~put(draws.changed_V, crops_VSGG.device)[:, None, None, None]
        return torch.where(keep, crops_VSGG, y)


@dataclass(frozen=True)
class HistogramShift:
    """Intensities through a rising broken line of 3 to 10 control points over the crop's own range (``histogram``).

    Inner heights are drawn one after another between the height before and the height after, as in MONAI's
    RandHistogramShift; all sequences share the line and the range.
    """

    probability: float = 1.0
    points: tuple[int, int] = (3, 10)

    def draw(self, n_crops: int, n_channels: int, rng: np.random.Generator) -> CurveDraws:
        """(V, 1 + most points): the number of points, then their heights, 1 where unused."""
        most = self.points[1]
        count_V = rng.integers(self.points[0], most + 1, size=n_crops)
        height_VP = np.minimum(np.arange(most) / (count_V[:, None] - 1), 1.0)
        for i in range(1, most - 1):
            drawn = _uniform(rng, (0, 1), n_crops)
            between = height_VP[:, i - 1] + drawn * (height_VP[:, i + 1] - height_VP[:, i - 1])
            height_VP[:, i] = np.where(i < count_V - 1, between, height_VP[:, i])
        curve = np.concatenate([count_V[:, None], height_VP], axis=1)
        return CurveDraws(curve, rng.random(n_crops) < self.probability)

    def apply(self, crops_VSGG: Tensor, draws: CurveDraws, available_VS: Tensor) -> Tensor:
        """(V, S, G, G) -> the same; a constant crop stays as it is."""
        device = crops_VSGG.device
        curve = put(draws.curve, device).float()
        available = available_VS[:, :, None, None]
        low = torch.where(available, crops_VSGG, torch.inf).amin((1, 2, 3), keepdim=True)
        high = torch.where(available, crops_VSGG, -torch.inf).amax((1, 2, 3), keepdim=True)
        span = high - low
        last = curve[:, 0, None, None, None] - 1  # index of the last point
        position = ((crops_VSGG - low) / span.clamp_min(1e-12)).clamp(0, 1) * last
        piece = torch.minimum(position.floor(), last - 1).long()
        below, above = _look_up(curve[:, 1:], piece), _look_up(curve[:, 1:], piece + 1)
        y = low + span * torch.lerp(below, above, position - piece)
        changed = available & (span > 0) & put(draws.changed_V, device)[:, None, None, None]
        return torch.where(changed, y, crops_VSGG)


def _look_up(table_VP: Tensor, index_VSGG: Tensor) -> Tensor:
    return table_VP.gather(1, index_VSGG.flatten(1)).view(index_VSGG.shape)


# --- extras ----------------------------------------------------------------------------------------------------------


def draw_blur(n_crops: int, probability: float, max_sigma: float, rng: np.random.Generator) -> np.ndarray:
    """(V,) standard deviations in pixels, uniform in 0.1 .. max_sigma; 0 for the crops that stay sharp."""
    sigma_V = _uniform(rng, (min(0.1, max_sigma), max_sigma), n_crops)
    return np.where(rng.random(n_crops) < probability, sigma_V, 0.0)


def blur(crops_VSGG: Tensor, sigma_V: np.ndarray) -> Tensor:
    """Gaussian blur of nine taps, edges mirrored, in place; crops with sigma 0 are left alone."""
    chosen = np.flatnonzero(sigma_V > 0)
    if not len(chosen):
        return crops_VSGG
    reach = BLUR_TAPS // 2
    taps_K = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma_V[chosen, None]) ** 2)
    kernel_NK = put((taps_K / taps_K.sum(1, keepdims=True)).astype(np.float32), crops_VSGG.device)
    index = put(chosen, crops_VSGG.device)
    _, n_channels, side, _ = crops_VSGG.shape
    x = F.pad(crops_VSGG[index], (reach,) * 4, mode="reflect" if side > reach else "replicate")
    x = x.view(1, -1, *x.shape[-2:])
    kernel = kernel_NK.repeat_interleave(n_channels, 0)[:, None]
    x = F.conv2d(F.conv2d(x, kernel[:, :, None], groups=x.shape[1]), kernel[..., None], groups=x.shape[1])
    crops_VSGG[index] = x.view(len(chosen), n_channels, side, side)
    return crops_VSGG


def gamma(crops_VSGG: Tensor, gamma_V: np.ndarray) -> Tensor:
    """Each crop in [0, 1] to the power of its gamma; 1 leaves it alone."""
    return crops_VSGG ** put(gamma_V, crops_VSGG.device).float()[:, None, None, None]


def solarize(crops_VSGG: Tensor, chosen_V: np.ndarray) -> Tensor:
    """Invert what is 0.5 or brighter in the chosen crops."""
    bright = (crops_VSGG >= 0.5) & put(chosen_V, crops_VSGG.device)[:, None, None, None]
    return torch.where(bright, 1 - crops_VSGG, crops_VSGG)
