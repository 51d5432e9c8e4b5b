"""KoLeo: the spread regulariser that pushes each sample away from its nearest neighbour in the batch.

Source: Sablayrolles et al. 2019, "Spreading vectors for similarity search", on the Kozachenko-Leonenko estimate of
entropy; used on the student's cls tokens by Oquab et al. 2023 (DINOv2). Letters: B samples, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def koleo_loss(cls_BD: Tensor) -> Tensor:
    """Minus the mean log distance of each sample to its nearest neighbour on the unit sphere.

    Only samples of this process and of one view are compared, so two views of one image are never pushed apart.

    Args:
        cls_BD: (B, D) cls tokens of one view, before the head, any float dtype.

    Returns:
        float32 scalar; zero, with zero gradient, if there are fewer than two samples.
    """
    if cls_BD.shape[0] < 2:
        return (cls_BD.float() * 0).sum()
    with torch.autocast(cls_BD.device.type, enabled=False):
        # float32: in half precision 1e-8 is zero, and the log of the distance of two duplicates infinite
        unit_BD = F.normalize(cls_BD.float(), eps=EPS, dim=-1)
        neighbour_BD = unit_BD.index_select(0, _nearest(unit_BD))
        distance_B = F.pairwise_distance(unit_BD, neighbour_BD, p=2.0, eps=EPS)
        return -(distance_B + EPS).log().mean()


@torch.no_grad()
def _nearest(unit_BD: Tensor) -> Tensor:
    """(B, D) unit vectors -> (B,) index of the nearest other one."""
    cosine_BB = unit_BD @ unit_BD.T
    return cosine_BB.fill_diagonal_(-1).argmax(dim=1)
