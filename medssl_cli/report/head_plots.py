"""``progress.png`` of a head: how losses and the validation score went, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl_cli.core.run import atomic_path

SWEEP_LABEL = "C (inverse strength of the penalty)"
_MOST_LINES = 12
_CHOSEN = {"color": "0.35", "lw": 1.0, "ls": "--"}
_NAMES = {"auroc": "macro AUROC", "loss": "loss", "mcc": "MCC"}


def draw_head_progress(
    path: Path,
    title: str,
    *,
    classes: Sequence[str],
    history: Sequence[Mapping[str, Any]],
    criterion: str | None,
    chosen: float | Sequence[float] | None,
    sweeps: Sequence[Sequence[tuple[float, float]]] = (),
) -> None:
    """Write ``progress.png``: by epoch for a head that is trained step by step, else by C; and the score by class.

    Args:
        path: PNG to write, whole or not at all.
        title: Name of the run.
        classes: Names of the outputs.
        history: Entries of ``train_summary.json``; one entry for a head that is fitted at once.
        criterion: ``auroc``, ``loss`` or ``mcc``; None without validation.
        chosen: The epoch, or C of each output.
        sweeps: (C, score) of each value tried, for each output.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=11)
    if any(sweeps):
        _draw_sweeps(left, sweeps, classes, criterion, chosen if isinstance(chosen, Sequence) else ())
    elif len(history) > 1 or (history and history[0]["epoch"]):
        _draw_losses(left, history, chosen if isinstance(chosen, (int, float)) else None)
    else:
        _say(left, "Nothing was chosen on validation cases.")
    areas = [entry.get("val_per_class_auroc") for entry in history]
    if not any(areas):
        _say(right, "No AUROC: there are no validation cases,\nor the head tells measurements.")
    elif len(history) > 1:
        _draw_areas(right, history, classes, criterion, chosen if isinstance(chosen, (int, float)) else None)
    else:
        named = dict(zip(classes, history[0]["val_per_class_auroc"], strict=True))
        _draw_bars(right, named, "AUROC on the validation cases", chance=0.5)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _draw_losses(axis: Any, history: Sequence[Mapping[str, Any]], chosen: float | None) -> None:
    epochs = [entry["epoch"] for entry in history]
    for name, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "-")):
        values = [_number(entry.get(name)) for entry in history]
        if any(math.isfinite(value) for value in values):
            axis.plot(epochs, values, style, marker="o", ms=3, label=label)
    _mark(axis, chosen)
    axis.set(xlabel="epoch", ylabel="loss")
    _finish(axis)


def _draw_areas(
    axis: Any, history: Sequence[Mapping[str, Any]], classes: Sequence[str], criterion: str | None, chosen: float | None
) -> None:
    """Area by epoch of each class, thin, and their mean, thick."""
    epochs = [entry["epoch"] for entry in history]
    columns = zip(*(entry["val_per_class_auroc"] for entry in history), strict=True)
    if 1 < len(classes) <= _MOST_LINES:
        for name, column in zip(classes, columns, strict=True):
            values = [_number(value) for value in column]
            if any(math.isfinite(value) for value in values):
                axis.plot(epochs, values, lw=1, alpha=0.75, label=_short(name))
    macro = [_number(entry.get("val_macro_auroc")) for entry in history]
    axis.plot(epochs, macro, color="black", lw=2, label="macro" if len(classes) > 1 else _short(classes[0]))
    _mark(axis, chosen, f"chosen by {_NAMES.get(criterion or '', 'nothing')}")
    axis.set(xlabel="epoch", ylabel="AUROC on the validation cases", ylim=(None, 1.005))
    _finish(axis)


def _draw_sweeps(
    axis: Any,
    sweeps: Sequence[Sequence[tuple[float, float]]],
    classes: Sequence[str],
    criterion: str | None,
    chosen: Sequence[float],
) -> None:
    """Score against C, with a star at what was chosen."""
    names = list(classes) if len(sweeps) == len(classes) else ["all classes"]
    for name, sweep, c in zip(names, sweeps, chosen, strict=True):
        if not sweep or not any(math.isfinite(score) for _, score in sweep):
            continue
        values = [-score if criterion == "loss" else score for _, score in sweep]
        (line,) = axis.plot([value for value, _ in sweep], values, marker="o", ms=2.5, lw=1.2, label=_short(name))
        distances = [abs(math.log(value / c)) for value, _ in sweep]
        at = distances.index(min(distances))
        axis.plot(c, values[at], marker="*", ms=13, color=line.get_color(), mec="black", mew=0.6, ls="none")
    axis.plot([], [], marker="*", ms=10, color="white", mec="black", ls="none", label="chosen")
    axis.set(xscale="log", xlabel=SWEEP_LABEL, ylabel=f"{_name_of(criterion, len(sweeps))} on the validation cases")
    _finish(axis)


def _draw_bars(axis: Any, values: Mapping[str, Any], label: str, chance: float | None = None) -> None:
    """One bar for each name, the first on top."""
    shown = list(values.items())[:_MOST_LINES]
    places = range(len(shown))
    numbers = [_number(value) for _, value in shown]
    axis.barh(list(places), [0 if math.isnan(number) else number for number in numbers], height=0.6)
    axis.set_yticks(list(places), [_short(name.replace("_", " ")) for name, _ in shown])
    axis.invert_yaxis()
    axis.set_ylim(max(len(shown), 2) - 0.4, -0.6)
    for place, number in zip(places, numbers, strict=True):
        text = "not defined" if math.isnan(number) else f"{number:.3f}"
        axis.annotate(
            text, (0 if math.isnan(number) else number, place), (4, 0), textcoords="offset points", va="center"
        )
    if chance is not None:
        axis.axvline(chance, **_CHOSEN)
        axis.set_xlim(0, 1.12)
    else:
        axis.margins(x=0.18)
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _name_of(criterion: str | None, labels: int) -> str:
    """The criterion in words; of one label it is no mean."""
    return _NAMES.get(criterion or "", "score").removeprefix("macro " if labels > 1 else "")


def _mark(axis: Any, chosen: float | None, label: str = "chosen") -> None:
    if chosen:
        axis.axvline(chosen, label=f"{label}: epoch {chosen:g}" if label == "chosen" else label, **_CHOSEN)


def _finish(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    if axis.get_xscale() == "linear":
        axis.xaxis.get_major_locator().set_params(integer=True)


def _say(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="0.4")
    axis.set_axis_off()


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
