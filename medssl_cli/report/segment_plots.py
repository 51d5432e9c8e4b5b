"""``progress.png`` of a segmentation: losses, overlap, distance, rate and threshold by epoch, and which was kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl_cli.core.run import atomic_path

_TRAIN, _VAL, _SWEPT = "#4c78a8", "#f58518", "#b0413e"
_CHOSEN = {"color": "0.35", "lw": 1.0, "ls": "--"}
_DOTS = 60  # epochs up to which each one has a dot


def draw_segment_progress(
    history: Mapping[str, Sequence[Any]],
    path: Path,
    title: str,
    *,
    chosen: int | None = None,
    distance_unit: str = "px",
) -> None:
    """Write ``progress.png`` of a segmentation run.

    Args:
        history: Lists of ``history.json``: ``train_...`` and ``lr`` belong to ``epoch``, ``val_...`` to ``val_epoch``,
            which may name fewer. None and NaN leave a gap, absent keys their curve out.
        path: PNG to write, whole or not at all.
        title: Name of the run.
        chosen: Epoch whose weights were kept; None: the first one with the best swept Dice, or the best Dice where
            nothing was swept.
        distance_unit: Of ``val_hd95``; that of a training batch is in pixels.

    Raises:
        ValueError: A list is not as long as the epochs it belongs to.
    """
    from matplotlib.figure import Figure

    curves = _Curves(history)
    kept = chosen if chosen is not None else curves.best_epoch()
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    loss, dice, overlap, distance, threshold, rate = figure.subplots(2, 3).flat
    figure.suptitle(title)
    names = {"train_loss": ("training", _TRAIN, "-"), "val_loss": ("validation", _VAL, "-")}
    _draw(loss, curves, names, "loss")
    names = {"train_dice": ("training", _TRAIN, "-"), "val_dice": ("validation", _VAL, "-")}
    _draw(dice, curves, {**names, "val_best_dice": ("validation, best threshold", _SWEPT, "-")}, "Dice", top=1.02)
    _mark_best(dice, curves, kept)
    names = {"train_iou": ("training IoU", _TRAIN, "-"), "val_iou": ("validation IoU", _VAL, "-")}
    more = {"train_f1": ("training F1", _TRAIN, ":"), "val_f1": ("validation F1", _VAL, ":")}
    _draw(overlap, curves, {**names, **more}, "IoU and F1", top=1.02)
    names = {"train_hd95": ("last batch of training, px", _TRAIN, "-")}
    _draw(distance, curves, {**names, "val_hd95": (f"validation, {distance_unit}", _VAL, "-")}, "HD95")
    names = {"val_best_threshold": ("best threshold on validation", _SWEPT, "-")}
    _draw(threshold, curves, names, "threshold on the probability", top=1.0)
    _draw(rate, curves, {"lr": ("learning rate", "0.25", "-")}, "learning rate")
    for axis in (loss, dice, overlap, distance, threshold, rate):
        _finish(axis, curves, kept)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


class _Curves:
    """The lists of a history, each with the epochs that it belongs to."""

    def __init__(self, history: Mapping[str, Sequence[Any]]) -> None:
        self._history = history

    def of(self, name: str) -> tuple[list[float], list[float]]:
        """(epochs, values), gaps as NaN; empty lists for what is absent or nowhere defined."""
        if name not in self._history:
            return [], []
        is_val = name.startswith("val_") and "val_epoch" in self._history
        epochs = self._history.get("val_epoch" if is_val else "epoch", ())
        values = [math.nan if value is None else float(value) for value in self._history[name]]
        if len(values) != len(epochs):
            belongs = "val_epoch" if is_val else "epoch"
            raise ValueError(f"{name} has {len(values)} values for the {len(epochs)} of {belongs}")
        if not any(math.isfinite(value) for value in values):
            return [], []
        return [float(epoch) for epoch in epochs], values

    def best(self) -> tuple[float, float] | None:
        """(epoch, Dice) of the first best one: swept where there is a sweep."""
        for name in ("val_best_dice", "val_dice"):
            known = [(e, v) for e, v in zip(*self.of(name), strict=True) if math.isfinite(v)]
            if known:
                return max(known, key=lambda pair: pair[1])  # the first of equals: only a better one replaces
        return None

    def best_epoch(self) -> int | None:
        found = self.best()
        return None if found is None else round(found[0])

    def dice_at(self, epoch: int) -> float | None:
        """What the star stands at: the swept Dice of an epoch, or else its Dice."""
        for name in ("val_best_dice", "val_dice"):
            epochs, values = self.of(name)
            if epochs:
                value = dict(zip(epochs, values, strict=True)).get(float(epoch), math.nan)
                return value if math.isfinite(value) else None
        return None

    def last_epoch(self) -> float:
        return max([1.0, *(float(epoch) for name in ("epoch", "val_epoch") for epoch in self._history.get(name, ()))])


def _draw(
    axis: Any, curves: _Curves, names: Mapping[str, tuple[str, str, str]], label: str, *, top: float | None = None
) -> None:
    """Curves of one quantity from 0 up to ``top``, or a little above the largest; a note where there are none."""
    largest = 0.0
    for name, (text, colour, style) in names.items():
        epochs, values = curves.of(name)
        if epochs:
            size = 6 if len(epochs) == 1 else 3 if len(epochs) <= _DOTS else 0
            axis.plot(epochs, values, style, color=colour, lw=1.6, marker="o" if size else None, ms=size, label=text)
            largest = max(largest, *(value for value in values if math.isfinite(value)), 0.0)
    axis.set(xlabel="epoch", ylabel=label)
    if axis.lines:
        axis.set_ylim(0, top or 1.08 * largest or 1.0)
    else:
        axis.text(0.5, 0.5, "no values", ha="center", va="center", transform=axis.transAxes, color="0.45")
        axis.set(xticks=[], yticks=[])


def _mark_best(axis: Any, curves: _Curves, kept: int | None) -> None:
    """A star on the epoch that was kept, with its score."""
    score = None if kept is None else curves.dice_at(kept)
    if score is None:
        return
    label = f"kept: epoch {kept}, {score:.3f}"
    axis.plot([kept], [score], "*", color=_SWEPT, ms=14, mec="white", zorder=5, label=label)


def _finish(axis: Any, curves: _Curves, kept: int | None) -> None:
    """Grid, legend and the line of the epoch that was kept."""
    if not axis.lines:
        return
    if kept is not None:
        axis.axvline(kept, **_CHOSEN)
    last = curves.last_epoch()
    margin = max(0.5, 0.02 * last)
    axis.set_xlim(1 - margin, last + margin)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, framealpha=0.85)
    axis.xaxis.get_major_locator().set_params(integer=True)
