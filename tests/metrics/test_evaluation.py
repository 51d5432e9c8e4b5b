import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from medssl_cli.core.run import to_json
from medssl_cli.metrics.evaluation import evaluate_classification

LABELS = ("bleed", "fracture", "mass")


def table(n: int = 90) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(1)
    label = (rng.random((n, 3)) < [0.5, 0.3, 0.2]).astype(float)
    p = np.round(np.clip(0.3 * label + 0.7 * rng.random((n, 3)), 0, 1), 2)
    return p, label, [f"p{i // 3}" for i in range(n)]


def evaluate(p: np.ndarray, y: np.ndarray, groups: list[str], draws: int = 50, **options: object):
    return evaluate_classification(p, y, task="multilabel", classes=LABELS, groups=groups, draws=draws, **options)


def test_macro_means_equal_scikit_learn() -> None:
    p, y, groups = table()
    found = {name: metric.value for name, metric in evaluate(p, y, groups, thresholds=[0.4, 0.5, 0.6]).metrics.items()}
    called = p >= [0.4, 0.5, 0.6]
    assert found["macro_auroc"] == pytest.approx(sk.roc_auc_score(y, p, average="macro"))
    assert found["macro_average_precision"] == pytest.approx(sk.average_precision_score(y, p, average="macro"))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(y, called, average="macro"))
    assert found["macro_accuracy"] == pytest.approx((called == y).mean())


def test_every_metric_says_what_it_is_and_of_how_many() -> None:
    p, y, groups = table()
    found = evaluate(p, y, groups, thresholds=[0.4, 0.5, 0.6])
    every = [*found.metrics.values(), *(m for metrics in found.per_class.values() for m in metrics.values())]
    assert all(metric.definition for metric in every)
    assert "probability >= 0.4" in found.per_class["bleed"]["f1"].definition
    assert "the threshold of the class" in found.metrics["macro_f1"].definition
    assert "probability" not in found.metrics["macro_auroc"].definition.split(":")[0]
    for metric in every:
        assert metric.reason or metric.ci_low <= metric.ci_high


def test_unknown_labels_are_left_out_label_by_label() -> None:
    p, y, groups = table()
    y[:30, 0] = math.nan
    found = evaluate(p, y, groups)
    assert (found.per_class["bleed"]["auroc"].n, found.per_class["bleed"]["auroc"].n_groups) == (60, 20)
    assert (found.per_class["mass"]["auroc"].n, found.n, found.n_groups) == (90, 90, 30)
    assert found.per_class["bleed"]["auroc"].value == pytest.approx(sk.roc_auc_score(y[30:, 0], p[30:, 0]))
    y[:3] = math.nan
    assert evaluate(p, y, groups).n == 87


def test_m22_a_single_value_is_null_and_listed_and_the_json_strict() -> None:
    p, y, groups = table()
    y[:, 1] = 0
    found = evaluate(p, y, groups)
    facts = json.loads(to_json(found.to_json()), parse_constant=pytest.fail)
    assert facts["undefined_classes"] == ["fracture"]
    assert facts["num_defined"] == 2
    assert facts["per_class"]["fracture"]["auroc"]["value"] is None
    assert facts["per_class"]["fracture"]["auroc"]["reason"] == "all cases are negative"
    assert facts["metrics"]["macro_auroc"]["reason"] == "not defined for fracture"
    own = [facts["per_class"][name]["auroc"]["value"] for name in ("bleed", "mass")]
    assert facts["metrics"]["macro_auroc"]["value"] == pytest.approx(np.mean(own))


def test_all_undefined_macros_are_undefined_too() -> None:
    p, y, groups = table()
    found = evaluate(p, np.zeros_like(y), groups)
    assert math.isnan(found.metrics["macro_auroc"].value)
    assert found.num_defined == 0
    assert found.metrics["macro_auroc"].reason == "not defined for bleed, fracture, mass"
    assert not math.isnan(found.metrics["macro_brier"].value)


def test_a_macro_is_a_mean_over_the_same_classes_in_every_draw() -> None:
    p, y, groups = table(60)
    y[:, 2] = 0
    y[0, 2] = 1  # one patient of 20 has it: a third of the draws have none
    found = evaluate(p, y, groups, draws=200)
    assert math.isnan(found.metrics["macro_auroc"].ci_low)
    assert "bootstrap draws" in found.metrics["macro_auroc"].reason
    assert not math.isnan(found.per_class["bleed"]["auroc"].ci_low)


def test_binary_metrics_are_those_of_its_label() -> None:
    p, y, groups = table()
    found = evaluate_classification(p[:, 0], y[:, 0], task="binary", classes=["bleed"], groups=groups, draws=40)
    assert found.metrics == found.per_class["bleed"]
    assert found.metrics["n_positives"].reason == "no interval: a count"


def test_the_same_seed_gives_the_same_numbers_whatever_the_order_of_classes() -> None:
    p, y, groups = table()
    one, two = evaluate(p, y, groups, seed=3), evaluate(p, y, groups, seed=3)
    assert one == two
    assert evaluate(p, y, groups, seed=4).metrics != one.metrics
    turned = evaluate_classification(
        p[:, ::-1], y[:, ::-1], task="multilabel", classes=LABELS[::-1], groups=groups, draws=50, seed=3
    )
    assert turned.per_class == one.per_class


def test_without_draws_no_interval_is_given() -> None:
    metric = evaluate(*table(), draws=0).metrics["macro_auroc"]
    assert math.isnan(metric.ci_high)
    assert metric.reason == "no interval: no bootstrap draws were asked for"


def test_no_case_at_all_is_undefined_not_an_error() -> None:
    found = evaluate(np.zeros((0, 3)), np.zeros((0, 3)), [])
    assert math.isnan(found.metrics["macro_auroc"].value)
    assert found.n == 0
    none = evaluate_classification(np.zeros((0, 3)), np.zeros(0), task="multiclass", classes=LABELS, groups=[])
    assert none.metrics["accuracy"].reason == "no case has a known class"


@pytest.mark.parametrize(
    ("p", "y", "options", "said"),
    [
        ([[0.5, 0.5]], [[0, 1]], {}, "are not"),
        ([[0.5] * 3], [[0, 1]], {}, "do not fit"),
        ([[1.5, 0, 0]], [[0, 1, 0]], {}, "not in"),
        ([[math.nan, 0, 0]], [[0, 1, 0]], {}, "not in"),
        ([[0.5] * 3], [[0, 2, 0]], {}, "a label is none of"),
        ([[0.5] * 3], [[0, 1, 0]], {"thresholds": [0.5]}, "thresholds for 3"),
        ([[0.5] * 3] * 2, [[0, 1, 0]] * 2, {}, "1 groups for 2"),
    ],
)
def test_what_does_not_fit_is_refused(p: list, y: list, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate(np.array(p), np.array(y, float), ["a"], **options)
