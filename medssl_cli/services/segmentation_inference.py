"""Slices of a case through a segmentation network, and the label map on the grid that the case came with.

The one path of inference: ``infer``, ``eval`` and the validation of a training all go through ``segment_planes``.
What stays of a volume besides itself is one byte a voxel, its label map.

Letters: N slices, S sequences or colours, C outputs, H W pixels of a slice, Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from medssl_cli.core.case import Case
from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import AXIAL, Volume, affine_spacing
from medssl_cli.data.images import is_image, read_image
from medssl_cli.data.preprocess import (
    Prepared,
    prepare_case,
    prepare_picture,
    scale_to_unit,
    sequence_limits,
)
from medssl_cli.services.slice_pipeline import InferSegmentConfig as InferSegmentConfig
from medssl_cli.services.slice_pipeline import Progress, resized
from medssl_cli.services.slice_pipeline import neighbours as neighbours
from medssl_cli.services.slice_pipeline import segment_pictures as segment_pictures
from medssl_cli.services.slice_pipeline import segment_planes as segment_planes

if TYPE_CHECKING:
    from medssl_cli.services.segmenter import Segmenter

DEFAULT_THRESHOLD = 0.5
"""Probability from which on a pixel belongs to the one structure, where no validation has found a better one."""


def decide(probability_CHW: np.ndarray, threshold: float) -> np.ndarray:
    """(C, H, W) probabilities -> (H, W) uint8 class indices.

    One structure: where its probability is at least ``threshold``. Several classes: the most probable one, of equal
    ones the first; the threshold does not count.
    """
    if len(probability_CHW) == 1:
        return (probability_CHW[0] >= threshold).astype(np.uint8)
    return probability_CHW.argmax(axis=0).astype(np.uint8)


# --- a case ----------------------------------------------------------------------------------------------------------


class CaseSlices:
    """The slices of a prepared volume, or one picture, with the intensity limits of training found slice by slice.

    Args:
        stored_SNHW: Intensities as prepared; zeros where a sequence is absent.
        spacing: Pixel size (y, x) in mm; 1, 1 for a picture.
        available_S: Which channels exist.
        limits: Index of a slice to the values (S,), (S,) that become 0 and 1.
        channels: Channels of a slice before the network; one stored channel is repeated to as many.
        prepared: The way back to the file's grid; None for a picture.
    """

    def __init__(
        self,
        stored_SNHW: np.ndarray,
        spacing: tuple[float, float],
        available_S: np.ndarray,
        limits: Callable[[int], tuple[np.ndarray, np.ndarray]],
        *,
        channels: int,
        prepared: Prepared | None,
    ) -> None:
        self.stored_SNHW, self.spacing, self.available_S = stored_SNHW, spacing, available_S
        self._limits, self._channels, self.prepared = limits, channels, prepared

    def __len__(self) -> int:
        return int(self.stored_SNHW.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        height, width = self.stored_SNHW.shape[-2:]
        return int(height), int(width)

    def scaled(self, index: int) -> np.ndarray:
        """(S, H, W) float32 in [0, 1], as in training."""
        low_S, high_S = self._limits(index)
        stored_SHW = self.stored_SNHW[:, index]
        if len(stored_SHW) == 1 < len(low_S):  # windows of one CT
            stored_SHW = np.repeat(stored_SHW, len(low_S), axis=0)
        scaled_SHW = scale_to_unit(stored_SHW, low_S, high_S)
        if len(scaled_SHW) == 1 < self._channels:  # a grey picture before a network for colours
            scaled_SHW = np.repeat(scaled_SHW, self._channels, axis=0)
        return scaled_SHW


def read_slices(
    case: Case, segmenter: Segmenter, windows: Mapping[str, tuple[float, float]] | None = None
) -> CaseSlices:
    """Read a case and bring it to the grid and the intensity limits of training.

    Args:
        case: Its files.
        segmenter: Whose preparation counts.
        windows: The values that become 0 and 1 in every sequence; None: as the preparation says.

    Raises:
        DataError: Missing, damaged, constant, non-finite or non-overlapping images; names case and file.
    """
    if all(is_image(sequence.path) for sequence in case.sequences.values()):
        return _picture_slices(case, segmenter)
    prepared = prepare_case(case, segmenter.sequences, segmenter.preprocess)
    spacing = affine_spacing(prepared.affine)
    available_S = np.ones(segmenter.channels, dtype=bool) if segmenter.plain else prepared.available_S
    return CaseSlices(
        prepared.images_SZYX,
        (spacing.y, spacing.x),
        available_S,
        lambda index: _volume_limits(prepared.images_SZYX[:, index], segmenter, windows),
        channels=segmenter.channels,
        prepared=prepared,
    )


def _volume_limits(
    stored_SHW: np.ndarray, segmenter: Segmenter, windows: Mapping[str, tuple[float, float]] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The values that become 0 and 1 in one slice: by its sequences, or by windows of one CT."""
    if windows is not None:
        low, high = zip(*(windows[name] for name in segmenter.sequences), strict=True)
        return np.array(low), np.array(high)
    if segmenter.windows_hu:
        low, high = zip(*((low, high) for _, low, high in segmenter.windows_hu), strict=True)
        return np.array(low), np.array(high)
    limits = [
        sequence_limits(name, stored_HW[None], AXIAL, segmenter.preprocess)
        for name, stored_HW in zip(segmenter.sequences, stored_SHW, strict=True)
    ]
    return np.array([low[0] for low, _ in limits]), np.array([high[0] for _, high in limits])


def _picture_slices(case: Case, segmenter: Segmenter) -> CaseSlices:
    picture = prepare_picture(case, segmenter.preprocess)
    stored, takes = len(picture.image_CHW), segmenter.channels
    if stored not in (1, takes):
        raise DataError(
            "The picture does not have the channels that the model takes.",
            where=f"case {case.case_id}: {stored} channels, the model takes {takes} or 1",
            fix="convert the picture to grey values, or use a model for colour pictures",
            code="picture_channels",
        )
    low_S, high_S = np.full(stored, picture.low), np.full(stored, picture.high)
    return CaseSlices(
        picture.image_CHW[:, None],
        (1.0, 1.0),
        np.ones(takes, dtype=bool),
        lambda _: (low_S, high_S),
        channels=takes,
        prepared=None,
    )


@dataclass(frozen=True)
class SegmentedCase:
    """What a network made of one case.

    Args:
        case: Its files; those of a DICOM folder are the converted ones, each with its sidecar.
        slices: As the network saw them.
        labels_NHW: uint8 class indices on the grid of ``slices``.
        label_map: The same on the exact grid of the input; of a picture (1, H, W) of its own size.
        classes: Names by class index; the first is the background.
        threshold: Of the one structure; None where the largest of several probabilities decides.
        probabilities: (C, Z, Y, X) float32 on the grid of ``label_map``, on the disk; None if they were not asked for.
    """

    case: Case
    slices: CaseSlices
    labels_NHW: np.ndarray
    label_map: Volume
    classes: tuple[str, ...]
    threshold: float | None
    probabilities: np.ndarray | None = None

    @property
    def is_picture(self) -> bool:
        """It has pixels and no millimetres."""
        return self.slices.prepared is None

    @property
    def voxels(self) -> dict[str, int]:
        """Voxels, or pixels, of every structure in ``label_map``."""
        counts = np.zeros(256, np.int64)
        for plane in self.label_map.array:
            counts += np.bincount(plane.ravel(), minlength=256)
        return {name: int(counts[index]) for index, name in enumerate(self.classes) if index}

    @property
    def volumes_ml(self) -> dict[str, float] | None:
        """Volume of every structure in ml, voxels times their size; None for a picture."""
        if self.is_picture:
            return None
        voxel_ml = abs(float(np.linalg.det(self.label_map.affine[:3, :3]))) / 1000
        return {name: count * voxel_ml for name, count in self.voxels.items()}


def threshold_of(segmenter: Segmenter, asked: float | None) -> tuple[float | None, str | None]:
    """(threshold, where it comes from): as asked, else the one that validation found; (None, None) for classes."""
    if segmenter.outputs > 1:
        return None, None
    if asked is not None:
        return asked, "--threshold"
    if segmenter.threshold is not None:
        return segmenter.threshold, "validation data of the training"
    return DEFAULT_THRESHOLD, "default: the training found none"


def segment_case(
    segmenter: Segmenter,
    case: Case,
    config: InferSegmentConfig,
    *,
    threshold: float | None = None,
    windows: Mapping[str, tuple[float, float]] | None = None,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> SegmentedCase:
    """Segment one case, a volume or a picture.

    Memory: the prepared volumes, one byte a voxel for the label map (two where its axes have to be turned back or it
    has to be interpolated), and the slices in flight of ``segment_planes``. Probabilities go to the disk.

    Args:
        segmenter: The network.
        case: Its files.
        config: How.
        threshold: For the one structure; None takes that of the training.
        windows: As for ``read_slices``.
        scratch: Folder for the probabilities, 4 bytes a voxel and output; needed with ``save_probabilities``.
        progress: Told (slices done, slices).

    Raises:
        DataError: As ``read_slices``.
        NonFiniteError: The network gave NaN or infinity.
    """
    limit, _ = threshold_of(segmenter, threshold)
    slices = read_slices(case, segmenter, windows)
    own = _own_shape(case, slices)
    labels_NHW = np.zeros((len(slices), *slices.size), np.uint8)
    picture_HW: np.ndarray | None = None
    kept: np.memmap | None = None
    for index, probability_CHW in enumerate(segment_planes(segmenter, slices, config, progress=progress)):
        labels_NHW[index] = decide(probability_CHW, DEFAULT_THRESHOLD if limit is None else limit)
        if slices.prepared is None:
            probability_CHW = resized(torch.from_numpy(probability_CHW), own[1:]).numpy()
            picture_HW = decide(probability_CHW, DEFAULT_THRESHOLD if limit is None else limit)
        if config.save_probabilities:
            if kept is None:
                shape = (len(probability_CHW), len(slices), *probability_CHW.shape[1:])
                kept = _on_disk(scratch, "prepared", shape)
            kept[:, index] = probability_CHW
    label_map = _restored(labels_NHW, slices) if picture_HW is None else Volume(picture_HW[None], np.eye(4))
    return SegmentedCase(
        case=case,
        slices=slices,
        labels_NHW=labels_NHW,
        label_map=label_map,
        classes=segmenter.classes,
        threshold=limit,
        probabilities=None if kept is None else _probabilities_restored(kept, slices, scratch),
    )


def _own_shape(case: Case, slices: CaseSlices) -> tuple[int, int, int]:
    """(Z, Y, X) of the input file."""
    if slices.prepared is not None:
        return slices.prepared.restore.source.shape
    height, width = read_image(next(iter(case.sequences.values())).path).shape[-2:]
    return 1, int(height), int(width)


def _restored(labels_NHW: np.ndarray, slices: CaseSlices) -> Volume:
    assert slices.prepared is not None
    return slices.prepared.restore.restore(labels_NHW, nearest=True)


def _on_disk(scratch: Path | None, name: str, shape: tuple[int, ...]) -> np.memmap:
    if scratch is None:
        raise ValueError("probabilities are kept on the disk: segment_case needs a scratch folder")
    scratch.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(scratch / f"probabilities_{name}.npy", mode="w+", dtype=np.float32, shape=shape)


def _probabilities_restored(kept: np.memmap, slices: CaseSlices, scratch: Path | None) -> np.ndarray:
    """On the grid of the input, linear between voxels where it was resampled; one output is in memory at a time."""
    if slices.prepared is None:
        return kept
    restore = slices.prepared.restore
    moved = _on_disk(scratch, "restored", (len(kept), *restore.source.shape))
    for plane_ZYX, prepared_ZYX in zip(moved, kept, strict=True):
        plane_ZYX[...] = restore.restore(prepared_ZYX, nearest=False).array
    Path(str(kept.filename)).unlink()
    return moved
