"""ConvNeXt: a convolutional backbone for one picture, with the outputs of a vision transformer and with maps of four
sizes for decoders.

Parameter names are those of the public files (``downsample_layers``, ``stages``, ``norm``). A patch token is a place of
the last map, 32 pixels wide; there are no cls, register or mask tokens inside.

Letters: B samples, C channels, H W space, N places of the last map, D width of the last stage.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medssl_cli.core.protocols import Features

STRIDE = 32
"""Pixels from one place of the last map to the next."""


class ConvNeXt(nn.Module):
    """Pictures to features; keeps ``core.protocols.Backbone``.

    Args:
        in_chans: Channels of the first convolution; a grey picture stands for that many equal ones.
        depths: Blocks of each of the four stages.
        dims: Width of each stage.
        drop_path_rate: Stochastic depth while training, rising linearly from 0 at the first block, drawn for each
            sample from torch's generator of the CPU.
        layer_scale: Start of the layer scale; 0 leaves it out.
        img_size: Side of the picture that the weights were made for; any size from 32 on works.
        grad_checkpointing: Recompute each block in the backward pass.

    Source: Liu et al. 2022.
    """

    sequences: tuple[str, ...] | None = None
    num_register_tokens = 0
    patch_size = STRIDE

    def __init__(
        self,
        *,
        in_chans: int = 3,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        drop_path_rate: float = 0.0,
        layer_scale: float = 1e-6,
        img_size: int = 224,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if len(depths) != 4 or len(dims) != 4:
            raise ValueError(f"four stages have four depths and widths, got {tuple(depths)} and {tuple(dims)}")
        self.settings: dict[str, Any] = {
            "in_chans": in_chans,
            "depths": list(depths),
            "dims": list(dims),
            "drop_path_rate": drop_path_rate,
            "layer_scale": layer_scale,
            "img_size": img_size,
        }
        self.embed_dim, self.in_chans, self.img_size = dims[-1], in_chans, img_size
        self.grad_checkpointing = grad_checkpointing
        blocks = sum(depths)
        self.drop_rates = [drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks)]
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), ChannelNorm(dims[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in itertools.pairwise(dims):
            self.downsample_layers.append(nn.Sequential(ChannelNorm(before), nn.Conv2d(before, after, 2, stride=2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(dim, layer_scale) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        """Fresh weights: convolutions and linear layers truncated normal 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    # --- the main path -----------------------------------------------------------------------------------------------

    def forward(
        self, images_BSHW: Tensor, token_mask_BN: Tensor | None = None, available_BS: Tensor | None = None
    ) -> Features:
        """(B, C, H, W) -> Features: cls is the norm of the mean over the last map, patches its places.

        Args:
            images_BSHW: Sides from 32 pixels on; what exceeds a multiple of 32 may be cut at the bottom and right.
            token_mask_BN: None or all False.
            available_BS: None or all True.

        Raises:
            ValueError: A mask or an absence, which a convolutional network cannot express; or shapes that do not fit.
        """
        _refuse_masks(token_mask_BN, available_BS)
        return self._features(self.forward_maps(images_BSHW)[-1])

    def forward_list(
        self,
        images: Sequence[Tensor],
        token_masks: Sequence[Tensor | None],
        available: Sequence[Tensor | None],
    ) -> list[Features]:
        """Crops of several sizes, one after the other: convolutions gain nothing from being packed."""
        return [self(*one) for one in zip(images, token_masks, available, strict=True)]

    def forward_needed(
        self,
        images: Sequence[Tensor],
        token_masks: Sequence[Tensor | None],
        available: Sequence[Tensor | None],
        patch_index: Sequence[Tensor | None],
    ) -> list[tuple[Tensor, Tensor]]:
        """cls (B, D) and some patch tokens (K, D) of each group; see ``VisionTransformer.forward_needed``."""
        found = []
        for features, index in zip(self.forward_list(images, token_masks, available), patch_index, strict=True):
            patches_TD = features.patches_BND.flatten(0, 1)
            wanted_KD = patches_TD[:0] if index is None else patches_TD.index_select(0, index.to(patches_TD.device))
            found.append((features.cls_BD, wanted_KD))
        return found

    def forward_layers(
        self,
        images_BSHW: Tensor,
        layers: Sequence[int],
        token_mask_BN: Tensor | None = None,
        available_BS: Tensor | None = None,
    ) -> list[Features]:
        """Features after the stages ``layers`` (0 the first, -1 the last), each place normalised; only the last stage's
        norm is trained."""
        _refuse_masks(token_mask_BN, available_BS)
        maps = self.forward_maps(images_BSHW)
        wanted = [range(4)[layer] for layer in layers]
        return [self._features(maps[layer], is_last=layer == 3) for layer in wanted]

    def forward_maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> maps at strides 4, 8, 16 and 32, (B, width of the stage, h, w) each, without norm."""
        rates, maps = iter(self._drops(images_BCHW)), []
        x = images_BCHW
        for step, (reduce, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = reduce(x) if step else self._stem(x)
            for block in stage.children():
                x = self._block(block, x, next(rates))
            maps.append(x)
        return maps

    # --- steps of it -------------------------------------------------------------------------------------------------

    def _stem(self, images_BCHW: Tensor) -> Tensor:
        stem: Any = self.downsample_layers[0]
        convolution, norm = stem
        weight, channels = convolution.weight, images_BCHW.shape[1]
        if min(images_BCHW.shape[-2:]) < STRIDE:
            raise ValueError(
                f"image of {tuple(images_BCHW.shape[-2:])} pixels, at least {STRIDE} x {STRIDE} are needed"
            )
        if channels == 1 and self.in_chans > 1:
            weight = weight.sum(1, keepdim=True)
        elif channels != self.in_chans:
            raise ValueError(f"images of {channels} channels, the first convolution takes {self.in_chans} or 1")
        return norm(F.conv2d(images_BCHW.to(weight.dtype), weight, convolution.bias, stride=4))

    def _drops(self, images_BCHW: Tensor) -> list[Tensor | None]:
        """For each block (B, 1, 1, 1) factors of its branch, 0 or 1 / (1 - rate); None where all samples stay."""
        if not (self.training and any(self.drop_rates)):
            return [None] * len(self.drop_rates)
        samples = len(images_BCHW)
        draws = torch.rand(len(self.drop_rates), samples, device="cpu").to(images_BCHW.device, non_blocking=True)
        return [
            (draw >= rate).to(torch.float32).div_(1 - rate).view(-1, 1, 1, 1) if rate else None
            for draw, rate in zip(draws, self.drop_rates, strict=True)
        ]

    def _block(self, block: nn.Module, x_BCHW: Tensor, factor: Tensor | None) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x_BCHW, factor, use_reentrant=False, preserve_rng_state=False)
        return block(x_BCHW, factor)

    def _features(self, map_BDhw: Tensor, *, is_last: bool = True) -> Features:
        norm: Callable[[Tensor], Tensor] = self.norm
        if not is_last:  # inner stages have no trained norm
            norm = functools.partial(F.layer_norm, normalized_shape=(map_BDhw.shape[1],), eps=1e-6)
        patches_BND = norm(map_BDhw.flatten(2).transpose(1, 2))
        cls_BD = norm(map_BDhw.mean((-2, -1)))
        grid = (1, *map_BDhw.shape[-2:])
        return Features(cls_BD, patches_BND, patches_BND[:, :0], grid)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7 convolution, norm, two linear layers over the channels, added to the input.

    (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, dim: int, layer_scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None

    def forward(self, x_BCHW: Tensor, factor_B111: Tensor | None = None) -> Tensor:
        """``factor_B111``: how much the branch of each sample counts, from stochastic depth."""
        branch = self.norm(self.dwconv(x_BCHW).permute(0, 2, 3, 1))
        branch = self.pwconv2(F.gelu(self.pwconv1(branch)))
        if self.gamma is not None:
            branch = branch * self.gamma
        branch = branch.permute(0, 3, 1, 2)
        return x_BCHW + (branch if factor_B111 is None else branch * factor_B111.to(branch.dtype))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Each place is normalised by itself."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _refuse_masks(token_mask_BN: Tensor | None, available_BS: Tensor | None) -> None:
    if token_mask_BN is not None and bool(token_mask_BN.any()):
        raise ValueError("a convolutional network has no mask token; the token mask must be empty (no iBOT)")
    if available_BS is not None and not bool(available_BS.all()):
        raise ValueError("a convolutional network takes whole pictures; no channel may be absent")
