"""``bench.py head``: heads on stored features, against scikit-learn's logistic regression on the same numbers."""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import Findings, Mark, Options, measure
from medssl_cli.data.feature_store import FeaturePart, Row, write_features
from medssl_cli.metrics.classification import auroc

WAYS = {"mlp": ("head=mlp",), "linear": ("head=linear",), "logistic, C = 1": ("head=logistic", "c_values=1")}
EPOCHS = 30
REFERENCE = "scikit-learn, C = 1"


def head(options: Options) -> Findings:
    """Each head trained by the command's service, its time as ``train_summary.json`` tells it, and scikit-learn's."""
    logging.getLogger("medssl_cli").setLevel(logging.WARNING)
    count, width = (200, 16) if options.tiny else (10_000, 768)
    features_ND, labels_N = toy(count, width)
    rows = []
    with tempfile.TemporaryDirectory(prefix="medssl-bench-") as temporary:
        folder = Path(temporary)
        write(folder / "features", features_ND, labels_N)
        for name, overrides in WAYS.items():
            seconds = [train(folder, number, overrides) for number in range(options.repeat)]
            rows.append({"what": name, "wall_ms": 1e3 * statistics.median(seconds), "fastest_ms": 1e3 * min(seconds)})
    timing = measure({"": lambda: scikit(features_ND, labels_N)}, options.repeat, warmup=0)[""]
    rows.append(timing.row(REFERENCE))
    by_name = {row["what"]: row["wall_ms"] for row in rows}
    reference = by_name[REFERENCE]
    return Findings(
        {"cases": count, "width": width, "epochs": EPOCHS},
        rows,
        {f"{name} / scikit-learn, time": by_name[name] / reference for name in WAYS},
        [Mark(f"s for the head {name}", by_name[name] / 1e3, 2.0) for name in ("mlp", "linear")],
    )


def toy(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of noise, labels by a hidden direction and more noise."""
    draw = np.random.default_rng(0)
    features_ND = draw.standard_normal((count, width)).astype(np.float32)
    hidden_D = draw.standard_normal(width) / width**0.5
    return features_ND, (features_ND @ hidden_D + draw.standard_normal(count) > 0).astype(np.float32)


def write(folder: Path, features_ND: np.ndarray, labels_N: np.ndarray) -> None:
    """Nine tenths to train on, one to choose by."""
    edge = len(features_ND) * 9 // 10
    parts = []
    for name, part in (("train", slice(0, edge)), ("val", slice(edge, None))):
        vectors = features_ND[part]
        rows = tuple(Row(f"{name}{n}", f"{name}{n}", "", None, 1, 0, "") for n in range(len(vectors)))
        parts.append(FeaturePart(name, vectors, labels_N[part, None], rows))
    width = features_ND.shape[1]
    info: dict[str, Any] = {
        "pool_mode": "mean",
        "tokens": ["cls"],
        "layers": 1,
        "slice_dim": width,
        "embedding_dim": width,
        "targets": ["label"],
        "label_values": {},
        "group_level": "patient_id",
        "model": {"path": "toy", "sha256": "", "arch": "toy", "sequences": ["image"]},
        "extraction": {"toy": width},
    }
    write_features(folder, info, parts)


def train(folder: Path, number: int, overrides: tuple[str, ...]) -> float:
    """Seconds from reading the features to the trained head, calibration and novelty reference included."""
    from medssl_cli.services.train_head import TrainHeadRequest, train_head

    epochs = () if "head=logistic" in overrides else (f"epochs={EPOCHS}",)
    request = TrainHeadRequest(
        data=folder / "features",
        task="binary",
        out=folder / f"{overrides[0].partition('=')[2]}_{number}",
        overrides=(*overrides, *epochs),
    )
    train_head(request)
    return float(json.loads((request.out / "train_summary.json").read_text(encoding="utf-8"))["seconds"])


def scikit(features_ND: np.ndarray, labels_N: np.ndarray) -> float:
    """Their logistic regression on standardised features, and its area on the training cases."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features_ND, labels_N)
    predict: Callable[[np.ndarray], np.ndarray] = model.predict_proba
    return auroc(predict(features_ND)[:, 1], labels_N)
