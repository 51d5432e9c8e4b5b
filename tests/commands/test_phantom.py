"""medssl phantom on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from medssl_cli.app import app

runner = CliRunner()


def test_phantom_writes_a_case_tree_and_says_what_is_missing(tmp_path: Path) -> None:
    answer = runner.invoke(app, ["phantom", "prostate", str(tmp_path / "out"), "--cases", "4"])
    assert answer.exit_code == 0, answer.output
    assert "4 cases of 3 patients" in answer.stdout
    assert "has no ax_adc" in answer.stdout
    assert (tmp_path / "out" / "labels.csv").is_file()


def test_phantom_json_is_one_document(tmp_path: Path) -> None:
    answer = runner.invoke(app, ["phantom", "prostate-dicom", str(tmp_path / "out"), "--cases", "1", "--json"])
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    assert (result["command"], result["task"], result["n_cases"]) == ("phantom", "prostate-dicom", 1)
    assert result["started_at"]
    assert result["elapsed_s"] >= 0


def test_unknown_phantom_ends_with_2_and_three_lines(tmp_path: Path) -> None:
    answer = runner.invoke(app, ["phantom", "instruments", str(tmp_path / "out")])
    assert answer.exit_code == 2
    lines = answer.stderr.strip().splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "where", "fix"]
    assert "prostate, prostate-dicom" in lines[1]


def test_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    answer = runner.invoke(app, ["phantom", "prostate", str(tmp_path), "--cases", "1"])
    assert answer.exit_code == 2
    assert "--overwrite" in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
