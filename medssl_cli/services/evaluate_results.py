"""The folder of an evaluation: ``metrics.json``, tables of its cases, ``probs.npy`` and ``report.html``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.run import atomic_path, say_disk_errors, write_csv, write_failures, write_json
from medssl_cli.metrics.curves import confusion, pr_points, reliability_bins, roc_points
from medssl_cli.report import eval_plots
from medssl_cli.report.eval_page import EvalPictures, eval_page
from medssl_cli.services.evaluate_measures import case_losses, is_right, truth_and_decision
from medssl_cli.services.evaluate_missing import CSV_HEADER, csv_rows
from medssl_cli.services.evaluate_request import Scored
from medssl_cli.services.predictions import PredictionTable, number_text, prediction_columns, write_predictions

METRICS = "metrics.json"
RESULT_FILES = (
    *("failures.csv", "missing_sequences.csv", "per_case.csv", "predictions.csv", "probs.npy", "report.html"),
    *("per_image.csv", "lesions.csv"),
    METRICS,
)  # fmt: skip
MOST_CURVES = 12
"""Curves in one picture; of more classes those with the most cases are drawn."""


def write_results(folder: Path, scored: Scored, facts: Mapping[str, Any]) -> None:
    """Write every file; nobody sees ``folder`` yet."""
    table = scored.table
    write_predictions(folder / "predictions.csv", table)
    _write_per_case(folder / "per_case.csv", table)
    with atomic_path(folder / "probs.npy") as path, path.open("wb") as file:
        np.save(file, table.values_NC.astype(np.float32), allow_pickle=False)
    if facts["missing_sequences"] is not None:
        write_csv(folder / "missing_sequences.csv", CSV_HEADER, csv_rows(facts["missing_sequences"]))
    write_failures(folder / "failures.csv", scored.failures)
    eval_page(facts, draw_pictures(scored, facts)).write(folder / "report.html")
    write_json(folder / METRICS, facts)


def publish(folder: Path, out: Path) -> None:
    """Move finished results to where they belong; ``metrics.json`` goes first and comes last: it marks a whole set."""
    with say_disk_errors(out):
        for name in reversed(RESULT_FILES):
            (out / name).unlink(missing_ok=True)
        for name in RESULT_FILES:
            if (folder / name).is_file():
                os.replace(folder / name, out / name)


def _write_per_case(path: Path, table: PredictionTable) -> None:
    """The predictions with how far off each case is."""
    columns = [*prediction_columns(table), ("loss", [number_text(loss) for loss in case_losses(table)])]
    if table.task == "regression" and table.labels_NC is not None:
        for c, name in enumerate(table.classes):
            errors = table.values_NC[:, c] - table.labels_NC[:, c]
            columns.append((f"error_{name}", [number_text(error) for error in errors]))
    right = is_right(table)
    if right is not None:
        columns.append(("correct", [int(value) for value in right]))
    write_csv(path, [name for name, _ in columns], zip(*(cells for _, cells in columns), strict=True))


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_pictures(scored: Scored, facts: Mapping[str, Any]) -> EvalPictures:
    """PNG bytes by name, of what can be drawn of these predictions."""
    table = scored.table
    if table.task == "regression":
        return _regression_pictures(table)
    shown = _shown_classes(table)
    pictures = {}
    pairs = {table.classes[c]: _known_pair(table, c) for c in shown}
    both = {name: pair for name, pair in pairs.items() if 0 < pair[1].sum() < len(pair[1])}
    if both:
        aurocs = {name: facts["per_class"][name]["auroc"] for name in both}
        precisions = {name: facts["per_class"][name]["average_precision"] for name in both}
        pictures["roc"] = eval_plots.draw_roc({n: (*roc_points(*both[n])[:2], _said(aurocs[n])) for n in both})
        pictures["pr"] = eval_plots.draw_pr(
            {name: (*pr_points(*both[name])[:2], _said(precisions[name])) for name in both},
            {name: float(labels.mean()) for name, (_, labels) in both.items()},
        )
    pictures["calibration"] = eval_plots.draw_calibration({n: reliability_bins(*pair) for n, pair in pairs.items()})
    pictures["histogram"] = eval_plots.draw_score_histogram(
        {table.classes[c]: (*pairs[table.classes[c]], _threshold(scored, c)) for c in shown}
    )
    matrix = _confusion(table)
    if matrix is not None:
        pictures["confusion"] = eval_plots.draw_confusion(*matrix)
    return pictures


def _regression_pictures(table: PredictionTable) -> EvalPictures:
    values = {}
    for c, name in enumerate(table.classes[:MOST_CURVES]):
        labels = _labels(table)[:, c]
        known = ~np.isnan(labels)
        values[name] = (table.values_NC[known, c], labels[known])
    values = {name: pair for name, pair in values.items() if len(pair[0])}
    return {"scatter": eval_plots.draw_scatter(values), "bland_altman": eval_plots.draw_bland_altman(values)}


def _shown_classes(table: PredictionTable) -> list[int]:
    """Places of the classes that are drawn, all or those with the most positive cases, in their order."""
    counts = [_known_pair(table, c)[1].sum() for c in range(len(table.classes))]
    return sorted(sorted(range(len(counts)), key=lambda c: (-counts[c], c))[:MOST_CURVES])


def _known_pair(table: PredictionTable, c: int) -> tuple[np.ndarray, np.ndarray]:
    """(probability, label 0 or 1) of the cases of which a class is known."""
    labels, _ = truth_and_decision(table, c)
    known = ~np.isnan(labels)
    return table.values_NC[known, c], labels[known]


def _said(metric: Mapping[str, Any]) -> str:
    """``0.91 (0.85 to 0.95)``."""
    if metric["value"] is None:
        return "undefined"
    interval = "" if metric["ci_low"] is None else f" ({metric['ci_low']:.2f} to {metric['ci_high']:.2f})"
    return f"{metric['value']:.2f}{interval}"


def _threshold(scored: Scored, c: int) -> float | None:
    return None if scored.thresholds is None else float(scored.thresholds[c])


def _confusion(table: PredictionTable) -> tuple[np.ndarray, Sequence[str]] | None:
    """Counts of decision against truth; None for labels that do not exclude one another."""
    predicted = table.predicted_NC
    if predicted is None or table.task == "multilabel":
        return None
    labels = _labels(table)[:, 0]
    known = ~np.isnan(labels)
    names = table.classes if table.task == "multiclass" else (f"not {table.classes[0]}", table.classes[0])
    return confusion(predicted[known, 0], labels[known].astype(int), len(names)), names


def _labels(table: PredictionTable) -> np.ndarray:
    if table.labels_NC is None:
        raise ValueError("a table without labels cannot be drawn")
    return table.labels_NC
