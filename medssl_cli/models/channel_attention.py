"""Channel attention: every channel is completed by the channels that are least like it.

Letters: B samples, C channels, H W space, N = H * W places.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

CamScale = Literal["mean", "none"]


class ChannelAttention(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): ``gamma * (A V) + V`` with ``A = softmax(rowmax(E) - E)`` and ``E = Q K^T``.

    Q, K and V are 3 x 3 convolutions of the input; the residual is V, not the input. Energies, softmax and the weighted
    sum are computed in float32 under autocast too, because a sum over 65,536 places overflows half precision.

    Args:
        channels: C.
        cam_scale: mean divides the energies by N, so that their size does not depend on that of the picture; none
            leaves them as they are, which saturates the softmax on large pictures.

    Source: the channel attention of CoCoNet (Liu et al. 2024), after Fu et al. 2019 (DANet).
    """

    def __init__(self, channels: int, cam_scale: CamScale = "mean") -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 3, padding=1)
        self.key = nn.Conv2d(channels, channels, 3, padding=1)
        self.value = nn.Conv2d(channels, channels, 3, padding=1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.cam_scale = cam_scale

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in the number type of the convolutions."""
        query_BCN, key_BCN, value_BCN = (part(x_BCHW).flatten(2) for part in (self.query, self.key, self.value))
        with torch.autocast(x_BCHW.device.type, enabled=False):
            out_BCN = self._attend(query_BCN.float(), key_BCN.float(), value_BCN.float())
        return out_BCN.to(value_BCN.dtype).view_as(x_BCHW)

    def _attend(self, query_BCN: Tensor, key_BCN: Tensor, value_BCN: Tensor) -> Tensor:
        energy_BCC = torch.bmm(query_BCN, key_BCN.transpose(1, 2))
        if self.cam_scale == "mean":
            energy_BCC = energy_BCC / query_BCN.shape[-1]
        # softmax does not see what is added to a row: softmax(rowmax(E) - E) = softmax(-E)
        attention_BCC = (-energy_BCC).softmax(-1)
        return torch.addcmul(value_BCN, self.gamma.float(), torch.bmm(attention_BCC, value_BCN))
