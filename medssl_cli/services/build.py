"""The one table where names in a config become classes, and files become models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from medssl_cli.data.views import MultiCrop
from medssl_cli.engine.acceleration import accelerate
from medssl_cli.engine.distributed import Parallel, build_parallel, from_first, rank, world_size
from medssl_cli.engine.health import HealthMonitor
from medssl_cli.engine.optim import build_optimizer as build_named_optimizer
from medssl_cli.engine.optim import parameter_groups
from medssl_cli.engine.precision import AUTOCAST_DTYPES
from medssl_cli.engine.schedules import Schedules, effective_lr
from medssl_cli.models.attention import AttentionChoice, Groups, choose_backend, choose_by_trial, set_backend
from medssl_cli.models.heads import DINOHead
from medssl_cli.models.zoo import (
    build_backbone,
    card_warnings,
    differences_to_card,
    load_into,
    read_card,
    read_weights,
)
from medssl_cli.objectives.dino import HeadConfig
from medssl_cli.objectives.self_distillation import SelfDistillation
from medssl_cli.objectives.semi_supervised import SemiSupervised
from medssl_cli.services.pretrain_config import PretrainConfig

log = logging.getLogger(__name__)


def build_objective(
    config: PretrainConfig,
    sequences: tuple[str, ...] | None,
    device: torch.device,
    weights: Path | None,
    *,
    in_chans: int = 3,
    class_counts: Sequence[int] = (),
) -> SelfDistillation:
    """Student, teacher, heads and losses on the device; the same tensors for the same seed.

    Args:
        config: The run.
        sequences: Names in channel order; None for plain pictures.
        device: Where to train.
        weights: File for the student's backbone; the teacher becomes a copy.
        in_chans: Channels of the patch convolution.
        class_counts: Labelled cases of each class, where a semi-supervised loss is asked for.
    """
    torch.manual_seed(config.train.seed)
    student = build_backbone(config.student, config.position_side, sequences, in_chans, stochastic_depth=True)
    teacher = build_backbone(config.student, config.position_side, sequences, in_chans, stochastic_depth=False)
    if weights is not None:
        _load(config, student, weights)

    def make_head(shape: HeadConfig, n_patch_prototypes: int | None = None) -> nn.Module:
        return DINOHead(
            student.embed_dim,
            shape.head_n_prototypes,
            hidden_dim=shape.head_hidden_dim,
            bottleneck_dim=shape.head_bottleneck_dim,
            n_layers=shape.head_nlayers,
            train_gains=not shape.norm_last_layer,
            norm=shape.norm_in_head,
            activation=shape.act_in_head,
            n_patch_prototypes=n_patch_prototypes,
        )

    labelled = config.semi_supervised.loss_weight > 0
    objective = SelfDistillation(
        student,
        teacher,
        make_head,
        dino=config.dino,
        ibot=config.ibot,
        centering=config.train.centering,
        semi_supervised=SemiSupervised(student.embed_dim, class_counts, config.semi_supervised) if labelled else None,
    )
    return objective.to(device)


def _load(config: PretrainConfig, student: nn.Module, weights: Path, *, quiet: bool = False) -> None:
    role, card = config.MODEL.init_from, _card_of(weights)
    for text in (*card_warnings(card, config.data.modality), *differences_to_card(card, student)):
        log.log(logging.DEBUG if quiet else logging.WARNING, "%s", text)
    state = read_weights(weights, role=role)
    load_into(student, state, source=str(weights), sequences=card.get("sequences"), role=role, quiet=quiet)


def check_weights(config: PretrainConfig, weights: Path, kind: Literal["volumes", "images"]) -> None:
    """Refuse weights that do not fit before hours are spent on preparing images; nothing is kept.

    Raises:
        CheckpointError: As when they are loaded.
    """
    windows = len(config.data.windows_hu or ())
    plain = kind == "images" or bool(config.data.as_pictures)
    with torch.device("meta"):
        student = build_backbone(
            config.student,
            config.position_side,
            None if plain else config.data.mri_sequences,
            windows if windows > 1 and windows != 3 else 3,
            stochastic_depth=False,
        )
    _load(config, student, weights, quiet=True)


def _card_of(weights: Path) -> dict[str, Any]:
    has_card = weights.suffix == ".safetensors" and weights.with_suffix(".json").is_file()
    return read_card(weights) if has_card else {}


def build_optimizer(config: PretrainConfig, objective: SelfDistillation, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over the groups of the student's modules."""
    groups = parameter_groups(
        objective.trained_modules(),
        config.student.size[1],
        layerwise_decay=config.optim.layerwise_decay,
        patch_embed_lr_mult=config.optim.patch_embed_lr_mult,
    )
    return build_named_optimizer(
        config.optim.optimizer, groups, device, beta1=config.optim.adamw_beta1, beta2=config.optim.adamw_beta2
    )


def build_gradients(config: PretrainConfig, objective: SelfDistillation, device: torch.device) -> Parallel:
    """What makes the gradients of several processes one; after compiling and before the optimizer is built."""
    compute = config.compute_precision
    return build_parallel(
        objective,
        fsdp=compute.parallel == "fsdp",
        student=compute.student,
        teacher=compute.teacher,
        precision=compute.precision,
        device=device,
    )


def build_schedules(config: PretrainConfig, epoch_steps: int, world: int = 1) -> Schedules:
    """Learning rate, weight decay, momentum and temperature as functions of the step, for ``world`` processes."""
    optim, teacher = config.optim, config.teacher
    return Schedules(
        total_steps=optim.epochs * epoch_steps,
        epoch_steps=epoch_steps,
        lr=effective_lr(optim.base_lr, config.samples_per_step(world), optim.scaling_rule),
        min_lr=optim.min_lr,
        warmup_epochs=optim.warmup_epochs,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
        freeze_last_layer=optim.freeze_last_layer,
        freeze_last_layer_epochs=optim.freeze_last_layer_epochs,
        freeze_backbone_epochs=optim.freeze_backbone_epochs,
        momentum=teacher.momentum_teacher,
        final_momentum=teacher.final_momentum_teacher,
        warmup_teacher_temp=teacher.warmup_teacher_temp,
        teacher_temp=teacher.teacher_temp,
        warmup_teacher_temp_epochs=teacher.warmup_teacher_temp_epochs,
        warmup_teacher_patch_temp=teacher.warmup_teacher_patch_temp,
        teacher_patch_temp=teacher.teacher_patch_temp,
        warmup_teacher_patch_temp_epochs=teacher.warmup_teacher_patch_temp_epochs,
    )


def build_views(config: PretrainConfig, n_sequences: int) -> MultiCrop:
    """Crops and token masks of a batch."""
    ibot = config.ibot
    return MultiCrop(
        config.crops,
        config.student.patch_size,
        n_sequences,
        mask_sample_probability=ibot.mask_sample_probability,
        mask_ratio_min_max=ibot.mask_ratio_min_max,
        mask_mode=ibot.masking,
        mask_exact=ibot.mask_exact,
        mask_sampling=ibot.mask_sampling,
        pred_ratio=ibot.pred_ratio,
        pred_ratio_var=ibot.pred_ratio_var,
        pred_shape=ibot.pred_shape,
    )


def select_attention(
    config: PretrainConfig, device: torch.device, n_sequences: int, *, asked: str | None, before: str | None
) -> tuple[str, list[str]]:
    """Fix the attention backend of this process, by a timed trial on the run's own shapes.

    All processes of a run take the choice of the first.

    Args:
        config: The run.
        device: Where to train.
        n_sequences: Of a sample.
        asked: Backend that the user names; no trial then.
        before: Backend of the part of the run that is resumed.

    Returns:
        Its name, and lines for the log.
    """
    dtype = AUTOCAST_DTYPES.get(config.compute_precision.precision, torch.float32)
    if config.student.family == "convnext":
        return "none", []
    if asked is not None:
        set_backend(asked, device, dtype)
        return choose_backend(device, dtype), []
    width, depth, heads = config.student.size
    groups = packed_groups(config, n_sequences)

    def trial(preferred: str | None) -> AttentionChoice:
        return choose_by_trial(device, dtype, groups, heads, width // heads, preferred=preferred, layers=depth)

    choice = from_first(lambda: trial(before))
    if rank():
        choice = trial(choice.name)
    return choice.name, [choice.line()]


def packed_groups(config: PretrainConfig, n_sequences: int) -> Groups:
    """How the tokens of a student's pass lie: (crops, tokens of each) for global and local crops."""
    crops, student, batch = config.crops, config.student, config.train.batch_size_per_gpu

    def tokens(side: int) -> int:
        return 1 + student.num_register_tokens + n_sequences * (side // student.patch_size) ** 2

    groups = ((2 * batch, tokens(crops.global_crops_size)),)
    if crops.local_crops_number:
        groups += ((crops.local_crops_number * batch, tokens(crops.local_crops_size)),)  # type: ignore[assignment]
    return groups


def build_acceleration(
    config: PretrainConfig, objective: SelfDistillation, device: torch.device, steps: int
) -> list[str]:
    """Compile what may be compiled; after the attention backend is fixed and before anything is wrapped."""
    sharded = world_size() > 1 and config.compute_precision.parallel == "fsdp"
    return accelerate(objective, config.train, device, config.compute_precision.precision, steps, sharded=sharded)


def build_monitor(config: PretrainConfig, schedules: Schedules) -> HealthMonitor:
    """What watches the health figures of a run."""
    warmup = round(config.optim.warmup_epochs * schedules.epoch_steps)
    return HealthMonitor(config.health, warmup_steps=warmup, koleo_weight=config.dino.koleo_loss_weight)


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
        "modality": config.data.modality,
        "as_pictures": bool(config.data.as_pictures),
        "windows_hu": config.data.windows_hu,
        **digests,
    }
