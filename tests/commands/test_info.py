from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medssl_cli.core.run import locked

Medssl = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Path:
    return write_run(tmp_path_factory.mktemp("model") / "runs" / "tiny")


def test_a_run(medssl: Medssl, run: Path) -> None:
    answer = medssl("info", run)
    assert answer.exit_code == 0, answer.stderr
    lines = dict(line.split(":", 1) for line in answer.stdout.splitlines() if line[0] != " ")
    assert lines["kind"].strip() == "run"
    assert lines["status"].strip() == "finished"
    told = json.loads(medssl("info", run, "--json").stdout)
    assert {"schema_version", "medssl_version", "command", "started_at", "elapsed_s"} <= set(told)
    assert told["command"] == "info"
    assert told["export"]["card"]["sequences"] == ["ax_t2wi", "ax_adc", "ax_dwi"]
    assert told["export"]["card"]["sha256"]


def test_a_weight_file(medssl: Medssl, run: Path) -> None:
    weights = run / "export" / "teacher_backbone.safetensors"
    answer = medssl("info", weights)
    assert answer.exit_code == 0
    assert "parameters:" in answer.stdout
    told = json.loads(medssl("info", weights, "--json").stdout)
    assert (told["kind"], told["bytes"]) == ("weights", weights.stat().st_size)
    assert told["parameters"] == told["card"]["n_parameters"]
    assert told["dtypes"] == ["F32"]


def test_nothing_named_is_the_newest_run(medssl: Medssl, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDSSL_MODEL", raising=False)
    monkeypatch.chdir(run.parents[1])
    assert json.loads(medssl("info", "--json").stdout)["path"].endswith("runs/tiny")
    monkeypatch.chdir(run)
    answer = medssl("info")
    assert answer.exit_code == 2
    assert "MEDSSL_MODEL" in answer.stderr


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"\x80\x04K\x01.", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"]
)
def test_r08_foreign_files_are_refused_with_7(medssl: Medssl, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    answer = medssl("info", tmp_path / "w.safetensors")
    assert answer.exit_code == 7
    assert answer.stdout == ""
    for word in ("error: This is not a safetensors file.", "where:", "fix:"):
        assert word in answer.stderr
    assert not re.search(r"\d{9}|convert weights", answer.stderr.replace(str(tmp_path), ""))


def test_a_killed_run_is_told_as_interrupted(medssl: Medssl, run: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    (killed / "checkpoints/step_0000010").mkdir(parents=True)
    record = json.loads((run / "run.json").read_text()) | {"status": "running"}
    (killed / "run.json").write_text(json.dumps(record))
    word = "interrupted at step 10; the same command resumes"
    assert json.loads(medssl("info", killed, "--json").stdout)["status"] == word
    assert not (killed / ".lock").exists()
    with locked(killed, "run"):
        assert json.loads(medssl("info", killed, "--json").stdout)["status"] == "running"
    assert json.loads(medssl("info", killed, "--json").stdout)["status"] == word
    (killed / "checkpoints/step_0000010").rmdir()
    assert "before its first checkpoint" in medssl("info", killed).stdout


def test_what_is_no_run_is_refused_with_7(medssl: Medssl, tmp_path: Path) -> None:
    assert medssl("info", tmp_path / "none").exit_code == 2
    answer = medssl("info", tmp_path)
    assert answer.exit_code == 7
    assert "run.json" in answer.stderr
    for text in ("[]", "not JSON", '{"status": 3}'):
        (tmp_path / "run.json").write_text(text)
        answer = medssl("info", tmp_path, "--json")
        assert answer.exit_code in (0, 7), answer.exception
        assert (answer.exit_code == 0) == (text == '{"status": 3}')


def test_a_damaged_card_is_told(medssl: Medssl, run: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes((run / "export" / "teacher_backbone.safetensors").read_bytes())
    for text in (b"{", b"\xff\xfe", b"[1]"):
        weights.with_suffix(".json").write_bytes(text)
        answer = medssl("info", weights)
        assert answer.exit_code == 7
        assert "w.json" in answer.stderr


def test_torch_is_not_loaded(run: Path) -> None:
    script = (
        f"import sys; sys.argv = ['medssl', 'info', {str(run)!r}]\nfrom medssl_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'safetensors', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
