import math

import numpy as np
import pytest
from sklearn import metrics as sk

from medssl_cli.metrics.evaluation import evaluate_classification

GRADES = ("g0", "g1", "g2", "g3")


def table(n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, n)
    logits = np.round(rng.normal(size=(n, 4)) + 1.5 * np.eye(4)[label], 1)
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True), label.astype(float)


def overall(p: np.ndarray, y: np.ndarray, **options: object) -> dict[str, float]:
    groups = [str(i) for i in range(len(y))]
    found = evaluate_classification(p, y, task="multiclass", classes=GRADES, groups=groups, draws=0, **options)
    return {name: metric.value for name, metric in found.metrics.items()}


def test_metrics_over_all_classes_equal_scikit_learn() -> None:
    p, y = table()
    decision = p.argmax(1)
    expected = {
        "accuracy": sk.accuracy_score(y, decision),
        "balanced_accuracy": sk.balanced_accuracy_score(y, decision),
        "mcc": sk.matthews_corrcoef(y, decision),
        "log_loss": sk.log_loss(y, p),
        "brier": sk.brier_score_loss(y, p, labels=[0, 1, 2, 3], scale_by_half=False),
        "quadratic_kappa": sk.cohen_kappa_score(y, decision, weights="quadratic"),
        "macro_auroc": sk.roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "macro_average_precision": sk.average_precision_score(y, p, average="macro"),
        "macro_f1": sk.f1_score(y, decision, average="macro"),
        "macro_ppv": sk.precision_score(y, decision, average="macro"),
    }
    found = overall(p, y)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_ece_of_the_most_probable_class_by_hand() -> None:
    p = np.array([[0.6, 0.2, 0.1, 0.1], [0.1, 0.65, 0.15, 0.1], [0.9, 0.1, 0.0, 0.0]])
    # bin [.6, .7): .6 right, .65 wrong: |1.25 - 1|; bin [.9, 1]: .9 wrong
    assert overall(p, np.array([0, 0, 3.0]))["ece"] == pytest.approx((0.25 + 0.9) / 3)


def test_kappa_by_hand() -> None:
    p = np.eye(4)[[0, 1, 3, 3]] * 0.7 + 0.075
    # squared distances 0 0 1 0: mean .25; expected: E[p2] + E[t2] - 2 E[p] E[t] = 19/4 + 14/4 - 2 (7/4)(6/4) = 3
    assert overall(p, np.array([0, 1, 2, 3.0]))["quadratic_kappa"] == pytest.approx(1 - 0.25 / 3)


def test_each_class_is_measured_against_the_rest() -> None:
    p, y = table()
    found = evaluate_classification(p, y, task="multiclass", classes=GRADES, groups=["a"] * len(y), draws=0)
    for k, name in enumerate(GRADES):
        own = {key: metric.value for key, metric in found.per_class[name].items()}
        assert own["auroc"] == pytest.approx(sk.roc_auc_score(y == k, p[:, k]))
        assert own["sensitivity"] == pytest.approx(sk.recall_score(y == k, p.argmax(1) == k))
        assert own["brier"] == pytest.approx(sk.brier_score_loss(y == k, p[:, k]))
        assert "most probable class" in found.per_class[name]["f1"].definition


def test_w30_an_absent_class_is_left_out_and_named() -> None:
    p, y = table()
    y[y == 2] = 1
    found = evaluate_classification(p, y, task="multiclass", classes=GRADES, groups=["a"] * len(y), draws=0)
    assert found.undefined_classes == ("g2",)
    assert found.num_defined == 3
    assert math.isnan(found.per_class["g2"]["auroc"].value)
    mean = np.mean([found.per_class[name]["auroc"].value for name in ("g0", "g1", "g3")])
    assert found.metrics["macro_auroc"].value == pytest.approx(mean)
    assert "g2" in found.metrics["macro_auroc"].reason
    assert found.metrics["balanced_accuracy"].value == pytest.approx(
        np.mean([(p.argmax(1) == k)[y == k].mean() for k in (0, 1, 3)])
    )


def test_unknown_classes_count_nowhere() -> None:
    p, y = table()
    more = np.concatenate([p, p[:7]]), np.concatenate([y, np.full(7, math.nan)])
    assert overall(*more) == pytest.approx(overall(p, y))


def test_w28_macro_f1_counts_every_class() -> None:
    p, y = table(seed=4)
    assert overall(p, y)["macro_f1"] == pytest.approx(sk.f1_score(y, p.argmax(1), average="macro", labels=range(4)))


def test_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="no thresholds"):
        overall(*table(), thresholds=[0.5] * 4)
