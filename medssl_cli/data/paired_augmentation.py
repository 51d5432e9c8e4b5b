"""Random geometry and intensity of labelled slices: one geometry for all channels and the label of a sample.

As in ``transforms``: ``draw`` takes numbers from a NumPy generator on the host, ``apply`` touches none, so that CPU and
CUDA make the same batch and recorded draws make it again. All geometry of a sample (elastic, affine, flips) is one map
from pixels to places in the stored slice, read once: bilinear for images, nearest for labels. What lies outside of the
slice is its mirror image, for images and labels alike: so a label never stands on pixels that are made up, and no black
corner teaches a network the angle. Padding of smaller samples stays zero and ``IGNORE_LABEL``; they turn about their
own centre.

Letters: B samples, N chosen samples, E samples with an elastic change, C channels (S sequences of K neighbouring
slices, slice-major), H W pixels, R radius of a filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from medssl_cli.core.config import Config
from medssl_cli.core.protocols import IGNORE_LABEL, LabelledBatch
from medssl_cli.core.run import seed_for
from medssl_cli.data.transforms import keep_heap, put
from medssl_cli.data.views import Probability, Range

ELASTIC_REACH = 3.0
"""Radius of the Gaussian that smooths elastic noise, in standard deviations: 18 pixels for a sigma of 6."""


class PairedAugmentConfig(Config):
    """Random changes of a labelled slice in training (the defaults are those of CoCoSeg)."""

    horizontal_flip: Probability = 0.5
    """Share of the samples that are mirrored left to right."""
    vertical_flip: Probability = 0.5
    """Share of the samples that are mirrored top to bottom."""
    affine_prob: Probability = 0.5
    """Share of the samples that are turned, moved and scaled."""
    rotate_deg: Annotated[float, Field(ge=0, le=180)] = 15.0
    """Largest angle in degrees, both ways."""
    translate: Probability = 0.05
    """Largest shift as a share of the side, both ways and on both axes."""
    scale: Range = (0.9, 1.1)
    """Range of the factor of size; above 1 enlarges."""
    elastic_prob: Probability = 0.3
    """Share of the samples that are bent."""
    elastic_alpha: Annotated[float, Field(ge=0)] = 120.0
    """Factor of the smoothed noise from -1 to 1 that moves each pixel; 120 at a sigma of 6 moves them by 3 pixels
    (standard deviation on each axis)."""
    elastic_sigma: Annotated[float, Field(gt=0)] = 6.0
    """Standard deviation in pixels of the Gaussian that smooths this noise."""
    brightness_contrast_prob: Probability = 0.3
    """Share of the samples whose intensities become contrast x intensity + brightness, alike in all channels."""
    brightness: Probability = 0.1
    """Largest brightness, added, both ways; intensities reach from 0 to 1."""
    contrast: Probability = 0.1
    """Largest distance of the contrast, a factor, from 1."""
    noise_prob: Probability = 0.2
    """Share of the samples that get Gaussian noise, its own in each channel."""
    noise_std: tuple[Probability, Probability] = (0.04, 0.2)
    """Range of the standard deviation of this noise; intensities reach from 0 to 1."""

    @field_validator("noise_std")
    @classmethod
    def _noise_rises(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("two numbers from 0 to 1, the smaller first")
        return value


@dataclass
class PairedDraws:
    """Everything random about a batch.

    Args:
        flip_B2: bool, (left to right, top to bottom).
        affine_B: bool, which samples are turned, moved and scaled.
        linear_B22: From offsets (x, y) to the centre in the result to offsets in the stored slice, before a shift.
        shift_B2: Shift (x, y) of the result as a share of its sides.
        elastic_B: bool, which samples are bent.
        elastic_E2HW: Uniform noise from -1 to 1 for shifts along x and y, ``ELASTIC_REACH`` sigma wider on each side.
        contrast_B, brightness_B: Factor and summand of intensities; 1 and 0 for no change.
        noise_B: bool, which samples get noise.
        noise_NCHW: This noise, with its standard deviation.
    """

    flip_B2: np.ndarray
    affine_B: np.ndarray
    linear_B22: np.ndarray
    shift_B2: np.ndarray
    elastic_B: np.ndarray
    elastic_E2HW: np.ndarray
    contrast_B: np.ndarray
    brightness_B: np.ndarray
    noise_B: np.ndarray
    noise_NCHW: np.ndarray


class PairedAugment:
    """Changes images and label maps of a batch together; ``draw`` then ``apply``, or both in one call.

    Args:
        config: What is done, and how often.
    """

    def __init__(self, config: PairedAugmentConfig) -> None:
        self.config = config

    def __call__(self, batch: LabelledBatch, seed: int) -> LabelledBatch:
        """Draw and apply: the same batch and seed give the same result."""
        return self.apply(batch, self.draw(batch, seed))

    def draw(self, batch: LabelledBatch, seed: int) -> PairedDraws:
        """Everything random, one stream of numbers for each purpose, so that no setting moves the draws of another.

        Args:
            batch: On any device; its shape alone is looked at.
            seed: Of this batch alone, from the run's seed, step, micro-batch and rank.
        """
        config = self.config
        count, channels, height, width = batch.images_BSHW.shape
        affine_B, linear_B22, shift_B2 = self._draw_affine(count, _rng(seed, "affine"))
        rng = _rng(seed, "elastic")
        elastic_B = (rng.random(count) < config.elastic_prob) & (config.elastic_alpha > 0)
        margin = 2 * self._radius()
        bend = rng.random((int(elastic_B.sum()), 2, height + margin, width + margin), np.float32)
        rng = _rng(seed, "noise")
        noise_B = rng.random(count) < config.noise_prob
        std_N = rng.uniform(*config.noise_std, int(noise_B.sum())).astype(np.float32)
        noise_NCHW = rng.standard_normal((len(std_N), channels, height, width), np.float32)
        rng = _rng(seed, "intensity")
        changed_B = rng.random(count) < config.brightness_contrast_prob
        contrast_B, brightness_B = (
            np.where(changed_B, rng.uniform(-most, most, count), 0) for most in (config.contrast, config.brightness)
        )
        return PairedDraws(
            flip_B2=_rng(seed, "flip").random((count, 2)) < (config.horizontal_flip, config.vertical_flip),
            affine_B=affine_B,
            linear_B22=linear_B22,
            shift_B2=shift_B2,
            elastic_B=elastic_B,
            elastic_E2HW=bend * 2 - 1,
            contrast_B=1 + contrast_B,
            brightness_B=brightness_B,
            noise_B=noise_B,
            noise_NCHW=noise_NCHW * std_N[:, None, None, None],
        )

    @torch.no_grad()
    def apply(self, batch: LabelledBatch, draws: PairedDraws) -> LabelledBatch:
        """The changed batch, on the device of ``batch``, which stays as it is; samples without a draw stay bit for bit.

        Images stay in [0, 1], an absent sequence and the padding stay zero.
        """
        on_cpu = batch.images_BSHW.device.type == "cpu"
        if on_cpu:
            keep_heap()
        with torch.autocast(batch.images_BSHW.device.type, enabled=False):
            images_BSHW, label_map_BHW = batch.images_BSHW.clone(), batch.label_map_BHW.clone()
            warped_B = draws.affine_B | draws.elastic_B
            mirrored = np.flatnonzero(draws.flip_B2.any(1) & ~warped_B)
            for chosen, change in (
                (mirrored, _mirrored),
                (np.flatnonzero(warped_B & ~draws.elastic_B), _warped),
                (np.flatnonzero(draws.elastic_B), self._bent),
            ):
                for some in _parts(chosen, on_cpu):
                    index = put(some, images_BSHW.device)
                    images_BSHW[index], label_map_BHW[index] = change(batch, draws, some)
            changed_B = _change_intensities(images_BSHW, draws)
            if (warped_B | changed_B).any():
                _clear(images_BSHW, batch)
        return replace(batch, images_BSHW=images_BSHW, label_map_BHW=label_map_BHW)

    def _bent(self, batch: LabelledBatch, draws: PairedDraws, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = np.searchsorted(np.flatnonzero(draws.elastic_B), chosen)
        noise_E2HW = put(draws.elastic_E2HW[rows], batch.images_BSHW.device)
        bend_E2HW = smooth(noise_E2HW, self.config.elastic_sigma).mul_(self.config.elastic_alpha)
        return _warped(batch, draws, chosen, bend_E2HW)

    def _radius(self) -> int:
        return elastic_radius(self.config.elastic_sigma)

    def _draw_affine(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(B,) bool, (B, 2, 2) inverse of rotation and scale, (B, 2) shift (x, y); identity where none is drawn."""
        config = self.config
        chosen_B = rng.random(count) < config.affine_prob
        angle_B = np.deg2rad(np.where(chosen_B, rng.uniform(-config.rotate_deg, config.rotate_deg, count), 0))
        scale_B = np.where(chosen_B, rng.uniform(*config.scale, count), 1)
        shift_B2 = np.where(chosen_B[:, None], rng.uniform(-config.translate, config.translate, (count, 2)), 0)
        cos_B, sin_B = np.cos(angle_B) / scale_B, np.sin(angle_B) / scale_B
        linear_B22 = np.stack([np.stack([cos_B, sin_B], -1), np.stack([-sin_B, cos_B], -1)], -2)
        changed_B = (linear_B22 != np.eye(2)).any((1, 2)) | (shift_B2 != 0).any(1)  # else pixels are only copied
        return changed_B, linear_B22, shift_B2


def _parts(chosen: np.ndarray, one_by_one: bool) -> list[np.ndarray]:
    """All at once on an accelerator; one by one on a CPU, in whose cache the maps of one sample stay."""
    if not len(chosen):
        return []
    return np.split(chosen, len(chosen)) if one_by_one else [chosen]


# --- geometry --------------------------------------------------------------------------------------------------------


def elastic_radius(sigma: float) -> int:
    """Radius in pixels of the filter of ``smooth``."""
    return math.ceil(ELASTIC_REACH * sigma)


def smooth(noise_E2HW: Tensor, sigma: float) -> Tensor:
    """A Gaussian of ``ELASTIC_REACH`` sigma along both axes: (E, 2, H + 2R, W + 2R) -> (E, 2, H, W), new memory.

    Noise reaches as far as the filter, so that the edges move as much as the centre. Sums of shifted copies take a
    fifth of the time of a convolution on a CPU; pairs of equal weight are added first.
    """
    radius = elastic_radius(sigma)
    taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    weights = (taps / (taps[0] + 2 * taps[1:].sum())).tolist()
    for axis in (3, 2):
        length = noise_E2HW.shape[axis] - 2 * radius
        summed = noise_E2HW.narrow(axis, radius, length) * weights[0]
        for reach in range(1, radius + 1):
            pair = noise_E2HW.narrow(axis, radius - reach, length) + noise_E2HW.narrow(axis, radius + reach, length)
            summed.add_(pair, alpha=weights[reach])
        noise_E2HW = summed
    return noise_E2HW


def _mirrored(batch: LabelledBatch, draws: PairedDraws, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Images and label maps of the chosen samples, their pixels copied from the other side; padding stays in place."""
    device = batch.images_BSHW.device
    index = put(chosen, device)
    images_NCHW, label_map_NHW = batch.images_BSHW[index], batch.label_map_BHW[index]
    flip_N2 = put(draws.flip_B2[chosen], device)
    height_N1, width_N1 = batch.sizes_B2[index].split(1, dim=1)
    rows_NH = _flipped(label_map_NHW.shape[1], height_N1, flip_N2[:, 1:])
    columns_NW = _flipped(label_map_NHW.shape[2], width_N1, flip_N2[:, :1])
    place_NP = (rows_NH[:, :, None] * label_map_NHW.shape[2] + columns_NW[:, None]).flatten(1)
    return _picked(images_NCHW, place_NP), _picked(label_map_NHW[:, None], place_NP)[:, 0]


def _flipped(extent: int, side_N1: Tensor, flip_N1: Tensor) -> Tensor:
    """(N, extent) int64: where each row or column comes from."""
    at = torch.arange(extent, device=side_N1.device)
    return torch.where(flip_N1 & (at < side_N1), side_N1 - 1 - at, at)


def _picked(images_NCHW: Tensor, place_NP: Tensor) -> Tensor:
    """The pixels at flat places, the same for all channels."""
    n_channels = images_NCHW.shape[1]
    return images_NCHW.flatten(2).gather(2, place_NP[:, None].expand(-1, n_channels, -1)).view(images_NCHW.shape)


def _warped(
    batch: LabelledBatch, draws: PairedDraws, chosen: np.ndarray, bend_N2HW: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Images and label maps of the chosen samples, read once through all of their geometry."""
    index = put(chosen, batch.images_BSHW.device)
    images_NCHW, label_map_NHW = batch.images_BSHW[index], batch.label_map_BHW[index]
    height, width = label_map_NHW.shape[-2:]
    sizes_N2 = batch.sizes_B2[index]
    x_NHW, y_NHW = _sources(draws, chosen, sizes_N2, (height, width), bend_N2HW)
    place_NP = (y_NHW.round() * width).add_(x_NHW.round()).long().flatten(1)
    label_map_NHW = _picked(label_map_NHW[:, None], place_NP)[:, 0]
    grid = torch.stack([x_NHW.mul_(2 / max(width - 1, 1)), y_NHW.mul_(2 / max(height - 1, 1))], -1).sub_(1)
    images_NCHW = F.grid_sample(images_NCHW, grid, padding_mode="border", align_corners=True).clamp_(0, 1)
    rows_NH, columns_NW = _inside(sizes_N2, height, width)
    label_map_NHW.masked_fill_(~rows_NH[:, :, None], IGNORE_LABEL).masked_fill_(~columns_NW[:, None], IGNORE_LABEL)
    return images_NCHW, label_map_NHW


def _sources(
    draws: PairedDraws, chosen: np.ndarray, sizes_N2: Tensor, shape: tuple[int, int], bend_N2HW: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x, y), each (N, H, W): the place in the stored slice that each pixel of the result is read from, in pixels.

    Every place lies within the slice: beyond its outermost pixels it runs back, as in a mirror.
    """
    device = sizes_N2.device
    last_N2 = (sizes_N2.flip(1) - 1).float()  # (x, y)
    sign_N2 = np.where(draws.flip_B2[chosen], -1.0, 1.0)
    linear_N22 = put((draws.linear_B22[chosen] * sign_N2[:, :, None]).astype(np.float32), device)
    shift_N2 = put(draws.shift_B2[chosen].astype(np.float32), device) * sizes_N2.flip(1)
    from_x = torch.arange(shape[1], device=device) - (last_N2[:, :1] / 2 + shift_N2[:, :1])  # (N, W)
    from_y = torch.arange(shape[0], device=device) - (last_N2[:, 1:] / 2 + shift_N2[:, 1:])  # (N, H)
    offset_x, offset_y = from_x[:, None], from_y[:, :, None]
    if bend_N2HW is not None:
        offset_x, offset_y = offset_x + bend_N2HW[:, 0], offset_y + bend_N2HW[:, 1]
    found = []
    for axis in (0, 1):
        factor_x, factor_y = linear_N22[:, axis].view(-1, 2, 1, 1).unbind(1)
        last = last_N2[:, axis, None, None]
        found.append(_reflected(offset_x * factor_x + offset_y * factor_y + last / 2, last))
    return found[0], found[1]


def _reflected(at_NHW: Tensor, last_N11: Tensor) -> Tensor:
    """Places on a line of pixels 0 .. last, in place: what lies beyond an end comes back, again and again."""
    period = (2 * last_N11).clamp_min(1)
    at_NHW.sub_((at_NHW / period).round_().mul_(period)).abs_()  # a wave of triangles; at most period / 2 = last
    return torch.minimum(at_NHW, last_N11)


def _inside(sizes_N2: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(N, H) and (N, W) bool: the rows and columns that are no padding."""
    rows_NH = torch.arange(height, device=sizes_N2.device) < sizes_N2[:, :1]
    return rows_NH, torch.arange(width, device=sizes_N2.device) < sizes_N2[:, 1:]


# --- intensity -------------------------------------------------------------------------------------------------------


def _change_intensities(images_BSHW: Tensor, draws: PairedDraws) -> np.ndarray:
    """Contrast, brightness and noise, in place; gives which samples were changed, (B,) bool."""
    device = images_BSHW.device
    recoloured_B = (draws.contrast_B != 1) | (draws.brightness_B != 0)
    chosen = np.flatnonzero(recoloured_B)
    if len(chosen):
        index = put(chosen, device)
        factor, summand = (
            put(values[chosen].astype(np.float32), device)[:, None, None, None]
            for values in (draws.contrast_B, draws.brightness_B)
        )
        images_BSHW[index] = (images_BSHW[index] * factor + summand).clamp_(0, 1)
    chosen = np.flatnonzero(draws.noise_B)
    if len(chosen):
        index = put(chosen, device)
        images_BSHW[index] = (images_BSHW[index] + put(draws.noise_NCHW, device)).clamp_(0, 1)
    return recoloured_B | draws.noise_B


def _clear(images_BSHW: Tensor, batch: LabelledBatch) -> None:
    """Zeros in the padding and the absent sequences, in place; a product with 1 changes no bit of the others."""
    channels, height, width = images_BSHW.shape[1:]
    available_BC = batch.available_BS.repeat(1, channels // batch.available_BS.shape[1])
    rows_BH, columns_BW = _inside(batch.sizes_B2, height, width)
    images_BSHW.mul_((available_BC[:, :, None] & rows_BH[:, None])[..., None].float())
    images_BSHW.mul_(columns_BW[:, None, None].float())


def _rng(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(seed_for(seed, purpose))
