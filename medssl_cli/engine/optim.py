"""Parameter groups with layer-wise decay, AdamW, and clipping per sub-module.

Groups hold multipliers, not rates: ``apply_schedule`` sets the rates of a step, so nothing of a schedule has to be
saved. Every group is built whether or not the backbone is frozen at first; freezing only stops gradients.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.engine.schedules import ScalingRule

BACKBONE = "backbone"


class OptimConfig(Config):
    """AdamW and its schedules (Oquab et al. 2023)."""

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
    """Largest gradient norm of each sub-module; 0 turns clipping off."""
    freeze_last_layer_epochs: NonNegativeInt = 1
    """Epochs in which the last layer of the heads has learning rate 0."""
    freeze_backbone_epochs: NonNegativeInt = 0
    """Epochs in which only the heads are trained."""
    scaling_rule: ScalingRule = "sqrt_wrt_1024"
    """How base_lr grows with the total batch."""
    patch_embed_lr_mult: NonNegativeFloat = 0.2
    """Further factor on the learning rate of the patch embedding."""
    layerwise_decay: float = Field(default=0.9, gt=0, le=1)
    """Factor on the learning rate from each block of the backbone to the one below it."""
    adamw_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adamw_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""


# --- names -----------------------------------------------------------------------------------------------------------

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(?:\d+\.)?(\d+)\.")  # blocks.<i>. or, in chunked models, blocks.<chunk>.<i>.
_FIRST_LAYER = ("pos_embed", "patch_embed", "cls_token", "mask_token", "register_tokens")


def plain_name(name: str) -> str:
    """Name of a tensor without what compile, DDP, FSDP or activation checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def layer_index(name: str, depth: int) -> int:
    """Layer of a backbone parameter: 0 for the embedding, i + 1 for block i, ``depth + 1`` for all else."""
    if any(part in _FIRST_LAYER for part in name.split(".")):
        return 0
    block = _BLOCK.search(name)
    return int(block.group(1)) + 1 if block else depth + 1


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
        depth: Blocks of the backbone.
        layerwise_decay: Factor from each layer to the one below it.
        patch_embed_lr_mult: Further factor for the patch embedding.

    Returns:
        Groups for an optimizer: ``params`` as (name, parameter) pairs, ``lr_multiplier``, ``wd_multiplier`` and
        ``is_last_layer``. Biases, norms and layer scales have no weight decay; all else has, gains included.
    """
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in _named_parameters(modules):
        lr = 1.0
        if name.startswith(f"{BACKBONE}."):
            lr = layerwise_decay ** (depth + 1 - layer_index(name, depth))
            lr *= patch_embed_lr_mult if "patch_embed" in name else 1.0
        wd = 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0
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
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), weight_decay=0.0, fused=fused, foreach=not fused)


def apply_schedule(optimizer: torch.optim.Optimizer, values: Mapping[str, float]) -> None:
    """Set the rates of one step: ``lr``, ``last_layer_lr`` and ``wd``, each times the group's multiplier."""
    for group in optimizer.param_groups:
        rate = values["last_layer_lr"] if group["is_last_layer"] else values["lr"]
        group["lr"] = rate * group["lr_multiplier"]
        group["weight_decay"] = values["wd"] * group["wd_multiplier"]


def set_frozen(module: nn.Module, optimizer: torch.optim.Optimizer, frozen: bool) -> None:
    """Stop or resume gradients of those parameters of ``module`` that the optimizer holds."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in module.parameters():
        if id(parameter) in held:
            parameter.requires_grad_(not frozen)


# --- clipping --------------------------------------------------------------------------------------------------------


def clip_gradients(modules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Shorten the gradient of each sub-module to ``max_norm`` by its own norm.

    A gradient whose norm is not finite is left as it is, so that the guilty parameter can still be named. Nothing is
    copied to the host.

    Args:
        modules: Sub-modules by name.
        max_norm: Largest 2-norm; 0 only measures.

    Returns:
        2-norm before clipping, a scalar tensor for each sub-module that has gradients.
    """
    norms: dict[str, Tensor] = {}
    for name, module in modules.items():
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        if not gradients:
            continue
        norm = nn.utils.get_total_norm(gradients)
        norms[name] = norm
        if max_norm > 0:
            shorten = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, torch.where(norm.isfinite(), shorten, torch.ones_like(shorten)))
    return norms


def first_bad_gradient(module: nn.Module) -> str | None:
    """Name of the first parameter whose gradient is not finite, or None."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return plain_name(name)
    return None
