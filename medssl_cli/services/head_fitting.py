"""Heads of every kind from training units: logistic regression with its sweep of C, nearest neighbours, or steps.

Letters: U units, P width, C outputs, K classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from medssl_cli.core.wording import counted
from medssl_cli.metrics.classification import Score, binary_auc, c_grid, fit_logistic, mcc, multiclass_auc
from medssl_cli.models.feature_heads import NeighbourHead, VectorHead
from medssl_cli.services.head import form_of
from medssl_cli.services.head_config import HeadConfig, Selection
from medssl_cli.services.head_examples import Examples
from medssl_cli.services.head_targets import Targets
from medssl_cli.services.head_training import (
    HeadLoss,
    Trained,
    choose_selection,
    class_weights,
    macro_auroc,
    per_class_auroc,
    ranking,
    selection_score,
    train_stepwise,
    unit_logits,
)

log = logging.getLogger(__name__)

_SMOOTHING = 0.5
"""Cases of each kind that are added where a label has one value only: its probability is near, not at, 0 or 1."""


def fit_head(
    train: Examples,
    val: Examples | None,
    targets: Targets,
    config: HeadConfig,
    *,
    seed: int,
    device: torch.device,
) -> Trained:
    """Train the kind of head that the settings name; it learns from the training part alone.

    Args:
        train: What it learns from.
        val: What chooses C or the epoch.
        targets: Its outputs.
        config: Settings.
        seed: Of start, order and dropout.
        device: Of the steps.

    Raises:
        NonFiniteError: A loss is not finite.
    """
    kind = config.kind(targets.task)
    if kind == "logistic":
        return fit_logistic_head(train, val, targets, config)
    if kind == "knn":
        return _neighbours(train, val, targets, config)
    return train_stepwise(kind, train, val, targets, config, seed=seed, device=device)


# --- logistic regression ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Linear:
    """One or more rows of a linear layer, on vectors as they are.

    Args:
        weight_CP, bias_C: Of the layer.
        c: Inverse strength of the penalty.
        sweep: (C, score) of each value tried.
    """

    weight_CP: np.ndarray
    bias_C: np.ndarray
    c: float
    sweep: tuple[tuple[float, float], ...]


def fit_logistic_head(train: Examples, val: Examples | None, targets: Targets, config: HeadConfig) -> Trained:
    """L2 logistic regression on standardised vectors as one linear layer: softmax of classes, or one for each label."""
    criterion = choose_selection(config, targets, None if val is None else val.labels_UL)
    weights = _weights(targets, train, config)
    candidates = c_grid(config.c_values) if config.c_values > 1 and val is not None else np.ones(1)
    parts = [
        _fit_column(train, val, targets, column, candidates, criterion, weights)
        for column in range(train.labels_UL.shape[1])
    ]
    module = _as_module(parts)
    trained = Trained(module, module, criterion, math.nan, 0)
    trained.c_of, trained.sweep = tuple(part.c for part in parts), tuple(part.sweep for part in parts)
    _judge(trained, train, val, targets, weights)
    log.info("Logistic regression, C = %s", ", ".join(f"{c:.3g}" for c in trained.c_of))
    return trained


def refit_logistic_head(
    trained: Trained, train: Examples, val: Examples, targets: Targets, config: HeadConfig
) -> nn.Module:
    """The head fitted to training and validation units together, with the C that validation chose."""
    both = joined(train, val)
    weights = _weights(targets, both, config)
    parts = [
        _fit_column(both, None, targets, column, np.array([c]), None, weights) for column, c in enumerate(trained.c_of)
    ]
    return _as_module(parts)


def _weights(targets: Targets, train: Examples, config: HeadConfig) -> np.ndarray | None:
    if not config.weights_classes(targets.task):
        return None
    return class_weights(targets, train.labels_UL, config.max_pos_weight)


def joined(train: Examples, val: Examples) -> Examples:
    """Units of both parts."""
    return replace(
        train,
        rows_RP=np.concatenate([train.rows_RP, val.rows_RP]),
        stops_U=np.concatenate([train.stops_U, val.stops_U + len(train.rows_RP)]),
        labels_UL=np.concatenate([train.labels_UL, val.labels_UL]),
        case_U=np.concatenate([train.case_U, val.case_U + len(train.case_ids)]),
        is_plain_U=np.concatenate([train.is_plain_U, val.is_plain_U]),
        case_ids=train.case_ids + val.case_ids,
        patient_ids=train.patient_ids + val.patient_ids,
        labels_BL=np.concatenate([train.labels_BL, val.labels_BL]),
    )


def _fit_column(
    train: Examples,
    val: Examples | None,
    targets: Targets,
    column: int,
    candidates: np.ndarray,
    criterion: Selection | None,
    weights_C: np.ndarray | None,
) -> _Linear:
    """One label, or all classes of a multiclass task."""
    n_classes = targets.outputs if targets.task == "multiclass" else 2
    rows, labels = _known(train, column)
    if len(np.unique(labels)) < 2:  # of one label among several: told as it was seen
        positives = float(labels.sum())
        odds = (positives + _SMOOTHING) / (len(labels) - positives + _SMOOTHING)
        return _Linear(np.zeros((1, rows.shape[1])), np.array([math.log(odds)]), 1.0, ())
    weight = None
    if weights_C is not None:
        weight = dict(enumerate(weights_C)) if targets.task == "multiclass" else {0: 1.0, 1: float(weights_C[column])}
    c = float(candidates[0])
    sweep: tuple[tuple[float, float], ...] = ()
    if len(candidates) > 1 and val is not None and criterion is not None:
        held_rows, held_labels = _known(val, column)
        chosen = fit_logistic(
            np.concatenate([rows, held_rows]),
            np.concatenate([labels, held_labels]),
            n_classes,
            held_N=np.arange(len(rows) + len(held_rows)) >= len(rows),
            c_values=candidates,
            score=_score_of(criterion, n_classes),
            class_weight=weight,
        )
        c, sweep = chosen.c, chosen.sweep
    elif len(candidates) > 1:
        c = 1.0
    probe = fit_logistic(rows, labels, n_classes, c_values=(c,), class_weight=weight)
    if not probe.converged:
        log.warning("Logistic regression had not converged with C = %.3g", c)
    weight_KP = probe.coefficients_KD / probe.scale_D
    bias_K = probe.intercepts_K - weight_KP @ probe.mean_D
    if targets.task != "multiclass":  # a sigmoid is the difference of two classes
        weight_KP, bias_K = weight_KP[1:] - weight_KP[:1], bias_K[1:] - bias_K[:1]
    return _Linear(weight_KP, bias_K, c, sweep)


def _known(part: Examples, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and classes of the units whose label is known."""
    known = ~np.isnan(part.labels_UL[:, column])
    return part.rows_RP[known], part.labels_UL[known, column].astype(int)


def _score_of(criterion: Selection, n_classes: int) -> Score:
    """What C is chosen by."""
    if criterion == "mcc":
        return lambda p, y: mcc(p.argmax(1), y)
    if criterion == "loss":
        return lambda p, y: float(np.log(np.maximum(p[np.arange(len(y)), y], 1e-300)).mean()) if len(y) else math.nan
    return binary_auc if n_classes == 2 else lambda p, y: multiclass_auc(p, y).value


def _as_module(parts: Sequence[_Linear]) -> VectorHead:
    weight = np.concatenate([part.weight_CP for part in parts])
    module = VectorHead(weight.shape[1], len(weight), hidden_dim=0)
    with torch.no_grad():
        module.last.weight.copy_(torch.from_numpy(weight))
        module.last.bias.copy_(torch.from_numpy(np.concatenate([part.bias_C for part in parts])))
    return module.eval()


# --- nearest neighbours ----------------------------------------------------------------------------------------------


def _neighbours(train: Examples, val: Examples | None, targets: Targets, config: HeadConfig) -> Trained:
    """The training units themselves; nothing is chosen."""
    votes = targets.one_hot(targets.trained_on(train.labels_UL))
    rows = torch.from_numpy(np.array(train.rows_RP))
    module = NeighbourHead(rows, torch.from_numpy(votes), config.knn_k, form_of(targets.task)).eval()
    criterion = choose_selection(config, targets, None if val is None else val.labels_UL)
    trained = Trained(module, module, criterion, math.nan, 0)
    _judge(trained, train, val, targets, None)
    log.info("Nearest neighbours: %s are kept", counted(len(rows), "training vector"))
    return trained


def _judge(
    trained: Trained, train: Examples, val: Examples | None, targets: Targets, weights_C: np.ndarray | None
) -> None:
    """The one entry of the history, and the score, of a head that was fitted at once."""
    weights = None if weights_C is None else torch.tensor(weights_C)
    loss = HeadLoss(targets.task, weights)
    entry: dict[str, object] = {"epoch": 0}
    for name, part in (("train", train), ("val", val)):
        if part is None:
            continue
        labels = targets.trained_on(part.labels_UL)
        logits = unit_logits(trained.module, part)
        value = float(loss(torch.from_numpy(logits), torch.from_numpy(labels)))
        entry[f"{name}_loss"] = value
        if name == "val":
            entry["val_macro_auroc"] = macro_auroc(ranking(logits, targets), part.labels_UL, targets)
            entry["val_per_class_auroc"] = per_class_auroc(ranking(logits, targets), part.labels_UL, targets)
            assert trained.criterion is not None
            trained.score = selection_score(trained.criterion, logits, part.labels_UL, targets, value)
    trained.history = [entry]
