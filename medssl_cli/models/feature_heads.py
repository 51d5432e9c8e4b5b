"""Small heads on the vectors of a frozen backbone: linear, MLP, gated attention over slices, nearest neighbours.

All give logits (standardised values for regression), so that one calibration, one set of thresholds and one gradient
serve them alike.

Letters: B cases computed together, N slices of a case, M stored training rows, P width of a vector, H hidden width,
C outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HeadKind = Literal["logistic", "linear", "mlp", "attention_mil", "knn"]
Form = Literal["sigmoid", "softmax", "value"]
VOTE_TEMPERATURE = 0.07
"""Votes weigh exp(similarity / 0.07), as in DINO (Caron et al. 2021) and Wu et al. 2018."""
_EPSILON = 1e-7  # of a vote before its logit: probabilities stay the shares they are to seven digits


class VectorHead(nn.Module):
    """One vector to C outputs: LayerNorm, Linear, GELU, Dropout, Linear; or one Linear alone.

    Args:
        width: P.
        outputs: C.
        hidden_dim: H; 0 is the linear layer alone, without LayerNorm.
        dropout: Share of hidden units left out in training.
    """

    def __init__(self, width: int, outputs: int, hidden_dim: int = 256, dropout: float = 0.2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if hidden_dim else nn.Identity()
        self.hidden = nn.Linear(width, hidden_dim) if hidden_dim else None
        self.dropout = nn.Dropout(dropout if hidden_dim else 0.0)
        self.last = nn.Linear(hidden_dim or width, outputs)

    def forward(self, vectors_BP: Tensor) -> Tensor:
        """(B, P) -> (B, C)."""
        if self.hidden is None:
            return self.last(vectors_BP)
        return self.last(self.dropout(F.gelu(self.hidden(self.norm(vectors_BP)))))


class AttentionHead(nn.Module):
    """Slices of a case to C outputs: their mean, weighted by gated attention, then one linear layer.

    Weights are softmax over slices of w . (tanh(V h) * sigmoid(U h)); slices are normalised first (LayerNorm), so that
    the gates do not depend on the scale of the backbone.

    Args:
        width: Of a slice vector.
        outputs: C.
        hidden_dim: H, width of the gates.
        dropout: Share of the pooled vector left out in training.

    Source: Ilse, Tomczak and Welling 2018, equation 9.
    """

    def __init__(self, width: int, outputs: int, hidden_dim: int = 256, dropout: float = 0.2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.tanh_gate = nn.Linear(width, hidden_dim)
        self.sigmoid_gate = nn.Linear(width, hidden_dim)
        self.score = nn.Linear(hidden_dim, 1)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, outputs)

    def forward(self, bags_BNP: Tensor, present_BN: Tensor | None = None) -> Tensor:
        """(B, N, P), bool (B, N) -> (B, C); rows that are not present have no effect."""
        slices_BNP = self.norm(bags_BNP)
        weights_BN = self._weights(slices_BNP, present_BN)
        pooled_BP = (weights_BN[..., None] * slices_BNP).sum(1)
        return self.last(self.dropout(pooled_BP))

    def attention(self, bags_BNP: Tensor, present_BN: Tensor | None = None) -> Tensor:
        """(B, N, P) -> weights (B, N) that sum to 1 over the slices present."""
        return self._weights(self.norm(bags_BNP), present_BN)

    def _weights(self, slices_BNP: Tensor, present_BN: Tensor | None) -> Tensor:
        gates = torch.tanh(self.tanh_gate(slices_BNP)) * torch.sigmoid(self.sigmoid_gate(slices_BNP))
        scores_BN = self.score(gates)[..., 0]
        if present_BN is not None:
            scores_BN = scores_BN.masked_fill(~present_BN, -torch.inf)
        return scores_BN.softmax(1)


class NeighbourHead(nn.Module):
    """Votes of the nearest training rows by cosine; the rows travel in the weights.

    Args:
        rows_MP: Training vectors; kept at unit length.
        targets_MC: What each row votes for, one column an output: 0 or 1 (one-hot for exclusive classes), or values.
            NaN: the row has no vote in this column.
        k: Neighbours that vote; all rows if there are fewer.
        form: What the votes become: ``sigmoid`` or ``softmax``, logits from which these functions give back the shares
            of the votes; ``value``, weighted means of values.
    """

    rows_MP: Tensor
    targets_MC: Tensor

    def __init__(self, rows_MP: Tensor, targets_MC: Tensor, k: int, form: Form) -> None:
        super().__init__()
        self.register_buffer("rows_MP", F.normalize(rows_MP.float(), dim=1))
        self.register_buffer("targets_MC", targets_MC.float())
        self.k, self.form = k, form

    def forward(self, vectors_BP: Tensor) -> Tensor:
        """(B, P) -> (B, C)."""
        similarity_BM = F.normalize(vectors_BP, dim=1) @ self.rows_MP.T
        columns = [self._votes(similarity_BM, column_M) for column_M in self.targets_MC.T]
        shares_BC = torch.stack(columns, 1)
        if self.form == "value":
            return shares_BC
        if self.form == "softmax":
            return torch.log(shares_BC + _EPSILON)
        return torch.log(shares_BC + _EPSILON) - torch.log1p(_EPSILON - shares_BC)

    def _votes(self, similarity_BM: Tensor, targets_M: Tensor) -> Tensor:
        """(B, M), (M,) -> (B,): weighted mean of the targets of the k nearest rows that have one."""
        known_M = ~targets_M.isnan()
        nearest_BK, index_BK = similarity_BM[:, known_M].topk(min(self.k, int(known_M.sum())), dim=1)
        weights_BK = ((nearest_BK - 1) / VOTE_TEMPERATURE).exp()
        return (weights_BK * targets_M[known_M][index_BK]).sum(1) / weights_BK.sum(1)


def build_head(
    kind: HeadKind, width: int, outputs: int, *, hidden_dim: int = 256, dropout: float = 0.2
) -> VectorHead | AttentionHead:
    """An untrained head by its name; ``knn`` is made of training rows instead.

    Args:
        kind: ``logistic`` and ``linear`` are one linear layer.
        width: P.
        outputs: C.
        hidden_dim: H of an MLP or of attention.
        dropout: Of an MLP or of attention.
    """
    if kind == "attention_mil":
        return AttentionHead(width, outputs, hidden_dim, dropout)
    if kind == "knn":
        raise ValueError("a head of nearest neighbours is made of its training rows")
    return VectorHead(width, outputs, hidden_dim if kind == "mlp" else 0, dropout)
