"""medssl segment as typed: what it prints, which files it leaves, which exit codes come back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Medssl = Callable[..., Any]


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training, two validation and two test slices of 16 x 16 pixels; not to be changed."""
    root = tmp_path_factory.mktemp("discs") / "split"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    for patient, (part, count) in enumerate({"train": 6, "val": 2, "test": 2}.items()):
        for number in range(count):
            mask = (y - rng.integers(4, 12)) ** 2 + (x - rng.integers(4, 12)) ** 2 <= 9
            for kind, picture in {
                "CT": rng.integers(0, 255, mask.shape),
                "PET": 60 + 150 * mask,
                "masks": 255 * mask,
            }.items():
                path = root / part / kind / f"patient_{patient}_slice_{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.astype(np.uint8)).save(path)
    return root


def words(data: Path, out: Path, *more: object) -> list[object]:
    return [
        *("segment", "--task", "ct-pet", "--data", data, "--out", out, "--device", "cpu", "--epochs", 2, "--bs", 3),
        *("--workers", 0, *more),
    ]


@pytest.fixture(scope="module")
def run(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of two epochs and what it printed; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "cocoseg"
    answer = program(words(discs, out, "--vgg-weights", "random", "save_freq=1"))
    assert answer.returncode == 0, answer.stderr
    return out, answer.stdout


def program(line: list[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "medssl_cli", *map(str, line)], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_run_leaves_the_files_of_the_contract(run: tuple[Path, str], discs: Path) -> None:
    out, printed = run
    for name in (
        "best.safetensors",
        "model.json",
        "history.json",
        "progress.png",
        "config.yaml",
        "run.json",
        "log.txt",
    ):
        assert (out / name).is_file(), name
    for name in ("last", "tb", "val_overlays"):
        assert any((out / name).iterdir()), name
    assert (out / "checkpoints" / "epoch_0002.safetensors").is_file()
    assert "best:     epoch" in printed
    assert f"next:     medssl eval --model {out} --data {discs} --split test --out eval" in printed
    log = (out / "log.txt").read_text()
    for line in ("train: 6 slices of 1 patient, 6 with lesion", "test:  2 slices of 1 patient, never opened"):
        assert line in log
    assert "trainable 8,741,764, frozen 4,648,832" in log


def test_the_card_tells_of_the_vgg_weights_and_the_parameters(run: tuple[Path, str]) -> None:
    card = json.loads((run[0] / "model.json").read_text())
    assert card["vgg_weights"] == "random"
    assert card["n_parameters"] == {"total": 13_390_596, "trainable": 8_741_764, "frozen": 4_648_832}
    assert 0.2 <= card["threshold"] <= 0.6
    assert [row["threshold"] for row in card["threshold_results"]][::8] == [0.2, 0.6]
    assert card["network"]["settings"]["fusion"] == "4way"


def test_the_same_command_again_has_nothing_to_do(run: tuple[Path, str], discs: Path, medssl: Medssl) -> None:
    before = (run[0] / "best.safetensors").stat().st_mtime_ns
    answer = medssl(*words(discs, run[0], "--vgg-weights", "random", "save_freq=1", "--json"))
    assert answer.exit_code == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert (found["command"], found["epochs_now"]) == ("segment", 0)
    assert (run[0] / "best.safetensors").stat().st_mtime_ns == before


def test_another_network_is_refused_on_resume(run: tuple[Path, str], discs: Path, medssl: Medssl) -> None:
    answer = medssl(*words(discs, run[0], "fusion=2way", "save_freq=1"))
    assert answer.exit_code == 2
    assert 'fusion: "4way" -> "2way"' in answer.stderr
    assert (run[0] / "best.safetensors").is_file()


def test_the_model_is_found_by_info(run: tuple[Path, str], medssl: Medssl) -> None:
    answer = medssl("info", run[0], "--json")
    assert answer.exit_code == 0, answer.stderr


def test_c19_flags_files_and_unknown_keys(discs: Path, tmp_path: Path, medssl: Medssl) -> None:
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps({"lr": 1e-4, "epoch": 1, "fusion": "2way", "_comment": "mine"}))
    line = ["segment", "--task", "ct-pet", "--config", preset, "--data", discs, "--device", "cpu", "--workers", 0]
    answer = medssl(*line, "--out", tmp_path / "run", "--lr", "1e-3")
    assert answer.exit_code == 0, answer.stderr
    assert "lr: 0.001" in (tmp_path / "run" / "config.yaml").read_text()
    assert json.loads((tmp_path / "run" / "history.json").read_text())["lr"] == [1e-3]
    answer = medssl(*line, "--out", tmp_path / "other", "los_type=dice")
    assert answer.exit_code == 2
    assert "los_type: unknown key; did you mean loss_type?" in answer.stderr
    assert not (tmp_path / "other").exists()


def test_a_dry_run_and_a_smoke_test_write_nothing(discs: Path, tmp_path: Path, medssl: Medssl) -> None:
    answer = medssl(*words(discs, tmp_path / "run", "fusion=2way", "--dry-run"))
    assert answer.exit_code == 0, answer.stderr
    assert "images/s" in answer.stdout
    assert "parameters: " in answer.stdout
    answer = medssl(*words(discs, tmp_path / "run", "fusion=2way", "--smoke"))
    assert answer.exit_code == 0, answer.stderr
    assert [line.split("=")[0] for line in answer.stdout.splitlines()[:5]] == [f"[step {n}] loss" for n in range(5)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (["--task", "instances"], 2, "cannot be segmented yet"),
        (["--task", "ctpet"], 2, "choose one of: semantic, ct-pet"),
        (["--task", "ct-pet", "--model", "x"], 2, "--model has no effect with --task ct-pet"),
        (["--task", "semantic", "--vgg-weights", "x"], 2, "--vgg-weights has no effect with --task semantic"),
        (["--task", "ct-pet", "--smoke", "--dry-run"], 2, "--smoke and --dry-run exclude each other"),
        (["--task", "ct-pet", "--resume-ckpt", "x", "--no-resume"], 2, "exclude each other"),
        (["--task", "ct-pet"], 2, "pass --data ROOT"),
        (["--task", "ct-pet", "--data", "none", "--vgg-weights", "random"], 3, "The data set is no folder"),
        (["--task", "ct-pet", "--config", "cocosek"], 2, "did you mean cocoseg"),
        ([], 2, "--task semantic or --task ct-pet"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    line: list[str], code: int, told: str, tmp_path: Path, medssl: Medssl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = medssl("segment", *line, "--device", "cpu")
    assert answer.exit_code == code, answer.stderr
    assert told in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused(discs: Path, tmp_path: Path, medssl: Medssl) -> None:
    (tmp_path / "note.txt").write_text("mine")
    answer = medssl(*words(discs, tmp_path, "fusion=2way"))
    assert answer.exit_code == 2
    assert "--overwrite" in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_missing_checkpoint_ends_with_7(discs: Path, tmp_path: Path, medssl: Medssl) -> None:
    answer = medssl(*words(discs, tmp_path / "run", "fusion=2way", "--resume_ckpt", tmp_path / "latest.pth"))
    assert answer.exit_code == 7
    assert "latest.pth: it does not exist" in answer.stderr


def test_the_recipes_are_listed(medssl: Medssl) -> None:
    answer = medssl("segment", "--list-configs")
    assert answer.exit_code == 0
    for name in ("cocoseg", "cocoseg_large_batch", "cocoseg_focal"):
        assert f"\n{name} " in f"\n{answer.stdout}"


@pytest.mark.slow
def test_c17_sigterm_ends_with_75_and_the_same_command_goes_on(discs: Path, tmp_path: Path) -> None:
    line = [*words(discs, tmp_path / "run", "fusion=2way", "log_every=1"), "--epochs", 4]
    metrics = tmp_path / "run" / "training_metrics.jsonl"
    with subprocess.Popen([sys.executable, "-m", "medssl_cli", *map(str, line)], stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    answer = program(line)
    assert answer.returncode == 0, answer.stderr
    straight = program([*words(discs, tmp_path / "straight", "fusion=2way", "log_every=1"), "--epochs", 4])
    assert straight.returncode == 0, straight.stderr
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("run", "straight"))
    assert one["train_loss"] == two["train_loss"]
    assert one["val_best_dice"] == two["val_best_dice"]
    files = [(tmp_path / name / "best.safetensors").read_bytes() for name in ("run", "straight")]
    assert files[0] == files[1]


def test_a_dry_run_of_fewer_slices_than_a_batch_measures_what_there_is(
    discs: Path, tmp_path: Path, medssl: Medssl
) -> None:
    answer = medssl(*words(discs, tmp_path / "run", "fusion=2way", "bs=64", "--dry-run"))
    assert answer.exit_code == 0, answer.stderr
    assert list(tmp_path.iterdir()) == []
