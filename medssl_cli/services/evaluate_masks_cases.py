"""One case after the other: its two label maps read, their grids compared, every number of it computed.

One case is in memory at a time; what stays of it are counts, distances and its judged lesions. Letters: C outputs,
L classes with the background, S structures (classes without it), Z Y X voxels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from medssl_cli.core.errors import DataError
from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.core.run import hide_home
from medssl_cli.core.volume import affine_spacing, grid_difference
from medssl_cli.core.wording import counted
from medssl_cli.data.images import check_finite, read_header, read_volume, volume_stem
from medssl_cli.data.label_maps import BACKGROUND, LabelSpec, read_label_picture, spec_of_values, whole_values
from medssl_cli.data.manifest import say_some
from medssl_cli.data.npy import is_npy, open_npy
from medssl_cli.metrics import segmentation
from medssl_cli.metrics.lesions import CaseLesions, lesion_candidates, match
from medssl_cli.metrics.surface import HdEmpty, bounding_box, diagonal, surface_distances
from medssl_cli.services.evaluate_masks_files import MaskPair
from medssl_cli.services.evaluate_masks_request import LESION_THRESHOLD, TOLERANCE, MasksConfig
from medssl_cli.services.evaluate_request import EvaluateRequest, Failure

METRICS = (
    *("dice", "iou", "f1", "accuracy", "precision", "recall"),
    *("hd95", "assd", "nsd", "volume_error_ml", "relative_volume_error"),
)  # fmt: skip
COUNTS = ("tp", "fp", "fn", "tn")


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie.

    Args:
        shape: (Z, Y, X), or (H, W) of a picture.
        affine: Of a NIfTI file; None where the file tells no geometry.
    """

    shape: tuple[int, ...]
    affine: np.ndarray | None

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm in the order of the axes; 1 where it is not known."""
        return (1.0,) * len(self.shape) if self.affine is None else tuple(affine_spacing(self.affine))


@dataclass(frozen=True)
class ScoreOptions:
    """How a case is measured.

    Args:
        tolerance: Of the surface Dice, in the unit of the spacing.
        hd_empty: What a distance to an empty mask is.
        threshold: Of the probability of one structure.
        lesions: Whether lesions are judged.
        lesion_threshold, lesion_min_voxels: What is a candidate in a probability map.
        min_iou: What finds a lesion.
    """

    tolerance: float = TOLERANCE
    hd_empty: HdEmpty = "nan"
    threshold: float = 0.5
    lesions: bool = False
    lesion_threshold: float = LESION_THRESHOLD
    lesion_min_voxels: int = 1
    min_iou: float = 0.1


def score_options(
    request: EvaluateRequest, config: MasksConfig, threshold: float | None, *, lesions: bool
) -> ScoreOptions:
    """How each case is measured, as the user asks."""
    return ScoreOptions(
        tolerance=TOLERANCE if request.tolerance_mm is None else request.tolerance_mm,
        hd_empty="diagonal" if request.hd_empty == "diagonal" else "nan",
        threshold=0.5 if threshold is None else threshold,
        lesions=lesions,
        lesion_threshold=config.lesion_threshold,
        lesion_min_voxels=config.lesion_min_voxels,
        min_iou=config.lesion_min_iou,
    )


@dataclass(frozen=True)
class CaseScores:
    """All numbers of one case, each array with one entry a structure.

    Args:
        case_id, name: As in ``MaskPair``.
        patient_id: Whose case it is.
        values: ``METRICS`` and ``COUNTS`` -> (S,) float64; NaN where a metric is not defined.
        lesions: Judged lesions of each structure; empty where they were not asked for.
        structure_names: S names.
    """

    case_id: str
    name: str
    patient_id: str
    values: dict[str, np.ndarray]
    structure_names: tuple[str, ...]
    lesions: tuple[CaseLesions, ...] = ()


# --- files -----------------------------------------------------------------------------------------------------------


def read_grid(path: Path) -> Grid:
    """The grid of a file, from its header where it has one.

    Raises:
        DataError: Missing or damaged.
    """
    if volume_stem(path) is not None:
        header = read_header(path)
        return Grid(header.shape[2::-1], header.affine)
    return Grid(open_npy(path).shape[-3:] if is_npy(path) else _picture_size(path), None)


def _picture_size(path: Path) -> tuple[int, int]:
    """(H, W) of a picture, from its header where that can be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception:  # Pillow raises many kinds for a damaged file; the whole reader names the fault
        height, width = read_label_picture(path).shape
    return height, width


def grids_differ(prediction: Grid, reference: Grid) -> str | None:
    """What differs between two grids, prediction first, in words with both values; None when they agree."""
    if prediction.affine is not None and reference.affine is not None:
        return grid_difference(prediction.shape, prediction.affine, reference.shape, reference.affine)
    if len(prediction.shape) != len(reference.shape):
        kinds = {2: "a picture", 3: "a volume"}
        return f"{kinds.get(len(prediction.shape))} and {kinds.get(len(reference.shape))}"
    if prediction.shape != reference.shape:
        unit = "pixels" if len(reference.shape) == 2 else "voxels"
        return f"shape: {_by(prediction.shape)} and {_by(reference.shape)} {unit}"
    return None


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape[::-1])


def read_values(path: Path) -> np.ndarray:
    """Values of a file as stored: (Z, Y, X) or (H, W), of a 4-D file (C, Z, Y, X).

    Raises:
        DataError: Missing, damaged, not finite, or a picture that is no label map.
    """
    if volume_stem(path) is not None:
        array = read_volume(path).array
    elif is_npy(path):
        array = np.asarray(open_npy(path))
        array = array.astype(np.uint8) if array.dtype == bool else array
    else:
        return read_label_picture(path)
    check_finite(path, array)
    return array


def is_probability(values: np.ndarray) -> bool:
    """Whether values are probabilities: floating point with others than whole numbers, or several maps in one file."""
    if values.ndim == 4:
        return True
    return values.dtype.kind == "f" and bool((values != np.rint(values)).any())


def check_probability(values: np.ndarray, path: Path) -> None:
    """Refuse values outside of 0 to 1.

    Raises:
        DataError: So they are.
    """
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1 + 1e-6:
        raise DataError(
            "A map of probabilities holds other values than 0 to 1.",
            where=f"{hide_home(str(path))}: {low:g} to {high:g}",
            fix="give label maps of whole numbers, or probabilities, not logits",
            code="probability_values",
        )


def compare_grids(pairs: Iterable[MaskPair]) -> list[Failure]:
    """Cases whose files do not lie on one grid or cannot be read; headers alone are read where there are any."""
    failures: list[Failure] = []
    for pair in pairs:
        for path in (pair.prediction, pair.probability):
            if path is None:
                continue
            try:
                difference = grids_differ(read_grid(path), read_grid(pair.reference))
            except DataError as error:
                failures.append(failure(pair, path, error))
                break
            if difference:
                reason = f"prediction and reference lie on different grids: {difference}"
                failures.append((pair.case_id, hide_home(str(path)), reason, GRID_FIX))
                break
    return failures


def nothing_left(failures: Sequence[Failure]) -> DataError:
    """The error of an evaluation whose cases have all failed."""
    lines = [f"{case}: {reason}" for case, _, reason, _ in failures[:8]]
    return DataError(
        "No case can be evaluated.", where="\n".join(lines), fix="see the reasons above", code="cases_missing"
    )


GRID_FIX = "write predictions on the grid of the input image, as `medssl infer` does; nothing is resampled here"


def failure(pair: MaskPair, path: Path, error: DataError) -> Failure:
    """A row of ``failures.csv``."""
    return pair.case_id, hide_home(str(path)), f"{error.what.rstrip('.')}: {hide_home(error.where)}", error.fix


# --- classes ---------------------------------------------------------------------------------------------------------


@dataclass
class FoundValues:
    """What the files of all cases hold, to tell the classes from."""

    reference: set[int] = field(default_factory=set)
    prediction: set[int] = field(default_factory=set)
    probability_channels: set[int] = field(default_factory=set)

    def add(self, pair: MaskPair) -> None:
        """Read one case.

        Raises:
            DataError: It cannot be read, or holds no labels.
        """
        self.reference |= _present(read_values(pair.reference), pair.reference)
        values = read_values(pair.prediction)
        if is_probability(values):
            check_probability(values, pair.prediction)
            self.probability_channels.add(1 if values.ndim < 4 else len(values))
        else:
            self.prediction |= _present(values, pair.prediction)

    def spec(self, names: tuple[str, ...], where: str, label: str = "") -> LabelSpec:
        """Classes by the values found: where both sides hold one structure at most, it is one, whatever its value.

        Raises:
            ConfigError: ``names`` cannot be read.
            DataError: Values beyond the names, those that predictions alone hold, or so many that this is no label map.
        """
        own, theirs = self.reference - {0}, self.prediction - {0}
        single = len(own) <= 1 and len(theirs) <= 1 and self.probability_channels <= {1, 2}
        if single and len(names) < 2 and not any("=" in name for name in names):
            name = names[0] if names else label or "class_1"
            return LabelSpec((BACKGROUND, name), {0: 0, **dict.fromkeys(sorted(own | theirs) or [1], 1)})
        strange = sorted(theirs - own)
        if strange and not names:
            raise DataError(
                "Predictions hold values that no reference has.",
                where=f"{where}: {say_some(map(str, strange))}; references hold {say_some(map(str, sorted(own)))}",
                fix="name what the values mean, e.g. --classes gland,lesion; a JPEG is no label map",
                code="label_values",
            )
        return spec_of_values(own | theirs, names, label=label, where=where)


def _present(values: np.ndarray, path: Path) -> set[int]:
    if values.ndim > 3:
        raise DataError(
            "The reference is 4-D.",
            where=hide_home(str(path)),
            fix="give one 3-D file in which each voxel has the value of its structure",
            code="volume_4d",
        )
    found = np.bincount(whole_values(values, hide_home(str(path))).reshape(-1), minlength=256)
    return {int(value) for value in np.flatnonzero(found)}


# --- one case --------------------------------------------------------------------------------------------------------


def read_classes(path: Path, spec: LabelSpec) -> np.ndarray:
    """Class index of each voxel of a label map, uint8.

    Raises:
        DataError: As ``read_values``; values of no class.
    """
    return spec.classes_of(read_values(path), hide_home(str(path)))


def read_probabilities(path: Path, spec: LabelSpec) -> np.ndarray:
    """(C, Z, Y, X) or (C, H, W): one map of the one structure, or one of each class.

    Raises:
        DataError: Values or a number of maps that do not fit.
    """
    values = read_values(path)
    dense = values if values.ndim == 4 else values[None]
    check_probability(dense, path)
    if len(dense) not in (1, len(spec.classes)) or (len(dense) == 1 and len(spec.classes) > 2):
        raise DataError(
            "The number of probability maps is not that of the classes.",
            where=f"{hide_home(str(path))}: {counted(len(dense), 'map')}; classes {', '.join(spec.classes)}",
            fix="give one map of the one structure, or one of each class in their order, the background first",
            code="probability_classes",
        )
    return dense


def decided(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Class index of each voxel, uint8: from the threshold on for one map, the most probable class of several."""
    if len(probability) == 1:
        return (probability[0] >= probability.dtype.type(threshold)).astype(np.uint8)
    return probability.argmax(0).astype(np.uint8)


def read_prediction(pair: MaskPair, spec: LabelSpec, threshold: float) -> tuple[np.ndarray, np.ndarray | None]:
    """(class index of each voxel, probabilities where the file holds them)."""
    values = read_values(pair.prediction)
    if not is_probability(values):
        return spec.classes_of(values, hide_home(str(pair.prediction))), None
    del values
    probability = read_probabilities(pair.prediction, spec)
    return decided(probability, threshold), probability


def score_case(
    names: tuple[str, str, str],
    prediction: np.ndarray,
    reference: np.ndarray,
    grid: Grid,
    classes: tuple[str, ...],
    options: ScoreOptions,
    probability: np.ndarray | None = None,
) -> CaseScores:
    """Measure one case.

    Args:
        names: (case id, name, patient id).
        prediction: Class index of each voxel; what the prediction itself ignores counts as background.
        reference: Class index, or ``IGNORE_LABEL``: counted nowhere.
        grid: Of both.
        classes: L names, the background first.
        options: How.
        probability: (C, ...) for lesion candidates; None takes them from the label map.
    """
    prediction = np.where(prediction == IGNORE_LABEL, np.uint8(0), prediction)
    ignored = reference == IGNORE_LABEL
    counts = segmentation.class_counts(prediction, reference, len(classes))
    tp, fp, fn, tn = (np.asarray(part[1:], dtype=np.float64) for part in counts)
    if ignored.any():
        prediction = np.where(ignored, np.uint8(0), prediction)
        reference = np.where(ignored, np.uint8(0), reference)
    values = {"tp": tp, "fp": fp, "fn": fn, "tn": tn, **_overlaps(tp, fp, fn, tn, grid)}
    values |= _distances(prediction, reference, grid, len(classes), options)
    lesions: tuple[CaseLesions, ...] = ()
    if options.lesions:
        lesions = tuple(
            _lesions(prediction == c, reference == c, _of_class(probability, c, ignored), options)
            for c in range(1, len(classes))
        )
    case_id, name, patient_id = names
    return CaseScores(case_id, name, patient_id, values, tuple(classes[1:]), lesions)


def _overlaps(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray, grid: Grid) -> dict[str, np.ndarray]:
    voxel_mm3 = math.prod(grid.spacing) if len(grid.shape) == 3 and grid.affine is not None else math.nan
    counted_S = tp + fp + fn + tn > 0  # nothing is known where every voxel is ignored
    found = {
        "dice": segmentation.dice(tp, fp, fn),
        "iou": segmentation.iou(tp, fp, fn),
        "f1": segmentation.f1(tp, fp, fn),
        "accuracy": segmentation.accuracy(tp, fp, fn, tn),
        "precision": segmentation.precision(tp, fp),
        "recall": segmentation.recall(tp, fn),
        "volume_error_ml": segmentation.volume_error_ml(fp, fn, voxel_mm3),
        "relative_volume_error": segmentation.relative_volume_error(tp, fp, fn),
    }
    return {name: np.where(counted_S, value, math.nan) for name, value in found.items()}


def _distances(
    prediction: np.ndarray, reference: np.ndarray, grid: Grid, n_classes: int, options: ScoreOptions
) -> dict[str, np.ndarray]:
    """Distances of each structure, (S,)."""
    found = {name: np.full(n_classes - 1, math.nan) for name in ("hd95", "assd", "nsd")}
    box = _with_margin(bounding_box((prediction > 0) | (reference > 0)), grid.shape)
    near_prediction, near_reference = prediction[box], reference[box]
    for c in range(1, n_classes):
        distances = surface_distances(near_prediction == c, near_reference == c, grid.spacing)
        found["hd95"][c - 1], found["assd"][c - 1] = distances.percentile(95), distances.mean()
        found["nsd"][c - 1] = distances.share_within(options.tolerance)
        if options.hd_empty == "diagonal" and not (distances.n_prediction and distances.n_reference):
            missed = distances.n_prediction or distances.n_reference
            cost = diagonal(grid.shape, grid.spacing) if missed else 0.0
            found["hd95"][c - 1] = found["assd"][c - 1] = cost
    return found


def _with_margin(box: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The box with a voxel of background around it, so that no axis of several voxels becomes one of a single voxel."""
    if box is None:
        return tuple(slice(0, min(n, 2)) for n in shape)
    return tuple(slice(max(side.start - 1, 0), min(side.stop + 1, n)) for side, n in zip(box, shape, strict=True))


def _of_class(probability: np.ndarray | None, c: int, ignored: np.ndarray) -> np.ndarray | None:
    if probability is None:
        return None
    own = probability[0] if len(probability) == 1 else probability[c]
    return np.where(ignored, own.dtype.type(0), own) if ignored.any() else own


def _lesions(
    prediction: np.ndarray, reference: np.ndarray, probability: np.ndarray | None, options: ScoreOptions
) -> CaseLesions:
    source = prediction if probability is None else probability
    threshold = 0.0 if probability is None else options.lesion_threshold
    candidates = lesion_candidates(source, threshold, min_voxels=options.lesion_min_voxels)
    return match(candidates, reference, min_iou=options.min_iou)
