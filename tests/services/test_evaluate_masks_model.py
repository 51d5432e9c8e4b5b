"""A segmentation network on labelled cases: which cases, which threshold, and the numbers of its files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from segment_parts import write_discs
from torch import nn

from medssl_cli.core.errors import CheckpointError, ConfigError, DataError
from medssl_cli.core.run import write_csv
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import read_volume, write_image, write_volume
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.metrics.segmentation import counts, dice
from medssl_cli.models.dense_decoder import DecoderConfig, DenseNetwork
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.objectives.segmentation import SegmentationLoss, SegmentationLossConfig
from medssl_cli.objectives.supervised import SupervisedSegmentation
from medssl_cli.services import evaluate_masks_model
from medssl_cli.services.evaluate import EvaluateRequest, evaluate
from medssl_cli.services.segmenter import Segmenter, network_facts, write_model

Medssl = Callable[..., Any]


def write_run(run: Path, seen: Sequence[tuple[str, str, str]] = (), **card: Any) -> Path:
    """A finished run of a small network with random weights, of one sequence."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        settings: dict[str, Any] = {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8, "img_size": 32}
        backbone = VisionTransformer(**settings, sequences=card.pop("of", ("t2",)))
        network = DenseNetwork(backbone, 1, DecoderConfig(base=8))
        for parameter in network.decoder.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    facts = {
        "command": "segment",
        "task": "semantic",
        "kind": "volumes",
        "classes": ["background", "lesion"],
        "outputs": 1,
        "network": network_facts(network),
        "sequences": ["t2"],
        "channels": 1,
        "preprocess": PreprocessConfig().model_dump(mode="json"),
        "mean": 0.45,
        "std": 0.22,
        "tile": 32,
        "threshold": 0.3,
        "label_values": {"0": "background", "1": "lesion"},
        "config": {"data": {"label": "roi"}},
    }
    run.mkdir(parents=True)
    objective = SupervisedSegmentation(network, SegmentationLoss(SegmentationLossConfig(), 1), ema_decay=0.0)
    write_model(run, objective.weights(), {**facts, **card})
    (run / "run.json").write_text(json.dumps({"status": "finished"}), encoding="utf-8")
    write_csv(run / "cases.csv", ("part", "case_id", "patient_id"), seen)
    return run


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cases of two patients with an image and a label map on an oblique grid."""
    root = tmp_path_factory.mktemp("cases")
    affine = np.array([[-0.9, 0, 0, 20], [0, 0.9, -0.4, -31], [0, 0.1, 3.3, 8], [0, 0, 0, 1.0]])
    rng = np.random.default_rng(0)
    for number in range(4):
        folder = root / f"P{number}"
        folder.mkdir()
        write_volume(folder / "t2.nii.gz", Volume(rng.integers(0, 900, (4, 40, 48)).astype(np.int16), affine))
        roi = np.zeros((4, 40, 48), np.uint8)
        roi[1:3, 10:25, 12:30] = 1
        write_volume(folder / "roi.nii.gz", Volume(roi, affine))
    write_csv(root / "cases.csv", ("case_id", "patient_id"), [(f"P{n}", f"patient{n // 2}") for n in range(4)])
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", [("train", "old", "someone"), ("val", "P9", "patient9")])


def measured(out: Path, run: Path, data: Path, **options: Any) -> dict[str, Any]:
    settings = {"draws": 20, "device": "cpu", **options}
    evaluate(EvaluateRequest(out=out, model=run, data=data, **settings))
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evaluated(tree: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "eval"
    return out, measured(out, run, tree, save_predictions=True, lesions=True)


def test_c23_the_threshold_of_validation_is_used_and_told(
    tree: Path, run: Path, evaluated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, facts = evaluated
    assert (facts["threshold"], facts["threshold_source"]) == (0.3, "validation data of the training")
    other = measured(tmp_path / "out", run, tree, threshold=0.6)
    assert (other["threshold"], other["threshold_source"]) == (0.6, "--threshold")
    assert other["model"]["threshold_stored"] == 0.3
    voxels = [sum(row["tp"] + row["fp"] for row in found["per_image"]) for found in (facts, other)]
    assert voxels[0] > voxels[1], "a lower threshold predicts more"


def test_saved_label_maps_give_the_same_numbers_and_lie_on_the_grid_of_the_input(
    tree: Path, run: Path, evaluated: tuple[Path, dict[str, Any]], tmp_path: Path, medssl: Medssl
) -> None:
    out, facts = evaluated
    again = tmp_path / "again"
    request = EvaluateRequest(out=again, predictions=out / "predictions", reference=tree, label="roi", draws=20)
    evaluate(request)
    files = json.loads((again / "metrics.json").read_text(encoding="utf-8"))
    assert files["per_image"] == [{**row, "name": f"{row['case_id']}/roi.nii.gz"} for row in facts["per_image"]]
    assert files["metrics"] == facts["metrics"]
    source, found = nib.load(tree / "P1" / "t2.nii.gz"), nib.load(out / "predictions" / "P1_segmentation.nii.gz")
    assert found.shape == source.shape
    np.testing.assert_array_equal(found.affine, source.affine)
    inferred = medssl("infer", tree / "P1", "--model", run, "--device", "cpu", "--out", tmp_path / "inferred")
    assert inferred.exit_code == 0, inferred.stderr
    own = nib.load(tmp_path / "inferred" / "P1_segmentation.nii.gz")
    np.testing.assert_array_equal(np.asarray(own.dataobj), np.asarray(found.dataobj))


def test_patients_and_facts_of_the_model_are_told(evaluated: tuple[Path, dict[str, Any]]) -> None:
    out, facts = evaluated
    assert (facts["n"], facts["n_groups"], facts["data"]["split"]) == (4, 2, "all")
    assert facts["model"]["sha256"]
    assert facts["device"]
    assert facts["lesions"]["per_class"]["lesion"]["n_lesions"] == 4
    assert "data:image/jpeg" in (out / "report.html").read_text(encoding="utf-8")
    assert not list(out.parent.glob(".medssl-eval-*"))


def test_values_that_training_ignored_are_ignored(tree: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tree / "P0", data / "P0")
    path = data / "P0" / "roi.nii.gz"
    roi = read_volume(path)
    drawn = roi.array.copy()
    drawn[0] = 255
    write_volume(path, Volume(drawn, roi.affine))
    with pytest.raises(DataError, match="of no class"):
        measured(tmp_path / "strict", write_run(tmp_path / "none"), data)
    facts = measured(tmp_path / "out", write_run(tmp_path / "run", ignore_values=[255]), data)
    plain = measured(tmp_path / "plain", write_run(tmp_path / "again"), tree)
    (row,), other = facts["per_image"], plain["per_image"][0]
    assert row["tp"] + row["fn"] == other["tp"] + other["fn"]
    assert row["fp"] < other["fp"]  # those of the first slice count nowhere


def test_cases_that_the_network_has_seen_are_refused(tree: Path, tmp_path: Path) -> None:
    seen = write_run(tmp_path / "seen", [("train", "P0", "patient0"), ("val", "x", "patient1")])
    with pytest.raises(DataError) as caught:
        measured(tmp_path / "out", seen, tree)
    assert caught.value.code == "split_leak"
    for told in ("case P0 (train)", "patient patient0 (train), case P1", "patient patient1 (val), case P2"):
        assert told in caught.value.where
    facts = measured(tmp_path / "train", seen, tree, split="train")
    assert [row["case_id"] for row in facts["per_image"]] == ["P0"]
    assert facts["data"]["held_back"] is False
    assert any("trained on this part" in note for note in facts["notes"])
    (seen / "cases.csv").unlink()
    with pytest.raises(CheckpointError, match="network was trained on"):
        measured(tmp_path / "none", seen, tree)


def test_the_part_comes_from_the_lists(tree: Path, run: Path, tmp_path: Path) -> None:
    for name, ids in (("train", ["P0", "P1"]), ("val", ["P2"]), ("test", ["P3"])):
        write_csv(tmp_path / "splits" / f"{name}.csv", ("case_id",), [(name,) for name in ids])
    facts = measured(tmp_path / "out", run, tree, splits=tmp_path / "splits")
    assert ([row["case_id"] for row in facts["per_image"]], facts["data"]["split"]) == (["P3"], "test")
    listed = measured(tmp_path / "listed", run, tree, split_csv=tmp_path / "splits" / "train.csv")
    assert [row["case_id"] for row in listed["per_image"]] == ["P0", "P1"]
    every = measured(tmp_path / "every", run, tree, splits=tmp_path / "splits", split="all")
    assert every["n"] == 4


def test_a_label_map_off_the_grid_is_refused_or_listed(tree: Path, run: Path, tmp_path: Path) -> None:
    import shutil

    root = shutil.copytree(tree, tmp_path / "tree")
    affine = np.eye(4)
    write_volume(root / "P2" / "roi.nii.gz", Volume(np.zeros((4, 40, 48), np.uint8), affine))
    with pytest.raises(DataError):
        measured(tmp_path / "stop", run, root)
    result = evaluate(
        EvaluateRequest(out=tmp_path / "skip", model=run, data=root, draws=20, device="cpu", on_error="skip")
    )
    assert result.error is not None
    assert result.error.exit_code == 4
    with (tmp_path / "skip" / "failures.csv").open(encoding="utf-8", newline="") as file:
        assert [row["case_id"] for row in csv.DictReader(file)] == ["P2"]


def test_options_without_effect_are_refused(tree: Path, run: Path, tmp_path: Path) -> None:
    for options, told in (
        ({"target": ("a",)}, "--target"),
        ({"missing_sequences": True}, "--missing-sequences"),
        ({"classes": ("a",)}, "--classes"),
    ):
        with pytest.raises(ConfigError) as caught:
            measured(tmp_path / "out", run, tree, **options)
        assert told in caught.value.where
    with pytest.raises(ConfigError, match="lesion"):
        measured(tmp_path / "out", run, tree, overrides=("lesion_threshold=0.2",))
    assert not (tmp_path / "out").exists()


class BrightPet(nn.Module):
    """A network that looks at PET alone: bright is lesion."""

    def forward(self, images_BSHW: torch.Tensor, available_BS: torch.Tensor | None = None) -> torch.Tensor:
        return 40 * (images_BSHW[:, 1:] * 0.5 + 0.5 - 0.45)


@pytest.fixture
def ct_pet_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "cocoseg"
    run.mkdir()
    for name in ("model.json", "best.safetensors"):
        (run / name).write_text("{}", encoding="utf-8")
    write_csv(run / "cases.csv", ("part", "case_id", "patient_id"), [("train", "patient_000_slice_00.png", "000")])

    def opened(folder: Path, device: torch.device) -> Segmenter:
        card = {"kind": "images", "sha256": "0", "network": {"name": "cocoseg"}, "config": {"val_ratio": 0.2}}
        return Segmenter(
            folder, card, BrightPet().eval(), "ct-pet", ("background", "lesion"), 1, device, 0.3, ("CT", "PET"),
            PreprocessConfig(), 0.5, 0.5, 0, None, 0,
        )  # fmt: skip

    monkeypatch.setattr(evaluate_masks_model, "open_segmenter", opened)
    return run


def test_slices_of_ct_and_pet_are_measured_by_patient(ct_pet_run: Path, tmp_path: Path) -> None:
    data = write_discs(tmp_path / "data", {"train": 4, "val": 4, "test": 8}, seed=2)
    facts = measured(tmp_path / "out", ct_pet_run, data, save_predictions=True)
    assert (facts["n"], facts["n_groups"], facts["data"]["split"], facts["threshold"]) == (8, 2, "test", 0.3)
    assert facts["metrics"]["dice"]["value"] > 0.9
    row = facts["per_image"][0]
    name = row["name"]
    saved = np.asarray(Image.open(tmp_path / "out" / "predictions" / name))
    truth = np.asarray(Image.open(data / "test" / "masks" / name))
    assert set(np.unique(saved)) == {0, 255}
    assert row["dice"] == pytest.approx(float(dice(*counts(saved > 0, truth > 0)[:3])))
    with (tmp_path / "out" / "per_image.csv").open(encoding="utf-8", newline="") as file:
        assert [line["name"] for line in csv.DictReader(file)] == [row["name"] for row in facts["per_image"]]


def test_a_run_is_compared_with_masks_of_any_origin_over_the_same_slices(ct_pet_run: Path, tmp_path: Path) -> None:
    data = write_discs(tmp_path / "data", {"train": 4, "val": 4, "test": 8}, seed=2)
    for path in (data / "test" / "masks").iterdir():  # half of each lesion
        truth_HW = np.asarray(Image.open(path)).copy()
        truth_HW[np.argwhere(truth_HW > 0)[:, 0].mean().astype(int) :] = 0
        write_image(tmp_path / "half" / path.name, truth_HW)
    files = EvaluateRequest(
        out=tmp_path / "files",
        predictions=tmp_path / "half",
        reference=data / "test" / "masks",
        group_pattern="(.+)_slice_",
        draws=20,
    )
    evaluate(files)
    facts = measured(tmp_path / "out", ct_pet_run, data, compare=tmp_path / "files")
    theirs = json.loads((tmp_path / "files" / "metrics.json").read_text(encoding="utf-8"))
    expected = facts["metrics"]["dice"]["value"] - theirs["metrics"]["dice"]["value"]
    assert facts["comparison"]["tests"]["dice"]["difference"] == pytest.approx(expected)
    assert expected > 0.1


def test_a_damaged_slice_stops_or_is_listed(ct_pet_run: Path, tmp_path: Path) -> None:
    data = write_discs(tmp_path / "data", {"train": 4, "val": 4, "test": 8}, seed=2)
    broken = sorted((data / "test" / "PET").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError):
        measured(tmp_path / "stop", ct_pet_run, data)
    request = EvaluateRequest(
        out=tmp_path / "skip", model=ct_pet_run, data=data, draws=20, on_error="skip", device="cpu"
    )
    result = evaluate(request)
    assert result.error is not None
    assert (result.facts["n"], result.facts["n_failed"]) == (7, 1)
    assert broken.name not in {row["name"] for row in result.facts["per_image"]}


def test_labelled_pictures_of_a_tree(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for n in range(3):
        for folder, picture in (
            ("images", rng.integers(0, 255, (40, 50, 3))),
            ("masks", 255 * (rng.random((40, 50)) < 0.3)),
        ):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            write_image(tmp_path / "data" / folder / f"eye{n}.png", picture.astype(np.uint8))
    values = {"0": "background", "255": "lesion"}
    card = {"kind": "images", "sequences": None, "channels": 3, "label_values": values, "config": {}}
    run = write_run(tmp_path / "run", of=None, **card)
    facts = measured(tmp_path / "out", run, tmp_path / "data", save_predictions=True)
    assert (facts["n"], facts["distance_unit"]) == (3, "px")
    assert (tmp_path / "out" / "per_image.csv").is_file()
    assert (tmp_path / "out" / "predictions" / "images" / "eye0.png").is_file()
