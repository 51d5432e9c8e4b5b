import json
import math

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn import metrics as sk

from medssl_cli.core.run import to_json
from medssl_cli.metrics.evaluation import evaluate_regression
from medssl_cli.metrics.intervals import draw_weights, number_groups
from medssl_cli.metrics.regression import RegressionScores


def table(n: int = 60) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(n, 2)) * [0.05, 300] + [0.2, 9000]
    return reference + rng.normal(size=(n, 2)) * [0.02, 100], reference, [f"p{i // 2}" for i in range(n)]


def values(prediction: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    found = RegressionScores(prediction, reference).values(np.ones((1, len(reference))))
    return {name: float(value[0]) for name, value in found.items()}


def expected_of(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    sd = np.std(a - b, ddof=1)
    return {
        "mae": sk.mean_absolute_error(b, a),
        "rmse": sk.root_mean_squared_error(b, a),
        "r2": sk.r2_score(b, a),
        "pearson": pearsonr(a, b).statistic,
        "relative_error": np.abs(a - b).mean() / np.abs(b).mean(),
        "bias": (a - b).mean(),
        "limit_low": (a - b).mean() - 1.96 * sd,
        "limit_high": (a - b).mean() + 1.96 * sd,
    }


@pytest.mark.parametrize("target", [0, 1])
def test_every_metric_equals_scikit_learn_and_scipy(target: int) -> None:
    a, b, _ = table()
    assert values(a[:, target], b[:, target]) == pytest.approx(expected_of(a[:, target], b[:, target]), rel=1e-9)


def test_weights_equal_repeated_cases() -> None:
    a, b, groups = table()
    numbers, n_groups = number_groups(groups)
    weights = draw_weights(numbers, n_groups, range(4), seed=0)
    found = RegressionScores(a[:, 1], b[:, 1]).values(weights)
    for draw, row in enumerate(weights.astype(int)):
        expected = expected_of(np.repeat(a[:, 1], row), np.repeat(b[:, 1], row))
        assert {name: found[name][draw] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_w31_mae_is_in_units_and_a_column_of_mean_0_stays_finite() -> None:
    found = values(np.array([-1.0, 0.0, 2.0]), np.array([-2.0, 0.0, 2.0]))
    assert found["mae"] == pytest.approx(1 / 3)
    assert found["relative_error"] == pytest.approx((1 / 3) / (4 / 3))


def test_w31_references_of_0_have_no_relative_error_and_say_so() -> None:
    found = evaluate_regression(np.array([0.5, 1, 0]), np.zeros(3), targets=["area"], groups=list("abc"), draws=20)
    facts = json.loads(to_json(found.to_json()), parse_constant=pytest.fail)["metrics"]
    assert facts["relative_error"]["value"] is None
    assert facts["relative_error"]["reason"] == "all references are 0"
    assert facts["r2"]["reason"] == "all references are equal"
    assert facts["mae"]["value"] == 0.5
    assert found.undefined_classes == ("area",)


def test_equal_predictions_have_no_correlation() -> None:
    scores = RegressionScores(np.full(3, 0.1), np.array([1.0, 2, 3]))
    assert np.isnan(scores.values(np.ones((1, 3)))["pearson"][0])
    assert scores.reason("pearson") == "all predictions are equal"
    assert math.isnan(values(np.array([1.0]), np.array([2.0]))["limit_low"])


def test_targets_of_different_units_are_averaged_without_unit_only() -> None:
    a, b, groups = table()
    b[:20, 0] = math.nan
    found = evaluate_regression(a, b, targets=["ratio", "volume"], groups=groups, draws=60)
    assert set(found.metrics) == {"macro_r2", "macro_pearson", "macro_relative_error"}
    assert found.metrics["macro_r2"].value == pytest.approx(
        (sk.r2_score(b[20:, 0], a[20:, 0]) + sk.r2_score(b[:, 1], a[:, 1])) / 2
    )
    assert found.per_class["ratio"]["mae"].n == 40
    assert found.per_class["ratio"]["mae"].n_groups == 20
    assert found.per_class["volume"]["mae"].ci_low < found.per_class["volume"]["mae"].value


def test_one_target_is_the_whole() -> None:
    a, b, groups = table()
    found = evaluate_regression(a[:, 0], b[:, 0], targets=["ratio"], groups=groups, draws=30)
    assert found.metrics == found.per_class["ratio"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="targets"):
        evaluate_regression(np.zeros(3), np.zeros((3, 2)), targets=["a"], groups=list("abc"))
    with pytest.raises(ValueError, match="not finite"):
        evaluate_regression(np.array([np.nan]), np.zeros(1), targets=["a"], groups=["a"])
