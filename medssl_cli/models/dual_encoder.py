"""CoCoSeg: one U-Net encoder for CT and one for PET, frozen VGG-19 features beside them, fused late, level by level.

Names in the state dict: ``unet_ct`` and ``unet_pet`` (their own weights each), ``vgg_ct`` and ``vgg_pet`` (two full
copies of the frozen trunk, stored twice), ``attention`` and ``projections`` (one a level, shared by all streams),
``skip_attention``, ``decoder``. ``vgg_copies`` states the number of VGG tensor sets: 2, or 0 with two-way fusion.

Letters: B samples, C channels, H W space.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.models.channel_attention import CamScale, ChannelAttention
from medssl_cli.models.padding import pad_to_multiple
from medssl_cli.models.vgg import VGGEncoder

WIDTHS = (32, 64, 128, 256)
"""Channels of the four levels, at 1, 1/2, 1/4 and 1/8 of the picture."""
MULTIPLE = 16
"""Pictures are padded to multiples of this many pixels; smaller ones are refused."""
SLOPE = 0.2
"""Of the leaky ReLU below 0."""


class DualEncoderConfig(Config):
    """The network of CoCoSeg."""

    fusion: Literal["4way", "2way"] = "4way"
    """4way: U-Net and frozen VGG-19 features of both pictures; 2way: the U-Net features alone, without VGG-19."""
    cam_scale: CamScale = "mean"
    """mean: the energies of the channel attention are divided by the number of places; none: they are not."""
    skip_attention: bool = False
    """Channel attention on the full-resolution skips too."""


class DualEncoderUNet(nn.Module):
    """CT and PET slice to logits of the lesion; keeps ``core.protocols.SegmentationNetwork``.

    Pictures are padded to multiples of 16 by mirroring and cut back, whatever their size; large ones are not reduced.

    Source: CoCoSeg V2; ancestor CoCoNet (Liu et al. 2024).
    """

    vgg_copies: Tensor

    def __init__(self, config: DualEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DualEncoderConfig()
        self.unet_ct, self.unet_pet = UNetEncoder(), UNetEncoder()
        self.vgg_ct = self.vgg_pet = None
        if config.fusion == "4way":
            self.vgg_ct, self.vgg_pet = VGGEncoder(), VGGEncoder()
            self.vgg_pet.load_state_dict(self.vgg_ct.state_dict())
        streams = 4 if config.fusion == "4way" else 2
        self.attention = nn.ModuleList(ChannelAttention(width, config.cam_scale) for width in WIDTHS[1:])
        self.projections = nn.ModuleList(nn.Conv2d(streams * width, width, 3, padding=1) for width in WIDTHS[1:])
        self.skip_attention = ChannelAttention(WIDTHS[0], config.cam_scale) if config.skip_attention else None
        self.decoder = FusionDecoder()
        self.register_buffer("vgg_copies", torch.tensor(2 if config.fusion == "4way" else 0))

    def forward(self, images_B2HW: Tensor, available_BS: Tensor | None = None) -> Tensor:
        """(B, 2, H, W), CT then PET -> logits (B, 1, H, W), float32.

        Args:
            images_B2HW: Centred, in [-1, 1]; both sides at least 16 pixels.
            available_BS: None or all True: both pictures are needed (looked at on the CPU alone, since looking at a
                GPU tensor would stop the queue).

        Raises:
            ValueError: Another number of channels, a side below 16 pixels, or an absent picture.
        """
        _refuse(images_B2HW, available_BS)
        padded, frame = pad_to_multiple(images_B2HW, MULTIPLE)
        ct, pet = padded.split(1, dim=1)
        skip_ct, *levels_ct = self.unet_ct(ct)
        skip_pet, *levels_pet = self.unet_pet(pet)
        streams = [levels_ct, levels_pet]
        if self.vgg_ct is not None and self.vgg_pet is not None:
            streams = [levels_ct, self.vgg_ct(ct), levels_pet, self.vgg_pet(pet)]
        fused = [self._fused(level, list(maps)) for level, maps in enumerate(zip(*streams, strict=True))]
        if self.skip_attention is not None:
            skip_ct, skip_pet = self.skip_attention(skip_ct), self.skip_attention(skip_pet)
        logits = frame.crop(self.decoder(fused, skip_ct, skip_pet)).float()
        assert logits.shape[-2:] == images_B2HW.shape[-2:], f"{tuple(logits.shape)} from {tuple(images_B2HW.shape)}"
        return logits

    def _fused(self, level: int, maps: list[Tensor]) -> Tensor:
        """Maps of one level, (B, C, h, w) each -> (B, C, h, w): shared attention, concatenation, convolution, norm."""
        attention, projection = self.attention[level], self.projections[level]
        return F.instance_norm(projection(torch.cat([attention(each) for each in maps], dim=1)))

    def trained_parts(self) -> dict[str, nn.Module]:
        """One part: the gradients of the whole network are clipped together."""
        return {"network": self}

    def settings(self) -> dict[str, Any]:
        """What ``DualEncoderConfig.model_validate`` takes to build the same network."""
        return self.config.model_dump(mode="json")

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by group, then ``trainable``, ``frozen`` and ``total``."""
        groups: dict[str, list[nn.Module | None]] = {
            "unet_encoders": [self.unet_ct, self.unet_pet],
            "fusion_projections": [self.projections],
            "channel_attention": [self.attention],
            "skip_attention": [self.skip_attention],
            "decoder": [self.decoder],
            "vgg_encoders": [self.vgg_ct, self.vgg_pet],
        }
        counts = {
            name: sum(p.numel() for module in modules if module is not None for p in module.parameters())
            for name, modules in groups.items()
        }
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        return {**counts, "trainable": trainable, "frozen": total - trainable, "total": total}


class UNetEncoder(nn.Module):
    """(B, 1, H, W) -> four maps of 32, 64, 128 and 256 channels at 1, 1/2, 1/4 and 1/8 of the size."""

    def __init__(self) -> None:
        super().__init__()
        for level, (before, width) in enumerate(zip((1, *WIDTHS), WIDTHS, strict=False), start=1):
            self.add_module(f"conv{level}_1", ConvStep(before, width))
            self.add_module(f"conv{level}_2", ConvStep(width, width))

    def forward(self, images_B1HW: Tensor) -> list[Tensor]:
        """Finest first; sides of the picture are multiples of 8."""
        maps: list[Tensor] = []
        for level in range(1, 5):
            x = F.max_pool2d(maps[-1], 2) if maps else images_B1HW
            for step in (1, 2):
                x = self.get_submodule(f"conv{level}_{step}")(x)
            maps.append(x)
        return maps


class FusionDecoder(nn.Module):
    """Fused maps and the finest maps of both encoders to logits (B, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.deconv6 = nn.Conv2d(256, 128, 3, padding=1)
        self.conv7_1, self.conv7_2 = ConvStep(256, 128), ConvStep(128, 128)
        self.deconv7 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv8_1, self.conv8_2 = ConvStep(128, 64), ConvStep(64, 64)
        self.deconv8 = nn.Conv2d(64, 32, 3, padding=1)
        self.conv9_1 = ConvStep(96, 32)
        self.conv9_2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv10 = nn.Conv2d(32, 1, 1)

    def forward(self, fused: list[Tensor], skip_ct: Tensor, skip_pet: Tensor) -> Tensor:
        """``fused``: 64, 128 and 256 channels at 1/2, 1/4 and 1/8; skips: 32 channels at full size."""
        half, quarter, eighth = fused
        x = self.deconv6(_twice(eighth))
        x = self.conv7_2(self.conv7_1(torch.cat([x, quarter], dim=1)))
        x = self.deconv7(_twice(x))
        x = self.conv8_2(self.conv8_1(torch.cat([x, half], dim=1)))
        x = self.deconv8(_twice(x))
        x = self.conv9_1(torch.cat([x, skip_ct, skip_pet], dim=1))
        return self.conv10(F.leaky_relu_(self.conv9_2(x), SLOPE))


class ConvStep(nn.Conv2d):
    """3 x 3 convolution, leaky ReLU, instance norm, in this order.

    The norm has no parameters and no running figures.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H, W)."""
        return F.instance_norm(F.leaky_relu_(super().forward(x_BCHW), SLOPE))


def _twice(x_BCHW: Tensor) -> Tensor:
    return F.interpolate(x_BCHW, scale_factor=2, mode="bilinear", align_corners=False)


def _refuse(images_B2HW: Tensor, available_BS: Tensor | None) -> None:
    if images_B2HW.ndim != 4 or images_B2HW.shape[1] != 2:
        raise ValueError(f"images of shape {tuple(images_B2HW.shape)}; (B, 2, H, W) of CT and PET is needed")
    if min(images_B2HW.shape[-2:]) < MULTIPLE:
        raise ValueError(f"pictures of {tuple(images_B2HW.shape[-2:])} pixels; at least {MULTIPLE} a side are needed")
    if available_BS is not None and available_BS.device.type == "cpu" and not bool(available_BS.all()):
        raise ValueError("CT and PET are both needed; a sample of the batch lacks one of them")
