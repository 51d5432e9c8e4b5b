"""Global and local crops of a batch and the iBOT token masks, made for the whole batch where it lies.

``MultiCrop`` draws first and applies afterwards. A draw is a pure function of the batch's sizes and regions and of one
seed, and is kept as plain values: applied again it gives the same crops, and CPU and CUDA give the same crops too.

Letters: B samples, V crops (view-major: all samples of view 1, then of view 2), S sequences or colour channels, H W
space, G side of a crop, N patch tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, field_validator
from torch import Tensor

from medssl_cli.core.config import Config
from medssl_cli.core.errors import ConfigError
from medssl_cli.core.protocols import Batch, SliceBatch
from medssl_cli.core.run import seed_for
from medssl_cli.data import transforms
from medssl_cli.data.token_masks import (
    MaskMode,
    MaskSampling,
    MaskShape,
    TokenMasks,
    draw_token_masks,
    hidden_whole,
    no_masks,
)

Probability = Annotated[float, Field(ge=0, le=1)]


def _rising(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1]:
        raise ValueError("two positive numbers, the smaller first")
    return values


def _rising_share(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1] <= 1:
        raise ValueError("two numbers above 0 and up to 1, the smaller first")
    return values


Range = Annotated[tuple[float, float], AfterValidator(_rising)]
Share = Annotated[tuple[float, float], AfterValidator(_rising_share)]


class CropsConfig(Config):
    """Multi-crop views of one slice (Caron et al. 2020) and their random changes."""

    global_crops_number: Literal[2] = 2
    """Global crops of each slice: always two, for each is the target of the other."""
    global_crops_size: Annotated[int, Field(ge=2)] = 224
    """Side of a global crop in pixels; a multiple of the patch size."""
    local_crops_size: Annotated[int, Field(ge=2)] = 96
    """Side of a local crop in pixels; a multiple of the patch size."""
    local_crops_number: NonNegativeInt = 8
    """Local crops of each slice; 0 turns them off."""
    global_crops_scale: Share = (0.32, 1.0)
    """Share of the slice that a global crop takes: of its area, or of each side with crop_from_tumor_foreground."""
    local_crops_scale: Share = (0.05, 0.32)
    """The same for a local crop."""
    crops_aspect: Range = (3 / 4, 4 / 3)
    """Aspect of a crop before it is made square; with crop_from_tumor_foreground the factor on one of its sides."""
    crop_from_tumor_foreground: bool = False
    """Centre each crop on a random pixel of the region of interest; on the middle of the slice where there is none."""
    horizontal_flip: Probability = 0.5
    """Share of the crops that are mirrored left to right."""
    intensity_aug: Literal["none", "rc", "color_jittering", "bspline", "histogram"] = "none"
    """Random change of intensities: rc (random convolution), color_jittering, bspline, histogram; none or null."""
    intensity_aug_prob: Probability | None = None
    """Share of the crops that it changes; null takes its own: rc 1, color_jittering 0.8, bspline 0.75, histogram 1."""
    rc_size: Annotated[int, Field(ge=8, multiple_of=4)] = 512
    """Side in pixels at which the random net of rc works; a multiple of 4. Smaller is faster and filters coarser."""
    color_jitter: tuple[Probability, Probability, Probability, Annotated[float, Field(ge=0, le=0.5)]] = (
        0.4,
        0.4,
        0.2,
        0.1,
    )
    """Strength of color_jittering in brightness, contrast, saturation and hue."""
    grey_prob: Probability = 0.2
    """Share of the crops that color_jittering turns grey, three channels only."""
    solarize_prob: Probability = 0.2
    """Share of the second global crops whose bright half color_jittering inverts, plain pictures only."""
    max_blur_radius: PositiveFloat = 1.0
    """Largest standard deviation of the blur in pixels of the crop; the smallest is 0.1."""
    blur_probs: tuple[Probability, Probability, Probability] = (0.0, 0.9, 0.5)
    """Share of blurred crops: first global, second global, local. Public weights saw it; meant was [1.0, 0.1, 0.5]."""
    gamma_range: Range = (0.75, 1.5)
    """Range of the gamma that each second global crop is raised to; [1, 1] turns it off."""
    mean: float | tuple[float, ...] = 0.45
    """Subtracted from every intensity in 0..1, background included; one number, or one a channel."""
    std: PositiveFloat | tuple[PositiveFloat, ...] = 0.22
    """Divided by afterwards; one number, or one a channel."""

    @field_validator("global_crops_number", mode="before")
    @classmethod
    def _two_views(cls, value: Any) -> Any:
        if value != 2:
            raise ValueError(f"{value} global crops: the losses compare two, of which each is the target of the other")
        return 2

    @field_validator("intensity_aug", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return "none" if value is None else value


def check_patch(config: CropsConfig, patch_size: int) -> list[str]:
    """Faults of the crop sizes for a patch size, each naming the nearest sizes that fit; empty when all is well."""
    sizes = {"crops.global_crops_size": config.global_crops_size}
    if config.local_crops_number:
        sizes["crops.local_crops_size"] = config.local_crops_size
    faults = []
    for key, size in sizes.items():
        if size % patch_size:
            below, above = size // patch_size * patch_size, (size // patch_size + 1) * patch_size
            near = f"{below} and {above}" if below else str(above)
            faults.append(f"{key}: {size} is not a multiple of the patch size {patch_size}; the nearest are {near}")
    return faults


@dataclass
class ViewDraws:
    """What was drawn for all crops of one size.

    Args:
        boxes_V4: int64 (top, left, height, width) in pixels of the stored slice, on the batch's device.
        flip_V: bool, mirrored left to right.
        intensity: What the intensity change drew; None without one.
        blur_sigma_V: Pixels; 0 leaves a crop sharp.
        gamma_V: 1 leaves a crop alone.
        solarize_V: bool.
    """

    boxes_V4: Tensor
    flip_V: np.ndarray
    intensity: Any
    blur_sigma_V: np.ndarray
    gamma_V: np.ndarray
    solarize_V: np.ndarray


@dataclass
class CropDraws:
    """What was drawn for one batch: ``MultiCrop.apply`` makes the same crops from it every time."""

    global_views: ViewDraws
    local_views: ViewDraws | None
    token_masks: TokenMasks


class MultiCrop:
    """Two global and n local crops of every slice of a batch, with the token masks of the global ones.

    Args:
        config: Sizes, scales and random changes.
        patch_size: Side of a patch in pixels.
        n_sequences: Sequences of a case; 1 for plain pictures, whatever number of colour channels they have.
        mask_sample_probability, mask_ratio_min_max, mask_mode, mask_exact, mask_sampling, pred_ratio, pred_ratio_var,
            pred_shape: As in ``token_masks.draw_token_masks``.

    Raises:
        ConfigError: A crop size does not divide by the patch size, or colour jitter meets a number of sequences that
            it cannot take.
    """

    def __init__(
        self,
        config: CropsConfig,
        patch_size: int,
        n_sequences: int,
        *,
        mask_sample_probability: float = 0.5,
        mask_ratio_min_max: tuple[float, float] = (0.1, 0.5),
        mask_mode: MaskMode = "full_sequence",
        mask_exact: bool = False,
        mask_sampling: MaskSampling = "stratified",
        pred_ratio: Sequence[float] = (0.0, 0.3),
        pred_ratio_var: Sequence[float] = (0.0, 0.2),
        pred_shape: MaskShape = "block",
    ) -> None:
        faults = check_patch(config, patch_size)
        if faults:
            raise ConfigError(
                "A crop size does not fit the patch size.",
                where="\n".join(faults),
                fix="set one of the sizes named",
                code="crop_size_patch",
            )
        self.config, self.n_sequences = config, n_sequences
        self.grid = (config.global_crops_size // patch_size,) * 2
        self._draw_masks = partial(
            draw_token_masks,
            sample_probability=mask_sample_probability,
            ratio_min_max=mask_ratio_min_max,
            mode=mask_mode,
            exact=mask_exact,
            sampling=mask_sampling,
            pred_ratio=pred_ratio,
            pred_ratio_var=pred_ratio_var,
            shape=pred_shape,
        )
        self.intensity = build_intensity(config)
        if isinstance(self.intensity, transforms.ColorJitter):
            _check_colours(n_sequences, "sequences")

    def __call__(self, batch: SliceBatch, seed: int, *, masking: bool = True) -> Batch:
        """Draw and apply: the same batch and seed give the same views.

        Args:
            batch: Stored slices, on any device; the views are made there.
            seed: Of this batch alone, from the run's seed, step, micro-batch and rank.
            masking: False hides no token, as before ``ibot.pred_start_epoch``; the crops are the same.
        """
        draws = self.draw(batch, seed, masking=masking)
        global_VSHW, local_VSHW = self.apply(batch, draws)
        available_BS = self._available(batch)
        return Batch(
            global_VSHW=global_VSHW,
            local_VSHW=local_VSHW,
            token_mask_VN=_token_mask(draws.token_masks, available_BS),
            available_BS=available_BS,
            case_ids=batch.case_ids,
        )

    @torch.no_grad()
    def draw(self, batch: SliceBatch, seed: int, *, masking: bool = True) -> CropDraws:
        """Everything random about the views of a batch."""
        config = self.config
        blur_first, blur_second, blur_local = config.blur_probs
        ranks = None
        if config.crop_from_tumor_foreground and batch.roi_BHW is not None:
            ranks = transforms.rank_pixels(batch.roi_BHW)
        blurs: tuple[float, ...] = (blur_first, blur_second)
        global_views = self._draw_views(batch, ranks, seed, "global", config.global_crops_scale, blurs)
        local_views = None
        if config.local_crops_number:
            blurs = (blur_local,) * config.local_crops_number
            local_views = self._draw_views(batch, ranks, seed, "local", config.local_crops_scale, blurs)
        sizes = (2 * len(batch.images_BSHW), self.n_sequences, self.grid)
        masks = self._draw_masks(*sizes, _rng(seed, "token_masks")) if masking else no_masks(*sizes)
        return CropDraws(global_views, local_views, masks)

    @torch.no_grad()
    def apply(self, batch: SliceBatch, draws: CropDraws) -> tuple[Tensor, Tensor | None]:
        """Normalised global (2B, S, G, G) and local (n*B, S, L, L) crops; nothing is drawn here."""
        if batch.images_BSHW.device.type == "cpu":
            transforms.keep_heap()
        with torch.autocast(batch.images_BSHW.device.type, enabled=False):
            global_VSHW = self._apply_views(batch, draws.global_views, self.config.global_crops_size)
            if draws.local_views is None:
                return global_VSHW, None
            return global_VSHW, self._apply_views(batch, draws.local_views, self.config.local_crops_size)

    def _draw_views(
        self,
        batch: SliceBatch,
        roi_rank_BHW: Tensor | None,
        seed: int,
        kind: str,
        scale: tuple[float, float],
        blur_probs: Sequence[float],
    ) -> ViewDraws:
        """One stream of numbers for each purpose, so that no setting moves the draws of another."""
        config = self.config
        n_samples, n_channels = batch.images_BSHW.shape[:2]
        n_views = len(blur_probs)
        n_crops = n_views * n_samples
        crop_kind = transforms.SideCrop if config.crop_from_tumor_foreground else transforms.AreaCrop
        crop = crop_kind(scale, config.crops_aspect)
        blur_rng = _rng(seed, kind, "blur")
        sigmas = [transforms.draw_blur(n_samples, p, config.max_blur_radius, blur_rng) for p in blur_probs]
        gamma_V, solarize_V = np.ones(n_crops), np.zeros(n_crops, dtype=bool)
        if kind == "global":
            second = slice(n_samples, 2 * n_samples)
            gamma_V[second] = _rng(seed, kind, "gamma").uniform(*config.gamma_range, n_samples)
            if isinstance(self.intensity, transforms.ColorJitter) and self.n_sequences == 1:
                solarize_V[second] = _rng(seed, kind, "solarize").random(n_samples) < config.solarize_prob
        intensity = None
        if self.intensity is not None:
            intensity = self.intensity.draw(n_crops, n_channels, _rng(seed, kind, "intensity"))
        return ViewDraws(
            boxes_V4=crop.draw(n_views, batch.sizes_B2, roi_rank_BHW, _rng(seed, kind, "boxes")),
            flip_V=_rng(seed, kind, "flip").random(n_crops) < config.horizontal_flip,
            intensity=intensity,
            blur_sigma_V=np.concatenate(sigmas),
            gamma_V=gamma_V,
            solarize_V=solarize_V,
        )

    def _apply_views(self, batch: SliceBatch, draws: ViewDraws, size: int) -> Tensor:
        images_BSHW = batch.images_BSHW
        n_samples, n_channels = images_BSHW.shape[:2]
        available_VS = self._available(batch).repeat(len(draws.flip_V) // n_samples, 1).expand(-1, n_channels)
        crops = transforms.resize_crops(images_BSHW, draws.boxes_V4, draws.flip_V, size)
        if self.intensity is not None:
            if isinstance(self.intensity, transforms.ColorJitter):
                _check_colours(n_channels, "channels")
            crops = self.intensity.apply(crops, draws.intensity, available_VS)
        crops = transforms.blur(crops, draws.blur_sigma_V)
        raised = np.flatnonzero(draws.gamma_V != 1)
        if len(raised):
            part = slice(int(raised[0]), int(raised[-1]) + 1)  # one run of crops: the second view
            crops[part] = transforms.gamma(crops[part], draws.gamma_V[part])
        if draws.solarize_V.any():
            crops = transforms.solarize(crops, draws.solarize_V)
        crops = crops * available_VS[:, :, None, None]  # a change of colours may have reached an absent sequence
        return normalize(crops, self.config.mean, self.config.std)

    def _available(self, batch: SliceBatch) -> Tensor:
        """(B, n_sequences) bool: a plain picture is there when any of its channels is."""
        available_BS = batch.available_BS
        n_channels = batch.images_BSHW.shape[1]
        if self.n_sequences not in (1, n_channels):
            raise ValueError(f"{self.n_sequences} sequences are configured, the batch has {n_channels} channels")
        return available_BS.any(1, keepdim=True) if self.n_sequences == 1 else available_BS


def build_intensity(config: CropsConfig) -> transforms.Intensity | None:
    """The intensity change that the configuration names, or None."""
    asked = config.intensity_aug_prob

    def probability(own: float) -> float:
        return own if asked is None else asked

    if config.intensity_aug == "rc":
        return transforms.RandomConvolution(probability(1.0), config.rc_size)
    if config.intensity_aug == "color_jittering":
        return transforms.ColorJitter(probability(0.8), config.color_jitter, config.grey_prob)
    if config.intensity_aug == "bspline":
        return transforms.SplineCurve(probability(0.75))
    if config.intensity_aug == "histogram":
        return transforms.HistogramShift(probability(1.0))
    return None


def normalize(
    crops_VSGG: Tensor, mean: float | tuple[float, ...] = 0.45, std: float | tuple[float, ...] = 0.22
) -> Tensor:
    """(x - mean) / std on every pixel of (…, S, G, G): the one normaliser of training and inference.

    Background is an intensity like any other: exact zeros become -mean / std.

    Raises:
        ConfigError: As many means or deviations as there are no channels.
    """
    shifted = crops_VSGG - _a_channel("mean", mean, crops_VSGG)
    return shifted.div_(_a_channel("std", std, crops_VSGG))


def _a_channel(key: str, values: float | tuple[float, ...], crops_VSGG: Tensor) -> Tensor | float:
    if isinstance(values, (int, float)):
        return values
    n_channels = crops_VSGG.shape[-3]
    if len(values) not in (1, n_channels):
        raise ConfigError(
            "The normalisation does not fit the images.",
            where=f"crops.{key} has {len(values)} values, the images have {n_channels} channels",
            fix=f"give one number or {n_channels}",
            code="normalisation_channels",
        )
    return transforms.put(np.asarray(values, dtype=np.float32), crops_VSGG.device)[:, None, None]


def _token_mask(masks: TokenMasks, available_BS: Tensor) -> Tensor:
    """(2B, S*N) bool on the device."""
    device = available_BS.device
    masks_VSN = transforms.put(masks.blocks_CSN, device)
    if masks.pick_C is not None:
        hidden_VS = hidden_whole(transforms.put(masks.pick_C, device), available_BS.repeat(2, 1))
        masks_VSN = masks_VSN | hidden_VS[:, :, None]
    return masks_VSN.flatten(1)


def _check_colours(count: int, what: str) -> None:
    if count not in (1, 3):
        raise ConfigError(
            f"Colour jitter takes one or three channels, not {count}.",
            where=f"crops.intensity_aug=color_jittering with {count} {what}",
            fix="set crops.intensity_aug to rc, bspline, histogram or none",
            code="color_jittering_channels",
        )


def _rng(seed: int, *purpose: str) -> np.random.Generator:
    return np.random.default_rng(seed_for(seed, *purpose))
