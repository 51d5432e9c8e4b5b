import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.services.info import info, read_safetensors_header
from medssl_cli.services.lookup import find_model


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "a"
    (run / "export").mkdir(parents=True)
    (run / "checkpoints" / "step_0000010").mkdir(parents=True)
    save_file({"cls_token": np.zeros((1, 1, 8), np.float32)}, run / "export" / "teacher_backbone.safetensors")
    (run / "export" / "teacher_backbone.json").write_text('{"arch": "vit_tiny"}')
    (run / "run.json").write_text(json.dumps({"status": "finished", "step": 10, "device": "cpu"}))
    return run


def test_a_run_is_described(run_folder: Path) -> None:
    facts = info(run_folder).facts
    assert facts["status"] == "finished"
    assert facts["checkpoints"] == ["step_0000010"]
    assert facts["export"]["parameters"] == 8
    assert facts["export"]["card"] == {"arch": "vit_tiny"}
    assert "status:" in info(run_folder).summary()


def test_truncated_weights_are_refused(run_folder: Path) -> None:
    weights = run_folder / "export" / "teacher_backbone.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_header(weights)
    assert caught.value.exit_code == 7
    assert "bytes instead of" in caught.value.where


def test_model_lookup_order(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_folder.parents[1])
    monkeypatch.delenv("MEDSSL_MODEL", raising=False)
    assert find_model(None).why == "newest finished run under ./runs"
    other = run_folder.parent / "b"
    (other / "export").mkdir(parents=True)
    (other / "run.json").write_text('{"status": "running"}')
    (other / "export" / "teacher_backbone.safetensors").write_bytes(b"x")
    found = find_model(None)
    assert found.run is not None
    assert found.run.name == "a"
    monkeypatch.setenv("MEDSSL_MODEL", str(run_folder))
    assert find_model(None).why == "MEDSSL_MODEL"
    assert find_model(run_folder).why == "given"


def test_no_model_names_the_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDSSL_MODEL", raising=False)
    with pytest.raises(ConfigError) as caught:
        find_model(None)
    for way in ("--model", "MEDSSL_MODEL", "medssl pretrain"):
        assert way in caught.value.fix


def test_info_does_not_load_torch(run_folder: Path) -> None:
    script = (
        "import sys; from medssl_cli.services.info import info; from pathlib import Path;"
        f"info(Path({str(run_folder)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONWARNINGS": "error"})
