"""What ``medssl eval`` was asked for, and what is measured: predictions with labels and where they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from medssl_cli.core.config import Config
from medssl_cli.core.errors import ConfigError
from medssl_cli.core.run import hide_home
from medssl_cli.data.feature_store import Row
from medssl_cli.data.store import default_cache
from medssl_cli.report.eval_page import group_unit
from medssl_cli.services.lookup import model_paths
from medssl_cli.services.predictions import TASKS, PredictionTable, Task

COMMAND = "eval"
Progress = Callable[[int, int], None]
Failure = tuple[str, str, str, str]
"""(case_id, path, reason, fix)."""
SPLITS = ("train", "val", "test", "all")
LEAST_GROUPS = 20
"""Of fewer patients the percentile bootstrap covers clearly less than the 95 % that it names."""


class EvaluateConfig(Config):
    """``KEY=VALUE`` of ``medssl eval`` with a model: how images are computed, never what comes out."""

    batch_size: PositiveInt = 8
    """Slices that are computed together; more is faster and needs more memory."""
    digest: Literal["content", "fast"] = "content"
    """How files are told apart in the cache: SHA-256 of their bytes, or their size and time of change."""


@dataclass(frozen=True)
class EvaluateRequest:
    """What the user typed. Names as the options of ``medssl eval``."""

    out: Path
    model: Path | None = None
    data: Path | None = None
    split: str | None = None
    predictions: Path | None = None
    reference: Path | None = None
    task: str | None = None
    threshold: float | None = None
    subgroup: tuple[str, ...] = ()
    subgroups: Path | None = None
    compare: Path | None = None
    draws: int = 1000
    seed: int = 42
    labels: Path | None = None
    target: tuple[str, ...] = ()
    splits: Path | None = None
    split_csv: Path | None = None
    group_by: str | None = None
    sequence: str | None = None
    missing_sequences: bool = False
    backbone: Path | None = None
    cache: Path | None = None
    device: str = "auto"
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False
    overrides: tuple[str, ...] = ()
    tolerance_mm: float | None = None
    hd_empty: str | None = None
    lesions: bool = False
    probabilities: Path | None = None
    group_pattern: str | None = None
    classes: tuple[str, ...] = ()
    label: str | None = None
    save_predictions: bool = False

    @property
    def of_files(self) -> bool:
        """Whether predictions were given rather than a model."""
        return self.predictions is not None

    def inputs(self) -> list[Path]:
        """What is read, and must not be deleted."""
        given = (self.model, self.data, self.predictions, self.reference, self.subgroups, self.compare, self.labels)
        paths = (*given, self.probabilities)
        models = [] if self.of_files else model_paths(self.model, backbone=self.backbone)
        named = [path for path in (*paths, self.splits, self.split_csv, self.backbone) if path is not None]
        return [*named, *models, default_cache(self.cache)]


@dataclass(frozen=True)
class Scored:
    """Predictions of labelled cases, and all that their evaluation needs besides.

    Args:
        table: Cases with at least one known label, in order of their ids.
        thresholds: (C,) probabilities from which on a class counts as present; None where nothing is decided by one.
        threshold_source: Where they come from, in words.
        group_by: What ``table.patient_ids`` hold: patients as a rule.
        calibrated: Whether the probabilities were calibrated on validation data; None where that is unknown.
        rows: One for each case of the table, by which other tables name it.
        data: What was evaluated, for ``metrics.json``.
        of_images: The cases are pictures.
        root: Folder that paths in tables are relative to.
        tables: Tables with more columns of these cases.
        known: What is known of a case without a table: column -> case -> text.
        unlabelled: Cases left out because nothing is known of them.
        failures: Cases left out because they could not be read.
        model: What predicted, for ``metrics.json``; None for predictions from a file.
        device: What it was computed on.
        notes: What the reader of the numbers has to know.
        slices: Predictions of single slices, where slices have labels of their own.
        with_sequences: Predicts cases again with some of their sequences; None where there are not several.
    """

    table: PredictionTable
    thresholds: np.ndarray | None
    threshold_source: str
    group_by: str
    calibrated: bool | None
    rows: tuple[Row, ...]
    data: dict[str, Any]
    of_images: bool = False
    root: Path | None = None
    tables: tuple[Path, ...] = ()
    known: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unlabelled: int = 0
    failures: tuple[Failure, ...] = ()
    model: dict[str, Any] | None = None
    device: str | None = None
    notes: tuple[str, ...] = ()
    slices: PredictionTable | None = None
    with_sequences: SequenceScorer | None = None


@dataclass(frozen=True)
class SequenceScorer:
    """A model that can be shown some sequences of each case only.

    Args:
        names: Sequences of the model.
        of_case: Sequences that each case has.
        predict: ({case: sequences shown}) -> values (N, C) in the order of the cases.
    """

    names: tuple[str, ...]
    of_case: Mapping[str, tuple[str, ...]]
    predict: Callable[[Mapping[str, tuple[str, ...]]], np.ndarray]


def check_request(request: EvaluateRequest) -> None:
    """Refuse options that are wrong, missing or without effect, all in one message.

    Raises:
        ConfigError: With each of them.
    """
    faults = [*_missing(request), *_without_effect(request), *_masks_only(request), *_out_of_range(request)]
    if faults:
        raise ConfigError(
            f"{'One option' if len(faults) == 1 else f'{len(faults)} options'} of `medssl eval` cannot be used so.",
            where="\n".join(faults),
            fix="either --model RUN --data ROOT, or --predictions FILE --reference FILE; see `medssl eval --help`",
            code="usage",
        )


def _missing(request: EvaluateRequest) -> list[str]:
    if request.of_files:
        return []
    if request.reference is not None:
        return ["--reference: the predictions are missing; pass --predictions FILE"]
    return [] if request.data is not None else ["--data: what to evaluate is missing; pass --data ROOT or FEATURES"]


def _without_effect(request: EvaluateRequest) -> list[str]:
    named: Sequence[tuple[str, object]]
    found = []
    if request.subgroups is not None and not request.subgroup and (request.group_by is None or request.of_files):
        found.append("--subgroups: without effect; name a column of it with --subgroup COL")
    if request.of_files:
        named = (
            ("--model", request.model),
            ("--data", request.data),
            ("--split", request.split),
            ("--labels", request.labels),
            ("--splits", request.splits),
            ("--split-csv", request.split_csv),
            ("--missing-sequences", request.missing_sequences),
            ("--sequence", request.sequence),
            ("--backbone", request.backbone),
            ("--cache", request.cache),
            ("--device", request.device != "auto"),
            ("--on-error", request.on_error != "stop"),
            *((text, True) for text in request.overrides),
        )
        return found + [f"{name}: without effect on predictions from a file" for name, value in named if value]
    if request.task:
        found.append("--task: only for --predictions")
    if request.splits is not None and request.split_csv is not None:
        found.append("--splits and --split-csv: both name the cases; give one of them")
    if request.splits is None and request.split_csv is not None and request.split is not None:
        found.append("--split: without effect beside --split-csv, which names the cases")
    return found


def _masks_only(request: EvaluateRequest) -> list[str]:
    named = (
        ("--tolerance-mm", request.tolerance_mm is not None),
        ("--hd-empty", request.hd_empty is not None),
        ("--lesions", request.lesions),
        ("--probabilities", request.probabilities is not None),
        ("--group-pattern", request.group_pattern is not None),
        ("--classes", bool(request.classes)),
        ("--label", request.label is not None),
        ("--save-predictions", request.save_predictions),
    )
    return [f"{name}: only for masks; what is evaluated here gives none" for name, given in named if given]


def _out_of_range(request: EvaluateRequest) -> list[str]:
    found = []
    if request.threshold is not None and not (math.isfinite(request.threshold) and 0 < request.threshold < 1):
        found.append(f"--threshold {request.threshold:g}: a probability between 0 and 1, both excluded")
    if request.draws < 1:
        found.append(f"--draws {request.draws}: at least 1")
    if request.split is not None and request.split not in SPLITS:
        found.append(f"--split {request.split}: one of {', '.join(SPLITS)}")
    if request.task is not None and request.task not in TASKS:
        found.append(f"--task {request.task}: one of {', '.join(TASKS)}")
    return found


def refuse_needless_threshold(task: Task, asked: float | None) -> None:
    """Refuse a threshold where nothing is decided by one.

    Raises:
        ConfigError: So it is.
    """
    if asked is None or task in ("binary", "multilabel"):
        return
    raise ConfigError(
        f"--threshold has no effect on predictions of the task {task}.",
        where=f"--threshold {asked:g}: "
        + ("numbers are predicted" if task == "regression" else "the most probable class wins"),
        fix="leave it out",
        code="threshold_needless",
    )


def chosen_thresholds(
    task: Task, outputs: int, asked: float | None, own: np.ndarray | None, rule: str
) -> tuple[np.ndarray | None, str]:
    """(thresholds, where they come from): as asked, else the model's own, else one half.

    Raises:
        ConfigError: A threshold where nothing is decided by one.
    """
    refuse_needless_threshold(task, asked)
    if task == "multiclass":
        return None, "no threshold: the most probable class"
    if task == "regression":
        return None, "no threshold: numbers are predicted"
    if asked is not None:
        return np.full(outputs, asked), "--threshold"
    if own is not None:
        return np.asarray(own, dtype=np.float64), rule
    return np.full(outputs, 0.5), "0.5, as none was chosen"


def few_groups_note(n_groups: int, group_by: str) -> list[str]:
    """What is to be said of intervals over few patients; nothing where there are enough."""
    if n_groups >= LEAST_GROUPS:
        return []
    return [
        f"Intervals of {n_groups} {group_unit(group_by, n_groups)} are too narrow: the bootstrap cannot draw what it "
        "has not seen, and an interval without width is no certainty."
    ]


def config_facts(request: EvaluateRequest) -> dict[str, Any]:
    """What was asked for, for ``metrics.json``; the output folder is left out."""
    kept = {name: value for name, value in asdict(request).items() if name not in ("out", "overwrite")}
    return {name: hide_home(str(value)) if isinstance(value, Path) else value for name, value in kept.items()}
