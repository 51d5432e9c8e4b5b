"""A backbone and a head of a few lines that keep the protocols, and batches of views made of noise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl_cli.core.protocols import Batch, Features
from medssl_cli.models.heads import DINOHead
from medssl_cli.objectives.dino import DinoConfig, HeadConfig
from medssl_cli.objectives.ibot import IbotConfig
from medssl_cli.objectives.self_distillation import SelfDistillation
from medssl_cli.objectives.semi_supervised import SemiSupervised

sys.path.append(str(Path(__file__).resolve().parent))  # for the parts that tests share with processes they start

WIDTH, PATCH, SEQUENCES, GLOBAL, LOCAL = 32, 8, 3, 16, 8  # 3 x 4 tokens of a global crop, 3 x 1 of a local one


class FakeBackbone(nn.Module):
    """Patches of each sequence, a mask token, positions, one mixing layer; remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = WIDTH
        self.patch = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.position = nn.Parameter(torch.randn(SEQUENCES * 4, WIDTH))
        self.mix = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("steps", torch.zeros(()))
        self.calls: list[dict[str, Any]] = []
        self.embedded: list[Tensor] = []

    def forward(
        self, images_BSHW: Tensor, token_mask_BN: Tensor | None = None, available_BS: Tensor | None = None
    ) -> Features:
        self.calls.append({"images": images_BSHW, "token_mask": token_mask_BN, "available": available_BS})
        batch, sequences, height, width = images_BSHW.shape
        rows, columns = height // PATCH, width // PATCH
        tokens = self.patch(images_BSHW.flatten(0, 1).unsqueeze(1)).flatten(2).transpose(1, 2)
        tokens = tokens.unflatten(0, (batch, sequences)).flatten(1, 2)
        hidden = torch.zeros(tokens.shape[:2], dtype=torch.bool) if token_mask_BN is None else token_mask_BN
        if available_BS is not None:
            hidden = hidden | ~available_BS.repeat_interleave(rows * columns, 1)
        tokens = torch.where(hidden[:, :, None], self.mask_token, tokens)
        self.embedded.append(tokens.detach())
        tokens = tokens + self.position[: tokens.shape[1]]
        mean = tokens.mean(1, keepdim=True)
        mixed = tokens + self.mix(torch.cat([tokens, mean.expand_as(tokens)], -1))
        return Features(
            self.norm(mixed.mean(1)), self.norm(mixed), tokens.new_empty(batch, 0, WIDTH), (sequences, rows, columns)
        )

    def forward_list(
        self, images: Sequence[Tensor], token_masks: Sequence[Tensor | None], available: Sequence[Tensor | None]
    ) -> list[Features]:
        return [self(*crops) for crops in zip(images, token_masks, available, strict=True)]


class NeededBackbone(FakeBackbone):
    """The same numbers through the call that gives only the tokens that are asked for; remembers which."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[Tensor]] = []

    def forward_needed(
        self,
        images: Sequence[Tensor],
        token_masks: Sequence[Tensor | None],
        available: Sequence[Tensor | None],
        patch_index: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        self.asked.append(list(patch_index))
        found = self.forward_list(images, token_masks, available)
        return [(f.cls_BD, f.patches_BND.flatten(0, 1)[i]) for f, i in zip(found, patch_index, strict=True)]


def real_head(shape: HeadConfig, n_patch_prototypes: int | None = None) -> DINOHead:
    """The head of the program, as a run builds it."""
    return DINOHead(
        WIDTH,
        shape.head_n_prototypes,
        shape.head_hidden_dim,
        shape.head_bottleneck_dim,
        shape.head_nlayers,
        train_gains=not shape.norm_last_layer,
        norm=shape.norm_in_head,
        activation=shape.act_in_head,
        n_patch_prototypes=n_patch_prototypes,
    )


class FakeHead(nn.Module):
    """Cosines with K prototypes; remembers how many rows each call had."""

    def __init__(self, shape: HeadConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, shape.head_hidden_dim),
            nn.GELU(),
            nn.Linear(shape.head_hidden_dim, shape.head_bottleneck_dim),
        )
        self.prototypes = nn.Parameter(torch.randn(shape.head_n_prototypes, shape.head_bottleneck_dim))
        self.rows: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.rows.append(len(tokens))
        return F.normalize(self.mlp(tokens), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


SMALL = {"head_n_prototypes": 16, "head_bottleneck_dim": 8, "head_hidden_dim": 24}


def make_objective(
    seed: int = 0,
    centering: Any = "centering",
    backbone: Callable[[], nn.Module] = FakeBackbone,
    head: Callable[..., nn.Module] = FakeHead,
    classes: SemiSupervised | None = None,
    **settings: dict[str, Any],
) -> SelfDistillation:
    """A small objective; ``dino={...}`` and ``ibot={...}`` change single settings."""
    torch.manual_seed(seed)
    return SelfDistillation(
        backbone(),
        backbone(),
        head,
        dino=DinoConfig(**{**SMALL, **settings.get("dino", {})}),
        ibot=IbotConfig(**{**SMALL, **settings.get("ibot", {})}),
        centering=centering,
        semi_supervised=classes,
    )


def make_batch(samples: int = 4, local_crops: int = 2, seed: int = 0, masked: float = 0.4) -> Batch:
    """Views of noise, all sequences present, every second crop masked."""
    rng = torch.Generator().manual_seed(seed)
    token_mask = torch.rand(2 * samples, SEQUENCES * 4, generator=rng) < masked
    token_mask[::2] = False
    return Batch(
        global_VSHW=torch.randn(2 * samples, SEQUENCES, GLOBAL, GLOBAL, generator=rng),
        local_VSHW=torch.randn(local_crops * samples, SEQUENCES, LOCAL, LOCAL, generator=rng) if local_crops else None,
        token_mask_VN=token_mask,
        available_BS=torch.ones(samples, SEQUENCES, dtype=torch.bool),
        case_ids=[f"case-{i}" for i in range(samples)],
    )


@pytest.fixture(name="make_objective")
def _make_objective() -> Callable[..., SelfDistillation]:
    return make_objective


@pytest.fixture(name="needed_backbone")
def _needed_backbone() -> type[nn.Module]:
    return NeededBackbone


@pytest.fixture(name="real_head")
def _real_head() -> Callable[..., nn.Module]:
    return real_head


@pytest.fixture(name="make_batch")
def _make_batch() -> Callable[..., Batch]:
    return make_batch
