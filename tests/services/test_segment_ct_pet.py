"""The ct-pet task of segment: settings, data, network and validation as one job."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from segment_parts import write_discs
from sklearn.metrics import f1_score, jaccard_score
from torch import Tensor, nn

from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError, ConfigError, DataError, ResourceError
from medssl_cli.data.ct_pet import read_ct_pet, read_pair
from medssl_cli.data.labelled_slices import CtPetSource, build_labelled_loader, ordered_batches
from medssl_cli.models import vgg
from medssl_cli.models.foreign import vgg19_shapes
from medssl_cli.objectives.segmentation import SegmentationLoss, SegmentationLossConfig
from medssl_cli.report.labels import label_colour
from medssl_cli.report.mask_overlay import REFERENCE
from medssl_cli.services.segment import segment
from medssl_cli.services.segment_ct_pet import build_ct_pet_job
from medssl_cli.services.segment_ct_pet_config import CtPetConfig, load_ct_pet_config, settle_ct_pet
from medssl_cli.services.segment_ct_pet_validation import Overlays, Validation, logits_of
from medssl_cli.services.segment_job import SegmentJob
from medssl_cli.services.segment_request import SegmentRequest
from medssl_cli.services.segmentation_inference import InferSegmentConfig, segment_planes
from medssl_cli.services.segmenter import segmenter_of

CPU = torch.device("cpu")
UPSTREAM = {
    "epoch": 50,
    "lr": 0.0001,
    "bs": 8,
    "loss_type": "combined",
    "dice_weight": 0.6,
    "ce_weight": 0.4,
    "val_freq": 2,
    "save_freq": 5,
    "num_workers": 8,
    "use_gpu": True,
    "val_ratio": 0.2,
    "random_seed": 42,
    "logdir": "./logs/",
    "dataset_root": "./dataset_split",
    "_comment": "large batches",
}
"""A preset with the keys of CoCoSeg's own JSON files."""


@pytest.fixture(scope="module")
def presplit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training, four validation and four test slices of 32 x 32 pixels; not to be changed."""
    return write_discs(tmp_path_factory.mktemp("discs") / "split", {"train": 8, "val": 4, "test": 4})


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty slices of ten patients; not to be changed."""
    return write_discs(tmp_path_factory.mktemp("discs") / "flat", {"": 20}, per_patient=2)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in torchvision's names, of random numbers."""
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    generator = torch.Generator().manual_seed(0)
    torch.save({name: 0.05 * torch.randn(shape, generator=generator) for name, shape in vgg19_shapes().items()}, path)
    return path


@pytest.fixture(scope="module")
def job(presplit: Path) -> SegmentJob:
    return build(presplit, "augment.noise_prob=0")


def asked(data: Path | None, *overrides: str, **given: Any) -> SegmentRequest:
    given = {"vgg_weights": None if "fusion=2way" in overrides else "random", **given}
    return SegmentRequest(task="ct-pet", data=data, overrides=overrides, **given)


def build(data: Path, *overrides: str, **given: Any) -> SegmentJob:
    return build_ct_pet_job(settle_ct_pet(asked(data, *overrides, **given)), CPU)


# --- settings --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_readme() -> None:
    config = CtPetConfig()
    assert (config.epoch, config.lr, config.bs, config.val_ratio, config.random_seed) == (500, 1e-4, 8, 0.2, 42)
    assert (config.loss_type, config.dice_weight, config.ce_weight, config.pos_weight) == ("combined", 0.5, 0.5, 1.0)
    assert (config.val_freq, config.save_freq, config.num_workers, config.ema_decay) == (1, 5, 4, 0.999)
    assert (config.weight_decay, config.min_lr, config.fusion, config.cam_scale) == (1e-4, 1e-6, "4way", "mean")


@pytest.mark.parametrize(
    ("recipe", "figures"),
    [
        ("cocoseg", (50, 1e-4, 8, "combined", 0.5, 0.5, 1, 5, 4)),
        ("cocoseg_large_batch", (50, 2e-4, 16, "combined", 0.6, 0.4, 2, 5, 8)),
        ("cocoseg_focal", (50, 1e-4, 8, "focal", 0.5, 0.5, 1, 5, 4)),
    ],
)
def test_presets_hold_the_published_values_and_focal_is_focal(recipe: str, figures: tuple[Any, ...]) -> None:
    config = load_ct_pet_config(asked(None, config=recipe))
    names = ("epoch", "lr", "bs", "loss_type", "dice_weight", "ce_weight", "val_freq", "save_freq", "num_workers")
    assert tuple(getattr(config, name) for name in names) == figures
    assert config.use_gpu is None


def test_c19_a_flag_beats_the_file_and_an_override_beats_both(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(UPSTREAM))
    assert load_ct_pet_config(asked(None, config=str(path))).lr == 1e-4
    assert load_ct_pet_config(asked(None, config=str(path), lr=1e-3)).lr == 1e-3
    assert load_ct_pet_config(asked(None, "lr=5e-5", config=str(path), lr=1e-3)).lr == 5e-5
    config = load_ct_pet_config(asked(None, config=str(path), epochs=3, batch_size=2, seed=7, workers=0))
    assert (config.epoch, config.bs, config.random_seed, config.num_workers) == (3, 2, 7, 0)
    assert (config.dice_weight, config.val_freq, config.dataset_root) == (0.6, 2, "./dataset_split")
    weights = {"dice_weight": 0.7, "ce_weight": 0.3, "pos_weight": 5.0, "val_freq": 3, "save_freq": 50}
    config = load_ct_pet_config(asked(None, config=str(path), **weights))
    assert {key: getattr(config, key) for key in weights} == weights
    assert config.loss_line() == "loss: combined: dice_weight 0.7, ce_weight 0.3, pos_weight 5; of each sample"


def test_c19_unknown_keys_are_told_with_the_nearest_name_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**UPSTREAM, "dice_wight": 0.7, "remark": "x"}))
    with pytest.raises(ConfigError) as caught:
        load_ct_pet_config(asked(None, "save_frequency=1", config=str(path)))
    assert caught.value.exit_code == 2
    assert "dice_wight: unknown key; did you mean dice_weight?" in caught.value.where
    assert "remark: unknown key; a remark stands under _comment" in caught.value.where
    assert "did you mean save_freq?" in caught.value.where


def test_data_and_run_folder_of_a_file_serve_where_no_option_names_them(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**UPSTREAM, "use_gpu": False}))
    found = settle_ct_pet(asked(None, config=str(path)))
    assert (found.data, found.run_folder(), found.device) == (Path("dataset_split"), Path("logs"), "cpu")
    found = settle_ct_pet(asked(tmp_path, config=str(path), out=tmp_path / "run"))
    assert (found.data, found.run_folder()) == (tmp_path, tmp_path / "run")
    with pytest.raises(ConfigError, match="No data was named"):
        settle_ct_pet(asked(None))


def test_alpha_and_beta_are_other_names_and_the_meaning_is_told() -> None:
    config = load_ct_pet_config(asked(None, "alpha=0.6", "beta=0.4", loss_type="tversky"))
    assert (config.fn_weight, config.fp_weight) == (0.6, 0.4)
    told = "fn_weight (alpha) 0.6 on missed pixels, fp_weight (beta) 0.4 on wrongly marked ones"
    assert config.loss_line() == f"loss: tversky: {told}; of each sample"


def test_one_key_under_two_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"loss_type": "tversky", "alpha": 0.6, "fn_weight": 0.7}))
    with pytest.raises(ConfigError) as caught:
        load_ct_pet_config(asked(None, config=str(path)))
    assert "alpha: another name of fn_weight, which is given too" in caught.value.where


def test_keys_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load_ct_pet_config(asked(None, "fusion=2way", "focal_gamma=3", "fn_weight=0.6", vgg_weights="vgg19.pth"))
    for line in ("focal_gamma: no effect with loss_type=combined", "fn_weight: no effect", "vgg_weights: no effect"):
        assert line in caught.value.where
    load_ct_pet_config(asked(None, "dice_weight=0.5", loss_type="dice"))  # the default says nothing


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_c22_a_gpu_that_is_asked_for_and_absent_ends_with_6(presplit: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        segment(asked(presplit, "use_gpu=true", out=tmp_path / "run"))
    assert caught.value.exit_code == 6
    assert not (tmp_path / "run").exists()


def test_c22_the_environment_is_left_alone(presplit: Path, tmp_path: Path) -> None:
    before = devices()
    segment(asked(presplit, "fusion=2way", device="cpu", smoke=True, workers=0, batch_size=1, out=tmp_path / "run"))
    assert devices() == before
    assert not (tmp_path / "run").exists()


def devices() -> dict[str, str]:
    """Variables that steer which devices and threads are used."""
    ours = ("CUDA", "NVIDIA", "HIP", "OMP", "RANK", "LOCAL", "WORLD", "MASTER", "NCCL", "SLURM")
    return {key: value for key, value in os.environ.items() if key.startswith(ours)}


# --- VGG weights -----------------------------------------------------------------------------------------------------


def test_without_vgg_weights_three_ways_out_are_told(presplit: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        segment(SegmentRequest(task="ct-pet", data=presplit, out=tmp_path / "run"))
    for way in ("--vgg-weights FILE", "--vgg-weights random", "fusion=2way"):
        assert way in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_vgg_weights_stand_in_the_card(presplit: Path, vgg_file: Path, job: SegmentJob) -> None:
    assert (job.card["vgg_weights"], job.card["vgg_sha256"]) == ("random", None)
    assert any("random" in note for note in job.notes)
    two = build(presplit, "fusion=2way")
    assert two.card["vgg_weights"] == "none"
    assert two.parameter_counts()["frozen"] == 0
    loaded = build(presplit, vgg_weights=str(vgg_file))
    assert loaded.card["vgg_weights"] == "unverified"
    assert len(loaded.card["vgg_sha256"]) == 64
    assert any("unverified" in note and loaded.card["vgg_sha256"][:12] in note for note in loaded.notes)
    assert loaded.digests == {"vgg_weights": loaded.card["vgg_sha256"]}
    own = loaded.network.get_parameter("vgg_ct.conv2_1.weight")
    assert torch.equal(own, torch.load(vgg_file, weights_only=True)["features.5.weight"])
    with pytest.raises(CheckpointError):
        build(presplit, vgg_weights=str(presplit / "train" / "CT" / "patient_001_slice_00.png"))


def test_the_published_vgg_weights_are_called_imagenet(
    presplit: Path, vgg_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vgg, "IMAGENET_DIGEST", file_digest(vgg_file)[:8])
    job = build(presplit, vgg_weights=str(vgg_file))
    assert job.card["vgg_weights"] == "imagenet"
    assert job.card["vgg_sha256"] == file_digest(vgg_file)
    assert not job.notes
    assert any(line.startswith("VGG weights: imagenet") for line in job.introduction)


def test_advice_names_the_keys_of_this_command(job: SegmentJob) -> None:
    assert (job.keys.batch, job.keys.accumulation, job.keys.workers) == ("bs", None, "num_workers")
    settings = [*re.findall(r"(\w+)=(\w+)", f"{job.keys.less_memory} {job.keys.not_finite}")]
    assert len(settings) == 4
    for key, value in settings:
        load_ct_pet_config(asked(None, f"{key}={value}"))


def test_c07_parameters_are_those_of_the_table_and_are_told(job: SegmentJob) -> None:
    assert job.parameter_counts() == {"total": 13_390_596, "trainable": 8_741_764, "frozen": 4_648_832}
    assert job.card["parameters"]["fusion_projections"] == 3_097_024
    assert any("trainable 8,741,764, frozen 4,648,832, total 13,390,596" in line for line in job.introduction)
    trained = {name for group in job.groups for name, _ in group["params"]}
    assert not any("vgg" in name for name in trained)
    assert sum(p.numel() for group in job.groups for _, p in group["params"]) == 8_741_764


def test_the_network_is_a_function_of_the_seed(presplit: Path, job: SegmentJob) -> None:
    torch.rand(3)
    again = build(presplit).network.state_dict()
    other = build(presplit, seed=1).network.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in job.network.state_dict().items())
    assert not torch.equal(other["decoder.deconv6.weight"], again["decoder.deconv6.weight"])


# --- data ------------------------------------------------------------------------------------------------------------


def test_counts_are_told_by_part(job: SegmentJob) -> None:
    assert job.data_facts["counts"] == {
        "train": {"n_slices": 8, "n_patients": 2, "n_with_lesion": 8},
        "val": {"n_slices": 4, "n_patients": 1, "n_with_lesion": 4},
        "test": {"n_slices": 4, "n_patients": 1},
    }
    assert "train: 8 slices of 2 patients, 8 with lesion" in job.introduction
    assert "12 of 12 slices stay decoded in memory" in job.introduction
    assert job.seen[0] == ("train", "patient_001_slice_00.png", "patient_001")
    assert {part for part, _, _ in job.seen} == {"train", "val"}


def test_the_folders_of_a_split_win_over_val_ratio(presplit: Path) -> None:
    assert len(build(presplit, "fusion=2way", val_ratio=0.7).train) == 8


def test_the_test_part_is_never_opened(presplit: Path, tmp_path: Path) -> None:
    shutil.copytree(presplit, tmp_path / "data")
    for path in (tmp_path / "data" / "test").rglob("*.png"):
        path.write_bytes(b"no picture")
    assert len(build(tmp_path / "data", "fusion=2way").train) == 8


def test_a_flat_tree_is_split_by_patient(flat: Path) -> None:
    job = build(flat, "fusion=2way")
    patients = {part: {patient for of, _, patient in job.seen if of == part} for part in ("train", "val")}
    assert {part: len(found) for part, found in patients.items()} == {"train": 8, "val": 2}
    assert not patients["train"] & patients["val"]


def test_lists_of_medssl_split_tell_the_parts(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("patient_id\npatient_001\npatient_002\n")
    (tmp_path / "val.csv").write_text("image\nCT/patient_003_slice_00.png\nCT/patient_003_slice_01.png\n")
    job = build(flat, "fusion=2way", splits=tmp_path)
    assert [name for part, name, _ in job.seen if part == "val"] == [f"patient_003_slice_0{n}.png" for n in range(2)]
    assert len(job.train) == 4
    (tmp_path / "val.csv").write_text("patient_id\npatient_03\n")
    with pytest.raises(DataError) as caught:
        build(flat, "fusion=2way", splits=tmp_path)
    assert "did you mean 'patient_003'" in caught.value.where
    (tmp_path / "val.csv").write_text("image\npatient_002_slice_00.png\n")
    with pytest.raises(DataError, match="in several parts"):
        build(flat, "fusion=2way", splits=tmp_path)


def test_lists_and_folders_of_a_split_exclude_each_other(presplit: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a split already"):
        build(presplit, "fusion=2way", splits=tmp_path)


def test_r12_a_patient_on_two_sides_is_refused(presplit: Path, tmp_path: Path) -> None:
    shutil.copytree(presplit, tmp_path / "data")
    for kind in ("CT", "PET", "masks"):
        source = next((presplit / "train" / kind).glob("patient_001*"))
        shutil.copy(source, tmp_path / "data" / "test" / kind / "patient_001_slice_77.png")
    with pytest.raises(DataError) as caught:
        build(tmp_path / "data", "fusion=2way")
    assert caught.value.exit_code == 3
    assert caught.value.code == "split_leak"
    assert "patient_001" in caught.value.where


@pytest.mark.parametrize("part", ["val", "test"])
def test_r12_the_same_picture_under_two_names_is_refused(presplit: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(presplit, tmp_path / "data")
    target = next((tmp_path / "data" / part / "CT").iterdir())
    shutil.copy(tmp_path / "data" / "train" / "CT" / "patient_002_slice_01.png", target)
    with pytest.raises(DataError) as caught:
        build(tmp_path / "data", "fusion=2way")
    assert caught.value.code == "split_leak"
    assert "patient_002_slice_01.png" in caught.value.where
    assert target.name in caught.value.where


def test_slices_of_air_are_no_copies(presplit: Path, tmp_path: Path) -> None:
    shutil.copytree(presplit, tmp_path / "data")
    for part in ("train", "val"):
        Image.new("L", (32, 32)).save(next((tmp_path / "data" / part / "CT").iterdir()))
    assert len(build(tmp_path / "data", "fusion=2way").train) == 8


def test_all_bad_masks_are_told_before_anything_is_trained(presplit: Path, tmp_path: Path) -> None:
    shutil.copytree(presplit, tmp_path / "data")
    bad = [tmp_path / "data" / "train" / "masks" / f"patient_00{n}_slice_00.png" for n in (1, 2)]
    for path in bad:
        Image.fromarray(np.full((32, 32), 100, np.uint8)).save(path)
    with pytest.raises(DataError) as caught:
        build(tmp_path / "data", "fusion=2way")
    assert all(path.name in caught.value.where for path in bad)
    assert "--mask-threshold" in caught.value.fix
    assert (
        build(tmp_path / "data", "fusion=2way", mask_threshold=50).data_facts["counts"]["train"]["n_with_lesion"] == 8
    )


def test_digests_follow_the_files_and_the_split(presplit: Path, tmp_path: Path, job: SegmentJob) -> None:
    shutil.copytree(presplit, tmp_path / "data")  # keeps the times
    copy = build(tmp_path / "data", "fusion=2way").data_facts
    assert copy["data_digest"] == job.data_facts["data_digest"]
    os.utime(tmp_path / "data" / "val" / "PET" / "patient_003_slice_00.png")
    changed = build(tmp_path / "data", "fusion=2way").data_facts
    assert changed["data_digest"] != copy["data_digest"]
    assert changed["split_digest"] == copy["split_digest"]


# --- what the network sees -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two colour slices of 37 x 50 pixels, as exports of a viewer are."""
    root = tmp_path_factory.mktemp("odd") / "val"
    rng = np.random.default_rng(3)
    for kind in ("CT", "PET", "masks"):
        (root / kind).mkdir(parents=True)
        for number in range(2):
            shape = (37, 50) if kind == "masks" else (37, 50, 3)
            picture = rng.integers(0, 256, shape).astype(np.uint8)
            picture = 255 * (picture > 200).astype(np.uint8) if kind == "masks" else picture
            Image.fromarray(picture).save(root / kind / f"p1_slice_{number}.png")
    return root


class Pairs:
    """Slices as inference reads them."""

    spacing = (1.0, 1.0)
    available_S = np.ones(2, bool)

    def __init__(self, folder: Path) -> None:
        self.triples = read_ct_pet(folder, masks=False).parts["all"]

    def __len__(self) -> int:
        return len(self.triples)

    def scaled(self, index: int) -> np.ndarray:
        return read_pair(self.triples[index])


def test_c01_c02_training_and_inference_see_the_same_pixels(odd: Path) -> None:
    source = CtPetSource(read_ct_pet(odd).parts["all"])
    loader = build_labelled_loader(source, batch_size=2, seed=0)
    batch = next(loader)
    for name, image in zip(batch.case_ids, batch.images_BSHW.numpy(), strict=True):
        pair = next(t for t in Pairs(odd).triples if t.name == name)
        np.testing.assert_allclose(image, read_pair(pair), atol=1e-6)
    grey = np.asarray(Image.open(odd / "CT" / "p1_slice_0.png").convert("L")) / np.float32(255)
    np.testing.assert_allclose(source[(0, 0)].image_SHW[0].numpy(), grey, atol=1e-6)


def test_c01_validation_and_inference_give_the_same_probabilities(odd: Path, job: SegmentJob) -> None:
    card = {"task": "ct-pet", "classes": job.classes, "outputs": 1, **job.card}
    job.network.eval()
    segmenter = segmenter_of(odd, card, job.network, CPU)
    with torch.no_grad():
        inferred = list(segment_planes(segmenter, Pairs(odd), InferSegmentConfig()))
        batch = next(ordered_batches(CtPetSource(read_ct_pet(odd).parts["all"]), 2))
        validated = logits_of(job.network, batch, 0.5, 0.5).sigmoid().numpy()
    job.network.train()
    np.testing.assert_allclose(np.stack(inferred), validated, atol=1e-5)


def test_views_are_seeded_by_their_place_and_reach_from_minus_1_to_1(presplit: Path) -> None:
    job = build(presplit, "fusion=2way", "augment.affine_prob=1")
    batch = next(build_labelled_loader(job.train, batch_size=4, seed=0))
    one, same, other = (job.views(batch, step, 0) for step in (3, 3, 4))
    assert torch.equal(one.images_BSHW, same.images_BSHW)
    assert torch.equal(one.label_map_BHW, same.label_map_BHW)
    assert not torch.equal(one.images_BSHW, other.images_BSHW)
    assert -1 <= float(one.images_BSHW.min()) < -0.5
    assert 0.2 < float(one.images_BSHW.max()) <= 1
    assert set(one.label_map_BHW.unique().tolist()) <= {0, 1, 255}


# --- validation ------------------------------------------------------------------------------------------------------


class PetAsLogit(nn.Module):
    """Logits that are a line in PET."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(4.0))

    def forward(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> Tensor:
        return images_BSHW[:, 1:] * self.slope - 0.4


def test_c13_figures_are_means_over_images_as_scikit_learn_gives_them(tmp_path: Path) -> None:
    root = write_discs(tmp_path / "val", {"": 5}, side=24, seed=4)
    name = sorted((root / "masks").iterdir())[2]
    Image.new("L", (24, 24)).save(name)  # an image without a lesion, in which the network sees one
    source = CtPetSource(read_ct_pet(root).parts["all"])
    loss = SegmentationLoss(SegmentationLossConfig(), 1)
    found = Validation(source, loss, CtPetConfig(bs=2), 0.5, 0.5)(PetAsLogit())
    rows: dict[float, list[float]] = {round(0.2 + 0.05 * step, 2): [] for step in range(9)}
    ious, bces, dices = [], [], []
    for index in range(5):
        sample = source[(0, index)]
        logit = (sample.image_SHW[1].double().numpy() * 2 - 1) * 4 - 0.4
        probability, true = 1 / (1 + np.exp(-logit)), sample.label_HW.numpy().ravel()
        for threshold, values in rows.items():
            values.append(f1_score(true, (probability >= threshold).ravel(), zero_division=1.0))
        ious.append(jaccard_score(true, (probability >= 0.5).ravel(), zero_division=1.0))
        flat = probability.ravel()
        bces.append(-np.mean(true * np.log(flat) + (1 - true) * np.log(1 - flat)))
        dices.append(1 - (2 * (flat * true).sum() + 1e-6) / (flat.sum() + true.sum() + 1e-6))
    means = {threshold: float(np.mean(values)) for threshold, values in rows.items()}
    assert found["val_dice"] == pytest.approx(means[0.5], abs=1e-9) == found["val_f1"]
    assert found["val_iou"] == pytest.approx(np.mean(ious), abs=1e-9)
    assert found["val_best_dice"] == pytest.approx(max(means.values()), abs=1e-9) == found["score"]
    assert means[found["val_best_threshold"]] == pytest.approx(max(means.values()), abs=1e-9)
    assert found["val_loss"] == pytest.approx(0.5 * np.mean(bces) + 0.5 * np.mean(dices), abs=1e-6)
    assert [row["threshold"] for row in found["threshold_results"]] == list(means)
    assert [row["dice"] for row in found["threshold_results"]] == pytest.approx(list(means.values()), abs=1e-9)


def test_figures_do_not_depend_on_the_batch_and_the_network_stays_as_it_was(presplit: Path) -> None:
    source = CtPetSource(read_ct_pet(presplit).parts["val"])
    loss = SegmentationLoss(SegmentationLossConfig(), 1)
    network = PetAsLogit().eval()
    one, four = (Validation(source, loss, CtPetConfig(bs=bs), 0.5, 0.5)(network) for bs in (1, 4))
    assert one["val_loss"] == pytest.approx(four["val_loss"], abs=1e-7)
    assert {key: value for key, value in one.items() if key != "val_loss"} == {
        key: value for key, value in four.items() if key != "val_loss"
    }
    assert float(network.slope.detach()) == 4.0
    assert network.slope.grad is None


def test_hd95_is_of_the_images_in_which_it_is_defined(tmp_path: Path) -> None:
    for kind in ("CT", "PET", "masks"):
        (tmp_path / kind).mkdir()
    square = np.zeros((24, 24), np.uint8)
    square[8:16, 8:16] = 255
    for number, mask in enumerate((square, np.zeros_like(square))):
        for kind, picture in (("CT", square), ("PET", np.roll(square, 3, 1)), ("masks", mask)):
            Image.fromarray(picture).save(tmp_path / kind / f"p{number}_slice_0.png")
    source = CtPetSource(read_ct_pet(tmp_path).parts["all"])
    loss = SegmentationLoss(SegmentationLossConfig(), 1)
    found = Validation(source, loss, CtPetConfig(), 0.5, 0.5)(PetAsLogit())
    assert found["val_hd95"] == 3.0  # a square moved by three pixels; the second image has no reference
    without = Validation(source, loss, CtPetConfig(val_hd95=False), 0.5, 0.5)(PetAsLogit())
    assert without["val_hd95"] is None


def test_overlays_show_reference_and_prediction(presplit: Path, tmp_path: Path) -> None:
    source = CtPetSource(read_ct_pet(presplit).parts["val"])
    Overlays(source, 0.5, 0.5)(PetAsLogit(), tmp_path)
    pictures = sorted(tmp_path.iterdir())
    assert [path.name for path in pictures] == [source.case_id(index) for index in range(4)]
    picture = np.asarray(Image.open(pictures[0]))
    assert picture.shape == (26 + 256, 4 * 256 + 3 * 4, 3)  # captions; CT, CT with masks, PET, PET with masks
    colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    assert {REFERENCE, label_colour(0)} <= colours
    lower = tmp_path / "lower"
    lower.mkdir()
    Overlays(source, 0.5, 0.5)(PetAsLogit(), lower, 0.2)
    filled = [_filled(np.asarray(Image.open(folder / pictures[0].name))) for folder in (tmp_path, lower)]
    assert filled[1] > filled[0] > 0  # more pixels count from a lower threshold on


def _filled(picture: np.ndarray) -> int:
    """Pixels of the last panel that are not grey."""
    panel = picture[26:, -256:].astype(int)
    return int((panel.max(-1) != panel.min(-1)).sum())


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_acceptance_a_bright_disc_in_pet_is_learned_in_a_short_run(tmp_path: Path) -> None:
    """Section 12.2: val Dice above 0.8, well above an untrained network and an all-foreground mask."""
    root = write_discs(tmp_path / "data", {"train": 64, "val": 16}, side=64)
    result = segment(asked(root, epochs=3, lr=1e-3, workers=0, device="cpu", out=tmp_path / "run"))
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    untrained = build(root)
    before = untrained.validate(untrained.network.eval())
    masks = [np.asarray(Image.open(path)) > 0 for path in (root / "val" / "masks").iterdir()]
    foreground = float(np.mean([2 * mask.sum() / (mask.sum() + mask.size) for mask in masks]))
    assert history["val_dice"][-1] > 0.8
    assert history["val_dice"][-1] > before["val_best_dice"] + 0.3
    assert history["val_dice"][-1] > foreground + 0.3
    card = json.loads((tmp_path / "run" / "model.json").read_text())
    assert card["vgg_weights"] == "random"
    assert card["threshold"] == card["val"]["val_best_threshold"]
    assert result.facts["best"]["val_best_dice"] > 0.8


@pytest.mark.slow
def test_two_processes_train_as_one(presplit: Path, tmp_path: Path) -> None:
    """DDP over gloo: the same samples in each update, so the same losses but for rounding."""
    still = [f"augment.{name}=0" for name in ("horizontal_flip", "vertical_flip", "affine_prob", "elastic_prob")]
    still += ["augment.brightness_contrast_prob=0", "augment.noise_prob=0", "fusion=2way"]
    common: dict[str, Any] = {"epochs": 2, "workers": 0, "device": "cpu", "lr": 1e-3}
    segment(asked(presplit, *still, batch_size=4, out=tmp_path / "one", **common))
    segment(asked(presplit, *still, batch_size=2, gpus=2, out=tmp_path / "two", **common))
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    for key in ("train_loss", "train_dice", "val_loss", "val_dice", "lr"):
        assert one[key] == pytest.approx(two[key], rel=2e-3), key
    assert json.loads((tmp_path / "two" / "run.json").read_text())["status"] == "finished"
