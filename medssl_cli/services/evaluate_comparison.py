"""Two evaluations of the same cases: how far their metrics lie apart, and whether that could be chance.

Letters: N cases, C outputs, D bootstrap draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.manifest import say_some
from medssl_cli.metrics.comparison import PERMUTATION_DEFINITION, delong, paired_permutations
from medssl_cli.metrics.evaluation import (
    OVERALL,
    ClassificationTable,
    RegressionTable,
    Table,
    all_values,
    point_values,
)
from medssl_cli.metrics.intervals import bootstrap, number_groups, percentile_interval
from medssl_cli.services.evaluate_request import Scored
from medssl_cli.services.predictions import PredictionTable, read_predictions

METRICS = "metrics.json"
PREDICTIONS = "predictions.csv"
COMPARED: Mapping[str, tuple[str, ...]] = {
    "binary": ("auroc", "average_precision", "mcc", "brier"),
    "multilabel": ("macro_auroc", "macro_average_precision", "macro_mcc", "macro_brier"),
    "multiclass": ("macro_auroc", "mcc", "accuracy", "brier"),
    "regression": ("mae", "rmse", "r2", "macro_r2"),
}
"""Metrics that are tested; the first that there is stands for the whole comparison."""
METHODS = {
    "paired permutation": PERMUTATION_DEFINITION,
    "DeLong": "two-sided test of DeLong et al. 1988 for two areas of the same cases, which it takes for independent",
}
NOTE = "Several metrics are tested on the same cases; p-values are not corrected for that."
_NORMAL = 1.959963984540054
"""97.5 % of the normal distribution lie below."""


def comparison_facts(scored: Scored, folder: Path, draws: int, seed: int) -> dict[str, Any]:
    """This evaluation minus another one.

    Args:
        scored: What is evaluated.
        folder: Of the other evaluation.
        draws, seed: Of the permutation test and of the bootstrap.

    Raises:
        DataError: No evaluation there, or of other cases, labels or classes.
    """
    table = scored.table
    other, thresholds = read_evaluation(folder)
    other = _aligned(table, other, folder)
    tests = _permutations(scored, other, thresholds, draws, seed)
    first = next(iter(tests))
    if table.task == "binary":
        tests["auroc (DeLong)"] = _delong(table, other)
    return {
        "other": hide_home(str(folder)),
        "n": len(table),
        "n_groups": len(set(table.patient_ids)),
        "draws": draws,
        "seed": seed,
        "metric": first,
        **tests[first],
        "tests": tests,
        "definition": "difference: this evaluation minus the other one; its interval is that of the bootstrap, or of "
        "the normal distribution for DeLong's test",
        "methods": {test["method"]: METHODS[test["method"]] for test in tests.values()},
        "note": NOTE,
    }


def read_evaluation(folder: Path) -> tuple[PredictionTable, np.ndarray | None]:
    """(predictions with labels, thresholds) of a folder of `medssl eval`.

    Raises:
        DataError: It is none.
    """
    try:
        facts = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        task, thresholds = facts["task"], facts["thresholds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "The evaluation to compare with cannot be read.",
            where=f"{hide_home(str(folder / METRICS))}: {error}",
            fix="name the --out folder of another `medssl eval`",
            code="evaluation_missing",
        ) from error
    table = read_predictions(folder / PREDICTIONS, task)
    return table, None if thresholds is None else np.asarray(thresholds, dtype=np.float64)


def _aligned(table: PredictionTable, other: PredictionTable, folder: Path) -> PredictionTable:
    """The other predictions in the order of these.

    Raises:
        DataError: They are of other cases, classes or labels.
    """
    faults = []
    if (other.task, other.classes) != (table.task, table.classes):
        faults.append(f"{other.task} of {', '.join(other.classes)}; here {table.task} of {', '.join(table.classes)}")
    only_there, only_here = set(other.case_ids) - set(table.case_ids), set(table.case_ids) - set(other.case_ids)
    for where, names in (("there", only_there), ("here", only_here)):
        if names:
            faults.append(f"{counted(len(names), 'case')} only {where}: {say_some(sorted(names), 5)}")
    if not faults:
        place = {name: row for row, name in enumerate(other.case_ids)}
        other = other.taken([place[name] for name in table.case_ids])
        if table.labels_NC is None or other.labels_NC is None:
            raise ValueError("an evaluation without labels")
        same = (table.labels_NC == other.labels_NC) | (np.isnan(table.labels_NC) & np.isnan(other.labels_NC))
        changed = [name for name, row in zip(table.case_ids, same, strict=True) if not row.all()]
        if changed:
            faults.append(f"{counted(len(changed), 'case')} with another label: {say_some(changed, 5)}")
    if faults:
        raise DataError(
            "The two evaluations are not of the same cases.",
            where=f"{hide_home(str(folder))}\n" + "\n".join(faults),
            fix="evaluate both models on the same part with the same labels",
            code="comparison_differs",
        )
    return other


def _permutations(
    scored: Scored, other: PredictionTable, thresholds: np.ndarray | None, draws: int, seed: int
) -> dict[str, dict[str, Any]]:
    table = scored.table
    own = None if scored.thresholds is None else [float(t) for t in scored.thresholds]
    others = None if thresholds is None else [float(t) for t in thresholds]
    labels = _labels(table)
    found = paired_permutations(
        table.values_NC,
        other.values_NC,
        labels,
        table.patient_ids,
        draws,
        seed,
        task=table.task,
        thresholds_a=own,
        thresholds_b=others,
    )
    names = [name for name in COMPARED[table.task] if (OVERALL, name) in found]
    both = (_metric_table(table, own), _metric_table(other, others))
    intervals = _difference_intervals(both, names, table.patient_ids, draws, seed)
    tests = {}
    for name in names:
        test = found[OVERALL, name]
        facts = {"difference": test.difference, **intervals[name], "p": test.p, "method": "paired permutation"}
        tests[name] = {**facts, **({"reason": test.reason} if test.reason else {})}
    return tests


def _metric_table(table: PredictionTable, thresholds: Sequence[float] | None) -> Table:
    labels = _labels(table)
    if table.task == "regression":
        return RegressionTable(table.values_NC, labels, n_targets=len(table.classes))
    n_classes = len(table.classes)
    return ClassificationTable(table.values_NC, labels, task=table.task, n_classes=n_classes, thresholds=thresholds)


def _difference_intervals(
    tables: tuple[Table, Table], names: Sequence[str], groups: Sequence[str], draws: int, seed: int
) -> dict[str, dict[str, float]]:
    """Bootstrap interval of each difference, patients drawn for both runs together.

    A mean over classes takes the same classes in both: the labels alone decide for which of them a compared metric is
    defined.
    """
    _, means = point_values(tables[0])

    def differences(weights_BN: np.ndarray) -> dict[str, np.ndarray]:
        a, b = all_values(tables[0], weights_BN, means), all_values(tables[1], weights_BN, means)
        return {name: a[OVERALL, name] - b[OVERALL, name] for name in names}

    drawn = bootstrap(differences, groups, draws, seed)
    n_groups = number_groups(groups)[1]
    found = {}
    for name in names:
        interval = percentile_interval(drawn[name], n_groups)
        found[name] = {"ci_low": interval.low, "ci_high": interval.high}
    return found


def _delong(table: PredictionTable, other: PredictionTable) -> dict[str, Any]:
    found = delong(table.values_NC[:, 0], other.values_NC[:, 0], _labels(table)[:, 0])
    half = _NORMAL * found.se
    return {
        "difference": found.difference,
        "ci_low": found.difference - half,
        "ci_high": found.difference + half,
        "p": found.p,
        "method": "DeLong",
        **({"reason": "a class has fewer than two cases"} if math.isnan(found.p) else {}),
    }


def _labels(table: PredictionTable) -> np.ndarray:
    if table.labels_NC is None:
        raise ValueError("an evaluation without labels")
    return table.labels_NC
