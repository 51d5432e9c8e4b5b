"""A backbone with what belongs to it, and a case as it wants to see it: the same numbers as in training.

Letters: N slices (or one picture), B slices computed together, S sequences or colour channels, H W pixels of a slice,
h w patches, D width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from medssl_cli.core.case import Case
from medssl_cli.core.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from medssl_cli.core.run import hide_home
from medssl_cli.core.volume import AXIAL, affine_spacing
from medssl_cli.data.images import is_image
from medssl_cli.data.preprocess import (
    Prepared,
    PreprocessConfig,
    prepare_case,
    prepare_picture,
    scale_to_unit,
    sequence_limits,
)
from medssl_cli.data.views import normalize
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.rollout import features_and_rollout
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import load_backbone
from medssl_cli.services.devices import describe_device
from medssl_cli.services.lookup import FoundModel, refuse_segmenter

log = logging.getLogger(__name__)

PLAIN = ("image",)
"""The one sequence of a backbone for plain pictures."""


@dataclass(frozen=True)
class Backbone:
    """A trained network with the preprocessing it was trained with.

    Args:
        found: Where it came from.
        model: In evaluation mode, on ``device``.
        card: The JSON beside its weights.
        preprocess: From files to one grid and to intensity limits.
        mean, std: One number, or one a channel.
        spatial_size: Side of the training window: smaller slices were enlarged to it.
        device: Where it computes.
        windows_hu: (name, low, high) of the windows that make the channels of a picture from a CT volume.
        slices: Plain pictures in training were slices of volumes.
    """

    found: FoundModel
    model: VisionTransformer | ConvNeXt
    card: dict[str, Any]
    preprocess: PreprocessConfig
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    spatial_size: int
    device: torch.device
    windows_hu: tuple[tuple[str, float, float], ...] = ()
    slices: bool = False

    @property
    def sequences(self) -> tuple[str, ...]:
        """Names in channel order; ``image`` for a backbone of plain pictures."""
        return tuple(self.model.sequences or PLAIN)

    @property
    def reference(self) -> str:
        """The sequence whose grid the others are brought to, when a case has it."""
        reference = self.preprocess.reference
        return reference if reference in self.sequences else self.sequences[0]

    @property
    def colours(self) -> int:
        """Channels that the normalisation is made for; a grey picture is repeated to as many."""
        return max(len(v) if isinstance(v, tuple) else 1 for v in (self.mean, self.std))

    def network_size(self, size: tuple[int, int], spacing: tuple[float, float], max_side: int) -> tuple[int, int]:
        """(height, width) in pixels of a slice as the network sees it, multiples of the patch size.

        Scaled as in training: square pixels, and enlarged where smaller than the training window; then reduced to
        ``max_side``. A picture keeps its size up to that.
        """
        smallest = min(spacing)
        height, width = (n * mm / smallest for n, mm in zip(size, spacing, strict=True))
        if self.model.sequences is not None or self.slices:
            scale = max(1.0, self.spatial_size / max(height, width))
            height, width = height * scale, width * scale
        scale = min(1.0, max_side / max(height, width))
        patch, most = self.model.patch_size, max(1, max_side // self.model.patch_size)
        rows, columns = (min(most, max(1, round(n * scale / patch))) for n in (height, width))
        return rows * patch, columns * patch

    def to_network(self, images_BSHW: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Slices in [0, 1], resized as training resizes its crops (antialiased, bicubic) and normalised."""
        images = torch.from_numpy(images_BSHW).to(self.device)
        if tuple(images.shape[-2:]) != size:
            images = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp_(0, 1)
        return normalize(images, self.mean, self.std)

    @torch.inference_mode()
    def see(self, images_BSHW: Tensor, available_S: np.ndarray, *, with_rollout: bool = False) -> Tokens:
        """Normalised slices through the network.

        Args:
            images_BSHW: From ``to_network``.
            available_S: Which sequences exist; ignored by a backbone of plain pictures.
            with_rollout: Compute the attention rollout too.

        Raises:
            NonFiniteError: The network gave NaN or infinity.
            ConfigError: A rollout of a network without attention.
        """
        available_BS = None
        if self.model.sequences is not None:
            available_BS = torch.from_numpy(available_S).to(self.device).expand(len(images_BSHW), -1)
        rollout = None
        if with_rollout and isinstance(self.model, ConvNeXt):
            raise ConfigError(
                "A convolutional network has no attention to roll out.",
                where=hide_home(str(self.found.weights)),
                fix="pass heatmap_method=similarity",
                code="heatmap_without_attention",
            )
        if with_rollout and isinstance(self.model, VisionTransformer):
            features, share_BN = features_and_rollout(self.model, images_BSHW, available_BS)
            rollout = share_BN.unflatten(1, features.grid).cpu().numpy()
        else:
            features = self.model(images_BSHW, None, available_BS)
        tokens = Tokens(
            features.cls_BD.float().cpu().numpy(),
            features.patches_BND.unflatten(1, features.grid).float().cpu().numpy(),
            rollout,
        )
        self._refuse_nonfinite(tokens)
        return tokens

    def _refuse_nonfinite(self, tokens: Tokens) -> None:
        if not (np.isfinite(tokens.cls_BD).all() and np.isfinite(tokens.patches_BShwD).all()):
            raise NonFiniteError(
                "The backbone gives NaN or infinite features.",
                where=hide_home(str(self.found.weights)),
                fix="use an earlier checkpoint or another model; the images themselves are finite",
                code="features_nonfinite",
            )


class Tokens(NamedTuple):
    """What the network made of some slices."""

    cls_BD: np.ndarray
    patches_BShwD: np.ndarray
    rollout_BShw: np.ndarray | None


@dataclass(frozen=True)
class Planes:
    """The slices of a case along the axis that the network sees, or its one picture; scaled only when asked for.

    Args:
        stored_SNHW: Intensities as prepared; zeros where a sequence is absent.
        low_SN, high_SN: Values that become 0 and 1.
        spacing: Pixel size (y, x) in mm; 1, 1 for a picture.
        available_S: Which sequences exist; one entry for a picture.
        prepared: The way back to the file's grid; None for a picture.
    """

    stored_SNHW: np.ndarray
    low_SN: np.ndarray
    high_SN: np.ndarray
    spacing: tuple[float, float]
    available_S: np.ndarray
    prepared: Prepared | None

    def __len__(self) -> int:
        return self.stored_SNHW.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        height, width = self.stored_SNHW.shape[-2:]
        return height, width

    def scaled(self, index: int) -> np.ndarray:
        """(S, H, W) float32 in [0, 1], as in training."""
        return scale_to_unit(self.stored_SNHW[:, index], self.low_SN[:, index], self.high_SN[:, index])

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """(B, S, H, W) of several slices."""
        return np.stack([self.scaled(int(index)) for index in indices])

    @property
    def filled_N(self) -> np.ndarray:
        """Which slices hold more than one value in some sequence; padding holds none."""
        filled_SN = self.high_SN > self.low_SN
        if len(self.available_S) > 1:
            filled_SN = filled_SN[self.available_S]
        return np.asarray(filled_SN.any(axis=0))


def open_backbone(found: FoundModel, device: torch.device) -> Backbone:
    """Load the weights and check that their card tells all that is needed.

    Raises:
        ConfigError: The model is a segmentation network.
        CheckpointError: Weights or card missing, altered, or without preprocessing or normalisation.
    """
    refuse_segmenter(found)
    model, card = load_backbone(found.weights, device)
    where = hide_home(str(found.run or found.weights))
    log.info("Model: %s (%s), on %s", where, found.why, describe_device(device))
    try:
        return Backbone(
            found=found,
            model=model,
            card=card,
            preprocess=PreprocessConfig.model_validate(card["preprocess"]),
            mean=_numbers(card["mean"]),
            std=_numbers(card["std"]),
            spatial_size=int(card["spatial_size"]),
            device=device,
            windows_hu=tuple((str(name), float(low), float(high)) for name, low, high in card.get("windows_hu") or ()),
            slices=bool(card.get("as_pictures", False)),
        )
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise CheckpointError(
            "The card of the weights does not tell how images are prepared.",
            where=f"{hide_home(str(found.weights.with_suffix('.json')))}: {' '.join(str(error).split())[:200]}",
            fix="take the export of a finished `medssl pretrain`, both files of it",
            code="card_incomplete",
        ) from error


def read_planes(case: Case, backbone: Backbone) -> Planes:
    """Read a case and bring it to the grid and the intensity limits of training.

    Raises:
        DataError: Missing, damaged, constant, non-finite or non-overlapping images; names case and file.
    """
    if all(is_image(sequence.path) for sequence in case.sequences.values()):
        return _picture_planes(case, backbone)
    return planes_of(prepare_case(case, backbone.sequences, backbone.preprocess), backbone)


def planes_of(prepared: Prepared, backbone: Backbone) -> Planes:
    """The slices of a prepared case along its first array axis, with the intensity limits of training."""
    stored_SNHW, low_SN, high_SN = _limits(prepared, backbone)
    spacing = affine_spacing(prepared.affine)
    return Planes(
        stored_SNHW=_in_colour(stored_SNHW, backbone),
        low_SN=_in_colour(low_SN, backbone),
        high_SN=_in_colour(high_SN, backbone),
        spacing=(spacing.y, spacing.x),
        available_S=prepared.available_S,
        prepared=prepared,
    )


def _limits(prepared: Prepared, backbone: Backbone) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Volumes (S, N, H, W) and the values (S, N) that become 0 and 1; windows of one volume stand for sequences."""
    images_SZYX = prepared.images_SZYX
    if backbone.windows_hu:
        images_SZYX = np.repeat(images_SZYX, len(backbone.windows_hu), axis=0)
        low, high = (np.array([window[end] for window in backbone.windows_hu]) for end in (1, 2))
        count = images_SZYX.shape[1]
        return images_SZYX, np.repeat(low[:, None], count, axis=1), np.repeat(high[:, None], count, axis=1)
    limits = [
        sequence_limits(name, volume, AXIAL, backbone.preprocess)
        for name, volume in zip(backbone.sequences, images_SZYX, strict=True)
    ]
    return images_SZYX, np.stack([low for low, _ in limits]), np.stack([high for _, high in limits])


def _picture_planes(case: Case, backbone: Backbone) -> Planes:
    picture = prepare_picture(case, backbone.preprocess)
    image_CHW = _in_colour(picture.image_CHW, backbone)
    takes = backbone.model.in_chans
    if len(image_CHW) not in (1, takes):
        raise DataError(
            "The picture does not have the channels that the model takes.",
            where=f"case {case.case_id}: {len(image_CHW)} channels, the model takes {takes} or 1",
            fix="convert the picture to grey values, or use a model for colour pictures",
            code="picture_channels",
        )
    channels = len(image_CHW)
    return Planes(
        stored_SNHW=image_CHW[:, None],
        low_SN=np.full((channels, 1), picture.low),
        high_SN=np.full((channels, 1), picture.high),
        spacing=(1.0, 1.0),
        available_S=np.ones(1, dtype=bool),
        prepared=None,
    )


def _in_colour(values: np.ndarray, backbone: Backbone) -> np.ndarray:
    """One grey channel repeated where the normalisation is made for several, as training repeats it."""
    if backbone.model.sequences is None and len(values) == 1 < backbone.colours:
        return np.repeat(values, backbone.colours, axis=0)
    return values


def _numbers(value: float | list[float]) -> float | tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, list) else float(value)
