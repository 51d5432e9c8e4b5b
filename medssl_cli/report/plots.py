"""Curves as PNG files: the one picture of a run that everybody looks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.run import atomic_path

_LOSSES = ("total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "koleo_loss")


def draw_progress(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write ``progress.png``: losses, collapse monitors, learning rate and speed against the step.

    Args:
        rows: Lines of ``training_metrics.jsonl`` as dictionaries; an absent key leaves its curve out.
        path: PNG to write, whole or not at all.
        title: Name of the run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(title)
    _curves(axes[0, 0], rows, {name: name.replace("_crops_loss", "").replace("_loss", "") for name in _LOSSES}, "loss")
    _health(axes[0, 1], rows)
    _curves(axes[1, 0], rows, {"lr": "learning rate"}, "learning rate")
    momentum = axes[1, 0].twinx()
    _curves(momentum, rows, {"wd": "weight decay"}, "weight decay", colour="tab:orange")
    _curves(axes[1, 1], rows, {"images_per_s": "images/s"}, "images a second")
    axes[1, 1].set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _health(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    _curves(axis, rows, {"teacher_entropy": "teacher entropy / ln K"}, "entropy (1 = uniform, 0 = collapsed)")
    axis.set_ylim(-0.02, 1.05)
    rank = axis.twinx()
    _curves(rank, rows, {"effective_rank": "effective rank"}, "effective rank of the teacher's CLS", colour="tab:green")
    rank.set_ylim(bottom=0)


def _curves(axis: Any, rows: Sequence[dict[str, Any]], names: dict[str, str], label: str, colour: str = "") -> None:
    for name, text in names.items():
        points = [(row["iteration"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            x, y = np.array(points, dtype=float).T
            axis.plot(x, y, label=text, lw=1.4, **({"color": colour} if colour else {}))
    axis.set_ylabel(label)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="best")
