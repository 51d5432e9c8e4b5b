"""Curves as PNG files: the one picture of a run that everybody looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.run import atomic_path

_LOSSES = ("total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "koleo_loss")
_START_STYLE = {"color": "0.45", "lw": 1.0, "ls": "--"}


def draw_progress(
    rows: Sequence[dict[str, Any]],
    path: Path,
    title: str,
    *,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write ``progress.png``: losses, collapse monitors, schedules and speed against the step.

    A run that is scored on labelled cases, or that logs how far student and teacher agree, gets two panels more: the
    probes with the level of the start, and the further figures of health.

    Args:
        rows: Lines of ``training_metrics.jsonl`` as dictionaries; an absent key leaves its curve out.
        path: PNG to write, whole or not at all.
        title: Name of the run.
        evaluations: Lines of ``eval/history.jsonl``; the one of step 0 is the level of the start.
    """
    from matplotlib.figure import Figure

    norms = sorted({name for row in rows for name in row if name.startswith("grad_norm_")})
    wide = bool(evaluations) or any(row.get("dino_agreement") is not None for row in rows)
    figure = Figure(figsize=(18 if wide else 12, 7), layout="constrained")
    panels = figure.subplots(2, 3 if wide else 2)
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
    if wide:
        _draw_probes(panels[0, 2], evaluations)
        _panel(
            panels[1, 2],
            rows,
            {"dino_agreement": "agreement"},
            "share of crops that agree",
            right={name: f"grad {name.removeprefix('grad_norm_').replace('_', ' ')}" for name in norms},
            right_label="gradient norm before clipping",
            limits=(0, 1.05),
        )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _draw_probes(axis: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """The metric that chooses the best teacher, of each probe, the level of the start, and a star at the best."""
    axis.set(xlabel="step", ylabel="score on the validation cases")
    axis.grid(alpha=0.3)
    if not evaluations:
        axis.text(0.5, 0.5, "no labelled cases are scored", ha="center", va="center", color="0.45",
                  transform=axis.transAxes)  # fmt: skip
        axis.set(xticks=[], yticks=[])
        return
    chosen = str(evaluations[-1]["metric"])
    metric = chosen.partition("_")[2]
    names = {f"{probe}_{metric}": f"{text}, {metric}" for probe, text in _PROBES.items()}
    lines = _curves(axis, [dict(row) for row in evaluations], names, 0, points=True)
    starts = [row[chosen] for row in evaluations if row["iteration"] == 0 and row.get(chosen) is not None]
    if starts:
        lines.append(axis.axhline(starts[0], label="at the start", **_START_STYLE))
    kept = [row for row in evaluations if row.get("is_best") and row.get("value") is not None]
    if kept:
        best = max(kept, key=lambda row: row["value"])
        lines += axis.plot(best["iteration"], best["value"], "*", color="C1", ms=13, mec="white", label="best")
    _legend(axis, lines)


_PROBES = {"knn": "k-NN", "linear": "linear"}


def _panel(
    axis: Any,
    rows: Sequence[dict[str, Any]],
    left: dict[str, str],
    label: str,
    *,
    right: dict[str, str] | None = None,
    right_label: str = "",
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
        twin.set_ylabel(right_label or next(iter(right.values())))
        twin.set_ylim(bottom=0)
    _legend(axis, lines)


def _legend(axis: Any, lines: Sequence[Any]) -> None:
    if lines:
        axis.legend(
            handles=lines,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(lines),
            frameon=False,
            fontsize=8,
            columnspacing=1.2,
            handlelength=1.6,
        )


def _curves(
    axis: Any, rows: Sequence[dict[str, Any]], names: dict[str, str], first_colour: int, *, points: bool = False
) -> list[Any]:
    lines = []
    for number, (name, text) in enumerate(names.items(), start=first_colour):
        known = [(row["iteration"], row[name]) for row in rows if row.get(name) is not None]
        if known:
            x, y = np.array(known, dtype=float).T
            marker = "o" if points or len(known) == 1 else None  # one point makes no line
            lines += axis.plot(x, y, label=text, lw=1.4, color=f"C{number}", marker=marker, markersize=3)
    return lines
