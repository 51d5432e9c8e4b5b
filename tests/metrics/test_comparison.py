import itertools
import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from medssl_cli.metrics import comparison
from medssl_cli.metrics.comparison import delong, delong_interval, paired_permutation, paired_permutations
from medssl_cli.metrics.evaluation import OVERALL, evaluate_classification


def runs(n: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two correlated sets of scores with ties, the first one better."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.4).astype(float)
    shared = rng.normal(size=n)
    a, b = 1.5 * y + shared + 0.5 * rng.normal(size=n), 0.7 * y + shared + 0.5 * rng.normal(size=n)
    return np.round(1 / (1 + np.exp(-a)), 2), np.round(1 / (1 + np.exp(-b)), 2), y


# --- DeLong ----------------------------------------------------------------------------------------------------------


def delong_by_definition(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Difference of areas and its variance, from the kernel of every pair (DeLong et al. 1988)."""
    structures = []
    for scores in (a, b):
        pairs = scores[y == 1][:, None] - scores[y == 0][None]
        kernel = (pairs > 0) + 0.5 * (pairs == 0)
        structures.append((kernel.mean(), kernel.mean(1), kernel.mean(0)))
    (auc_a, v10_a, v01_a), (auc_b, v10_b, v01_b) = structures
    m, n = len(v10_a), len(v01_a)
    d10, d01 = (v10_a - auc_a) - (v10_b - auc_b), (v01_a - auc_a) - (v01_b - auc_b)
    return auc_a - auc_b, (d10**2).sum() / (m - 1) / m + (d01**2).sum() / (n - 1) / n


def test_delong_equals_the_formula_over_all_pairs() -> None:
    a, b, y = runs()
    difference, variance = delong_by_definition(a, b, y)
    found = delong(a, b, y)
    assert found.auc_a == pytest.approx(roc_auc_score(y, a))
    assert found.auc_b == pytest.approx(roc_auc_score(y, b))
    assert found.difference == pytest.approx(difference, abs=1e-12)
    assert found.se == pytest.approx(math.sqrt(variance), abs=1e-12)
    assert found.p == pytest.approx(2 * norm.sf(abs(difference) / math.sqrt(variance)), abs=1e-12)


def test_delong_interval_agrees_with_the_bootstrap() -> None:
    a, _, y = runs(600)
    found = delong_interval(a, y)
    groups = [str(i) for i in range(600)]
    metric = evaluate_classification(a, y, task="binary", classes=["x"], groups=groups, draws=2000).metrics["auroc"]
    assert found.auc == pytest.approx(metric.value)
    assert (found.low, found.high) == pytest.approx((metric.ci_low, metric.ci_high), abs=0.004)


def test_delong_agrees_with_the_permutation_test() -> None:
    a, _, y = runs(300, seed=2)
    groups = [str(i) for i in range(300)]
    noise = np.random.default_rng(1).normal(size=300)
    worse = np.clip(a + 0.15 * noise, 0, 1)  # a small difference, so that p is not at its floor
    permuted = paired_permutation(a, worse, y, groups, "auroc", draws=2000)
    assert permuted.difference == pytest.approx(delong(a, worse, y).difference)
    assert 0.02 < permuted.p < 0.98
    assert permuted.p == pytest.approx(delong(a, worse, y).p, abs=0.03)


def test_delong_at_the_edges() -> None:
    a, _, y = runs()
    same = delong(a, a, y)
    assert (same.difference, same.z, same.p) == (0, 0, 1)
    against = delong(y, 1 - y, y)
    assert (against.difference, against.se, against.p) == (1, 0, 0)
    assert math.isnan(delong(a, a, np.ones(80)).p)
    lone = delong_interval(np.array([0.1, 0.2, 0.9]), np.array([0, 0, 1.0]))
    assert lone.auc == 1
    assert math.isnan(lone.low)
    with pytest.raises(ValueError, match="differ in shape"):
        delong_interval(a, y[:3])


def test_delong_leaves_unknown_labels_out() -> None:
    a, b, y = runs()
    more = [np.append(x, 0.5) for x in (a, b)]
    assert delong(*more, np.append(y, math.nan)) == pytest.approx(delong(a, b, y))


# --- permutation -----------------------------------------------------------------------------------------------------


def test_identical_runs_do_not_differ() -> None:
    a, _, y = runs()
    for groups in ([str(i) for i in range(80)], [str(i % 4) for i in range(80)]):
        tests = paired_permutations(a, a, y, groups, draws=200)
        assert all((test.difference, test.p) == (0, 1) for test in tests.values())


def test_a_small_case_by_hand() -> None:
    """Three patients, Brier score: differences of squares -.3, -.1, -.2 a case, so all 8 signs give sums of -.6 to .6.

    Only the runs as they are and all three swapped reach .6: p = 2 / 8.
    """
    y = np.zeros(3)
    a, b = np.sqrt([0.1, 0.2, 0.3]), np.sqrt([0.4, 0.3, 0.5])
    found = paired_permutation(a, b, y, ["x", "y", "z"], "brier")
    assert found.difference == pytest.approx(-0.2)
    assert (found.p, found.draws) == (0.25, 7)


def test_an_exact_test_equals_enumeration_with_scikit_learn() -> None:
    a, b, y = runs(24)
    groups = [f"p{i // 3}" for i in range(24)]
    observed, larger = roc_auc_score(y, a) - roc_auc_score(y, b), 0
    for signs in itertools.product([False, True], repeat=8):
        swapped = np.repeat(signs, 3)
        one, other = np.where(swapped, b, a), np.where(swapped, a, b)
        larger += abs(roc_auc_score(y, one) - roc_auc_score(y, other)) >= abs(observed) - 1e-12
    found = paired_permutation(a, b, y, groups, "auroc")
    assert found.difference == pytest.approx(observed)
    assert found.p == pytest.approx(larger / 256)
    assert found.draws == 255


def test_patients_are_swapped_whole() -> None:
    a, b, y = runs(40)
    copies = paired_permutation(np.tile(a, 3), np.tile(b, 3), np.tile(y, 3), [str(i) for i in range(40)] * 3, "auroc")
    assert copies == pytest.approx(paired_permutation(a, b, y, [str(i) for i in range(40)], "auroc"))


def test_a_function_gives_what_the_name_gives() -> None:
    a, b, y = runs(50)
    groups = [str(i) for i in range(50)]
    named = paired_permutation(a, b, y, groups, "auroc", 300)
    own = paired_permutation(a, b, y, groups, lambda p, y: roc_auc_score(y, p[:, 0]), 300)
    assert own == pytest.approx(named)


def test_swaps_know_the_seed_and_not_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, y = runs(50)
    b = np.clip(a + np.random.default_rng(0).normal(size=50) * 0.1, 0, 1)  # alike, so that p is not at its floor
    groups = [str(i) for i in range(50)]
    first = paired_permutation(a, b, y, groups, "auroc", 300, seed=1)
    monkeypatch.setattr(comparison, "_BLOCK_CELLS", 700)
    assert paired_permutation(a, b, y, groups, "auroc", 300, seed=1) == first
    assert paired_permutation(a, b, y, groups, "auroc", 300, seed=2).p != first.p


def test_chance_differences_are_seldom_significant() -> None:
    rng, small = np.random.default_rng(0), 0
    for trial in range(100):
        y = (rng.random(40) < 0.5).astype(float)
        shared = y + rng.normal(size=40)
        a, b = (1 / (1 + np.exp(-(shared + rng.normal(size=40)))) for _ in range(2))
        small += paired_permutation(a, b, y, [str(i) for i in range(40)], "auroc", 99, seed=trial).p <= 0.1
    assert 3 <= small <= 19  # 10 expected, sd 3


def test_every_metric_of_every_task_is_compared() -> None:
    rng = np.random.default_rng(0)
    groups = [str(i // 2) for i in range(60)]
    classes = rng.integers(0, 3, 60)
    logits = [2 * scale * np.eye(3)[classes] + rng.normal(size=(60, 3)) for scale in (1, 0.3)]
    a, b = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in logits)
    tests = paired_permutations(a, b, classes, groups, 100)
    one, other = (
        evaluate_classification(p, classes, task="multiclass", classes=list("xyz"), groups=groups, draws=0)
        for p in (a, b)
    )
    for name, metric in one.metrics.items():
        assert tests[OVERALL, name].difference == pytest.approx(metric.value - other.metrics[name].value)
    assert tests[OVERALL, "macro_auroc"].p < 0.05
    assert tests[1, "auroc"].difference == pytest.approx(
        one.per_class["y"]["auroc"].value - other.per_class["y"]["auroc"].value
    )
    labels = np.eye(3)[classes]
    assert (OVERALL, "macro_f1") in paired_permutations(a, b, labels, groups, 20)
    numbers = paired_permutation(a[:, 0], b[:, 0], labels[:, 0], groups, "mae", 100, task="regression")
    assert numbers.difference == pytest.approx(np.abs(a - labels)[:, 0].mean() - np.abs(b - labels)[:, 0].mean())


def test_each_run_keeps_its_thresholds() -> None:
    y = np.array([0, 1, 0, 1.0])
    a = np.array([0.1, 0.3, 0.1, 0.3])
    b = np.array([0.6, 0.8, 0.6, 0.8])
    found = paired_permutation(a, b, y, list("wxyz"), "accuracy", thresholds_a=[0.2], thresholds_b=[0.7])
    assert (found.difference, found.p) == (0, 1)
    assert paired_permutation(a, b, y, list("wxyz"), "accuracy").difference == 0
    assert paired_permutation(a, b, y, list("wxyz"), "accuracy", thresholds_a=[0.2]).difference == 0.5


def test_an_undefined_metric_has_no_p() -> None:
    found = paired_permutation(np.full(3, 0.2), np.full(3, 0.3), np.zeros(3), list("abc"), "auroc")
    assert math.isnan(found.p)
    assert found.reason == "the metric is not defined in both runs"


def test_what_does_not_fit_is_refused() -> None:
    a, b, y = runs()
    with pytest.raises(ValueError, match=r"none of .*auroc"):
        paired_permutation(a, b, y, ["a"] * 80, "dice")
    with pytest.raises(ValueError, match="differ in shape"):
        paired_permutation(a, b[:3], y, ["a"] * 80, "auroc")
