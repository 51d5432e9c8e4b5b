"""A backbone with a decoder: images to logits of every pixel.

What the decoder sees are maps: the tokens of some blocks, each at its place, one map a block whatever the number of
sequences. With neighbouring slices (2.5-D) every slice goes through the backbone by itself, and its neighbours' maps
are added afterwards, so that a volume needs one pass of the backbone a slice.

Letters: B samples, K neighbouring slices (2 * context + 1), S sequences, or colour channels of a plain picture, C
outputs, D width of a map, H W pixels, h w places of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.core.errors import ConfigError
from medssl_cli.core.protocols import Features
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.decoders import (
    LEVELS,
    LinearDecoder,
    MultiscaleDecoder,
    NormKind,
    UnetrDecoder,
    resized,
)
from medssl_cli.models.padding import pad_to_multiple
from medssl_cli.models.vit import VisionTransformer


class DecoderConfig(Config):
    """The decoder on the tokens of a backbone."""

    name: Literal["linear", "unetr", "multiscale"] = "unetr"
    """linear: one 1 x 1 convolution; unetr: up-steps joined with shallower maps and the image; multiscale: a pyramid
    of four sizes, summed and concatenated."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """Blocks whose tokens are decoded, 0 the first, each through the final norm; stages of a ConvNeXt. If not given:
    four, evenly spaced, the last block among them."""
    base: int = Field(default=32, ge=2, multiple_of=2)
    """Width of unetr after its third up-step (before: twice and four times that; after: half); a quarter of the width
    of multiscale."""
    fusion: Literal["concat", "mean"] = "mean"
    """How the maps of several sequences become one: the mean over the sequences that exist, or a 1 x 1 convolution of
    all, zero where a sequence is absent, which begins as a mean."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the channels left out before the last convolution, in training."""
    deep_supervision: bool = False
    """Train logits of coarser sizes too."""
    norm: NormKind = "group"
    """Normalisation in unetr and multiscale: batch, instance or group (8 groups)."""

    @model_validator(mode="after")
    def _refuse_idle_keys_and_wrong_layers(self) -> DecoderConfig:
        fields = type(self).model_fields
        idle = [key for key in ("base", "norm", "deep_supervision") if getattr(self, key) != fields[key].default]
        if self.name == "linear" and idle:
            raise ValueError(f"{', '.join(idle)}: no effect on the linear decoder")
        if self.layers is not None:
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"layers: one or more different blocks in rising order, got {list(self.layers)}")
            if self.name != "linear" and len(self.layers) != LEVELS:
                raise ValueError(f"layers: {self.name} joins {LEVELS} blocks, got {len(self.layers)}")
        return self


class DenseNetwork(nn.Module):
    """Images to logits at their own size; keeps ``core.protocols.SegmentationNetwork``.

    Images of any size are padded to the patch size by mirroring, and the logits cut back.

    Args:
        backbone: For one plain picture or for several sequences.
        outputs: C.
        config: Of the decoder.
        context: Slices on each side that the decoder sees besides; their maps begin without effect.
        freeze_backbone: The backbone is never trained: no gradient, always in evaluation mode.

    Raises:
        ConfigError: ``config.layers`` names a block that the backbone does not have.
    """

    def __init__(
        self,
        backbone: VisionTransformer | ConvNeXt,
        outputs: int,
        config: DecoderConfig | None = None,
        *,
        context: int = 0,
        freeze_backbone: bool = True,
    ) -> None:
        super().__init__()
        config = config or DecoderConfig()
        self.config, self.outputs, self.context, self.freeze_backbone = config, outputs, context, freeze_backbone
        self.sequences = backbone.sequences
        self.channels = backbone.in_chans if backbone.sequences is None else len(backbone.sequences)
        self.layers = _layers(backbone, config)
        widths, strides = _maps_of(backbone, self.layers)
        self.backbone = backbone
        sequences = len(self.sequences or (None,))
        self.decoder = nn.ModuleDict()
        if config.fusion == "concat":
            self.decoder["sequences"] = nn.ModuleList(SequenceFusion(width, sequences) for width in widths)
        if context:
            self.decoder["neighbours"] = nn.ModuleList(NeighbourFusion(width, context) for width in widths)
        self.decoder["head"] = _head(config, widths, strides, self.channels, outputs)
        if freeze_backbone:
            backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DenseNetwork:
        """As every module, but a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def trained_parts(self) -> dict[str, nn.Module]:
        """Modules with their own gradient clipping; without the backbone where it is frozen."""
        return (
            {"decoder": self.decoder} if self.freeze_backbone else {"backbone": self.backbone, "decoder": self.decoder}
        )

    def settings(self) -> dict[str, Any]:
        """Arguments besides the backbone that build the same network, as plain data; ``config`` is one mapping."""
        return {
            "outputs": self.outputs,
            "config": self.config.model_dump(mode="json"),
            "context": self.context,
            "freeze_backbone": self.freeze_backbone,
        }

    # --- the main path -----------------------------------------------------------------------------------------------

    def forward(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> Tensor | list[Tensor]:
        """(B, K * S, H, W) -> logits (B, C, H, W), float32.

        Args:
            images_BSHW: Normalised; slice-major: all sequences of the first slice, then of the next. One channel a
                slice stands for all colours of a plain picture.
            available_BS: (B, S) bool, which sequences exist; what an absent one holds has no effect.

        Returns:
            Logits; in training with deep supervision a list, the finest first, coarser ones at their own sizes.

        Raises:
            ValueError: Channels that do not fit, or a sample without any sequence.
        """
        slices_BKSHW = self._slices(images_BSHW)
        samples, neighbours = slices_BKSHW.shape[:2]
        available = available_BS if available_BS is None else available_BS.repeat_interleave(neighbours, dim=0)
        maps = [each.unflatten(0, (samples, neighbours)) for each in self.maps(slices_BKSHW.flatten(0, 1), available)]
        of_neighbours = [[each[:, k] for each in maps] for k in range(neighbours)]
        return self.decode(of_neighbours, slices_BKSHW[:, self.context], None, available_BS)

    def maps(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> list[Tensor]:
        """(B, S, H, W) of single slices -> a map (B, D, h, w) of each of ``layers``, sequences fused.

        With ``decode`` the same numbers as ``forward``; a volume's slices need this once each.
        """
        padded, _ = pad_to_multiple(images_BSHW, self.backbone.patch_size)
        if self.sequences is None:  # a plain picture is whole
            _refuse_absent(available_BS)
            available_BS = None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            features = self.backbone.forward_layers(padded, self.layers, None, available_BS)
        maps = [map_of_sequences(each) for each in features]
        if "sequences" in self.decoder:
            fusions: Any = self.decoder["sequences"]
            return [fusion(each, available_BS) for fusion, each in zip(fusions, maps, strict=True)]
        return [mean_of_sequences(each, available_BS) for each in maps]

    def decode(
        self,
        maps_of_neighbours: Sequence[Sequence[Tensor]],
        images_BSHW: Tensor,
        size: tuple[int, int] | None = None,
        available_BS: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Maps of K slices and the images of the centre slice -> logits.

        Args:
            maps_of_neighbours: From ``maps``, first slice to last; one alone without context.
            images_BSHW: (B, S, H, W), as given to ``maps``.
            size: Height and width of the logits, if not those of the images; bilinear.
            available_BS: As given to ``maps``.

        Returns:
            As ``forward``.
        """
        if len(maps_of_neighbours) != 2 * self.context + 1:
            raise ValueError(f"maps of {len(maps_of_neighbours)} slices, {2 * self.context + 1} are needed")
        maps = list(maps_of_neighbours[self.context])
        if self.context:
            fusions: Any = self.decoder["neighbours"]
            maps = [fusion(each) for fusion, *each in zip(fusions, *maps_of_neighbours, strict=True)]
        padded, frame = pad_to_multiple(self._seen(images_BSHW, available_BS), self.backbone.patch_size)
        fine, *coarse = self.decoder["head"](maps, padded)
        whole = tuple(padded.shape[-2:])
        logits = frame.crop(resized(fine.float(), whole))
        logits = logits if size is None else resized(logits, size)
        if not coarse:
            return logits
        if whole == (frame.height, frame.width):
            return [logits, *(each.float() for each in coarse)]
        # coarse places straddle the border of the padding: through the full size, so that they meet the labels
        cut = [(frame.crop(resized(each.float(), whole)), each.shape[-2:]) for each in coarse]
        return [logits, *(resized(each, _shrunk(small, whole, each.shape[-2:])) for each, small in cut)]

    # --- steps of it -------------------------------------------------------------------------------------------------

    def _slices(self, images_BSHW: Tensor) -> Tensor:
        """(B, K * S, H, W) -> (B, K, S, H, W)."""
        neighbours, channels = 2 * self.context + 1, images_BSHW.shape[1]
        takes = {self.channels, 1} if self.sequences is None else {self.channels}
        if channels % neighbours or channels // neighbours not in takes:
            of_each = " or ".join(str(count) for count in sorted(takes))
            raise ValueError(f"images of {channels} channels; {neighbours} slices of {of_each} are needed")
        return images_BSHW.unflatten(1, (neighbours, -1))

    def _seen(self, images_BSHW: Tensor, available_BS: Tensor | None) -> Tensor:
        """Images as a decoder may look at them: absent sequences are 0, a grey picture has all its colours."""
        if self.sequences is not None and available_BS is not None:
            return images_BSHW * available_BS.to(images_BSHW)[..., None, None]
        return images_BSHW.expand(-1, self.channels, -1, -1)


class SequenceFusion(nn.Module):
    """Maps of S sequences to one by a 1 x 1 convolution that begins as their mean: (B, S, D, h, w) -> (B, D, h, w)."""

    def __init__(self, width: int, sequences: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(sequences * width, width, 1)
        with torch.no_grad():
            self.conv.weight.copy_((torch.eye(width).repeat(1, sequences) / sequences)[..., None, None])
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, map_BSDhw: Tensor, available_BS: Tensor | None) -> Tensor:
        """Absent sequences are 0."""
        if available_BS is not None:
            map_BSDhw = map_BSDhw * available_BS.to(map_BSDhw)[..., None, None, None]
        return self.conv(map_BSDhw.flatten(1, 2))


class NeighbourFusion(nn.Module):
    """Maps of K slices to one: the centre's plus a 1 x 1 convolution of the others', which begins as 0."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.conv = nn.Conv2d(2 * context * width, width, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """K maps (B, D, h, w), first slice to last -> (B, D, h, w)."""
        others = [*maps[: self.context], *maps[self.context + 1 :]]
        return maps[self.context] + self.conv(torch.cat(others, dim=1))


def map_of_sequences(features: Features) -> Tensor:
    """Patch tokens at their places, (B, S, D, h, w); tokens lie sequence after sequence, row after row."""
    return features.patches_BND.unflatten(1, features.grid).permute(0, 1, 4, 2, 3)


def mean_of_sequences(map_BSDhw: Tensor, available_BS: Tensor | None) -> Tensor:
    """(B, S, D, h, w) -> (B, D, h, w): the mean over the sequences that exist."""
    if map_BSDhw.shape[1] == 1:
        return map_BSDhw[:, 0]
    if available_BS is None:
        return map_BSDhw.mean(1)
    weights_BS = available_BS.to(map_BSDhw) / available_BS.sum(1, keepdim=True).clamp(min=1)
    return (map_BSDhw * weights_BS[..., None, None, None]).sum(1)


def _layers(backbone: VisionTransformer | ConvNeXt, config: DecoderConfig) -> tuple[int, ...]:
    depth = LEVELS if isinstance(backbone, ConvNeXt) else len(backbone.drop_rates)
    if config.layers is None:
        return tuple(max(0, depth * (level + 1) // LEVELS - 1) for level in range(LEVELS))
    if max(config.layers) >= depth:
        raise ConfigError(
            "The decoder asks for a block that the backbone does not have.",
            where=f"decoder.layers = {list(config.layers)}; the backbone has {depth} blocks",
            fix=f"choose from 0 to {depth - 1}, or leave it out",
            code="decoder_layers",
        )
    return config.layers


def _maps_of(backbone: VisionTransformer | ConvNeXt, layers: Sequence[int]) -> tuple[list[int], list[int]]:
    """Width of each map, and pixels from one of its places to the next."""
    if isinstance(backbone, ConvNeXt):
        dims = backbone.settings["dims"]
        return [dims[layer] for layer in layers], [4 * 2**layer for layer in layers]
    return [backbone.embed_dim] * len(layers), [backbone.patch_size] * len(layers)


def _head(
    config: DecoderConfig, widths: Sequence[int], strides: Sequence[int], channels: int, outputs: int
) -> LinearDecoder | UnetrDecoder | MultiscaleDecoder:
    if config.name == "linear":
        return LinearDecoder(widths, outputs, dropout=config.dropout)
    settings: dict[str, Any] = config.model_dump(include={"base", "norm", "dropout", "deep_supervision"})
    if config.name == "unetr":
        return UnetrDecoder(widths, strides, channels, outputs, **settings)
    return MultiscaleDecoder(widths, strides, outputs, **settings)


def _shrunk(small: Sequence[int], whole: Sequence[int], cut: Sequence[int]) -> list[int]:
    """Size of the cut region at the scale at which ``whole`` is ``small``."""
    return [max(1, round(part * s / w)) for s, w, part in zip(small, whole, cut, strict=True)]


def _refuse_absent(available_BS: Tensor | None) -> None:
    if available_BS is not None and available_BS.device.type == "cpu" and not bool(available_BS.all()):
        raise ValueError("a backbone for plain pictures takes whole pictures; no channel may be absent")
