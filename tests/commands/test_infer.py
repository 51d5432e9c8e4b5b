from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

Medssl = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Path:
    return write_run(tmp_path_factory.mktemp("model") / "runs" / "tiny")


def test_a_case_folder_with_a_heat_map(medssl: Medssl, run: Path, prostate_tree: Path, tmp_path: Path) -> None:
    case = sorted(path for path in prostate_tree.iterdir() if path.is_dir())[0]
    answer = medssl(
        "infer", case, "--model", run, "--heatmap", "--device", "cpu", "--out", tmp_path / "out", "stride=6"
    )
    assert answer.exit_code == 0, answer.stderr
    assert f"{case.name}: " in answer.stdout
    assert "heatmap.nii.gz (rollout)" in answer.stdout
    assert "report.html" in answer.stdout
    assert f"Model: {run} (given), on cpu" in answer.stderr
    source, heat = nib.load(case / "ax_t2wi.nii.gz"), nib.load(tmp_path / "out/heatmap.nii.gz")
    assert heat.shape == source.shape
    np.testing.assert_array_equal(heat.affine, source.affine)
    assert np.isfinite(np.asarray(heat.dataobj)).all()
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert case.name in text
    assert "research use only" in text


def test_the_newest_run_is_found_and_named(
    medssl: Medssl, run: Path, prostate_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parents[1])
    monkeypatch.delenv("MEDSSL_MODEL", raising=False)
    case = prostate_tree / sorted(path.name for path in prostate_tree.iterdir() if path.is_dir())[0] / "ax_t2wi.nii.gz"
    words = ("infer", case, "--out", tmp_path / "out", "--device", "cpu", "stride=12")
    answer = medssl(*words)
    assert answer.exit_code == 0, answer.stderr
    assert "runs/tiny (newest finished run under ./runs)" in answer.stderr
    answer = medssl(*words, env={"MEDSSL_MODEL": str(run / "export/teacher_backbone.safetensors")})
    assert "teacher_backbone.safetensors (MEDSSL_MODEL)" in answer.stderr
    monkeypatch.chdir(tmp_path)
    answer = medssl(*words)
    assert answer.exit_code == 2
    for way in ("--model", "MEDSSL_MODEL", "medssl pretrain"):
        assert way in answer.stderr


def test_json_is_one_document(medssl: Medssl, run: Path, prostate_tree: Path, tmp_path: Path) -> None:
    cases = sorted(path for path in prostate_tree.iterdir() if path.is_dir())
    lacking = next(path for path in cases if not (path / "ax_adc.nii.gz").exists())
    cases = [next(path for path in cases if path != lacking), lacking]
    answer = medssl(
        "infer", *cases, "--model", run, "--device", "cpu", "--out", tmp_path / "out", "--json", "stride=12"
    )
    assert answer.exit_code == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert told["command"] == "infer"
    assert [entry["case_id"] for entry in told["cases"]] == [case.name for case in cases]
    assert told["cases"][1]["missing_sequences"] == ["ax_adc"]
    assert "ax_adc missing; the model sees the others alone" in answer.stderr
    assert told == json.loads((tmp_path / "out/summary.json").read_text())


def test_bad_cases_exit_4_and_stand_in_the_list(medssl: Medssl, run: Path, prostate_tree: Path, tmp_path: Path) -> None:
    good = sorted(path for path in prostate_tree.iterdir() if path.is_dir())[0]
    (tmp_path / "bad.nii.gz").write_bytes(b"nothing")
    words = ("infer", tmp_path / "bad.nii.gz", good, "--model", run, "--device", "cpu", "stride=12")
    answer = medssl(*words, "--out", tmp_path / "out", "--on-error", "skip")
    assert answer.exit_code == 4
    assert "1 of 2 cases failed" in answer.stderr
    assert f"{good.name}: " in answer.stdout
    with (tmp_path / "out/failures.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case_id", "path", "reason", "fix"]
    assert [row[0] for row in rows[1:]] == ["bad"]
    assert (tmp_path / "out" / good.name / "summary.json").is_file()
    answer = medssl(*words, "--out", tmp_path / "stopped")
    assert answer.exit_code == 3
    assert "bad.nii.gz" in answer.stderr
    assert "fix:" in answer.stderr


def test_wrong_words_exit_2_and_write_nothing(medssl: Medssl, run: Path, prostate_tree: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out", "--model", run)
    for words in (
        ("stride=0",),
        ("strde=2",),
        ("--device", "tpu"),
        ("--top-k", 0),
        ("--heatmap=1",),
        ("--on-error", "x"),
    ):
        answer = medssl("infer", prostate_tree / "PT-0001", *out, *words)
        assert answer.exit_code == 2, (words, answer.stderr)
    assert medssl("infer", "stride=2", *out).exit_code == 2
    assert medssl("infer", "x.nii.gz", *out, "--device", "cuda:99").exit_code == 6
    assert medssl("infer", "x.nii.gz", "--out", tmp_path / "out", "--model", tmp_path / "no").exit_code == 7
    assert not (tmp_path / "out").exists()


def test_top_k_is_refused_where_nothing_ranks_the_slices(
    medssl: Medssl, run: Path, prostate_tree: Path, tmp_path: Path
) -> None:
    words = ("infer", prostate_tree / "PT-0001", "--out", tmp_path / "out", "--model", run, "--device", "cpu")
    answer = medssl(*words, "--top-k", 5)
    assert answer.exit_code == 2
    assert "--top-k has no effect on a bare backbone without a heat map" in answer.stderr
    assert not (tmp_path / "out").exists()
    assert "[default: 5]" in " ".join(medssl("infer", "--help").stdout.split())


def test_without_out_each_case_has_a_folder_of_its_own(tmp_path: Path) -> None:
    from medssl_cli.services.infer import default_out

    (tmp_path / "P1").mkdir()
    assert default_out((str(tmp_path / "P1"),)) == Path("out/P1")
    assert default_out((str(tmp_path / "case.nii.gz"),)) == Path("out/case")
    assert default_out((str(tmp_path / "a.nii"), str(tmp_path / "b.nii"))) == Path("out")


# --- a head ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head_run(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of two labels with random weights on the backbone of ``run``."""
    import torch

    from medssl_cli.models.feature_heads import build_head
    from medssl_cli.services.backbone import open_backbone
    from medssl_cli.services.embedding import Embedder, ExtractConfig
    from medssl_cli.services.head import save_head
    from medssl_cli.services.lookup import find_model

    backbone = open_backbone(find_model(run), torch.device("cpu"))
    embedder = Embedder(backbone, ExtractConfig(stride=6))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_head("linear", 32, 2)
    card = {
        "task": "multilabel", "targets": ["any", "csPCa"], "classes": ["any", "csPCa"], "outputs": 2, "kind": "linear",
        "hidden_dim": 0, "slice_dim": 32, "input_width": 32, "pool_mode": "mean", "level": "case",
        "thresholds": [0.01, 0.99], "threshold_rule": "fixed=0.5", "calibration": None, "calibrated": False,
        "preprocessing": embedder.settings, "model": {"path": str(backbone.found.weights)},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("heads") / "head"
    save_head(folder, card, module)
    return folder


def test_decisions_are_printed_and_written(medssl: Medssl, head_run: Path, prostate_tree: Path, tmp_path: Path) -> None:
    case = sorted(path for path in prostate_tree.iterdir() if path.is_dir())[0]
    words = ("infer", case, "--model", head_run, "--device", "cpu", "--out", tmp_path / "out")
    answer = medssl(*words, "--heatmap", "--top-k", 2)
    assert answer.exit_code == 0, answer.stderr
    lines = [line.split() for line in answer.stdout.splitlines()]
    assert next(line for line in lines if line[0] == "any")[-3:] == ["threshold", "0.010", "POSITIVE"]
    assert next(line for line in lines if line[0] == "csPCa")[-1] == "negative"
    assert "heatmap.nii.gz (head)" in answer.stdout
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["predicted"] == {"any": True, "csPCa": False}
    assert len(summary["top_slices"]) == 2
    assert "For research use only" in summary["note"]
    answer = medssl(*words, "--threshold", 0.999, "--json")
    told = json.loads(answer.stdout)["cases"][0]
    assert told["predicted"] == {"any": False, "csPCa": False}
    assert told["threshold_source"] == "given"


def test_a_batch_of_a_head_is_a_table(medssl: Medssl, head_run: Path, prostate_tree: Path, tmp_path: Path) -> None:
    cases = sorted(path for path in prostate_tree.iterdir() if path.is_dir())[:2]
    (tmp_path / "bad.nii.gz").write_bytes(b"nothing")
    words = ("infer", *cases, tmp_path / "bad.nii.gz", "--model", head_run, "--device", "cpu", "--on-error", "skip")
    answer = medssl(*words, "--out", tmp_path / "out")
    assert answer.exit_code == 4
    with (tmp_path / "out/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case_id"] for row in rows] == [case.name for case in cases]
    assert {"patient_id", "prob_any", "prob_csPCa", "pred_any", "pred_csPCa"} <= set(rows[0])
    for case, row in zip(cases, rows, strict=True):
        own = json.loads((tmp_path / "out" / case.name / "summary.json").read_text())
        assert float(row["prob_any"]) == own["probabilities"]["any"]


def test_wrong_words_about_a_head_exit_2(
    medssl: Medssl, head_run: Path, run: Path, prostate_tree: Path, tmp_path: Path
) -> None:
    case = sorted(path for path in prostate_tree.iterdir() if path.is_dir())[0]
    for model, words in (
        (head_run, ("--threshold", 1)),
        (head_run, ("--threshold", 0)),
        (head_run, ("stride=2",)),
        (head_run, ("--dicom", "pm")),
        (head_run, ("--heatmap", "--dicom", "nifti")),
        (head_run, ("--heatmap", "--dicom", "pm")),
        (run, ("--threshold", 0.5)),
        (run, ("--backbone", run)),
    ):
        answer = medssl("infer", case, "--model", model, "--out", tmp_path / "out", "--device", "cpu", *words)
        assert answer.exit_code == 2, (words, answer.stderr)
        assert "fix:" in answer.stderr
    assert not (tmp_path / "out").exists()
