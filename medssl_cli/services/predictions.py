"""The table of predictions, ``predictions.csv``: written by ``eval`` and by ``infer`` over several cases, read by
``eval``.

Columns: ``case_id, patient_id, split``, then for each class ``label_<class>`` (where labels are known),
``prob_<class>`` and ``pred_<class>``. Exclusive classes have one ``label`` and one ``pred`` with names of classes;
predicted numbers have ``label_<target>`` and ``value_<target>``. Numbers are read back to the same bits.

Letters: N cases, C classes, labels or targets.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import hide_home, write_csv
from medssl_cli.core.wording import counted
from medssl_cli.data.manifest import (
    ID_ALIASES,
    PATH_ALIASES,
    PATIENT_ALIASES,
    SERIES_ALIASES,
    STUDY_ALIASES,
    Table,
    label_id_column,
    nearest_id,
    read_table,
    say_some,
)

log = logging.getLogger(__name__)

Task = Literal["binary", "multiclass", "multilabel", "regression"]
TASKS: tuple[Task, ...] = ("binary", "multiclass", "multilabel", "regression")
SCORE_ALIASES = ("probability", "prob", "score", "p")
"""Columns that hold the one probability of a table without ``prob_<class>``."""
LABEL_ALIASES = ("label", "reference", "target", "class", "y")
"""Columns that hold the one label of a case."""
ANY = ("any", "label_any")
"""Names of the label that means: any of the others (RSNA 2019)."""
_UNKNOWN = ("", "nan", "na", "n/a", "none", "null")
_SUM_TOLERANCE = 0.01  # of the probabilities of exclusive classes: tables are often rounded to two digits
_YES, _NO = ("1", "true", "yes", "positive"), ("0", "false", "no", "negative")


@dataclass(frozen=True)
class PredictionTable:
    """What was predicted of each case, and what is true where that is known.

    Args:
        task: What the columns mean.
        classes: C names; one for ``binary``.
        case_ids: N, without repeats.
        patient_ids: N; the case itself where no patient is known.
        splits: N, empty where unknown.
        values_NC: Probabilities, or predicted values in the units of the targets, float64.
        predicted_NC: Decisions: 0 or 1 for each class, (N, 1) places of classes for ``multiclass``, None for numbers.
        labels_NC: Truth, NaN where unknown; (N, 1) places of classes for ``multiclass``; None where nothing is known.
    """

    task: Task
    classes: tuple[str, ...]
    case_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    splits: tuple[str, ...]
    values_NC: np.ndarray
    predicted_NC: np.ndarray | None
    labels_NC: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.case_ids)

    def taken(self, places: Sequence[int]) -> PredictionTable:
        """The table with these rows, in this order."""
        rows = np.asarray(places, dtype=int)

        def names(cells: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(cells[i] for i in rows)

        return replace(
            self,
            case_ids=names(self.case_ids),
            patient_ids=names(self.patient_ids),
            splits=names(self.splits),
            values_NC=self.values_NC[rows],
            predicted_NC=None if self.predicted_NC is None else self.predicted_NC[rows],
            labels_NC=None if self.labels_NC is None else self.labels_NC[rows],
        )


def prediction_table(
    task: Task,
    classes: Sequence[str],
    case_ids: Sequence[str],
    values_NC: np.ndarray,
    *,
    thresholds: Sequence[float] | np.ndarray | None = None,
    patient_ids: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    labels_NC: np.ndarray | None = None,
) -> PredictionTable:
    """A table with its decisions made.

    Args:
        task: As ``PredictionTable``.
        classes: C names.
        case_ids: N ids.
        values_NC: Probabilities, or values.
        thresholds: One for each class of ``binary`` and ``multilabel``; 0.5 if not given.
        patient_ids: N; the cases themselves if not given.
        splits: N; empty if not given.
        labels_NC: Truth, as ``PredictionTable``.
    """
    values = np.asarray(values_NC, dtype=np.float64).reshape(len(case_ids), -1)
    if values.shape[1] != len(classes):
        raise ValueError(f"values {values.shape} do not fit {len(classes)} classes")
    return PredictionTable(
        task,
        tuple(classes),
        tuple(case_ids),
        tuple(case_ids if patient_ids is None else patient_ids),
        tuple([""] * len(case_ids) if splits is None else splits),
        values,
        decisions(task, values, thresholds),
        None if labels_NC is None else np.asarray(labels_NC, dtype=np.float64).reshape(len(case_ids), -1),
    )


def decisions(
    task: Task, values_NC: np.ndarray, thresholds: Sequence[float] | np.ndarray | None = None
) -> np.ndarray | None:
    """What the probabilities decide: (N, C) of 0 and 1, a probability at its threshold being positive.

    Returns:
        (N, 1) places of the most probable class for ``multiclass``, the first of equals; None for ``regression``.
    """
    if task == "regression":
        return None
    if task == "multiclass":
        return values_NC.argmax(1).astype(np.int64)[:, None] if len(values_NC) else np.zeros((0, 1), np.int64)
    limits = np.full(values_NC.shape[1], 0.5) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    return (values_NC >= limits).astype(np.int64)


def any_place(classes: Sequence[str]) -> int | None:
    """Which of several labels means: any of the others; None if there is none."""
    lower = [str(name).lower() for name in classes]
    return next((lower.index(name) for name in ANY if name in lower), None)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_predictions(path: Path, table: PredictionTable) -> None:
    """Write the table whole or not at all, in the order of its rows."""
    columns = list(prediction_columns(table))
    rows = zip(*(cells for _, cells in columns), strict=True)
    write_csv(path, [name for name, _ in columns], rows)


def prediction_columns(table: PredictionTable) -> Iterable[tuple[str, Sequence[object]]]:
    """(name, cells) of each column of the table as written."""
    yield "case_id", table.case_ids
    yield "patient_id", table.patient_ids
    yield "split", table.splits
    values, labels, predicted = table.values_NC, table.labels_NC, table.predicted_NC
    if table.task == "multiclass":
        if labels is not None:
            yield "label", [_class_name(table.classes, value) for value in labels[:, 0]]
        if predicted is not None:
            yield "pred", [table.classes[int(k)] for k in predicted[:, 0]]
    elif labels is not None:
        for c, name in enumerate(table.classes):
            yield f"label_{name}", [number_text(value) for value in labels[:, c]]
    prefix = "value" if table.task == "regression" else "prob"
    for c, name in enumerate(table.classes):
        yield f"{prefix}_{name}", [number_text(value) for value in values[:, c]]
    if predicted is not None and table.task != "multiclass":
        for c, name in enumerate(table.classes):
            yield f"pred_{name}", [int(value) for value in predicted[:, c]]


def _class_name(classes: Sequence[str], place: float) -> str:
    return "" if math.isnan(place) else classes[int(place)]


def number_text(value: float) -> str:
    """The shortest text that is read back to the same number; empty for NaN."""
    value = float(value)
    if math.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_predictions(path: Path, task: Task | None = None) -> PredictionTable:
    """Read predictions, ours or of another program, with their labels where the table holds them.

    Args:
        path: CSV with a column of ids and ``prob_<class>``, ``probability``, ``score`` or ``value_<target>``.
        task: What the columns mean, where they do not tell it themselves.

    Raises:
        ConfigError: Several probabilities of which nothing tells whether they exclude one another.
        DataError: No such columns, an id twice, a cell that is no number or no probability.
    """
    table = read_table(path)
    ids = _unique_ids(table, label_id_column(table))
    task, columns = _value_columns(table, task)
    classes = tuple(columns)
    values = np.column_stack([_numbers(table, column) for column in columns.values()])
    if task != "regression":
        _check_probabilities(table, columns, values, task)
    found = prediction_table(
        task,
        classes,
        ids,
        values,
        patient_ids=patients_of(table, ids),
        splits=table.column("split") if "split" in table.header else None,
        labels_NC=_own_labels(table, task, classes),
    )
    return _with_own_decisions(table, found)


def _value_columns(table: Table, task: Task | None) -> tuple[Task, dict[str, str]]:
    """(task, column of each class) of a table of predictions."""
    named = {
        prefix: {name.removeprefix(prefix): name for name in table.header if name.startswith(prefix)}
        for prefix in ("prob_", "value_")
    }
    if named["value_"] and task in (None, "regression"):
        return "regression", named["value_"]
    if task == "regression":
        return "regression", _single(table, ("value", "prediction", *SCORE_ALIASES))
    columns = named["prob_"] or _single(table, SCORE_ALIASES)
    if len(columns) == 1:
        if task not in (None, "binary", "multilabel"):
            raise ConfigError(
                f"A table with one probability is not {task}.",
                where=f"{hide_home(str(table.path))}: {next(iter(columns.values()))}",
                fix="leave --task out, or give one prob_<class> for each class",
                code="task_mismatch",
            )
        return task or "binary", columns
    return task or _told_task(table, columns), columns


def _single(table: Table, aliases: Sequence[str]) -> dict[str, str]:
    column = table.find(aliases)
    if column is None:
        raise DataError(
            "The table holds no predictions.",
            where=f"{hide_home(str(table.path))}: {', '.join(table.header)}",
            fix=f"name its columns prob_<class>, {', '.join(SCORE_ALIASES[:3])}, or value_<target> for numbers",
            code="predictions_missing",
        )
    return {column: column}


def _told_task(table: Table, columns: Mapping[str, str]) -> Task:
    """Whether several probabilities exclude one another, as the table's other columns say."""
    if any(f"{prefix}_{name}" in table.header for prefix in ("pred", "label") for name in columns):
        return "multilabel"
    if "pred" in table.header or "label" in table.header:
        return "multiclass"
    raise ConfigError(
        "Nothing tells whether the classes of the predictions exclude one another.",
        where=f"{hide_home(str(table.path))}: {', '.join(columns.values())}",
        fix="pass --task multiclass (one class a case) or --task multilabel (several at once)",
        code="task_unknown",
    )


def _check_probabilities(table: Table, columns: Mapping[str, str], values_NC: np.ndarray, task: Task) -> None:
    wrong = np.argwhere((values_NC < 0) | (values_NC > 1))
    if len(wrong):
        row, column = wrong[0]
        raise DataError(
            "A probability lies outside 0 to 1.",
            where=f"{_place(table, row)}: {list(columns.values())[column]} = {values_NC[row, column]:.6g}",
            fix="give probabilities: put logits through a sigmoid or a softmax; or pass --task regression for numbers",
            code="probability_range",
        )
    sums = values_NC.sum(1)
    off = np.flatnonzero(np.abs(sums - 1) > _SUM_TOLERANCE)
    if task == "multiclass" and len(off):
        raise DataError(
            "The probabilities of exclusive classes do not add up to 1.",
            where=f"{_place(table, off[0])}: their sum is {sums[off[0]]:.4g}; {counted(len(off), 'row')} in all",
            fix="pass --task multilabel if a case may be of several classes",
            code="probability_sum",
        )


def _own_labels(table: Table, task: Task, classes: tuple[str, ...]) -> np.ndarray | None:
    """Labels that stand beside the predictions; None where there are none."""
    if task == "multiclass":
        has_labels = "label" in table.header
    else:
        has_labels = any(f"label_{name}" in table.header for name in classes) or (
            len(classes) == 1 and "label" in table.header
        )
    return read_label_columns(table, task, classes) if has_labels else None


def _with_own_decisions(table: Table, found: PredictionTable) -> PredictionTable:
    """The predictions with the decisions that stand in the table, which may come from other thresholds than 0.5."""
    if found.task == "regression" or found.predicted_NC is None:
        return found
    if found.task == "multiclass":
        names = ["pred"] if "pred" in table.header else []
    else:
        names = [f"pred_{name}" for name in found.classes]
    if not names or any(name not in table.header for name in names):
        return found
    if found.task == "multiclass":
        predicted = _class_places(table, "pred", found.classes)[:, None]
    else:
        predicted = np.column_stack([_numbers(table, name, may_be_unknown=True) for name in names])
    return found if np.isnan(predicted).any() else replace(found, predicted_NC=predicted.astype(np.int64))


# --- reference -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What is true of each case, from a table of its own.

    Args:
        ids: M ids, without repeats, as the predictions spell them.
        labels_MC: NaN where unknown.
        patient_ids: M; the case itself where no patient is known.
        group_level: Column or level that ``patient_ids`` come from.
        table: Everything else that it holds.
    """

    ids: tuple[str, ...]
    labels_MC: np.ndarray
    patient_ids: tuple[str, ...]
    group_level: str
    table: Table


def read_reference(
    path: Path, predictions: PredictionTable, *, targets: Sequence[str] = (), group_by: str | None = None
) -> Reference:
    """Read the truth of predicted cases.

    The column of ids is the one, among those of known names, that shares most ids with the predictions.

    Args:
        path: CSV with a column of ids and columns of labels.
        predictions: Whose classes and ids are looked for.
        targets: Columns of the labels in the order of the classes; found by name if not given.
        group_by: Column that names the patient.

    Raises:
        DataError: No column of labels, an id twice, a label that is no number or no class.
    """
    table = read_table(path)
    ids = _unique_ids(table, _shared_id_column(table, predictions.case_ids))
    labels = read_label_columns(table, predictions.task, predictions.classes, targets)
    level = group_by or table.find(PATIENT_ALIASES) or ""
    patients = tuple(table.column(level)) if level else _patients_by_id(predictions, ids)
    patients = tuple(patient or name for patient, name in zip(patients, ids, strict=True))
    return Reference(ids, labels, patients, level or "patient_id", table)


def _patients_by_id(predictions: PredictionTable, ids: Sequence[str]) -> tuple[str, ...]:
    known = dict(zip(predictions.case_ids, predictions.patient_ids, strict=True))
    return tuple(known.get(name, name) for name in ids)


def _shared_id_column(table: Table, known: Sequence[str]) -> str:
    wanted = set(known)
    aliases = ("case_id", *ID_ALIASES, *PATH_ALIASES, *SERIES_ALIASES, *STUDY_ALIASES, "case", "patient")
    candidates = [column for alias in aliases if (column := table.find((alias,))) is not None]
    shared = {column: len(wanted & set(table.column(column))) for column in dict.fromkeys(candidates)}
    best = max(shared, key=lambda column: shared[column], default="")
    return best if best and shared[best] else label_id_column(table)


def read_label_columns(table: Table, task: Task, classes: tuple[str, ...], targets: Sequence[str] = ()) -> np.ndarray:
    """Labels of a table, (N, C) of 0, 1 or values, (N, 1) places of classes for ``multiclass``; NaN where unknown.

    Raises:
        DataError: A column is missing, or a cell is no label.
    """
    columns = tuple(targets) or _label_columns(table, task, classes)
    expected = 1 if task == "multiclass" else len(classes)
    if len(columns) != expected:
        raise ConfigError(
            f"{counted(expected, 'column')} of labels, but {len(columns)} named.",
            where=f"--target {','.join(columns)}; predicted: {', '.join(classes)}",
            fix="name one column for each predicted class, in the same order",
            code="target_count",
        )
    if task == "multiclass":
        return _class_places(table, columns[0], classes)[:, None]
    if task == "regression":
        return np.column_stack([_numbers(table, column, may_be_unknown=True) for column in columns])
    return np.column_stack([_truth(table, column, name) for column, name in zip(columns, classes, strict=True)])


def _label_columns(table: Table, task: Task, classes: tuple[str, ...]) -> tuple[str, ...]:
    if task == "multiclass":
        found = table.find(LABEL_ALIASES)
        if found is not None:
            return (found,)
    named = [table.find((f"label_{name}", name)) for name in classes]
    if task != "multiclass" and all(named):
        return tuple(name for name in named if name)
    single = table.find(LABEL_ALIASES)
    if len(classes) == 1 and single is not None:
        return (single,)
    lacking = [name for name, column in zip(classes, named, strict=True) if column is None]
    raise DataError(
        "The reference has no column of labels.",
        where=f"{hide_home(str(table.path))}: {', '.join(table.header)}; sought: {say_some(lacking or classes)}",
        fix="name the columns label_<class> as the predictions name their classes, or pass --target COL[,COL]",
        code="label_missing",
    )


# --- cells -----------------------------------------------------------------------------------------------------------


def _unique_ids(table: Table, column: str) -> tuple[str, ...]:
    """The ids of a column.

    Raises:
        DataError: An empty id, an id twice, or no row at all.
    """
    ids = table.column(column)
    if not ids:
        raise DataError(
            "The table has no rows.", where=hide_home(str(table.path)), fix="give one row for each case", code="no_rows"
        )
    for row, name in enumerate(ids):
        if not name:
            raise DataError("A row has no id.", where=f"{_place(table, row)}: {column}", fix="fill it", code="id_empty")
    repeated = sorted(name for name, n in Counter(ids).items() if n > 1)
    if repeated:
        raise DataError(
            "A case stands there twice.",
            where=f"{hide_home(str(table.path))}, column {column}: {say_some(repeated)}",
            fix="keep one row for each case, or add a column case_id that tells them apart",
            code="id_duplicate",
        )
    return tuple(ids)


def patients_of(table: Table, ids: Sequence[str]) -> tuple[str, ...]:
    """Patient of each row; the id itself where none is told."""
    column = table.find(PATIENT_ALIASES)
    cells = table.column(column) if column is not None else [""] * len(ids)
    return tuple(cell or name for cell, name in zip(cells, ids, strict=True))


def _numbers(table: Table, column: str, *, may_be_unknown: bool = False) -> np.ndarray:
    """(N,) numbers of a column; NaN where a cell is empty and may be."""
    values = np.full(len(table.rows), math.nan)
    for row, cell in enumerate(table.column(column)):
        if not (may_be_unknown and cell.lower() in _UNKNOWN):
            values[row] = _number(table, row, column, cell)
    return values


def _number(table: Table, row: int, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            "A cell is no finite number.",
            where=f"{_place(table, row)}: {column} = {cell!r}",
            fix="give a number with a decimal point in every row",
            code="cell_not_number",
        )
    return value


def _truth(table: Table, column: str, name: str) -> np.ndarray:
    """(N,) of 0, 1 and NaN. The name of the class means 1; any other text in its place 0 if it is the only other."""
    cells = table.column(column)
    texts = {cell for cell in cells if cell.lower() not in _UNKNOWN}
    if name in texts and len(texts) <= 2 and not {text.lower() for text in texts} <= {*_YES, *_NO}:
        return np.array([math.nan if cell.lower() in _UNKNOWN else float(cell == name) for cell in cells])
    values = np.full(len(cells), math.nan)
    for row, cell in enumerate(cells):
        if cell.lower() in _UNKNOWN:
            continue
        if cell.lower() in _YES or cell.lower() in _NO:
            values[row] = float(cell.lower() in _YES)
            continue
        value = _number(table, row, column, cell)
        if value not in (0, 1):
            raise DataError(
                "A label of a class is neither 0 nor 1.",
                where=f"{_place(table, row)}: {column} = {cell!r}",
                fix="give 1 where the class is present, 0 where it is not, nothing where it is unknown",
                code="label_not_binary",
            )
        values[row] = value
    return values


def _class_places(table: Table, column: str, classes: tuple[str, ...]) -> np.ndarray:
    """(N,) places of class names in ``classes``; numbers are places themselves where no class has such a name."""
    by_name: dict[str, int] = {name: k for k, name in enumerate(classes)}
    if not any(name in by_name for name in map(str, range(len(classes)))):
        by_name |= {str(k): k for k in range(len(classes))}
    places = np.full(len(table.rows), math.nan)
    for row, cell in enumerate(table.column(column)):
        if cell.lower() in _UNKNOWN and cell not in by_name:
            continue
        if cell not in by_name:
            raise DataError(
                "A label is no class of the predictions.",
                where=f"{_place(table, row)}: {column} = {cell!r}; classes: {', '.join(classes)}",
                fix=f"use the names after prob_{nearest_id(cell, classes)}",
                code="label_unknown",
            )
        places[row] = by_name[cell]
    return places


def _place(table: Table, row: int | np.integer) -> str:
    return f"{hide_home(str(table.path))}, line {table.lines[int(row)]}"


# --- joining ---------------------------------------------------------------------------------------------------------


def join_reference(predictions: PredictionTable, reference: Reference) -> PredictionTable:
    """The predictions of the cases of the reference, in the order of their ids, with their labels and patients.

    Raises:
        DataError: A case of the reference has no prediction.
    """
    place = {name: row for row, name in enumerate(predictions.case_ids)}
    missing = [name for name in reference.ids if name not in place]
    if missing:
        raise DataError(
            f"{counted(len(missing), 'case')} of the reference {'has' if len(missing) == 1 else 'have'} no prediction.",
            where=f"{say_some(sorted(missing))}, of {len(reference.ids)}",
            fix="predict every case, or take cases out of the reference and say so; a missing prediction is no score",
            code="prediction_missing",
        )
    extra = sorted(set(place) - set(reference.ids))
    if extra:
        log.warning("%s without a reference left out: %s", counted(len(extra), "prediction"), say_some(extra))
    order = sorted(range(len(reference.ids)), key=lambda row: reference.ids[row])
    chosen = predictions.taken([place[reference.ids[row]] for row in order])
    patients = tuple(reference.patient_ids[row] for row in order)
    return replace(chosen, labels_NC=reference.labels_MC[order], patient_ids=patients)
