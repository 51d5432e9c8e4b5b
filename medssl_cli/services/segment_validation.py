"""Validation of a semantic segmentation on whole cases, by the path of inference; one case in memory at a time.

The voxels of a patient's cases are added up before anything is divided, so that a patient with two visits counts once,
and scores are means over patients.

Letters: N slices, S sequences or colours, C outputs, L classes with the background, P patients, H W pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from medssl_cli.core.case import Case
from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.core.volume import AXIAL
from medssl_cli.data.datasets import HuWindow
from medssl_cli.data.images import write_image
from medssl_cli.data.label_maps import LabelSpec
from medssl_cli.data.labelled_volumes import read_labelled_picture, scaled_channels
from medssl_cli.data.preprocess import PreprocessConfig, scale_to_unit
from medssl_cli.data.store import Store
from medssl_cli.metrics.segmentation import class_counts, dice, iou
from medssl_cli.metrics.surface import boundary, hausdorff_95
from medssl_cli.metrics.sweep import ThresholdSweep
from medssl_cli.objectives.segmentation import SegmentationLoss
from medssl_cli.report.mask_overlay import draw_masks, overlay_strip
from medssl_cli.report.overlay import radiological, window
from medssl_cli.services.segmentation_inference import decide
from medssl_cli.services.segmenter import Segmenter
from medssl_cli.services.slice_pipeline import InferSegmentConfig, segment_planes

log = logging.getLogger(__name__)

MOST_OVERLAYS = 8
MOST_SURFACE = 200_000
"""Voxels of a surface up to which its distances are worth their time, some tenths of a second."""
CUT = 0.5
"""Probability from which on a voxel counts as predicted where no threshold is swept."""
SIDE = 256
"""Side of a drawn slice in pixels, about: smaller ones are enlarged by a whole number."""

DEFINITIONS = {
    "val_loss": "the training loss of whole slices as inference sees them, mean over slices with a pixel that counts",
    "val_dice": "Dice over the voxels of all cases of a patient at probability 0.5 (several classes: the likeliest), "
    "mean over the structures that reference or prediction holds (1 if neither holds any), then over patients",
    "val_iou": "as val_dice",
    "val_f1": "the same number as val_dice: of voxels, F1 is Dice",
    "val_hd95": "95th percentile of the distances between the two surfaces, in mm (pictures: pixels), mean over the "
    "structures of each case that reference and prediction both hold, then over cases; null without any. Left out are "
    "structures whose prediction has a surface of over 200,000 voxels, as of a network that has learned nothing yet",
    "val_best_dice": "one structure: the highest of the mean Dice over patients at thresholds from 0.20 to 0.60; only "
    "over the patients whose reference holds the structure, where there are any: for a network that predicts nothing "
    "all others would count 1",
    "val_best_threshold": "one structure: the threshold of val_best_dice",
    "score": "one structure: val_best_dice, at the threshold that the model is kept with; several: as val_dice, but "
    "only over the patients whose reference holds a structure, where there are any. Selects the best epoch, of equal "
    "ones the first stays",
}
"""For ``model.json``."""


class LabelledPlanes(Protocol):
    """The slices of one case, or its one picture, with their classes; read when asked for."""

    case_id: str
    patient_id: str
    spacing_mm: tuple[float, float, float]

    def __len__(self) -> int: ...

    @property
    def spacing(self) -> tuple[float, float]:
        """Pixel size (y, x) in mm."""
        ...

    @property
    def available_S(self) -> np.ndarray:
        """Which channels exist."""
        ...

    def scaled(self, index: int) -> np.ndarray:
        """(S, H, W) float32 in [0, 1]."""
        ...

    def classes(self, index: int) -> np.ndarray:
        """(H, W) uint8 class indices; ``IGNORE_LABEL`` counts nowhere."""
        ...

    def shown(self, image_HW: np.ndarray) -> np.ndarray:
        """A plane as people look at it."""
        ...


class StoredPlanes:
    """The axial slices of one case of a prepared store.

    Args:
        store: Of label maps.
        case: Position in it.
        patient_id: Whose.
        spec: Classes.
        windows_hu: Windows of the only sequence that become channels.
        colours: Channels that a slice of one channel is repeated to.
    """

    def __init__(
        self,
        store: Store,
        case: int,
        patient_id: str,
        spec: LabelSpec,
        *,
        windows_hu: Sequence[HuWindow] = (),
        colours: int = 0,
    ) -> None:
        self.store, self.case, self.spec, self.windows_hu, self.colours = store, case, spec, windows_hu, colours
        self.case_id, self.patient_id = store.case_id(case), patient_id
        facts = store.facts(case)
        self.spacing_mm = (facts.spacing.z, facts.spacing.y, facts.spacing.x)
        channels = len(windows_hu) or (colours if colours > 1 else len(store.sequences))
        self.available_S = facts.available_S.repeat(channels // len(facts.available_S))
        self._depth = facts.shape[AXIAL]

    def __len__(self) -> int:
        return self._depth

    @property
    def spacing(self) -> tuple[float, float]:
        """Pixel size (y, x) in mm."""
        return self.spacing_mm[1:]

    def scaled(self, index: int) -> np.ndarray:
        """(S, H, W) float32 in [0, 1]."""
        stored = self.store.read_slice(self.case, AXIAL, index, roi=False)
        return scaled_channels(stored, self.windows_hu, self.colours)

    def classes(self, index: int) -> np.ndarray:
        """(H, W) uint8 class indices."""
        return self.spec.classes_of(self.store.read_labels(self.case, AXIAL, index), self.case_id)

    def shown(self, image_HW: np.ndarray) -> np.ndarray:
        """As radiologists look at it."""
        return radiological(image_HW)


class PicturePlanes:
    """One picture with its label map, as one slice with pixels of 1 x 1.

    Args:
        case: With the label map as ``roi``.
        spec: Classes.
        preprocess: Size and intensity limits.
        colours: Channels; a grey picture is repeated to as many.
    """

    spacing_mm, spacing = (1.0, 1.0, 1.0), (1.0, 1.0)

    def __init__(self, case: Case, spec: LabelSpec, preprocess: PreprocessConfig, colours: int) -> None:
        self.case_id, self.patient_id = case.case_id, case.patient_id
        self.available_S = np.ones(colours, dtype=bool)
        self._picture = read_labelled_picture(case, spec, preprocess)
        self._colours = colours

    def __len__(self) -> int:
        return 1

    def scaled(self, index: int) -> np.ndarray:
        """(S, H, W) float32 in [0, 1]."""
        picture = self._picture
        count = len(picture.image_CHW)
        scaled = scale_to_unit(picture.image_CHW, np.full(count, picture.low), np.full(count, picture.high))
        return np.repeat(scaled, self._colours, axis=0) if count == 1 < self._colours else scaled

    def classes(self, index: int) -> np.ndarray:
        """(H, W) uint8 class indices."""
        return self._picture.labels_HW

    def shown(self, image_HW: np.ndarray) -> np.ndarray:
        """As it is."""
        return image_HW


class ValidationCases(Protocol):
    """The validation part, a case at a time."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> LabelledPlanes: ...


# --- the figures -----------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """What is known of the cases so far.

    Args:
        classes: L.
        sweep: Of one structure; None for several.
    """

    classes: int
    sweep: ThresholdSweep | None
    counts_of: dict[str, np.ndarray] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)

    def add_slice(self, patient: str, predicted_HW: np.ndarray, classes_HW: np.ndarray) -> None:
        found = class_counts(predicted_HW, classes_HW, self.classes)
        counts_3L = np.stack([found.tp, found.fp, found.fn])
        self.counts_of[patient] = self.counts_of.get(patient, 0) + counts_3L

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Dice and IoU of every patient and structure, (P, L - 1); NaN where neither side holds it."""
        tp, fp, fn = np.stack(list(self.counts_of.values()), axis=1)[..., 1:]
        held = tp + fp + fn > 0
        return np.where(held, dice(tp, fp, fn), np.nan), np.where(held, iou(tp, fp, fn), np.nan)

    def present(self) -> np.ndarray:
        """Whether the reference of each patient holds a structure, (P,)."""
        tp, _, fn = np.stack(list(self.counts_of.values()), axis=1)[..., 1:]
        return np.asarray((tp + fn > 0).any(1))


def validate_cases(
    network: nn.Module, segmenter: Segmenter, cases: ValidationCases, loss: SegmentationLoss, config: InferSegmentConfig
) -> dict[str, Any]:
    """The figures of ``DEFINITIONS`` for a network in evaluation mode, with ``threshold_results`` of one structure.

    Args:
        network: To be judged.
        segmenter: How it is shown a case; its own network does not count.
        cases: Whole validation cases.
        loss: Of the training.
        config: Of inference.

    Raises:
        NonFiniteError: The network gave NaN or infinity.
        DataError: A case cannot be read.
    """
    judged = replace(segmenter, network=network)
    sums = _Sums(len(segmenter.classes), ThresholdSweep(present_only=True) if segmenter.outputs == 1 else None)
    for index in range(len(cases)):
        _add_case(sums, judged, cases[index], loss, config)
    return _figures(sums, segmenter.classes)


def _add_case(
    sums: _Sums, segmenter: Segmenter, planes: LabelledPlanes, loss: SegmentationLoss, config: InferSegmentConfig
) -> None:
    maps: list[tuple[np.ndarray, np.ndarray]] = []
    for index, probability_CHW in enumerate(segment_planes(segmenter, planes, config)):
        classes_HW = planes.classes(index)
        predicted_HW = decide(probability_CHW, CUT)
        sums.add_slice(planes.patient_id, predicted_HW, classes_HW)
        if sums.sweep is not None:
            sums.sweep.add(probability_CHW[0], classes_HW, planes.patient_id)
        if (classes_HW != IGNORE_LABEL).any():
            sums.losses.append(_loss_of(loss, probability_CHW, classes_HW))
        maps.append((np.where(classes_HW == IGNORE_LABEL, 0, predicted_HW).astype(np.uint8), classes_HW))
    distance = _mean_distance(maps, len(segmenter.classes), planes)
    if distance is not None:
        sums.distances.append(distance)


def _loss_of(loss: SegmentationLoss, probability_CHW: np.ndarray, classes_HW: np.ndarray) -> float:
    """The loss of one slice, of the logits that its probabilities stand for."""
    probability = torch.from_numpy(probability_CHW).double().clamp(1e-7, 1 - 1e-7)
    logits = probability.logit() if len(probability) == 1 else probability.log()
    terms = loss(logits[None], torch.from_numpy(classes_HW.astype(np.int64))[None])
    return float(torch.stack(list(terms.values())).sum())


def _mean_distance(
    maps: Sequence[tuple[np.ndarray, np.ndarray]], classes: int, planes: LabelledPlanes, most: int = MOST_SURFACE
) -> float | None:
    """Over the structures of a case that both sides hold; of a picture in its plane."""
    predicted_NHW, reference_NHW = (np.stack(side) for side in zip(*maps, strict=True))
    spacing: Sequence[float] = planes.spacing_mm
    if len(planes) == 1:
        predicted_NHW, reference_NHW, spacing = predicted_NHW[0], reference_NHW[0], planes.spacing
    found = [_distance(predicted_NHW == n, reference_NHW == n, spacing, most) for n in range(1, classes)]
    known = [value for value in found if math.isfinite(value)]
    return float(np.mean(known)) if known else None


def _distance(predicted: np.ndarray, reference: np.ndarray, spacing: Sequence[float], most: int) -> float:
    """Hausdorff distance; NaN where a side is empty, or its surface has more than ``most`` voxels."""
    if max(np.count_nonzero(boundary(mask)) for mask in (predicted, reference)) > most:
        return math.nan
    return hausdorff_95(predicted, reference, spacing)


def _figures(sums: _Sums, classes: Sequence[str]) -> dict[str, Any]:
    dice_PK, iou_PK = sums.scores()
    if len(classes) > 2:
        shown = (f"{name} {_mean(column):.4f}" for name, column in zip(classes[1:], dice_PK.T, strict=True))
        log.info("validation Dice by structure: %s", ", ".join(shown))
    threshold, best = sums.sweep.best() if sums.sweep is not None else (None, None)
    dice_P, present_P = _of_patients(dice_PK), sums.present()
    val_dice = float(np.mean(dice_P))
    return {
        "val_loss": float(np.mean(sums.losses)) if sums.losses else None,
        "val_dice": val_dice,
        "val_iou": float(np.mean(_of_patients(iou_PK))),
        "val_f1": val_dice,
        "val_hd95": float(np.mean(sums.distances)) if sums.distances else None,
        "val_best_dice": best,
        "val_best_threshold": threshold,
        "threshold_results": sums.sweep.table() if sums.sweep is not None else None,
        "score": float(np.mean(dice_P[present_P] if present_P.any() else dice_P)) if best is None else best,
    }


def _of_patients(scores_PK: np.ndarray) -> np.ndarray:
    """Mean over the structures that are held, of each patient; 1 where none is."""
    held_PK = ~np.isnan(scores_PK)
    total_P = np.where(held_PK, scores_PK, 0.0).sum(1)
    return np.where(held_PK.any(1), total_P / np.maximum(held_PK.sum(1), 1), 1.0)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


# --- pictures --------------------------------------------------------------------------------------------------------


class _Near:
    """A slice with its neighbours, alone: what the network needs to segment it."""

    def __init__(self, planes: LabelledPlanes, index: int, context: int) -> None:
        self.planes = planes
        self.first = max(0, index - context)
        self.last = min(len(planes) - 1, index + context)
        self.spacing, self.available_S = planes.spacing, planes.available_S

    def __len__(self) -> int:
        return self.last - self.first + 1

    def scaled(self, index: int) -> np.ndarray:
        return self.planes.scaled(self.first + index)


def draw_overlays(
    network: nn.Module, segmenter: Segmenter, cases: ValidationCases, folder: Path, config: InferSegmentConfig
) -> None:
    """PNG of up to eight validation cases: each channel of the slice with most of a structure, then both label maps.

    The reference is a green line, the prediction an area in the colour of its class, at the threshold of ``segmenter``
    or at ``CUT`` where it has none.
    """
    judged = replace(segmenter, network=network)
    for place, index in enumerate(_spread(len(cases), MOST_OVERLAYS)):
        planes = cases[index]
        number = _fullest(planes)
        near = _Near(planes, number, segmenter.context)
        probabilities = list(segment_planes(judged, near, config))
        predicted_HW = decide(probabilities[number - near.first], segmenter.threshold or CUT)
        picture = _picture(planes, number, predicted_HW, segmenter.sequences)
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in planes.case_id)[-80:]
        write_image(folder / f"{place:02d}_{name}_slice{number:03d}.png", picture)


def _spread(count: int, most: int) -> Iterator[int]:
    """Up to ``most`` of the first ``count`` numbers, evenly."""
    yield from dict.fromkeys(int(n) for n in np.linspace(0, count - 1, min(count, most)).round())


def _fullest(planes: LabelledPlanes) -> int:
    """The slice with most pixels of a structure; the middle one without any."""
    found = [int(np.count_nonzero((c != 0) & (c != IGNORE_LABEL))) for c in map(planes.classes, range(len(planes)))]
    return int(np.argmax(found)) if any(found) else len(planes) // 2


def _picture(planes: LabelledPlanes, number: int, predicted_HW: np.ndarray, sequences: Sequence[str]) -> np.ndarray:
    """(H', W', 3) uint8: the channels of a slice side by side, then the first one with both label maps."""
    views = [window(planes.shown(channel_HW), 0.0, 1.0) for channel_HW in planes.scaled(number)]
    reference_HW, prediction_HW = planes.shown(planes.classes(number)), planes.shown(predicted_HW)
    scale = max(1, round(SIDE / max(reference_HW.shape)))
    shown = [draw_masks(view, None, None, scale=scale) for view in views]
    names = sequences if len(sequences) == len(views) else [f"channel {n}" for n in range(1, len(views) + 1)]
    drawn = draw_masks(views[0], reference_HW, prediction_HW, scale=scale)
    return overlay_strip([*shown, drawn], [*names, "reference (green), prediction"])
