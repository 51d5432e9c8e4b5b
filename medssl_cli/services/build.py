"""The one table where names in a config become classes, and files become models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medssl_cli.data.views import MultiCrop
from medssl_cli.engine.optim import build_adamw, parameter_groups
from medssl_cli.engine.precision import AUTOCAST_DTYPES
from medssl_cli.engine.schedules import Schedules, effective_lr
from medssl_cli.models.attention import choose_backend, set_backend
from medssl_cli.models.heads import DINOHead
from medssl_cli.models.zoo import LoadReport, build_backbone, load_into, read_card, read_weights
from medssl_cli.objectives.dino import HeadConfig
from medssl_cli.objectives.self_distillation import SelfDistillation
from medssl_cli.services.pretrain_config import PretrainConfig

log = logging.getLogger(__name__)


def build_objective(
    config: PretrainConfig, sequences: tuple[str, ...] | None, device: torch.device, weights: Path | None
) -> tuple[SelfDistillation, LoadReport | None]:
    """Student, teacher, heads and losses on the device; the same tensors for the same seed.

    Args:
        config: The run.
        sequences: Names in channel order; None for plain pictures.
        device: Where to train.
        weights: File for the student's backbone; the teacher becomes a copy.
    """
    torch.manual_seed(config.train.seed)
    student = build_backbone(config.student, config.position_side, sequences, stochastic_depth=True)
    teacher = build_backbone(config.student, config.position_side, sequences, stochastic_depth=False)
    report = None
    if weights is not None:
        report = load_into(student, read_weights(weights), source=str(weights), sequences=_sequences_of(weights))

    def make_head(shape: HeadConfig) -> nn.Module:
        return DINOHead(
            student.embed_dim,
            shape.head_n_prototypes,
            hidden_dim=shape.head_hidden_dim,
            bottleneck_dim=shape.head_bottleneck_dim,
            n_layers=shape.head_nlayers,
        )

    objective = SelfDistillation(
        student, teacher, make_head, dino=config.dino, ibot=config.ibot, centering=config.train.centering
    )
    return objective.to(device), report


def _sequences_of(weights: Path) -> list[str] | None:
    if weights.suffix == ".safetensors" and weights.with_suffix(".json").is_file():
        return read_card(weights).get("sequences")
    return None


def build_optimizer(config: PretrainConfig, objective: SelfDistillation, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the groups of the student's modules."""
    groups = parameter_groups(
        objective.trained_modules(),
        config.student.size[1],
        layerwise_decay=config.optim.layerwise_decay,
        patch_embed_lr_mult=config.optim.patch_embed_lr_mult,
    )
    return build_adamw(groups, device, beta1=config.optim.adamw_beta1, beta2=config.optim.adamw_beta2)


def build_schedules(config: PretrainConfig, epoch_steps: int) -> Schedules:
    """Learning rate, weight decay, momentum and temperature as functions of the step."""
    optim, teacher = config.optim, config.teacher
    return Schedules(
        total_steps=optim.epochs * epoch_steps,
        epoch_steps=epoch_steps,
        lr=effective_lr(optim.base_lr, config.samples_per_step(), optim.scaling_rule),
        min_lr=optim.min_lr,
        warmup_epochs=optim.warmup_epochs,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
        freeze_last_layer_epochs=optim.freeze_last_layer_epochs,
        freeze_backbone_epochs=optim.freeze_backbone_epochs,
        momentum=teacher.momentum_teacher,
        final_momentum=teacher.final_momentum_teacher,
        warmup_teacher_temp=teacher.warmup_teacher_temp,
        teacher_temp=teacher.teacher_temp,
        warmup_teacher_temp_epochs=teacher.warmup_teacher_temp_epochs,
    )


def build_views(config: PretrainConfig, n_sequences: int) -> MultiCrop:
    """Crops and token masks of a batch."""
    return MultiCrop(
        config.crops,
        config.student.patch_size,
        n_sequences,
        mask_sample_probability=config.ibot.mask_sample_probability,
        mask_ratio_min_max=config.ibot.mask_ratio_min_max,
        mask_mode=config.ibot.masking,
    )


def select_attention(name: str | None, device: torch.device, precision: str) -> str:
    """Fix the attention backend for this process and give its name."""
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    if name is not None:
        set_backend(name, device, dtype)
        return name
    return choose_backend(device, dtype)


def card_facts(config: PretrainConfig, recipe: str, step: int, digests: dict[str, Any]) -> dict[str, Any]:
    """What a user of the exported features must know: preprocessing, normalisation, origin."""
    crops = config.crops
    return {
        "recipe": recipe,
        "step": step,
        "mean": crops.mean,
        "std": crops.std,
        "preprocess": config.data.preprocess.model_dump(mode="json"),
        "spatial_size": config.data.spatial_size,
        "global_crops_size": crops.global_crops_size,
        **digests,
    }
