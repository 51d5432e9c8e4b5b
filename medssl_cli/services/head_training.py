"""The short loop that trains a head step by step, and what it is scored by on the validation cases.

One criterion, fixed before the first step, chooses the epoch. Every draw is a function of the seed: start, order,
dropout; two runs give the same weights.

Letters: U units, N slices of a bag, B units of a batch, P width, C outputs, L columns of labels.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl_cli.core.errors import NonFiniteError
from medssl_cli.core.run import seed_for
from medssl_cli.metrics.classification import mcc, multiclass_auc, multilabel_auc
from medssl_cli.models.feature_heads import AttentionHead, HeadKind, VectorHead, build_head
from medssl_cli.services.head import probabilities
from medssl_cli.services.head_config import HeadConfig, Selection
from medssl_cli.services.head_examples import Examples
from medssl_cli.services.head_targets import Targets

log = logging.getLogger(__name__)

MIN_WEIGHT = 1e-2
"""Lowest weight of a class: without it positives of a label that every training case has would count for nothing."""
_BLOCK_UNITS = 4096
_SMALL_STEP = 1e8
"""Weights times units of a batch up to which a step is computed on one thread; the usual MLP has 1.3e7."""


# --- what is trained -------------------------------------------------------------------------------------------------


def class_weights(targets: Targets, labels_UL: np.ndarray, most: float) -> np.ndarray | None:
    """Weights that balance the classes, clamped to [0.01, ``most``] with a warning for each; None for measurements.

    Binary and multilabel: (C,), what a positive weighs against a negative, (N - P) / max(P, 1). Multiclass: (K,), the
    mean number of cases a class over the number of each.

    Args:
        targets: What the labels are.
        labels_UL: Encoded labels of the training units.
        most: Highest weight.
    """
    if targets.task == "regression":
        return None
    if targets.task == "multiclass":
        classes = labels_UL[~np.isnan(labels_UL[:, 0]), 0].astype(int)
        counts = np.bincount(classes, minlength=targets.outputs)
        raw = counts.sum() / targets.outputs / np.maximum(counts, 1)
    else:
        known, positives = (~np.isnan(labels_UL)).sum(0), np.nansum(labels_UL, axis=0)
        raw = (known - positives) / np.maximum(positives, 1)
    weights = np.clip(raw, MIN_WEIGHT, most)
    for name, before, after in zip(targets.classes, raw, weights, strict=True):
        if before != after:
            log.warning("%s: its weight would be %.4g and is set to %.4g", name, before, after)
    return weights


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a task, a mean over the known labels of all units and outputs.

    Binary and multilabel: cross-entropy of sigmoids, positives weighted. Multiclass: cross-entropy of the softmax,
    weighted by class. Regression: smooth L1 on standardised values.

    Args:
        task: Of the head.
        weights_C: From ``class_weights``; None for equal weights.
    """

    task: str
    weights_C: Tensor | None = None

    def __call__(self, logits_BC: Tensor, labels_BL: Tensor) -> Tensor:
        """(B, C), (B, L) -> scalar; 0 if no label is known."""
        if self.task == "multiclass":
            known_B = ~labels_BL[:, 0].isnan()
            return self._classes(logits_BC[known_B], labels_BL[known_B, 0].long())
        known_BL = ~labels_BL.isnan()
        if bool(known_BL.all()):  # the usual case, and half the work of a small step
            return self._terms(logits_BC, labels_BL, "mean")
        terms_BC = self._terms(logits_BC, labels_BL.nan_to_num(0.0), "none")
        return (terms_BC * known_BL).sum() / known_BL.sum().clamp(min=1)

    def _terms(self, logits_BC: Tensor, labels_BC: Tensor, reduction: str) -> Tensor:
        if self.task == "regression":
            return F.smooth_l1_loss(logits_BC, labels_BC, reduction=reduction)
        return F.binary_cross_entropy_with_logits(logits_BC, labels_BC, reduction=reduction, pos_weight=self.weights_C)

    def _classes(self, logits_BC: Tensor, classes_B: Tensor) -> Tensor:
        if not len(classes_B):
            return logits_BC.sum() * 0.0
        return F.cross_entropy(logits_BC, classes_B, weight=self.weights_C)


def head_loss(targets: Targets, labels_UL: np.ndarray, config: HeadConfig, device: torch.device) -> HeadLoss:
    """The loss of a task with weights from the labels of the training units."""
    weights = None
    if config.weights_classes(targets.task):
        weights = class_weights(targets, labels_UL, config.max_pos_weight)
    as_tensor = None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)
    return HeadLoss(targets.task, as_tensor)


# --- what chooses ----------------------------------------------------------------------------------------------------


def choose_selection(config: HeadConfig, targets: Targets, val_labels_UL: np.ndarray | None) -> Selection | None:
    """The criterion of the whole run, before it begins; None without validation: the last epoch is kept."""
    if val_labels_UL is None:
        return None
    if config.selection != "auto":
        return config.selection
    if targets.task == "regression":
        return "loss"
    one_hot = targets.one_hot(val_labels_UL)
    return "auroc" if any(len(np.unique(c[~np.isnan(c)])) > 1 for c in one_hot.T) else "loss"


def per_class_auroc(values_UC: np.ndarray, labels_UL: np.ndarray, targets: Targets) -> list[float]:
    """Area of each output, NaN where a class is absent; for measurements an empty list."""
    if targets.task == "regression":
        return []
    one_hot = targets.one_hot(labels_UL)
    return [multilabel_auc(values_UC[:, [c]], one_hot[:, [c]]).value for c in range(targets.outputs)]


def macro_auroc(values_UC: np.ndarray, labels_UL: np.ndarray, targets: Targets) -> float:
    """Mean area over the outputs for which it is defined; NaN if there is none."""
    if targets.task == "regression":
        return math.nan
    if targets.task == "multiclass":
        known = ~np.isnan(labels_UL[:, 0])
        return multiclass_auc(values_UC[known], labels_UL[known, 0].astype(int)).value
    return multilabel_auc(values_UC, labels_UL).value


def decided_mcc(probabilities_UC: np.ndarray, labels_UL: np.ndarray, targets: Targets) -> float:
    """Matthews correlation of the decisions at 0.5, or of the most probable class; mean over labels."""
    if targets.task == "multiclass":
        known = ~np.isnan(labels_UL[:, 0])
        return mcc(probabilities_UC[known].argmax(1), labels_UL[known, 0].astype(int))
    columns = zip(probabilities_UC.T, labels_UL.T, strict=True)
    found = [mcc((p >= 0.5)[~np.isnan(y)].astype(int), y[~np.isnan(y)].astype(int)) for p, y in columns]
    defined = [value for value in found if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def selection_score(
    criterion: Selection, logits_UC: np.ndarray, labels_UL: np.ndarray, targets: Targets, loss: float
) -> float:
    """What is to be high; NaN where it is not defined."""
    if criterion == "loss":
        return -loss
    values = probabilities(logits_UC, targets.task)
    if criterion == "mcc":
        return decided_mcc(values, labels_UL, targets)
    return macro_auroc(logits_UC if targets.task != "multiclass" else values, labels_UL, targets)


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A head after training.

    Args:
        module: As it was at the chosen epoch.
        last: As it was at the end.
        criterion: What chose; None without validation.
        score: Of the chosen epoch, higher is better; NaN without validation.
        epoch: The chosen one, from 1; for a logistic head 0.
        history: One entry an epoch.
        c_of: C of each output of a logistic head.
        sweep: (C, score) of each value tried, for each output of a logistic head.
    """

    module: nn.Module
    last: nn.Module
    criterion: Selection | None
    score: float
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    c_of: tuple[float, ...] = ()
    sweep: tuple[tuple[tuple[float, float], ...], ...] = ()


def train_stepwise(
    kind: HeadKind,
    train: Examples,
    val: Examples | None,
    targets: Targets,
    config: HeadConfig,
    *,
    seed: int,
    device: torch.device,
) -> Trained:
    """Train a linear, MLP or attention head with AdamW.

    Raises:
        NonFiniteError: A loss is not finite.
    """
    criterion = choose_selection(config, targets, None if val is None else val.labels_UL)
    loss = head_loss(targets, train.labels_UL, config, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_for(seed, "head start"))
        module = build_head(
            kind, train.rows_RP.shape[1], targets.outputs, hidden_dim=config.hidden_dim, dropout=config.dropout
        ).to(device)
        scale = _Standard.of(train, module, device)
        run = _Loop(module, _Units.of(train, targets, scale, device), loss, targets, config, seed)
        held = None if val is None else _Units.of(val, targets, scale, device)
        with _threads_for(module, config.batch_size):
            trained = run.fit(held, criterion)
    for each in {id(m): m for m in (trained.module, trained.last)}.values():
        scale.fold_into(each)
    return trained


@contextmanager
def _threads_for(module: nn.Module, batch_size: int) -> Iterator[None]:
    """One thread for the steps of a small head on the CPU: they are too short to share.

    Threads that wait for each other spin: beside other jobs on 2 cores an MLP of 256 on 768 numbers took 67
    s of processor time with two threads and 7 s with one. The weights do not depend on the number of cores then.
    """
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in module.parameters()) * batch_size > _SMALL_STEP:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Standard:
    """Mean and spread of the training rows, taken out before a linear head, and folded into its weights after."""

    mean_P: Tensor | None = None
    scale_P: Tensor | None = None

    @classmethod
    def of(cls, train: Examples, module: nn.Module, device: torch.device) -> _Standard:
        """None for a head that begins with a LayerNorm."""
        if not isinstance(module, VectorHead) or module.hidden is not None:
            return cls()
        mean, spread = train.rows_RP.mean(0, dtype=np.float64), train.rows_RP.std(0, dtype=np.float64)
        spread[spread <= 1e-6 * np.maximum(np.abs(mean), 1e-6)] = 1.0
        return cls(torch.tensor(mean, device=device).float(), torch.tensor(spread, device=device).float())

    def __call__(self, rows_RP: Tensor) -> Tensor:
        if self.mean_P is None or self.scale_P is None:
            return rows_RP
        return (rows_RP - self.mean_P) / self.scale_P

    def fold_into(self, module: nn.Module) -> None:
        """Make the linear layer take rows as they are."""
        if self.mean_P is None or self.scale_P is None or not isinstance(module, VectorHead):
            return
        with torch.no_grad():
            weight = module.last.weight.double() / self.scale_P.double()
            module.last.bias.copy_(module.last.bias.double() - weight @ self.mean_P.double())
            module.last.weight.copy_(weight)


@dataclass(frozen=True)
class _Units:
    """Units of a part as tensors."""

    rows_RP: Tensor
    labels_UL: Tensor
    starts_U: Tensor
    lengths_U: Tensor
    encoded_UL: np.ndarray

    @classmethod
    def of(cls, part: Examples, targets: Targets, scale: _Standard, device: torch.device) -> _Units:
        labels = targets.trained_on(part.labels_UL)
        starts = torch.from_numpy(part.starts_U).to(device)
        return cls(
            rows_RP=scale(torch.from_numpy(np.ascontiguousarray(part.rows_RP)).to(device)),
            labels_UL=torch.from_numpy(labels).float().to(device),
            starts_U=starts,
            lengths_U=torch.from_numpy(part.stops_U.astype(np.int64)).to(device) - starts,
            encoded_UL=part.labels_UL,
        )

    def __len__(self) -> int:
        return len(self.labels_UL)

    def logits(self, module: nn.Module, units_B: Tensor) -> Tensor:
        """(B,) positions -> (B, C); bags are padded to the longest of the batch."""
        if not isinstance(module, AttentionHead):
            return module(self.rows_RP.index_select(0, units_B))  # faster than indexing
        lengths_B = self.lengths_U[units_B]
        step_N = torch.arange(int(lengths_B.max()), device=lengths_B.device)
        present_BN = step_N < lengths_B[:, None]
        at_BN = (self.starts_U[units_B][:, None] + step_N).where(present_BN, 0)
        return module(self.rows_RP[at_BN], present_BN)


class _Loop:
    """AdamW over shuffled units."""

    def __init__(
        self, module: nn.Module, units: _Units, loss: HeadLoss, targets: Targets, config: HeadConfig, seed: int
    ) -> None:
        self.module, self.units, self.loss = module, units, loss
        self.targets, self.config, self.seed = targets, config, seed
        flat = [p for p in module.parameters() if p.ndim < 2]
        deep = [p for p in module.parameters() if p.ndim >= 2]
        groups = [{"params": deep, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)

    def fit(self, held: _Units | None, criterion: Selection | None) -> Trained:
        """All epochs, or until the score has not risen for ``patience`` of them."""
        best: Trained | None = None
        history: list[dict[str, Any]] = []
        for epoch in range(1, self.config.epochs + 1):
            entry: dict[str, Any] = {"epoch": epoch, "train_loss": self._epoch(epoch)}
            score = math.nan
            if held is not None and criterion is not None:
                told, score = self._judge(held, criterion)
                entry |= told
            history.append(entry)
            if best is None or score > best.score or (math.isnan(best.score) and not math.isnan(score)):
                best = Trained(copy.deepcopy(self.module).eval(), self.module, criterion, score, epoch)
            if criterion and self.config.patience and epoch - best.epoch >= self.config.patience:
                log.info("No better score for %d epochs: stopped after epoch %d", self.config.patience, epoch)
                break
        assert best is not None
        self.module.eval()
        if criterion is None:  # nothing chooses: the last epoch is kept
            best = Trained(self.module, self.module, None, math.nan, history[-1]["epoch"])
        best.history = history
        return best

    def _epoch(self, epoch: int) -> float:
        """One pass; its mean loss over the units."""
        self.module.train()
        losses, counts = [], []
        for units_B in self._batches(epoch):
            value = self.loss(self.units.logits(self.module, units_B), self.units.labels_UL.index_select(0, units_B))
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            self.optimizer.step()
            losses.append(value.detach())
            counts.append(len(units_B))
        mean = float(torch.stack(losses).double().cpu() @ torch.tensor(counts).double()) / len(self.units)
        if not math.isfinite(mean):
            raise NonFiniteError(
                "The loss of the head became non-finite.",
                where=f"epoch {epoch}, lr {self.config.lr:g}",
                fix="lower lr, e.g. lr=1e-4",
                code="loss_nonfinite",
            )
        return mean

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed_for(self.seed, "head order", epoch))
        order = torch.randperm(len(self.units), generator=generator).to(self.units.rows_RP.device)
        return iter(order.split(self.config.batch_size))

    @torch.inference_mode()
    def _judge(self, held: _Units, criterion: Selection) -> tuple[dict[str, Any], float]:
        """Loss and areas on the validation units, and the score that chooses."""
        self.module.eval()
        logits = all_logits(self.module, held)
        loss = float(self.loss(logits, held.labels_UL))
        values = logits.double().cpu().numpy()
        told = {
            "val_loss": loss,
            "val_macro_auroc": macro_auroc(ranking(values, self.targets), held.encoded_UL, self.targets),
            "val_per_class_auroc": per_class_auroc(ranking(values, self.targets), held.encoded_UL, self.targets),
        }
        return told, selection_score(criterion, values, held.encoded_UL, self.targets, loss)


def ranking(logits_UC: np.ndarray, targets: Targets) -> np.ndarray:
    """Logits where they rank as probabilities do, so that none are rounded together; classes need the softmax."""
    return probabilities(logits_UC, targets.task) if targets.task == "multiclass" else logits_UC


@torch.inference_mode()
def all_logits(module: nn.Module, units: _Units) -> Tensor:
    """(U, C), a block in memory at a time."""
    block = 64 if isinstance(module, AttentionHead) else _BLOCK_UNITS
    every = torch.arange(len(units), device=units.rows_RP.device)
    return torch.cat([units.logits(module, part) for part in every.split(block)])


@torch.inference_mode()
def unit_logits(module: nn.Module, examples: Examples) -> np.ndarray:
    """(U, C) float64 of a trained head, computed in float64 on the CPU, as ``Head`` computes its values."""
    exact = copy.deepcopy(module).cpu().double().eval()
    if isinstance(exact, AttentionHead):
        bags = np.split(examples.rows_RP, examples.stops_U[:-1])
        return np.stack([exact(torch.from_numpy(bag.astype(np.float64))[None])[0].numpy() for bag in bags])
    blocks = range(0, len(examples), _BLOCK_UNITS)
    parts: Sequence[np.ndarray] = [examples.rows_RP[start : start + _BLOCK_UNITS] for start in blocks]
    return np.concatenate([exact(torch.from_numpy(part.astype(np.float64))).numpy() for part in parts])


def logits_of_cases(module: nn.Module, examples: Examples, pool_mode: str, case_rule: str) -> np.ndarray:
    """(B, C) logits of each case, of the images as they are."""
    plain = examples.plain()
    logits_UC = unit_logits(module, plain)
    if pool_mode != "none":
        order = np.argsort(plain.case_U, kind="stable")
        return logits_UC[order]
    cases = [logits_UC[plain.case_U == case] for case in range(len(plain.case_ids))]
    return np.stack([case.max(0) if case_rule == "max" else case.mean(0) for case in cases])
