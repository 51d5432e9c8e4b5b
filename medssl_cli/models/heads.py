"""The projection head of DINO and iBOT: features to prototype logits.

Letters: T rows (cls or patch tokens), D width of the backbone, K prototypes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS: dict[str, type[nn.Module]] = {"bn": nn.BatchNorm1d, "syncbn": nn.SyncBatchNorm, "ln": nn.LayerNorm}
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are a direction and a length: W = g * v / ||v||.

    Parameter names are those of the classic weight normalisation, ``weight_g`` (K, 1) and ``weight_v`` (K, D), so that
    published heads load. The gains start at 1.

    Args:
        in_features: D.
        out_features: K.
        train_gains: Train the gains; otherwise they stay what they are, and are saved and loaded all the same.

    Source: Salimans and Kingma 2016.
    """

    def __init__(self, in_features: int, out_features: int, *, train_gains: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=train_gains)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        bound = in_features**-0.5
        nn.init.uniform_(self.weight_v, -bound, bound)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, K)."""
        return F.linear(x_TD, F.normalize(self.weight_v, dim=1) * self.weight_g)


class DINOHead(nn.Module):
    """MLP to a bottleneck on the unit sphere, then cosines to the prototypes times their gains: (T, D) -> (T, K).

    Args:
        in_dim: Width D of the backbone.
        n_prototypes: K.
        hidden_dim: Width of the MLP.
        bottleneck_dim: Width in which the cosines are taken.
        n_layers: Linear layers of the MLP, at least 1.
        train_gains: Train the gains of the prototypes, as DINOv2 does; iBOT's ``norm_last_layer`` is the opposite.
        norm: After each hidden layer: none, bn, syncbn or ln.
        activation: gelu or relu.
        n_patch_prototypes: Prototypes of a last layer for patch tokens alone, behind the same MLP; None without one.

    Source: Caron et al. 2021 (DINO); Oquab et al. 2023, where the gains are trained; Zhou et al. 2022 (iBOT), where
    the patch tokens may have their own last layer.
    """

    def __init__(
        self,
        in_dim: int,
        n_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        n_layers: int = 3,
        *,
        train_gains: bool = True,
        norm: str = "none",
        activation: str = "gelu",
        n_patch_prototypes: int | None = None,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (n_layers - 1), bottleneck_dim]
        linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        layers: list[nn.Module] = [linears[0]]
        for linear in linears[1:]:
            between = [] if norm == "none" else [NORMS[norm](hidden_dim)]
            layers += [*between, ACTIVATIONS[activation](), linear]
        self.mlp = layers[0] if n_layers == 1 else nn.Sequential(*layers)
        self.last_layer = WeightNormLinear(bottleneck_dim, n_prototypes, train_gains=train_gains)
        self.last_layer2 = None  # iBOT's name
        if n_patch_prototypes is not None:
            self.last_layer2 = WeightNormLinear(bottleneck_dim, n_patch_prototypes, train_gains=train_gains)

    def forward(self, x_TD: Tensor, n_patches: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(T, D) -> logits (T, K) of the first last layer.

        With ``n_patches`` the last so many rows are patch tokens and go through their own last layer: the answer is
        (T - n_patches, K) and (n_patches, K of the patches), from one pass through the MLP.
        """
        x_TD = self.mlp(x_TD)
        eps = 1e-6 if x_TD.dtype in (torch.float16, torch.bfloat16) else 1e-12  # 1e-12 is 0 in half precision
        z_TD = F.normalize(x_TD, dim=-1, eps=eps)
        if n_patches is None:
            return self.last_layer(z_TD)
        if self.last_layer2 is None:
            raise ValueError("this head has no last layer for patch tokens: it was built without n_patch_prototypes")
        cls_TD, patches_TD = z_TD.tensor_split([len(z_TD) - n_patches])
        return self.last_layer(cls_TD), self.last_layer2(patches_TD)
