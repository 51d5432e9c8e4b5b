"""A small segmentation network with a frozen trunk and running statistics, and batches of squares in noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medssl_cli.core.protocols import IGNORE_LABEL, LabelledBatch
from medssl_cli.objectives.segmentation import SegmentationLoss, SegmentationLossConfig
from medssl_cli.objectives.supervised import SupervisedSegmentation

SIZE = 12


class Network(nn.Module):
    """Frozen trunk beside a trained one, batch norm between them and the logits."""

    def __init__(self, outputs: int = 1, channels: int = 2) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(channels, 4, 3, padding=1).requires_grad_(False)
        self.backbone = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.decoder = nn.Conv2d(8, outputs, 1)
        self.seen_available: Tensor | None = None

    def forward(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> Tensor | list[Tensor]:
        self.seen_available = available_BS
        found = self.norm(torch.cat([self.trunk(images_BSHW), self.backbone(images_BSHW)], 1).relu())
        return self.decoder(found)

    def trained_parts(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "norm": self.norm, "decoder": self.decoder}


class NetworkWithoutNorm(Network):
    """Each sample by itself, so that parts of a batch give what the whole gives."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__(outputs)
        self.norm = nn.Identity()  # type: ignore[assignment]

    def trained_parts(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "decoder": self.decoder}


def make_objective(
    outputs: int = 1, seed: int = 0, network: type[Network] = Network, ema_decay: float = 0.999, **settings: Any
) -> SupervisedSegmentation:
    torch.manual_seed(seed)
    loss = SegmentationLoss(SegmentationLossConfig(**settings), outputs)
    return SupervisedSegmentation(network(outputs), loss, ema_decay=ema_decay)


def make_batch(samples: int = 4, seed: int = 0, outputs: int = 1) -> LabelledBatch:
    """A bright square of each structure; the second sample has none, the last column does not count."""
    rng = torch.Generator().manual_seed(seed)
    label_map = torch.zeros(samples, SIZE, SIZE, dtype=torch.int64)
    for b in range(samples):
        for number in range(1, max(outputs, 2)):
            y, x = torch.randint(0, SIZE - 4, (2,), generator=rng).tolist()
            if b != 1:
                label_map[b, y : y + 4, x : x + 4] = number
    images = 0.5 * torch.randn(samples, 2, SIZE, SIZE, generator=rng)
    images[:, 0] += label_map
    label_map[:, :, -1] = IGNORE_LABEL
    sizes = torch.tensor([[SIZE, SIZE - 1]] * samples)
    return LabelledBatch(images, label_map, torch.ones(samples, 2).bool(), sizes, [f"PT-{i}" for i in range(samples)])


def part_of(batch: LabelledBatch, keep: slice) -> LabelledBatch:
    return LabelledBatch(
        batch.images_BSHW[keep],
        batch.label_map_BHW[keep],
        batch.available_BS[keep],
        batch.sizes_B2[keep],
        batch.case_ids[keep],
    )
