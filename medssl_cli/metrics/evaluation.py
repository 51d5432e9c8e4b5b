"""The metrics of a prediction table, each with an interval over patients, the number of cases and its definition.

One function serves validation and test, so that one name is one quantity. A metric that is not defined is NaN with a
reason; a macro mean runs over the classes for which its metric is defined, and names those it leaves out.
Letters: N cases, C outputs (classes or labels), T targets, B draws of a block, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from medssl_cli.metrics import binary, multiclass, regression
from medssl_cli.metrics.binary import BinaryScores
from medssl_cli.metrics.intervals import DEFINITION as INTERVAL
from medssl_cli.metrics.intervals import DRAWS, bootstrap, number_groups, percentile_interval
from medssl_cli.metrics.multiclass import MulticlassScores
from medssl_cli.metrics.regression import RegressionScores

Task = Literal["binary", "multiclass", "multilabel"]
Key = tuple[int, str]
"""A metric of one class, or of all with ``OVERALL``."""

OVERALL = -1
THRESHOLD = 0.5
_COUNTS = ("n_positives",)
_OF_LABELS = tuple(name for name in binary.DEFINITIONS if name not in ("prevalence", "n_positives"))
_OF_CLASSES = ("auroc", "average_precision", "f1", "specificity", "ppv")
_MEANS: Mapping[str, Mapping[str, str]] = {
    "binary": {},
    "multilabel": {f"macro_{name}": name for name in _OF_LABELS},
    "multiclass": {**{f"macro_{name}": name for name in _OF_CLASSES}, "balanced_accuracy": "sensitivity"},
}
"""Metrics over all classes that are the mean of a metric of each class."""


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Args:
        value: NaN where it is not defined.
        ci_low, ci_high: Ends of the 95 % interval; NaN where there is none.
        definition: What it is, in words.
        n: Cases whose label is known.
        n_groups: Patients among them.
        reason: Why the value or its interval is NaN, or which classes a mean leaves out.
    """

    value: float
    ci_low: float
    ci_high: float
    definition: str
    n: int
    n_groups: int
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN as None, ``reason`` only if there is one."""
        numbers = {"value": self.value, "ci_low": self.ci_low, "ci_high": self.ci_high}
        facts = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        rest = {"definition": self.definition, "n": self.n, "n_groups": self.n_groups}
        return {**facts, **rest, **({"reason": self.reason} if self.reason else {})}


@dataclass(frozen=True)
class Evaluation:
    """All metrics of one table.

    Args:
        metrics: Of the task as a whole by name; means over classes are called ``macro_…``.
        per_class: Class, label or target -> its own metrics, against all other classes.
        undefined_classes: Those without a positive or without a negative case (regression: without a spread of
            references): their AUROC (R2) is not defined.
        num_defined: Classes for which it is.
        n: Cases with at least one known label.
        n_groups: Patients among them.
        draws, seed: Of the bootstrap.
    """

    metrics: dict[str, Metric]
    per_class: dict[str, dict[str, Metric]]
    undefined_classes: tuple[str, ...]
    num_defined: int
    n: int
    n_groups: int
    draws: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain data for a strict JSON file."""
        return {
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "per_class": {
                label: {name: metric.to_json() for name, metric in metrics.items()}
                for label, metrics in self.per_class.items()
            },
            "undefined_classes": list(self.undefined_classes),
            "num_defined": self.num_defined,
            "n": self.n,
            "n_groups": self.n_groups,
            "interval": INTERVAL,
            "draws": self.draws,
            "seed": self.seed,
        }


def evaluate_classification(
    probabilities_NC: np.ndarray,
    labels_NC: np.ndarray,
    *,
    task: Task,
    classes: Sequence[str],
    groups: Sequence[str],
    thresholds: Sequence[float] | None = None,
    draws: int = DRAWS,
    seed: int = 42,
) -> Evaluation:
    """Every metric of classes or labels, with intervals over groups.

    Args:
        probabilities_NC: (N, C); binary also (N,).
        labels_NC: Binary and multilabel (N, C) of 0, 1 and NaN for unknown; multiclass (N,) or (N, 1) of class
            numbers, NaN for unknown.
        task: Binary has one output, the probability of the positive class.
        classes: C names.
        groups: N names, as a rule of patients.
        thresholds: One for each class, 0.5 each if not given; a case at the threshold is positive. None for
            multiclass, where the most probable class is the decision.
        draws: Of the bootstrap; 0 for none.
        seed: Of the bootstrap.

    Raises:
        ValueError: Shapes differ, or a number is no probability, label or class.
    """
    table = ClassificationTable(probabilities_NC, labels_NC, task=task, thresholds=thresholds, n_classes=len(classes))
    return _evaluation(table, classes, groups, draws, seed)


def evaluate_regression(
    predictions_NT: np.ndarray,
    references_NT: np.ndarray,
    *,
    targets: Sequence[str],
    groups: Sequence[str],
    draws: int = DRAWS,
    seed: int = 42,
) -> Evaluation:
    """Every metric of predicted numbers, with intervals over groups.

    Args:
        predictions_NT: (N, T) in the units of the targets; (N,) for one target.
        references_NT: The same, NaN for unknown.
        targets: T names.
        groups: N names, as a rule of patients.
        draws: Of the bootstrap; 0 for none.
        seed: Of the bootstrap.

    Raises:
        ValueError: Shapes differ, or a prediction is not finite.
    """
    return _evaluation(
        RegressionTable(predictions_NT, references_NT, n_targets=len(targets)), targets, groups, draws, seed
    )


# --- tables ----------------------------------------------------------------------------------------------------------


class _Column(Protocol):
    known_N: np.ndarray

    def values(self, weights_BN: np.ndarray) -> dict[str, np.ndarray]: ...

    def reason(self, name: str) -> str: ...


class Table(Protocol):
    """Predictions and labels of N cases: metrics under any weights, and what they are."""

    main: str
    """The metric that decides whether a class counts as defined."""

    @property
    def each(self) -> Sequence[_Column]:
        """The metrics of each class, label or target."""

    @property
    def means(self) -> Mapping[str, str]:
        """Metric over all classes -> the metric of each class whose mean it is."""

    def __len__(self) -> int: ...

    def values(self, weights_BN: np.ndarray) -> dict[Key, np.ndarray]:
        """Every metric of each class and of all, without the means over classes, (B,)."""

    def definition(self, key: Key) -> str:
        """What a metric is, in words."""

    def reason(self, key: Key) -> str:
        """Why a metric is not defined."""


class ClassificationTable:
    """Probabilities and labels of N cases; see ``evaluate_classification`` for the arguments.

    Args:
        thresholds: One for each class, or (N, C), one for each case and class.
    """

    main = "auroc"

    def __init__(
        self,
        probabilities_NC: np.ndarray,
        labels_NC: np.ndarray,
        *,
        task: Task,
        n_classes: int,
        thresholds: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        probabilities = _two_dimensional(probabilities_NC)
        labels = np.asarray(labels_NC, dtype=np.float64)
        labels = labels[:, 0] if task == "multiclass" and labels.ndim == 2 and labels.shape[1] == 1 else labels
        labels = labels if task == "multiclass" else _two_dimensional(labels)
        _check_classes(probabilities, labels, task, n_classes)
        self.task, self.means = task, _MEANS[task]
        self.thresholds: np.ndarray | None = None
        self.overall: MulticlassScores | None = None
        self.each: list[BinaryScores]
        if task == "multiclass":
            if thresholds is not None:
                raise ValueError("multiclass has no thresholds: the most probable class is the decision")
            self.overall = MulticlassScores(probabilities, labels)
            self.each = self.overall.each
        else:
            self.thresholds = _thresholds(thresholds, probabilities.shape)
            called = probabilities >= self.thresholds
            self.each = [BinaryScores(probabilities[:, c], labels[:, c], called[:, c]) for c in range(n_classes)]
        self.n = len(probabilities)

    def __len__(self) -> int:
        return self.n

    def values(self, weights_BN: np.ndarray) -> dict[Key, np.ndarray]:
        """Every metric of each class and of all, without the means over classes, (B,)."""
        each = [scores.values(weights_BN) for scores in self.each]
        values = {(c, name): value for c, metrics in enumerate(each) for name, value in metrics.items()}
        if self.overall is not None:
            values |= {(OVERALL, name): value for name, value in self.overall.values(weights_BN, each).items()}
        elif self.task == "binary":
            values |= {(OVERALL, name): value for name, value in each[0].items()}
        return values

    def definition(self, key: Key) -> str:
        """What a metric is, in words, with the threshold of its decisions."""
        label, name = key
        if label == OVERALL and self.overall is not None and name in multiclass.DEFINITIONS:
            return multiclass.DEFINITIONS[name]
        is_mean = label == OVERALL and name in self.means
        alone = self.means[name] if is_mean else name
        text = f"mean over classes of: {binary.DEFINITIONS[alone]}" if is_mean else binary.DEFINITIONS[alone]
        return f"{text}; {self._decision(label)}" if alone in binary.DECIDED else text

    def _decision(self, label: int) -> str:
        if self.thresholds is None:
            return "decision: the most probable class"
        own = self.thresholds if label == OVERALL else self.thresholds[..., label]
        values = np.unique(own)
        threshold = f"{values[0]:.6g}" if len(values) == 1 else "the threshold of the class"
        return f"positive: probability >= {threshold}"

    def reason(self, key: Key) -> str:
        """Why a metric is not defined."""
        label, name = key
        if label == OVERALL and self.overall is not None:
            return self.overall.reason(name)
        return self.each[max(label, 0)].reason(name)


class RegressionTable:
    """Predicted numbers and references of N cases; see ``evaluate_regression`` for the arguments."""

    main = "r2"

    def __init__(self, predictions_NT: np.ndarray, references_NT: np.ndarray, *, n_targets: int) -> None:
        predictions, references = _two_dimensional(predictions_NT), _two_dimensional(references_NT)
        if predictions.shape != references.shape or predictions.shape[1] != n_targets:
            raise ValueError(f"predictions {predictions.shape}, references {references.shape}, {n_targets} targets")
        if not np.isfinite(predictions).all() or np.isinf(references).any():
            raise ValueError("a prediction or reference is not finite")
        self.each = [RegressionScores(predictions[:, t], references[:, t]) for t in range(n_targets)]
        self.means = {f"macro_{name}": name for name in regression.UNITLESS} if n_targets > 1 else {}
        self.n = len(predictions)

    def __len__(self) -> int:
        return self.n

    def values(self, weights_BN: np.ndarray) -> dict[Key, np.ndarray]:
        """Every metric of each target; of all only if there is one target, (B,)."""
        each = [scores.values(weights_BN) for scores in self.each]
        values = {(t, name): value for t, metrics in enumerate(each) for name, value in metrics.items()}
        if len(each) == 1:
            values |= {(OVERALL, name): value for name, value in each[0].items()}
        return values

    def definition(self, key: Key) -> str:
        """What a metric is, in words."""
        if key[0] == OVERALL and key[1] in self.means:
            return f"mean over targets of: {regression.DEFINITIONS[self.means[key[1]]]}"
        return regression.DEFINITIONS[key[1]]

    def reason(self, key: Key) -> str:
        """Why a metric is not defined."""
        return self.each[max(key[0], 0)].reason(key[1])


def _two_dimensional(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    return values[:, None] if values.ndim == 1 else values


def _check_classes(probabilities_NC: np.ndarray, labels: np.ndarray, task: str, n_classes: int) -> None:
    if task not in _MEANS:
        raise ValueError(f"task {task!r} is none of {', '.join(_MEANS)}")
    if probabilities_NC.shape[1:] != (n_classes,) or (task == "binary" and n_classes != 1):
        raise ValueError(f"probabilities {probabilities_NC.shape} are not (N, {n_classes}) of task {task}")
    shape = probabilities_NC.shape[:1] if task == "multiclass" else probabilities_NC.shape
    if labels.shape != shape:
        raise ValueError(f"labels {labels.shape} do not fit probabilities {probabilities_NC.shape} of task {task}")
    if not ((probabilities_NC >= -1e-6) & (probabilities_NC <= 1 + 1e-6)).all():
        raise ValueError("a probability is not in [0, 1]")
    allowed = range(n_classes) if task == "multiclass" else (0, 1)
    if not np.isin(labels[~np.isnan(labels)], list(allowed)).all():
        raise ValueError(f"a label is none of {list(allowed)} and not NaN")


def _thresholds(thresholds: Sequence[float] | np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """(C,) or (N, C)."""
    values = np.full(shape[1], THRESHOLD) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    if values.shape not in (shape, shape[1:]):
        raise ValueError(f"{values.shape} thresholds for {shape[1]} classes")
    return values


# --- from a table to metrics -----------------------------------------------------------------------------------------


def all_values(table: Table, weights_BN: np.ndarray, averaged: Mapping[str, Sequence[int]]) -> dict[Key, np.ndarray]:
    """Every metric of a table, (B,), with means over given classes.

    A mean is NaN in a draw in which one of its classes is not defined: over fewer classes it is another quantity.
    """
    values = table.values(weights_BN)
    for name, classes in averaged.items():
        parts = [values[c, table.means[name]] for c in classes]
        values[OVERALL, name] = np.mean(parts, axis=0) if parts else np.full(len(weights_BN), math.nan)
    return values


def point_values(table: Table) -> tuple[dict[Key, float], dict[str, tuple[int, ...]]]:
    """Every metric with each case counted once, and for each mean the classes for which its metric is defined."""
    weights = np.ones((1, len(table)))
    alone = table.values(weights)
    averaged = {
        name: tuple(c for c in range(len(table.each)) if not np.isnan(alone[c, metric][0]))
        for name, metric in table.means.items()
    }
    return {key: float(value[0]) for key, value in all_values(table, weights, averaged).items()}, averaged


def _evaluation(table: Table, classes: Sequence[str], groups: Sequence[str], draws: int, seed: int) -> Evaluation:
    if len(groups) != len(table):
        raise ValueError(f"{len(groups)} groups for {len(table)} cases")
    point, averaged = point_values(table)
    numbers, n_groups = number_groups(groups)
    counts = [_counts(column.known_N, numbers) for column in table.each]
    known_N = np.any([column.known_N for column in table.each], axis=0)
    count = _counts(known_N, numbers)
    drawn: dict[Key, np.ndarray] = {}
    if draws and n_groups > 1:
        drawn = bootstrap(lambda weights: all_values(table, weights, averaged), groups, draws, seed)
    metrics: dict[Key, Metric] = {}
    for key, value in point.items():
        n = count if key[0] == OVERALL else counts[key[0]]
        reason = _reason(table, key, value, classes, averaged)
        metric = Metric(value, math.nan, math.nan, table.definition(key), *n, reason)
        metrics[key] = _with_interval(metric, key, drawn.get(key), draws)
    undefined = tuple(name for c, name in enumerate(classes) if math.isnan(point[c, table.main]))
    return Evaluation(
        metrics={name: metric for (c, name), metric in metrics.items() if c == OVERALL},
        per_class={
            label: {name: metric for (c, name), metric in metrics.items() if c == number}
            for number, label in enumerate(classes)
        },
        undefined_classes=undefined,
        num_defined=len(classes) - len(undefined),
        n=count[0],
        n_groups=count[1],
        draws=draws,
        seed=seed,
    )


def _counts(known_N: np.ndarray, numbers_N: np.ndarray) -> tuple[int, int]:
    return int(known_N.sum()), len(np.unique(numbers_N[known_N]))


def _reason(table: Table, key: Key, value: float, classes: Sequence[str], averaged: Mapping[str, Sequence[int]]) -> str:
    """Why a metric is not defined, or which classes its mean leaves out."""
    label, name = key
    if label == OVERALL and name in averaged:
        left_out = [text for c, text in enumerate(classes) if c not in averaged[name]]
        return f"not defined for {', '.join(left_out)}" if left_out else ""
    return table.reason(key) if math.isnan(value) else ""


def _with_interval(metric: Metric, key: Key, values_D: np.ndarray | None, draws: int) -> Metric:
    if math.isnan(metric.value):
        return metric
    if key[1] in _COUNTS:
        interval_reason = "no interval: a count"
    elif not draws:
        interval_reason = "no interval: no bootstrap draws were asked for"
    else:
        values = np.zeros(0) if values_D is None else values_D
        low, high, interval_reason = percentile_interval(values, metric.n_groups)
        metric = replace(metric, ci_low=low, ci_high=high)
    return replace(metric, reason="; ".join(text for text in (metric.reason, interval_reason) if text))
