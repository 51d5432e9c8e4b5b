"""Heads on stored features: what is learned, what is chosen on validation cases, what is refused."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medssl_cli.core.errors import CheckpointError, ConfigError, DataError
from medssl_cli.data.feature_store import FeaturePart, FeatureSet, ImageFacts, Row, read_features, write_features
from medssl_cli.metrics.classification import knn_probabilities
from medssl_cli.models.feature_heads import VectorHead
from medssl_cli.services import head_data, head_training
from medssl_cli.services.head import Head, load_head, pooled, probabilities
from medssl_cli.services.head_config import HeadConfig
from medssl_cli.services.head_fitting import fit_head
from medssl_cli.services.head_labels import encode_labels
from medssl_cli.services.head_request import TrainHeadRequest
from medssl_cli.services.head_results import _model_facts, calibrate, finish_head
from medssl_cli.services.head_targets import prepare_targets
from medssl_cli.services.head_training import HeadLoss, _threads_for, class_weights
from medssl_cli.services.train_head import train_head

WIDTH = 16
Make = Callable[..., Path]


def part(
    name: str,
    labels: np.ndarray,
    *,
    seed: int = 0,
    slices: int = 0,
    noise: float = 1.0,
    per_patient: int = 1,
    prefix: str | None = None,
) -> FeaturePart:
    """Cases whose vectors are a sum of one direction a label and noise; with ``slices`` one row a slice."""
    rng, axes = np.random.default_rng([seed, len(labels)]), np.random.default_rng(99).standard_normal((8, WIDTH))
    scaled = np.nan_to_num((labels - np.nanmean(labels, 0)) / (np.nanstd(labels, 0) + 1e-9))
    each = max(slices, 1)
    vectors = np.repeat(scaled @ axes[: labels.shape[1]], each, 0) + noise * rng.standard_normal(
        (len(labels) * each, WIDTH)
    )
    word = prefix or name
    rows = tuple(
        Row(f"{word}{i:03d}", f"P{word}{i // per_patient:03d}", "", k if slices else None, each, 0, f"{word}/{i}")
        for i in range(len(labels))
        for k in range(each)
    )
    facts = {
        row.case_id: ImageFacts((3.0 + i % 2, 0.5, 0.5), (20, 64, 64), {"ct": (0.0, 10.0 + i, 90.0)}, ())
        for i, row in enumerate(rows[::each])
    }
    return FeaturePart(name, vectors.astype(np.float32), np.repeat(labels, each, 0).astype(np.float32), rows, facts)


def flags(n: int, columns: int = 1, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((n, columns)) < 0.4).astype(float)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes parts as a folder of features."""

    def write(
        parts: Sequence[FeaturePart], targets: Sequence[str] = ("sick",), *, pool: str = "mean", **info: Any
    ) -> Path:
        width = parts[0].embeddings_RP.shape[1]
        described = {
            "pool_mode": pool,
            "slice_dim": width // 2 if pool == "meanmax" else width,
            "embedding_dim": width,
            "targets": list(targets),
            "label_values": {},
            "extraction": {"tokens": ["cls"]},
            "model": {"path": str(tmp_path / "backbone.safetensors"), "sha256": "0" * 64, "sequences": ["ct"]},
            **info,
        }
        write_features(tmp_path / "data" / "features", described, parts)
        return tmp_path / "data"

    return write


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """A function that trains a head and gives its run folder."""

    def run(data: Path, task: str, *overrides: str, out: str = "run", **more: Any) -> Path:
        if task != "regression" and not any(word.startswith(("head=", "c_values=")) for word in overrides):
            overrides = (*overrides, "c_values=3")  # a shorter sweep
        request = TrainHeadRequest(data=data, task=task, out=tmp_path / out, overrides=overrides, device="cpu", **more)
        run.result = train_head(request)  # type: ignore[attr-defined]
        return tmp_path / out

    return run


@pytest.fixture
def binary(make: Make) -> Path:
    """Training, validation and test part of one finding."""
    return make(
        [part("train", flags(60)), part("val", flags(40, seed=1), seed=1), part("test", flags(20, seed=2), seed=2)]
    )


def card_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "head.json").read_text(), parse_constant=pytest.fail)


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "train_summary.json").read_text(), parse_constant=pytest.fail)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_holds_every_file_and_beats_chance(binary: Path, train: Callable[..., Path]) -> None:
    run = train(binary, "binary")
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("best.safetensors", "last.safetensors", "head.json", "train_summary.json", "progress.png", "run.json"),
        *("config.yaml", "cases.csv", "log.txt"),
    }
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    card, summary = card_of(run), summary_of(run)
    assert (card["task"], card["classes"], card["outputs"], card["pool_mode"]) == ("binary", ["sick"], 1, "mean")
    assert card["threshold"] == card["thresholds"][0]
    assert card["calibrated"] is True
    assert card["ranges"]["spacing_z_mm"] == [3.0, 4.0]
    assert card["ranges"]["ct_p50"] == [10.0, 69.0]
    assert card["preprocessing"] == {"tokens": ["cls"]}
    assert card["feature_digest"]
    assert summary["num_train"] == 60
    assert summary["num_val"] == 40
    assert summary["selection"]["criterion"] == "auroc"
    assert summary["best_score"] > 0.85
    with (run / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"train", "val"}
    assert len(rows) == 100
    part_val = read_features(binary).part("val")
    names_val, values = load_head(run).values_of_rows(part_val)
    assert names_val == list(part_val.case_ids)
    assert ((values >= 0) & (values <= 1)).all()


def test_w04_the_test_part_is_never_opened(
    binary: Path, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[FeatureSet] = []

    def read(path: Path) -> FeatureSet:
        opened.append(read_features(path))
        return opened[-1]

    monkeypatch.setattr(head_data, "read_features", read)
    for path in (binary / "features").glob("test_*"):
        path.write_bytes(b"not to be read")
    run = train(binary, "binary", "head=mlp", "epochs=2")
    assert opened[0].accesses["train"]
    assert opened[0].accesses["val"]
    assert opened[0].accesses["test"] == 0
    assert "test" not in summary_of(run)["parts_opened"]


def test_w04_the_test_part_of_raw_data_is_never_read(
    train: Callable[..., Path], tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    """The same weights with test pictures that cannot be read, and the same once their labels are swapped."""
    model = write_run(tmp_path / "model", None)
    whole = tmp_path / "whole"
    for number, (name, count) in enumerate({"train": 12, "val": 8, "test": 4}.items()):
        for k in range(count):
            image = np.random.default_rng((number, k)).integers(0, 120, (32, 32)).astype(np.uint8)
            image[8 * (k % 2) :][:8] += 100
            folder = whole / name / ("up" if k % 2 else "down")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{name}{k}.png")
    cut, swapped = (Path(shutil.copytree(whole, tmp_path / name)) for name in ("cut", "swapped"))
    for path in (cut / "test").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    for before, after in (("up", "moved"), ("down", "up"), ("moved", "down")):
        (swapped / "test" / before).rename(swapped / "test" / after)
    runs = [
        train(data, "binary", "head=mlp", "epochs=3", out=f"of_{data.name}", model=model, cache=tmp_path / data.name[0])
        for data in (whole, cut, swapped)
    ]
    for name in ("best.safetensors", "last.safetensors"):
        assert len({(run / name).read_bytes() for run in runs}) == 1
    for run in runs:
        with (run / "cases.csv").open() as file:
            assert [row["part"] for row in csv.DictReader(file)] == ["train"] * 12 + ["val"] * 8
        assert summary_of(run)["history"] == summary_of(runs[0])["history"]
        assert "test" not in summary_of(run)["parts_opened"]


@pytest.mark.parametrize("head", ["mlp", "logistic", "knn", "linear"])
def test_m24_the_same_seed_gives_identical_weights(binary: Path, train: Callable[..., Path], head: str) -> None:
    first = train(binary, "binary", f"head={head}", out="a")
    torch.manual_seed(123)  # what happened before does not matter
    np.random.seed(7)
    again = train(binary, "binary", f"head={head}", out="b")
    assert (first / "best.safetensors").read_bytes() == (again / "best.safetensors").read_bytes()
    assert (first / "last.safetensors").read_bytes() == (again / "last.safetensors").read_bytes()
    if head == "mlp":
        other = train(binary, "binary", f"head={head}", out="c", seed=1)
        assert (first / "last.safetensors").read_bytes() != (other / "last.safetensors").read_bytes()


def test_running_again_replaces_the_run(binary: Path, train: Callable[..., Path]) -> None:
    run = train(binary, "binary")
    (run / "export").mkdir()
    (run / "export" / "teacher_backbone.safetensors").write_bytes(b"of a fine-tuned head")
    before = (run / "best.safetensors").read_bytes()
    assert (train(binary, "binary") / "best.safetensors").read_bytes() == before
    assert not (run / "export").exists()


def test_a_failed_run_keeps_the_head_that_is_there(binary: Path, train: Callable[..., Path]) -> None:
    run = train(binary, "binary")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}
    with pytest.raises(DataError):
        train(binary, "binary", labels=binary / "absent.csv", target=("sick",))
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}


# --- losses and choices ----------------------------------------------------------------------------------------------


def test_m21_constant_labels_give_a_finite_loss_and_gradients(
    make: Make, train: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    labels = np.column_stack([flags(40)[:, 0], np.ones(40), np.zeros(40)])
    held = np.column_stack([flags(30, seed=1)[:, 0], np.ones(30), np.zeros(30)])
    data = make([part("train", labels), part("val", held, seed=1)], ("some", "always", "never"))
    for head in ("mlp", "logistic"):
        run = train(data, "multilabel", f"head={head}", out=head)
        losses = [entry["val_loss"] for entry in summary_of(run)["history"]]
        assert all(isinstance(loss, float) for loss in losses)
        assert summary_of(run)["history"][-1]["val_per_class_auroc"][1:] == [None, None]
        assert not card_of(run)["calibrated"]
        assert card_of(run)["calibration"]["scale"][1:] == [1.0, 1.0]
    assert "always has one value only" in caplog.text
    assert "never has one value only" in caplog.text
    targets = prepare_targets("multilabel", ("some", "always", "never"), labels)
    weights = class_weights(targets, labels, 100.0)
    assert weights is not None
    assert weights[1] == 0.01
    assert weights[2] == 40
    logits = torch.zeros(40, 3, requires_grad=True)
    HeadLoss("multilabel", torch.tensor(weights).float())(logits, torch.from_numpy(labels).float()).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 1] < 0).all()


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_m21_a_constant_target_is_refused(make: Make, train: Callable[..., Path], task: str) -> None:
    data = make([part("train", np.ones((20, 1))), part("val", flags(10))])
    with pytest.raises(DataError, match="one value only") as caught:
        train(data, task)
    assert caught.value.code == "target_constant"


def test_the_loss_is_the_formula(make: Make) -> None:
    """-[w y log s(z) + (1 - y) log(1 - s(z))], a mean over known labels."""
    rng = np.random.default_rng(0)
    z, y = rng.standard_normal((5, 2)), (rng.random((5, 2)) < 0.5).astype(float)
    y[1, 0] = np.nan
    w = [3.0, 0.5]
    terms = []
    for i in range(5):
        for c in range(2):
            if not math.isnan(y[i, c]):
                s = 1 / (1 + math.exp(-z[i, c]))
                terms.append(-(w[c] * y[i, c] * math.log(s) + (1 - y[i, c]) * math.log(1 - s)))
    found = HeadLoss("multilabel", torch.tensor(w).double())(torch.from_numpy(z), torch.from_numpy(y))
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-12)


def test_m23_one_criterion_for_the_whole_run(make: Make, train: Callable[..., Path]) -> None:
    """AUROC is not defined on this validation part: the loss chooses in every epoch, whatever its scale."""
    data = make([part("train", flags(40)), part("val", np.ones((10, 1)), seed=1)])
    summary = summary_of(train(data, "binary", "head=mlp", "epochs=6"))
    assert summary["selection"]["criterion"] == "loss"
    losses = [entry["val_loss"] for entry in summary["history"]]
    assert summary["selection"]["epoch"] == 1 + int(np.argmin(losses))
    assert summary["best_score"] == min(losses)
    assert all(entry["val_macro_auroc"] is None for entry in summary["history"])


@pytest.mark.parametrize(
    ("areas", "chosen"),
    [([math.nan, 0.6, 0.8, 0.7], 3), ([0.6, math.nan, 0.4, 0.5], 1), ([math.nan] * 4, 1)],
    ids=["first", "middle", "all"],
)
def test_m23_an_epoch_without_the_criterion_is_not_judged_by_another(
    binary: Path, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, areas: list[float], chosen: int
) -> None:
    """The area is scripted and the loss falls throughout: `AUROC if finite, else -loss` takes the last of four NaN."""
    seen: list[bytes] = []
    scores: list[tuple[str, float]] = []
    score_of = head_training.selection_score

    def scripted(values: np.ndarray, *_rest: Any) -> float:
        if values.tobytes() not in seen:
            seen.append(values.tobytes())
        return areas[seen.index(values.tobytes())]

    def recorded(criterion: Any, *rest: Any) -> float:
        scores.append((criterion, score_of(criterion, *rest)))
        return scores[-1][1]

    monkeypatch.setattr(head_training, "macro_auroc", scripted)
    monkeypatch.setattr(head_training, "selection_score", recorded)
    summary = summary_of(train(binary, "binary", "head=mlp", "epochs=4", "lr=0.001"))
    losses = [entry["val_loss"] for entry in summary["history"]]
    assert losses == sorted(losses, reverse=True)
    assert [criterion for criterion, _ in scores] == ["auroc"] * 4
    np.testing.assert_array_equal([score for _, score in scores], areas)
    assert summary["selection"]["criterion"] == "auroc"
    assert summary["selection"]["epoch"] == chosen
    assert summary["best_score"] == (None if math.isnan(areas[chosen - 1]) else areas[chosen - 1])


def test_the_epoch_with_the_highest_score_is_kept(binary: Path, train: Callable[..., Path]) -> None:
    summary = summary_of(train(binary, "binary", "head=mlp", "epochs=12", "lr=0.02"))
    scores = [entry["val_macro_auroc"] for entry in summary["history"]]
    assert summary["selection"]["epoch"] == 1 + int(np.argmax(scores))
    stopped = summary_of(train(binary, "binary", "head=mlp", "epochs=200", "lr=0.02", "patience=3"))
    assert len(stopped["history"]) == stopped["selection"]["epoch"] + 3


@pytest.mark.parametrize("head", ["mlp", "attention_mil"])
def test_w26_a_last_batch_of_one_case(make: Make, train: Callable[..., Path], head: str) -> None:
    data = make([part("train", flags(33), slices=2), part("val", flags(10, seed=1), slices=2, seed=1)], pool="none")
    run = train(data, "binary", f"head={head}", "batch_size=32", "epochs=2")
    assert load_head(run).values(np.zeros((1, WIDTH), np.float32)).shape == (1,)


def test_w27_m25_decisions_are_of_probabilities_at_or_above_the_threshold(
    binary: Path, train: Callable[..., Path]
) -> None:
    assert probabilities(np.array([[0.3]]), "binary")[0, 0] > 0.5  # a logit of 0.3 is positive
    run = train(binary, "binary", "threshold_rule=fixed=0.5", "calibration=none")
    head = load_head(run)
    assert head.thresholds is not None
    assert head.thresholds.tolist() == [0.5]
    with torch.no_grad():
        for parameter in head.module.parameters():
            parameter.zero_()
    p = replace(head).values(np.ones((1, WIDTH), np.float32))
    assert p[0] == 0.5
    assert bool(p[0] >= head.thresholds[0])


def test_calibration_lowers_the_loss_on_validation(binary: Path, train: Callable[..., Path]) -> None:
    told = card_of(train(binary, "binary", "head=mlp", "epochs=60", "lr=0.01", "calibration=temperature"))[
        "calibration"
    ]
    assert told["nll_after"][0] < told["nll_before"][0]
    assert told["shift"] == [0.0]
    assert told["n"] == 40
    rng = np.random.default_rng(0)
    logits = 8 * rng.standard_normal((400, 1))
    labels = (rng.random((400, 1)) < 1 / (1 + np.exp(-logits / 4))).astype(float)
    targets = prepare_targets("binary", ("sick",), labels)
    found = calibrate(logits, labels, targets, "temperature")
    assert found["scale"][0] == pytest.approx(0.25, rel=0.25)
    assert found["ece_after"][0] < found["ece_before"][0]


def test_class_weights_ask_for_a_shift(binary: Path, train: Callable[..., Path]) -> None:
    told = card_of(train(binary, "binary", "head=mlp"))
    assert told["class_weights"] == "balanced"
    assert told["calibration"]["method"] == "platt"
    assert card_of(train(binary, "binary"))["calibration"]["method"] == "temperature"


# --- against others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_logistic_heads_equal_scikit_learn(make: Make, train: Callable[..., Path], task: str) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    columns = 3 if task == "multilabel" else 1
    labels, held = flags(80, columns), flags(40, columns, seed=1)
    if task == "multiclass":
        labels, held = labels + flags(80, 1, seed=4), held + flags(40, 1, seed=5)
    names = tuple(f"c{i}" for i in range(columns))
    data = make([part("train", labels), part("val", held, seed=1)], names)
    run = train(data, task, "calibration=none", "c_values=12")
    features = read_features(data)
    x, v = (np.asarray(features.part(name).embeddings_RP, float) for name in ("train", "val"))
    found = load_head(run).values_of_rows(features.part("val"))[1]
    for column, c in enumerate(card_of(run)["selection"]["c"]):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, tol=1e-8))
        expected = model.fit(x, labels[:, column]).predict_proba(v)
        assert np.allclose(
            found if task == "multiclass" else found[:, column],
            expected if task == "multiclass" else expected[:, 1],
            atol=1e-4,
        )


def test_balanced_logistic_heads_equal_scikit_learn(binary: Path, train: Callable[..., Path]) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    run = train(binary, "binary", "calibration=none", "c_values=1", "class_weights=balanced")
    features = read_features(binary)
    part_train, part_val = features.part("train"), features.part("val")
    assert part_train.labels_RC is not None
    y = part_train.labels_RC[:, 0]
    scaler = StandardScaler().fit(np.asarray(part_train.embeddings_RP, float))
    model = LogisticRegression(class_weight={0: 1.0, 1: (len(y) - y.sum()) / y.sum()}, tol=1e-8, max_iter=5000)
    model.fit(scaler.transform(np.asarray(part_train.embeddings_RP, float)), y)
    expected = model.predict_proba(scaler.transform(np.asarray(part_val.embeddings_RP, float)))[:, 1]
    assert np.allclose(load_head(run).values_of_rows(part_val)[1][:, 0], expected, atol=1e-4)


def test_knn_heads_equal_the_metric(binary: Path, train: Callable[..., Path]) -> None:
    run = train(binary, "binary", "head=knn", "knn_k=7", "calibration=none")
    features = read_features(binary)
    parts = features.part("train"), features.part("val")
    assert parts[0].labels_RC is not None
    labels = parts[0].labels_RC[:, 0].astype(int)
    expected = knn_probabilities(parts[0].embeddings_RP, labels, parts[1].embeddings_RP, 2, 7)[:, 1]
    assert np.allclose(load_head(run).values_of_rows(parts[1])[1][:, 0], expected, atol=1e-5)


def test_w32_small_and_large_measurements_are_both_learned(make: Make, train: Callable[..., Path]) -> None:
    rng = np.random.default_rng(3)

    def values(n: int) -> np.ndarray:
        found = rng.standard_normal((n, 2)) * [0.05, 300] + [0.2, 1000]
        found[::7, 0] = np.nan  # not measured
        return found

    labels, held = values(300), values(100)
    data = make([part("train", labels, noise=0.15), part("val", held, seed=1, noise=0.15)], ("thin", "wide"))
    run = train(data, "regression", "epochs=20", "lr=0.02")
    part_val = read_features(data).part("val")
    found, reference = load_head(run).values_of_rows(part_val)[1], held
    for column in range(2):
        known = ~np.isnan(reference[:, column])
        y, f = reference[known, column], found[known, column]
        assert 1 - ((y - f) ** 2).sum() / ((y - y.mean()) ** 2).sum() > 0.9
    card = card_of(run)
    assert card["scaler"]["scale"] == pytest.approx(np.nanstd(labels, 0).tolist(), rel=1e-5)
    assert card["thresholds"] is None
    assert card["calibrated"] is False
    assert card["classes"] == ["thin", "wide"]


def needle_part(name: str, n: int, seed: int) -> FeaturePart:
    """Bags of 12 slices; of the sick ones exactly one holds the sign, and another one the opposite of half its size.

    The mean of a bag says nothing: a shift of its own, as large as the sign, is added to every case.
    """
    rng = np.random.default_rng(seed)
    sick = np.arange(n) % 2
    base = part(name, sick[:, None].astype(float), slices=12, seed=seed)
    vectors = rng.standard_normal((n, 12, WIDTH)) * 0.3
    for i in range(n):
        k, other = rng.choice(12, 2, replace=False)
        if sick[i]:
            vectors[i, k, :4] += 5.0
            vectors[i, other, :4] -= 5.0
    return replace(base, embeddings_RP=vectors.reshape(-1, WIDTH).astype(np.float32))


def test_attention_finds_the_one_slice_where_the_mean_fails(make: Make, train: Callable[..., Path]) -> None:
    parts = [needle_part("train", 120, 0), needle_part("val", 60, 1)]
    data = make(parts, pool="none")
    mean = summary_of(train(data, "binary", "pool=mean", out="mean"))["best_score"]
    run = train(data, "binary", "head=attention_mil", "epochs=40", "lr=0.01", "hidden_dim=32", out="mil")
    assert summary_of(run)["best_score"] > 0.97
    assert mean < 0.75
    head = load_head(run)
    rows = parts[1].embeddings_RP.reshape(60, 12, WIDTH)
    weights = head.attention(rows[1])
    assert weights is not None
    assert weights.sum() == pytest.approx(1)
    signs = np.abs(rows[1][:, :4].mean(1))
    assert set(np.argsort(-weights)[:1]) <= set(np.argsort(-signs)[:2])


def test_slice_heads_learn_from_labels_of_slices(make: Make, train: Callable[..., Path]) -> None:
    def slices(name: str, n: int, seed: int) -> FeaturePart:
        rng = np.random.default_rng(seed)
        labels = np.zeros((n, 6, 1))
        labels[: n // 2, 2] = 1
        base = part(name, np.zeros((n, 1)), slices=6, seed=seed)
        vectors = rng.standard_normal((n, 6, WIDTH)) + 4 * labels * (np.arange(WIDTH) < 3)
        return replace(
            base,
            embeddings_RP=vectors.reshape(-1, WIDTH).astype(np.float32),
            labels_RC=labels.reshape(-1, 1).astype(np.float32),
        )

    data = make([slices("train", 40, 0), slices("val", 20, 1)], pool="none")
    with pytest.raises(DataError, match="Slices of one case") as caught:
        train(data, "binary")
    assert "level=slice" in caught.value.fix
    run = train(data, "binary", "level=slice")
    head, part_val = load_head(run), read_features(data).part("val")
    assert head.slice_scores_from == "slice_head"
    assert head.pool_mode == "none"
    assert head.case_rule == "max"
    names, values = head.values_of_rows(part_val)
    assert len(names) == 20
    assert values[:10].min() > values[10:].max()
    rows = np.asarray(part_val.embeddings_RP[:6])
    assert int(head.slice_values(rows)[:, 0].argmax()) == 2
    assert head.values(rows)[0] == pytest.approx(head.slice_values(rows)[:, 0].max(), abs=1e-12)


# --- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "overrides"),
    [
        ("mean", ()),
        ("meanmax", ("head=mlp", "epochs=2")),
        ("none", ("head=attention_mil", "epochs=2")),
        ("none", ("level=slice",)),
        ("none", ("head=knn", "pool=meanmax")),
    ],
)
def test_one_case_alone_has_the_values_of_its_rows(
    make: Make, train: Callable[..., Path], pool: str, overrides: tuple[str, ...]
) -> None:
    stored = [part(name, flags(24, 2, seed=k), slices=5, seed=k) for k, name in enumerate(("train", "val"))]
    slices = stored[1].embeddings_RP.reshape(24, 5, WIDTH)
    if pool != "none":
        stored = [
            replace(
                p,
                embeddings_RP=np.stack([pooled(c, pool) for c in p.embeddings_RP.reshape(24, 5, WIDTH)]),  # type: ignore[arg-type]
                labels_RC=None if p.labels_RC is None else p.labels_RC[::5],
                rows=tuple(replace(row, slice_index=None) for row in p.rows[::5]),
            )
            for p in stored
        ]
    data = make(stored, ("a", "b"), pool=pool)
    head = load_head(train(data, "multilabel", *overrides))
    _, values = head.values_of_rows(read_features(data).part("val"))
    alone = np.stack([head.values(case) for case in slices])
    assert np.abs(values - alone).max() < 1e-6
    gradient = torch.from_numpy(slices[0]).requires_grad_()
    logits = head.logits(gradient)
    logits.sum().backward()
    assert logits.shape == (2,)
    assert gradient.grad is not None
    near = probabilities(logits.detach().double().numpy(), head.task, head.card["calibration"])
    assert np.allclose(near, alone[0], atol=1e-4)
    assert head.slice_values(slices[0]).shape == (5, 2)
    score = head.novelty_of(slices[0])
    assert score is not None
    assert 0 <= score.distance <= 2


def test_m26_a_head_refuses_features_of_another_pooling(make: Make, train: Callable[..., Path]) -> None:
    wide = [part(name, flags(30, seed=k), seed=k) for k, name in enumerate(("train", "val"))]
    doubled = [replace(p, embeddings_RP=np.concatenate([p.embeddings_RP] * 2, 1)) for p in wide]
    head = load_head(train(make(doubled, pool="meanmax"), "binary"))
    assert head.input_width == 2 * WIDTH
    assert head.slice_dim == WIDTH
    with pytest.raises(ConfigError, match="pooled in different ways") as caught:
        head.values_of_rows(wide[1])
    assert f"{2 * WIDTH} numbers (meanmax" in caught.value.where
    assert f"{WIDTH} numbers (mean" in caught.value.where
    with pytest.raises(ConfigError, match="pooled in different ways"):
        train(make(wide), "binary", "pool=meanmax")
    with pytest.raises(ConfigError, match="pooled in different ways") as caught:
        train(make(wide), "binary", "head=attention_mil")
    assert "--pool none" in caught.value.fix
    with pytest.raises(ConfigError, match="slice vectors of 16"):
        head.values(np.zeros((3, 2 * WIDTH), np.float32))


def test_views_train_and_are_not_judged(make: Make, train: Callable[..., Path]) -> None:
    base = part("train", flags(20))
    viewed = replace(
        base,
        embeddings_RP=np.concatenate([base.embeddings_RP, base.embeddings_RP + 0.1]),
        labels_RC=None if base.labels_RC is None else np.concatenate([base.labels_RC] * 2),
        rows=base.rows + tuple(replace(row, view=1) for row in base.rows),
    )
    run = train(make([viewed, part("val", flags(20, seed=1), seed=1)]), "binary")
    summary = summary_of(run)
    assert summary["num_train"] == 20
    assert summary["num_train_units"] == 40
    assert len(load_head(run).values_of_rows(viewed)[0]) == 20


# --- parts and labels ------------------------------------------------------------------------------------------------


def test_patients_are_held_back_whole_and_by_class(make: Make, train: Callable[..., Path]) -> None:
    run = train(make([part("all", flags(60), per_patient=3, prefix="x")]), "binary")
    with (run / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = {name: {r["patient_id"] for r in rows if r["part"] == name} for name in ("train", "val")}
    assert len(rows) == 60
    assert not parts["train"] & parts["val"]
    assert 3 <= len(parts["val"]) <= 5
    assert "held back" in summary_of(run)["split"]


def test_patients_on_both_sides_are_refused(make: Make, train: Callable[..., Path]) -> None:
    leaking = part("val", flags(10, seed=1), seed=1, prefix="train")
    with pytest.raises(DataError, match="in the training part too") as caught:
        train(make([part("train", flags(20)), leaking]), "binary")
    assert caught.value.code == "split_leak"
    assert "Ptrain000" in caught.value.where


def test_without_validation_nothing_is_chosen(make: Make, train: Callable[..., Path]) -> None:
    data = make([part("train", flags(30))])
    run = train(data, "binary", "val_ratio=0", "head=mlp", "epochs=3")
    card = card_of(run)
    assert card["threshold"] == 0.5
    assert card["threshold_rule"] == "fixed=0.5"
    assert not card["calibrated"]
    assert card["selection"]["criterion"] is None
    assert card["selection"]["value"] is None
    assert load_head(run).reliability is None
    assert (run / "last.safetensors").stat().st_size < (run / "best.safetensors").stat().st_size
    assert any("0.5" in line for line in train.result.lines)  # type: ignore[attr-defined]


def test_labels_from_a_table_with_texts_and_gaps(
    make: Make, train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels, held = flags(30), flags(20, seed=1)
    parts = [part("train", labels), part("val", held, seed=1)]
    data = make([replace(p, labels_RC=None) for p in parts], ())
    texts = [
        f"{row.case_id},{'malignant' if label else 'benign'}\n"
        for p, found in zip(parts, (labels, held), strict=True)
        for row, label in zip(p.rows, found[:, 0], strict=True)
    ]
    texts[3] = texts[3].split(",")[0] + ",\n"
    (tmp_path / "labels.csv").write_text("case_id,finding\n" + "".join(texts))
    more = {"labels": tmp_path / "labels.csv", "target": ("finding",)}
    run = train(data, "binary", **more)
    card = card_of(run)
    assert card["classes"] == ["malignant"]
    assert card["label_values"] == {"finding": ["benign", "malignant"]}
    assert summary_of(run)["num_train"] == 29
    assert "1 case of the train part without a label" in caplog.text
    assert encode_labels(card, [("malignant",), ("",), ("benign",)])[:, 0].tolist() == pytest.approx(
        [1, math.nan, 0], nan_ok=True
    )
    turned = train(data, "binary", "positive=benign", out="turned", **more)
    part_val = read_features(data).part("val")
    p, q = (load_head(r).values_of_rows(part_val)[1] for r in (run, turned))
    assert card_of(turned)["classes"] == ["benign"]
    assert np.allclose(p + q, 1, atol=1e-3)
    with pytest.raises(ConfigError, match="positive"):
        train(data, "binary", "positive=mad", **more)


def test_classes_are_named_and_encoded_by_value(make: Make, train: Callable[..., Path]) -> None:
    grades = np.array([[2.0], [3.0], [5.0]])
    data = make([part("train", np.tile(grades, (10, 1))), part("val", np.tile(grades, (5, 1)), seed=1)], ("grade",))
    run = train(data, "multiclass")
    card = card_of(run)
    assert card["classes"] == ["2", "3", "5"]
    assert card["thresholds"] is None
    values = load_head(run).values_of_rows(read_features(data).part("val"))[1]
    assert np.allclose(values.sum(1), 1)
    p, y = load_head(run).reliability or pytest.fail("no reliability")
    assert p.shape == y.shape == (15, 3)
    assert (y.sum(1) == 1).all()
    assert encode_labels(card, [("5",), ("2.0",)]).tolist() == [[2.0], [0.0]]
    with pytest.raises(DataError, match="no training case") as caught:
        encode_labels(card, [("4",)])
    assert "2, 3, 5" in caught.value.where


def test_a_label_any_that_contradicts_the_others_is_said(
    make: Make, train: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    labels = flags(30, 3)
    labels[:, 0] = labels[:, 1:].max(1)
    labels[:4, 0] = 1 - labels[:4, 0]
    data = make([part("train", labels), part("val", flags(20, 3, seed=1) * 0 + 1, seed=1)], ("any", "a", "b"))
    run = train(data, "multilabel")
    assert summary_of(run)["inconsistent_labels"] == 4
    assert "'any'" in caplog.text


def test_w32_few_shot_draws_whole_patients_by_class(make: Make, train: Callable[..., Path]) -> None:
    labels = (np.arange(100) % 25 == 0).astype(float)[:, None]  # four of a hundred
    data = make([part("train", labels), part("val", flags(40, seed=1), seed=1)])
    run = train(data, "binary", "percentage_labels=0.1", "repeats=4", "head=linear", "epochs=3")
    few = summary_of(run)["few_shot"]
    scores = [repeat["score"] for repeat in few["repeats"]]
    assert len(scores) == 4
    assert len(set(scores)) > 1
    assert all(9 <= r["num_train"] <= 11 for r in few["repeats"])
    assert few["mean"]["score"] == pytest.approx(np.mean(scores))
    assert few["std"]["score"] == pytest.approx(np.std(scores, ddof=1))
    assert few["kept"] == 1 + int(np.argmax(scores))
    assert summary_of(run)["best_score"] == max(scores)
    assert "auroc" in few["mean"] or "macro_auroc" in few["mean"]
    with (run / "cases.csv").open() as file:
        used = [row for row in csv.DictReader(file) if row["part"] == "train"]
    assert len(used) == few["repeats"][few["kept"] - 1]["num_train"]
    again = summary_of(train(data, "binary", "percentage_labels=0.1", "repeats=4", "head=linear", "epochs=3", out="b"))
    assert again["few_shot"] == few


def test_refit_learns_from_validation_too_and_is_not_calibrated(binary: Path, train: Callable[..., Path]) -> None:
    plain, refit = train(binary, "binary", "calibration=none", out="a"), train(binary, "binary", "refit=true", out="b")
    assert not card_of(refit)["calibrated"]
    assert card_of(refit)["thresholds"] == card_of(plain)["thresholds"]
    assert card_of(refit)["selection"]["c"] == card_of(plain)["selection"]["c"]
    assert (plain / "best.safetensors").read_bytes() != (refit / "best.safetensors").read_bytes()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "overrides", "words"),
    [
        ("landmark", (), "Landmarks"),
        ("forecast", (), "interval"),
        ("banana", (), "no task"),
        ("binary", ("hidden_dim=-1", "head=mlp"), "not negative"),
        ("binary", ("hidden_dim=64",), "logistic head does not use it"),
        ("binary", ("knn_k=3", "case_rule=max", "epochs=2"), "3 keys"),
        ("binary", ("case_rule=max",), "level=slice"),
        ("regression", ("selection=auroc",), "regression selects by loss"),
        ("regression", ("head=logistic",), "tells classes"),
        ("regression", ("threshold_rule=f1",), "does not use it"),
        ("multiclass", ("level=slice",), "needs level=case"),
        ("binary", ("refit=true", "calibration=platt"), "calibration=none"),
        ("binary", ("threshold_rule=best",), "sensitivity=0.9"),
        ("binary", ("head=attention_mil", "hidden_dim=0"), "need a width"),
        ("binary", ("repeats=3",), "percentage_labels=0.1"),
        ("binary", ("val_ratio=0.1",), "validation part"),
        ("binary", ("extract.resize=32",), "stored features"),
        ("binary", ("epoch=3",), "did you mean epochs"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    binary: Path, train: Callable[..., Path], tmp_path: Path, task: str, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(binary, task, *overrides)
    assert words in str(caught.value)
    assert not (tmp_path / "run" / "head.json").exists()


def test_a_width_of_zero_is_one_linear_layer(binary: Path, train: Callable[..., Path]) -> None:
    run = train(binary, "binary", "head=mlp", "hidden_dim=0", "epochs=2")
    assert card_of(run)["kind"] == "linear"


def test_a_damaged_head_is_refused(binary: Path, train: Callable[..., Path]) -> None:
    run = train(binary, "binary")
    weights = (run / "best.safetensors").read_bytes()
    (run / "best.safetensors").write_bytes(weights[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="head cannot be loaded"):
        load_head(run)
    (run / "best.safetensors").write_bytes(weights)
    card = card_of(run)
    (run / "head.json").write_text(json.dumps({**card, "input_width": 3, "slice_dim": 3}))
    with pytest.raises(CheckpointError, match="head cannot be loaded"):
        load_head(run)
    del card["thresholds"]
    (run / "head.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError) as caught:
        load_head(run)
    assert "without thresholds" in caught.value.where


def test_heads_move_between_devices_unchanged(binary: Path, train: Callable[..., Path]) -> None:
    head: Head = load_head(train(binary, "binary"))
    x = np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)
    assert np.array_equal(head.to("cpu").values(x), head.values(x))


def test_fitting_takes_the_seed_alone(make: Make) -> None:
    from medssl_cli.services.head_examples import build_examples

    base = part("train", flags(20))
    assert base.labels_RC is not None
    examples = build_examples(base, base.labels_RC.astype(float), "mean", by_slice=False)
    targets, config = prepare_targets("binary", ("sick",), base.labels_RC), HeadConfig(head="mlp", epochs=2)
    cpu = torch.device("cpu")
    one, two, other = (fit_head(examples, None, targets, config, seed=s, device=cpu) for s in (1, 1, 2))
    same = [torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(one.module.last.weight, other.module.last.weight)


# --- what a hurried user meets ---------------------------------------------------------------------------------------


def test_m24_weights_do_not_depend_on_the_number_of_threads(make: Make, train: Callable[..., Path]) -> None:
    data = make([part("train", flags(60)), part("val", flags(20, seed=1), seed=1)])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(train(data, "binary", "head=mlp", "epochs=2", out=f"of{threads}") / "best.safetensors")
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0].read_bytes() == found[1].read_bytes()


def test_small_heads_take_one_thread_and_large_ones_all() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with _threads_for(VectorHead(768, 6), 64):
            assert torch.get_num_threads() == 1
        with _threads_for(VectorHead(768, 6), 4096):
            assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), _threads_for(VectorHead(8, 1), 4):
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_two_validation_cases_make_no_certainty(make: Make, train: Callable[..., Path]) -> None:
    data = make([part("train", flags(20)), part("val", np.array([[0.0], [1.0]]), noise=0.01)])
    run = train(data, "binary")
    reliability = load_head(run).reliability
    assert reliability is not None
    assert ((reliability[0] > 0.25) & (reliability[0] < 0.75)).all()  # one case counts as 2 / 3, Platt 1999
    assert any("calibrated: temperature on 2 cases" in line for line in train.result.lines)  # type: ignore[attr-defined]


def test_a_threshold_that_calls_every_case_positive_is_told() -> None:
    targets = prepare_targets("binary", ("sick",), flags(4))
    wrong = np.array([[2.0], [-2.0]]), np.array([[0.0], [1.0]])  # the other way round
    finished = finish_head(targets, HeadConfig(calibration="none"), *wrong, ["a", "b"])
    assert finished.thresholds == (0.0,)
    assert finished.notes == ["sick: every validation case is positive at the threshold 0 (youden)"]


def test_an_extraction_that_failed_is_not_taken_for_images(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / ".medssl.json").write_text('{"command": "extract"}')
    with pytest.raises(ConfigError, match="neither features nor images") as caught:
        train_head(TrainHeadRequest(data=tmp_path / "features", task="binary", out=tmp_path / "out"))
    assert "medssl extract" in caught.value.fix


def test_r12_labels_that_tell_patients_keep_them_on_one_side(
    make: Make, train: Callable[..., Path], tmp_path: Path
) -> None:
    found = part("all", flags(40))
    rows = tuple(replace(row, patient_id=row.case_id) for row in found.rows)
    data = make([replace(found, rows=rows, labels_RC=None)], ())
    table = tmp_path / "labels.csv"
    lines = [f"{row.case_id},Q{n // 2},{n // 2 % 2}" for n, row in enumerate(rows)]
    table.write_text("\n".join(["case_id,patient_id,y", *lines]) + "\n")
    run = train(data, "binary", out="table", labels=table, target=("y",))
    with (run / "cases.csv").open(newline="") as file:
        sides = {(row["patient_id"], row["part"]) for row in csv.DictReader(file)}
    assert len(sides) == 20


def test_r20_a_backbone_in_the_home_folder_leaves_no_broken_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "ann"
    (home / "runs").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    model = {"path": str(home / "ssl" / "b.safetensors")}
    facts = _model_facts(model, home / "runs" / "head")
    assert (facts["path"], facts["path_from_run"]) == ("~/ssl/b.safetensors", "../../ssl/b.safetensors")
    monkeypatch.setenv("HOME", "/ssl")
    assert _model_facts({"path": "/ssl/b.safetensors"}, tmp_path / "head")["path_from_run"] is None
