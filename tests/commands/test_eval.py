"""The command ``eval``: what is printed, what is written, which exit code comes back."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PREDICTIONS = "case_id,prob_cancer\nc1,0.9\nc2,0.8\nc3,0.3\nc4,0.2\n"
REFERENCE = "case_id,patient_id,cancer\nc1,p1,1\nc2,p2,0\nc3,p3,1\nc4,p4,0\n"


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "p.csv").write_text(PREDICTIONS, encoding="utf-8")
    (tmp_path / "r.csv").write_text(REFERENCE, encoding="utf-8")
    return tmp_path / "p.csv", tmp_path / "r.csv"


def test_it_prints_each_metric_with_its_interval_and_where_the_report_is(
    medssl: Callable[..., Any], tables: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = medssl("eval", "--predictions", tables[0], "--reference", tables[1], "--out", out, "--draws", "50")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("binary (cancer): 4 cases, 4 patients; threshold 0.5")
    assert any(line.split()[:2] == ["auroc", "0.750"] for line in lines)
    assert lines[-1] == f"report: {out / 'report.html'}"
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert names == ["metrics.json", "per_case.csv", "predictions.csv", "probs.npy", "report.html"]


def test_json_is_one_strict_document_on_stdout(
    medssl: Callable[..., Any], tables: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("eval", "--predictions", tables[0], "--reference", tables[1], "--out", tmp_path / "out", "--json")
    result = medssl(*words, "--draws", "20", "--seed", "3")
    facts = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
    assert facts == json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert (facts["command"], facts["schema_version"], facts["bootstrap"]["seed"]) == ("eval", 1, 3)
    for metric in facts["metrics"].values():
        assert {"value", "ci_low", "ci_high", "definition", "n", "n_groups"} <= metric.keys()
        assert metric["ci_low"] is not None or metric["reason"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--predictions", "{p}", "--reference", "{short}"), 0, ""),
        (("--predictions", "{short_p}", "--reference", "{r}"), 3, "2 cases of the reference have no prediction"),
        (("--predictions", "{p}"), 2, "--reference"),
        (("--reference", "{r}"), 2, "--predictions"),
        ((), 2, "--data"),
        (("--predictions", "{p}", "--reference", "{r}", "--split", "test"), 2, "--split"),
        (("--predictions", "{p}", "--reference", "{r}", "batch_size=4"), 2, "batch_size=4"),
        (("--predictions", "{p}", "--reference", "{r}", "--device", "cuda:9"), 2, "--device: without effect"),
        (("--predictions", "{p}", "--reference", "{r}", "--on-error", "skip"), 2, "--on-error: without effect"),
        (("--predictions", "{p}", "--reference", "{r}", "--threshold", "1.5"), 2, "--threshold"),
        (("--predictions", "{p}", "--reference", "{r}", "--task", "multiclass"), 2, "one probability"),
        (("--predictions", "{folder}", "--reference", "{r}"), 2, "neither a table nor label maps"),
        (("--model", "{folder}", "--data", "{folder}"), 7, "no exported backbone"),
    ],
)
def test_exit_codes(
    medssl: Callable[..., Any],
    tables: tuple[Path, Path],
    tmp_path: Path,
    words: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    short, short_p, folder = tmp_path / "short.csv", tmp_path / "short_p.csv", tmp_path / "folder"
    short.write_text("\n".join(REFERENCE.splitlines()[:3]) + "\n", encoding="utf-8")
    short_p.write_text("\n".join(PREDICTIONS.splitlines()[:3]) + "\n", encoding="utf-8")
    folder.mkdir()
    places = {"p": tables[0], "r": tables[1], "short": short, "short_p": short_p, "folder": folder}
    result = medssl("eval", *(word.format(**places) for word in words), "--out", tmp_path / "out", "--draws", "10")
    assert result.exit_code == code, result.output
    assert said in result.stderr
    if code:
        assert "fix:" in result.stderr
        assert not (tmp_path / "out").exists()


def test_results_of_another_command_stay(medssl: Callable[..., Any], tables: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept", encoding="utf-8")
    words = ("eval", "--predictions", tables[0], "--reference", tables[1], "--out", out, "--draws", "10")
    refused = medssl(*words)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert (out / "mine.txt").read_text(encoding="utf-8") == "kept"
    assert medssl(*words, "--overwrite").exit_code == 0
    assert medssl(*words).exit_code == 0  # its own results are replaced
    with (out / "per_case.csv").open(encoding="utf-8") as file:
        assert [row["case_id"] for row in csv.DictReader(file)] == ["c1", "c2", "c3", "c4"]


def test_tables_are_evaluated_without_torch(tables: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from medssl_cli.services.evaluate import EvaluateRequest, evaluate; "
        "p, r, out = map(Path, sys.argv[1:]); evaluate(EvaluateRequest(out, predictions=p, reference=r, draws=5)); "
        "print('torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code, *map(str, tables), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
