"""Metrics within groups of cases: the values of a column, or thirds of a column of numbers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home
from medssl_cli.data.labels import read_targets
from medssl_cli.data.manifest import read_table
from medssl_cli.services.evaluate_measures import measure
from medssl_cli.services.evaluate_request import Scored

LEAST_CASES = 10
"""Smaller groups have no metrics: their intervals would span everything."""
MOST_VALUES = 8
"""A column with more different numbers is cut into thirds."""
UNKNOWN = "unknown"
NOTE = (
    "Groups are looked at one after another, so that some differ by chance alone: with 20 groups one of their 95 % "
    "intervals is expected to miss. Differences here are hints for a study of their own, not findings."
)


def subgroup_facts(scored: Scored, columns: Sequence[str], table: Path | None, draws: int, seed: int) -> dict[str, Any]:
    """Metrics of each group of each column.

    Args:
        scored: What is evaluated.
        columns: Names; each is looked for in ``table``, then in the other tables of the cases, then among what is known
            of the images.
        table: CSV given for subgroups alone.
        draws, seed: Of the bootstrap.

    Returns:
        {column: list of {value, n, n_groups, metrics}} in the order of the values.

    Raises:
        DataError: A column is nowhere to be found.
    """
    return {column: _groups(scored, case_column(scored, column, table), draws, seed) for column in columns}


def case_column(scored: Scored, column: str, table: Path | None = None) -> list[str]:
    """Text of a column for each case, empty where it is not known.

    Raises:
        DataError: The column is nowhere to be found.
    """
    tables = [*([] if table is None else [table]), *scored.tables]
    for path in dict.fromkeys(tables):
        if column in read_table(path).header:
            cells = read_targets(path, [column], scored.rows, of_images=scored.of_images, root=scored.root)
            return [cell for (cell,) in cells]
    if column in scored.known:
        return [scored.known[column].get(case_id, "") for case_id in scored.table.case_ids]
    raise _no_column(scored, column, tables)


def _no_column(scored: Scored, column: str, tables: Sequence[Path]) -> DataError:
    names = [name for path in tables for name in read_table(path).header] + list(scored.known)
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    places = ", ".join(hide_home(str(path)) for path in tables) or "no table"
    return DataError(
        f"No table of the cases has a column {column!r}.",
        where=f"{places}; known of the cases: {', '.join(scored.known) or 'nothing'}",
        fix=f"did you mean {near[0]!r}?" if near else "pass --subgroups CSV with a column of ids and this one",
        code="column_missing",
    )


def _groups(scored: Scored, cells: Sequence[str], draws: int, seed: int) -> list[dict[str, Any]]:
    names, values = named_groups(cells)
    return [
        _group(scored, value, [i for i, name in enumerate(names) if name == value], draws, seed) for value in values
    ]


def _group(scored: Scored, value: str, places: Sequence[int], draws: int, seed: int) -> dict[str, Any]:
    table = scored.table.taken(places)
    count = {"value": value, "n": len(table), "n_groups": len(set(table.patient_ids))}
    few = len(table) < LEAST_CASES
    evaluation = measure(table, scored.thresholds, draws=0 if few else draws, seed=seed)
    metrics = evaluation.to_json()["metrics"]
    if few:
        reason = f"fewer than {LEAST_CASES} cases"
        metrics = {name: _emptied(metric, reason) for name, metric in metrics.items()}
    return {**count, "metrics": metrics, **({"reason": reason} if few else {})}


def _emptied(metric: Mapping[str, Any], reason: str) -> dict[str, Any]:
    return {**metric, "value": None, "ci_low": None, "ci_high": None, "reason": reason}


def named_groups(cells: Sequence[str]) -> tuple[list[str], list[str]]:
    """(group of each cell, groups in order): the texts themselves, or thirds of more than ``MOST_VALUES`` numbers."""
    numbers = [_number(cell) for cell in cells]
    known = sorted({number for number in numbers if not math.isnan(number)})
    texts = {cell for cell, number in zip(cells, numbers, strict=True) if cell and math.isnan(number)}
    if len(known) > MOST_VALUES and not texts:
        names, values = _thirds(numbers)
    else:
        names = [cell or UNKNOWN for cell in cells]
        values = sorted(set(names) - {UNKNOWN}, key=None if texts else lambda name: (_number(name), name))
    return names, [*values, *([UNKNOWN] if UNKNOWN in names else [])]


def _thirds(numbers: Sequence[float]) -> tuple[list[str], list[str]]:
    array = np.array(numbers)
    low, high = np.quantile(array[~np.isnan(array)], [1 / 3, 2 / 3])
    labels = [f"up to {low:.6g}", f"above {low:.6g} up to {high:.6g}", f"above {high:.6g}"]
    names = [UNKNOWN if math.isnan(n) else labels[int(n > low) + int(n > high)] for n in numbers]
    return names, [label for label in labels if label in names]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
