"""Predictions from a table against the truth from another one; no model is needed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.feature_store import Row
from medssl_cli.data.manifest import split_digest
from medssl_cli.services.evaluate_request import EvaluateRequest, Scored, chosen_thresholds
from medssl_cli.services.predictions import (
    PredictionTable,
    Task,
    decisions,
    join_reference,
    read_predictions,
    read_reference,
)

log = logging.getLogger(__name__)

PREDICTIONS = "predictions.csv"
LABELS = "labels.csv"


def score_files(request: EvaluateRequest) -> Scored:
    """Read and join two tables.

    Raises:
        ConfigError: No table, such as a COCO file; or no reference.
        DataError: A table cannot be read, a prediction is missing, an id stands there twice, or no label is known.
    """
    path = table_at(cast(Path, request.predictions), PREDICTIONS, "predictions")
    predictions = read_predictions(path, cast("Task | None", request.task))
    table, group_by, reference = _joined(request, path, predictions)
    thresholds, source = chosen_thresholds(table.task, len(table.classes), request.threshold, None, "")
    table = _decided(table, thresholds, path, may_warn=request.threshold is None)
    table, unlabelled = labelled_only(table)
    group_by, notes = _grouping(table, group_by, request)
    data = {
        "predictions": hide_home(str(path)),
        "reference": hide_home(str(reference)),
        "split": None,
        "split_digest": split_digest(table.case_ids),
    }
    return Scored(
        table,
        thresholds,
        source,
        group_by,
        None,
        tuple(_row(table, row) for row in range(len(table))),
        data,
        root=reference.parent,
        tables=tuple(dict.fromkeys((reference, path))),
        known={"split": dict(zip(table.case_ids, table.splits, strict=True))},
        unlabelled=unlabelled,
        notes=notes,
    )


def _grouping(table: PredictionTable, level: str, request: EvaluateRequest) -> tuple[str, tuple[str, ...]]:
    """(what groups the cases, what the reader has to know of it): tables often name cases alone."""
    if request.group_by is not None or table.patient_ids != table.case_ids:
        return level, ()
    return "case_id", (
        "No patients are known beside the cases: each case counts as a patient of its own, so intervals are too narrow "
        "where a patient has several.",
    )


def table_at(path: Path, name: str, what: str) -> Path:
    """The table that a file or a folder of results is.

    Raises:
        ConfigError: Something else, such as a COCO file: only tables are read here.
    """
    if path.is_dir() and (path / name).is_file():
        return path / name
    if path.is_dir() or path.suffix.lower() not in (".csv", ".tsv", ".txt"):
        kind = "a folder without " + name if path.is_dir() else f"a file {path.suffix or 'without suffix'}"
        raise ConfigError(
            f"The {what} are neither a table nor label maps; boxes cannot be evaluated.",
            where=f"{hide_home(str(path))}: {kind}",
            fix="give a CSV with one row a case, or a folder of label maps (.nii.gz, .png, .npy); COCO files are not "
            "read by this version of medssl",
            code="predictions_not_table",
        )
    return path


def _joined(request: EvaluateRequest, path: Path, predictions: PredictionTable) -> tuple[PredictionTable, str, Path]:
    """(predictions with labels, what groups them, table of the labels)."""
    if request.reference is None and (predictions.labels_NC is None or request.target or request.group_by):
        raise ConfigError(
            "The truth is missing.",
            where=f"{hide_home(str(path))}: " + ("no column of labels" if predictions.labels_NC is None else "alone"),
            fix="pass --reference FILE, a CSV with a column of ids and the labels",
            code="reference_missing",
        )
    if request.reference is None:
        log.info("The labels are those that stand beside the predictions.")
        order = sorted(range(len(predictions)), key=lambda row: predictions.case_ids[row])
        return predictions.taken(order), "patient_id", path
    reference_path = table_at(request.reference, LABELS, "references")
    reference = read_reference(reference_path, predictions, targets=request.target, group_by=request.group_by)
    return join_reference(predictions, reference), reference.group_level, reference_path


def _decided(table: PredictionTable, thresholds: np.ndarray | None, path: Path, *, may_warn: bool) -> PredictionTable:
    """Decisions by the thresholds in force; that a table holds other ones is told."""
    predicted = decisions(table.task, table.values_NC, thresholds)
    if may_warn and predicted is not None and table.predicted_NC is not None:
        changed = int((predicted != table.predicted_NC).any(1).sum())
        if changed:
            log.warning(
                "%s: %s decided otherwise than in its pred columns, at 0.5; --threshold sets the threshold",
                hide_home(str(path)),
                counted(changed, "case"),
            )
    return replace(table, predicted_NC=predicted)


def labelled_only(table: PredictionTable) -> tuple[PredictionTable, int]:
    """The cases of which at least one label is known, and how many others there are.

    Raises:
        DataError: No label is known at all.
    """
    if table.labels_NC is None or np.isnan(table.labels_NC).all():
        raise DataError(
            "No case has a label.",
            where=f"{counted(len(table), 'case')}, classes {', '.join(table.classes)}",
            fix="give a table of labels: --labels CSV --target COL with a model, --reference CSV with predictions",
            code="labels_missing",
        )
    known = ~np.isnan(table.labels_NC).all(1)
    left_out = int((~known).sum())
    if left_out:
        log.warning("%s without a known label left out", counted(left_out, "case"))
    return table.taken(np.flatnonzero(known).tolist()), left_out


def _row(table: PredictionTable, row: int) -> Row:
    case_id = table.case_ids[row]
    return Row(case_id, table.patient_ids[row], "", None, 1, 0, case_id)
