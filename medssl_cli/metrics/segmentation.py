"""Overlap of a predicted region with its reference, all from four counts of voxels.

Two masks give true and false positives and negatives; whatever is reported follows from these, so that images, slices
of a case and batches are added as counts and a mean is a mean of images, never of batches. Every function takes single
counts or arrays of them. Letters: L classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from medssl_cli.core.protocols import IGNORE_LABEL

DEFINITIONS = {
    "dice": "2 TP / (2 TP + FP + FN) over voxels; 1 if prediction and reference are both empty, 0 if one of them is",
    "iou": "TP / (TP + FP + FN) over voxels; 1 if prediction and reference are both empty, 0 if one of them is",
    "accuracy": "(TP + TN) / all counted voxels: large where background is large, whatever the prediction is worth",
    "precision": "TP / (TP + FP) over voxels; undefined if nothing is predicted",
    "recall": "TP / (TP + FN) over voxels; undefined if the reference is empty",
    "f1": "harmonic mean of precision and recall, which for voxels equals Dice; 1 if both are empty, 0 if one is",
    "volume_error_ml": "predicted volume minus reference volume in ml",
    "relative_volume_error": "(predicted minus reference volume) / reference volume; undefined if the reference is "
    "empty",
}
EMPTY_RULE = (
    "Prediction and reference both empty: Dice = IoU = F1 = 1, and the case is counted in n_both_empty; one of them "
    "empty: 0. Voxels that the reference marks as ignored count nowhere."
)


_BLOCK = 1 << 22  # voxels counted at a time: 32 MB of codes


class Counts(NamedTuple):
    """Voxels of one mask against another; numbers or arrays of one shape."""

    tp: Any
    fp: Any
    fn: Any
    tn: Any


def counts(prediction: np.ndarray, reference: np.ndarray) -> Counts:
    """Voxels by agreement of two masks.

    Args:
        prediction: Boolean (or 0 and 1) mask of any shape.
        reference: Mask of the same shape; of a label map of whole numbers, ``IGNORE_LABEL`` counts nowhere.

    Raises:
        ValueError: The shapes differ.
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    _check_alike(prediction, reference)
    predicted, counted = prediction != 0, _counted(reference)
    present = reference != 0
    if counted is not None:
        predicted, present = predicted & counted, present & counted
    n = present.size if counted is None else int(np.count_nonzero(counted))
    tp = int(np.count_nonzero(predicted & present))
    fp, fn = int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(present)) - tp
    return Counts(tp, fp, fn, n - tp - fp - fn)


def class_counts(prediction: np.ndarray, reference: np.ndarray, n_classes: int) -> Counts:
    """Counts of every class of two label maps against all others, each (L,) int64, in one pass.

    Args:
        prediction: Class index of each voxel, below ``n_classes``.
        reference: The same, or ``IGNORE_LABEL``: such voxels count nowhere.
        n_classes: L, background included.

    Raises:
        ValueError: The shapes differ, or a class index is not below L.
    """
    confusion_LL = confusion_matrix(prediction, reference, n_classes)
    tp = np.diag(confusion_LL)
    fn, fp = confusion_LL.sum(1) - tp, confusion_LL.sum(0) - tp
    return Counts(tp, fp, fn, confusion_LL.sum() - tp - fp - fn)


def confusion_matrix(prediction: np.ndarray, reference: np.ndarray, n_classes: int) -> np.ndarray:
    """Voxels by reference class (rows) and predicted class (columns), (L, L) int64; ignored ones are left out.

    Raises:
        ValueError: The shapes differ, or a class index is not below L.
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    _check_alike(prediction, reference)
    if n_classes > IGNORE_LABEL:
        raise ValueError(f"{n_classes} classes: at most {IGNORE_LABEL}, for {IGNORE_LABEL} marks ignored voxels")
    confusion_LL = np.zeros((n_classes, n_classes), dtype=np.int64)
    flat_prediction, flat_reference = prediction.reshape(-1), reference.reshape(-1)
    for start in range(0, flat_reference.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        confusion_LL += _block_confusion(flat_prediction[block], flat_reference[block], n_classes)
    return confusion_LL


def _block_confusion(prediction: np.ndarray, reference: np.ndarray, n_classes: int) -> np.ndarray:
    counted = _counted(reference)
    if counted is not None:
        prediction, reference = prediction[counted], reference[counted]
    for name, array in (("prediction", prediction), ("reference", reference)):
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < n_classes:
            raise ValueError(f"{name} holds values {array.min()} to {array.max()} for {n_classes} classes")
    code = reference.astype(np.int64) * n_classes + prediction
    return np.bincount(code, minlength=n_classes**2).reshape(n_classes, n_classes)


def dice(tp: Any, fp: Any, fn: Any) -> Any:
    """Dice coefficient; 1 where prediction and reference are empty."""
    return _ratio(2 * np.asarray(tp), 2 * np.asarray(tp) + fp + fn, empty=1.0)


def iou(tp: Any, fp: Any, fn: Any) -> Any:
    """Intersection over union (Jaccard index); 1 where prediction and reference are empty."""
    return _ratio(tp, np.asarray(tp) + fp + fn, empty=1.0)


def f1(tp: Any, fp: Any, fn: Any) -> Any:
    """Harmonic mean of precision and recall: for voxels the same number as Dice."""
    return dice(tp, fp, fn)


def accuracy(tp: Any, fp: Any, fn: Any, tn: Any) -> Any:
    """Share of voxels that agree, background included; NaN where none is counted."""
    return _ratio(np.asarray(tp) + tn, np.asarray(tp) + fp + fn + tn, empty=np.nan)


def precision(tp: Any, fp: Any) -> Any:
    """Share of predicted voxels that are right; NaN where none is predicted."""
    return _ratio(tp, np.asarray(tp) + fp, empty=np.nan)


def recall(tp: Any, fn: Any) -> Any:
    """Share of reference voxels that are found; NaN where there is none."""
    return _ratio(tp, np.asarray(tp) + fn, empty=np.nan)


def volume_error_ml(fp: Any, fn: Any, voxel_mm3: Any) -> Any:
    """Predicted minus reference volume in ml, of voxels of ``voxel_mm3`` mm³."""
    return _single((np.asarray(fp, dtype=np.float64) - fn) * voxel_mm3 / 1000)


def relative_volume_error(tp: Any, fp: Any, fn: Any) -> Any:
    """Predicted minus reference volume as a share of the reference; NaN where the reference is empty."""
    return _ratio(np.asarray(fp, dtype=np.float64) - fn, np.asarray(tp) + fn, empty=np.nan)


def _ratio(numerator: Any, denominator: Any, *, empty: float) -> Any:
    """Quotient in float64, ``empty`` where the denominator is 0; a number for numbers."""
    over, under = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return _single(np.divide(over, under, out=np.full(under.shape, empty), where=under != 0))


def _single(values: np.ndarray) -> Any:
    return float(values) if values.ndim == 0 else values


def _check_alike(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")


def _counted(reference: np.ndarray) -> np.ndarray | None:
    """Where voxels count; None: everywhere. A boolean mask has no value that could say "ignored"."""
    if reference.dtype == bool or not reference.size or int(reference.max()) < IGNORE_LABEL:
        return None
    return np.asarray(reference != IGNORE_LABEL)
