"""Cases through a segmentation network by the command: label maps, probabilities, overlays, reports, refusals."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medssl_cli.core.errors import CheckpointError, ConfigError, DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import read_volume, write_image, write_volume
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.models.dense_decoder import DecoderConfig, DenseNetwork
from medssl_cli.models.dual_encoder import DualEncoderConfig, DualEncoderUNet
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.objectives.segmentation import SegmentationLoss, SegmentationLossConfig
from medssl_cli.objectives.supervised import SupervisedSegmentation
from medssl_cli.services.infer import InferRequest, infer
from medssl_cli.services.segmenter import network_facts, write_model

Medssl = Callable[..., Any]
SEQUENCES = ("ax_t2wi", "ax_adc")


def write_segment_run(run: Path, network: nn.Module, classes: tuple[str, ...], **card: Any) -> Path:
    """A finished run of a network as it is."""
    outputs = 1 if len(classes) == 2 else len(classes)
    objective = SupervisedSegmentation(network, SegmentationLoss(SegmentationLossConfig(), outputs), ema_decay=0.0)
    common = {"command": "segment", "classes": list(classes), "outputs": outputs, "network": network_facts(network)}
    run.mkdir(parents=True)
    write_model(run, objective.weights(), {**common, **card})
    (run / "run.json").write_text(json.dumps({"status": "finished"}), encoding="utf-8")
    return run


def dense_run(run: Path, classes: tuple[str, ...], sequences: tuple[str, ...] | None = SEQUENCES, **card: Any) -> Path:
    settings: dict[str, Any] = {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8, "img_size": 32}
    context = int(card.get("context", 0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        backbone = VisionTransformer(**settings, sequences=sequences)
        network = DenseNetwork(
            backbone, 1 if len(classes) == 2 else len(classes), DecoderConfig(base=8), context=context
        )
        for parameter in network.decoder.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    facts: dict[str, Any] = {
        "task": "semantic",
        "kind": "volumes" if sequences else "images",
        "sequences": None if sequences is None else list(sequences),
        "channels": len(sequences or "rgb"),
        "preprocess": PreprocessConfig().model_dump(mode="json"),
        "mean": 0.45,
        "std": 0.22,
        "tile": 32,
    }
    return write_segment_run(run, network, classes, **{**facts, **card})


def ct_pet_run(run: Path, **card: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DualEncoderUNet(DualEncoderConfig(fusion="2way"))
    facts = {"task": "ct-pet", "kind": "images", "sequences": ["CT", "PET"], "preprocess": {}, "mean": 0.5, "std": 0.5}
    return write_segment_run(run, network, ("background", "lesion"), **{**facts, "tile": 0, **card})


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gland and lesion on two sequences."""
    run = tmp_path_factory.mktemp("runs") / "several"
    ranges = {"spacing_z_mm": [1.0, 1.1], "spacing_y_mm": [0.1, 9.0], "spacing_x_mm": [0.1, 9.0]}
    return dense_run(run, ("background", "gland", "lesion"), ranges=ranges, context=1)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_run(tmp_path_factory.mktemp("runs") / "one", ("background", "lesion"), threshold=0.35)


@pytest.fixture(scope="module")
def ct_pet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct_pet_run(tmp_path_factory.mktemp("runs") / "cocoseg", threshold=0.3)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small cases on an oblique LAS grid; the third lacks its ADC."""
    root = tmp_path_factory.mktemp("cases")
    turn = np.deg2rad(9)
    about_x = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ np.diag([-0.9, 0.9, 3.3])
    affine[:3, 3] = (20.0, -31.0, 8.0)
    rng = np.random.default_rng(0)
    for number in range(3):
        for name in SEQUENCES[: 1 if number == 2 else 2]:
            array = rng.integers(0, 900, (5, 40, 48)).astype(np.int16)
            (root / f"P{number}").mkdir(exist_ok=True)
            write_volume(root / f"P{number}" / f"{name}.nii.gz", Volume(array, affine))
    return root


@pytest.fixture(scope="module")
def case(tree: Path) -> Path:
    return tree / "P0"


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


# --- volumes ---------------------------------------------------------------------------------------------------------


def test_a_case_gives_a_label_map_on_its_exact_grid(medssl: Medssl, several: Path, case: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--model", several, "--device", "cpu", "--out", out)
    answer = medssl("infer", case, *words, "--save-probabilities")
    assert answer.exit_code == 0, answer.stderr
    assert "lesion:" in answer.stdout
    assert "report.html" in answer.stdout
    source = nib.load(case / "ax_t2wi.nii.gz")
    found = nib.load(out / f"{case.name}_segmentation.nii.gz")
    assert found.shape == source.shape
    np.testing.assert_array_equal(found.affine, source.affine)
    labels = np.asarray(found.dataobj)
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) <= {0, 1, 2}
    kept = nib.load(out / f"{case.name}_probabilities.nii.gz")
    assert kept.shape == (*source.shape, 3)
    probabilities = np.asarray(kept.dataobj)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(-1), labels)
    told = summary_of(out)
    voxel_ml = abs(np.linalg.det(source.affine[:3, :3])) / 1000
    for label, name in enumerate(("gland", "lesion"), start=1):
        assert told["voxels"][name] == (labels == label).sum()
        assert told["volume_ml"][name] == pytest.approx((labels == label).sum() * voxel_ml)
    assert told["threshold"] is None
    assert "most probable" in told["null_reasons"]["threshold"]
    assert told["command"] == "infer"
    assert told["labels"] == {"background": 0, "gland": 1, "lesion": 2}
    assert names_in(out) == {
        "summary.json", "report.html", "overlay.png", f"{case.name}_segmentation.nii.gz",
        f"{case.name}_probabilities.nii.gz",
    }  # fmt: skip
    assert np.asarray(Image.open(out / "overlay.png")).std() > 0
    assert "spacing_outside" in {flag["code"] for flag in told["flags"]}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "structure-layer" in page
    assert "research use only" in page


def test_the_threshold_of_the_training_counts(one: Path, case: Path, tmp_path: Path) -> None:
    def voxels(name: str, **keys: Any) -> tuple[int, dict[str, Any]]:
        infer(InferRequest((str(case),), model=one, device="cpu", out=tmp_path / name, **keys))
        told = summary_of(tmp_path / name)
        return told["voxels"]["lesion"], told

    stored, told = voxels("stored", save_probabilities=True)
    assert told["threshold"] == 0.35
    assert told["threshold_source"] == "validation data of the training"
    probabilities = read_volume(tmp_path / "stored" / f"{case.name}_probabilities.nii.gz").array
    assert probabilities.ndim == 3
    assert stored == (probabilities >= np.float32(0.35)).sum()
    middle = float(np.median(probabilities))
    asked, told = voxels("asked", threshold=middle)
    assert told["threshold_source"] == "--threshold"
    assert asked == (probabilities >= np.float32(middle)).sum() != stored


def test_a_folder_lacking_a_sequence_is_flagged(several: Path, tree: Path, tmp_path: Path) -> None:
    infer(InferRequest((str(tree / "P2"),), model=several, device="cpu", out=tmp_path / "out"))
    told = summary_of(tmp_path / "out")
    assert told["missing_sequences"] == ["ax_adc"]
    assert ("warning", "ax_adc is missing") in {(flag["kind"], flag["title"]) for flag in told["flags"]}


def test_an_oblique_file_of_unknown_name(several: Path, case: Path, tmp_path: Path) -> None:
    volume = read_volume(case / "ax_t2wi.nii.gz").reoriented("PIR")
    write_volume(tmp_path / "scan.1.nii.gz", volume)
    words = (str(tmp_path / "scan.1.nii.gz"),)
    infer(InferRequest(words, model=several, device="cpu", out=tmp_path / "out", tta=True))
    found = read_volume(tmp_path / "out" / "scan.1_segmentation.nii.gz")
    assert found.shape == volume.shape
    np.testing.assert_array_equal(found.affine, nib.load(tmp_path / "scan.1.nii.gz").affine)
    told = summary_of(tmp_path / "out")
    assert {"sequence_guessed", "missing"} <= {flag["code"] for flag in told["flags"]}
    assert told["config"]["tta"] is True
    infer(InferRequest(words, model=several, device="cpu", out=tmp_path / "adc", sequence="ax_adc"))
    assert summary_of(tmp_path / "adc")["missing_sequences"] == ["ax_t2wi"]


def test_a_bad_case_of_a_batch_is_listed(medssl: Medssl, one: Path, case: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"nothing")
    words = ("infer", tmp_path / "bad.nii.gz", case, "--model", one, "--device", "cpu")
    answer = medssl(*words, "--out", tmp_path / "out", "--on-error", "skip", "--json")
    assert answer.exit_code == 4, answer.stderr
    told = json.loads(answer.stdout)
    assert [entry["case_id"] for entry in told["cases"]] == [case.name]
    assert (tmp_path / "out" / case.name / f"{case.name}_segmentation.nii.gz").is_file()
    with (tmp_path / "out/failures.csv").open(newline="") as file:
        assert [row["case_id"] for row in csv.DictReader(file)] == ["bad"]
    assert medssl(*words, "--out", tmp_path / "stopped").exit_code == 3


def test_another_case_in_the_same_folder_leaves_nothing_of_the_first(one: Path, tree: Path, tmp_path: Path) -> None:
    first, second = tree / "P0", tree / "P1"
    for case in (first, second):
        infer(InferRequest((str(case),), model=one, device="cpu", out=tmp_path / "out", save_probabilities=True))
    assert not [name for name in names_in(tmp_path / "out") if name.startswith(first.name)]
    infer(InferRequest((str(second),), model=one, device="cpu", out=tmp_path / "out"))
    assert f"{second.name}_probabilities.nii.gz" not in names_in(tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"heatmap": True}, "--heatmap"),
        ({"top_k": 3}, "--top-k"),
        ({"overrides": ("stride=2",)}, "stride"),
        ({"overrides": ("overlap=1",)}, "overlap"),
        ({"threshold": 1.0}, "--threshold"),
        ({"dicom": "pm"}, "pm"),
        ({"ct": Path("a"), "pet": Path("b")}, "--ct"),
    ],
)
def test_options_without_effect_are_refused(
    keys: dict[str, Any], said: str, one: Path, case: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        infer(InferRequest((str(case),), model=one, device="cpu", out=tmp_path / "out", **keys))
    assert said in f"{caught.value.what} {caught.value.where}"
    assert not (tmp_path / "out").exists()


def test_a_threshold_on_several_classes_is_refused(several: Path, case: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several classes"):
        infer(InferRequest((str(case),), model=several, device="cpu", out=tmp_path / "out", threshold=0.4))


def test_flips_of_left_and_right_structures_are_refused(tree: Path, tmp_path: Path) -> None:
    run = dense_run(tmp_path / "run", ("background", "kidney_left", "kidney_right"))
    with pytest.raises(ConfigError, match="change places"):
        infer(InferRequest((str(tree / "P0"),), model=run, device="cpu", out=tmp_path / "out", tta=True))


def test_options_of_segmentation_are_refused_elsewhere(
    write_run: Callable[..., Path], case: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "runs" / "backbone")
    for keys in ({"tta": True}, {"save_probabilities": True}, {"ct": Path("a")}, {"pet": Path("a")}):
        with pytest.raises(ConfigError, match="segmentation network"):
            infer(InferRequest((str(case),), model=run, device="cpu", out=tmp_path / "out", **keys))


def test_an_altered_model_is_refused(tmp_path: Path, case: Path) -> None:
    run = dense_run(tmp_path / "run", ("background", "lesion"))
    weights = run / "best.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError):
        infer(InferRequest((str(case),), model=run, device="cpu", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_dicom_in_dicom_out(one: Path, tmp_path: Path, write_dicom: Callable[..., Volume]) -> None:
    pytest.importorskip("highdicom")
    import highdicom
    import pydicom

    tags = dict.fromkeys(("PatientSex", "PatientBirthDate", "StudyTime", "StudyID", "AccessionNumber"), "")
    tags |= {"ReferringPhysicianName": "", "FrameOfReferenceUID": "1.2.3.4", "PositionReferenceIndicator": ""}
    truth = write_dicom(tmp_path / "dicom", n_slices=5, size=(40, 48), SeriesDescription="t2 tse tra", **tags)
    out = tmp_path / "out"
    infer(InferRequest((str(tmp_path / "dicom"),), model=one, device="cpu", out=out, dicom="seg,rtstruct"))
    labels = read_volume(out / "dicom_segmentation.nii.gz")
    told = summary_of(out)
    assert told["dicom"] == {"seg": "dicom_seg.dcm", "rtstruct": "dicom_rtstruct.dcm"}
    assert labels.shape == truth.shape
    assert "(DICOM)" in next(iter(told["inputs"].values()))
    segmentation = highdicom.seg.segread(out / "dicom_seg.dcm")
    sources = sorted(
        (pydicom.dcmread(p) for p in (tmp_path / "dicom").iterdir()), key=lambda s: s.ImagePositionPatient[2]
    )
    frames = segmentation.get_pixels_by_source_instance([source.SOPInstanceUID for source in sources])[..., 0]
    assert labels.array.any()
    np.testing.assert_array_equal(frames, labels.reoriented("LPS").array)
    assert segmentation.SegmentSequence[0].SegmentLabel == "lesion"
    structures = pydicom.dcmread(out / "dicom_rtstruct.dcm")
    assert [region.ROIName for region in structures.StructureSetROISequence] == ["lesion"]
    assert structures.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    assert len(structures.ROIContourSequence[0].ContourSequence) >= np.count_nonzero(labels.array.any(axis=(1, 2)))


def test_a_network_of_windows_of_one_ct(tmp_path: Path, tree: Path) -> None:
    windows = [["brain", 0.0, 400.0], ["bone", 0.0, 900.0], ["wide", 100.0, 500.0]]
    run = dense_run(tmp_path / "run", ("background", "bleed"), None, kind="volumes", windows_hu=windows)
    path = tree / "P0" / "ax_t2wi.nii.gz"
    infer(InferRequest((str(path),), model=run, device="cpu", out=tmp_path / "out"))
    found = read_volume(tmp_path / "out/ax_t2wi_segmentation.nii.gz")
    assert found.shape == (5, 40, 48)
    np.testing.assert_array_equal(found.affine, nib.load(path).affine)
    assert summary_of(tmp_path / "out")["missing_sequences"] == []
    assert "brain" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_a_network_of_pictures_on_the_slices_of_a_volume(tmp_path: Path, tree: Path) -> None:
    run = dense_run(tmp_path / "run", ("background", "vessel"), None, mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3])
    infer(InferRequest((str(tree / "P0/ax_t2wi.nii.gz"),), model=run, device="cpu", out=tmp_path / "out"))
    assert read_volume(tmp_path / "out/ax_t2wi_segmentation.nii.gz").shape == (5, 40, 48)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_gets_a_label_picture_of_its_size(tmp_path: Path) -> None:
    run = dense_run(tmp_path / "run", ("background", "vessel", "disc"), None)
    rng = np.random.default_rng(0)
    write_image(tmp_path / "eye.1.png", rng.integers(0, 255, (61, 90, 3)).astype(np.uint8))
    out = tmp_path / "out"
    infer(InferRequest((str(tmp_path / "eye.1.png"),), model=run, device="cpu", out=out, save_probabilities=True))
    labels = np.asarray(Image.open(out / "eye.1_segmentation.png"))
    assert labels.shape == (61, 90)
    kept = np.load(out / "eye.1_probabilities.npy")
    assert kept.shape == (3, 61, 90)
    np.testing.assert_array_equal(kept.argmax(0), labels)
    told = summary_of(out)
    assert told["volume_ml"] is None
    assert "millimetres" in told["null_reasons"]["volume_ml"]
    assert told["voxels"]["disc"] == (labels == 2).sum()


# --- pairs of CT and PET ---------------------------------------------------------------------------------------------


def write_pairs(root: Path, names: tuple[str, ...], size: tuple[int, int] = (40, 50)) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    for kind in ("CT", "PET"):
        (root / kind).mkdir(parents=True)
        for name in names:
            write_image(root / kind / name, rng.integers(0, 255, size).astype(np.uint8))
    return root / "CT", root / "PET"


NAMES = ("patient_1_slice_1.png", "patient_1_slice_2.png", "patient_2_slice_1.png")


def test_c04_masks_keep_the_full_stem(medssl: Medssl, ct_pet: Path, tmp_path: Path) -> None:
    folders = write_pairs(tmp_path / "a.b", ("p.1_slice_2.png", "p.1_slice_10.png"))
    answer = medssl("infer", *folders, "--model", ct_pet, "--device", "cpu", "--out", tmp_path / "o.ut")
    assert answer.exit_code == 0, answer.stderr
    assert names_in(tmp_path / "o.ut/predictions") == {"p.1_slice_2.png", "p.1_slice_10.png"}
    mask = Image.open(tmp_path / "o.ut/predictions/p.1_slice_2.png")
    assert mask.size == (50, 40)
    assert mask.mode == "L"
    assert set(np.unique(np.asarray(mask))) <= {0, 255}


def test_c23_the_validation_threshold_decides_unless_another_is_given(ct_pet: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data", NAMES)
    words = (str(tmp_path / "data"),)
    infer(InferRequest(words, model=ct_pet, device="cpu", out=tmp_path / "out", save_probabilities=True))
    told = summary_of(tmp_path / "out")
    assert told["threshold"] == 0.3
    assert told["threshold_source"] == "validation data of the training"
    middle = 0.0
    for entry in told["pairs"]:
        stem = Path(entry["name"]).stem
        probability = np.load(tmp_path / f"out/probabilities/{stem}.npy")
        mask = np.asarray(Image.open(tmp_path / f"out/predictions/{stem}.png")) > 0
        np.testing.assert_array_equal(mask, probability >= np.float32(0.3))
        assert entry["pixels"] == mask.sum()
        middle = float(np.median(probability))
    infer(InferRequest(words, model=ct_pet, device="cpu", out=tmp_path / "asked", threshold=middle))
    told = summary_of(tmp_path / "asked")
    assert told["threshold_source"] == "--threshold"
    assert 0.4 < told["pairs"][-1]["share"] < 0.6
    assert names_in(tmp_path / "asked") == {"predictions", "summary.json", "report.html", "overlay.png"}
    page = (tmp_path / "asked/report.html").read_text(encoding="utf-8")
    assert page.count("<figcaption>overlay") == 3


def test_c01_c02_training_and_inference_read_the_same_tensor(ct_pet: Path, tmp_path: Path) -> None:
    from medssl_cli.data.ct_pet import find_pairs, read_ct_pet, read_pair
    from medssl_cli.data.labelled_slices import CtPetSource, collate_labelled
    from medssl_cli.data.views import normalize
    from medssl_cli.services.segmentation_inference import InferSegmentConfig, segment_pictures
    from medssl_cli.services.segmenter import open_segmenter

    root = tmp_path / "data"
    folders = write_pairs(root, NAMES)
    green = np.zeros((40, 50, 3), np.uint8)
    green[:, 10:] = (0, 255, 0)
    write_image(folders[0] / NAMES[0], green)
    (root / "masks").mkdir()
    for name in NAMES:
        write_image(root / "masks" / name, np.zeros((40, 50), np.uint8))
    source = CtPetSource(read_ct_pet(root).parts["all"], mask_threshold=None, cache_gb=0.1)
    segmenter = open_segmenter(ct_pet, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    segmenter.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))

    pairs = (read_pair(triple) for triple in find_pairs(*folders))
    list(segment_pictures(segmenter, pairs, InferSegmentConfig(batch_size=1)))
    for index, image in enumerate(seen):
        batch = collate_labelled([source[(0, index)]])
        trained_on = normalize(batch.images_BSHW, segmenter.mean, segmenter.std)
        torch.testing.assert_close(image, trained_on, rtol=0, atol=1e-6)
    luminance = np.asarray(Image.fromarray(green).convert("L"), np.float32) / 255
    np.testing.assert_allclose(seen[0][0, 0].numpy(), (luminance - 0.5) / 0.5, atol=1e-6)
    assert seen[0].min() >= -1
    assert seen[0].max() <= 1


def test_c03_a_missing_partner_is_named(medssl: Medssl, ct_pet: Path, tmp_path: Path) -> None:
    ct, pet = write_pairs(tmp_path / "data", NAMES)
    (pet / NAMES[1]).unlink()
    answer = medssl("infer", ct, pet, "--model", ct_pet, "--device", "cpu", "--out", tmp_path / "out")
    assert answer.exit_code == 3
    assert NAMES[1] in answer.stderr
    assert not (tmp_path / "out").exists() or not names_in(tmp_path / "out")


def test_c24_pairs_of_any_size_keep_it(ct_pet: Path, tmp_path: Path) -> None:
    ct, pet = write_pairs(tmp_path / "data", NAMES[:1], (63, 37))
    rng = np.random.default_rng(1)
    for folder in (ct, pet):
        write_image(folder / NAMES[1], rng.integers(0, 255, (20, 90)).astype(np.uint8))
    request = InferRequest((), model=ct_pet, device="cpu", out=tmp_path / "out", ct=ct, pet=pet)
    infer(request)
    sizes = [np.asarray(Image.open(tmp_path / "out/predictions" / name)).shape for name in NAMES[:2]]
    assert sizes == [(63, 37), (20, 90)]


def test_a_bad_pair_is_listed_and_has_no_mask(medssl: Medssl, ct_pet: Path, tmp_path: Path) -> None:
    ct, pet = write_pairs(tmp_path / "data", NAMES)
    (pet / NAMES[1]).write_bytes(b"nothing")
    words = ("infer", tmp_path / "data", "--model", ct_pet, "--device", "cpu", "--out", tmp_path / "out")
    answer = medssl(*words, "--on-error", "skip")
    assert answer.exit_code == 4, answer.stderr
    assert names_in(tmp_path / "out/predictions") == {NAMES[0], NAMES[2]}
    with (tmp_path / "out/failures.csv").open(newline="") as file:
        assert [row["case_id"] for row in csv.DictReader(file)] == [NAMES[1]]
    before = (tmp_path / "out/predictions" / NAMES[0]).read_bytes()
    assert medssl(*words).exit_code == 3
    assert (tmp_path / "out/predictions" / NAMES[0]).read_bytes() == before
    for name in (NAMES[0], NAMES[2]):
        (ct / name).write_bytes(b"nothing")
    answer = medssl(*words, "--on-error", "skip")
    assert answer.exit_code == 3
    assert (tmp_path / "out/predictions" / NAMES[0]).read_bytes() == before


def test_one_pair_of_files(ct_pet: Path, tmp_path: Path) -> None:
    ct, pet = write_pairs(tmp_path / "data", NAMES)
    infer(InferRequest((), model=ct_pet, device="cpu", out=tmp_path / "out", ct=ct / NAMES[0], pet=pet / NAMES[2]))
    assert names_in(tmp_path / "out/predictions") == {NAMES[0]}


def test_pairs_named_in_a_wrong_way_are_refused(ct_pet: Path, tmp_path: Path) -> None:
    ct, pet = write_pairs(tmp_path / "data", NAMES)

    def refused(*words: Path, **keys: Any) -> str:
        request = InferRequest(tuple(map(str, words)), model=ct_pet, device="cpu", out=tmp_path / "out", **keys)
        with pytest.raises((ConfigError, DataError)) as caught:
            infer(request)
        return f"{caught.value.what} {caught.value.where}"

    assert "CT slices comes first" in refused(pet, ct)
    assert "belong together" in refused(ct=ct)
    assert "belong together" in refused(ct, ct=ct, pet=pet)
    assert "--sequence" in refused(ct, pet, sequence="CT")
    assert "--dicom" in refused(ct, pet, dicom="seg")
    Image.new("L", (50, 40)).save(ct / "patient_1_slice_1.bmp")
    Image.new("L", (50, 40)).save(pet / "patient_1_slice_1.bmp")
    assert "one name" in refused(ct, pet)
    assert not (tmp_path / "out").exists() or not names_in(tmp_path / "out")


# --- volumes of CT and PET -------------------------------------------------------------------------------------------


def write_ct_pet_case(folder: Path, *names: str) -> tuple[Volume, Volume]:
    """A CT, and a PET of coarser voxels on a grid of its own that shows the same ball."""
    folder.mkdir(parents=True)
    ct_affine = np.array([[-1.0, 0, 0, 30], [0, 1.0, 0, -25], [0, 0, 3.0, 10], [0, 0, 0, 1]])
    pet_affine = np.array([[-2.0, 0, 0, 34], [0, 2.0, 0, -28], [0, 0, 3.0, 10], [0, 0, 0, 1]])

    def drawn(shape: tuple[int, int, int], affine: np.ndarray, low: float, high: float) -> Volume:
        z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
        world = np.einsum("ij,j...->i...", affine, np.stack([x, y, z, np.ones_like(x)]))[:3]
        inside = ((world - np.array([12.0, -6.0, 22.0]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 49
        return Volume(np.where(inside, high, low).astype(np.float32), affine)

    ct, pet = drawn((9, 44, 52), ct_affine, -100.0, 60.0), drawn((9, 26, 30), pet_affine, 0.5, 9.0)
    for name, volume in zip(names or ("CT.nii.gz", "PET.nii.gz"), (ct, pet), strict=False):
        write_volume(folder / name, volume)
    return ct, pet


def test_volumes_of_ct_and_pet(ct_pet: Path, tmp_path: Path) -> None:
    from medssl_cli.data.resample import resample_to
    from medssl_cli.services.segmenter import open_segmenter

    ct, pet = write_ct_pet_case(tmp_path / "P1", "ct.nii.gz", "pet.nii.gz")
    words = (str(tmp_path / "P1"),)
    keys = ("ct_window=-160,240", "pet_range=0,20")
    request = InferRequest(words, keys, model=ct_pet, device="cpu", out=tmp_path / "out", save_probabilities=True)
    infer(request)
    found = read_volume(tmp_path / "out/P1_segmentation.nii.gz")
    assert found.shape == ct.shape
    np.testing.assert_array_equal(found.affine, ct.affine)
    told = summary_of(tmp_path / "out")
    assert told["config"]["windows"] == {"CT": [-160.0, 240.0], "PET": [0.0, 20.0]}
    # by hand: PET onto the CT grid, both as pictures with anterior up, (x - 0.5) / 0.5
    moved = resample_to(pet, ct).reoriented("LPS").array
    network = open_segmenter(ct_pet, torch.device("cpu")).network
    scaled = [
        np.clip((ct.reoriented("LPS").array + 160) / 400, 0, 1),
        np.clip(moved / 20, 0, 1),
    ]
    images = (torch.from_numpy(np.stack(scaled, 1).astype(np.float32)) - 0.5) / 0.5
    with torch.no_grad():
        expected = Volume(network(images).sigmoid()[:, 0].numpy(), ct.reoriented("LPS").affine)
    kept = read_volume(tmp_path / "out/P1_probabilities.nii.gz")
    np.testing.assert_allclose(kept.array, expected.reoriented("LAS").array, atol=2e-5)
    np.testing.assert_array_equal(found.array, kept.array >= np.float32(0.3))


def test_what_the_grey_values_of_a_volume_were_has_to_be_known(ct_pet: Path, tmp_path: Path) -> None:
    write_ct_pet_case(tmp_path / "P1")
    write_ct_pet_case(tmp_path / "P2", "CT.nii.gz")
    write_pairs(tmp_path / "pairs", NAMES[:1])

    def refused(word: str, *keys: str, run: Path = ct_pet) -> str:
        request = InferRequest((str(tmp_path / word),), keys, model=run, device="cpu", out=tmp_path / "out")
        with pytest.raises((ConfigError, DataError)) as caught:
            infer(request)
        return f"{caught.value.what} {caught.value.where}"

    assert "no ct_window and no pet_range" in refused("P1")
    assert "no pet_range" in refused("P1", "ct_window=-160,240")
    assert "lower end" in refused("P1", "ct_window=240,-160")
    assert "PET of the case is missing" in refused("P2", "ct_window=-160,240", "pet_range=0,20")
    assert "ct_window" in refused("pairs", "ct_window=-160,240")
    assert "CT and PET together" in refused(f"pairs/CT/{NAMES[0]}")
    trained_so = ct_pet_run(tmp_path / "run", ct_window=[-160, 240], pet_range=[0, 20])
    request = InferRequest((str(tmp_path / "P1"),), model=trained_so, device="cpu", out=tmp_path / "known")
    infer(request)
    assert summary_of(tmp_path / "known")["threshold"] == 0.5
