from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from constructed import survivors
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from medssl_cli.core.run import RESEARCH_NOTE
from medssl_cli.core.volume import AXIAL
from medssl_cli.data.datasets import DataConfig, SliceDataset, prepare_store
from medssl_cli.data.images import write_image
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.data.transforms import resize_crops
from medssl_cli.data.views import normalize
from medssl_cli.services.backbone import Backbone, open_backbone, read_planes
from medssl_cli.services.case_input import Wanted, found_case, named_cases
from medssl_cli.services.heatmaps import InferConfig, Seen, heat_of_all, look, on_pixels
from medssl_cli.services.infer import InferRequest, infer
from medssl_cli.services.lookup import find_model

WriteRun = Callable[..., Path]
BRIGHT = (8, 32, 3)
"""First voxel (y, x, z) of the planted patch in RAS: row 1 and column 4 of patches of 8 pixels, slice 3."""


def see_brightness(model: Any) -> None:
    """Every token looks at the brightest patch; blocks change nothing, positions add nothing."""
    embedding = model.patch_embed.proj
    for parameter in model.parameters():
        parameter.zero_()
    embedding.weight[0] = 1 / embedding.weight[0].numel()
    embedding.bias[1], embedding.bias[2] = 1.0, -1.0
    model.norm.weight.fill_(1)
    for block in model.flat_blocks():
        block.norm1.weight.fill_(1)
        block.attn.qkv.bias[0] = 6.0  # the first query of every token
        block.attn.qkv.weight[32, 0] = 1.0  # the first key is the brightness


def keep_patches(model: Any) -> None:
    """Patch tokens depend on nothing but their own patch."""
    for block in model.flat_blocks():
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    model.pos_embed.zero_()


def noise(shape: tuple[int, int, int] = (48, 32, 5), seed: int = 0) -> np.ndarray:
    """(X, Y, Z) int16."""
    return np.random.default_rng(seed).integers(100, 140, shape).astype(np.int16)


def planted(seed: int = 0) -> np.ndarray:
    array = noise(seed=seed)
    y, x, z = BRIGHT
    array[x : x + 8, y : y + 8, z] += 900
    return array


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None, codes: str = "RAS") -> Path:
    """Write a RAS array in another orientation, turned by nibabel."""
    affine = np.diag([1.0, 1.0, 3.0, 1.0]) if affine is None else affine
    image = nib.Nifti1Image(array, affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def oblique() -> np.ndarray:
    """RAS, turned by 20 degrees about x and 12 about z, pixels of 1 mm and slices of 3 mm, off centre."""
    a, b = np.deg2rad([20, 12])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag([1.0, 1.0, 3.0])
    affine[:3, 3] = -31.5, 12.25, 40.0
    return affine


def run_infer(out: Path, run: Path, *cases: Path, **more: Any) -> list[dict[str, Any]]:
    request = InferRequest(cases=tuple(map(str, cases)), model=run, out=out, device="cpu", **more)
    return infer(request).facts["cases"]


def backbone_of(run: Path) -> Backbone:
    return open_backbone(find_model(run), torch.device("cpu"))


def strict(path: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def run_t2(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Path:
    return write_run(tmp_path_factory.mktemp("t2") / "run", ("ax_t2wi",))


@pytest.fixture(scope="module")
def run_bright(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Path:
    return write_run(tmp_path_factory.mktemp("bright") / "run", ("ax_t2wi", "ax_adc"), edit=see_brightness)


@pytest.fixture(scope="module")
def run_pictures(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Path:
    return write_run(tmp_path_factory.mktemp("pictures") / "run", None)


# --- the right place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [np.diag([1.0, 1.0, 3.0, 1.0]), oblique()], ids=["straight", "oblique"])
@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "RPI", "PSR", "ASL"])
def test_t16_heat_lies_at_the_planted_place(codes: str, affine: np.ndarray, run_bright: Path, tmp_path: Path) -> None:
    """The patch is bright in the second sequence only; flips, swapped axes and sequences must all show."""
    flat = save(tmp_path / "P1/ax_t2wi.nii.gz", noise(), affine, codes)
    save(tmp_path / "P1/ax_adc.nii.gz", planted(), affine, codes)
    (summary,) = run_infer(tmp_path / "out", run_bright, flat.parent, heatmap=True)
    source, heat = nib.load(flat), nib.load(tmp_path / "out/heatmap.nii.gz")
    assert heat.shape == source.shape
    np.testing.assert_array_equal(heat.affine, source.affine)
    assert heat.get_data_dtype() == np.float32
    voxel = np.unravel_index(np.asarray(heat.dataobj).argmax(), heat.shape)
    here = np.linalg.inv(affine) @ heat.affine @ [*voxel, 1]  # back on the straight RAS grid
    y, x, z = BRIGHT
    assert x <= here[0] <= x + 7, here
    assert y <= here[1] <= y + 7, here
    assert here[2] == pytest.approx(z, abs=1e-4)
    best = summary["top_slices"][0]
    assert best["slice_index"] == z
    assert np.asarray(heat.dataobj)[tuple(best["peak_voxel"])] == np.asarray(heat.dataobj).max()
    np.testing.assert_allclose(best["peak_mm"], (heat.affine @ [*best["peak_voxel"], 1])[:3], atol=0.006)


@pytest.mark.parametrize("prepared", ["LPS", "RAI"])
def test_t16_any_prepared_orientation(prepared: str, tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", ("ax_t2wi",), f"data.preprocess.orientation={prepared}", edit=see_brightness)
    file = save(tmp_path / "ax_t2wi.nii", planted())
    (summary,) = run_infer(tmp_path / "out", run, file, heatmap=True)
    i, j, k = summary["top_slices"][0]["peak_voxel"]
    y, x, z = BRIGHT
    assert (k, x <= i < x + 8, y <= j < y + 8) == (z, True, True)
    assert summary["orientation"] == prepared


def test_heat_of_a_resampled_grid_comes_back_to_the_file(tmp_path: Path, write_run: WriteRun) -> None:
    resample = "data.preprocess.resample_mm=[2.0,1.0,1.0]"
    run = write_run(tmp_path / "run", ("ax_t2wi",), resample, edit=see_brightness)
    file = save(tmp_path / "ax_t2wi.nii.gz", planted(), oblique(), "LAS")
    (summary,) = run_infer(tmp_path / "out", run, file, heatmap=True)
    source, heat = nib.load(file), nib.load(tmp_path / "out/heatmap.nii.gz")
    assert heat.shape == source.shape
    np.testing.assert_array_equal(heat.affine, source.affine)
    voxel = np.unravel_index(np.asarray(heat.dataobj).argmax(), heat.shape)
    x, y, z, _ = np.linalg.inv(oblique()) @ heat.affine @ [*voxel, 1]
    assert abs(x - (BRIGHT[1] + 3.5)) <= 4
    assert abs(y - (BRIGHT[0] + 3.5)) <= 4
    assert abs(z - BRIGHT[2]) <= 1
    assert summary["num_slices"] == 8  # 15 mm of slices at 2 mm


def test_the_reference_sequence_gives_the_grid(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", ("ax_t2wi", "ax_adc"), "data.preprocess.reference=ax_adc", edit=see_brightness)
    save(tmp_path / "P1/ax_t2wi.nii.gz", noise())
    coarse = np.diag([2.0, 2.0, 3.0, 1.0])
    file = save(tmp_path / "P1/ax_adc.nii.gz", noise((24, 16, 5)), coarse, "LAS")
    run_infer(tmp_path / "out", run, file.parent, heatmap=True)
    heat = nib.load(tmp_path / "out/heatmap.nii.gz")
    assert heat.shape == (24, 16, 5)
    np.testing.assert_array_equal(heat.affine, nib.load(file).affine)


def test_heat_of_a_picture_lies_on_its_own_pixels(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", None, "data.preprocess.picture_side=32", edit=see_brightness)
    picture = np.random.default_rng(0).integers(0, 40, (64, 96, 3)).astype(np.uint8)
    picture[16:32, 64:80] = 220
    write_image(tmp_path / "eye.png", picture)
    (summary,) = run_infer(tmp_path / "out", run, tmp_path / "eye.png", heatmap=True)
    heat = np.load(tmp_path / "out/heatmap.npy")
    assert heat.shape == (64, 96)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert 16 <= row < 32
    assert 64 <= column < 80
    assert summary["heatmap"] == "heatmap.npy"
    assert (
        np.abs(np.subtract(summary["top_slices"][0]["peak_pixel"], (row, column))).max() <= 2
    )  # found on the reduced picture
    assert not (tmp_path / "out/heatmap.nii.gz").exists()


# --- the right numbers -----------------------------------------------------------------------------------------------


def test_a_slice_is_scaled_and_normalised_as_in_training(tmp_path: Path, write_run: WriteRun) -> None:
    overrides = ("crops.mean=0.4", "crops.std=0.3", "data.preprocess.adc_scale=fixed")
    run = write_run(tmp_path / "run", ("ax_t2wi", "ax_adc", "ax_dwi"), *overrides)
    sequences = {}
    for seed, name in enumerate(("ax_t2wi", "ax_adc")):
        file = save(tmp_path / f"P1/{name}.nii.gz", planted(seed)[:32] * (seed + 1), None, "LAS")
        sequences[name] = Sequence(name, file)
    case = Case("P1", "P1", sequences)
    data = DataConfig(spatial_size=32, split="VAL", preprocess=PreprocessConfig(adc_scale="fixed"))
    dataset = SliceDataset(prepare_store([case], data, tmp_path / "cache", kind="volumes"), data, seed=0)
    sample = dataset[0, 0]
    backbone = backbone_of(run)
    planes = read_planes(case, backbone)
    assert sample.axis == AXIAL
    np.testing.assert_array_equal(planes.scaled(sample.index), sample.image_SHW.numpy())
    np.testing.assert_array_equal(planes.available_S, sample.available_S.numpy())
    size = backbone.network_size(planes.size, planes.spacing, 518)
    assert size == (32, 32)
    seen = backbone.to_network(planes.batch(np.array([sample.index])), size)
    torch.testing.assert_close(seen[0], normalize(sample.image_SHW, 0.4, 0.3), rtol=0, atol=0)


@pytest.mark.parametrize("side", [24, 48])
def test_slices_are_resized_as_training_resizes_crops(side: int, run_t2: Path) -> None:
    backbone = backbone_of(run_t2)
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0, 0, 32, 32]] * 2)
    crops = resize_crops(images, boxes, np.zeros(2, bool), side)
    expected = normalize(crops, backbone.mean, backbone.std)
    found = backbone.to_network(images.numpy(), (side, side))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_network_size_keeps_the_scale_of_training(run_t2: Path, run_pictures: Path) -> None:
    backbone = backbone_of(run_t2)  # window of 32 pixels, patches of 8
    assert backbone.network_size((384, 384), (0.5, 0.5), 518) == (384, 384)
    assert backbone.network_size((20, 16), (1, 1), 518) == (32, 24)  # enlarged to the window; 25.6 -> 24
    assert backbone.network_size((40, 40), (2, 1), 518) == (80, 40)  # square pixels
    assert backbone.network_size((600, 1200), (1, 1), 518) == (256, 512)
    assert backbone.network_size((1200, 3), (1, 1), 518) == (512, 8)
    assert backbone_of(run_pictures).network_size((21, 16), (1, 1), 518) == (24, 16)


def test_missing_sequence_counts_for_nothing(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", ("ax_t2wi", "ax_adc"))
    file = save(tmp_path / "P1/ax_t2wi.nii.gz", planted())
    (summary,) = run_infer(tmp_path / "out", run, file.parent, heatmap=True)
    assert summary["missing_sequences"] == ["ax_adc"]
    assert "Missing: ax_adc" in (tmp_path / "out/report.html").read_text()
    backbone = backbone_of(run)
    planes = read_planes(Case("P1", "P1", {"ax_t2wi": Sequence("ax_t2wi", file)}), backbone)
    images = backbone.to_network(planes.batch(np.arange(5)), (32, 48))
    with torch.no_grad():
        images[:, 1] = torch.randn(images[:, 1].shape)  # whatever lies there
        expected = backbone.model(images, None, torch.tensor([[True, False]] * 5)).cls_BD
    np.testing.assert_allclose(np.load(tmp_path / "out/slice_embeddings.npy"), expected.numpy(), atol=1e-5)


def test_t15_channels_follow_the_names_in_the_model(tmp_path: Path, write_run: WriteRun) -> None:
    embed = "student.use_mri_seq_embed=true"

    def swap(model: Any) -> None:
        model.seq_embed.copy_(model.seq_embed.flip(0))

    one = write_run(tmp_path / "one", ("ax_t2wi", "ax_adc"), embed)
    other = write_run(tmp_path / "other", ("ax_adc", "ax_t2wi"), embed, edit=swap)
    wrong = write_run(tmp_path / "wrong", ("ax_adc", "ax_t2wi"), embed)
    for seed, name in enumerate(("ax_t2wi", "ax_adc")):
        save(tmp_path / f"P1/{name}.nii.gz", planted(seed))
    found = {}
    for run in (one, other, wrong):
        run_infer(tmp_path / f"out_{run.name}", run, tmp_path / "P1")
        found[run.name] = np.load(tmp_path / f"out_{run.name}/slice_embeddings.npy")
    np.testing.assert_allclose(found["one"], found["other"], atol=1e-5)
    assert np.abs(found["one"] - found["wrong"]).max() > 1e-3


def test_similarity_is_one_at_the_reference_and_its_planted_twin(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", ("ax_t2wi", "ax_adc"), edit=keep_patches)
    for seed, name in enumerate(("ax_t2wi", "ax_adc")):
        array = noise(seed=seed)
        array[40:48, 8:16, 2] = array[24:32, 16:24, 2]  # row 1, column 5 as row 2, column 3
        save(tmp_path / f"P1/{name}.nii.gz", array)
    (summary,) = run_infer(
        tmp_path / "out", run, tmp_path / "P1", heatmap=True, overrides=("heatmap_method=similarity",)
    )
    similarity = np.load(tmp_path / "out/similarity_map.npy")
    assert similarity.shape == (4, 6)
    assert summary["similarity_reference_patch"] == [4 // 2, 6 // 2]
    assert summary["similarity_slice_index"] == 2
    assert [tuple(place) for place in np.argwhere(similarity == 1.0)] == [(1, 5), (2, 3)]
    heat = np.asarray(nib.load(tmp_path / "out/heatmap.nii.gz").dataobj)
    assert summary["top_slices"][0]["slice_index"] == 2
    assert heat.max() <= 1.0
    assert np.unravel_index(heat.argmax(), heat.shape)[2] == 2


def test_similarity_slice_and_patch_can_be_named(tmp_path: Path, run_t2: Path) -> None:
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    keys = ("sim_slice=3", "sim_patch=[1,4]", "stride=2")
    (summary,) = run_infer(tmp_path / "out", run_t2, file, overrides=keys)
    assert (summary["similarity_slice_index"], summary["similarity_reference_patch"]) == (3, [1, 4])
    assert list(np.load(tmp_path / "out/slice_indices.npy")) == [0, 2, 3, 4]
    assert np.load(tmp_path / "out/similarity_map.npy")[1, 4] == 1.0
    keys = ("sim_slice=-1", "sim_patch=1,4")  # as `medssl extract` takes them
    (summary,) = run_infer(tmp_path / "out", run_t2, file, overrides=keys)
    assert (summary["similarity_slice_index"], summary["similarity_reference_patch"]) == (2, [1, 4])
    (middle,) = run_infer(tmp_path / "out", run_t2, file)
    (summary,) = run_infer(tmp_path / "out", run_t2, file, overrides=("sim_patch=center",))
    assert summary["similarity_reference_patch"] == middle["similarity_reference_patch"]
    for key, code in (("sim_slice=5", "sim_slice_outside"), ("sim_patch=[4,0]", "sim_patch_outside")):
        with pytest.raises(DataError) as caught:
            run_infer(tmp_path / "out", run_t2, file, overrides=(key,))
        assert caught.value.code == code
        assert "0 to" in caught.value.where


def test_the_map_is_the_same_for_any_batch_size(run_t2: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    backbone = backbone_of(run_t2)
    planes = read_planes(Case("a", "a", {"ax_t2wi": Sequence("ax_t2wi", file)}), backbone)
    one, three = (look(planes, backbone, InferConfig(batch_size=size), heatmap=True) for size in (1, 3))
    np.testing.assert_allclose(one.cls_ND, three.cls_ND, atol=1e-5)
    np.testing.assert_allclose(one.heat_Nhw, three.heat_Nhw, atol=1e-5)
    assert one.heat_Nhw is not None
    np.testing.assert_allclose(one.heat_Nhw.mean((1, 2)), 1.0, atol=1e-5)  # 1 is the average of each slice


def test_stride_looks_at_every_nth_slice_and_fills_between(run_t2: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    (every,) = run_infer(tmp_path / "every", run_t2, file, heatmap=True)
    (second,) = run_infer(tmp_path / "second", run_t2, file, heatmap=True, overrides=("stride=2",))
    assert (every["num_slices"], second["num_slices"]) == (5, 3)
    assert {entry["slice_index"] for entry in second["top_slices"]} == {0, 2, 4}
    full, half = (nib.load(tmp_path / name / "heatmap.nii.gz").get_fdata() for name in ("every", "second"))
    np.testing.assert_allclose(half[..., ::2], full[..., ::2], atol=1e-5)
    np.testing.assert_allclose(half[..., 3], (full[..., 2] + full[..., 4]) / 2, atol=1e-5)


def test_heat_beyond_the_last_slice_is_kept() -> None:
    heat = np.arange(2, dtype=np.float32)[:, None, None]
    seen = Seen(np.zeros((2, 1)), np.array([0, 3]), heat, np.ones((1, 1)), 0, (0, 0), (8, 8))
    np.testing.assert_allclose(heat_of_all(seen, 5)[:, 0, 0], [0, 1 / 3, 2 / 3, 1, 1], atol=1e-6)


def test_a_patch_value_lies_at_the_middle_of_its_patch() -> None:
    pixels = on_pixels(np.array([[[0.0, 1.0]]]), (5, 10))[0]
    np.testing.assert_allclose(
        pixels[0], np.clip((np.arange(10) - 2) / 5, 0, 1), atol=1e-6
    )  # centres at pixels 2 and 7


def test_padding_slices_are_cold_and_not_ranked(run_t2: Path, tmp_path: Path) -> None:
    array = planted()
    array[..., 0] = 0
    file = save(tmp_path / "ax_t2wi.nii.gz", array)
    (summary,) = run_infer(tmp_path / "out", run_t2, file, heatmap=True, top_k=99)
    assert sorted(entry["slice_index"] for entry in summary["top_slices"]) == [1, 2, 3, 4]
    assert not np.asarray(nib.load(tmp_path / "out/heatmap.nii.gz").dataobj)[..., 0].any()


def test_top_slices_are_the_hottest_in_order(run_t2: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "ax_t2wi.nii.gz", planted(), None, "LPI")
    (summary,) = run_infer(tmp_path / "out", run_t2, file, heatmap=True, top_k=3)
    heat = np.asarray(nib.load(tmp_path / "out/heatmap.nii.gz").dataobj)
    scores = [np.quantile(heat[..., k], 0.99) for k in range(5)][::-1]  # the file counts slices from the top
    order = np.argsort(scores)[::-1][:3]
    assert [entry["slice_index"] for entry in summary["top_slices"]] == list(order)
    np.testing.assert_allclose([entry["score"] for entry in summary["top_slices"]], np.array(scores)[order], rtol=1e-5)


# --- what may be named -----------------------------------------------------------------------------------------------


def test_a_file_is_told_by_its_name_or_taken_as_the_reference_with_a_line(
    tmp_path: Path, write_run: WriteRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "run", ("ax_t2wi", "ax_adc", "ax_dwi"), "data.preprocess.reference=ax_adc")
    for name in ("ax_dwi_b1400", "scan", "ax_t2wi_2"):
        save(tmp_path / f"{name}.nii.gz", planted())
    (summary,) = run_infer(tmp_path / "1", run, tmp_path / "ax_dwi_b1400.nii.gz")
    assert list(summary["inputs"]) == ["ax_dwi"]
    (summary,) = run_infer(tmp_path / "2", run, tmp_path / "ax_t2wi_2.nii.gz")
    assert list(summary["inputs"]) == ["ax_t2wi"]
    assert "is taken as" not in caplog.text
    (summary,) = run_infer(tmp_path / "3", run, tmp_path / "scan.nii.gz")
    assert list(summary["inputs"]) == ["ax_adc"]
    assert "scan is taken as ax_adc, the model's reference sequence" in caplog.text
    (summary,) = run_infer(tmp_path / "4", run, tmp_path / "scan.nii.gz", sequence="ax_t2wi")
    assert list(summary["inputs"]) == ["ax_t2wi"]
    with pytest.raises(ConfigError) as caught:
        run_infer(tmp_path / "5", run, tmp_path / "scan.nii.gz", sequence="flair")
    assert caught.value.code == "sequence_unknown"
    assert "ax_t2wi, ax_adc, ax_dwi" in caught.value.where
    with pytest.raises(ConfigError, match="--sequence tells"):
        run_infer(tmp_path / "5", run, tmp_path, sequence="ax_adc")


def test_one_volume_of_a_4d_diffusion_file(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", ("ax_dwi",))
    file = tmp_path / "ax_dwi.nii.gz"
    nib.save(nib.Nifti1Image(np.stack([noise(), planted()], -1), np.diag([1.0, 1, 3, 1])), file)
    with pytest.raises(DataError, match="b-value"):
        run_infer(tmp_path / "out", run, file)
    (tmp_path / "ax_dwi.bval").write_text("0 1400")
    run_infer(tmp_path / "out", run, file)
    save(tmp_path / "alone/ax_dwi.nii.gz", planted())
    run_infer(tmp_path / "out2", run, tmp_path / "alone")
    np.testing.assert_array_equal(*(np.load(tmp_path / name / "slice_embeddings.npy") for name in ("out", "out2")))


def test_grey_pictures_and_colour_normalisation(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", None, "crops.mean=[0.5,0.4,0.3]", "crops.std=[0.2,0.2,0.1]")
    grey = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    write_image(tmp_path / "grey.png", grey)
    write_image(tmp_path / "colour.png", np.repeat(grey[..., None], 3, axis=2))
    for name in ("grey", "colour"):
        run_infer(tmp_path / name, run, tmp_path / f"{name}.png")
    a, b = (np.load(tmp_path / name / "slice_embeddings.npy") for name in ("grey", "colour"))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert a.shape == (1, 32)


def test_volumes_and_pictures_are_not_mixed_up(
    tmp_path: Path, run_t2: Path, run_pictures: Path, write_run: WriteRun, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8))
    with pytest.raises(DataError) as caught:
        run_infer(tmp_path / "out", run_t2, tmp_path / "a.png")
    assert caught.value.code == "case_kind"
    (summary,) = run_infer(tmp_path / "out", run_pictures, save(tmp_path / "v.nii.gz", planted()), heatmap=True)
    assert summary["num_slices"] == 5
    assert "learned from pictures" in caplog.text
    grey_only = write_run(tmp_path / "grey", None, in_chans=1)
    with pytest.raises(DataError) as caught:
        run_infer(tmp_path / "out", grey_only, tmp_path / "a.png")
    assert caught.value.code == "picture_channels"


def test_a_table_is_a_batch(tmp_path: Path, run_bright: Path) -> None:
    for case in ("P1", "P2"):
        for name in ("ax_t2wi", "ax_adc"):
            save(tmp_path / f"cases/{case}/{name}.nii.gz", planted())
    rows = [f"{case},{case}/{name}.nii.gz" for case in ("P1", "P2") for name in ("ax_t2wi", "ax_adc")]
    table = tmp_path / "cases/cases.csv"
    table.write_text("case_id,path\n" + "\n".join(rows).replace("P2,P2/ax_adc", "P2,P2/ax_adc"))
    names = [summary["case_id"] for summary in run_infer(tmp_path / "out", run_bright, table)]
    assert names == ["P1", "P2"]
    assert strict(tmp_path / "out/P2/summary.json")["missing_sequences"] == []
    whole = strict(tmp_path / "out/summary.json")
    assert [entry["case_id"] for entry in whole["cases"]] == names
    table.write_text("path\n../secret/ax_t2wi.nii.gz\n")
    with pytest.raises(DataError, match="refused"):
        run_infer(tmp_path / "out", run_bright, table)


def test_a_dicom_folder_is_converted_on_the_way(
    tmp_path: Path, run_t2: Path, write_dicom: Callable[..., Any], write_run: WriteRun
) -> None:
    volume = write_dicom(tmp_path / "study/s5", size=(32, 40), Modality="MR", SeriesDescription="t2_tse_tra")
    (summary,) = run_infer(tmp_path / "out", run_t2, tmp_path / "study", heatmap=True)
    assert summary["case_id"] == "study"
    heat = nib.load(tmp_path / "out/heatmap.nii.gz")
    assert sorted(heat.shape) == sorted(volume.shape)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".nii.gz") and path.name != "heatmap.nii.gz"]
    text = (tmp_path / "out/summary.json").read_text() + (tmp_path / "out/report.html").read_text()
    assert "Doe^" not in text
    assert "PAT-1" not in text
    assert summary["inputs"] == {"ax_t2wi": f"{tmp_path / 'study'} (DICOM)"}
    write_dicom(tmp_path / "flat", size=(32, 40), per_slice=lambda k: {"PixelData": bytes(2 * 32 * 40)})
    with pytest.raises(DataError) as caught:
        run_infer(tmp_path / "out3", run_t2, tmp_path / "flat")
    assert "PAT-1" not in caught.value.where
    assert str(tmp_path / "flat") in caught.value.where
    other = write_run(tmp_path / "run", ("flair",))
    with pytest.raises(DataError) as caught:
        run_infer(tmp_path / "out2", other, tmp_path / "study")
    assert caught.value.code == "sequences_missing"


def test_what_is_no_case_is_told(tmp_path: Path, run_t2: Path, prostate_tree: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, code in (
        (tmp_path / "notes.txt", "case_unknown"),
        (tmp_path / "nothing.nii.gz", "file_missing"),
        (tmp_path / "nothing.png", "file_missing"),
        (tmp_path / "empty", "sequences_missing"),
    ):
        with pytest.raises(DataError) as caught:
            run_infer(tmp_path / "out", run_t2, path)
        assert caught.value.code == code, path
        assert path.name in caught.value.where
    with pytest.raises(DataError) as caught:
        run_infer(tmp_path / "out", run_t2, prostate_tree)
    assert "/*" in caught.value.fix
    with pytest.raises(ConfigError, match="No case"):
        run_infer(tmp_path / "out", run_t2)
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    with pytest.raises(ConfigError, match="twice"):
        run_infer(tmp_path / "out", run_t2, file, tmp_path / "." / file.name)


@pytest.mark.parametrize("fault", ["nan", "constant", "truncated", "flat"])
def test_r09_bad_images_are_named_and_leave_earlier_results(fault: str, tmp_path: Path, run_t2: Path) -> None:
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    run_infer(tmp_path / "out", run_t2, file, heatmap=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    else:
        array = {"nan": planted().astype(np.float32), "constant": 0 * planted(), "flat": planted()[..., :1]}[fault]
        if fault == "nan":
            array[3, 4, 2] = np.nan
        save(file, array)
    with pytest.raises(DataError) as caught:
        run_infer(tmp_path / "out", run_t2, file)
    assert caught.value.exit_code == 3
    assert "ax_t2wi.nii.gz" in caught.value.where
    assert caught.value.fix
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert after == {**before, ".medssl.json": after[".medssl.json"], ".lock": after[".lock"]}


# --- many cases ------------------------------------------------------------------------------------------------------


def test_r09_bad_cases_are_listed_and_the_others_complete(tmp_path: Path, run_t2: Path) -> None:
    files = [save(tmp_path / f"{name}/ax_t2wi.nii.gz", planted()) for name in ("a", "b", "c")]
    files[1].write_bytes(b"no image")
    request = InferRequest(tuple(map(str, files)), model=run_t2, out=tmp_path / "out", device="cpu", on_error="skip")
    result = infer(request)
    assert result.error is not None
    assert result.error.exit_code == 4
    assert [entry["case_id"] for entry in result.facts["cases"]] == ["a_ax_t2wi", "c_ax_t2wi"]
    with (tmp_path / "out/failures.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["case_id"], row["path"]) == ("b_ax_t2wi", str(files[1]))
    assert row["reason"]
    assert row["fix"]
    for name in ("a_ax_t2wi", "c_ax_t2wi"):
        assert (tmp_path / "out" / name / "report.html").is_file()
        assert strict(tmp_path / "out" / name / "summary.json")["num_slices"] == 5
    assert strict(tmp_path / "out/summary.json")["failures"][0]["case_id"] == "b_ax_t2wi"
    assert not list((tmp_path / "out").glob("b*"))
    save(files[1], planted())
    assert infer(request).error is None
    assert not (tmp_path / "out/failures.csv").exists()


def test_cases_of_one_name_do_not_overwrite_each_other(tmp_path: Path, run_t2: Path) -> None:
    for group in ("site1", "site2"):
        save(tmp_path / group / "P1/ax_t2wi.nii.gz", planted(seed=len(group)))
    found = run_infer(tmp_path / "out", run_t2, tmp_path / "site1/P1", tmp_path / "site2/P1")
    assert [summary["case_id"] for summary in found] == ["site1_P1", "site2_P1"]
    assert {path.parent.name for path in (tmp_path / "out").rglob("report.html")} == {"site1_P1", "site2_P1"}


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)<", "..", "...", "x" * 240, "Fall Ä ß 東京", "a\nb", "summary.json", ".hidden", "\udcff\udcfe"],
)  # fmt: skip
def test_r13_r15_odd_names_stay_inside_and_inert(name: str, tmp_path: Path, run_t2: Path) -> None:
    from medssl_cli.services.case_input import unique_names

    made = unique_names([tmp_path / name / "x.nii", tmp_path / "other" / "x.nii", tmp_path / f"{name}.nii"])
    assert len(set(made)) == 3
    for safe in made:
        assert (tmp_path / safe).resolve().parent == tmp_path.resolve()
        assert safe not in ("summary.json", "failures.csv", ".medssl.json")
        assert len(safe.encode("utf-8")) <= 255
    if name in ("..", "..."):
        return
    folder = tmp_path / "data" / name
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    folder.mkdir(parents=True)
    (folder / "ax_t2wi.nii.gz").write_bytes(file.read_bytes())
    run_infer(tmp_path / "out", run_t2, folder)
    strict(tmp_path / "out/summary.json")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    run_infer(tmp_path / "many", run_t2, folder, file)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "ax_t2wi.nii.gz", "out", "many"}


def test_two_commands_on_one_folder_are_told_apart(tmp_path: Path, run_t2: Path) -> None:
    from medssl_cli.core.run import locked

    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    with locked(tmp_path / "out", "output folder"):
        (tmp_path / "out/.medssl.json").write_text('{"command": "infer"}')
        with pytest.raises(ConfigError, match="Another process"):
            run_infer(tmp_path / "out", run_t2, file)


def test_r18_nothing_of_finished_cases_is_kept(tmp_path: Path, run_t2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = survivors(monkeypatch)
    cases = [save(tmp_path / f"P{n}/ax_t2wi.nii.gz", planted(seed=n)).parent for n in range(4)]
    run_infer(tmp_path / "out", run_t2, *cases, heatmap=True)
    assert counts == [0] * 4


# --- what is written -------------------------------------------------------------------------------------------------


def test_summary_and_files(tmp_path: Path, run_t2: Path) -> None:
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    (told,) = run_infer(tmp_path / "out", run_t2, file, heatmap=True)
    summary = strict(tmp_path / "out/summary.json")
    assert summary == json.loads(json.dumps(told, default=str))
    assert {"schema_version", "medssl_version", "command", "started_at", "elapsed_s"} <= set(summary)
    stroke = "input output_dir num_slices stride resize embedding_dim gpu_mem_mb cpu_rss_mb similarity_map"
    assert {*stroke.split(), "similarity_slice_index", "similarity_map_png", "top_slices"} <= set(summary)
    assert summary["note"] == RESEARCH_NOTE
    assert summary["gpu_mem_mb"] is None
    assert "gpu_mem_mb" in summary["null_reasons"]
    assert len(summary["model_sha256"]) == 64
    embeddings = np.load(tmp_path / "out/slice_embeddings.npy")
    assert (embeddings.shape, embeddings.dtype) == ((5, 32), np.float32)
    np.testing.assert_allclose(np.load(tmp_path / "out/embedding_mean.npy"), embeddings.mean(0), rtol=1e-6)
    assert np.load(tmp_path / "out/similarity_map.npy").dtype == np.float32
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        ".medssl.json", ".lock", "summary.json", "slice_embeddings.npy", "slice_indices.npy", "embedding_mean.npy",
        "similarity_map.npy", "similarity_map.png", "heatmap.nii.gz", "heatmap.png", "report.html",
    }  # fmt: skip


def test_a_second_run_leaves_nothing_of_the_first(tmp_path: Path, run_t2: Path) -> None:
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    run_infer(tmp_path / "out", run_t2, file, heatmap=True)
    (tmp_path / "out/.tmp-case-left").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    (summary,) = run_infer(tmp_path / "out", run_t2, file)
    assert summary["heatmap"] is None
    assert summary["top_slices"] is None
    assert {"heatmap", "top_slices"} <= set(summary["null_reasons"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"heatmap.nii.gz", "heatmap.png", ".tmp-case-left"}
    assert "mine.txt" in names


def test_a_folder_of_other_things_is_refused(tmp_path: Path, run_t2: Path) -> None:
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(ConfigError) as caught:
        run_infer(tmp_path / "out", run_t2, file)
    assert "--overwrite" in caught.value.fix
    assert (tmp_path / "out/thesis.tex").exists()


def test_overwrite_never_deletes_an_input(tmp_path: Path, run_t2: Path) -> None:
    file = save(tmp_path / "data/P1/ax_t2wi.nii.gz", planted())
    table = tmp_path / "cases.csv"
    table.write_text("case_id,path\nP1,data/P1/ax_t2wi.nii.gz\n")
    before = sorted([*tmp_path.rglob("*"), *run_t2.rglob("*")])
    for out, case in (
        (file.parent, file),
        (tmp_path, file.parent),
        (file.parent, table),
        (run_t2, file),
        (run_t2 / "export", file),
    ):
        with pytest.raises(ConfigError) as caught:
            run_infer(out, run_t2, case, overwrite=True)
        assert caught.value.code == "out_holds_source"
    assert sorted([*tmp_path.rglob("*"), *run_t2.rglob("*")]) == before


def test_overwrite_replaces_nothing_before_there_are_results(tmp_path: Path, run_t2: Path) -> None:
    from medssl_cli.core.run import locked

    out, bad, file = tmp_path / "out", tmp_path / "bad.nii.gz", save(tmp_path / "ax_t2wi.nii.gz", planted())
    bad.write_bytes(file.read_bytes()[:200])
    (out / ".tmp-mine").mkdir(parents=True)
    (out / "thesis.tex").write_text("x")
    kept = {".tmp-mine", "thesis.tex", ".lock"}
    with locked(out, "output folder"), pytest.raises(ConfigError, match="Another process"):
        run_infer(out, run_t2, file, overwrite=True)
    for cases, on_error in (((bad,), "stop"), ((bad,), "skip"), ((bad, tmp_path / "absent.nii"), "skip")):
        with pytest.raises(DataError):
            run_infer(out, run_t2, *cases, overwrite=True, on_error=on_error)
        assert {path.name for path in out.iterdir()} == kept
    run_infer(out, run_t2, bad, file, overwrite=True, on_error="skip")
    names = {path.name for path in out.iterdir()}
    assert names == {".lock", ".medssl.json", "summary.json", "failures.csv", "ax_t2wi"}
    assert (out / "ax_t2wi/report.html").is_file()


def test_no_map_is_called_a_map_of_lesions(tmp_path: Path, run_t2: Path) -> None:
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    for method in ("rollout", "similarity"):
        run_infer(tmp_path / "out", run_t2, file, heatmap=True, overrides=(f"heatmap_method={method}",))
        for name in ("summary.json", "report.html"):
            text = (tmp_path / "out" / name).read_text().lower()
            assert "no map of lesions" in text
            rest = text.replace("no map of lesions", "")
            assert "lesion" not in rest
            assert "tumour" not in rest


def test_r20_home_is_not_told(tmp_path: Path, run_t2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["medssl", "infer", str(tmp_path / "P1"), str(tmp_path / "bad.nii")])
    save(tmp_path / "P1/ax_t2wi.nii.gz", planted())
    cases = (tmp_path / "P1", tmp_path / "bad.nii")
    run_infer(tmp_path / "out", run_t2, *cases, on_error="skip")
    told = [path for path in (tmp_path / "out").rglob("*.*") if path.suffix in (".json", ".html", ".csv")]
    assert {"summary.json", "report.html", "failures.csv"} <= {path.name for path in told}
    for path in told:
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path


def test_keys_without_effect_are_refused(tmp_path: Path, run_t2: Path) -> None:
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    with pytest.raises(ConfigError, match="no effect"):
        run_infer(tmp_path / "out", run_t2, file, overrides=("heatmap_method=similarity",))
    with pytest.raises(ConfigError) as caught:
        run_infer(tmp_path / "out", run_t2, file, overrides=("strid=2", "batch_size=0"))
    assert "did you mean stride?" in caught.value.where
    assert "batch_size" in caught.value.where
    assert not (tmp_path / "out").exists()


def test_r06_nonfinite_features_stop(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", ("ax_t2wi",), edit=lambda model: model.norm.bias.fill_(float("nan")))
    with pytest.raises(NonFiniteError) as caught:
        run_infer(tmp_path / "out", run, save(tmp_path / "ax_t2wi.nii.gz", planted()))
    assert caught.value.exit_code == 5
    assert "teacher_backbone" in caught.value.where


@pytest.mark.parametrize("change", [{"mean": None}, {"std": "wide"}, {"preprocess": {"orientation": "XYZ"}}])
def test_a_card_without_preparation_is_refused(change: dict[str, Any], tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", ("ax_t2wi",), **change)
    with pytest.raises(CheckpointError) as caught:
        run_infer(tmp_path / "out", run, save(tmp_path / "ax_t2wi.nii.gz", planted()))
    assert caught.value.code == "card_incomplete"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_infer_needs_no_converter(tmp_path: Path, run_t2: Path) -> None:
    """A NIfTI case must not pay for the converter, the prepared store or training."""
    file = save(tmp_path / "ax_t2wi.nii.gz", planted())
    script = (
        "import sys\nfrom pathlib import Path\nfrom medssl_cli.services.infer import InferRequest, infer\n"
        f"infer(InferRequest(({str(file)!r},), model=Path({str(run_t2)!r}), out=Path({str(tmp_path / 'out')!r}),"
        " heatmap=True, device='cpu'))\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'blosc2', 'sklearn', 'tensorboard', 'dcm2niix', 'pandas', 'xformers'}))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert answer.stdout.strip() == "[]"


def test_a_model_of_pictures_takes_a_folder_with_one_volume_and_a_dicom_series(
    tmp_path: Path, run_pictures: Path, write_dicom: Callable[..., Any]
) -> None:
    save(tmp_path / "P1/ct.nii.gz", noise())
    (summary,) = run_infer(tmp_path / "a", run_pictures, tmp_path / "P1")
    (alone,) = run_infer(tmp_path / "b", run_pictures, tmp_path / "P1/ct.nii.gz")
    np.testing.assert_array_equal(
        np.load(tmp_path / "a/slice_embeddings.npy"), np.load(tmp_path / "b/slice_embeddings.npy")
    )
    assert summary["num_slices"] == alone["num_slices"]
    write_dicom(
        tmp_path / "study/s5", size=(32, 40), Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2",
        SeriesDescription="head", ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
    )  # fmt: skip
    (summary,) = run_infer(tmp_path / "c", run_pictures, tmp_path / "study")
    assert summary["inputs"] == {"image": f"{tmp_path / 'study'} (DICOM)"}
    save(tmp_path / "P1/mask.nii.gz", noise())
    with pytest.raises(DataError) as caught:
        run_infer(tmp_path / "d", run_pictures, tmp_path / "P1")
    assert "looked for the only volume" in caught.value.where
    write_image(tmp_path / "eyes/one.png", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(DataError) as caught:
        run_infer(tmp_path / "d", run_pictures, tmp_path / "eyes")
    assert f"name {tmp_path / 'eyes'}/*.png" in caught.value.fix


def test_one_picture_is_no_slice(tmp_path: Path, run_pictures: Path) -> None:
    write_image(tmp_path / "eye.png", np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8))
    request = InferRequest((str(tmp_path / "eye.png"),), model=run_pictures, out=tmp_path / "out", device="cpu")
    assert infer(request).lines[0].startswith("eye: one picture, ")


@pytest.mark.parametrize("slices", [False, True])
def test_only_a_model_of_photographs_is_told_to_see_slices_as_pictures(
    tmp_path: Path, slices: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "head.nii.gz", noise())
    wanted = Wanted(("image",), "image", volumes=False, slices=slices)
    with found_case(named_cases([str(path)])[0], wanted, None, tmp_path / "scratch") as case:
        assert case.sequences["image"].path == path
    assert ("learned from pictures" in caplog.text) != slices
