"""The picture of a supervised training: losses, overlap, distance and learning rate against the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.run import atomic_path

_Columns = Mapping[str, Sequence[Any]]


def draw_training(history: _Columns, path: Path, title: str, *, best: int | None = None) -> None:
    """Write ``progress.png``.

    Args:
        history: Lists by name as in ``history.json``; an undefined number leaves a gap.
        path: PNG to write, whole or not at all.
        title: Name of the run.
        best: Epoch that is kept, marked with a line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7))
    panels = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.08, top=0.92, wspace=0.18, hspace=0.26)
    figure.suptitle(title)
    _panel(panels[0, 0], history, {"train_loss": "training", "val_loss": "validation"}, "loss", best)
    overlap = {"train_dice": "training", "val_dice": "validation at 0.5", "val_best_dice": "at the best threshold"}
    _panel(panels[0, 1], history, overlap, "Dice", best, limits=(0, 1.02))
    _panel(panels[1, 0], history, {"train_hd95": "last training batch, px", "val_hd95": "validation"}, "HD95", best)
    _panel(panels[1, 1], history, {"lr": "learning rate"}, "learning rate", best)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _panel(
    axis: Any,
    history: _Columns,
    names: Mapping[str, str],
    label: str,
    best: int | None,
    limits: tuple[float, float] | None = None,
) -> None:
    drawn = 0
    for number, (name, text) in enumerate(names.items()):
        epochs = history["val_epoch" if name.startswith("val_") else "epoch"]
        known = [(epoch, value) for epoch, value in zip(epochs, history[name], strict=True) if value is not None]
        if known:
            x, y = np.array(known, dtype=float).T
            axis.plot(x, y, label=text, lw=1.4, color=f"C{number}", marker="o", markersize=3 if len(known) < 60 else 0)
            drawn += 1
    axis.set(xlabel="epoch", ylabel=label)
    axis.grid(alpha=0.3)
    if limits is not None:
        axis.set_ylim(*limits)
    if best is not None and drawn:
        axis.axvline(best, color="0.45", lw=1.0, ls="--", label=f"best epoch, {best}")
    if drawn:
        axis.legend(frameon=False, fontsize=8)
    else:
        axis.text(0.5, 0.5, "nothing yet", ha="center", va="center", color="0.45", transform=axis.transAxes)
