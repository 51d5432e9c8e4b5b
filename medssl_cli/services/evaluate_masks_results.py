"""The folder of an evaluation of masks: ``metrics.json``, tables of its cases and lesions, and ``report.html``."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.run import say_disk_errors, write_csv, write_failures, write_json
from medssl_cli.report import masks_plots
from medssl_cli.report.masks_page import masks_page
from medssl_cli.services.evaluate_masks_cases import COUNTS, METRICS
from medssl_cli.services.evaluate_masks_facts import UNITS, ScoredMasks
from medssl_cli.services.evaluate_masks_worst import WorstCases
from medssl_cli.services.evaluate_results import METRICS as METRICS_FILE
from medssl_cli.services.evaluate_results import RESULT_FILES
from medssl_cli.services.predictions import number_text

PREDICTIONS = "predictions"
"""Folder of label maps of a model, with --save-predictions."""
PER_IMAGE = ("name", "patient", "dice", "iou", "accuracy", "f1", "hd95", "tp", "fp", "fn")
_LESIONS = ("case_id", "patient_id", "class", "kind", "confidence", "iou")


def write_masks(folder: Path, scored: ScoredMasks, facts: Mapping[str, Any], worst: WorstCases) -> None:
    """Write every file; nobody sees ``folder`` yet."""
    write_csv(folder / "per_case.csv", ("case_id", "patient_id", "class", *METRICS, *COUNTS), _case_rows(scored))
    if scored.unit == "px":
        rows = ([_cell(row[name]) for name in PER_IMAGE] for row in facts["per_image"])
        write_csv(folder / "per_image.csv", PER_IMAGE, rows)
    if facts["lesions"] is not None:
        write_csv(folder / "lesions.csv", _LESIONS, _lesion_rows(scored))
    write_failures(folder / "failures.csv", scored.failures)
    drawn = [(case.facts, masks_plots.draw_case(case.plane)) for case in worst.cases]
    masks_page(facts, draw_plots(scored, facts), drawn).write(folder / "report.html")
    write_json(folder / METRICS_FILE, facts)


def publish_masks(folder: Path, out: Path) -> None:
    """Move finished results to where they belong; ``metrics.json`` goes first and comes last: it marks a whole set."""
    with say_disk_errors(out):
        for name in reversed(RESULT_FILES):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / PREDICTIONS, ignore_errors=True)
        for name in (PREDICTIONS, *RESULT_FILES):
            if (folder / name).exists():
                os.replace(folder / name, out / name)


def _cell(value: object) -> object:
    """A number as text; nothing for what is not defined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return number_text(value) if isinstance(value, float) else value


def _case_rows(scored: ScoredMasks) -> Iterator[list[object]]:
    for case in scored.cases:
        for s, structure in enumerate(scored.structures):
            metrics = [_cell(float(case.values[name][s])) for name in METRICS]
            counts = [int(case.values[name][s]) for name in COUNTS]
            yield [case.case_id, case.patient_id, structure, *metrics, *counts]


def _lesion_rows(scored: ScoredMasks) -> Iterator[list[object]]:
    for case in scored.cases:
        for structure, judged in zip(scored.structures, case.lesions, strict=True):
            for is_lesion, confidence, overlap in zip(
                judged.is_lesion_M, judged.confidence_M, judged.overlap_M, strict=True
            ):
                kind = "false_positive" if not is_lesion else "found" if confidence > 0 else "missed"
                told = ["", ""] if kind == "missed" else [_cell(float(confidence)), _cell(float(overlap))]
                yield [case.case_id, case.patient_id, structure, kind, *told]


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_plots(scored: ScoredMasks, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """Box plots of the cases, and the FROC curves of lesions."""
    unit = UNITS[scored.unit]
    wanted = (
        ("Dice", "dice", "Dice", (0.0, 1.0)),
        ("Surface Dice", "nsd", f"surface Dice, tolerance {scored.options.tolerance:g} {unit}", (0.0, 1.0)),
        ("HD95", "hd95", f"HD95, {unit}", None),
    )
    plots = {}
    for title, name, label, ends in wanted:
        values = scored.array(name)
        columns = {structure: values[:, s] for s, structure in enumerate(scored.structures)}
        if not np.isnan(values).all():
            plots[title] = masks_plots.draw_boxes(columns, label, ends=ends)
    if facts["lesions"] is not None:
        of_each = facts["lesions"]["per_class"]
        curves = {
            name: [(point["fp_per_case"], point["sensitivity"]) for point in found["froc"]]
            for name, found in of_each.items()
        }
        if any(curves.values()):
            plots["FROC"] = masks_plots.draw_froc(curves)
    return plots
