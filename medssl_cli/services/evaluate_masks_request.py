"""Which evaluations are of masks, what can be set of them, and the options that have no effect there."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

from pydantic import Field, PositiveInt

from medssl_cli.core.config import Config
from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.core.wording import counted
from medssl_cli.data.images import IMAGE_SUFFIXES, volume_stem
from medssl_cli.services.evaluate_request import SPLITS, EvaluateRequest
from medssl_cli.services.lookup import find_model, is_segment_run

TOLERANCE = 2.0
"""Of the surface Dice, in mm; in pixels where no spacing is known."""
LESION_THRESHOLD = 0.1
"""Probability from which on voxels belong to a lesion candidate: static extraction as in PI-CAI's baseline."""


class MasksConfig(Config):
    """``KEY=VALUE`` of ``medssl eval`` on masks."""

    lesion_threshold: float = Field(LESION_THRESHOLD, ge=0, lt=1)
    """Probability from which on voxels belong to a lesion candidate, whose confidence is its highest value; 0 for
    detection maps, which are 0 outside of their candidates."""
    lesion_min_iou: float = Field(0.1, gt=0, le=1)
    """Least intersection over union at which a candidate finds a lesion."""
    lesion_min_voxels: PositiveInt = 1
    """Smaller candidates are left out."""
    worst_cases: int = Field(6, ge=0)
    """Cases drawn in the report, those with the lowest Dice."""

    def candidates(self, source: str) -> str:
        """What lesion candidates of a source of probabilities are, in words."""
        return (
            f"connected regions of the {source} from {self.lesion_threshold:g} on, of at least "
            f"{counted(self.lesion_min_voxels, 'voxel')}; confidence: the highest probability in a region"
        )


def is_masks(request: EvaluateRequest) -> bool:
    """Whether masks are evaluated: files of label maps, or a segmentation network."""
    if request.predictions is not None:
        return _holds_masks(request.predictions)
    if request.probabilities is not None:
        return True
    return segment_run(request) is not None


def segment_run(request: EvaluateRequest) -> Path | None:
    """Run folder of the segmentation network that is meant; None for a head or where no model is found."""
    if request.of_files or request.data is None:
        return None
    named = request.model or os.environ.get("MEDSSL_MODEL")
    if named and is_segment_run(Path(named)):
        return Path(named)
    try:
        return find_model(request.model, backbone=request.backbone).segmenter
    except (CheckpointError, ConfigError):  # told by whoever opens it
        return None


def _holds_masks(path: Path) -> bool:
    if not path.is_dir():
        return is_mask_file(path)
    if (path / "predictions.csv").is_file():
        return False
    return any(is_mask_file(entry) for entry in itertools.chain(path.iterdir(), path.glob("*/*")))


def is_mask_file(path: Path) -> bool:
    """Whether the suffix is that of a volume or a picture, and the file no hidden one."""
    if path.name.startswith("."):
        return False
    return volume_stem(path) is not None or path.suffix.lower() in IMAGE_SUFFIXES


def refuse_idle_lesion_keys(request: EvaluateRequest, *, lesions: bool) -> None:
    """Refuse keys of lesions where these are not judged.

    Raises:
        ConfigError: With them.
    """
    idle = [text for text in request.overrides if text.startswith("lesion_") and not lesions]
    if idle:
        raise ConfigError(
            "Settings of lesions have no effect without lesions.",
            where=", ".join(idle),
            fix="pass --lesions, or leave them out",
            code="flags_without_effect",
        )


def check_masks_request(request: EvaluateRequest) -> None:
    """Refuse options that are wrong, missing or without effect on masks, all in one message.

    Raises:
        ConfigError: With each of them.
    """
    of_model = segment_run(request) is not None
    faults = [*_missing(request, of_model), *_needless(request, of_model), *_out_of_range(request)]
    if faults:
        raise ConfigError(
            f"{'One option' if len(faults) == 1 else f'{len(faults)} options'} of `medssl eval` cannot be used so.",
            where="\n".join(faults),
            fix="either --model RUN --data ROOT, or --predictions DIR --reference DIR; see `medssl eval --help`",
            code="usage",
        )


def _missing(request: EvaluateRequest, of_model: bool) -> list[str]:
    if of_model:
        return []
    found = []
    if request.reference is None:
        found.append("--reference: the truth is missing; pass the folder (or file) of reference label maps")
    if request.predictions is None:
        found.append("--predictions: label maps are missing beside --probabilities")
    if request.subgroups is not None and request.subgroups.suffix.lower() not in (".csv", ".tsv", ".txt"):
        found.append(f"--subgroups {request.subgroups}: a CSV is needed")
    return found


def _needless(request: EvaluateRequest, of_model: bool) -> list[str]:
    never = (
        ("--task", request.task),
        ("--labels", request.labels),
        ("--target", request.target),
        ("--missing-sequences", request.missing_sequences),
        ("--sequence", request.sequence),
        ("--backbone", request.backbone),
        ("--cache", request.cache),
    )
    of_files = (
        ("--model", request.model),
        ("--data", request.data),
        ("--split", request.split),
        ("--splits", request.splits),
        ("--device", request.device != "auto"),
        ("--save-predictions", request.save_predictions),
    )
    of_models = (
        ("--reference", request.reference),
        ("--probabilities", request.probabilities),
        ("--classes", request.classes),
    )
    found = [f"{name}: without effect on masks" for name, value in never if value]
    found += [f"{name}: without effect on label maps from files" for name, value in of_files if value and not of_model]
    found += [f"{name}: without effect beside --model" for name, value in of_models if value and of_model]
    if request.splits is not None and request.split_csv is not None:
        found.append("--splits and --split-csv: both name the cases; give one of them")
    if request.splits is None and request.split_csv is not None and request.split is not None:
        found.append("--split: without effect beside --split-csv, which names the cases")
    if request.group_by and request.group_pattern:
        found.append("--group-by and --group-pattern: both name the groups; give one of them")
    return found


def _out_of_range(request: EvaluateRequest) -> list[str]:
    found = []
    if request.threshold is not None and not (math.isfinite(request.threshold) and 0 < request.threshold < 1):
        found.append(f"--threshold {request.threshold:g}: a probability between 0 and 1, both excluded")
    tolerance = request.tolerance_mm
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        found.append(f"--tolerance-mm {tolerance:g}: a distance of 0 or more")
    if request.hd_empty not in (None, "nan", "diagonal"):
        found.append(f"--hd-empty {request.hd_empty}: nan or diagonal")
    if request.draws < 1:
        found.append(f"--draws {request.draws}: at least 1")
    if request.split is not None and request.split not in SPLITS:
        found.append(f"--split {request.split}: one of {', '.join(SPLITS)}")
    return found
