"""What a head is to tell: label columns become outputs, and the labels of a part the numbers that train and test it.

All that is learned from labels (which classes there are, which value is positive, the scale of a measurement) is
learned from the training part alone.

Letters: R rows, T label columns, C outputs, L columns of encoded labels (1 for exclusive classes, else C).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.wording import counted
from medssl_cli.data.manifest import say_some
from medssl_cli.services.head_config import Task
from medssl_cli.services.predictions import any_place

log = logging.getLogger(__name__)

_MOST_CLASSES = 1000


@dataclass(frozen=True)
class Targets:
    """The outputs of a head, and how labels become numbers.

    Args:
        task: Of the head.
        names: Label columns, T of them.
        classes: Names of the C outputs.
        values: Text of each value of the one column of a binary or multiclass task, in the order of the classes.
        label_values: Texts by class of each column that is not of numbers, as heads and features keep them.
        mean_T, scale_T: Of each measurement in the training part; empty for classes.
    """

    task: Task
    names: tuple[str, ...]
    classes: tuple[str, ...]
    values: tuple[str, ...] = ()
    label_values: Mapping[str, tuple[str, ...]] | None = None
    mean_T: tuple[float, ...] = ()
    scale_T: tuple[float, ...] = ()

    @property
    def outputs(self) -> int:
        """C."""
        return len(self.classes)

    def encode(self, labels_RT: np.ndarray, label_values: Mapping[str, Sequence[str]] | None = None) -> np.ndarray:
        """Labels as the metrics take them, (R, L) float64, NaN where unknown.

        Binary and multilabel: 0 and 1. Multiclass: the number of the class. Regression: the values themselves.

        Args:
            labels_RT: Columns of ``names``, numbers.
            label_values: Texts by number of the columns that are classes.

        Raises:
            DataError: A value that the training part does not have.
        """
        labels = np.asarray(labels_RT, dtype=np.float64)
        if self.task == "regression":
            return labels
        if self.task == "multilabel":
            return np.where(np.isnan(labels), np.nan, labels > 0)
        place = {text: float(number) for number, text in enumerate(self.values)}
        texts = _texts(labels[:, 0], (label_values or {}).get(self.names[0]))
        unknown = sorted({text for text in texts if text} - set(place))
        if unknown:
            raise DataError(
                "A label has a value that no training case has.",
                where=f"{self.names[0]}: {say_some(unknown)}; in training: {', '.join(self.values)}",
                fix="correct the labels, leave these cases out, or put such cases into the training part",
                code="label_unknown",
            )
        return np.array([place[text] if text else np.nan for text in texts], dtype=np.float64).reshape(-1, 1)

    def trained_on(self, labels_RL: np.ndarray) -> np.ndarray:
        """Encoded labels as the loss takes them: measurements get mean 0 and deviation 1 in the training part."""
        if self.task != "regression":
            return labels_RL
        return (labels_RL - np.asarray(self.mean_T)) / np.asarray(self.scale_T)

    def one_hot(self, labels_RL: np.ndarray) -> np.ndarray:
        """(R, C) of 0, 1 and NaN of encoded classes or labels."""
        if self.task != "multiclass":
            return labels_RL
        return np.where(np.isnan(labels_RL), np.nan, labels_RL == np.arange(self.outputs))

    def facts(self) -> dict[str, Any]:
        """The keys of ``head.json`` that tell of the outputs."""
        scaler = {"mean": list(self.mean_T), "scale": list(self.scale_T)} if self.task == "regression" else None
        return {
            "task": self.task,
            "targets": list(self.names),
            "classes": list(self.classes),
            "outputs": self.outputs,
            "class_values": list(self.values),
            "label_values": {name: list(values) for name, values in (self.label_values or {}).items()},
            "scaler": scaler,
        }


def targets_of_card(card: Mapping[str, Any]) -> Targets:
    """The targets that ``head.json`` tells of, to encode the labels of other cases as the training did."""
    scaler = card.get("scaler") or {}
    return Targets(
        task=card["task"],
        names=tuple(card["targets"]),
        classes=tuple(card["classes"]),
        values=tuple(card.get("class_values") or ()),
        label_values={name: tuple(values) for name, values in (card.get("label_values") or {}).items()},
        mean_T=tuple(scaler.get("mean") or ()),
        scale_T=tuple(scaler.get("scale") or ()),
    )


def prepare_targets(
    task: Task,
    names: Sequence[str],
    labels_RT: np.ndarray,
    label_values: Mapping[str, Sequence[str]] | None = None,
    *,
    positive: str = "",
) -> Targets:
    """Learn from the labels of the training part what the outputs are.

    Args:
        task: Of the head.
        names: Label columns.
        labels_RT: Theirs, one row a case; NaN where unknown.
        label_values: Texts by number of the columns that are classes.
        positive: Of a binary task: which value is positive.

    Raises:
        ConfigError: More columns than the task takes, or no such value as ``positive``.
        DataError: A column that the task cannot use, or that has one value only.
    """
    labels = np.asarray(labels_RT, dtype=np.float64)
    values = dict(label_values or {})
    if task in ("binary", "multiclass"):
        _refuse_several(task, names)
        return _exclusive(task, names[0], labels[:, 0], values.get(names[0]), positive)
    if task == "multilabel":
        return _multilabel(names, labels, values)
    return _measurements(names, labels, values)


def check_consistent(targets: Targets, labels_RL: np.ndarray) -> int:
    """Warn of cases whose label ``any`` is not the highest of the others; their number."""
    place = any_place(targets.names)
    if targets.task != "multilabel" or place is None or len(targets.names) < 2:
        return 0
    others_RL = np.delete(labels_RL, place, axis=1)
    known_R = ~np.isnan(labels_RL).any(axis=1)
    wrong_R = known_R & (labels_RL[:, place] != np.nanmax(np.where(known_R[:, None], others_RL, 0), axis=1))
    count = int(wrong_R.sum())
    if count:
        log.warning(
            "%s: label %r is not what the others say; both are kept as they are",
            counted(count, "row"),
            targets.names[place],
        )
    return count


def _texts(column_R: np.ndarray, values: Sequence[str] | None) -> list[str]:
    """Each label as text; empty where unknown."""
    if values is None:
        return ["" if np.isnan(value) else f"{value:g}" for value in column_R]
    return ["" if np.isnan(value) else values[int(value)] for value in column_R]


def _refuse_several(task: Task, names: Sequence[str]) -> None:
    if len(names) != 1:
        raise ConfigError(
            f"A {task} head has one target.",
            where=f"--target {','.join(names)}",
            fix="name one of them with --target, or pass --task multilabel for findings that do not exclude another",
            code="target_count",
        )


def _exclusive(task: Task, name: str, column_R: np.ndarray, values: Sequence[str] | None, positive: str) -> Targets:
    texts = {text for text in _texts(column_R, values) if text}
    found = sorted(texts) if values is not None else sorted(texts, key=float)
    if len(found) < 2 or (task == "binary" and len(found) > 2) or len(found) > _MOST_CLASSES:
        raise _wrong_values(task, name, found)
    if task == "multiclass":
        kept = {name: tuple(found)} if values is not None else {}
        return Targets(task, (name,), tuple(found), tuple(found), kept)
    if positive and positive not in found:
        raise ConfigError(
            "The target does not have the value that is to be positive.",
            where=f"positive={positive}; {name} has: {', '.join(found)}",
            fix="name one of these",
            code="positive_unknown",
        )
    if positive == found[0]:
        found.reverse()
    log.info("%s: %r is positive, %r negative", name, found[1], found[0])
    is_flag = values is None and found == ["0", "1"]
    return Targets(task, (name,), (name if is_flag else found[1],), tuple(found), _kept(name, found, values))


def _kept(name: str, found: Sequence[str], values: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    return {} if values is None else {name: tuple(found)}


def _wrong_values(task: Task, name: str, found: Sequence[str]) -> DataError:
    shown = say_some(found) if found else "no case has a label"
    if len(found) < 2:
        return DataError(
            "The target has one value only in the training part.",
            where=f"{name}: {shown}",
            fix="check the labels and the split; two classes are needed to tell them apart",
            code="target_constant",
        )
    return DataError(
        f"The target has {len(found)} different values in the training part.",
        where=f"{name}: {shown}",
        fix="name another column with --target, or pass --task multiclass for classes, --task regression for numbers",
        code="target_values",
    )


def _multilabel(names: Sequence[str], labels_RT: np.ndarray, values: Mapping[str, Sequence[str]]) -> Targets:
    many = [name for name in names if len(values.get(name, ())) > 2]
    if many:
        raise DataError(
            "A label of a multilabel task has more than two values.",
            where="; ".join(f"{name}: {say_some(list(values[name]))}" for name in many),
            fix="name findings that are there or not, one column each, or pass --task multiclass with one column",
            code="target_values",
        )
    for name, column in zip(names, labels_RT.T, strict=True):
        known = column[~np.isnan(column)]
        if not len(known) or (known > 0).all() or not (known > 0).any():
            what = "has no known label" if not len(known) else "has one value only"
            log.warning("%s %s in the training part: what the head says of it means nothing", name, what)
    if np.isnan(labels_RT).all():
        raise _wrong_values("multilabel", ", ".join(names), [])
    kept = {name: tuple(values[name]) for name in names if name in values}
    return Targets("multilabel", tuple(names), tuple(names), (), kept)


def _measurements(names: Sequence[str], labels_RT: np.ndarray, values: Mapping[str, Sequence[str]]) -> Targets:
    texts = [name for name in names if name in values]
    if texts:
        raise DataError(
            "A measurement is not a number.",
            where="; ".join(f"{name}: {say_some(list(values[name]))}" for name in texts),
            fix="pass --task multiclass for classes, or leave cells without a measurement empty",
            code="target_values",
        )
    mean, scale = [], []
    for name, column in zip(names, labels_RT.T, strict=True):
        known = column[~np.isnan(column)]
        if len(known) < 2 or known.std() <= 1e-12 * max(1e-12, float(np.abs(known).max())):
            raise _wrong_values("regression", name, [f"{value:g}" for value in sorted(set(known.tolist()))][:1])
        mean.append(float(known.mean()))
        scale.append(float(known.std()))
    return Targets("regression", tuple(names), tuple(names), mean_T=tuple(mean), scale_T=tuple(scale))
