"""DINO: the student's prototypes on one view against the teacher's on another (Caron et al. 2021).

The cross-entropy has a backward of its own. A step compares some 20,000 masked tokens with up to 65,536 prototypes:
kept once in the dtype of the head that is 2.6 GiB, while autograd would keep float32 copies of every intermediate.
Letters: B samples, V crops (view-major), M rows, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from medssl_cli.core.config import Config

STUDENT_TEMPERATURE = 0.1
CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32 at a time


class HeadConfig(Config):
    """Shape of a projection head: width -> hidden -> … -> bottleneck -> prototypes."""

    head_n_prototypes: int = Field(default=65536, ge=2)
    """Prototypes K, the columns that student and teacher are compared on."""
    head_bottleneck_dim: PositiveInt = 256
    """Width of the normalised vector that is compared with the prototypes."""
    head_hidden_dim: PositiveInt = 2048
    """Width of the hidden layers."""
    head_nlayers: PositiveInt = 3
    """Linear layers before the prototypes."""
    norm_last_layer: bool = False
    """Freeze the gains of the prototypes at 1, as DINO and iBOT do; DINOv2 trains them."""
    norm_in_head: Literal["none", "bn", "syncbn", "ln"] = "none"
    """Norm after each hidden layer; none or null. iBOT's csyncbn and psyncbn are not there: no published model uses
    these variants of syncbn."""
    act_in_head: Literal["gelu", "relu"] = "gelu"
    """Activation between the layers."""

    @field_validator("norm_in_head", mode="before")
    @classmethod
    def _known_norm(cls, value: Any) -> Any:
        if value in ("csyncbn", "psyncbn"):
            raise ValueError(f"{value} is a variant of syncbn that no published model uses; take syncbn, ln or none")
        return "none" if value in (None, "") else value

    @property
    def needs_all_tokens(self) -> bool:
        """Whether the head must see every patch token, because its norm takes statistics over the rows."""
        return self.norm_in_head in ("bn", "syncbn")


class DinoConfig(HeadConfig):
    """Loss on cls tokens, its head, and the spread of the cls tokens."""

    loss_weight: NonNegativeFloat = 1.0
    """Weight of the cls loss; 0 turns it off."""
    koleo_loss_weight: NonNegativeFloat = 0.1
    """Weight of KoLeo, added for each of the two global views whatever `dino.loss_weight` is; 0 turns it off."""


def dino_losses(
    global_logits_VK: Tensor,
    local_logits_VK: Tensor | None,
    targets_VK: Tensor,
    temperature: float = STUDENT_TEMPERATURE,
) -> dict[str, Tensor]:
    """Mean cross-entropy over all pairs of a student crop and a teacher view that are not the same crop.

    With n local crops there are 2n + 2 pairs: each local crop meets both teacher views, each global crop meets only
    the view that is not its own.

    Args:
        global_logits_VK: (2B, K) student, view-major.
        local_logits_VK: (n*B, K) student, view-major; None without local crops.
        targets_VK: (2B, K) float32 teacher probabilities in the order of the teacher's own views; swapped here.
        temperature: Of the student's softmax.

    Returns:
        ``dino_local_crops_loss`` (if there are local crops) and ``dino_global_crops_loss``, float32 scalars, both
        divided by the number of pairs: their sum is the mean.
    """
    own_view_2BK = targets_VK.unflatten(0, (2, -1))
    batch = own_view_2BK.shape[1]
    local_crops = 0 if local_logits_VK is None else local_logits_VK.shape[0] // batch
    pairs = 2 * local_crops + 2
    losses = {}
    if local_logits_VK is not None:
        # the cross-entropy is linear in the target, so both teacher views are met in one pass
        each_nB = soft_cross_entropy(local_logits_VK.unflatten(0, (-1, batch)), own_view_2BK.sum(0), temperature)
        losses["dino_local_crops_loss"] = each_nB.sum() / (batch * pairs)
    other_view_VK = own_view_2BK.flip(0).flatten(0, 1)
    losses["dino_global_crops_loss"] = soft_cross_entropy(global_logits_VK, other_view_VK, temperature).mean() * (
        2 / pairs
    )
    return losses


def soft_cross_entropy(logits: Tensor, targets_MK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of softmax(logits / temperature) against probabilities, row by row, in float32.

    Args:
        logits: (M, K) or (V, M, K), any float dtype; the gradient has the same dtype.
        targets_MK: (M, K), shared by all V; takes no gradient. Rows may sum to any value.
        temperature: Divides the logits.

    Returns:
        (M,) or (V, M), float32 (float64 for float64 logits).
    """
    if logits.shape[-2:] != targets_MK.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets_MK.shape)} differ in rows or columns"
        )
    if logits.ndim == 2:
        return _SoftCrossEntropy.apply(logits[None], targets_MK, temperature)[0]
    return _SoftCrossEntropy.apply(logits, targets_MK, temperature)


class _SoftCrossEntropy(torch.autograd.Function):
    """(V, M, K) logits and (M, K) targets -> (V, M); keeps the two inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, logits_VMK: Tensor, targets_MK: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits_VMK, targets_MK)
        ctx.temperature = temperature
        out_VM = logits_VMK.new_empty(logits_VMK.shape[:2], dtype=_wide(logits_VMK))
        for rows in _chunks(logits_VMK):
            x_VmK = logits_VMK[:, rows].to(out_VM.dtype) / temperature
            target_mK = targets_MK[rows]
            out_VM[:, rows] = x_VmK.logsumexp(-1) * target_mK.sum(-1) - (x_VmK * target_mK).sum(-1)
        return out_VM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_VM: Tensor) -> tuple[Tensor, None, None]:
        logits_VMK, targets_MK = ctx.saved_tensors
        grad_VMK = torch.empty_like(logits_VMK)
        for rows in _chunks(logits_VMK):
            target_mK = targets_MK[rows]
            p_VmK = (logits_VMK[:, rows].to(grad_VM.dtype) / ctx.temperature).softmax(-1)
            p_VmK.mul_(target_mK.sum(-1, keepdim=True)).sub_(target_mK)
            grad_VMK[:, rows] = p_VmK.mul_(grad_VM[:, rows, None] / ctx.temperature)
        return grad_VMK, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(logits_VMK: Tensor) -> Iterator[slice]:
    views, rows, prototypes = logits_VMK.shape
    step = max(1, CHUNK_ELEMENTS // max(1, views * prototypes))
    return (slice(start, start + step) for start in range(0, rows, step))
