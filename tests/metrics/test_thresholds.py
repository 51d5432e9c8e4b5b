import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from medssl_cli.metrics.thresholds import Threshold, candidate_thresholds, choose_threshold, parse_rule

P = np.array([0.1, 0.2, 0.35, 0.4, 0.6, 0.8])
Y = np.array([0, 0, 1, 0, 1, 1.0])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("youden", 0.5),  # between .4 and .6: 2/3 + 1 - 1; between .2 and .35: 1 + 2/3 - 1; .5 is nearer to .5
        ("f1", 0.275),  # 3 of 4 called: 6/7; above it 4/5
        ("mcc", 0.5),  # equal to that of .275, and nearer to .5
        ("sensitivity=0.9", 0.275),
        ("sensitivity=0.6", 0.5),
        ("specificity=0.9", 0.5),
        ("specificity=0.6", 0.275),
        ("sensitivity=0", 0.5),  # specificity is 1 from .5 on
        ("fixed=0.3", 0.3),
    ],
)
def test_each_rule_by_hand(rule: str, expected: float) -> None:
    assert choose_threshold(P, Y, rule) == (pytest.approx(expected), "")


def brute_force(p: np.ndarray, y: np.ndarray, score: object) -> float:
    """The best score over every threshold there is, by scikit-learn."""
    return max(score(y, p >= t) for t in np.append(np.unique(p), 2.0))  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=2, max_size=25))
def test_no_threshold_is_better(cases: list[tuple[int, bool]]) -> None:
    p, y = np.array([c[0] for c in cases]) / 10, np.array([c[1] for c in cases]).astype(float)
    if len(np.unique(y)) < 2:
        return
    scores = {
        "f1": lambda y, c: sk.f1_score(y, c, zero_division=0),
        "mcc": sk.matthews_corrcoef,
        "youden": lambda y, c: 2 * sk.balanced_accuracy_score(y, c) - 1,
    }
    for rule, score in scores.items():
        value, note = choose_threshold(p, y, rule)
        assert not note
        assert score(y, p >= value) == pytest.approx(brute_force(p, y, score), abs=1e-9)
    at_least = choose_threshold(p, y, "sensitivity=0.8").value
    assert sk.recall_score(y, p >= at_least) >= 0.8
    at_least = choose_threshold(p, y, "specificity=0.8").value
    assert sk.recall_score(y, p >= at_least, pos_label=0) >= 0.8


def test_of_equals_the_one_nearest_one_half_is_taken() -> None:
    assert choose_threshold(np.array([0.1, 0.2, 0.8, 0.95]), np.array([0, 0, 1, 1.0]), "youden").value == 0.5
    values = [choose_threshold(np.array([0.7, 0.9]), np.array([0, 1.0]), rule).value for rule in ("f1", "mcc")]
    assert values == pytest.approx([0.8, 0.8])


def test_candidates_lie_between_cases_and_cut_even_neighbouring_numbers() -> None:
    low = 0.3
    high = np.nextafter(low, 1)
    assert candidate_thresholds(np.array([low, 0.5])).tolist() == [0.0, 0.4, 1.0]
    assert choose_threshold(np.array([low, high]), np.array([0, 1.0]), "youden").value == high
    everything = candidate_thresholds(np.array([0.0, 1.0]))
    assert ((np.array([0.0, 1.0])[:, None] >= everything).sum(0) == [2, 1, 0]).all()


@pytest.mark.parametrize("label", [0.0, 1.0, math.nan])
def test_one_class_gives_one_half_and_says_so(label: float) -> None:
    found = choose_threshold(P, np.full(6, label), "youden")
    assert found.value == 0.5
    assert "cannot be applied" in found.note


def test_unknown_labels_are_left_out() -> None:
    more = np.append(P, [0.9, 0.05]), np.append(Y, [math.nan, math.nan])
    for rule in ("youden", "f1", "sensitivity=0.9"):
        assert choose_threshold(*more, rule) == choose_threshold(P, Y, rule)


def test_a_fixed_threshold_needs_no_cases() -> None:
    assert choose_threshold(np.zeros(0), np.zeros(0), "fixed=0.25") == Threshold(0.25)


@pytest.mark.parametrize(
    "rule", ["best", "sensitivity", "sensitivity=", "sensitivity=2", "youden=1", "fixed=x", "fixed=nan"]
)
def test_what_is_no_rule_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="threshold rule"):
        parse_rule(rule)
