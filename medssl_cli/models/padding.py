"""Pictures of any size for networks that need sides of a multiple: pad, and cut the answer back.

Letters: B samples, C channels, H W space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """Where a picture lies inside its padded version, in pixels.

    Args:
        top, left: Rows above and columns before it.
        height, width: Of the picture itself.
    """

    top: int
    left: int
    height: int
    width: int

    def crop(self, padded_BCHW: Tensor) -> Tensor:
        """The picture's own region of a map as large as the padded picture."""
        rows, columns = slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)
        return padded_BCHW[..., rows, columns]


def pad_to_multiple(images_BCHW: Tensor, multiple: int) -> tuple[Tensor, Frame]:
    """Mirror the border until both sides are multiples; the smaller half of the padding lies at the top and left.

    Where an axis is too short to be mirrored its edge is repeated instead. A fitting picture comes back as it is.
    """
    height, width = images_BCHW.shape[-2:]
    (top, bottom), (left, right) = _halves(height, multiple), _halves(width, multiple)
    if left or right:
        images_BCHW = F.pad(images_BCHW, (left, right, 0, 0), mode="reflect" if right < width else "replicate")
    if top or bottom:
        images_BCHW = F.pad(images_BCHW, (0, 0, top, bottom), mode="reflect" if bottom < height else "replicate")
    return images_BCHW, Frame(top, left, height, width)


def _halves(side: int, multiple: int) -> tuple[int, int]:
    missing = -side % multiple
    return missing // 2, missing - missing // 2
