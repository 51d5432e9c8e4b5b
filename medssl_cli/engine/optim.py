"""Parameter groups with layer-wise decay, the optimizers, and clipping.

Groups hold multipliers, not rates: ``apply_schedule`` sets the rates of a step, so nothing of a schedule has to be
saved. Every group is built whether or not a part is frozen at first; freezing only stops gradients. All passes over
parameters are made over lists of tensors, and take the sharded ones of FSDP2 too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.engine.distributed import local_piece, whole_tensor
from medssl_cli.engine.lars import Lars
from medssl_cli.engine.schedules import ScalingRule

BACKBONE = "backbone"
SGD_MOMENTUM = 0.9

OptimizerName = Literal["adamw", "sgd", "lars"]
ClipMode = Literal["module", "tensor"]


class OptimConfig(Config):
    """The optimizer and its schedules (Oquab et al. 2023)."""

    epochs: PositiveInt = 100
    """Length of the run in epochs."""
    warmup_epochs: NonNegativeInt = 10
    """Epochs in which the learning rate rises from 0."""
    base_lr: PositiveFloat = 0.004
    """Learning rate before the scaling rule."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end."""
    weight_decay: NonNegativeFloat = 0.04
    """Weight decay at the start."""
    weight_decay_end: NonNegativeFloat = 0.4
    """Weight decay at the end."""
    clip_grad: NonNegativeFloat = 3.0
    """Largest gradient norm, of what `clip_mode` says; 0 turns clipping off."""
    clip_mode: ClipMode = "module"
    """module: backbone and each head by its own norm (DINOv2); tensor: each parameter by its own norm (DINO, iBOT)."""
    freeze_last_layer_epochs: NonNegativeInt = 1
    """Epochs in which the last layer of the heads is frozen."""
    freeze_last_layer: Literal["lr", "gradient"] = "lr"
    """lr: learning rate 0, its moments build up (DINOv2); gradient: none, so neither moments nor decay (DINO, iBOT)."""
    freeze_backbone_epochs: NonNegativeInt = 0
    """Epochs in which only the heads are trained."""
    scaling_rule: ScalingRule = "sqrt_wrt_1024"
    """How base_lr grows with the total batch."""
    patch_embed_lr_mult: NonNegativeFloat = 0.2
    """Further factor on the learning rate of the patch embedding."""
    layerwise_decay: float = Field(default=0.9, gt=0, le=1)
    """Factor on the learning rate from each block of the backbone to the one below it."""
    optimizer: OptimizerName = "adamw"
    """adamw; sgd with momentum 0.9; lars for very large batches."""
    adamw_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adamw_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""


# --- names -----------------------------------------------------------------------------------------------------------

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(?:\d+\.)?(\d+)\.")  # blocks.<i>. or, in chunked models, blocks.<chunk>.<i>.
_STAGE = re.compile(r"(?:^|\.)stages\.(\d+)\.(\d+)\.")
_DOWNSAMPLE = re.compile(r"(?:^|\.)downsample_layers\.(\d+)\.")
_FIRST_LAYER = {
    *("pos_embed", "patch_embed", "cls_token", "mask_token", "register_tokens"),
    *("storage_tokens", "rope_embed"),  # the names of DINOv3
}


def plain_name(name: str) -> str:
    """Name of a tensor without what compile, DDP, FSDP or activation checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def layer_index(name: str, depth: int, stage_depths: Sequence[int] = ()) -> int:
    """Layer of a backbone parameter: 0 for the embedding, i + 1 for block i, ``depth + 1`` for all else.

    The blocks of a ConvNeXt are counted through all stages; the layer before a stage belongs to the stage's first
    block, and the one before the first stage, the stem, is the embedding.

    Args:
        name: Of the parameter.
        depth: Blocks, of all stages together.
        stage_depths: Blocks of each stage, of a network that has stages.
    """
    if any(part in _FIRST_LAYER for part in name.split(".")):
        return 0
    block = _BLOCK.search(name)
    if block:
        return int(block.group(1)) + 1
    down, stage = _DOWNSAMPLE.search(name), _STAGE.search(name)
    if down:
        number = int(down.group(1))
        return sum(stage_depths[:number]) + 1 if number else 0
    return sum(stage_depths[: int(stage.group(1))]) + int(stage.group(2)) + 1 if stage else depth + 1


def count_stages(names: Iterable[str]) -> tuple[int, ...]:
    """Blocks of each stage, from the names of the parameters; empty for a network without stages."""
    blocks: dict[int, set[int]] = defaultdict(set)
    for name in names:
        found = _STAGE.search(name)
        if found:
            blocks[int(found.group(1))].add(int(found.group(2)))
    return tuple(len(blocks[stage]) for stage in sorted(blocks))


# --- groups ----------------------------------------------------------------------------------------------------------


def parameter_groups(
    modules: Mapping[str, nn.Module],
    depth: int,
    *,
    layerwise_decay: float = 0.9,
    patch_embed_lr_mult: float = 0.2,
) -> list[dict[str, Any]]:
    """Trainable parameters, fused by what they share.

    Args:
        modules: Sub-modules by name; layer-wise decay concerns the one called ``backbone``.
        depth: Blocks of the backbone; where its names tell of stages, these are counted instead.
        layerwise_decay: Factor from each layer to the one below it.
        patch_embed_lr_mult: Further factor for the patch embedding.

    Returns:
        Groups for an optimizer: ``params`` as (name, parameter) pairs, ``lr_multiplier``, ``wd_multiplier`` and
        ``is_last_layer``. Biases, norms, layer scales and all tensors of one dimension have no weight decay; all else
        has, gains included.
    """
    named = list(_named_parameters(modules))
    stages = count_stages(name for name, _ in named if name.startswith(f"{BACKBONE}."))
    depth = sum(stages) or depth
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in named:
        lr = 1.0
        if name.startswith(f"{BACKBONE}."):
            lr = layerwise_decay ** (depth + 1 - layer_index(name, depth, stages))
            lr *= patch_embed_lr_mult if "patch_embed" in name else 1.0
        spared = parameter.ndim == 1 or name.endswith(".bias") or "norm" in name or "gamma" in name
        wd = 0.0 if spared else 1.0
        key = (lr, wd, "last_layer" in name)
        group = groups.setdefault(
            key, {"params": [], "lr_multiplier": lr, "wd_multiplier": wd, "is_last_layer": key[2]}
        )
        group["params"].append((name, parameter))
    return list(groups.values())


def _named_parameters(modules: Mapping[str, nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    """(sub-module.name, parameter) of everything trainable, each once even if two sub-modules share it."""
    seen: set[int] = set()
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{plain_name(name)}", parameter


def build_adamw(
    groups: list[dict[str, Any]], device: torch.device, *, beta1: float = 0.9, beta2: float = 0.999
) -> torch.optim.AdamW:
    """AdamW in one kernel on CUDA and CPU and over lists of tensors elsewhere; rates are set by ``apply_schedule``."""
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=(beta1, beta2), weight_decay=0.0, fused=fused, foreach=not fused
    )
    optimizer.register_step_pre_hook(_drop_frozen_gradients)
    return optimizer


def build_optimizer(
    name: OptimizerName,
    groups: list[dict[str, Any]],
    device: torch.device,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
) -> torch.optim.Optimizer:
    """The optimizer of that name; rates are set by ``apply_schedule``.

    Args:
        name: ``adamw``; ``sgd`` and ``lars`` have momentum 0.9, and their weight decay is part of the gradient.
        groups: From ``parameter_groups``.
        device: Of the parameters.
        beta1, beta2: Of AdamW.
    """
    if name == "adamw":
        return build_adamw(groups, device, beta1=beta1, beta2=beta2)
    optimizer: torch.optim.Optimizer
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=SGD_MOMENTUM, weight_decay=0.0, foreach=True)
    else:
        optimizer = Lars(groups, momentum=SGD_MOMENTUM)
    optimizer.register_step_pre_hook(_drop_frozen_gradients)
    return optimizer


def apply_schedule(optimizer: torch.optim.Optimizer, values: Mapping[str, float]) -> None:
    """Set the rates of one step: ``lr``, ``last_layer_lr`` and ``wd``, each times the group's multiplier.

    With ``last_layer_frozen`` the gradients of the last layers are dropped when the step is taken: after a reduction
    over processes, which must not miss them, and after clipping. So no moments build up and no decay acts.
    """
    for group in optimizer.param_groups:
        rate = values["last_layer_lr"] if group["is_last_layer"] else values["lr"]
        group["lr"] = rate * group["lr_multiplier"]
        group["weight_decay"] = values["wd"] * group["wd_multiplier"]
        group["is_frozen"] = group["is_last_layer"] and bool(values.get("last_layer_frozen", 0.0))


def _drop_frozen_gradients(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("is_frozen", False):
            for parameter in group["params"]:
                parameter.grad = None


def set_frozen(module: nn.Module, optimizer: torch.optim.Optimizer, frozen: bool) -> None:
    """Stop or resume gradients of those parameters of ``module`` that the optimizer holds."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in module.parameters():
        if id(parameter) in held:
            parameter.requires_grad_(not frozen)


# --- clipping --------------------------------------------------------------------------------------------------------


def clip_gradients(
    modules: Mapping[str, nn.Module], max_norm: float, *, mode: ClipMode = "module"
) -> dict[str, Tensor]:
    """Shorten gradients to ``max_norm``.

    A gradient whose norm is not finite is left as it is, so that the guilty parameter can still be named. Nothing is
    copied to the host.

    Args:
        modules: Sub-modules by name.
        max_norm: Largest 2-norm; 0 only measures.
        mode: ``module``: each sub-module by its own norm; ``tensor``: each parameter by its own norm.

    Returns:
        2-norm before clipping, a scalar tensor for each sub-module that has gradients.
    """
    norms: dict[str, Tensor] = {}
    for name, module in modules.items():
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        if not gradients:
            continue
        pieces = [local_piece(gradient) for gradient in gradients]
        if mode == "tensor":
            norm_P = whole_tensor(torch.stack(torch._foreach_norm(gradients)))
            norms[name] = torch.linalg.vector_norm(norm_P)
        else:
            norm_P = norms[name] = whole_tensor(nn.utils.get_total_norm(gradients))
        if max_norm > 0:
            factors = _shorten(norm_P, max_norm)
            torch._foreach_mul_(pieces, factors if mode == "module" else list(factors.unbind()))
    return norms


def _shorten(norms: Tensor, max_norm: float) -> Tensor:
    """Factors that bring gradients of these norms to ``max_norm`` at most; 1 where a norm is not finite."""
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    return torch.where(norms.isfinite(), factors, torch.ones_like(factors))


def first_bad_gradient(module: nn.Module) -> str | None:
    """Name of the first parameter whose gradient is not finite, or None."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not local_piece(parameter.grad).isfinite().all():
            return plain_name(name)
    return None
