"""Curves as PNG files: the one picture of a run that everybody looks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.run import atomic_path

_LOSSES = ("total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "koleo_loss")


def draw_progress(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write ``progress.png``: losses, collapse monitors, schedules and speed against the step.

    Args:
        rows: Lines of ``training_metrics.jsonl`` as dictionaries; an absent key leaves its curve out.
        path: PNG to write, whole or not at all.
        title: Name of the run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    figure.suptitle(title)
    losses = {name: name.replace("_crops_loss", "").replace("_loss", "").replace("_", " ") for name in _LOSSES}
    _panel(panels[0, 0], rows, losses, "loss")
    _panel(
        panels[0, 1],
        rows,
        {"teacher_entropy": "teacher entropy / ln K"},
        "entropy (1 uniform, 0 one-hot)",
        right={"effective_rank": "effective rank of the teacher's cls"},
        limits=(0, 1.05),
    )
    _panel(panels[1, 0], rows, {"lr": "learning rate"}, "learning rate", right={"wd": "weight decay"})
    _panel(
        panels[1, 1],
        rows,
        {"images_per_s": "images a second"},
        "images a second",
        right={"data_wait_percent": "waiting for data, %"},
        limits=(0, None),
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _panel(
    axis: Any,
    rows: Sequence[dict[str, Any]],
    left: dict[str, str],
    label: str,
    *,
    right: dict[str, str] | None = None,
    limits: tuple[float | None, float | None] | None = None,
) -> None:
    """Curves on one or two scales, with one legend above the panel, where it hides nothing."""
    lines = _curves(axis, rows, left, 0)
    axis.set(xlabel="step", ylabel=label)
    axis.grid(alpha=0.3)
    if limits is not None:
        axis.set_ylim(*limits)
    if right:
        twin = axis.twinx()
        lines += _curves(twin, rows, right, len(left))
        twin.set_ylabel(next(iter(right.values())))
        twin.set_ylim(bottom=0)
    if lines:
        legend = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(lines), "frameon": False, "fontsize": 8}
        axis.legend(handles=lines, **legend)


def _curves(axis: Any, rows: Sequence[dict[str, Any]], names: dict[str, str], first_colour: int) -> list[Any]:
    lines = []
    for number, (name, text) in enumerate(names.items(), start=first_colour):
        points = [(row["iteration"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            x, y = np.array(points, dtype=float).T
            marker = "o" if len(points) == 1 else None  # one point makes no line
            lines += axis.plot(x, y, label=text, lw=1.4, color=f"C{number}", marker=marker, markersize=3)
    return lines
