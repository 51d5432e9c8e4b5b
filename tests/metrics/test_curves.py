import math

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from medssl_cli.metrics.calibration import ece
from medssl_cli.metrics.curves import bland_altman, confusion, pr_points, reliability_bins, roc_points


def table(n: int = 150) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = (rng.random(n) < 0.4).astype(float)
    return np.round(np.clip(0.3 * y + 0.7 * rng.random(n), 0, 1), 2), y


def test_roc_points_equal_scikit_learn() -> None:
    p, y = table()
    for found, expected in zip(roc_points(p, y), sk.roc_curve(y, p, drop_intermediate=False), strict=True):
        assert found == pytest.approx(expected)


def test_pr_points_equal_scikit_learn() -> None:
    p, y = table()
    recall, precision, thresholds = pr_points(p, y)
    expected_precision, expected_recall, expected_thresholds = sk.precision_recall_curve(y, p)
    assert recall == pytest.approx(expected_recall[::-1])
    assert precision == pytest.approx(expected_precision[::-1])
    assert thresholds[1:] == pytest.approx(expected_thresholds[::-1])


def test_areas_under_the_points_are_the_metrics() -> None:
    p, y = table()
    fpr, tpr, _ = roc_points(p, y)
    assert np.trapezoid(tpr, fpr) == pytest.approx(sk.roc_auc_score(y, p))
    recall, precision, _ = pr_points(p, y)
    assert (np.diff(recall) * precision[1:]).sum() == pytest.approx(sk.average_precision_score(y, p))


def test_curves_leave_unknown_labels_out_and_an_absent_class_is_nan() -> None:
    p, y = table()
    for found, expected in zip(roc_points(np.append(p, 0.5), np.append(y, math.nan)), roc_points(p, y), strict=True):
        assert found == pytest.approx(expected)
    assert np.isnan(roc_points(p, np.ones(len(p)))[0]).all()
    assert np.isnan(pr_points(p, np.zeros(len(p)))[0]).all()


def test_reliability_bins_equal_scikit_learn_and_add_up_to_the_ece() -> None:
    rng = np.random.default_rng(3)
    p = rng.random(400) * 0.75
    y = (rng.random(400) < p**2).astype(float)
    bins = reliability_bins(p, y)
    share, mean = calibration_curve(y, p, n_bins=10)
    filled = [found for found in bins if found.n]
    assert [found.mean_p for found in filled] == pytest.approx(mean)
    assert [found.share for found in filled] == pytest.approx(share)
    assert sum(found.n * abs(found.mean_p - found.share) for found in filled) / 400 == pytest.approx(ece(p, y))
    assert (bins[9].n, math.isnan(bins[9].share), bins[9].high) == (0, True, 1.0)


def test_confusion_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 3, 50), rng.integers(0, 3, 50).astype(float)
    assert (confusion(prediction, reference, 4) == sk.confusion_matrix(reference, prediction, labels=range(4))).all()
    reference[:10] = math.nan
    assert confusion(prediction, reference, 3).sum() == 40


def test_bland_altman_by_hand() -> None:
    found = bland_altman(np.array([11.0, 9, 12, 5]), np.array([10.0, 10, 10, math.nan]))
    assert found["bias"] == pytest.approx(2 / 3)
    assert found["sd"] == pytest.approx(math.sqrt(7 / 3))
    assert found["low"] == pytest.approx(2 / 3 - 1.96 * math.sqrt(7 / 3))
    assert found["high"] == pytest.approx(2 / 3 + 1.96 * math.sqrt(7 / 3))
    assert found["means_N"] == pytest.approx([10.5, 9.5, 11])
    assert found["differences_N"] == pytest.approx([1, -1, 2])
