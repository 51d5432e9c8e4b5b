from __future__ import annotations

import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_curve

from medssl_cli.report import eval_plots

NAMES = [f"class {i}" for i in range(13)]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, beside their bytes."""
    kept: list[Any] = []
    as_png = eval_plots._png

    def keep(figure: Any) -> bytes:
        kept.append(figure)
        return as_png(figure)

    monkeypatch.setattr(eval_plots, "_png", keep)
    return kept


def scores(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(80) < 0.4).astype(float)
    return np.clip(0.5 * labels + 0.6 * rng.random(80), 0, 1), labels


def size_of(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG")
    with Image.open(io.BytesIO(data)) as opened:
        return opened.size


def test_roc_draws_the_curve_that_it_was_given(figures: list[Any]) -> None:
    p, y = scores()
    fpr, tpr, _ = roc_curve(y, p)
    size_of(eval_plots.draw_roc({"any": (fpr, tpr, "0.91 (0.85 to 0.95)")}))
    (axis,) = figures[0].axes
    (drawn,) = [line for line in axis.lines if line.get_label() == "any  0.91 (0.85 to 0.95)"]
    np.testing.assert_array_equal(drawn.get_xydata(), np.column_stack([fpr, tpr]))
    assert [list(line.get_xydata().ravel()) for line in axis.lines if line is not drawn] == [[0, 0, 1, 1]]


def test_pr_has_recall_across_and_the_area_of_average_precision(figures: list[Any]) -> None:
    """A step belongs to the precision at its right end: the area is the sum of steps that defines average precision."""
    from sklearn.metrics import average_precision_score

    p, y = scores()
    precision, recall, _ = precision_recall_curve(y, p)
    eval_plots.draw_pr({"any": (recall[::-1], precision[::-1], "")}, {"any": y.mean()})
    (axis,) = figures[0].axes
    assert axis.get_xlabel().startswith("recall")
    curve = next(line for line in axis.lines if line.get_label() == "any")
    steps = curve.get_drawstyle()
    x, y_drawn = curve.get_data()
    assert steps == "steps-pre"
    assert np.sum(np.diff(x) * y_drawn[1:]) == pytest.approx(average_precision_score(y, p))
    assert any(np.allclose(line.get_ydata(), y.mean()) for line in axis.lines if line is not curve)


def test_calibration_points_are_those_of_scikit_learn_with_wilson_intervals(figures: list[Any]) -> None:
    p, y = scores()
    edges = np.linspace(0, 1, 11)
    bins = []
    for low, high in itertools.pairwise(edges):
        inside = (p >= low) & ((p < high) | (high == 1))
        n = int(inside.sum())
        bins.append((low, high, n, p[inside].mean() if n else math.nan, y[inside].mean() if n else math.nan))
    eval_plots.draw_calibration({"any": bins})
    (axis,) = figures[0].axes
    (container,) = axis.containers[1:]  # the first ones are the bars of the counts
    share, mean = calibration_curve(y, p, n_bins=10)
    np.testing.assert_allclose(container.lines[0].get_xydata(), np.column_stack([mean, share]))
    told = [entry for entry in bins if entry[2]]
    reach = container.lines[2][0].get_segments()
    for (_, _, n, _, positive), segment in zip(told, reach, strict=True):
        expected = binomtest(round(n * positive), n).proportion_ci(method="wilson")
        np.testing.assert_allclose(segment[:, 1], [expected.low, expected.high], atol=1e-4)


def test_confusion_has_the_reference_down_and_the_prediction_across(figures: list[Any]) -> None:
    counts = np.array([[50, 10], [0, 40]])
    eval_plots.draw_confusion(counts, ("no", "yes"))
    axis = figures[0].axes[0]
    texts = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axis.texts}
    assert texts == {(0, 0): "50\n83%", (0, 1): "10\n17%", (1, 0): "0\n0%", (1, 1): "40\n100%"}
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "reference")
    with pytest.raises(ValueError, match="3 names"):
        eval_plots.draw_confusion(counts, ("a", "b", "c"))


def test_confusion_of_an_empty_row_is_drawn() -> None:
    size_of(eval_plots.draw_confusion(np.array([[0, 0], [1, 3]]), ("a", "b")))


def test_histogram_tells_negative_and_positive_cases_apart(figures: list[Any]) -> None:
    p = np.array([0.0, 0.04, 0.11, 1.0, 0.5])
    y = np.array([0, 0, 1, 1, math.nan])
    eval_plots.draw_score_histogram({"any": (p, y, 0.4)})
    (axis,) = figures[0].axes
    negative, positive = (patch.get_data().values for patch in axis.patches)
    assert (negative[0], negative.sum()) == (1.0, 1.0)
    assert (positive[2], positive[-1], positive.sum()) == (0.5, 0.5, 1.0)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["negative, n = 2", "positive, n = 2", "threshold 0.4"]


def test_bland_altman_lines_are_bias_and_limits(figures: list[Any]) -> None:
    prediction, reference = np.array([1.0, 2.0, 4.0, math.nan]), np.array([0.0, 2.0, 2.0, 5.0])
    eval_plots.draw_bland_altman({"volume": (prediction, reference)}, "ml")
    (axis,) = figures[0].axes
    levels = sorted(line.get_ydata()[0] for line in axis.lines if len(set(line.get_ydata())) == 1)
    assert levels == pytest.approx([1 - 1.96, 0, 1, 1 + 1.96])  # differences 1, 0, 2: mean 1, deviation 1
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [[0.5, 1], [2, 0], [3, 2]])
    assert axis.get_xlabel() == "mean of the two, ml"


def test_scatter_has_the_reference_across(figures: list[Any]) -> None:
    eval_plots.draw_scatter({"volume": (np.array([1.0, 2.0]), np.array([3.0, 5.0]))})
    (axis,) = figures[0].axes
    assert [3, 1] in axis.lines[1].get_xydata().tolist()
    assert axis.get_xlim() == axis.get_ylim()


@pytest.mark.parametrize("count", [1, 2, 13])
def test_one_class_and_thirteen_are_readable(count: int, figures: list[Any]) -> None:
    """No panel is smaller than two inches; each class is named once."""
    curves = {name: (*roc_curve(y, p)[:2], "0.9") for i, name in enumerate(NAMES[:count]) for p, y in [scores(i)]}
    eval_plots.draw_roc(curves)
    figure = figures[0]
    inches = min(axis.get_window_extent().width / figure.dpi for axis in figure.axes)
    assert inches > 2
    named = [axis.get_title() for axis in figure.axes if axis.get_title()]
    if count > 6:
        assert named == NAMES
    else:
        (axis,) = figure.axes
        texts = [text.get_text() for text in axis.get_legend().get_texts()]
        assert texts == [f"{name}  0.9" for name in NAMES[:count]]
        styles = {(line.get_color(), line.get_linestyle()) for line in axis.lines if "class" in str(line.get_label())}
        assert len(styles) == count


def test_what_is_empty_or_named_strangely_is_drawn() -> None:
    nothing = np.zeros(0)
    strange = "a $formula_{ of } a class " * 4
    size_of(eval_plots.draw_calibration({strange: [(0.0, 0.1, 0, math.nan, math.nan)]}))
    size_of(eval_plots.draw_scatter({strange: (nothing, nothing)}))
    size_of(eval_plots.draw_bland_altman({strange: (np.ones(1), np.ones(1))}))
    size_of(eval_plots.draw_score_histogram({strange: (nothing, nothing, None)}))
    size_of(eval_plots.draw_roc({strange: (np.array([0.0, 1]), np.array([0.0, 1]), "$x$")}))
    with pytest.raises(ValueError, match="no class"):
        eval_plots.draw_scatter({})
