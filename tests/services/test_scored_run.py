"""Runs that use labels: scores on the way, the best teacher, a classification loss; and runs on pictures and tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medssl_cli.core.volume import Volume
from medssl_cli.data.images import write_volume
from medssl_cli.engine.telemetry import read_metrics

Run = Callable[..., Any]
SCORED = (
    "evaluation.eval_period_iterations=4",
    "evaluation.target=label",
    "evaluation.c_values=3",
    "evaluation.knn_k=3",
)


@pytest.fixture
def tiny(medssl: Run, tiny_recipe: Path, labelled_tree: Path, prepared_cache: Path, tmp_path: Path) -> Run:
    """`medssl pretrain` of eight steps on sixteen labelled phantoms into `tmp_path/NAME`; later words win."""

    def run(name: str, *words: object) -> Any:
        options = ("--config", tiny_recipe, "--data", labelled_tree, "--cache", prepared_cache, "--device", "cpu")
        return medssl("pretrain", *options, "--out", tmp_path / name, *words)

    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export/teacher_backbone.safetensors")


@pytest.mark.slow
def test_p33_scores_change_no_number_of_the_run(tiny: Run, tmp_path: Path) -> None:
    assert tiny("plain").exit_code == 0
    answer = tiny("scored", *SCORED)
    assert answer.exit_code == 0, answer.stderr
    plain, scored = weights(tmp_path / "plain"), weights(tmp_path / "scored")
    assert all(torch.equal(plain[name], scored[name]) for name in plain)
    history = [json.loads(line) for line in (tmp_path / "scored/eval/history.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in history] == [0, 4, 8]
    for path in ("eval/step_0000004/results.json", "eval/best/results.json", "eval/final/results.json", "run.html"):
        assert (tmp_path / "scored" / path).is_file()
    assert (tmp_path / "scored/checkpoints/step_0000004").is_dir(), "a checkpoint for each score"
    best = json.loads((tmp_path / "scored/eval/best/results.json").read_text())["step"]
    kept = load_file(tmp_path / "scored/eval/best/teacher_checkpoint.safetensors")
    then = load_file(tmp_path / f"scored/checkpoints/step_{best:07d}/model.safetensors")
    assert all(torch.equal(kept[name], then[f"teacher.backbone.{name}"]) for name in kept)


@pytest.mark.slow
def test_a_scored_run_is_taken_up_with_its_scores(tiny: Run, tmp_path: Path) -> None:
    """Half a run, then the rest with other settings of the evaluation, which may change."""
    assert tiny("run", *SCORED, "optim.epochs=1").exit_code == 0
    answer = tiny("run", *SCORED, "evaluation.knn_k=5")
    assert answer.exit_code == 0, answer.stderr
    history = [json.loads(line) for line in (tmp_path / "run/eval/history.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in history] == [0, 4, 8]


@pytest.mark.slow
def test_p42_a_classification_loss_learns_its_head_and_resumes(tiny: Run, tmp_path: Path) -> None:
    words = ("semi_supervised.loss_weight=0.5", "semi_supervised.target=label")
    answer = tiny("run", *words, "train.checkpoint_period_iterations=4")
    assert answer.exit_code == 0, answer.stderr
    rows = read_metrics(tmp_path / "run/training_metrics.jsonl")
    assert all(row["semi_supervised_loss"] > 0 and row["grad_norm_class_head"] > 0 for row in rows)
    saved = load_file(tmp_path / "run/checkpoints/step_0000008/model.safetensors")
    assert float(saved["class_head.linear.weight"].abs().max()) > 0
    before = weights(tmp_path / "run")
    assert not any("class" in name for name in before), "the export is the backbone alone"
    (tmp_path / "run/run.json").unlink()
    for path in (tmp_path / "run/checkpoints/step_0000008").iterdir():
        path.unlink()
    (tmp_path / "run/checkpoints/step_0000008").rmdir()
    assert tiny("run", *words, "train.checkpoint_period_iterations=4").exit_code == 0
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_p42_labels_that_changed_under_their_name_are_refused(tiny: Run, tmp_path: Path, labelled_tree: Path) -> None:
    table = tmp_path / "labels.csv"
    lines = (labelled_tree / "labels.csv").read_text().splitlines()
    place = lines[0].split(",").index("label")
    table.write_text("\n".join(lines) + "\n")
    words = ("semi_supervised.loss_weight=0.5", "semi_supervised.target=label", f"semi_supervised.labels={table}")
    first = tiny("run", *words, "optim.epochs=1")
    assert first.exit_code == 0, first.stderr
    assert "semi_supervised: labels are the column label" in first.stderr
    assert "evaluation" not in first.stderr.lower()
    rows = [line.split(",") for line in lines[1:]]
    swapped = [[*row[:place], str(1 - int(row[place])), *row[place + 1 :]] for row in rows]
    table.write_text("\n".join([lines[0], *map(",".join, swapped)]) + "\n")
    again = tiny("run", *words)
    assert again.exit_code == 2
    assert "labels differ" in again.stderr
    assert "--allow-config-change semi_supervised.labels" in again.stderr
    allowed = tiny("run", *words, "--allow-config-change", "semi_supervised.labels")
    assert allowed.exit_code == 0, allowed.stderr


def test_labels_that_are_not_there_are_named(tiny: Run) -> None:
    answer = tiny("run", "semi_supervised.loss_weight=0.5", "semi_supervised.target=stage")
    assert answer.exit_code == 3
    assert "stage" in answer.stderr
    assert "fix:" in answer.stderr


@pytest.mark.parametrize("dry", [True, False])
def test_faults_of_the_scores_show_before_anything_is_prepared(
    tiny: Run, tmp_path: Path, dry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("images were prepared first")

    monkeypatch.setattr("medssl_cli.services.pretrain.prepare_store", refuse)
    monkeypatch.setattr("medssl_cli.services.pretrain_trial.prepare_store", refuse)
    words = (*SCORED, "evaluation.target=stage", *(("--dry-run",) if dry else ()))
    answer = tiny("run", *words)
    assert answer.exit_code == 3, answer.stderr
    assert "stage" in answer.stderr
    assert not (tmp_path / "run").exists()


PICTURES = (
    *(
        "student.arch=vit_tiny",
        "student.depth=1",
        "student.embed_dim=32",
        "student.num_heads=2",
        "student.patch_size=8",
    ),
    *("train.img_size=16", "crops.global_crops_size=16", "dino.head_n_prototypes=16", "dino.head_hidden_dim=16"),
    *(
        "dino.head_bottleneck_dim=8",
        "ibot.head_n_prototypes=16",
        "ibot.head_hidden_dim=16",
        "ibot.head_bottleneck_dim=8",
    ),
    *("train.batch_size_per_gpu=4", "optim.epochs=2", "optim.warmup_epochs=1", "train.num_workers=0"),
    *("train.saveckp_freq=1", "optim.freeze_last_layer_epochs=0"),
)


def test_v02_a_visionfm_recipe_reads_the_folder_of_its_modality(medssl: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        size = (20 + number, 30, 3)
        path = tmp_path / f"data/Silt-Lamp/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(path)
    (tmp_path / "data/Fundus").mkdir()
    Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "data/Fundus/x.png")
    words = ("--config", "visionfm_slitlamp", "--data", tmp_path / "data", "--cache", tmp_path / "cache")
    answer = medssl("pretrain", *words, "--out", tmp_path / "run", "--device", "cpu", *PICTURES)
    assert answer.exit_code == 0, answer.stderr
    card = json.loads((tmp_path / "run/export/teacher_backbone.json").read_text())
    assert card["modality"] == "slitlamp"
    assert card["mean"] == pytest.approx([0.5556667, 0.40288574, 0.38857886])
    assert json.loads((tmp_path / "run/run.json").read_text())["n_cases"] == 6
    rows = read_metrics(tmp_path / "run/training_metrics.jsonl")
    assert {"dino_global_crops_loss", "ibot_loss"} <= rows[-1].keys()
    assert "koleo_loss" not in rows[-1]


def test_w15_the_preset_has_the_temperatures_of_the_published_run(medssl: Run, tmp_path: Path) -> None:
    from medssl_cli.services.pretrain_request import PretrainRequest, resolve_config

    ours, theirs = (resolve_config(PretrainRequest(config="visionfm_oct", preset=name)) for name in (None, "visionfm"))
    assert (ours.teacher.warmup_teacher_temp, ours.teacher.teacher_temp) == (0.04, 0.07)
    assert (theirs.teacher.warmup_teacher_temp, theirs.teacher.teacher_temp) == (0.07, 0.04)
    answer = medssl("pretrain", "--config", "visionfm_oct", "--preset", "dino", "--data", tmp_path)
    assert answer.exit_code == 2
    assert "visionfm" in answer.stderr


def test_a_table_of_ct_volumes_trains_a_rotary_network_on_windows(medssl: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = ["patient_id,nifti_path"]
    for number in range(4):
        voxels = rng.integers(-1000, 1000, (4, 24 + 4 * number, 24)).astype(np.int16)
        write_volume(tmp_path / f"ct/{number}.nii.gz", Volume(voxels, np.diag([1.0, 1.0, 3.0, 1.0])))
        rows.append(f"p{number},ct/{number}.nii.gz")
    (tmp_path / "series.csv").write_text("\n".join(rows) + "\n")
    words = ("--config", "meddinov3_vitb16_ct", "--data", tmp_path / "series.csv", "--cache", tmp_path / "cache")
    windows = ("data.windows_hu={soft: [-160, 240], bone: [-800, 2000]}", "data.preprocess.window_hu=null")
    small = (
        "student.arch=meddinov3_vitb16",
        "data.spatial_size=24",
        "crops.local_crops_number=0",
        "train.OFFICIAL_EPOCH_LENGTH=2",
    )
    answer = medssl("pretrain", *words, "--out", tmp_path / "run", "--device", "cpu", *PICTURES, *small, *windows)
    assert answer.exit_code == 0, answer.stderr
    card = json.loads((tmp_path / "run/export/teacher_backbone.json").read_text())
    assert card["windows_hu"] == [["soft", -160, 240], ["bone", -800, 2000]]
    assert card["arch"]["pos_embed_type"] == "rope"
    assert card["arch"]["in_chans"] == 2
    answer = medssl("infer", tmp_path / "ct/1.nii.gz", "--model", tmp_path / "run", "--out", tmp_path / "out")
    assert answer.exit_code == 0, answer.stderr
