"""Curves of an evaluation as PNG bytes: ROC, precision and recall, calibration, confusion, histograms, agreement.

Up to six classes share one panel; more get a panel each, with the others in grey behind. Colours are those of Okabe and
Ito (2008), which the colour-blind tell apart; line styles and legends say the same once more.

Letters: N cases, K classes.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
_GREY = "0.55"
_CHANCE: dict[str, Any] = {"color": _GREY, "lw": 1.0, "ls": (0, (4, 3)), "zorder": 1}
_TOGETHER = 6
"""Classes in one panel at most."""
_COLUMNS = 4
_DPI = 130

Curve = tuple[np.ndarray, np.ndarray, str]


def draw_roc(curves: Mapping[str, Curve]) -> bytes:
    """ROC curves; the diagonal is chance.

    Args:
        curves: Class -> (false positive rate, true positive rate, text for the legend, e.g. ``0.91 (0.85 to 0.95)``).
    """
    labels = ("1 − specificity (false positive rate)", "sensitivity (true positive rate)")

    def chance(axis: Axes, _name: str, _colour: str) -> None:
        axis.plot([0, 1], [0, 1], **_CHANCE)

    return _curves(curves, labels, chance, corner="lower right", shape="default")


def draw_pr(curves: Mapping[str, Curve], prevalence: Mapping[str, float] | None = None) -> bytes:
    """Precision against recall.

    Args:
        curves: Class -> (recall, precision, text for the legend).
        prevalence: Class -> share of positives: the precision of chance, a dashed line.
    """
    known = prevalence or {}

    def chance(axis: Axes, name: str, colour: str) -> None:
        if name in known:
            axis.axhline(known[name], **{**_CHANCE, "color": colour, "alpha": 0.6})

    labels = ("recall (sensitivity)", "precision (positive predictive value)")
    return _curves(curves, labels, chance, corner="lower left", shape="steps-pre")


def draw_calibration(bins: Mapping[str, Sequence[tuple[float, float, int, float, float]]]) -> bytes:
    """Reliability diagrams, a panel for each class; the diagonal is perfect calibration.

    Args:
        bins: Class -> bins (low, high, n, mean probability, share of positives); empty bins are left out.
    """
    figure, axes = _panels(len(bins), 3.4)
    for axis, (name, entries) in zip(axes, bins.items(), strict=True):
        told = [entry for entry in entries if entry[2] > 0]
        axis.plot([0, 1], [0, 1], **_CHANCE)
        if told:
            low, high, n, mean, share = (np.array(column, float) for column in zip(*told, strict=True))
            ends = np.array([_wilson(s * k, k) for s, k in zip(share, n, strict=True)]).T
            axis.bar((low + high) / 2, 0.25 * n / n.max(), high - low, color="0.85", ec="white", zorder=0)
            reach = np.clip([share - ends[0], ends[1] - share], 0, None)
            axis.errorbar(mean, share, reach, fmt="o", ms=5, color=_COLOURS[0], ecolor=_COLOURS[0], lw=1.2, capsize=2)
        else:
            _say(axis, "no case with a known label")
        axis.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="predicted probability", ylabel="share of positives")
        _titled(axis, name)
    return _png(figure)


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> bytes:
    """Counts of cases; colour is the share of the row.

    Args:
        matrix: (K, K) counts, rows reference, columns prediction.
        names: Of the classes.
    """
    counts = np.asarray(matrix)
    k = len(names)
    if counts.shape != (k, k):
        raise ValueError(f"the matrix has the shape {counts.shape}, there are {k} names")
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = max(4.2, 1.8 + 0.62 * k)
    figure = _figure(side + 0.6, side)
    axis = figure.subplots()
    drawn = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axis, label="share of the row", fraction=0.046, pad=0.03)
    size = 11 if k <= 4 else 9 if k <= 8 else 7.5
    for row, column in np.ndindex(k, k):
        share = shares[row, column]
        text = f"{counts[row, column]:g}" + (f"\n{share:.0%}" if k <= 8 and totals[row, 0] else "")
        axis.text(column, row, text, ha="center", va="center", size=size, color="white" if share > 0.55 else "black")
    wrapped = [_wrapped(name, 16) for name in names]
    axis.set_xticks(range(k), wrapped, rotation=0 if k <= 3 else 40, ha="center" if k <= 3 else "right")
    axis.set_yticks(range(k), wrapped)
    axis.set(xlabel="predicted", ylabel="reference")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=9)
    return _png(figure)


def draw_score_histogram(scores: Mapping[str, tuple[np.ndarray, np.ndarray, float | None]]) -> bytes:
    """Probabilities of negative and of positive cases, each as shares of its own, a panel for each class.

    Args:
        scores: Class -> (probabilities (N,), labels (N,) 0, 1 or NaN, threshold or None).
    """
    figure, axes = _panels(len(scores), 2.9)
    edges = np.linspace(0, 1, 21)
    for axis, (name, (p, y, threshold)) in zip(axes, scores.items(), strict=True):
        for label, text, colour, hatch in ((0, "negative", _COLOURS[0], ""), (1, "positive", _COLOURS[1], "////")):
            chosen = np.asarray(p, float)[np.asarray(y, float) == label]
            counts, _ = np.histogram(np.clip(chosen, 0, 1), edges)
            heights = counts / max(len(chosen), 1)
            axis.stairs(heights, edges, fill=True, fc=(colour, 0.3), ec=colour, hatch=hatch, lw=1.3,
                        label=f"{text}, n = {len(chosen)}")  # fmt: skip
        if threshold is not None:
            axis.axvline(threshold, color="0.2", lw=1.1, ls="--", label=f"threshold {threshold:.2g}")
        axis.set(xlim=(0, 1), xlabel="predicted probability", ylabel="share of the cases")
        axis.legend(fontsize=7.5, loc="upper center", framealpha=0.9, edgecolor="none")
        axis.set_ylim(0, axis.get_ylim()[1] * 1.35)
        _titled(axis, name)
    return _png(figure)


def draw_scatter(values: Mapping[str, tuple[np.ndarray, np.ndarray]], unit: str = "") -> bytes:
    """Predicted against reference values; the diagonal is agreement.

    Args:
        values: Target -> (prediction (N,), reference (N,)); pairs with NaN are left out.
        unit: Of all targets.
    """
    figure, axes = _panels(len(values), 3.6)
    for axis, (name, pair) in zip(axes, values.items(), strict=True):
        prediction, reference = _known(*pair)
        if not len(prediction):
            _say(axis, "no case with a known value")
        else:
            ends = _widened(np.concatenate([prediction, reference]))
            axis.plot(ends, ends, **_CHANCE)
            axis.plot(reference, prediction, "o", ms=4, mec="white", mew=0.5, color=_COLOURS[0], alpha=0.8)
            axis.set(xlim=ends, ylim=ends, aspect="equal")
        axis.set(xlabel=_with_unit("reference", unit), ylabel=_with_unit("predicted", unit))
        _titled(axis, name)
    return _png(figure)


def draw_bland_altman(values: Mapping[str, tuple[np.ndarray, np.ndarray]], unit: str = "") -> bytes:
    """Differences against means, with the bias and the 95 % limits of agreement (Bland and Altman 1986).

    Args:
        values: Target -> (prediction (N,), reference (N,)); pairs with NaN are left out.
        unit: Of all targets.
    """
    figure, axes = _panels(len(values), 3.4, wide=True)
    for axis, (name, pair) in zip(axes, values.items(), strict=True):
        prediction, reference = _known(*pair)
        if len(prediction) < 2:
            _say(axis, "fewer than two cases with a known value")
        else:
            difference = prediction - reference
            bias, spread = float(difference.mean()), 1.96 * float(difference.std(ddof=1))
            axis.plot((prediction + reference) / 2, difference, "o", ms=4, mec="white", mew=0.5, color=_COLOURS[0])
            axis.axhline(0, color="0.8", lw=0.8, zorder=0)
            axis.axhline(bias, color=_COLOURS[1], lw=1.4, label=f"bias {bias:.3g}")
            for sign, text in ((-1, f"95 % limits {bias - spread:.3g} to {bias + spread:.3g}"), (1, None)):
                axis.axhline(bias + sign * spread, color=_COLOURS[1], lw=1.1, ls="--", label=text)
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8, ncols=2, borderpad=0)
        axis.set(xlabel=_with_unit("mean of the two", unit), ylabel=_with_unit("predicted − reference", unit))
        axis.set_title(_wrapped(name, 34), fontsize=9.5, pad=20)
    return _png(figure)


# --- panels ----------------------------------------------------------------------------------------------------------


def _curves(
    curves: Mapping[str, Curve],
    labels: tuple[str, str],
    chance: Callable[[Axes, str, str], None],
    *,
    corner: str,
    shape: str,
) -> bytes:
    if len(curves) <= _TOGETHER:
        return _together(curves, labels, chance, corner, shape)
    figure, axes = _panels(len(curves), 2.8)
    for axis, (name, (x, y, text)) in zip(axes, curves.items(), strict=True):
        for other, (x_other, y_other, _) in curves.items():
            if other != name:
                axis.plot(x_other, y_other, color="0.88", lw=0.7, ds=shape, zorder=0)
        chance(axis, name, _GREY)
        axis.plot(x, y, color=_COLOURS[0], lw=2, ds=shape)
        right = "right" in corner
        axis.text(0.97 if right else 0.03, 0.04, text, transform=axis.transAxes, ha="right" if right else "left",
                  size=8, bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
        axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        _titled(axis, name)
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    return _png(figure)


def _together(
    curves: Mapping[str, Curve],
    labels: tuple[str, str],
    chance: Callable[[Axes, str, str], None],
    corner: str,
    shape: str,
) -> bytes:
    figure = _figure(5.2, 5.2 + 0.24 * len(curves))
    axis = figure.subplots()
    lines = []
    for i, (name, (x, y, text)) in enumerate(curves.items()):
        chance(axis, name, _COLOURS[i])
        label = f"{name}  {text}".strip()
        lines += axis.plot(x, y, color=_COLOURS[i], ls=_DASHES[i], lw=1.8, ds=shape, label=label, clip_on=False)
    axis.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal", xlabel=labels[0], ylabel=labels[1])
    axis.grid(alpha=0.3)
    axis.legend(handles=lines, loc="upper left", bbox_to_anchor=(0, -0.13), frameon=False, fontsize=9, handlelength=3)
    return _png(figure)


def _panels(count: int, side: float, *, wide: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels in rows; those that are left over in the last row are not drawn."""
    if count < 1:
        raise ValueError("there is no class to draw")
    rows = -(-count // (2 if wide else _COLUMNS))
    columns = -(-count // rows)
    figure = _figure(columns * side * (1.5 if wide else 1.0) + 0.4, rows * side + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in grid[:count]:
        axis.grid(alpha=0.3)
    for axis in grid[count:]:
        axis.remove()
    return figure, list(grid[:count])


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _titled(axis: Axes, name: str) -> None:
    if name:
        axis.set_title(_wrapped(name, 26), fontsize=9.5)
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)


def _wrapped(name: str, width: int) -> str:
    """A name in lines, at most three; a dollar sign is no formula."""
    lines = textwrap.wrap(name.replace("_", " "), width, max_lines=3, placeholder=" …") or [name]
    return "\n".join(lines).replace("$", r"\$")


def _say(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", color=_GREY, transform=axis.transAxes, size=9)


def _with_unit(text: str, unit: str) -> str:
    return f"{text}, {unit}" if unit else text


def _known(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, reference = np.asarray(prediction, float), np.asarray(reference, float)
    known = np.isfinite(prediction) & np.isfinite(reference)
    return prediction[known], reference[known]


def _widened(values: np.ndarray) -> tuple[float, float]:
    """Ends of an axis with some room around the values."""
    low, high = float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def _wilson(positives: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share = positives / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(0.0, share * (1 - share) / n + z * z / (4 * n * n)))
    return middle - half, middle + half


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
