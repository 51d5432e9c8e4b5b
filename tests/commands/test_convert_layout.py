"""medssl convert layout as it is typed, and the commands that read what it writes, without any option of layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medssl_cli.core.volume import Volume
from medssl_cli.data.images import write_volume

Command = Callable[..., Any]
TINY = ("data.tile=32", "data.val_ratio=0.5", "decoder.base=8", "optim.epochs=1", "optim.batch_size=2")


def picture(path: Path, seed: int, bright: bool = False, side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 100, (side, side)).astype(np.uint8)
    Image.fromarray(array + 120 * bright).save(path)


def square(path: Path, values: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((32, 32), np.uint8)
    for value in range(1, values + 1):
        array[8 * value : 8 * value + 8, 8:24] = value
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def backbone(write_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of plain pictures."""
    return write_run(tmp_path_factory.mktemp("runs") / "pictures", None)


@pytest.fixture
def pclt(tmp_path: Path) -> Path:
    root = tmp_path / "PCLT20K"
    for patient in range(1, 7):
        for n in (1, 2):
            for kind in ("CT", "PET"):
                picture(root / f"{patient:04d}/{patient:04d}_{n:03d}_{kind}.png", 10 * patient + n)
            square(root / f"{patient:04d}/{patient:04d}_{n:03d}_mask.png")
    return root


def test_convert_and_convert_again(pclt: Path, tmp_path: Path, medssl: Command) -> None:
    out = tmp_path / "out"
    answer = medssl("convert", "layout", pclt, out, "--source", "pclt20k")
    assert answer.exit_code == 0
    assert answer.stdout.splitlines()[0] == "pclt20k -> CT-PET tree: 12 slices of 6 patients"
    assert f"next: medssl split {out} --out SPLIT" in answer.stdout
    answer = medssl("convert", "layout", pclt, out, "--source", "pclt20k")
    assert "0 files linked, 36 were up to date" in answer.stdout
    report = json.loads((out / "convert_report.json").read_text())
    assert (report["command"], report["n_up_to_date"], report["schema_version"]) == ("convert layout", 36, 1)


def test_json_is_alone_on_stdout_and_an_error_has_three_lines(pclt: Path, tmp_path: Path, medssl: Command) -> None:
    (pclt / "0002/0002_001_PET.png").unlink()
    answer = medssl("convert", "layout", pclt, tmp_path / "out", "--source", "pclt20k", "--json")
    assert answer.exit_code == 3
    document = json.loads(answer.stdout)
    assert document["stopped"]
    assert document["failures"][0]["path"] == "0002/0002_001_PET.png"
    lines = answer.stderr.splitlines()
    assert lines[0] == "error: 1 case cannot be converted; nothing was written."
    assert lines[1] == "  where: 0002/0002_001_PET.png: missing (there is CT and mask)"
    assert lines[2].startswith("  fix:   ")
    assert not (tmp_path / "out").exists()
    answer = medssl("convert", "layout", pclt, tmp_path / "out", "--source", "pclt20k", "--on-error", "skip")
    assert (answer.exit_code, (tmp_path / "out/failures.csv").is_file()) == (4, True)


@pytest.mark.parametrize("words", [("--source", "brats"), ("--source", "vfm", "--files", "move"), ()])
def test_usage_errors_exit_2(pclt: Path, tmp_path: Path, medssl: Command, words: tuple[str, ...]) -> None:
    assert medssl("convert", "layout", pclt, tmp_path / "out", *words).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_ct_pet_tree_is_split_and_checked(pclt: Path, tmp_path: Path, medssl: Command) -> None:
    out = tmp_path / "out"
    assert medssl("convert", "layout", pclt, out, "--source", "pclt20k").exit_code == 0
    assert medssl("check-data", out, "--task", "ct-pet", "--out", tmp_path / "check").exit_code == 0
    answer = medssl("split", out, "--out", tmp_path / "split")
    assert answer.exit_code == 0, answer.stderr
    assert (tmp_path / "split/train/CT").is_dir()


def test_a_tree_of_cases_is_trained_on(tmp_path: Path, medssl: Command, backbone: Path, prepared_cache: Path) -> None:
    root = tmp_path / "Task09_Spleen"
    names = [f"spleen_{n}" for n in range(4)]
    for n, name in enumerate([*names, "spleen_9"]):
        rng = np.random.default_rng(n)
        label = np.zeros((4, 32, 32), np.uint8)
        label[1:3, 8:20, 8:20] = 1
        image = (rng.integers(0, 200, label.shape) + 600 * label.astype(int)).astype(np.int16)
        grid = np.diag([1.0, 1, 3, 1])
        write_volume(root / f"images{'Ts' if n == 4 else 'Tr'}/{name}.nii.gz", Volume(image, grid))
        if n < 4:
            write_volume(root / f"labelsTr/{name}.nii.gz", Volume(label, grid))
    (root / "dataset.json").write_text(
        json.dumps(
            {
                "name": "Spleen",
                "modality": {"0": "CT"},
                "labels": {"0": "background", "1": "spleen"},
                "training": [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in names],
                "test": ["imagesTs/spleen_9.nii.gz"],
            }
        )
    )
    out = tmp_path / "out"
    answer = medssl("convert", "layout", root, out, "--source", "decathlon")
    (step,) = [line for line in answer.stdout.splitlines() if line.startswith("next: ")]
    assert step.endswith("data.label=label data.mri_sequences=ct")
    words = step.replace("RUN", str(tmp_path / "run")).split()[2:]
    tiny = ("--model", backbone, "--device", "cpu", "--cache", prepared_cache)
    answer = medssl(*words, *tiny, *TINY, "--dry-run", "--workers", 0)
    assert answer.exit_code == 0, answer.stderr
    assert "1 spleen" in answer.stdout
    answer = medssl("check-data", out, "--task", "segment", "--sequences", "ct", "--label", "label", "--split-csv",
                    out / "train.csv", "--out", tmp_path / "check")  # fmt: skip
    assert answer.exit_code == 0, answer.stdout


def test_pictures_with_label_maps_are_trained_on(tmp_path: Path, medssl: Command, backbone: Path) -> None:
    root = tmp_path / "Vessels"
    for part, count in (("training", 4), ("test", 1)):
        for n in range(count):
            picture(root / f"A/{part}/images/{n}.png", n)
            square(root / f"A/{part}/labels/{n}.png", values=2)
    out = tmp_path / "out"
    assert medssl("convert", "layout", root, out, "--source", "vfm").exit_code == 0
    answer = medssl("segment", "--task", "semantic", "--data", out, "--out", tmp_path / "run", "--model", backbone,
                    "--device", "cpu", "--dry-run", "--workers", 0, *TINY)  # fmt: skip
    assert answer.exit_code == 0, answer.stderr
    assert "1 test case left alone" in answer.stdout


@pytest.mark.parametrize("kind", ["imagenet", "vfm"])
def test_classes_are_extracted_and_trained_on(
    tmp_path: Path, medssl: Command, backbone: Path, prepared_cache: Path, kind: str
) -> None:
    root, out = tmp_path / "src", tmp_path / "out"
    for part, count in (("train", 12), ("test", 4)):
        lines = []
        for n in range(count):
            name = f"{('dark', 'light')[n % 2]}/P{n}.png" if kind == "imagenet" else f"P{n}.png"
            folder = part if kind == "imagenet" else part.replace("train", "training")
            picture(root / folder / name, 100 * len(part) + n, bright=n % 2 == 1)
            lines.append(f"{folder}/{name};{n % 2}")
        if kind == "vfm":
            (root / f"{folder}_labels.txt").write_text("\n".join(lines))
    assert medssl("convert", "layout", root, out, "--source", kind).exit_code == 0
    common = ("--model", backbone, "--device", "cpu", "--cache", prepared_cache)
    answer = medssl("extract", out, "--target", "label", "--out", tmp_path / "features", *common)
    assert answer.exit_code == 0, answer.stderr
    labels = np.load(tmp_path / "features/features/train_labels.npy")
    assert labels.shape == (12, 1)
    assert labels.sum() == 6
    assert (tmp_path / "features/features/test_embeddings.npy").is_file()
    answer = medssl("train-head", out, "--task", "binary", "--target", "label", "--out", tmp_path / "head", *common)
    assert answer.exit_code == 0, answer.stderr
    answer = medssl("split", out, "--labels", out / "labels.csv", "--stratify", "label", "--out", tmp_path / "split")
    assert answer.exit_code == 0, answer.stderr
    summary = json.loads((tmp_path / "split/split_summary.json").read_text())
    assert summary["n_items"] == 16


def test_modalities_are_read_by_pretraining(tmp_path: Path, medssl: Command) -> None:
    for n in range(4):
        picture(tmp_path / f"src/Silt-Lamp/{n}.png", n)
    out = tmp_path / "out"
    answer = medssl("convert", "layout", tmp_path / "src", out, "--source", "vfm")
    assert "medssl pretrain --config visionfm_slitlamp" in answer.stdout
    assert medssl("check-data", out, "--task", "images", "--out", tmp_path / "check").exit_code == 0


def test_conversion_never_loads_torch(pclt: Path, tmp_path: Path) -> None:
    words = ["convert", "layout", str(pclt), str(tmp_path / "out"), "--source", "pclt20k"]
    script = (
        f"import sys\nsys.argv = ['medssl', *{words!r}]\nfrom medssl_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)
    shutil.rmtree(tmp_path / "out")
