"""Evaluation: numbers against scikit-learn and by hand, leaks and misfits refused, same data, same files."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from medssl_cli.core.errors import CheckpointError, ConfigError, DataError, ResourceError
from medssl_cli.core.run import to_json
from medssl_cli.data.feature_store import FeaturePart, ImageFacts, Row, write_features
from medssl_cli.metrics.novelty import Novelty
from medssl_cli.models.feature_heads import build_head
from medssl_cli.services.evaluate import EvaluateRequest, evaluate, measured
from medssl_cli.services.evaluate_groups import named_groups
from medssl_cli.services.evaluate_missing import drop_one, smaller_sets
from medssl_cli.services.head import save_head

FILES = ("metrics.json", "per_case.csv", "predictions.csv", "probs.npy", "report.html")
SETTINGS = {"tokens": ["cls"], "layers": 1, "resize": None, "weights_sha256": "b" * 64, "preprocess": {"low": 0.5}}


def write(path: Path, header: str, rows: Sequence[Sequence[object]]) -> Path:
    lines = [header, *(",".join(str(cell) for cell in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def strict(path: Path) -> dict[str, Any]:
    """JSON without NaN or Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def numbers(request: EvaluateRequest) -> dict[str, Any]:
    """metrics.json as it would be written, without header; draws no pictures."""
    return json.loads(to_json(measured(request)[1]))


def files(
    tmp_path: Path, scores: Sequence[Any], labels: Sequence[Any], *, whole: bool = False, **options: Any
) -> dict[str, Any]:
    """Numbers of one score and one label a case, the patient is the case; ``whole``: with all files written."""
    name = options.pop("name", "out")
    predictions = write(tmp_path / f"{name}_p.csv", "case_id,score", [(f"c{i}", s) for i, s in enumerate(scores)])
    reference = write(tmp_path / f"{name}_r.csv", "case_id,label", [(f"c{i}", y) for i, y in enumerate(labels)])
    options = {"draws": 50, **options}
    request = EvaluateRequest(tmp_path / name, predictions=predictions, reference=reference, **options)
    if not whole:
        return numbers(request)
    evaluate(request)
    return strict(tmp_path / name / "metrics.json")


def value(facts: Mapping[str, Any], name: str) -> float:
    return facts["metrics"][name]["value"]


def cohort(n: int = 60, seed: int = 0, noise: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, labels) of n cases."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.4).astype(int)
    logits = 1.5 * (2 * labels - 1) * noise + rng.standard_normal(n)
    return np.round(1 / (1 + np.exp(-logits)), 3), labels


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_four_cases_by_hand(tmp_path: Path) -> None:
    """Positives .9 and .3, negatives .8 and .2: three of four pairs are in order."""
    facts = files(tmp_path, [0.9, 0.8, 0.3, 0.2], [1, 0, 1, 0], whole=True)
    assert value(facts, "auroc") == 0.75
    assert facts["macro_auroc"] == 0.75
    assert facts["per_class_classification"]["score"] == {
        "tp": 1, "fp": 1, "fn": 1, "tn": 1, "accuracy": 0.5, "f1": 0.5, "sensitivity": 0.5, "specificity": 0.5,
        "ppv": 0.5, "npv": 0.5,
    }  # fmt: skip
    assert facts["loss"] == pytest.approx(-(np.log(0.9) + np.log(0.2) + np.log(0.3) + np.log(0.8)) / 4, rel=1e-12)
    assert value(facts, "brier") == pytest.approx((0.01 + 0.64 + 0.49 + 0.04) / 4)
    with (tmp_path / "out" / "per_case.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["correct"] for row in rows] == ["1", "0", "0", "1"]
    assert float(rows[1]["loss"]) == pytest.approx(-np.log(0.2))
    assert facts["worst_cases"][0]["case_id"] == "c1"
    assert np.load(tmp_path / "out" / "probs.npy").tolist() == [[np.float32(p)] for p in (0.9, 0.8, 0.3, 0.2)]


def test_binary_metrics_equal_scikit_learn_over_the_whole_path(tmp_path: Path) -> None:
    p, y = cohort()
    facts = files(tmp_path, p, y, threshold=0.35)
    expected = {
        "auroc": sk.roc_auc_score(y, p),
        "average_precision": sk.average_precision_score(y, p),
        "accuracy": sk.accuracy_score(y, p >= 0.35),
        "balanced_accuracy": sk.balanced_accuracy_score(y, p >= 0.35),
        "f1": sk.f1_score(y, p >= 0.35),
        "mcc": sk.matthews_corrcoef(y, p >= 0.35),
        "brier": sk.brier_score_loss(y, p),
        "log_loss": sk.log_loss(y, p),
    }
    assert {name: value(facts, name) for name in expected} == pytest.approx(expected, rel=1e-9)
    assert facts["loss"] == pytest.approx(expected["log_loss"], rel=1e-9)
    assert (facts["threshold"], facts["threshold_source"]) == (0.35, "--threshold")


def test_exclusive_classes_equal_scikit_learn(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 50)
    p = rng.dirichlet([1, 1, 1], 50) * 0.5 + 0.5 * np.eye(3)[np.where(rng.random(50) < 0.6, y, rng.integers(0, 3, 50))]
    names = ("G1", "G2", "G3")
    predictions = write(tmp_path / "p.csv", "id,prob_G1,prob_G2,prob_G3", [(i, *row) for i, row in enumerate(p)])
    reference = write(tmp_path / "r.csv", "id,grade", [(i, names[k]) for i, k in enumerate(y)])
    request = EvaluateRequest(
        tmp_path / "out", predictions=predictions, reference=reference, task="multiclass", target=("grade",), draws=20
    )
    evaluate(request)
    facts = strict(tmp_path / "out" / "metrics.json")
    assert value(facts, "macro_auroc") == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr"))
    assert value(facts, "mcc") == pytest.approx(sk.matthews_corrcoef(y, p.argmax(1)))
    assert facts["loss"] == pytest.approx(sk.log_loss(y, p))
    assert facts["macro_f1"] == pytest.approx(sk.f1_score(y, p.argmax(1), average="macro"))  # W28: with class 0
    assert facts["thresholds"] is None
    assert facts["null_reasons"]["thresholds"]
    with (tmp_path / "out" / "predictions.csv").open() as file:
        first = next(csv.DictReader(file))
    assert first["label"] == names[y[0]]
    assert first["pred"] == names[int(p[0].argmax())]


def test_w30_a_class_that_is_absent_is_left_out_of_the_mean_and_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    p = np.round(rng.random((40, 3)), 3)
    y = np.column_stack([rng.integers(0, 2, 40), np.zeros(40, int), rng.integers(0, 2, 40)])
    header = "id,prob_a,prob_b,prob_c,pred_a"
    predictions = write(tmp_path / "p.csv", header, [(i, *row, int(row[0] >= 0.5)) for i, row in enumerate(p)])
    reference = write(tmp_path / "r.csv", "id,a,b,c", [(i, *row) for i, row in enumerate(y)])
    facts = numbers(EvaluateRequest(tmp_path / "out", predictions=predictions, reference=reference, draws=20))
    defined = [sk.roc_auc_score(y[:, c], p[:, c]) for c in (0, 2)]
    assert value(facts, "macro_auroc") == pytest.approx(np.mean(defined)) == pytest.approx(facts["macro_auroc"])
    assert facts["undefined_classes"] == ["b"]
    assert facts["num_defined"] == 2
    assert facts["per_class_auroc"]["b"] is None
    assert facts["per_class"]["b"]["auroc"]["reason"]
    assert "b" in facts["metrics"]["macro_auroc"]["reason"]
    present, called = y.any(1), (p >= 0.5).any(1)
    assert facts["any_class_metrics"]["sensitivity"] == pytest.approx(sk.recall_score(present, called))


def test_each_class_is_told_on_the_terminal(tmp_path: Path) -> None:
    """Class a is told apart, class b as well as a coin would: both lines carry their own area."""
    predictions = write(tmp_path / "p.csv", "id,prob_a,prob_b", [(i, i / 8, 0.5) for i in range(8)])
    reference = write(tmp_path / "r.csv", "id,a,b", [(i, int(i > 3), i % 2) for i in range(8)])
    request = EvaluateRequest(
        tmp_path / "out", predictions=predictions, reference=reference, task="multilabel", draws=5
    )
    lines = evaluate(request).lines
    told = {line.split()[2]: float(line.split()[3]) for line in lines if line.startswith("  auroc of ")}
    assert told == {"a": 1.0, "b": 0.5}


def test_m22_ties_are_half_and_one_class_is_null_and_listed(tmp_path: Path) -> None:
    assert value(files(tmp_path, [0.4] * 6, [0, 1, 0, 1, 0, 1], name="ties"), "auroc") == 0.5
    facts = files(tmp_path, [0.1, 0.6, 0.3], [0, 0, 0], name="one")
    assert value(facts, "auroc") is None
    assert facts["metrics"]["auroc"]["reason"]
    assert facts["undefined_classes"] == ["score"]
    assert facts["num_defined"] == 0
    assert facts["macro_auroc"] is None
    assert facts["delong"]["score"]["auc"] is None


def test_m25_a_probability_at_the_threshold_is_positive(tmp_path: Path) -> None:
    facts = files(tmp_path, [0.5, 0.5, 0.4999999], [1, 0, 0])
    assert facts["per_class_classification"]["score"]["tp"] == 1
    assert facts["per_class_classification"]["score"]["fp"] == 1
    chosen = files(tmp_path, [0.3, 0.1], [1, 0], name="at", threshold=0.3)
    assert value(chosen, "sensitivity") == 1


def test_w27_a_logit_is_no_probability(tmp_path: Path) -> None:
    """A logit of 0.3 would count as negative at 0.5; scores that cannot be probabilities are refused."""
    with pytest.raises(DataError, match="outside 0 to 1") as caught:
        files(tmp_path, [0.3, -1.2], [1, 0])
    assert "sigmoid" in caught.value.fix


def test_w31_errors_are_in_units_and_finite_around_zero(tmp_path: Path) -> None:
    y = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    p = y + np.array([0.5, -0.5, 0.5, -0.5, 1.0])
    predictions = write(tmp_path / "p.csv", "id,value_shift", [(i, v) for i, v in enumerate(p)])
    reference = write(tmp_path / "r.csv", "id,shift", [(i, v) for i, v in enumerate(y)])
    evaluate(EvaluateRequest(tmp_path / "out", predictions=predictions, reference=reference, draws=20))
    facts = strict(tmp_path / "out" / "metrics.json")
    assert value(facts, "mae") == pytest.approx(0.6) == pytest.approx(sk.mean_absolute_error(y, p))
    assert value(facts, "r2") == pytest.approx(sk.r2_score(y, p))
    assert value(facts, "relative_error") == pytest.approx(0.6 / 1.2)
    assert facts["loss"] == pytest.approx(sk.mean_squared_error(y, p))
    assert "error_shift" in (tmp_path / "out" / "per_case.csv").read_text().splitlines()[0]


def test_w29_the_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    p, y = cohort(30)
    rows = [(f"c{i:02}", s) for i, s in enumerate(p)]
    reference = write(tmp_path / "r.csv", "case_id,label", [(f"c{i:02}", k) for i, k in enumerate(y)])
    for name, table in (("one", rows), ("other", rows[::-1])):
        path = write(tmp_path / f"{name}.csv", "case_id,score", table)
        evaluate(EvaluateRequest(tmp_path / name, predictions=path, reference=reference, draws=50))
    for name in ("per_case.csv", "predictions.csv", "probs.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert strict(tmp_path / "one/metrics.json")["metrics"] == strict(tmp_path / "other/metrics.json")["metrics"]


def test_intervals_draw_patients_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    p, y = cohort(40)
    predictions = write(tmp_path / "p.csv", "case_id,score", [(f"c{i}", s) for i, s in enumerate(p)])
    rows = [(f"c{i}", f"p{i // 4}", k) for i, k in enumerate(y)]
    reference = write(tmp_path / "r.csv", "case_id,patient_id,label", rows)

    def run(name: str, **options: Any) -> dict[str, Any]:
        return numbers(
            EvaluateRequest(tmp_path / name, predictions=predictions, reference=reference, draws=100, **options)
        )

    first, again, other = run("a"), run("b"), run("c", seed=7)
    assert (first["n"], first["n_groups"]) == (40, 10)
    assert first["metrics"] == again["metrics"]
    assert first["metrics"]["auroc"]["ci_low"] != other["metrics"]["auroc"]["ci_low"]
    by_case = run("d", group_by="case_id")
    assert by_case["n_groups"] == 40
    assert by_case["group_by"] == "case_id"


# --- tables ----------------------------------------------------------------------------------------------------------


def test_subgroups_too_small_or_of_one_class_are_null_with_a_reason(tmp_path: Path) -> None:
    p, y = cohort(60)
    site = ["A" if i < 30 else "B" if i < 52 else "C" for i in range(60)]
    y[30:52] = 0
    rows = [(f"c{i}", y[i], site[i], 40 + i) for i in range(60)]
    table = write(tmp_path / "s.csv", "case_id,label,site,age", rows)
    facts = files(tmp_path, p, y, subgroup=("site", "age"), subgroups=table)
    groups = {group["value"]: group for group in facts["subgroups"]["site"]}
    assert [groups[name]["n"] for name in "ABC"] == [30, 22, 8]
    assert groups["A"]["metrics"]["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y[:30], p[:30]))
    assert groups["B"]["metrics"]["auroc"]["value"] is None
    assert groups["B"]["metrics"]["auroc"]["reason"]
    assert groups["B"]["metrics"]["specificity"]["value"] is not None
    assert all(metric["value"] is None for metric in groups["C"]["metrics"].values())
    assert groups["C"]["reason"] == "fewer than 10 cases"
    assert [group["n"] for group in facts["subgroups"]["age"]] == [20, 20, 20]
    assert "chance" in facts["subgroups_note"]
    with pytest.raises(DataError, match="No table") as caught:
        files(tmp_path, p, y, subgroup=("sight",), subgroups=table, name="typo")
    assert "site" in caught.value.fix


def test_groups_are_texts_or_thirds_of_numbers() -> None:
    assert named_groups(["b", "", "a", "b"]) == (["b", "unknown", "a", "b"], ["a", "b", "unknown"])
    assert named_groups(["10", "9", "10"])[1] == ["9", "10"]
    names, values = named_groups([str(n) for n in range(1, 13)] + [""])
    assert [names.count(value) for value in values] == [4, 4, 4, 1]
    assert values[-1] == "unknown"


def test_a_run_compared_with_itself_has_p_one_and_a_better_one_a_small_p(tmp_path: Path) -> None:
    p, y = cohort(80, noise=1.2)
    rng = np.random.default_rng(3)
    files(tmp_path, p, y, name="good", whole=True)
    files(tmp_path, np.round(rng.random(80), 3), y, name="poor", whole=True)
    same = files(tmp_path, p, y, name="same", compare=tmp_path / "good", draws=200)["comparison"]
    assert (same["metric"], same["difference"], same["p"]) == ("auroc", 0, 1)
    assert same["tests"]["auroc (DeLong)"]["p"] == 1
    better = files(tmp_path, p, y, name="better", compare=tmp_path / "poor", draws=200)["comparison"]
    assert better["p"] == pytest.approx(1 / 201)
    assert better["difference"] > 0.2
    assert better["ci_low"] > 0
    assert better["tests"]["auroc (DeLong)"]["p"] < 0.001
    assert better["n"] == 80


def test_evaluations_of_other_cases_or_labels_are_not_compared(tmp_path: Path) -> None:
    p, y = cohort(20)
    files(tmp_path, p, y, name="first", whole=True)
    with pytest.raises(DataError, match="not of the same cases") as caught:
        files(tmp_path, p[:-1], y[:-1], name="fewer", compare=tmp_path / "first")
    assert "1 case only there: 'c19'" in caught.value.where
    with pytest.raises(DataError, match="not of the same cases") as caught:
        files(tmp_path, p, 1 - y, name="flipped", compare=tmp_path / "first")
    assert "20 cases with another label" in caught.value.where
    with pytest.raises(DataError, match="cannot be read"):
        files(tmp_path, p, y, name="none", compare=tmp_path / "nothing")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_refused_evaluation_writes_nothing(tmp_path: Path) -> None:
    predictions = write(tmp_path / "p.csv", "id,score", [("a", 0.1), ("a", 0.2)])
    reference = write(tmp_path / "r.csv", "id,label", [("a", 1)])
    with pytest.raises(DataError, match="stands there twice"):
        evaluate(EvaluateRequest(tmp_path / "out", predictions=predictions, reference=reference))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["empty", "coco.json"])
def test_what_is_neither_a_table_nor_label_maps_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="boxes cannot be evaluated") as caught:
        evaluate(EvaluateRequest(tmp_path / "out", predictions=tmp_path / name, reference=tmp_path / "r.csv"))
    assert "CSV with one row a case" in caught.value.fix


def test_options_without_effect_are_named_together(tmp_path: Path) -> None:
    request = EvaluateRequest(
        tmp_path / "out", predictions=tmp_path / "p.csv", split="test", threshold=1.0, overrides=("batch_size=2",)
    )
    with pytest.raises(ConfigError) as caught:
        evaluate(request)
    assert [line.split(":")[0] for line in caught.value.where.splitlines()] == [
        "--split", "batch_size=2", "--threshold 1",
    ]  # fmt: skip


def test_r15_ids_are_escaped_in_the_report_and_r20_no_home_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    evil = "<script>alert(1)</script>"
    rows = [(evil, 0.9), ("b", 0.2), ("c", 0.7)]
    predictions = write(tmp_path / "p.csv", f"case_id,prob_{evil}", rows)
    reference = write(tmp_path / "r.csv", "case_id,label", [(evil, 1), ("b", 0), ("c", 0)])
    evaluate(EvaluateRequest(tmp_path / "out", predictions=predictions, reference=reference, draws=20))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    for name in ("metrics.json", "report.html"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


# --- a head on features ----------------------------------------------------------------------------------------------


def write_head(folder: Path, width: int = 4, novelty: Novelty | None = None, **card: Any) -> Path:
    """A linear head whose output is the first number of the vector times four."""
    module = build_head("linear", card.get("input_width", width), card.get("outputs", 1))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        last = module.last.weight
        for c in range(len(last)):
            last[c, c] = 4.0
    facts = {
        "task": "binary", "targets": ["cancer"], "classes": ["cancer"], "outputs": 1, "kind": "linear",
        "hidden_dim": 0, "slice_dim": width, "input_width": width, "pool_mode": "mean", "level": "case",
        "case_rule": "max", "thresholds": [0.4], "threshold_rule": "youden", "calibration": None, "calibrated": True,
        "preprocessing": SETTINGS, "model": {"sha256": "b" * 64, "arch": "vit_tiny"}, "class_values": ["0", "1"],
        "label_values": {}, "split_digests": {"train": "t", "val": "v"},
    }  # fmt: skip
    save_head(folder, {**facts, **card}, module, novelty=novelty)
    write(folder / "cases.csv", "part,case_id,patient_id", [("train", "t0", "pt0"), ("val", "v0", "pv0")])
    (folder / "run.json").write_text(json.dumps({"status": "finished"}), encoding="utf-8")
    return folder


def write_part(
    folder: Path,
    part: str = "test",
    *,
    vectors: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[str] | None = None,
    slices: int = 0,
    **info: Any,
) -> Path:
    """Features of one part; with ``slices`` the rows are slices, so many a case."""
    rows, facts = [], {}
    for n in range(len(vectors)):
        case, index = divmod(n, slices) if slices else (n, None)
        patient = patients[case] if patients is not None else f"p{case}"
        rows.append(Row(f"c{case:02}", patient, "", index, slices or 1, 0, f"c{case:02}"))
        missing = ("adc",) if case % 2 else ()
        facts[f"c{case:02}"] = ImageFacts((3.0, 1.0, 1.0), (slices or 1, 8, 8), {}, missing)
    described = {
        "pool_mode": "none" if slices else "mean", "embedding_dim": vectors.shape[1], "slice_dim": 4,
        "targets": ["cancer"], "label_values": {}, "extraction": SETTINGS,
    }  # fmt: skip
    made = FeaturePart(part, vectors.astype(np.float32), labels.astype(np.float32), tuple(rows), facts)
    write_features(folder, {**described, **info}, [made])
    return folder.parent if folder.name == "features" else folder


@pytest.fixture
def features(tmp_path: Path) -> Path:
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((40, 4)).astype(np.float32)
    labels = (vectors[:, :1] + rng.standard_normal((40, 1)) > 0).astype(np.float32)
    return write_part(tmp_path / "x" / "features", vectors=vectors, labels=labels)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_head_on_stored_features_is_what_its_formula_says(tmp_path: Path, features: Path) -> None:
    head = write_head(tmp_path / "head")
    request = EvaluateRequest(tmp_path / "out", model=head, data=features, draws=50, subgroup=("missing",))
    result = evaluate(request)
    facts = strict(tmp_path / "out" / "metrics.json")
    x = np.load(features / "features" / "test_embeddings.npy").astype(np.float64)
    y = np.load(features / "features" / "test_labels.npy")[:, 0]
    p = 1 / (1 + np.exp(-4 * x[:, 0]))
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    np.testing.assert_allclose([float(row["prob_cancer"]) for row in rows], p, rtol=1e-12)
    assert value(facts, "auroc") == pytest.approx(sk.roc_auc_score(y, p))
    assert value(facts, "f1") == pytest.approx(sk.f1_score(y, p >= 0.4))
    assert facts["thresholds"] == [0.4]
    assert facts["threshold_source"] == "head: youden"
    assert facts["calibrated"] is True
    assert facts["data"]["split"] == "test"
    assert len(facts["data"]["split_digest"]) == 64
    assert facts["model"]["backbone_sha256"] == "b" * 64
    assert len(facts["model"]["head_sha256"]) == 64
    assert {group["value"]: group["n"] for group in facts["subgroups"]["missing"]} == {"adc": 20, "none": 20}
    assert all((tmp_path / "out" / name).is_file() for name in FILES)
    assert result.error is None
    assert result.lines[-1].endswith("report.html")


def test_predictions_of_an_evaluation_evaluate_to_the_same_numbers(tmp_path: Path, features: Path) -> None:
    head = write_head(tmp_path / "head")
    evaluate(EvaluateRequest(tmp_path / "one", model=head, data=features, draws=50))
    evaluate(EvaluateRequest(tmp_path / "two", predictions=tmp_path / "one", threshold=0.4, draws=50))
    one, two = (strict(tmp_path / name / "metrics.json") for name in ("one", "two"))
    assert one["metrics"] == two["metrics"]
    for name in ("per_case.csv", "predictions.csv", "probs.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_r12_cases_and_patients_that_the_head_has_seen_are_refused(tmp_path: Path) -> None:
    vectors, labels = np.eye(4), np.array([[0], [1], [0], [1]])
    features = write_part(
        tmp_path / "x" / "features", vectors=vectors, labels=labels, patients=("p0", "pv0", "p2", "pt0")
    )
    head = write_head(tmp_path / "head")
    with pytest.raises(DataError, match="has seen 2 cases of part test") as caught:
        evaluate(EvaluateRequest(tmp_path / "out", model=head, data=features))
    assert caught.value.code == "split_leak"
    assert "patient pv0 (val), case c01" in caught.value.where
    assert not (tmp_path / "out").exists()
    trained = write_part(tmp_path / "y" / "features", "train", vectors=vectors, labels=labels, patients=("pt0",) * 4)
    with pytest.raises(DataError, match="no part 'test'"):
        evaluate(EvaluateRequest(tmp_path / "out", model=head, data=trained))
    facts = numbers(EvaluateRequest(tmp_path / "out", model=head, data=trained, split="train", draws=20))
    assert facts["data"]["held_back"] is False
    assert "tell nothing of new patients" in facts["notes"][0]
    whole = write_part(tmp_path / "z" / "features", "all", vectors=vectors, labels=labels, patients=("pt0",) * 4)
    with pytest.raises(DataError, match="has seen 4 cases of part all"):
        evaluate(EvaluateRequest(tmp_path / "out2", model=head, data=whole))
    (head / "cases.csv").unlink()
    with pytest.raises(CheckpointError, match="list of the cases"):
        evaluate(EvaluateRequest(tmp_path / "out2", model=head, data=whole))


def test_r12_training_images_under_another_name_are_refused(tmp_path: Path, features: Path) -> None:
    rng = np.random.default_rng(6)
    training = rng.standard_normal((30, 4)).astype(np.float32)
    groups = [f"t{n}" for n in range(30)]
    clean = write_head(tmp_path / "clean", novelty=Novelty.fit(training, groups))
    numbers(EvaluateRequest(tmp_path / "out", model=clean, data=features, draws=20))
    training[3] = np.load(features / "features" / "test_embeddings.npy")[17]
    leaky = write_head(tmp_path / "leaky", novelty=Novelty.fit(training, groups))
    with pytest.raises(DataError, match="images of 1 case of part test") as caught:
        evaluate(EvaluateRequest(tmp_path / "out", model=leaky, data=features, draws=20))
    assert caught.value.code == "split_leak"
    assert "'c17'" in caught.value.where


def test_m26_features_made_otherwise_are_refused_with_the_keys(tmp_path: Path, features: Path) -> None:
    other = {**SETTINGS, "layers": 4, "preprocess": {"low": 1.0}}
    head = write_head(tmp_path / "head", preprocessing=other)
    with pytest.raises(DataError, match="made in another way") as caught:
        evaluate(EvaluateRequest(tmp_path / "out", model=head, data=features))
    assert "layers: head 4, features 1" in caught.value.where
    assert "preprocess.low" in caught.value.where
    wide = write_head(tmp_path / "wide", input_width=8, pool_mode="meanmax")
    with pytest.raises(ConfigError) as pooling:
        evaluate(EvaluateRequest(tmp_path / "out", model=wide, data=features))
    assert "8 numbers (meanmax" in pooling.value.where
    assert "4 numbers (mean" in pooling.value.where


def test_labels_come_from_a_table_under_another_name_and_unknown_ones_are_left_out(
    tmp_path: Path, features: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = write_head(
        tmp_path / "head", class_values=["benign", "cancer"], label_values={"cancer": ["benign", "cancer"]}
    )
    rows = [(f"c{i:02}", "cancer" if i % 3 == 0 else "benign") for i in range(30)]
    labels = write(tmp_path / "labels.csv", "case_id,biopsy", rows)
    request = EvaluateRequest(
        tmp_path / "out", model=head, data=features, labels=labels, target=("biopsy",), draws=20, subgroup=("biopsy",)
    )
    with caplog.at_level(logging.WARNING):
        facts = numbers(request)
    assert (facts["n"], facts["n_unlabelled"]) == (30, 10)
    assert "10 cases without a known label" in caplog.text
    assert value(facts, "prevalence") == pytest.approx(1 / 3)
    write(labels, "case_id,biopsy", [("c00", "maybe")])
    with pytest.raises(DataError) as caught:
        evaluate(request)
    assert "maybe" in caught.value.where


def test_data_without_labels_say_how_to_give_them(tmp_path: Path) -> None:
    part = FeaturePart("test", np.zeros((2, 4), np.float32), None, (Row("a", "a", "", None, 1, 0, "a"),) * 2)
    info = {"pool_mode": "mean", "embedding_dim": 4, "slice_dim": 4, "targets": [], "extraction": SETTINGS}
    write_features(tmp_path / "features", info, [part])
    with pytest.raises(DataError, match="no labels") as caught:
        evaluate(EvaluateRequest(tmp_path / "out", model=write_head(tmp_path / "head"), data=tmp_path))
    assert "--labels" in caught.value.fix


def test_a_slice_head_is_judged_by_case_and_by_slice(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((90, 4))
    labels = (vectors[:, :1] + 0.5 * rng.standard_normal((90, 1)) > 0.8).astype(float)
    features = write_part(tmp_path / "x" / "features", vectors=vectors, labels=labels, slices=3)
    head = write_head(tmp_path / "head", level="slice", pool_mode="none")
    evaluate(EvaluateRequest(tmp_path / "out", model=head, data=features, draws=50))
    facts = strict(tmp_path / "out" / "metrics.json")
    p = 1 / (1 + np.exp(-4 * vectors[:, 0].astype(np.float32).astype(float)))
    assert value(facts, "auroc") == pytest.approx(
        sk.roc_auc_score(labels.reshape(30, 3).max(1), p.reshape(30, 3).max(1))
    )
    slices = facts["slice_level"]
    assert slices["metrics"]["auroc"]["value"] == pytest.approx(sk.roc_auc_score(labels[:, 0], p))
    assert (slices["n"], slices["n_groups"], facts["n"]) == (90, 30, 30)


def test_a_bare_backbone_and_missing_data_are_refused(tmp_path: Path, features: Path, write_run: Any) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="bare backbone"):
        evaluate(EvaluateRequest(tmp_path / "out", model=run, data=features))
    with pytest.raises(ConfigError, match="no effect on stored features"):
        evaluate(
            EvaluateRequest(
                tmp_path / "out", model=write_head(tmp_path / "head"), data=features, missing_sequences=True
            )
        )


def test_a_threshold_that_decides_nothing_is_refused(tmp_path: Path, features: Path) -> None:
    for task in ("multiclass", "regression"):
        card = {"task": task, "outputs": 3, "classes": ["a", "b", "c"], "targets": ["cancer"], "thresholds": None}
        if task == "regression":
            card = {"task": task, "thresholds": None, "units": ["mm"], "target_mean": [0.0], "target_std": [1.0]}
        request = EvaluateRequest(
            tmp_path / "out", model=write_head(tmp_path / task, **card), data=features, threshold=0.3
        )
        with pytest.raises(ConfigError, match=f"no effect on predictions of the task {task}") as caught:
            evaluate(request)
        assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="of the task regression"):
        files(tmp_path, [1.5, 2.5, 3.0], [1.0, 2.0, 3.5], task="regression", threshold=0.3)
    assert not (tmp_path / "out").exists()


def test_skipping_bad_images_is_refused_for_stored_features(tmp_path: Path, features: Path) -> None:
    request = EvaluateRequest(tmp_path / "out", model=write_head(tmp_path / "head"), data=features, on_error="skip")
    with pytest.raises(ConfigError, match="no effect on stored features") as caught:
        evaluate(request)
    assert caught.value.where.startswith("--on-error;")


def test_m29_an_absent_device_is_an_error(tmp_path: Path, features: Path) -> None:
    request = EvaluateRequest(tmp_path / "out", model=write_head(tmp_path / "head"), data=features, device="cuda:9")
    with pytest.raises(ResourceError, match="cuda:9 is absent"):
        evaluate(request)


# --- a head on images ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_head(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path], labelled_tree: Path) -> Path:
    """A linear head on a tiny random backbone of three sequences, as it would be trained on other cases."""
    from medssl_cli.services.backbone import open_backbone
    from medssl_cli.services.embedding import Embedder, ExtractConfig
    from medssl_cli.services.lookup import find_model

    folder = tmp_path_factory.mktemp("image_head")
    run = write_run(folder / "backbone")
    backbone = open_backbone(find_model(run), torch.device("cpu"))
    embedder = Embedder(backbone, ExtractConfig(max_slices=2, resize=32))
    card = {
        "targets": ["label"], "classes": ["label"], "preprocessing": embedder.settings,
        "model": {"path": str(backbone.found.weights), "sha256": backbone.card["sha256"], "arch": "vit_tiny"},
    }  # fmt: skip
    return write_head(folder / "head", embedder.width, **card)


def test_p43_images_are_evaluated_with_every_smaller_set_of_sequences(
    tmp_path: Path, image_head: Path, labelled_tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = EvaluateRequest(
        tmp_path / "out", model=image_head, data=labelled_tree, missing_sequences=True, draws=20,
        cache=tmp_path / "cache", subgroup=("slices",), group_by="patient_id",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        evaluate(request)
    facts = strict(tmp_path / "out" / "metrics.json")
    table = {row["sequences"]: row for row in facts["missing_sequences"]}
    names = ("ax_t2wi", "ax_adc", "ax_dwi")
    assert set(table) == {"all", "random", *("-".join(subset) for subset in smaller_sets(names))}
    assert table["all"]["metrics"] == facts["metrics"]
    assert table["all"]["n"] == facts["n"]
    assert table["ax_adc"]["n"] <= facts["n"]
    assert len({row["metrics"]["log_loss"]["value"] for row in table.values()}) == len(table)
    assert (tmp_path / "out" / "missing_sequences.csv").is_file()
    assert facts["data"]["split"] == "all"
    assert "No split is known" in caplog.text

    caplog.clear()
    before = {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    with caplog.at_level(logging.INFO):
        evaluate(request)
    assert "all: 0 forward passes" in caplog.text
    for name in ("per_case.csv", "predictions.csv", "probs.npy"):
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    again = strict(tmp_path / "out" / "metrics.json")
    differ = {key for key in facts if facts[key] != again[key]}
    assert differ <= {"started_at", "elapsed_s"}


def test_images_and_their_features_give_the_same_numbers(tmp_path: Path, image_head: Path, labelled_tree: Path) -> None:
    from medssl_cli.services.extract import ExtractRequest, extract

    overrides = ("max_slices=2", "resize=32")
    extract(
        ExtractRequest(
            input=labelled_tree, model=image_head.parent / "backbone", out=tmp_path / "x", targets=("label",),
            cache=tmp_path / "cache", overrides=overrides,
        )
    )  # fmt: skip
    stored = EvaluateRequest(tmp_path / "one", model=image_head, data=tmp_path / "x", draws=20)
    images = EvaluateRequest(tmp_path / "two", model=image_head, data=labelled_tree, draws=20, cache=tmp_path / "cache")
    one, two = numbers(stored), numbers(images)
    assert one["metrics"] == two["metrics"]
    assert one["data"]["split_digest"] == two["data"]["split_digest"]


@pytest.mark.slow
def test_a_bad_case_is_listed_and_the_others_are_evaluated(
    tmp_path: Path, image_head: Path, labelled_tree: Path
) -> None:
    import shutil

    root = tmp_path / "tree"
    shutil.copytree(labelled_tree, root)
    bad = sorted(path for path in root.iterdir() if path.is_dir())[2]
    for path in bad.glob("ax_*.nii.gz"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    request = EvaluateRequest(tmp_path / "out", model=image_head, data=root, draws=20, cache=tmp_path / "cache")
    with pytest.raises(DataError):
        evaluate(request)
    result = evaluate(EvaluateRequest(**{**request.__dict__, "on_error": "skip"}))
    assert result.error is not None
    assert result.error.exit_code == 4
    assert [row["case_id"] for row in read_rows(tmp_path / "out" / "failures.csv")] == [bad.name]
    assert result.facts["n_failed"] == 1
    assert result.facts["n"] == 15


def test_smaller_sets_and_drops_are_as_said() -> None:
    assert smaller_sets("abc") == [("a", "b"), ("a", "c"), ("b", "c"), ("a",), ("b",), ("c",)]
    dropped = [drop_one(("a", "b", "c"), f"c{i}", 42) for i in range(60)]
    assert set(dropped) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert drop_one(("a",), "c", 42) == ()
    assert dropped == [drop_one(("a", "b", "c"), f"c{i}", 42) for i in range(60)]


# --- reliability -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_r16_a_killed_evaluation_leaves_the_old_results_and_runs_again_to_the_same_files(tmp_path: Path) -> None:
    p, y = cohort(200)
    files(tmp_path, p, y, name="whole", draws=4000, whole=True)
    predictions, reference = tmp_path / "whole_p.csv", tmp_path / "whole_r.csv"
    out = tmp_path / "cut"
    words = ["eval", "--predictions", predictions, "--reference", reference, "--out", out]
    program = [sys.executable, "-m", "medssl_cli", *map(str, words)]
    subprocess.run([*program, "--draws", "10"], check=True, capture_output=True)
    old = (out / "metrics.json").read_bytes()
    process = subprocess.Popen([*program, "--draws", "400000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(3)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (out / "metrics.json").read_bytes() == old
    subprocess.run([*program, "--draws", "4000"], check=True, capture_output=True)
    for name in ("per_case.csv", "predictions.csv", "probs.npy"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    cut, whole = strict(out / "metrics.json"), strict(tmp_path / "whole" / "metrics.json")
    assert {key for key in cut if cut[key] != whole[key]} <= {"started_at", "elapsed_s", "provenance"}
    assert not list(out.glob(".tmp-*"))


# --- what a reader is told -------------------------------------------------------------------------------------------


def test_few_patients_and_unknown_ones_are_told(tmp_path: Path) -> None:
    p, y = cohort(8)
    facts = files(tmp_path, p, y, whole=True)
    unknown, few = facts["notes"]
    assert facts["group_by"] == "case_id"
    assert "each case counts as a patient of its own" in unknown
    assert "Intervals of 8 cases are too narrow" in few
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Binary, 8 cases." in page
    assert "Intervals of 8 cases are too narrow" in page
    rows = [(f"c{i}", f"P{i}", label) for i, label in enumerate(cohort(40)[1])]
    reference = write(tmp_path / "r.csv", "case_id,patient_id,label", rows)
    predictions = write(tmp_path / "p.csv", "case_id,score", [(f"c{i}", s) for i, s in enumerate(cohort(40)[0])])
    result = evaluate(EvaluateRequest(tmp_path / "known", predictions=predictions, reference=reference, draws=20))
    assert result.lines[0].startswith("binary (score): 40 cases, 40 patients; ")
    assert strict(tmp_path / "known" / "metrics.json")["notes"] == []


def test_a_table_of_groups_without_a_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="One option") as caught:
        files(tmp_path, [0.9, 0.1], [1, 0], subgroups=tmp_path / "groups.csv")
    assert "--subgroups: without effect; name a column of it with --subgroup COL" in caught.value.where


def test_targets_in_other_units_weigh_alike_in_the_loss(tmp_path: Path) -> None:
    """Off by one spread in each target: (1 + 1) / 2; in the square of the units one target would drown the other."""
    truth = np.array([[1000.0, 1.0], [3000.0, 3.0]])
    predicted = truth + np.array([[1000.0, -1.0], [0.0, 0.0]])
    header = "case_id,{0}_volume,{0}_grade"
    rows = [("a", *predicted[0]), ("b", *predicted[1])]
    predictions = write(tmp_path / "p.csv", header.format("value"), rows)
    reference = write(tmp_path / "r.csv", header.format("label"), [("a", *truth[0]), ("b", *truth[1])])
    facts = numbers(EvaluateRequest(tmp_path / "out", predictions=predictions, reference=reference, draws=5))
    assert [case["loss"] for case in facts["worst_cases"]] == pytest.approx([1.0, 0.0])
    assert "variance of its references" in facts["loss_definition"]


def test_the_label_any_of_a_series_table_decides_whether_there_is_anything(tmp_path: Path) -> None:
    header = "case_id,{0}label_any,{0}label_subdural"
    predictions = write(tmp_path / "p.csv", header.format("prob_"), [("a", 0.9, 0.1), ("b", 0.2, 0.8)])
    reference = write(tmp_path / "r.csv", header.format(""), [("a", 1, 0), ("b", 0, 0)])
    request = EvaluateRequest(
        tmp_path / "out", predictions=predictions, reference=reference, task="multilabel", draws=5
    )
    found = numbers(request)["any_class_metrics"]
    assert found["definition"] == "of the class label_any"
    assert (found["tp"], found["fp"], found["tn"]) == (1, 0, 1)


def test_delong_stands_on_the_page_and_provenance_comes_last(tmp_path: Path) -> None:
    p, y = cohort()
    facts = files(tmp_path, p, y, whole=True)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "DeLong et al. 1988" in page
    assert f"score {facts['delong']['score']['auc']:.3f} ({facts['delong']['score']['ci_low']:.3f} to" in page
    assert page.index("Cases farthest off</h2>") < page.index("Provenance</h2>")
    assert page.count("Cases farthest off</h2>") == 1
