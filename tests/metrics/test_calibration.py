import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from medssl_cli.metrics.calibration import (
    SCALE_BOUNDS,
    apply_scaling,
    brier,
    ece,
    fit_platt,
    fit_temperature,
    nearby_frequency,
    nll,
    unfit_reasons,
    wilson_interval,
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def overconfident(n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Logits three times too large, of two labels."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, 2))
    return 3 * logits, (rng.random((n, 2)) < sigmoid(logits)).astype(float)


def graded(n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Logits of four classes twice too large."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(n, 4))
    cumulated = softmax(logits).cumsum(1)
    return 2 * logits, (rng.random(n)[:, None] > cumulated).sum(1).astype(float)


def test_brier_and_ece_and_likelihood_equal_scikit_learn_and_hand() -> None:
    z, y = overconfident(200)
    p = sigmoid(z[:, 0])
    assert brier(p, y[:, 0]) == pytest.approx(sk.brier_score_loss(y[:, 0], p))
    assert nll(z, y, "multilabel") == pytest.approx([sk.log_loss(y[:, i], sigmoid(z[:, i])) for i in range(2)])
    assert ece(np.array([0.1, 0.15, 0.9, 1.0]), np.array([0, 0, 1, 0.0])) == pytest.approx((0.25 + 0.9) / 4)
    z, y = graded(200)
    assert nll(z, y, "multiclass") == pytest.approx([sk.log_loss(y, softmax(z))])
    assert math.isnan(brier(np.zeros(1), np.array([math.nan])))


def test_temperature_finds_the_scale_that_was_planted() -> None:
    scale, shift = fit_temperature(*overconfident(), "multilabel")
    assert scale == pytest.approx([1 / 3, 1 / 3], rel=0.1)
    assert (shift == 0).all()
    scale, _ = fit_temperature(*graded(), "multiclass")
    assert scale == pytest.approx([0.5] * 4, rel=0.1)
    assert len(set(scale)) == 1


def test_temperature_is_the_optimum_of_a_grid() -> None:
    z, y = overconfident(300)
    scale, _ = fit_temperature(z[:, :1], y[:, :1], "binary")
    grid = np.exp(np.linspace(*np.log(SCALE_BOUNDS), 401))
    losses = [sk.log_loss(y[:, 0], np.clip(sigmoid(s * z[:, 0]), 1e-15, 1 - 1e-15)) for s in grid]
    assert nll(scale * z[:, :1], y[:, :1], "binary")[0] <= min(losses) + 1e-12
    assert scale[0] == pytest.approx(grid[int(np.argmin(losses))], rel=0.03)


@pytest.mark.parametrize("fit", [fit_temperature, fit_platt])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 12))
def test_scaling_never_raises_the_loss(fit, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(size, 3)) * 10 ** rng.uniform(-3, 2)
    y = rng.integers(0, 2, (size, 3)).astype(float)
    y[rng.random(y.shape) < 0.2] = math.nan
    before, after = nll(z, y, "multilabel"), nll(apply_scaling(z, fit(z, y, "multilabel")), y, "multilabel")
    assert (after[~np.isnan(before)] <= before[~np.isnan(before)]).all()
    classes = rng.integers(0, 3, size).astype(float)
    after = nll(apply_scaling(z, fit(z, classes, "multiclass")), classes, "multiclass")
    assert after[0] <= nll(z, classes, "multiclass")[0]


def test_scaling_improves_calibration_and_keeps_the_order() -> None:
    z, y = overconfident()
    for fit in (fit_temperature, fit_platt):
        calibrated = apply_scaling(z, fit(z, y, "multilabel"))
        assert ece(sigmoid(calibrated[:, 0]), y[:, 0]) < 0.5 * ece(sigmoid(z[:, 0]), y[:, 0])
        assert (np.argsort(calibrated[:, 0]) == np.argsort(z[:, 0])).all()


def test_platt_equals_logistic_regression() -> None:
    z, y = overconfident(500)
    scale, shift = fit_platt(z + 1, y, "multilabel")
    for i in range(2):
        model = LogisticRegression(C=np.inf, tol=1e-10).fit(z[:, i : i + 1] + 1, y[:, i])
        assert (scale[i], shift[i]) == pytest.approx((model.coef_[0, 0], model.intercept_[0]), abs=1e-4)


def test_platt_moves_shifted_classes_back() -> None:
    z, y = graded()
    moved = z + np.array([0, 1, -1, 0])
    calibrated = apply_scaling(moved, fit_platt(moved, y, "multiclass"))
    assert nll(calibrated, y, "multiclass")[0] <= nll(0.5 * z, y, "multiclass")[0] + 1e-9
    assert softmax(calibrated).mean(0) == pytest.approx(np.bincount(y.astype(int)) / len(y), abs=1e-4)


@pytest.mark.parametrize("fit", [fit_temperature, fit_platt])
def test_equal_labels_leave_the_logits_as_they_are_with_a_reason(fit) -> None:
    z, y = overconfident(50)
    y[:, 0] = 1
    scale, shift = fit(z, y, "multilabel")
    assert (scale[0], shift[0]) == (1, 0)
    assert scale[1] != 1
    assert unfit_reasons(y, "multilabel") == ("all 50 cases have the same label", "")
    scale, shift = fit(graded(9)[0], np.zeros(9), "multiclass")
    assert (scale == 1).all()
    assert (shift == 0).all()
    assert unfit_reasons(np.full(3, math.nan), "multiclass") == ("no case has a known class",)


def test_separable_cases_stop_at_the_bounds() -> None:
    z, y = np.array([-2.0, -1, 1, 2]), np.array([0, 0, 1, 1.0])
    assert fit_temperature(z, y, "binary")[0][0] == SCALE_BOUNDS[1]
    scale, shift = fit_platt(z, y, "binary")
    assert np.isfinite([*scale, *shift]).all()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        fit_temperature(np.zeros((4, 2)), np.zeros((4, 3)), "multilabel")


# --- nearby frequency ------------------------------------------------------------------------------------------------


def test_wilson_interval_by_hand() -> None:
    # 8 of 10: (0.8 + 1.9207/10 -/+ 1.96 sqrt(0.016 + 3.8415/400)) / 1.38415 = 0.4902, 0.9433
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert all(math.isnan(end) for end in wilson_interval(0, 0))


def test_wilson_interval_equals_scipy() -> None:
    from scipy.stats import binomtest

    for positives in range(13):
        expected = binomtest(positives, 12).proportion_ci(0.95, method="wilson")
        assert wilson_interval(positives, 12) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_nearest_tenth_is_counted_and_ten_at_least() -> None:
    p = np.arange(200) / 200
    y = (np.arange(200) >= 100).astype(float)
    high = nearby_frequency(0.9, p, y)
    assert (high.n, high.positives) == (21, 21)  # of the 20 nearest the last two are equally near, so both count
    few = nearby_frequency(0.0, p[:60], y[:60])
    assert (few.n, few.positives, few.low) == (10, 0, 0.0)
    assert nearby_frequency(0.5, p[:4], np.array([1, 0, math.nan, 1])).n == 3


def test_no_validation_case_tells_nothing() -> None:
    found = nearby_frequency(0.4, np.zeros(0), np.zeros(0))
    assert math.isnan(found.low)
    assert found.n == 0


def test_platt_smoothing_keeps_separable_cases_from_certainty() -> None:
    from scipy.optimize import minimize
    from scipy.special import expit, log_expit

    z, y = np.array([[-2.0], [-1.0], [0.5], [3.0], [4.0]]), np.array([[0.0], [0.0], [1.0], [1.0], [1.0]])
    sure = np.where(y[:, 0] > 0, 4 / 5, 1 / 4)  # (3 + 1) / (3 + 2) and 1 / (2 + 2), Platt 1999

    def loss(x: np.ndarray) -> float:
        u = x[0] * z[:, 0] + x[1]
        return float(-(sure * log_expit(u) + (1 - sure) * log_expit(-u)).mean())

    expected = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}).x
    scale, shift = fit_platt(z, y, "binary", smooth=True)
    assert [scale[0], shift[0]] == pytest.approx(expected, abs=1e-4)
    assert fit_temperature(z, y, "binary")[0][0] == 100  # without: as far as it goes
    one, none = fit_temperature(np.array([[-3.0], [3.0]]), np.array([[0.0], [1.0]]), "binary", smooth=True)
    assert expit(3 * one[0]) == pytest.approx(2 / 3, abs=1e-6)
    assert none[0] == 0
    two = np.array([[3.0, 0.0], [0.0, 3.0]])
    pair, _ = fit_temperature(two, np.array([0, 1]), "multiclass", smooth=True)
    assert expit(3 * pair[0]) == pytest.approx(2 / 3, abs=1e-6)
