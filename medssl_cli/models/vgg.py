"""The first three stages of VGG-19 for grey pictures: frozen features beside the trained ones.

Letters: B samples, H W space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError
from medssl_cli.core.run import hide_home
from medssl_cli.models.foreign import plain_names, vgg19_shapes
from medssl_cli.models.zoo import card_path, read_weights

WIDTHS = (64, 128, 256)
"""Channels of the three taps, at 1/2, 1/4 and 1/8 of the picture."""

PLACES = {
    "conv1_1": 0,
    "conv1_2": 2,
    "conv2_1": 5,
    "conv2_2": 7,
    "conv3_1": 10,
    "conv3_2": 12,
    "conv3_3": 14,
    "conv3_4": 16,
}
"""Number of each convolution in torchvision's ``features``."""

IMAGENET_DIGEST = "dcbb9e9d"
"""First digits of the SHA-256 of torchvision's ImageNet weights of VGG-19, which its file name carries."""

GREY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a grey value (ITU-R BT.601)."""


class VGGEncoder(nn.Module):
    """(B, 1, H, W) -> maps of 64, 128 and 256 channels at 1/2, 1/4 and 1/8 of the size.

    VGG-19 up to conv3_4 with one maximum over 2 x 2 more, between conv1_1 and conv1_2, so that the taps have the sizes
    of a U-Net's levels. Always in evaluation mode, without gradient. Fresh weights are random (He et al. 2015);
    ``load_vgg`` brings trained ones.

    Source: Simonyan and Zisserman 2015; the additional pooling as in CoCoNet (Liu et al. 2024).
    """

    def __init__(self) -> None:
        super().__init__()
        channels = 1
        for name in PLACES:
            width = WIDTHS[int(name[4]) - 1]
            convolution = nn.Conv2d(channels, width, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            self.add_module(name, convolution)
            channels = width
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> VGGEncoder:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_B1HW: Tensor) -> list[Tensor]:
        """The three taps, finest first; sides of the picture are multiples of 8."""
        taps, x = [], images_B1HW
        for name in PLACES:
            x = F.relu_(self.get_submodule(name)(x))
            if name in ("conv1_2", "conv2_2", "conv3_4"):
                taps.append(x)
            if name in ("conv1_1", "conv1_2", "conv2_2"):
                x = F.max_pool2d(x, 2)
        return taps


@dataclass(frozen=True)
class VGGOrigin:
    """Which file the weights of the trunks are from.

    Args:
        sha256: Of the file.
        is_imagenet: It is torchvision's own file, or was converted from it.
    """

    sha256: str
    is_imagenet: bool


def load_vgg(network: nn.Module, path: Path) -> VGGOrigin:
    """Fill every VGG encoder of a network from one file of VGG-19.

    The first convolution sees one channel: its three kernels are added with the weights of a grey value. A file with a
    card beside it must be the file that the card describes.

    Args:
        network: Holds at least one ``VGGEncoder``.
        path: What ``medssl convert weights --source vgg19`` writes, or torchvision's own ``.pth``.

    Raises:
        CheckpointError: Missing, unreadable, unsafe, altered, of another network or not finite; nothing was changed.
        ValueError: The network has no VGG encoder.
    """
    encoders = [module for module in network.modules() if isinstance(module, VGGEncoder)]
    if not encoders:
        raise ValueError("the network has no VGG encoder")
    path = Path(path)
    state = plain_names(read_weights(path), str(path))
    digest = file_digest(path)
    card = _own_card(path, digest)
    own = _own_names(state, path)
    for encoder in encoders:
        encoder.load_state_dict(own)
    origins = (digest, str(card.get("source_sha256", "")))
    return VGGOrigin(digest, any(origin.startswith(IMAGENET_DIGEST) for origin in origins))


def _own_names(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors of the file as a ``VGGEncoder`` names and shapes them."""
    shapes, own, wrong = vgg19_shapes(), {}, []
    for name, place in PLACES.items():
        for kind in ("weight", "bias"):
            key = f"features.{place}.{kind}"
            tensor = state.get(key)
            if tensor is None or tuple(tensor.shape) != shapes[key]:
                found = "missing" if tensor is None else str(tuple(tensor.shape))
                wrong.append(f"{key}: {found}, VGG-19 has {shapes[key]}")
            elif not bool(tensor.isfinite().all()):
                wrong.append(f"{key}: holds NaN or infinity")
            else:
                own[f"{name}.{kind}"] = tensor.float()
    if wrong:
        raise _rejected(path, "\n".join(wrong[:5]), "weights_foreign")
    shares = torch.tensor(GREY, dtype=torch.float64).view(1, 3, 1, 1)
    own["conv1_1.weight"] = (own["conv1_1.weight"].double() * shares).sum(1, keepdim=True).float()
    return own


def _own_card(path: Path, digest: str) -> dict[str, Any]:
    """The card beside a file, which must be about this file; empty where there is none."""
    card = card_path(path)
    if card == path or not card.is_file():
        return {}
    try:
        data = json.loads(card.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _rejected(path, f"its card {card.name} cannot be read: {error}", "card_invalid") from error
    if not isinstance(data, dict) or "sha256" not in data:
        return {}
    if data["sha256"] != digest:
        why = f"SHA-256 {digest[:16]}…, its card {str(data['sha256'])[:16]}…"
        raise _rejected(path, why, "weights_altered")
    return data


def _rejected(path: Path, why: str, code: str) -> CheckpointError:
    return CheckpointError(
        "The VGG-19 weights were rejected.",
        where=f"{hide_home(str(path))}: {why}",
        fix="take torchvision's vgg19-dcbb9e9d.pth, as it is or after `medssl convert weights --source vgg19`",
        code=code,
    )
