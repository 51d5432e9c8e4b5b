import math
from functools import partial

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medssl_cli.metrics import classification
from medssl_cli.metrics.classification import (
    DEFINITIONS,
    auroc,
    binary_auc,
    c_grid,
    f1,
    fit_logistic,
    knn_probabilities,
    linear_scores,
    macro_f1,
    mcc,
    mean_accuracy,
    mean_per_class_accuracy,
    multiclass_auc,
    multilabel_accuracy,
    multilabel_auc,
    score_classes,
)


def test_auroc_equals_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    scores = np.round(rng.normal(labels, 1.5), 1)
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auroc_by_hand() -> None:
    assert auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75
    assert np.isnan(auroc(np.array([0.1, 0.2]), np.array([1, 1])))


def test_knn_equals_scikit_learn_with_the_same_weights() -> None:
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(80, 6)), rng.normal(size=(20, 6))
    labels = rng.integers(0, 2, 80)
    theirs = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.07)
    ).fit(train, labels)
    np.testing.assert_allclose(
        knn_probabilities(train, labels, test, 2, k=7)[:, 1], theirs.predict_proba(test)[:, 1], atol=1e-5
    )


def test_linear_scores_separate_what_is_separable() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 200)
    features = rng.normal(size=(200, 4)) + 3 * labels[:, None]
    assert auroc(linear_scores(features[:100], labels[:100], features[100:]), labels[100:]) > 0.98


# --- agreement of classes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_p34_metrics_of_classes_equal_scikit_learn(n_classes: int) -> None:
    rng = np.random.default_rng(n_classes)
    reference = rng.integers(0, n_classes, 300)
    prediction = np.where(rng.random(300) < 0.5, reference, rng.integers(0, n_classes, 300))
    assert mcc(prediction, reference) == pytest.approx(matthews_corrcoef(reference, prediction), abs=1e-12)
    assert mean_accuracy(prediction, reference) == pytest.approx(accuracy_score(reference, prediction), abs=1e-12)
    assert mean_per_class_accuracy(prediction, reference) == pytest.approx(
        balanced_accuracy_score(reference, prediction), abs=1e-12
    )
    labels = range(n_classes)
    np.testing.assert_allclose(
        f1(prediction, reference, n_classes), f1_score(reference, prediction, labels=labels, average=None), atol=1e-12
    )
    assert macro_f1(prediction, reference, n_classes) == pytest.approx(
        f1_score(reference, prediction, average="macro"), abs=1e-12
    )


def test_mcc_by_hand_and_zero_where_the_root_is_zero() -> None:
    # 4 true positives, 3 true negatives, 1 false positive, 2 false negatives: (4*3 - 1*2) / sqrt(5 * 6 * 4 * 5)
    prediction = np.array([1] * 4 + [0] * 3 + [1] + [0] * 2)
    reference = np.array([1] * 4 + [0] * 3 + [0] + [1] * 2)
    assert mcc(prediction, reference) == pytest.approx(10 / np.sqrt(600))
    assert mcc(np.zeros(5, int), np.array([0, 1, 0, 1, 1])) == 0.0
    assert mcc(np.ones(3, int), np.ones(3, int)) == 0.0
    assert math.isnan(mcc(np.zeros(0, int), np.zeros(0, int)))


def test_f1_of_a_class_that_does_not_occur_is_undefined_and_left_out_of_the_mean() -> None:
    prediction, reference = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    values = f1(prediction, reference, 4)
    np.testing.assert_allclose(values[:2], [4 / 5, 2 / 3])
    assert np.isnan(values[2:]).all()
    assert macro_f1(prediction, reference, 4) == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and reference \(2,\)"):
        mcc(np.zeros(3, int), np.zeros(2, int))
    with pytest.raises(ValueError, match="differ in shape"):
        multilabel_auc(np.zeros((3, 2)), np.zeros((3, 3)))


# --- areas -----------------------------------------------------------------------------------------------------------


def test_multiclass_auc_equals_scikit_learn_and_names_what_it_skips() -> None:
    rng = np.random.default_rng(3)
    reference = rng.integers(0, 4, 200)
    scores = rng.dirichlet(np.ones(4), 200) + np.eye(4)[reference]
    scores /= scores.sum(1, keepdims=True)
    value, skipped = multiclass_auc(scores, reference)
    assert value == pytest.approx(roc_auc_score(reference, scores, multi_class="ovr"), abs=1e-12)
    assert skipped == ()
    kept = reference != 2
    value, skipped = multiclass_auc(scores[kept], reference[kept])
    each = [roc_auc_score(reference[kept] == k, scores[kept, k]) for k in (0, 1, 3)]
    assert value == pytest.approx(np.mean(each), abs=1e-12)
    assert skipped == (2,)
    assert math.isnan(multiclass_auc(scores[:3], np.zeros(3, int)).value)


def test_binary_auc_takes_two_columns_or_one() -> None:
    rng = np.random.default_rng(4)
    reference, positive = rng.integers(0, 2, 90), rng.random(90)
    wanted = roc_auc_score(reference, positive)
    assert binary_auc(positive, reference) == pytest.approx(wanted, abs=1e-12)
    assert binary_auc(np.stack([1 - positive, positive], 1), reference) == pytest.approx(wanted, abs=1e-12)


def test_multilabel_metrics_equal_scikit_learn_and_leave_unknown_labels_out() -> None:
    rng = np.random.default_rng(5)
    reference = rng.integers(0, 2, (120, 3)).astype(float)
    scores = np.clip(rng.normal(0.4 + 0.2 * reference, 0.2), 0, 1)
    assert multilabel_auc(scores, reference).value == pytest.approx(roc_auc_score(reference, scores), abs=1e-12)
    each = [accuracy_score(reference[:, i], scores[:, i] >= 0.5) for i in range(3)]
    assert multilabel_accuracy(scores, reference) == pytest.approx(np.mean(each), abs=1e-12)
    holes = reference.copy()
    holes[:60, 0] = np.nan
    holes[:, 2] = np.where(reference[:, 2] == 1, np.nan, 0)
    value, skipped = multilabel_auc(scores, holes)
    known = [roc_auc_score(reference[60:, 0], scores[60:, 0]), roc_auc_score(reference[:, 1], scores[:, 1])]
    assert value == pytest.approx(np.mean(known), abs=1e-12)
    assert skipped == (2,)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_metric_has_its_name_and_is_one_for_the_truth(name: str) -> None:
    reference = np.array([0, 1, 1, 0, 1])
    assert score_classes(name, np.eye(2)[reference], reference) == 1.0
    worse = np.eye(2)[1 - reference]
    assert score_classes(name, worse, reference) < 0.1
    three = score_classes(name, np.eye(3)[reference], reference)
    assert math.isnan(three) if name == "binary_auc" else three == 1.0


# --- probes ----------------------------------------------------------------------------------------------------------


def test_knn_of_several_classes_equals_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    train, test = rng.normal(size=(90, 6)), rng.normal(size=(31, 6))
    labels = rng.integers(0, 4, 90)
    theirs = KNeighborsClassifier(
        9, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.07)
    ).fit(train, labels)
    wanted = theirs.predict_proba(test)
    np.testing.assert_allclose(knn_probabilities(train, labels, test, 4, k=9), wanted, atol=1e-5)
    monkeypatch.setattr(classification, "_BLOCK", 10)
    np.testing.assert_allclose(knn_probabilities(train, labels, test, 4, k=9), wanted, atol=1e-5)
    assert knn_probabilities(train, labels, test[:0], 4).shape == (0, 4)
    assert knn_probabilities(train[:3], labels[:3], test, 4, k=20).sum(1) == pytest.approx(np.ones(31))


def clusters(n: int, width: int, n_classes: int, gap: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    features = 3 + 2 * rng.normal(size=(n, width))
    features[:, :n_classes] += gap * np.eye(n_classes)[labels]
    return features, labels


@pytest.mark.parametrize(("n", "width", "n_classes"), [(200, 8, 2), (200, 8, 3), (40, 60, 2), (60, 90, 3)])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_logistic_probe_equals_scikit_learn(n: int, width: int, n_classes: int, c: float) -> None:
    features, labels = clusters(n, width, n_classes, 2.0, seed=n)
    other, _ = clusters(30, width, n_classes, 2.0, seed=7)
    probe = fit_logistic(features, labels, n_classes, c_values=[c])
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, tol=1e-9)).fit(features, labels)
    np.testing.assert_allclose(probe.probabilities(other), theirs.predict_proba(other), atol=5e-3)
    assert probe.converged
    assert probe.c == c
    assert probe.sweep == ()


def test_the_sweep_has_the_published_values() -> None:
    grid = c_grid()
    assert len(grid) == 45
    assert grid[[0, -1]] == pytest.approx([1e-6, 1e5])
    np.testing.assert_allclose(np.diff(np.log10(grid)), 11 / 44)


def test_p6_11_every_column_of_the_features_is_used() -> None:
    """The defect of the published code: of a matrix [N, D] only column 0 was kept."""
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 2, 200)
    for column in (0, 3, 11):
        features = rng.normal(size=(200, 12))
        features[:, column] += 5 * labels
        probe = fit_logistic(features, labels, 2, c_values=[1.0])
        assert mean_accuracy(probe.probabilities(features).argmax(1), labels) > 0.97
        weights = np.abs(probe.coefficients_KD[1])
        assert weights.argmax() == column
        assert (weights > 0).all()


def test_p6_11_the_refit_sees_all_training_cases() -> None:
    """The defect of the published code: the refit paired 90 % of the features with 100 % of the labels."""
    features, labels = clusters(100, 5, 2, 1.0, seed=9)
    held = np.arange(100) % 10 == 0
    probe = fit_logistic(features, labels, 2, held_N=held, c_values=c_grid(9), score=partial(score_classes, "mcc"))
    alone = fit_logistic(features, labels, 2, c_values=[probe.c])
    np.testing.assert_array_equal(probe.coefficients_KD, alone.coefficients_KD)
    assert probe.n_train == 100
    moved = features.copy()
    moved[held] += 3.0  # would change nothing if the held cases were left out of the last fit
    again = fit_logistic(moved, labels, 2, c_values=[probe.c])
    assert np.abs(again.coefficients_KD - alone.coefficients_KD).max() > 1e-3


def test_c_is_the_one_that_scores_best_on_the_held_part() -> None:
    features, labels = clusters(160, 10, 2, 0.8, seed=10)
    held = np.arange(160) % 10 < 3
    values = c_grid(9)
    probe = fit_logistic(features, labels, 2, held_N=held, c_values=values, score=binary_auc)
    theirs = []
    for c in values:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, tol=1e-9))
        model.fit(features[~held], labels[~held])
        theirs.append(roc_auc_score(labels[held], model.predict_proba(features[held])[:, 1]))
    np.testing.assert_allclose([value for _, value in probe.sweep], theirs, atol=5e-3)
    best = max(value for _, value in probe.sweep)
    assert dict(probe.sweep)[probe.c] == best


def test_equal_scores_take_the_c_nearest_to_one() -> None:
    features, labels = clusters(100, 4, 2, 60.0, seed=11)
    held = np.arange(100) % 5 == 0
    probe = fit_logistic(features, labels, 2, held_N=held, c_values=[1e-6, 0.1, 2.0, 1e5], score=binary_auc)
    assert [value for _, value in probe.sweep] == [1.0] * 4
    assert probe.c == 2.0


def test_c_is_one_where_the_held_part_says_nothing() -> None:
    features, labels = clusters(40, 4, 2, 2.0, seed=12)
    one_class = labels == 0
    for held in (np.zeros(40, bool), one_class, ~one_class):
        probe = fit_logistic(features, labels, 2, held_N=held, c_values=c_grid(9), score=binary_auc)
        assert probe.c == 1.0, held.sum()
    one_case = np.arange(40) == int(np.flatnonzero(one_class)[0])
    undefined = fit_logistic(features, labels, 2, held_N=one_case, c_values=c_grid(9), score=binary_auc)
    assert undefined.c == 1.0
    assert np.isnan([value for _, value in undefined.sweep]).all()


def test_slow_convergence_is_noted_and_never_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(80, 30, 3, 0.5, seed=13)
    monkeypatch.setattr(classification, "MAX_ITERATIONS", 3)
    probe = fit_logistic(features * np.logspace(0, 6, 30), labels, 3, c_values=[1e5])
    assert not probe.converged
    assert np.isfinite(probe.probabilities(features)).all()


def test_a_class_without_a_case_is_never_told_and_a_constant_feature_is_harmless() -> None:
    features, labels = clusters(60, 4, 2, 3.0, seed=14)
    features = np.concatenate([features, np.full((60, 1), 0.1)], axis=1)
    probe = fit_logistic(features, labels * 2, 3)  # classes 0 and 2 of three
    told = probe.probabilities(features)
    np.testing.assert_allclose(told.sum(1), 1)
    assert (told[:, 1] == 0).all()
    assert mean_accuracy(told.argmax(1), labels * 2) > 0.8


def test_a_probe_of_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="two classes"):
        fit_logistic(np.zeros((4, 2)), np.zeros(4, int), 2)
    with pytest.raises(ValueError, match="do not fit 3 labels"):
        fit_logistic(np.zeros((4, 2)), np.zeros(3, int), 2)
