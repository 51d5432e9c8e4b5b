"""The planes of the cases with the lowest Dice, kept while cases stream by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import affine_orientation
from medssl_cli.data.images import is_image, read_image, read_volume, volume_stem
from medssl_cli.report.masks_plots import Outlines
from medssl_cli.services.evaluate_masks_cases import CaseScores, Grid


@dataclass(frozen=True)
class WorstCase:
    """One of the cases that are drawn.

    Args:
        facts: Its entry of ``worst_cases`` in ``metrics.json``.
        plane: What is drawn.
    """

    facts: dict[str, Any]
    plane: Outlines


class WorstCases:
    """At most ``most`` cases, those with the lowest Dice; of equal ones the first by name."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: list[tuple[float, str, WorstCase]] = []

    def add(
        self, scores: CaseScores, prediction: np.ndarray, reference: np.ndarray, grid: Grid, image: Path | None
    ) -> None:
        """Look at one case; its image is read only if it is among the worst so far.

        Args:
            scores: Its numbers.
            prediction, reference: Class index of each voxel, (Z, Y, X) or (H, W); 255 is ignored.
            grid: Of both.
            image: What the label maps were drawn on, or None.
        """
        dice = float(np.nanmean(scores.values["dice"])) if not np.isnan(scores.values["dice"]).all() else math.nan
        key = (dice, scores.case_id)
        if math.isnan(dice) or self.most < 1 or (len(self._kept) >= self.most and key >= self._kept[-1][:2]):
            return
        index, n_slices = _worst_plane(prediction, reference)
        plane = _plane(prediction, reference, index, grid, image)
        hd95 = scores.values["hd95"]
        facts = {
            "case_id": scores.case_id,
            "patient_id": scores.patient_id,
            "dice": dice,
            "loss": 1 - dice,
            "hd95": None if np.isnan(hd95).all() else float(np.nanmean(hd95)),
            "slice": index,
            "n_slices": n_slices,
        }
        self._kept = sorted([*self._kept, (dice, scores.case_id, WorstCase(facts, plane))], key=lambda e: e[:2])
        self._kept = self._kept[: self.most]

    @property
    def cases(self) -> list[WorstCase]:
        """The lowest Dice first."""
        return [case for _, _, case in self._kept]


def _worst_plane(prediction: np.ndarray, reference: np.ndarray) -> tuple[int | None, int]:
    """(slice with the most wrong voxels, slices); of none wrong the one with the largest structure."""
    if prediction.ndim == 2:
        return None, 1
    wrong = ((prediction != reference) & (reference != 255)).sum((1, 2))
    if not wrong.any():
        wrong = ((reference > 0) & (reference != 255)).sum((1, 2))
    return int(wrong.argmax()), len(prediction)


def _plane(
    prediction: np.ndarray, reference: np.ndarray, index: int | None, grid: Grid, image: Path | None
) -> Outlines:
    at = () if index is None else (index,)
    own, truth = prediction[at], reference[at]
    ignored = truth == 255
    flip = (False, False)
    if grid.affine is not None:
        codes = affine_orientation(grid.affine)
        flip = (codes[1] in "AS", codes[0] in "RP")
    return Outlines(
        None if image is None else _image_plane(image, index, grid),
        np.where(ignored, np.uint8(0), own),
        np.where(ignored, np.uint8(0), truth),
        (grid.spacing[-2], grid.spacing[-1]),
        flip,
    )


def _image_plane(path: Path, index: int | None, grid: Grid) -> np.ndarray | None:
    """The plane of an image on the same voxels; None where it is on others or cannot be read: the page does without."""
    try:
        if volume_stem(path) is None:
            picture = read_image(path) if is_image(path) else np.empty((0, 0, 0))
            array = picture.transpose(1, 2, 0) if len(picture) == 3 and picture.dtype == np.uint8 else picture[0]
            return array if array.shape[:2] == grid.shape else None
        volume = read_volume(path).array
    except DataError:
        return None
    if index is None or volume.shape != grid.shape:
        return None
    return np.asarray(volume[index], dtype=np.float32)
