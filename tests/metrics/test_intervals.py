import math
import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medssl_cli.metrics import intervals
from medssl_cli.metrics.evaluation import evaluate_classification
from medssl_cli.metrics.intervals import bootstrap, draw_weights, number_groups, percentile_interval


def table(n: int = 200, per_patient: int = 2) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    groups = [f"p{i // per_patient}" for i in range(n)]
    label = np.repeat(rng.random(-(-n // per_patient)) < 0.4, per_patient)[:n].astype(float)
    return np.round(np.clip(0.25 * label + 0.75 * rng.random(n), 0, 1), 2), label, groups


def test_patients_are_drawn_whole() -> None:
    numbers, n_groups = number_groups(["b", "a", "b", "c"])
    assert numbers.tolist() == [1, 0, 1, 2]
    weights = draw_weights(numbers, n_groups, range(50), seed=1)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert len(np.unique(weights, axis=0)) > 5


def test_draws_know_neither_block_size_nor_order(monkeypatch: pytest.MonkeyPatch) -> None:
    p, _, groups = table(40)

    def mean(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"mean": weights @ p / weights.sum(1)}

    whole = bootstrap(mean, groups, 30, seed=3)["mean"]
    monkeypatch.setattr(intervals, "_BLOCK_CELLS", 7 * 40)
    assert len(list(intervals.weight_blocks(groups, 30, 3))) == 5
    assert bootstrap(mean, groups, 30, seed=3)["mean"] == pytest.approx(whole, rel=1e-12)
    assert (bootstrap(mean, groups, 30, seed=4)["mean"] != whole).any()


def test_interval_equals_scikit_learn_on_resampled_cases() -> None:
    p, y, groups = table(60)
    found = evaluate_classification(p, y, task="binary", classes=["x"], groups=groups, draws=200, seed=9)
    numbers, n_groups = number_groups(groups)
    counts = draw_weights(numbers, n_groups, range(200), seed=9).astype(int)
    areas = [roc_auc_score(np.repeat(y, row), np.repeat(p, row)) for row in counts]
    metric = found.metrics["auroc"]
    assert (metric.ci_low, metric.ci_high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=1e-12)
    assert (metric.n, metric.n_groups) == (60, 30)


def test_interval_of_a_mean_agrees_with_its_standard_error() -> None:
    values = np.random.default_rng(2).normal(size=400)
    groups = [str(i) for i in range(400)]
    drawn = bootstrap(lambda w: {"mean": w @ values / w.sum(1)}, groups, 2000, seed=0)["mean"]
    low, high, _ = percentile_interval(drawn, 400)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.06)


def test_copies_of_a_patient_do_not_narrow_the_interval() -> None:
    p, y, _ = table(50, per_patient=1)
    names = [str(i) for i in range(50)]
    one = evaluate_classification(p, y, task="binary", classes=["x"], groups=names, draws=300).metrics["auroc"]
    copies = evaluate_classification(
        np.tile(p, 4), np.tile(y, 4), task="binary", classes=["x"], groups=names * 4, draws=300
    ).metrics["auroc"]
    assert (copies.ci_low, copies.ci_high) == pytest.approx((one.ci_low, one.ci_high))
    assert copies.n == 200
    assert copies.n_groups == 50


def test_one_patient_has_no_interval() -> None:
    p, y, _ = table(20)
    metric = evaluate_classification(p, y, task="binary", classes=["x"], groups=["a"] * 20).metrics["auroc"]
    assert not math.isnan(metric.value)
    assert math.isnan(metric.ci_low)
    assert metric.reason == "no interval: fewer than two groups (patients)"
    assert metric.to_json()["ci_low"] is None


def test_a_metric_undefined_in_many_draws_has_no_interval() -> None:
    p = np.linspace(0, 1, 12)
    y = np.eye(12)[3]  # one positive patient: absent from a third of the draws
    found = evaluate_classification(p, y, task="binary", classes=["x"], groups=list("abcdefghijkl"))
    assert math.isnan(found.metrics["auroc"].ci_low)
    assert "bootstrap draws, at least 90% are needed" in found.metrics["auroc"].reason
    assert not math.isnan(found.metrics["brier"].ci_low)


def test_few_undefined_draws_are_left_out() -> None:
    values = np.append(np.arange(95.0), np.full(5, math.nan))
    assert percentile_interval(values, 10) == pytest.approx((*np.quantile(np.arange(95), [0.025, 0.975]), ""))
    assert math.isnan(percentile_interval(np.append(values, math.nan * np.ones(10)), 10).low)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    groups, inside = [str(i) for i in range(80)], 0
    for trial in range(120):
        values = rng.normal(size=80)
        drawn = bootstrap(lambda w, v=values: {"m": w @ v / w.sum(1)}, groups, 300, seed=trial)["m"]
        low, high, _ = percentile_interval(drawn, 80)
        inside += low <= 0 <= high
    assert 105 <= inside <= 120  # 114 expected, sd 2.4


@pytest.mark.slow
def test_ten_thousand_cases_take_seconds() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random((10_000, 6)) < 0.3).astype(float)
    p = np.clip(0.3 * y + 0.7 * rng.random((10_000, 6)), 0, 1)
    start = time.perf_counter()
    groups = [str(i // 2) for i in range(10_000)]
    found = evaluate_classification(p, y, task="multilabel", classes=list("abcdef"), groups=groups)
    assert time.perf_counter() - start < 60
    assert found.metrics["macro_auroc"].ci_low < found.metrics["macro_auroc"].value
