"""The objective with the real backbone and head, small."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from medssl_cli.core.protocols import Batch
from medssl_cli.models.heads import DINOHead
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.objectives.dino import DinoConfig, HeadConfig
from medssl_cli.objectives.ibot import IbotConfig
from medssl_cli.objectives.self_distillation import CenteringName, SelfDistillation, expected_first_loss

SEQUENCES = ("t2", "adc", "dwi")


class WholeViT(VisionTransformer):
    """Gives all tokens, as a backbone that cannot be asked for some of them."""

    @property
    def forward_needed(self) -> None:  # type: ignore[override]
        raise AttributeError


def make_head(shape: HeadConfig) -> DINOHead:
    return DINOHead(
        48, shape.head_n_prototypes, shape.head_hidden_dim, shape.head_bottleneck_dim, n_layers=shape.head_nlayers
    )


def build(
    prototypes: int,
    drop_path_rate: float = 0.0,
    layerscale: float = 1e-5,
    centering: CenteringName = "centering",
    bottleneck: int = 256,
    kind: type[VisionTransformer] = VisionTransformer,
    center_tokens: Literal["masked", "all"] = "masked",
) -> SelfDistillation:
    torch.manual_seed(0)
    student, teacher = (
        kind(
            img_size=32,
            patch_size=8,
            embed_dim=48,
            depth=2,
            num_heads=3,
            sequences=SEQUENCES,
            use_mri_seq_embed=True,
            layerscale=layerscale,
            drop_path_rate=rate,
        )
        for rate in (drop_path_rate, 0.0)
    )
    shape = {"head_n_prototypes": prototypes, "head_hidden_dim": 64, "head_bottleneck_dim": bottleneck}
    ibot = IbotConfig(**shape, mask_mode="full_sequence", center_tokens=center_tokens)
    return SelfDistillation(student, teacher, make_head, dino=DinoConfig(**shape), ibot=ibot, centering=centering)


def views(samples: int = 4, local_crops: int = 3) -> Batch:
    """Two noisy views of smooth pictures; one whole sequence and some more tokens hidden in each crop."""
    rng = torch.Generator().manual_seed(0)
    pictures = torch.nn.functional.interpolate(torch.randn(samples, 3, 4, 4, generator=rng), 32, mode="bilinear")
    global_ = pictures.repeat(2, 1, 1, 1) + 0.1 * torch.randn(2 * samples, 3, 32, 32, generator=rng)
    local = pictures[:, :, 8:24, 8:24].repeat(local_crops, 1, 1, 1)
    token_mask = torch.rand(2 * samples, 3 * 16, generator=rng) < 0.2
    token_mask[torch.arange(2 * samples)[:, None], 16 * (torch.arange(2 * samples)[:, None] % 3) + torch.arange(16)] = (
        True
    )
    available = torch.ones(samples, 3, dtype=torch.bool)
    available[0, 1] = False
    return Batch(global_, local, token_mask, available)


@pytest.mark.parametrize("layerscale", [1e-5, 0.1, 1.0])
@pytest.mark.parametrize("bottleneck", [16, 64, 256])
def test_t36_first_loss_of_a_vision_transformer_is_what_was_predicted(bottleneck: int, layerscale: float) -> None:
    objective = build(4096, layerscale=layerscale, bottleneck=bottleneck)
    expected = expected_first_loss(
        objective.dino, objective.ibot, local_crops_number=3, batch_size=4, n_sequences=3, layerscale=layerscale
    )
    found = {name: loss.item() for name, loss in objective.losses(views(), {"teacher_temp": 0.04}).items()}
    assert found.keys() == expected.keys()
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.12)


@pytest.mark.parametrize("layerscale", [1e-5, 1.0])
@pytest.mark.parametrize("temperature", [0.02, 0.04])
def test_t36_first_loss_with_sinkhorn_knopp_is_what_was_predicted(temperature: float, layerscale: float) -> None:
    """Its targets share nearly equal rows out over all prototypes, so they are nearly uniform."""
    objective = build(512, layerscale=layerscale, bottleneck=64, centering="sinkhorn_knopp")
    expected = expected_first_loss(
        objective.dino,
        objective.ibot,
        local_crops_number=3,
        batch_size=4,
        n_sequences=3,
        teacher_temperature=temperature,
        layerscale=layerscale,
        centering="sinkhorn_knopp",
    )
    found = {name: loss.item() for name, loss in objective.losses(views(), {"teacher_temp": temperature}).items()}
    for name in ("dino_local_crops_loss", "dino_global_crops_loss"):
        assert found[name] == pytest.approx(expected[name], rel=0.12), name
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.15)


def test_one_batch_is_overfitted_by_a_vision_transformer() -> None:
    objective, batch = build(64, drop_path_rate=0.1, layerscale=1.0, centering="sinkhorn_knopp"), views()
    optimizer = torch.optim.AdamW(objective.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = torch.stack(list(objective.losses(batch, {"teacher_temp": 0.002}).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step({"momentum": 1.0})  # a fixed teacher, so that the targets stay and the loss must fall
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("center_tokens", ["masked", "all"])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_a_vision_transformer_asked_for_few_tokens_trains_alike(
    drop_path_rate: float, center_tokens: Literal["masked", "all"]
) -> None:
    found = []
    for kind in (WholeViT, VisionTransformer):
        objective = build(64, drop_path_rate, 1.0, center_tokens=center_tokens, kind=kind)
        assert hasattr(objective.student["backbone"], "forward_needed") == (kind is VisionTransformer)
        torch.manual_seed(3)
        losses = objective.losses(views(), {"teacher_temp": 0.07})
        torch.stack(list(losses.values())).sum().backward()
        objective.after_step({"momentum": 0.9})
        gradients = {name: p.grad for name, p in objective.student.named_parameters()}
        found.append((losses, gradients, objective.ibot_center.center))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1][2], found[0][2], atol=1e-6, rtol=1e-5)


def test_one_batch_is_overfitted_with_ibots_settings() -> None:
    """Own last layer, frozen gains, a centre of all tokens, no KoLeo and no local crops."""
    torch.manual_seed(0)
    shape = {"head_n_prototypes": 64, "head_hidden_dim": 64, "head_bottleneck_dim": 16}
    student, teacher = (
        VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, layerscale=0.0)
        for _ in range(2)
    )

    def head(shape: HeadConfig, n_patch_prototypes: int | None = None) -> DINOHead:
        return DINOHead(
            48,
            shape.head_n_prototypes,
            64,
            16,
            train_gains=not shape.norm_last_layer,
            n_patch_prototypes=n_patch_prototypes,
        )

    objective = SelfDistillation(
        student,
        teacher,
        head,
        dino=DinoConfig(**shape, koleo_loss_weight=0.0, norm_last_layer=True),
        ibot=IbotConfig(**shape, separate_last_layer=True, center_tokens="all"),
    )
    rng = torch.Generator().manual_seed(0)
    pictures = torch.nn.functional.interpolate(torch.randn(4, 3, 4, 4, generator=rng), 32, mode="bilinear")
    token_mask = torch.rand(8, 16, generator=rng) < 0.3
    token_mask[::2] = False
    batch = Batch(pictures.repeat(2, 1, 1, 1), None, token_mask, torch.ones(4, 1, dtype=torch.bool))
    values = {"teacher_temp": 0.004, "teacher_patch_temp": 0.004, "momentum": 1.0}
    for _ in range(30):  # until the centres rest; after that teacher and targets stay, and the losses must fall
        objective.losses(batch, values)
        objective.after_step(values)
    optimizer = torch.optim.AdamW(objective.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(50):
        terms = objective.losses(batch, values)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        losses.append([terms["dino_global_crops_loss"].item(), terms["ibot_loss"].item()])
    assert losses[-1][0] < 0.75 * losses[0][0]
    assert losses[-1][1] < 0.75 * losses[0][1]
