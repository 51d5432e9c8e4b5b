import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from medssl_cli.metrics.binary import BinaryScores, RankCurve, bin_of, decided
from medssl_cli.metrics.classification import auroc, average_precision


def table(n: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with ties, and labels that go with them."""
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < 0.4).astype(float)
    return np.round(np.clip(0.3 * label + rng.random(n) * 0.7, 0, 1), 1), label


def plain(probability: np.ndarray, label: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    scores = BinaryScores(probability, label, probability >= threshold)
    return {name: float(value[0]) for name, value in scores.values(np.ones((1, len(label)))).items()}


def by_scikit_learn(p: np.ndarray, y: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    called = (p >= threshold).astype(int)
    return {
        "auroc": sk.roc_auc_score(y, p),
        "average_precision": sk.average_precision_score(y, p),
        "accuracy": sk.accuracy_score(y, called),
        "balanced_accuracy": sk.balanced_accuracy_score(y, called),
        "f1": sk.f1_score(y, called),
        "mcc": sk.matthews_corrcoef(y, called),
        "sensitivity": sk.recall_score(y, called),
        "specificity": sk.recall_score(y, called, pos_label=0),
        "ppv": sk.precision_score(y, called),
        "npv": sk.precision_score(y, called, pos_label=0),
        "brier": sk.brier_score_loss(y, p),
        "log_loss": sk.log_loss(y, np.clip(p, 1e-15, 1 - 1e-15)),
        "prevalence": y.mean(),
        "n_positives": y.sum(),
    }


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_every_metric_equals_scikit_learn(threshold: float) -> None:
    p, y = table()
    found, expected = plain(p, y, threshold), by_scikit_learn(p, y, threshold)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_weights_equal_repeated_cases_in_scikit_learn() -> None:
    p, y = table()
    weights = np.random.default_rng(1).integers(0, 4, (5, len(y))).astype(float)
    found = BinaryScores(p, y, p >= 0.5).values(weights)
    for draw, row in enumerate(weights.astype(int)):
        expected = by_scikit_learn(np.repeat(p, row), np.repeat(y, row))
        assert {name: found[name][draw] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_ece_by_hand() -> None:
    # bin [.1, .2): p .1 and .15, no positive: gap .25; bin [.9, 1]: p .9 and 1, one positive: gap .9
    assert plain(np.array([0.1, 0.15, 0.9, 1.0]), np.array([0, 0, 1, 0.0]))["ece"] == pytest.approx((0.25 + 0.9) / 4)


def test_ece_equals_a_loop_over_bins() -> None:
    rng = np.random.default_rng(3)
    p, y = rng.random(300), rng.integers(0, 2, 300).astype(float)
    total = 0.0
    for low in np.arange(10) / 10:
        inside = (p >= low) & (p < low + 0.1)
        total += inside.mean() * abs(p[inside].mean() - y[inside].mean())
    assert plain(p, y)["ece"] == pytest.approx(total, abs=1e-12)


def test_bins_hold_their_lower_end_and_the_last_one_its_upper_end() -> None:
    assert bin_of(np.array([0.0, 0.099, 0.1, 0.5, 0.999, 1.0])).tolist() == [0, 0, 1, 5, 9, 9]


def test_m22_equal_scores_have_an_auroc_of_one_half_and_one_class_has_none() -> None:
    assert plain(np.full(4, 0.3), np.array([0, 1, 0, 1.0]))["auroc"] == 0.5
    lonely = plain(np.array([0.2, 0.8]), np.array([1.0, 1.0]))
    assert math.isnan(lonely["auroc"])
    assert math.isnan(lonely["average_precision"])
    assert math.isnan(lonely["specificity"])
    assert lonely["brier"] == pytest.approx((0.64 + 0.04) / 2)


def test_m25_a_probability_at_the_threshold_is_positive() -> None:
    assert plain(np.array([0.5, 0.1]), np.array([1.0, 0.0]))["sensitivity"] == 1


def test_w27_a_logit_of_0_3_is_positive() -> None:
    assert plain(1 / (1 + np.exp(-np.array([0.3, -0.3]))), np.array([1.0, 0.0]))["accuracy"] == 1


def test_unknown_labels_count_nowhere() -> None:
    p, y = table()
    some, unknown = np.append(p, [0.9, 0.1]), np.append(y, [math.nan, math.nan])
    assert plain(some, unknown) == pytest.approx(plain(p, y))


def test_no_case_at_all_is_undefined_with_a_reason() -> None:
    scores = BinaryScores(np.zeros(2), np.full(2, math.nan), np.zeros(2, bool))
    values = scores.values(np.ones((3, 2)))
    assert all(np.isnan(value).all() for name, value in values.items() if name != "n_positives")
    assert scores.reason("auroc") == "no case has a known label"


@pytest.mark.parametrize(
    ("label", "called", "name", "reason"),
    [
        ([0, 1], [0, 0], "ppv", "no case is called positive"),
        ([0, 1], [1, 1], "npv", "no case is called negative"),
        ([0, 0], [0, 0], "f1", "no case is positive or called positive"),
        ([0, 0], [0, 1], "sensitivity", "no case is positive"),
        ([1, 1], [0, 1], "specificity", "no case is negative"),
        ([1, 1], [0, 1], "auroc", "all cases are positive"),
        ([0, 0], [0, 1], "balanced_accuracy", "all cases are negative"),
    ],
)
def test_an_undefined_metric_gives_its_reason(label: list[int], called: list[int], name: str, reason: str) -> None:
    scores = BinaryScores(np.array([0.2, 0.7]), np.array(label, float), np.array(called, bool))
    assert np.isnan(scores.values(np.ones((1, 2)))[name][0])
    assert scores.reason(name) == reason


def test_mcc_is_0_where_its_root_is_0() -> None:
    none_called = decided(*(np.array([x], float) for x in (0, 0, 3, 5)))
    assert none_called["mcc"][0] == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=30), st.randoms())
def test_w29_areas_know_neither_order_nor_monotone_maps(cases: list[tuple[int, bool]], random: object) -> None:
    scores, label = np.array([c[0] for c in cases]) / 8, np.array([c[1] for c in cases])
    ones = np.ones((1, len(cases)))
    first = [float(area[0]) for area in RankCurve(scores, label).areas(ones)]
    assert first == pytest.approx([auroc(scores, label), average_precision(scores, label)], nan_ok=True)
    order = np.array(random.sample(range(len(cases)), len(cases)))  # type: ignore[attr-defined]
    turned = RankCurve(np.exp(3 * scores)[order], label[order]).areas(ones)
    assert [float(area[0]) for area in turned] == pytest.approx(first, nan_ok=True)


def test_average_precision_equals_scikit_learn_with_ties() -> None:
    p, y = table(200, seed=5)
    assert average_precision(p, y) == pytest.approx(sk.average_precision_score(y, p), abs=1e-12)
    assert math.isnan(average_precision(p, np.ones(200)))
