"""Losses on the pixels of a label map: Dice, cross-entropy, their sum, IoU, Tversky and focal.

All of them in float32 whatever the network computes in, and blind to pixels marked ``IGNORE_LABEL``: those reach
neither a sum nor a count, and have no gradient. One logit a pixel means one structure (sigmoid); several mean
background and structures (softmax). Letters: B samples, C outputs (logits), L classes including background, R rows that
a loss is taken of (samples, or one for the whole batch), K classes that count, H W space.

Sources: Dice: Milletari et al. 2016 (V-Net); Tversky: Salehi et al. 2017; focal: Lin et al. 2017; IoU: Rahman & Wang
2016.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.core.protocols import IGNORE_LABEL

SMOOTH = 1e-6
"""Added to both sides of every quotient of areas: two empty regions agree, and nothing is divided by 0."""

LossName = Literal["combined", "dice", "ce", "iou", "tversky", "focal"]


class SegmentationLossConfig(Config):
    """What is optimised on the pixels of a label map."""

    loss_type: LossName = "combined"
    """combined is dice_weight x Dice + ce_weight x cross-entropy; the others stand alone with weight 1."""
    dice_weight: NonNegativeFloat = 0.5
    """Weight of Dice in `combined`; 0 leaves it out."""
    ce_weight: NonNegativeFloat = 0.5
    """Weight of the cross-entropy in `combined`; 0 leaves it out."""
    pos_weight: PositiveFloat = 1.0
    """Factor on the cross-entropy of the structures' pixels, in `ce` and `combined`; 1 treats all pixels alike."""
    fn_weight: NonNegativeFloat = 0.7
    """Weight of missed pixels (false negatives) in `tversky`."""
    fp_weight: NonNegativeFloat = 0.3
    """Weight of wrongly marked pixels (false positives) in `tversky`."""
    focal_alpha: PositiveFloat = 1.0
    """Factor on `focal`, for all classes alike: no balance of classes."""
    focal_gamma: NonNegativeFloat = 2.0
    """How fast `focal` forgets pixels that are already right; 0 is the cross-entropy."""
    reduction: Literal["sample", "batch"] = "sample"
    """sample: mean of the losses of the samples; batch: one loss of all pixels of the batch, as in CoCoSeg."""
    include_background: bool = False
    """Let the background count as one of the classes that Dice, IoU and Tversky are averaged over."""

    @model_validator(mode="after")
    def _fit_together(self) -> SegmentationLossConfig:
        faults = list(self._faults())
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _faults(self) -> Iterator[str]:
        """What does not go together; a configuration with more keys adds its own."""
        if self.loss_type == "combined" and not self.dice_weight + self.ce_weight:
            yield "dice_weight and ce_weight are both 0: there is nothing to learn"
        if self.loss_type == "tversky" and not self.fn_weight + self.fp_weight:
            yield "fn_weight and fp_weight are both 0: there is nothing to learn"


class Areas(NamedTuple):
    """Soft areas in pixels, each (R, K): of the overlap, the prediction and the reference."""

    overlap_RK: Tensor
    predicted_RK: Tensor
    reference_RK: Tensor


class SegmentationLoss(nn.Module):
    """Logits and a label map to weighted scalar terms.

    A class that is absent from prediction and reference has loss 0, one that is absent from the reference alone nearly
    1. Samples without any pixel that counts are left out; a batch of nothing else has loss 0 and gradients 0.

    Args:
        config: Which loss, and its weights.
        outputs: C; 1 for one structure with a sigmoid, else background and structures with a softmax.

    Raises:
        ValueError: No outputs.
    """

    def __init__(self, config: SegmentationLossConfig, outputs: int) -> None:
        super().__init__()
        if outputs < 1:
            raise ValueError(f"outputs is {outputs}, at least 1 is needed")
        self.config, self.outputs = config, outputs

    @property
    def classes(self) -> int:
        """L: background and structures."""
        return max(self.outputs, 2)

    def forward(self, logits: Tensor | Sequence[Tensor], label_map_BHW: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) and (B, H, W) -> weighted scalar terms; their sum is the loss.

        Args:
            logits: Of any float dtype. Several are the levels of deep supervision, finest first: level i counts
                1 / 2**i, all together 1, and is compared with the label map at its own size.
            label_map_BHW: Class indices below L, or ``IGNORE_LABEL``.

        Returns:
            ``dice`` and ``ce`` of ``combined``, else one term by the name of the loss; float32 (float64 of float64).

        Raises:
            ValueError: The shapes do not fit.
        """
        levels = [logits] if isinstance(logits, Tensor) else list(logits)
        total = sum(0.5**level for level in range(len(levels)))
        terms: dict[str, Tensor] = {}
        for level, logits_BCHW in enumerate(levels):
            for name, value in self._terms_of(logits_BCHW, at_size(label_map_BHW, logits_BCHW.shape[-2:])).items():
                weighted = value * (0.5**level / total)
                terms[name] = terms[name] + weighted if name in terms else weighted
        return terms

    def _terms_of(self, logits_BCHW: Tensor, label_map_BHW: Tensor) -> dict[str, Tensor]:
        """Terms of one level, in full precision."""
        self._check(logits_BCHW, label_map_BHW)
        with torch.autocast(logits_BCHW.device.type, enabled=False):
            if logits_BCHW.dtype != torch.float64:
                logits_BCHW = logits_BCHW.float()  # a sum over 262,144 pixels ends at 2048 in half precision
            counted_BHW = label_map_BHW != IGNORE_LABEL
            classes_BHW = label_map_BHW.masked_fill(~counted_BHW, 0)
            # ignored logits may be anything, even infinite: 0 in their place has no gradient either
            logits_BCHW = logits_BCHW.masked_fill(~counted_BHW[:, None], 0.0)
            truth_BLHW = _one_hot(classes_BHW, self.classes)
            kind, config = self.config.loss_type, self.config
            if kind in ("ce", "focal"):
                return {kind: self._per_pixel(kind, logits_BCHW, truth_BLHW, counted_BHW)}
            if kind != "combined":
                return {kind: self._of_areas(kind, logits_BCHW, truth_BLHW, counted_BHW)}
            terms: dict[str, Tensor] = {}
            if config.dice_weight:
                terms["dice"] = config.dice_weight * self._of_areas("dice", logits_BCHW, truth_BLHW, counted_BHW)
            if config.ce_weight:
                terms["ce"] = config.ce_weight * self._per_pixel("ce", logits_BCHW, truth_BLHW, counted_BHW)
            return terms

    def _check(self, logits_BCHW: Tensor, label_map_BHW: Tensor) -> None:
        expected = (len(label_map_BHW), self.outputs, *label_map_BHW.shape[1:])
        if label_map_BHW.ndim != 3 or tuple(logits_BCHW.shape) != expected:
            raise ValueError(
                f"logits {tuple(logits_BCHW.shape)} do not fit the label map {tuple(label_map_BHW.shape)} "
                f"and {self.outputs} outputs"
            )

    # --- losses of regions ---

    def _of_areas(self, kind: str, logits_BCHW: Tensor, truth_BLHW: Tensor, counted_BHW: Tensor) -> Tensor:
        """Dice, IoU or Tversky, averaged over the classes and then over the rows."""
        first = 0 if self.config.include_background else 1
        probability_BKHW = _probabilities(logits_BCHW, first) * counted_BHW[:, None]
        truth_BKHW = (truth_BLHW[:, first:] & counted_BHW[:, None]).to(probability_BKHW.dtype)
        areas = Areas((probability_BKHW * truth_BKHW).sum((2, 3)), probability_BKHW.sum((2, 3)), truth_BKHW.sum((2, 3)))
        if self.config.reduction == "batch":
            areas = Areas(*(area_BK.sum(0, keepdim=True) for area_BK in areas))
        loss_R = (1 - self._agreement(kind, areas)).mean(1)
        counts_R = self._rows(counted_BHW.sum((1, 2)))
        return _mean_of_counted(loss_R, counts_R)

    def _agreement(self, kind: str, areas: Areas) -> Tensor:
        """(R, K), 1 where prediction and reference are one."""
        overlap, predicted, reference = areas
        if kind == "dice":
            return (2 * overlap + SMOOTH) / (predicted + reference + SMOOTH)
        if kind == "iou":
            return (overlap + SMOOTH) / (predicted + reference - overlap + SMOOTH)
        missed, wrong = reference - overlap, predicted - overlap
        cost = self.config.fn_weight * missed + self.config.fp_weight * wrong
        return (overlap + SMOOTH) / (overlap + cost + SMOOTH)

    # --- losses of pixels ---

    def _per_pixel(self, kind: str, logits_BCHW: Tensor, truth_BLHW: Tensor, counted_BHW: Tensor) -> Tensor:
        """Cross-entropy or focal loss, averaged over the pixels of each row and then over the rows."""
        right_BHW, wrong_BHW = _log_probabilities(logits_BCHW, truth_BLHW)
        if kind == "focal":
            # (1 - p_t)^gamma as the exponential of its logarithm: exact near p_t = 1, with a gradient for any gamma
            loss_BHW = -self.config.focal_alpha * (self.config.focal_gamma * wrong_BHW).exp() * right_BHW
        elif self.config.pos_weight != 1:
            loss_BHW = -right_BHW * torch.where(truth_BLHW[:, 0], 1.0, self.config.pos_weight)
        else:
            loss_BHW = -right_BHW
        sum_R = self._rows((loss_BHW * counted_BHW).sum((1, 2)))
        counts_R = self._rows(counted_BHW.sum((1, 2)))
        return _mean_of_counted(sum_R / counts_R.clamp_min(1), counts_R)

    def _rows(self, values_B: Tensor) -> Tensor:
        return values_B.sum(0, keepdim=True) if self.config.reduction == "batch" else values_B


def at_size(label_map_BHW: Tensor, size: Sequence[int]) -> Tensor:
    """The label map at another (height, width): each new pixel takes the class that lies under its centre."""
    if tuple(size) == tuple(label_map_BHW.shape[-2:]):
        return label_map_BHW
    rows_h, columns_w = (
        # whole numbers throughout, for a rounded centre would choose another pixel
        (2 * torch.arange(new, device=label_map_BHW.device) + 1) * old // (2 * new)
        for old, new in zip(label_map_BHW.shape[-2:], size, strict=True)
    )
    return label_map_BHW[:, rows_h[:, None], columns_w[None, :]]


def _one_hot(classes_BHW: Tensor, classes: int) -> Tensor:
    """(B, H, W) -> (B, L, H, W) bool; a class index that is not below L is refused where it is looked up."""
    table_LL = torch.eye(classes, dtype=torch.bool, device=classes_BHW.device)
    truth_LN = table_LL.index_select(1, classes_BHW.flatten())
    return truth_LN.unflatten(1, classes_BHW.shape).transpose(0, 1)


def _probabilities(logits_BCHW: Tensor, first: int) -> Tensor:
    """(B, C, H, W) -> (B, K, H, W): of the classes from ``first`` on; 0 is the background."""
    if logits_BCHW.shape[1] > 1:
        return logits_BCHW.softmax(1)[:, first:]
    structure_B1HW = logits_BCHW.sigmoid()
    return structure_B1HW if first else torch.cat([(-logits_BCHW).sigmoid(), structure_B1HW], 1)


def _log_probabilities(logits_BCHW: Tensor, truth_BLHW: Tensor) -> tuple[Tensor, Tensor]:
    """ln p_t and ln (1 - p_t) of the true class of each pixel, both finite for any finite logits; each (B, H, W)."""
    if logits_BCHW.shape[1] == 1:
        signed_BHW = torch.where(truth_BLHW[:, 1], logits_BCHW[:, 0], -logits_BCHW[:, 0])
        return F.logsigmoid(signed_BHW), F.logsigmoid(-signed_BHW)
    log_BLHW = logits_BCHW.log_softmax(1)
    return (log_BLHW * truth_BLHW).sum(1), log_BLHW.masked_fill(truth_BLHW, -torch.inf).logsumexp(1)


def _mean_of_counted(loss_R: Tensor, counts_R: Tensor) -> Tensor:
    """Mean of the rows in which a pixel counts; 0 if there are none."""
    counted_R = counts_R > 0
    return (loss_R * counted_R).sum() / counted_R.sum().clamp_min(1)
