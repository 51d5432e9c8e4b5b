"""Mean and standard deviation of images as training scales them, one case at a time: sums travel, images do not.

Letters: C channels, S sequences, Z Y X voxels, N slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medssl_cli.core.case import Case
from medssl_cli.core.volume import AXIAL
from medssl_cli.data.preprocess import PreprocessConfig, prepare_case, scale_to_unit, sequence_limits, to_picture


@dataclass(frozen=True)
class Moments:
    """Sums over the pixels of some channels; those of two sets are added.

    Args:
        count: Pixels of one channel.
        sums_C: Sum of each channel, float64.
        squares_C: Sum of squares of each channel, float64.
    """

    count: int
    sums_C: np.ndarray
    squares_C: np.ndarray

    @classmethod
    def of(cls, values_CN: np.ndarray) -> Moments:
        """Of values in [0, 1], (C, pixels)."""
        wide = values_CN.astype(np.float64)
        return cls(wide.shape[1], wide.sum(axis=1), np.square(wide).sum(axis=1))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sums_C + other.sums_C, self.squares_C + other.squares_C)

    def repeated(self, channels: int) -> Moments:
        """A grey picture as so many equal channels."""
        return Moments(self.count, np.repeat(self.sums_C, channels), np.repeat(self.squares_C, channels))

    @property
    def mean_C(self) -> np.ndarray:
        """Mean of each channel."""
        return self.sums_C / self.count

    @property
    def std_C(self) -> np.ndarray:
        """Standard deviation of each channel over all pixels."""
        # the values lie in [0, 1]: in float64 the difference keeps ten digits even for millions of pictures
        return np.sqrt(np.maximum(self.squares_C / self.count - np.square(self.mean_C), 0.0))


def picture_moments(image_CHW: np.ndarray, config: PreprocessConfig) -> Moments:
    """Of one picture, reduced and scaled as it is stored for training."""
    picture = to_picture(image_CHW, config)
    channels = len(picture.image_CHW)
    scaled = scale_to_unit(picture.image_CHW, np.full(channels, picture.low), np.full(channels, picture.high))
    return Moments.of(scaled.reshape(channels, -1))


def volume_moments(
    case: Case,
    sequences: tuple[str, ...],
    config: PreprocessConfig,
    windows_hu: Sequence[tuple[float, float]] = (),
) -> dict[str, Moments]:
    """Of the axial slices that training draws from, by sequence, or by number of the window of the only sequence.

    Slices without content are left out, and so are sequences that the case lacks.

    Raises:
        DataError: The case cannot be prepared.
    """
    prepared = prepare_case(case, sequences, config)
    found = {}
    for s, name in enumerate(sequences):
        if prepared.available_S[s]:
            volume = prepared.images_SZYX[s]
            limits_N2 = np.stack(sequence_limits(name, volume, AXIAL, config), axis=1)
            filled_N = limits_N2[:, 1] > limits_N2[:, 0]
            if windows_hu:
                for number, limits in enumerate(windows_hu):
                    found[str(number)] = _slices(volume[filled_N], np.tile(limits, (int(filled_N.sum()), 1)))
            else:
                found[name] = _slices(volume[filled_N], limits_N2[filled_N])
    return found


def _slices(volume_NYX: np.ndarray, limits_N2: np.ndarray) -> Moments:
    """One channel; slice after slice, so that memory holds one."""
    none = Moments(0, np.zeros(1), np.zeros(1))
    return sum(
        (
            Moments.of(scale_to_unit(plane[None], limits[:1], limits[1:]).reshape(1, -1))
            for plane, limits in zip(volume_NYX, limits_N2, strict=True)
        ),
        none,
    )
