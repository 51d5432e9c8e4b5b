from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from constructed import (
    noise,
    read_contrast,
    run_infer,
    save,
    survivors,
    with_contrast,
    write_head,
)

from medssl_cli.core.errors import CheckpointError, ConfigError, ResourceError
from medssl_cli.core.run import RESEARCH_NOTE
from medssl_cli.data.images import write_image
from medssl_cli.metrics.calibration import wilson_interval
from medssl_cli.services import infer as infer_module
from medssl_cli.services.embedding import ExtractConfig
from medssl_cli.services.extract import ExtractRequest, extract
from medssl_cli.services.head import load_head
from medssl_cli.services.infer import InferRequest, infer
from medssl_cli.services.infer_head import lines_of
from medssl_cli.services.predictions import read_predictions

WriteRun = Callable[..., Path]
ICH = ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")


def strict(path: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Path:
    return write_run(tmp_path_factory.mktemp("model") / "run", ("ax_t2wi", "ax_adc"))


@pytest.fixture(scope="module")
def head_run(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """Six outputs, as the stroke heads have."""
    known_p = np.random.default_rng(0).random((60, 6))
    known_y = (np.random.default_rng(1).random((60, 6)) < known_p).astype(float)
    return write_head(
        tmp_path_factory.mktemp("heads") / "ich",
        run,
        task="multilabel",
        classes=ICH,
        thresholds=[0.5, 0.1, 0.9, 0.5, 0.5, 0.5],
        reliability=(known_p, known_y),
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("case") / "P1"
    save(folder / "ax_t2wi.nii.gz", noise(1))
    save(folder / "ax_adc.nii.gz", noise(2))
    return folder


# --- the right numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extraction",
    [
        ExtractConfig(),
        ExtractConfig(tokens=("cls", "mean"), layers=2, resize=24, stride=2, max_slices=2),
        ExtractConfig(slice_selection="first", max_slices=3, max_side=40),
    ],
    ids=["plain", "many", "first"],
)
def test_the_vector_of_a_case_is_the_extracted_one(
    extraction: ExtractConfig, run: Path, case: Path, tmp_path: Path
) -> None:
    keys = {key: value for key, value in extraction.model_dump().items() if value != getattr(ExtractConfig(), key)}
    words = tuple(f"{key}={json.dumps(value)}" for key, value in keys.items())
    extract(ExtractRequest(case, tmp_path / "extracted", words, run, device="cpu", cache=tmp_path / "cache"))
    expected = np.load(tmp_path / "extracted/slice_embeddings.npy")
    for pool in ("mean", "meanmax"):
        head = write_head(tmp_path / pool, run, pool=pool, extraction=extraction)
        (summary,) = run_infer(tmp_path / f"out_{pool}", head, case)
        found = np.load(tmp_path / f"out_{pool}/volume_embedding.npy")
        parts = [np.load(tmp_path / "extracted/embedding_mean.npy"), expected.max(0)][: 1 if pool == "mean" else 2]
        np.testing.assert_allclose(found, np.concatenate(parts), atol=1e-6)
        indices = [np.load(tmp_path / name / "slice_indices.npy") for name in ("extracted", f"out_{pool}")]
        np.testing.assert_array_equal(*indices)
        assert summary["num_slices"] == len(expected)
        assert summary["extraction"]["tokens"] == list(extraction.tokens)


def test_probabilities_by_hand(head_run: Path, case: Path, tmp_path: Path) -> None:
    (summary,) = run_infer(tmp_path / "out", head_run, case)
    module: Any = load_head(head_run).module
    weight, bias = (tensor.numpy().astype(np.float64) for tensor in (module.last.weight, module.last.bias))
    slices = np.load(tmp_path / "out/slice_embeddings.npy").astype(np.float64)
    expected = sigmoid(slices.mean(0) @ weight.T + bias)
    assert list(summary["probabilities"]) == list(ICH)
    np.testing.assert_allclose(list(summary["probabilities"].values()), expected, atol=1e-6)
    per_slice = np.load(tmp_path / "out/slice_probs.npy")
    assert (per_slice.shape, per_slice.dtype) == ((5, 6), np.float32)
    np.testing.assert_allclose(per_slice, sigmoid(slices @ weight.T + bias), atol=1e-6)
    limits = [0.5, 0.1, 0.9, 0.5, 0.5, 0.5]
    assert summary["predicted"] == {name: bool(p >= t) for name, p, t in zip(ICH, expected, limits, strict=True)}
    assert summary["thresholds"] == dict(zip(ICH, limits, strict=True))
    assert summary["threshold"] is None
    assert "threshold" in summary["null_reasons"]
    assert summary["threshold_source"] == "head (youden)"


def test_top_slices_by_falling_p_any_and_ties_by_index(head_run: Path, tmp_path: Path) -> None:
    for name, seed in (("ax_t2wi", 1), ("ax_adc", 2)):
        array = noise(seed)
        array[..., 3] = array[..., 1]
        save(tmp_path / f"P1/{name}.nii.gz", array)
    (summary,) = run_infer(tmp_path / "out", head_run, tmp_path / "P1", top_k=4)
    scores = np.load(tmp_path / "out/slice_probs.npy")[:, 0]
    assert scores[1] == scores[3]
    expected = sorted(range(5), key=lambda z: (-scores[z], z))[:4]
    assert [entry["slice_index"] for entry in summary["top_slices"]] == expected
    assert [entry["rank"] for entry in summary["top_slices"]] == [1, 2, 3, 4]
    np.testing.assert_allclose([entry["p_any"] for entry in summary["top_slices"]], scores[expected], rtol=1e-6)
    assert summary["top_slices_class"] == "any"
    assert summary["slice_scores_from"] == "volume_head"
    assert "are no probabilities of a slice" in summary["slice_scores_definition"]
    assert summary["similarity_slice_index"] == expected[0]


def test_slice_positions_count_the_slices_looked_at(run: Path, case: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", run, extraction=ExtractConfig(stride=2), pool="none")
    (summary,) = run_infer(tmp_path / "out", head, case)
    assert {(entry["slice_pos"], entry["slice_index"]) for entry in summary["top_slices"]} == {(0, 0), (1, 2), (2, 4)}
    assert summary["slice_scores_from"] == "slice_head"
    best = max(summary["top_slices"], key=lambda entry: entry["score"])
    assert best["rank"] == 1
    assert summary["probabilities"]["bleeding"] == pytest.approx(best["score"], abs=1e-6)


def test_padding_is_not_ranked(run: Path, tmp_path: Path) -> None:
    array = noise()
    array[..., 0] = 0
    file = save(tmp_path / "ax_t2wi.nii.gz", array)
    head = write_head(tmp_path / "head", run)
    (summary,) = run_infer(tmp_path / "out", head, file, top_k=9)
    assert {entry["slice_index"] for entry in summary["top_slices"]} == {1, 2, 3, 4}
    assert "padding" in {flag["code"] for flag in summary["flags"]}


def test_m25_a_probability_at_the_threshold_is_positive(run: Path, case: Path, tmp_path: Path) -> None:
    """Logit 0 is a probability of exactly 0.5."""
    for thresholds, threshold, expected in (
        ([0.5], None, True),
        (None, None, True),
        ([0.9], 0.5, True),
        ([0.5], 0.5000001, False),
    ):
        head = write_head(tmp_path / "head", run, zero=True, thresholds=thresholds)
        (summary, _) = run_infer(
            tmp_path / "out", head, case, save(tmp_path / "ax_t2wi.nii.gz", noise()), threshold=threshold
        )
        assert summary["probabilities"] == {"bleeding": 0.5}
        assert summary["predicted"] == {"bleeding": expected}
        with (tmp_path / "out/predictions.csv").open(newline="") as file:
            assert [row["pred_bleeding"] for row in csv.DictReader(file)] == [str(int(expected))] * 2


def test_threshold_sources_and_bounds(head_run: Path, run: Path, case: Path, tmp_path: Path) -> None:
    (summary,) = run_infer(tmp_path / "out", head_run, case, threshold=0.25)
    assert (summary["threshold"], summary["threshold_source"]) == (0.25, "given")
    assert set(summary["thresholds"].values()) == {0.25}
    (summary,) = run_infer(tmp_path / "out", write_head(tmp_path / "head", run), case)
    assert (summary["threshold"], summary["threshold_source"]) == (0.5, "default")
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError) as caught:
            run_infer(tmp_path / "out2", head_run, case, threshold=wrong)
        assert caught.value.code == "threshold_range"
    assert not (tmp_path / "out2").exists()


def test_intervals_are_those_of_the_nearest_validation_cases(run: Path, case: Path, tmp_path: Path) -> None:
    """60 cases: the tenth is 6, so the 10 nearest count; five of them positive."""
    p = np.linspace(0, 1, 60)[:, None]
    y = np.arange(60)[:, None] % 2
    head = write_head(tmp_path / "head", run, zero=True, reliability=(p, y.astype(float)))
    (summary,) = run_infer(tmp_path / "out", head, case)
    interval = summary["intervals"]["bleeding"]
    low, high = wilson_interval(5, 10)
    assert (interval["n"], interval["positives"]) == (10, 5)
    assert (interval["low"], interval["high"]) == pytest.approx((low, high))
    assert "Wilson" in interval["definition"]
    (summary,) = run_infer(tmp_path / "out", write_head(tmp_path / "bare", run), case)
    assert summary["intervals"] is None
    assert "intervals" in summary["null_reasons"]


def test_m12_the_first_volume_and_the_scale_of_the_file(run: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", run)
    values = noise().astype(np.float32)
    plain = save(tmp_path / "plain/ax_t2wi.nii.gz", (2 * values - 1024).astype(np.float32))
    scaled = tmp_path / "scaled/ax_t2wi.nii.gz"
    scaled.parent.mkdir()
    image = nib.Nifti1Image(np.stack([noise(), noise(5)], -1), np.diag([1.0, 1, 3, 1]))
    image.header.set_slope_inter(2, -1024)
    nib.save(image, scaled)
    run_infer(tmp_path / "1", head, plain)
    run_infer(tmp_path / "2", head, scaled)
    vectors = [np.load(tmp_path / name / "volume_embedding.npy") for name in ("1", "2")]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


def test_exclusive_classes(run: Path, case: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", run, task="multiclass", classes=("a", "b", "c"))
    other = save(tmp_path / "ax_t2wi.nii.gz", noise())
    (summary, _) = run_infer(tmp_path / "out", head, case, other)
    p = summary["probabilities"]
    assert sum(p.values()) == pytest.approx(1)
    assert summary["predicted"] == summary["top_slices_class"] == max(p, key=lambda name: p[name])
    assert summary["thresholds"] is None
    assert {"threshold", "thresholds", "threshold_source"} <= set(summary["null_reasons"])
    table = read_predictions(tmp_path / "out/predictions.csv")
    assert table.task == "multiclass"
    assert table.predicted_NC is not None
    assert table.classes[int(table.predicted_NC[0, 0])] == summary["predicted"]
    with pytest.raises(ConfigError, match="--threshold has no effect"):
        run_infer(tmp_path / "out", head, case, threshold=0.5)


def test_values_of_a_regression(run: Path, case: Path, tmp_path: Path) -> None:
    scaler = {"mean": [60.0, 5.0], "scale": [10.0, 2.0]}
    head = write_head(tmp_path / "head", run, task="regression", classes=("age", "volume_ml"), scaler=scaler)
    (summary,) = run_infer(tmp_path / "out", head, case, heatmap=True)
    module: Any = load_head(head).module
    vector = np.load(tmp_path / "out/volume_embedding.npy")
    raw = vector @ module.last.weight.numpy().T + module.last.bias.numpy()
    np.testing.assert_allclose(list(summary["values"].values()), raw * [10, 2] + [60, 5], rtol=1e-5)
    assert "probabilities" not in summary
    assert summary["predicted"] is None
    assert (tmp_path / "out/slice_values.npy").is_file()
    assert not (tmp_path / "out/slice_probs.npy").exists()


def test_pictures(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", None)
    head = write_head(tmp_path / "head", run)
    write_image(tmp_path / "eye.png", np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8))
    (summary,) = run_infer(tmp_path / "out", head, tmp_path / "eye.png", heatmap=True)
    assert np.load(tmp_path / "out/heatmap.npy").shape == (32, 48)
    assert len(summary["top_slices"][0]["peak_pixel"]) == 2
    assert np.load(tmp_path / "out/slice_probs.npy").shape == (1, 1)


# --- heat maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["head", "gradcam"])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASL"])
def test_heat_of_the_head_lies_at_the_planted_place(
    codes: str, method: str, tmp_path: Path, write_run: WriteRun
) -> None:
    """Row 1 and column 4 of patches of 8 pixels, slice 3: on the exact grid of the file in any orientation."""
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    run = write_run(tmp_path / "run", ("ax_t2wi", "ax_adc"), edit=read_contrast)
    weights = np.zeros((1, 32), np.float32)
    weights[0, 5] = 1
    head = write_head(tmp_path / "head", run, weights=weights)
    for name, array in (("ax_t2wi", noise()), ("ax_adc", with_contrast(1, 4, 3))):
        image = nib.Nifti1Image(array, np.diag([1.0, 1, 3, 1]))
        turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(codes))
        (tmp_path / "P1").mkdir(exist_ok=True)
        nib.save(image.as_reoriented(turn), tmp_path / f"P1/{name}.nii.gz")
    (summary,) = run_infer(
        tmp_path / "out", head, tmp_path / "P1", heatmap=True, overrides=(f"heatmap_method={method}",)
    )
    source, heat = (nib.load(tmp_path / name) for name in ("P1/ax_t2wi.nii.gz", "out/heatmap.nii.gz"))
    assert heat.shape == source.shape
    np.testing.assert_array_equal(heat.affine, source.affine)
    voxels = np.asarray(heat.dataobj)
    assert voxels.dtype == np.float32
    x, y, z, _ = heat.affine @ [*np.unravel_index(voxels.argmax(), voxels.shape), 1]
    assert 32 <= x < 40
    assert 8 <= y < 16
    assert z == 9.0
    assert voxels.max() <= 1
    assert summary["heatmap_method"] == method
    assert summary["heatmap_maximum"] > 0
    assert "bleeding" in summary["heatmap_definition"]
    assert "no map of lesions" in summary["heatmap_definition"]
    assert {"head": "2017", "gradcam": "Selvaraju"}[method] in summary["heatmap_definition"]
    best = next(entry for entry in summary["top_slices"] if entry["slice_index"] == 3)
    assert voxels[tuple(best["peak_voxel"])] == voxels.max()
    np.testing.assert_allclose(best["peak_mm"], (heat.affine @ [*best["peak_voxel"], 1])[:3], atol=0.006)


def test_a_map_that_explains_nothing_is_said_to(run: Path, case: Path, tmp_path: Path) -> None:
    """Weights a thousand times smaller give the same picture, and a total a thousand times smaller."""
    weights = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
    found = {}
    for name, factor in (("strong", 100.0), ("weak", 0.1)):
        head = write_head(tmp_path / name, run, weights=np.float32(factor) * weights)
        (summary,) = run_infer(tmp_path / f"out_{name}", head, case, heatmap=True)
        found[name] = summary
    assert found["strong"]["heatmap_total"] == pytest.approx(1000 * found["weak"]["heatmap_total"], rel=1e-3)
    heats = [np.asarray(nib.load(tmp_path / f"out_{name}/heatmap.nii.gz").dataobj) for name in found]
    np.testing.assert_allclose(*heats, atol=1e-3)
    codes = {name: {flag["code"] for flag in summary["flags"]} for name, summary in found.items()}
    assert found["weak"]["heatmap_total"] < 0.1 <= found["strong"]["heatmap_total"]
    assert "map_weak" in codes["weak"]
    assert "map_weak" not in codes["strong"]


def test_the_class_of_the_map_can_be_named(head_run: Path, case: Path, tmp_path: Path) -> None:
    maps = {}
    for name in ("any", "subdural"):
        (summary,) = run_infer(tmp_path / name, head_run, case, heatmap=True, overrides=(f"heatmap_class={name}",))
        assert summary["top_slices_class"] == name
        assert f"output {name} " in summary["heatmap_definition"]
        maps[name] = np.asarray(nib.load(tmp_path / name / "heatmap.nii.gz").dataobj)
    assert np.abs(maps["any"] - maps["subdural"]).max() > 0.05
    with pytest.raises(ConfigError) as caught:
        run_infer(tmp_path / "no", head_run, case, heatmap=True, overrides=("heatmap_class=subdual",))
    assert "subdural?" in caught.value.fix


@pytest.mark.parametrize("method", ["rollout", "similarity"])
def test_other_methods_under_a_head(method: str, head_run: Path, case: Path, tmp_path: Path) -> None:
    (summary,) = run_infer(tmp_path / "out", head_run, case, heatmap=True, overrides=(f"heatmap_method={method}",))
    assert summary["heatmap_method"] == method
    assert summary["heatmap_maximum"] is None
    assert "heatmap_maximum" in summary["null_reasons"]
    heat = np.asarray(nib.load(tmp_path / "out/heatmap.nii.gz").dataobj)
    assert heat.max() > heat.min()


def test_m27_similarity_is_one_at_the_reference_alone(head_run: Path, case: Path, tmp_path: Path) -> None:
    run_infer(tmp_path / "out", head_run, case, overrides=("sim_slice=1", "sim_patch=[1,2]"))
    similarity = np.load(tmp_path / "out/similarity_map.npy")
    assert [tuple(place) for place in np.argwhere(similarity >= 1 - 1e-6)] == [(1, 2)]
    assert strict(tmp_path / "out/summary.json")["similarity_slice_index"] == 1


def test_slices_that_were_not_looked_at_have_no_heat(run: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", run, extraction=ExtractConfig(slice_selection="first", max_slices=2))
    case = tmp_path / "P1"
    for name in ("ax_t2wi", "ax_adc"):
        save(case / f"{name}.nii.gz", np.random.default_rng(0).integers(0, 9, (32, 32, 12)).astype(np.int16))
    run_infer(tmp_path / "out", head, case, heatmap=True)
    heat = np.asarray(nib.load(tmp_path / "out/heatmap.nii.gz").dataobj)
    assert heat[..., :2].any()
    assert not heat[..., 3:].any()


def test_slices_along_the_stored_axis(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", ("ct",))
    head = write_head(tmp_path / "head", run, extraction=ExtractConfig(orientation="stored"))
    affine = np.array([[0, 0, 3.0, -5], [1.0, 0, 0, 7], [0, -1.0, 0, 2], [0, 0, 0, 1]])  # ASR...: the third axis is R
    file = save(tmp_path / "ct.nii.gz", noise(), affine)
    (summary,) = run_infer(tmp_path / "out", head, file, heatmap=True)
    heat = nib.load(tmp_path / "out/heatmap.nii.gz")
    assert heat.shape == (48, 32, 5)
    np.testing.assert_array_equal(heat.affine, affine)
    voxels = np.asarray(heat.dataobj)
    assert (summary["num_slices"], summary["orientation"]) == (5, "stored axes")
    for entry in summary["top_slices"]:
        peak = tuple(entry["peak_voxel"])
        assert peak[2] == entry["slice_index"]
        assert voxels[peak] == voxels[..., peak[2]].max()


# --- files and words -------------------------------------------------------------------------------------------------


def test_summary_holds_the_keys_of_the_contract(head_run: Path, case: Path, tmp_path: Path) -> None:
    (told,) = run_infer(tmp_path / "out", head_run, case, heatmap=True)
    summary = strict(tmp_path / "out/summary.json")
    assert summary == json.loads(json.dumps(told, default=str))
    stroke = (
        "config input checkpoint pool_mode num_slices slice_embedding_dim probabilities predicted threshold top_slices "
        "similarity_slice_index similarity_map similarity_map_png elapsed_s gpu_mem_mb cpu_rss_mb"
    )
    assert set(stroke.split()) <= set(summary)
    assert {"slice_scores_from", "calibrated", "intervals", "flags", "note", "thresholds"} <= set(summary)
    assert {"rank", "slice_pos", "slice_index", "p_any"} <= set(summary["top_slices"][0])
    assert summary["note"] == RESEARCH_NOTE
    assert summary["calibrated"] is False
    assert summary["config"]["top_k"] == 5
    nulls = {key for key, value in summary.items() if value is None}
    assert nulls <= set(summary["null_reasons"]) | {"slice_spacing_mm"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".medssl.json", ".lock", "summary.json", "slice_embeddings.npy", "slice_indices.npy", "volume_embedding.npy",
        "slice_probs.npy", "similarity_map.npy", "similarity_map.png", "heatmap.nii.gz", "heatmap.png", "report.html",
    }  # fmt: skip


def test_a_backbone_after_a_head_leaves_nothing_of_the_head(
    head_run: Path, run: Path, case: Path, tmp_path: Path
) -> None:
    other = save(tmp_path / "ax_t2wi.nii.gz", noise())
    run_infer(tmp_path / "out", head_run, case, other)
    assert (tmp_path / "out/predictions.csv").is_file()
    run_infer(tmp_path / "out", run, case, other)
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert not names & {"predictions.csv", "slice_probs.npy", "volume_embedding.npy"}


def test_no_map_is_called_a_map_of_lesions(head_run: Path, case: Path, tmp_path: Path) -> None:
    for method in ("head", "gradcam"):
        run_infer(tmp_path / "out", head_run, case, heatmap=True, overrides=(f"heatmap_method={method}",))
        for name in ("summary.json", "report.html"):
            text = (tmp_path / "out" / name).read_text(encoding="utf-8").lower()
            assert "no map of lesions" in text
            assert "lesion" not in text.replace("no map of lesions", "")


def test_what_has_no_effect_is_refused(head_run: Path, run: Path, case: Path, tmp_path: Path) -> None:
    for model, more in (
        (run, {"threshold": 0.5}),
        (run, {"overrides": ("heatmap_class=any",)}),
        (run, {"heatmap": True, "overrides": ("heatmap_method=head",)}),
        (head_run, {"overrides": ("stride=2",)}),
        (head_run, {"overrides": ("max_side=64",)}),
        (head_run, {"overrides": ("heatmap_method=gradcam",)}),
        (run, {"backbone": run}),
    ):
        with pytest.raises(ConfigError) as caught:
            run_infer(tmp_path / "out", model, case, **more)
        assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_the_batch_size_changes_nothing(head_run: Path, case: Path, tmp_path: Path) -> None:
    for size in (1, 4):
        run_infer(tmp_path / f"{size}", head_run, case, heatmap=True, overrides=(f"batch_size={size}",))
    for name in ("slice_embeddings.npy", "slice_probs.npy"):
        np.testing.assert_allclose(*(np.load(tmp_path / f"{size}" / name) for size in (1, 4)), atol=1e-5)
    heats = [np.asarray(nib.load(tmp_path / f"{size}/heatmap.nii.gz").dataobj) for size in (1, 4)]
    np.testing.assert_allclose(*heats, atol=1e-3)


def test_another_backbone_is_refused(head_run: Path, case: Path, tmp_path: Path, write_run: WriteRun) -> None:
    def change(model: Any) -> None:
        model.norm.bias.add_(0.1)

    other = write_run(tmp_path / "other", ("ax_t2wi", "ax_adc"), edit=change)
    with pytest.raises(CheckpointError) as caught:
        run_infer(tmp_path / "out", head_run, case, backbone=other)
    assert caught.value.exit_code == 7
    assert not (tmp_path / "out").exists()


def test_m29_an_absent_device_is_never_replaced(head_run: Path, case: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        infer(InferRequest((str(case),), model=head_run, out=tmp_path / "out", device="cuda:99"))
    assert caught.value.exit_code == 6
    assert not (tmp_path / "out").exists()


# --- many cases ------------------------------------------------------------------------------------------------------


def test_a_batch_loads_the_model_once_and_bad_cases_cost_no_other(
    head_run: Path, case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    original = infer_module.open_head

    def counted(*args: Any, **more: Any) -> Any:
        loads.append(args)
        return original(*args, **more)

    monkeypatch.setattr(infer_module, "open_head", counted)
    cases = [case]
    for n in range(3):
        for name in ("ax_t2wi", "ax_adc"):
            save(tmp_path / f"data/Q{n}/{name}.nii.gz", noise(n))
        cases.append(tmp_path / f"data/Q{n}")
    (cases[2] / "ax_adc.nii.gz").write_bytes(b"no image")
    words = tuple(map(str, cases))
    told: list[tuple[int, int]] = []
    request = InferRequest(words, model=head_run, out=tmp_path / "out", device="cpu", on_error="skip", heatmap=True)
    result = infer(request, progress=lambda done, total: told.append((done, total)))
    assert len(loads) == 1
    assert told == [(n, 4) for n in range(1, 5)]
    assert result.error is not None
    assert result.error.exit_code == 4
    table = read_predictions(tmp_path / "out/predictions.csv")
    assert table.case_ids == ("P1", "Q0", "Q2")
    for row, name in enumerate(table.case_ids):
        own = strict(tmp_path / "out" / name / "summary.json")
        assert list(own["probabilities"].values()) == list(table.values_NC[row])
        assert table.predicted_NC is not None
        assert list(own["predicted"].values()) == list(table.predicted_NC[row].astype(bool))
    with (tmp_path / "out/failures.csv").open(newline="") as file:
        (failure,) = csv.DictReader(file)
    assert failure["case_id"] == "Q1"
    alone = run_infer(tmp_path / "alone", head_run, cases[3])[0]
    assert alone["probabilities"] == strict(tmp_path / "out/Q2/summary.json")["probabilities"]


def test_lines_for_people(head_run: Path, run: Path, case: Path, tmp_path: Path) -> None:
    request = InferRequest((str(case),), model=head_run, out=tmp_path / "out", device="cpu")
    lines = infer(request).lines
    any_line = next(line for line in lines if line.strip().startswith("any"))
    assert "threshold 0.500" in any_line
    assert ("POSITIVE" in any_line) != ("negative" in any_line)
    assert re.search(r"\(present in \d+ of 10 validation cases near it\)", any_line)
    assert "[" not in any_line  # how often it was seen there is no interval of the probability


def test_r15_names_of_classes_are_inert(run: Path, case: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", run, classes=("<script>alert(1)</script>",))
    run_infer(tmp_path / "out", head, case, heatmap=True)
    assert "<script>alert" not in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_r20_home_is_not_told(head_run: Path, case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(head_run.parents[2]))
    run_infer(tmp_path / "out", head_run, case)
    for path in (tmp_path / "out").rglob("*"):
        if path.suffix in (".json", ".html", ".csv"):
            assert str(head_run.parents[2]) not in path.read_text(encoding="utf-8"), path


def test_r18_nothing_of_finished_cases_is_kept(
    head_run: Path, case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = survivors(monkeypatch)
    cases = [Path(shutil.copytree(case, tmp_path / f"cases/P{n}")) for n in range(4)]
    run_infer(tmp_path / "out", head_run, *cases, heatmap=True)
    assert counts == [0] * 4


def test_weights_of_an_attention_head_are_written(run: Path, case: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", run, pool="attention", kind="attention_mil", classes=("any",))
    (summary,) = run_infer(tmp_path / "out", head, case, heatmap=True)
    weights = np.load(tmp_path / "out/slice_attention.npy")
    assert weights.sum() == pytest.approx(1)
    for entry in summary["top_slices"]:
        assert entry["attention"] == pytest.approx(weights[entry["slice_pos"]])
    slices = np.load(tmp_path / "out/slice_embeddings.npy")
    np.testing.assert_allclose(np.load(tmp_path / "out/volume_embedding.npy"), weights @ slices, atol=1e-5)


def test_m25_a_threshold_is_told_apart_from_the_probability() -> None:
    summary = {
        "probabilities": {"a": 0.71751, "b": 0.5, "c": 0.0001},
        "thresholds": {"a": 0.71849, "b": 0.5, "c": 0.2},
        "predicted": {"a": False, "b": True, "c": False},
    }
    a, b, c = lines_of(summary)
    assert "0.718  threshold 0.7185  negative" in a
    assert "0.500  threshold 0.500  POSITIVE" in b
    assert "<0.001  threshold 0.200  negative" in c


def test_the_label_any_of_a_series_table_ranks_the_slices(run: Path, case: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", run, task="multilabel", classes=("label_epidural", "label_any"))
    summary = run_infer(tmp_path / "out", head, case)[0]
    assert summary["top_slices_class"] == "label_any"
    assert summary["top_slices"][0]["p_any"] == summary["top_slices"][0]["score"]
