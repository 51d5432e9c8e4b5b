"""Ways of taking the same optimizer step: as medssl takes it, and with one thing at a time done plainly.

A trainer is switched between them, so that all are measured in turns on the same networks. None changes the numbers
beyond rounding, but for the precision and, with stochastic depth, the passes of one size each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medssl_cli.engine import trainer as trainer_module
from medssl_cli.engine.optim import clip_gradients
from medssl_cli.engine.precision import AUTOCAST_DTYPES, Precision
from medssl_cli.engine.trainer import Trainer
from medssl_cli.models.attention import set_backend

SLOT = "_compiled_call_impl"


@dataclass(frozen=True)
class Way:
    """How a step is taken; the defaults are medssl's.

    Args:
        packed: Crops of all sizes in one pass; else one pass a size.
        needed: The last block computes the tokens that a loss needs; else all.
        together: Moving average and clipping over lists of tensors; else tensor by tensor.
        fused: AdamW in one kernel; else over lists of tensors.
        checkpointing: Activations are computed again in the backward pass.
        compiled: Blocks compiled with ``torch.compile``.
        precision: None: as the run has it.
        kernel: Of attention; None: the fastest.
    """

    packed: bool = True
    needed: bool = True
    together: bool = True
    fused: bool = True
    checkpointing: bool = False
    compiled: bool = False
    precision: str | None = None
    kernel: str | None = None


class Switch:
    """Turns one trainer from way to way.

    Args:
        trainer: Of ``recipe.build_trainer``; its blocks may be compiled already.
        foreach: A second optimizer over the same parameters, for the ways that are not fused.
    """

    def __init__(self, trainer: Trainer, foreach: torch.optim.Optimizer | None = None) -> None:
        self.trainer, self.objective = trainer, _whole(trainer)
        self.precision = trainer.precision.name
        self._precisions = {self.precision: trainer.precision}
        self._optimizers = (trainer.optimizer, foreach)
        self._after_step = self.objective.after_step
        blocks = [block for backbone in self._backbones() for block in backbone.flat_blocks()]
        self._compiled = [(block, getattr(block, SLOT)) for block in blocks]

    def take(self, way: Way) -> None:
        """Make the next steps go this way."""
        trainer, optimizer = self.trainer, self._optimizers[not way.fused]
        if optimizer is None:
            raise ValueError("this switch has one optimizer only")
        trainer.optimizer = optimizer
        name = way.precision or self.precision
        fresh = Precision(name, trainer.device)  # type: ignore[arg-type]  # sets torch's switches
        trainer.precision = self._precisions.setdefault(name, fresh)  # keeps its loss scale
        set_backend(way.kernel, trainer.device, AUTOCAST_DTYPES.get(trainer.precision.name, torch.float32))
        for backbone in self._backbones():
            vars(backbone).pop("forward_needed", None)
            if not (way.packed and way.needed):
                backbone.forward_needed = partial(all_tokens, backbone, way.packed)
            backbone.grad_checkpointing = way.checkpointing
        for block, compiled in self._compiled:
            setattr(block, SLOT, compiled if way.compiled else None)
        self.objective.after_step = self._after_step if way.together else partial(average_one_by_one, self.objective)
        trainer_module.clip_gradients = clip_gradients if way.together else clip_one_by_one  # type: ignore[attr-defined]

    def restore(self) -> None:
        """Leave everything as it was found."""
        self.take(Way())
        for block, compiled in self._compiled:
            setattr(block, SLOT, compiled)
        del self.objective.after_step
        set_backend(None, self.trainer.device)

    def _backbones(self) -> list[Any]:
        return [network["backbone"] for network in (self.objective.student, self.objective.teacher)]


def _whole(trainer: Trainer) -> Any:
    return trainer.objective


def all_tokens(
    backbone: Any,
    packed: bool,
    images: Sequence[Tensor],
    token_masks: Sequence[Tensor | None],
    available: Sequence[Tensor | None],
    patch_index: Sequence[Tensor | None],
) -> list[tuple[Tensor, Tensor]]:
    """``forward_needed`` by computing all tokens and picking from them; packed, or one pass for each size."""
    if packed:
        found = backbone.forward_list(images, token_masks, available)
    else:
        found = [backbone(*parts) for parts in zip(images, token_masks, available, strict=True)]
    rows = [features.patches_BND.flatten(0, 1) for features in found]
    picked = [row[:0] if index is None else row[index] for row, index in zip(rows, patch_index, strict=True)]
    return [(features.cls_BD, patches) for features, patches in zip(found, picked, strict=True)]


@torch.no_grad()
def average_one_by_one(objective: Any, values: dict[str, float]) -> None:
    """The teacher's moving average, a tensor at a time; then the centres."""
    momentum = values["momentum"]
    for old, new in zip(objective.teacher.parameters(), objective.student.parameters(), strict=True):
        old.mul_(momentum).add_(new, alpha=1 - momentum)
    for center in (objective.dino_center, objective.ibot_center):
        if center is not None:
            center.update()


@torch.no_grad()
def clip_one_by_one(modules: dict[str, Any], max_norm: float, **_: object) -> dict[str, Tensor]:
    """Norms and clipping, a tensor at a time."""
    norms = {}
    for name, module in modules.items():
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norms[name] = torch.stack([gradient.norm() for gradient in gradients]).norm()
        factor = (max_norm / (norms[name] + 1e-6)).clamp(max=1.0) if max_norm > 0 else math.inf
        for gradient in gradients if max_norm > 0 else ():
            gradient.mul_(factor)
    return norms


def kept_gib(trainer: Trainer) -> float:
    """GiB that one forward pass keeps for the backward pass, parameters not counted."""
    objective = _whole(trainer)
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    slices = next(trainer.batches(0))
    batch, values = trainer.views(slices, 0, 0), trainer.schedules.at(0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), trainer.precision.autocast():
        losses = objective.losses(batch, values)
    del losses
    for center in (objective.dino_center, objective.ibot_center):
        if center is not None:
            center.update()  # else this pass would count in the next step
    return sum(kept.values()) / 2**30
