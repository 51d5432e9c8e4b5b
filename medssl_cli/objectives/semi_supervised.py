"""A classification loss beside self-distillation, for the samples that have a label (as in MM-DINOv2, 2025).

Differs from the published form, in which the prototypes themselves are the classes: a linear head of its own reads the
student's cls tokens, and the weights of the classes come from the whole training set instead of the batch, where a
class that is absent would weigh almost anything. Letters: B samples, V crops (all views, view-major), D width,
C classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.core.run import seed_for


class SemiSupervisedConfig(Config):
    """Classification of the labelled samples while pretraining; off unless it has a weight."""

    loss_weight: NonNegativeFloat = 0.0
    """Weight of the classification loss; 0 turns it off."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    temperature: PositiveFloat = 0.1
    """Divides the class logits."""
    target: str = ""
    """Column of the labels that is to be told."""
    labels: str = ""
    """CSV of labels; the first column names the case."""


class SemiSupervised(nn.Module):
    """Weighted classification loss on the cls tokens of all crops, before any projection head.

    With label y of sample b the loss is w_y times the cross-entropy of softmax(logits / temperature) against the
    smoothed label, averaged over the crops; over the batch it is the mean of the labelled samples times their share,
    that is their sum over B. The head starts at zero: the first loss is share x ln C, and no class is preferred.

    Args:
        embed_dim: D.
        class_counts: Labelled samples of each class in the whole training set, each at least 1.
        config: Weight, smoothing and temperature.

    Raises:
        ValueError: Fewer than two classes, or one without samples.
    """

    weight_C: Tensor

    def __init__(self, embed_dim: int, class_counts: Sequence[int], config: SemiSupervisedConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(embed_dim, len(class_counts))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("weight_C", class_weights(class_counts), persistent=False)  # a function of the data

    def forward(self, cls_VD: Tensor, labels_B: Tensor | None) -> Tensor:
        """Weighted float32 scalar, 0 with zero gradients where nothing is labelled.

        Args:
            cls_VD: (V, D), view-major; V is a multiple of B.
            labels_B: int64, -1 where there is no label; None: no label in this batch.
        """
        with torch.autocast(cls_VD.device.type, enabled=False):
            logits_VC = self.linear(cls_VD.to(self.linear.weight.dtype)).float() / self.config.temperature
        if labels_B is None:
            return (logits_VC * 0).sum()  # every parameter takes part in the backward pass
        samples = len(labels_B)
        if len(logits_VC) % samples:
            raise ValueError(f"{len(logits_VC)} crops do not fit {samples} labels")
        label_V = labels_B.clamp_min(0).repeat(len(logits_VC) // samples)
        weight_V = torch.where(labels_B >= 0, self.weight_C[labels_B.clamp_min(0)], 0.0).repeat(
            len(logits_VC) // samples
        )
        loss_V = F.cross_entropy(logits_VC, label_V, reduction="none", label_smoothing=self.config.label_smoothing)
        return self.config.loss_weight * (loss_V * weight_V).sum() / len(logits_VC)


def class_weights(class_counts: Sequence[int]) -> Tensor:
    """(C,) float32: ln(n / count) of each class, divided so that the mean over the n labelled samples is 1.

    That divisor is the entropy of the classes, so the weights are finite whenever two classes have samples.

    Raises:
        ValueError: Fewer than two classes, or one without samples.
    """
    count_C = torch.tensor(list(class_counts), dtype=torch.float64)
    if len(count_C) < 2 or bool((count_C < 1).any()):
        raise ValueError(f"two classes are needed, each with a sample; the counts are {list(class_counts)}")
    share_C = count_C / count_C.sum()
    rarity_C = -share_C.log()
    return (rarity_C / (share_C * rarity_C).sum()).float()


def keep_labels(labels: Mapping[str, str], share: float, seed: int) -> dict[str, str]:
    """The labels of a random share of the cases of each class, at least one of each.

    Args:
        labels: Class of each case id; the order does not matter.
        share: 0 .. 1; of n cases of a class max(round(share x n), 1) are kept, halves rounded to the even number.
        seed: Of the run.

    Returns:
        The kept labels, sorted by case id. A larger share keeps what a smaller one kept.
    """
    cases: dict[str, list[str]] = defaultdict(list)
    for case_id, label in sorted(labels.items()):
        cases[label].append(case_id)
    kept: dict[str, str] = {}
    for label, ids in cases.items():
        order = np.random.default_rng(seed_for(seed, "labels", label)).permutation(len(ids))
        kept |= {ids[i]: label for i in order[: max(round(share * len(ids)), 1)]}
    return dict(sorted(kept.items()))
