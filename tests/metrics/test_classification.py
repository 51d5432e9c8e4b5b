import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from medssl_cli.metrics.classification import auroc, knn_scores, linear_scores


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
    np.testing.assert_allclose(knn_scores(train, labels, test, k=7), theirs.predict_proba(test)[:, 1], atol=1e-5)


def test_linear_scores_separate_what_is_separable() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 200)
    features = rng.normal(size=(200, 4)) + 3 * labels[:, None]
    assert auroc(linear_scores(features[:100], labels[:100], features[100:]), labels[100:]) > 0.98
