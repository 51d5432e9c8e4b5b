"""How well features tell two classes apart: AUROC, k nearest neighbours, logistic regression."""

from __future__ import annotations

import numpy as np


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, ties counting half.

    Args:
        scores: (N,), higher means more likely positive.
        labels: (N,) of 0 and 1.

    Returns:
        Area in [0, 1]; NaN when a class is absent, for then it is not defined.

    Source: Mann-Whitney U; Hanley and McNeil 1982.
    """
    from scipy.stats import rankdata

    positive = np.asarray(labels).astype(bool)
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def knn_scores(train_ND: np.ndarray, train_labels: np.ndarray, test_MD: np.ndarray, k: int = 20) -> np.ndarray:
    """Probability of class 1 by cosine-weighted votes of the ``k`` nearest training features, (M,).

    Votes weigh exp(similarity / 0.07), as in DINO (Caron et al. 2021) and Wu et al. 2018.
    """
    train, test = _normalised(train_ND), _normalised(test_MD)
    k = min(k, len(train))
    similarity = test @ train.T
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1) / 0.07)
    return (weights * np.asarray(train_labels)[nearest]).sum(1) / weights.sum(1)


def linear_scores(train_ND: np.ndarray, train_labels: np.ndarray, test_MD: np.ndarray, c: float = 1.0) -> np.ndarray:
    """Probability of class 1 by L2 logistic regression on standardised features, (M,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
    return model.fit(train_ND, train_labels).predict_proba(test_MD)[:, 1]


def _normalised(features_ND: np.ndarray) -> np.ndarray:
    features = np.asarray(features_ND, dtype=np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
