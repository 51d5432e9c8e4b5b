"""Features of cohorts: aligned rows, no leak, nothing computed twice, one case or many processes alike."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medssl_cli.core.errors import ConfigError, DataError, PartialFailure
from medssl_cli.data.feature_cache import FeatureCache
from medssl_cli.data.feature_store import read_features
from medssl_cli.services.backbone import Backbone, open_backbone
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.embedding_config import ExtractConfig
from medssl_cli.services.extract import ExtractRequest, extract
from medssl_cli.services.extract_cohort import read_cohort
from medssl_cli.services.extract_features import features_of, find_labels, vectors_of
from medssl_cli.services.lookup import find_model
from medssl_cli.services.split import split

Run = Callable[..., Any]
ONE_CORE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> dict[str, Path]:
    """Finished runs of a backbone for the prostate, for CT and for pictures."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "prostate": write_run(root / "prostate"),
        "ct": write_run(root / "ct", ("ax_ct",)),
        "pictures": write_run(root / "pictures", None),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture(scope="module")
def splits(prostate_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split")
    split(prostate_tree, out, ratios=(0.5, 0.25, 0.25))
    return out


@pytest.fixture(scope="module")
def ct_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A series table of four studies, two series each, of four patients; not to be changed."""
    root = tmp_path_factory.mktemp("ct")
    rng = np.random.default_rng(0)
    rows = []
    for study in range(4):
        for series in range(2):
            path = root / f"st{study}" / f"se{series}" / "v.nii.gz"
            path.parent.mkdir(parents=True)
            voxels = rng.integers(-1000, 1000, (24, 24, 4)).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1, 5, 1])), path)
            rows.append(
                (f"st{study}", f"se{series}", f"pat{study}", path.relative_to(root), study % 2, 10 * study + series)
            )
    write_table(root / "series.csv", ("study_uid", "series_uid", "patient_id", "nifti_path", "label_any", "code"), rows)
    return root / "series.csv"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes in train, val and test folders; not to be changed."""
    root = tmp_path_factory.mktemp("pictures")
    for n, name in enumerate(("train/a", "train/b", "val/a", "val/b", "test/a", "test/b")):
        for m in range(2):
            write_picture(root / name / f"{n}.{m}.png", seed=10 * n + m)
    return root


def write_picture(path: Path, seed: int, side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(colours).save(path)


def write_table(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def run(source: Path, out: Path, model: Path, cache: Path, **words: Any) -> dict[str, Any]:
    result = extract(ExtractRequest(source, out, model=model, cache=cache, device="cpu", **words))
    if result.error is not None:
        raise result.error
    return result.facts


def arrays_of(out: Path) -> dict[str, bytes]:
    """Everything in the features but their description, which tells the time."""
    files = sorted(path for path in (out / "features").rglob("*") if path.is_file() and path.suffix != ".json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def opened(run_folder: Path) -> Backbone:
    return open_backbone(find_model(run_folder), torch.device("cpu"))


# --- cohorts ---------------------------------------------------------------------------------------------------------


def test_a_tree_with_a_split_becomes_features_with_labels(
    prostate_tree: Path, splits: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    info = run(prostate_tree, tmp_path, runs["prostate"], cache, splits=splits, targets=("label", "lesion_mm3"))
    found = read_features(tmp_path)
    with (prostate_tree / "labels.csv").open(encoding="utf-8") as file:
        truth = {line["case_id"]: line for line in csv.DictReader(file)}
    for name in ("train", "val", "test"):
        part = found.part(name)
        with (splits / f"{name}.csv").open(encoding="utf-8") as file:
            assert [line["patient_id"] for line in csv.DictReader(file)] == list(part.case_ids)
        assert part.labels_RC is not None
        for row, labels in zip(part.rows, part.labels_RC, strict=True):
            assert labels.tolist() == [float(truth[row.case_id]["label"]), np.float32(truth[row.case_id]["lesion_mm3"])]
            assert row.patient_id == truth[row.case_id]["patient_id"]
            assert row.study_uid == truth[row.case_id]["study_uid"]
    assert info["group_level"] == "patient_id"
    assert info["pool_mode"] == "mean"
    assert info["slice_dim"] == info["embedding_dim"] == 32
    assert info["model"]["sequences"] == ["ax_t2wi", "ax_adc", "ax_dwi"]
    assert "research" in info["note"]


def test_rows_are_the_mean_or_mean_and_maximum_of_the_slices(
    prostate_tree: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    parts = {}
    for pool in ("mean", "meanmax", "none"):
        run(prostate_tree, tmp_path / pool, runs["prostate"], cache, pool=pool)
        parts[pool] = read_features(tmp_path / pool).part("all")
    slices = parts["none"]
    assert [row.slice_index for row in slices.rows[:12]] == list(range(12))
    for place, case_id in enumerate(parts["mean"].case_ids):
        of_case = slices.embeddings_RP[[row.case_id == case_id for row in slices.rows]].astype(np.float64)
        both = np.concatenate([of_case.mean(0), of_case.max(0)])
        np.testing.assert_allclose(parts["mean"].embeddings_RP[place], both[:32], atol=1e-6)
        np.testing.assert_allclose(parts["meanmax"].embeddings_RP[place], both, atol=1e-6)
    assert {row.slice_index for row in parts["mean"].rows} == {None}
    assert {row.n_slices for row in parts["mean"].rows} == {12}


def test_a_missing_sequence_stands_in_the_facts(
    prostate_tree: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    run(prostate_tree, tmp_path, runs["prostate"], cache)
    facts = read_features(tmp_path).part("all").facts
    lacking = {path.name for path in prostate_tree.iterdir() if path.is_dir() and not (path / "ax_adc.nii.gz").exists()}
    assert {name for name, fact in facts.items() if fact.missing} == lacking
    assert lacking
    header = nib.load(prostate_tree / "PT-0000" / "ax_t2wi.nii.gz").header
    z, y, x = facts["PT-0000"].spacing_mm or (0, 0, 0)
    np.testing.assert_allclose((x, y, z), header.get_zooms()[:3], rtol=1e-6)
    values = np.asarray(nib.load(prostate_tree / "PT-0000" / "ax_t2wi.nii.gz").dataobj)
    np.testing.assert_allclose(facts["PT-0000"].intensity["ax_t2wi"][1], np.percentile(values, 50), rtol=1e-5)


def test_m16_a_second_run_makes_no_forward_pass_and_says_so(
    prostate_tree: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    first = extract(ExtractRequest(prostate_tree, tmp_path / "a", model=runs["prostate"], cache=tmp_path / "c"))
    second = extract(ExtractRequest(prostate_tree, tmp_path / "b", model=runs["prostate"], cache=tmp_path / "c"))
    assert (first.facts["forward_passes"], first.facts["cache_hits"]) == (72, 0)
    assert (second.facts["forward_passes"], second.facts["cache_hits"]) == (0, 72)
    assert "0 forward passes, 72 slices from the cache" in second.summary()
    assert arrays_of(tmp_path / "a") == arrays_of(tmp_path / "b")
    assert first.facts["feature_digest"] == second.facts["feature_digest"]


def test_m16_a_setting_or_a_file_that_changes_is_computed_again(
    ct_table: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    def passes(*overrides: str, source: Path = ct_table) -> int:
        facts = run(source, tmp_path / "out", runs["ct"], tmp_path / "c", overrides=overrides)
        return int(facts["forward_passes"])

    assert passes() == 32
    assert passes("stride=2") == 16
    assert passes("resize=16") == 32
    assert passes("resize=16", "antialias=true") == 32
    assert passes("orientation=stored") == 32
    assert passes() == 0
    copied = tmp_path / "copy"
    for path in ct_table.parent.rglob("*.nii.gz"):
        target = copied / path.relative_to(ct_table.parent)
        target.parent.mkdir(parents=True)
        target.write_bytes(path.read_bytes())
    (copied / "series.csv").write_bytes(ct_table.read_bytes())
    assert passes(source=copied / "series.csv") == 0
    image = nib.load(copied / "st0/se0/v.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), copied / "st0/se0/v.nii.gz")
    assert passes(source=copied / "series.csv") == 4


def test_a_series_table_gives_its_own_columns_as_labels(
    ct_table: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    run(ct_table, tmp_path, runs["ct"], cache, targets=("code", "label_any"), config="ich", overrides=("resize=16",))
    part = read_features(tmp_path).part("all")
    assert part.labels_RC is not None
    expected = {f"st{study}__se{series}": [10 * study + series, study % 2] for study in range(4) for series in range(2)}
    assert {row.case_id: labels.tolist() for row, labels in zip(part.rows, part.labels_RC, strict=True)} == expected
    assert part.rows[0].path == "st0/se0/v.nii.gz"
    info = read_features(tmp_path).info
    assert info["orientation"] == "ras-axial"
    assert info["extraction"]["resize"] == 16


def test_a_split_of_the_table_is_followed(ct_table: Path, runs: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    split(ct_table, tmp_path / "split", ratios=(0.5, 0.25, 0.25))
    info = run(ct_table, tmp_path / "out", runs["ct"], cache, splits=tmp_path / "split")
    assert {name: part["n_cases"] for name, part in info["splits"].items()} == {"train": 4, "val": 2, "test": 2}
    one = run(ct_table, tmp_path / "one", runs["ct"], cache, split_csv=tmp_path / "split" / "val.csv")
    assert one["splits"]["val"]["split_digest"] == info["splits"]["val"]["split_digest"]
    summary = json.loads((tmp_path / "split" / "split_summary.json").read_text(encoding="utf-8"))
    assert summary["counts"] == {"train": 4, "val": 2, "test": 2}


def test_a_split_column_of_the_table_is_followed(
    ct_table: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    header, *lines = csv.reader(ct_table.read_text(encoding="utf-8").splitlines())
    rows = [(*line, "test" if line[0] == "st3" else "Training") for line in lines]
    table = write_table(ct_table.parent / "with_split.csv", (*header, "split"), rows)
    info = run(table, tmp_path, runs["ct"], cache)
    table.unlink()
    assert {name: part["n_cases"] for name, part in info["splits"].items()} == {"train": 6, "test": 2}
    assert set(read_features(tmp_path).part("test").case_ids) == {"st3__se0", "st3__se1"}


def test_class_and_split_folders_of_pictures_are_recognised(
    pictures: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    info = run(pictures, tmp_path, runs["pictures"], cache)
    assert info["targets"] == ["label"]
    assert info["label_values"] == {"label": ["a", "b"]}
    for name in ("train", "val", "test"):
        part = read_features(tmp_path).part(name)
        assert part.labels_RC is not None
        for row, labels in zip(part.rows, part.labels_RC, strict=True):
            assert row.case_id.startswith(f"{name}/{'ab'[int(labels[0])]}/")


def test_r12_both_eyes_of_a_patient_stay_together(runs: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """The table of labels tells whose a picture is, whether it lies in the tree or is named."""
    tree = tmp_path / "eyes"
    for n, name in enumerate(("1_L", "1_R", "2_L", "2_R")):
        write_picture(tree / f"{name}.png", seed=200 + n)
    rows = [(f"{name}.png", f"P{name[0]}", name[2] == "L") for name in ("1_L", "1_R", "2_L", "2_R")]
    table = write_table(tmp_path / "table.csv", ("image", "patient", "y"), rows)
    run(tree, tmp_path / "named", runs["pictures"], cache, labels=table, targets=("y",))
    part = read_features(tmp_path / "named").part("all")
    assert [row.patient_id for row in part.rows] == ["P1", "P1", "P2", "P2"]
    (tree / "labels.csv").write_bytes(table.read_bytes())
    backbone = opened(runs["pictures"])
    assert [case.patient_id for case in read_cohort(tree, backbone).cases] == ["P1", "P1", "P2", "P2"]
    for name, pictures in (("train", ("1_L.png", "2_L.png")), ("val", ("1_R.png", "2_R.png"))):
        write_table(tmp_path / "split" / f"{name}.csv", ("image",), [(picture,) for picture in pictures])
    with pytest.raises(DataError, match="share patients"):
        read_cohort(tree, backbone, splits=tmp_path / "split")


def test_w24_pictures_whose_names_differ_after_the_first_dot_are_both_there(
    runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    for n, name in enumerate(("a.b.png", "a.c.png")):
        write_picture(tmp_path / "in" / name, seed=n)
    run(tmp_path / "in", tmp_path / "out", runs["pictures"], cache)
    part = read_features(tmp_path / "out").part("all")
    assert part.case_ids == ("a.b.png", "a.c.png")
    assert not np.array_equal(part.embeddings_RP[0], part.embeddings_RP[1])


def test_w21_what_is_scored_is_never_flipped_and_equal_bit_for_bit(
    pictures: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    run(pictures, tmp_path / "plain", runs["pictures"], tmp_path / "c1")
    run(pictures, tmp_path / "views", runs["pictures"], tmp_path / "c2", overrides=("views=4",))
    plain, views = read_features(tmp_path / "plain"), read_features(tmp_path / "views")
    for name in ("val", "test"):
        np.testing.assert_array_equal(plain.part(name).embeddings_RP, views.part(name).embeddings_RP)
        assert plain.part(name).rows == views.part(name).rows
    train = views.part("train")
    assert [row.view for row in train.rows] == [0, 1, 2, 3] * 4
    unflipped = train.embeddings_RP[[row.view == 0 for row in train.rows]]
    np.testing.assert_array_equal(unflipped, plain.part("train").embeddings_RP)
    assert views.info["splits"]["train"]["class_counts"] == {"label": {"a": 2, "b": 2}}


def test_views_have_no_effect_on_volumes_and_are_refused(
    prostate_tree: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(prostate_tree, tmp_path, runs["prostate"], cache, overrides=("views=2",))
    assert caught.value.code == "config_without_effect"


def test_a_model_of_pictures_looks_at_one_sequence_of_a_tree(
    prostate_tree: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(prostate_tree, tmp_path, runs["pictures"], cache)
    assert caught.value.code == "sequence_missing"
    assert "'ax_t2wi'" in caught.value.where
    info = run(prostate_tree, tmp_path, runs["pictures"], cache, sequence="ax_t2wi", overrides=("resize=16",))
    assert info["splits"]["all"]["n_cases"] == 6


def test_a_table_for_a_model_of_several_sequences_has_to_be_named(
    ct_table: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(ct_table, tmp_path, runs["prostate"], cache)
    assert "--sequence" in caught.value.fix
    run(ct_table, tmp_path, runs["prostate"], cache, sequence="ax_t2wi")
    assert read_features(tmp_path).part("all").facts["st0__se0"].missing == ("ax_adc", "ax_dwi")


def test_pictures_for_a_model_of_volumes_are_refused(
    pictures: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        run(pictures, tmp_path, runs["prostate"], cache)
    assert caught.value.code == "case_kind"


def test_patch_tokens_of_each_case_keep_their_axes(
    prostate_tree: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    run(prostate_tree, tmp_path, runs["prostate"], cache, tokens="cls,patch", overrides=("max_slices=2",))
    files = sorted((tmp_path / "features" / "patch_tokens").iterdir())
    assert [path.name for path in files] == [f"all_{row:06d}.npy" for row in range(6)]
    tokens = np.load(files[0])
    assert tokens.dtype == np.float32
    assert tokens.shape[:2] == (2, 3)
    assert tokens.shape[-1] == 32


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_of_slices_go_with_the_rows_of_slices(
    ct_table: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    rows = [("st1", "se0", z, int(z == 2)) for z in range(4)] + [("st3", "se1", 1, 1)]
    labels = write_table(tmp_path / "slices.csv", ("study_uid", "series_uid", "slice_index", "bleed"), rows)
    with pytest.raises(DataError) as caught:
        run(ct_table, tmp_path / "out", runs["ct"], cache, labels=labels, targets=("bleed",))
    assert caught.value.code == "labels_by_slice"
    run(ct_table, tmp_path / "out", runs["ct"], cache, labels=labels, targets=("bleed",), pool="none")
    part = read_features(tmp_path / "out").part("all")
    assert part.labels_RC is not None
    found = {(r.case_id, r.slice_index): float(y[0]) for r, y in zip(part.rows, part.labels_RC, strict=True)}
    assert [found["st1__se0", z] for z in range(4)] == [0, 0, 1, 0]
    assert found["st3__se1", 1] == 1
    assert np.isnan(found["st0__se0", 0])


def test_faulty_labels_are_refused_before_anything_is_computed(
    prostate_tree: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    for words in (
        {"targets": ("labl",)},
        {"labels": prostate_tree / "labels.csv"},
        {"labels": write_table(tmp_path / "other.csv", ("case_id", "y"), [("nobody", 1)]), "targets": ("y",)},
    ):
        with pytest.raises((DataError, ConfigError)):
            run(prostate_tree, tmp_path / "out", runs["prostate"], tmp_path / "c", **words)
    assert FeatureCache(tmp_path / "c").info().entries == 0


def test_texts_are_the_same_classes_in_every_part(
    prostate_tree: Path, splits: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    ids = sorted(path.name for path in prostate_tree.iterdir() if path.is_dir())
    labels = write_table(tmp_path / "l.csv", ("case_id", "kind"), [(name, "zyx"[n % 3]) for n, name in enumerate(ids)])
    info = run(prostate_tree, tmp_path / "o", runs["prostate"], cache, splits=splits, labels=labels, targets=("kind",))
    assert info["label_values"] == {"kind": ["x", "y", "z"]}
    truth = {name: "zyx"[n % 3] for n, name in enumerate(ids)}
    for name in info["splits"]:
        part = read_features(tmp_path / "o").part(name)
        assert part.labels_RC is not None
        assert [info["label_values"]["kind"][int(y)] for y in part.labels_RC[:, 0]] == [truth[i] for i in part.case_ids]


# --- leaks and odd paths ---------------------------------------------------------------------------------------------


def test_r12_a_patient_in_two_lists_is_refused(prostate_tree: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    for name, ids in {"train": ["PT-0001_20230106"], "test": ["PT-0001_20240215"]}.items():
        write_table(tmp_path / "s" / f"{name}.csv", ("patient_id",), [(i,) for i in ids])
    with pytest.raises(DataError) as caught:
        run(prostate_tree, tmp_path / "out", runs["prostate"], tmp_path / "c", splits=tmp_path / "s")
    assert caught.value.code == "split_leak"
    assert "PT-0001" in caught.value.where
    assert not (tmp_path / "out" / "features").exists()


def test_r12_m19_two_series_of_one_study_in_two_lists_are_refused(
    ct_table: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    for name, series in {"train": "se0", "val": "se1"}.items():
        write_table(tmp_path / "s" / f"{name}.csv", ("study_uid", "series_uid"), [("st2", series)])
    with pytest.raises(DataError) as caught:
        run(ct_table, tmp_path / "out", runs["ct"], tmp_path / "c", splits=tmp_path / "s")
    assert caught.value.code == "split_leak"
    with pytest.raises(DataError) as caught:  # one list of the folder is compared with its siblings
        run(ct_table, tmp_path / "out", runs["ct"], tmp_path / "c", split_csv=tmp_path / "s" / "train.csv")
    assert caught.value.code == "split_leak"


def test_r12_one_picture_under_two_names_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("train/a/1.png", "test/b/other.png"):
        write_picture(tmp_path / "in" / name, seed=1)
    with pytest.raises(DataError) as caught:
        run(tmp_path / "in", tmp_path / "out", runs["pictures"], tmp_path / "c")
    assert caught.value.exit_code == 3
    assert "other.png" in caught.value.where


def test_r13_m18_paths_of_a_table_stay_inside(ct_table: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    for place in ("../../etc/passwd", "/etc/passwd", "a" * 300):
        table = write_table(tmp_path / "in" / "t.csv", ("series_uid", "nifti_path"), [("../x", place)])
        with pytest.raises(DataError) as caught:
            run(table, tmp_path / "out", runs["ct"], tmp_path / "c")
        assert caught.value.code == "path_escapes"


def test_r13_m18_an_id_that_climbs_names_no_file(ct_table: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "in" / "v.nii.gz"
    target.parent.mkdir()
    target.write_bytes((ct_table.parent / "st0/se0/v.nii.gz").read_bytes())
    table = write_table(tmp_path / "in" / "t.csv", ("series_uid", "nifti_path"), [("../../x", "v.nii.gz")])
    run(table, tmp_path / "deep" / "out", runs["ct"], tmp_path / "deep" / "c", tokens="patch")
    assert read_features(tmp_path / "deep" / "out").part("all").case_ids == ("../../x",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["c", "out"]


# --- bad cases -------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(ct_table: Path, tmp_path: Path) -> Path:
    """The CT table with a missing file, a folder, another file and a truncated one, first of all."""
    root = tmp_path / "damaged"
    lines = list(csv.reader(ct_table.read_text(encoding="utf-8").splitlines()))
    for line in lines[1:]:
        target = root / line[3]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ct_table.parent / line[3]).read_bytes())
    (root / "st0/se0/v.nii.gz").write_bytes((root / "st0/se0/v.nii.gz").read_bytes()[:200])
    (root / "st0/se1/v.nii.gz").unlink()
    lines[3][3] = "st1/se0"
    lines[4][3] = "st1/se1/notes.pdf"
    (root / "st1/se1/notes.pdf").write_text("x", encoding="utf-8")
    return write_table(root / "series.csv", tuple(lines[0]), [tuple(line) for line in lines[1:]])


def test_r09_a_bad_case_stops_with_its_name(damaged: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(damaged, tmp_path / "out", runs["ct"], tmp_path / "c")
    assert caught.value.exit_code == 3
    assert "st0__se1" in caught.value.where
    assert not (tmp_path / "out" / "features").exists()


def test_m30_labels_and_ids_stay_aligned_when_cases_are_left_out(
    damaged: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PartialFailure):
        run(damaged, tmp_path / "out", runs["ct"], tmp_path / "c", targets=("code",), on_error="skip")
    part = read_features(tmp_path / "out").part("all")
    assert part.case_ids == ("st2__se0", "st2__se1", "st3__se0", "st3__se1")
    assert part.labels_RC is not None
    assert part.labels_RC[:, 0].tolist() == [20, 21, 30, 31]
    alone = run(
        damaged, tmp_path / "alone", runs["ct"], tmp_path / "c2",
        split_csv=write_table(tmp_path / "one.csv", ("study_uid", "series_uid"), [("st3", "se0")]),
    )  # fmt: skip
    assert alone["splits"]["all"]["n_rows"] == 1
    np.testing.assert_allclose(
        read_features(tmp_path / "alone").part("all").embeddings_RP[0], part.embeddings_RP[2], atol=1e-6
    )


def test_the_reasons_are_counted_by_split_and_listed(damaged: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PartialFailure) as caught:
        run(damaged, tmp_path / "out", runs["ct"], tmp_path / "c", on_error="skip")
    assert "4 of 8 cases" in caught.value.what
    report = read_features(tmp_path / "out").info["invalid_report"]["all"]
    assert report["count"] == 4
    assert {example["case_id"]: example["reason"] for example in report["examples"]} == {
        "st0__se1": "path_not_found",
        "st1__se0": "not_a_file",
        "st1__se1": "not_nifti_file",
        "st0__se0": "nifti_truncated",
    }
    with (tmp_path / "out" / "failures.csv").open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert {line["case_id"] for line in listed} == {"st0__se0", "st0__se1", "st1__se0", "st1__se1"}
    assert all(line["reason"] and line["fix"] for line in listed)


def test_at_most_ten_examples_are_shown(ct_table: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    rows: list[tuple[Any, ...]] = [(f"s{n}", f"gone{n}.nii.gz") for n in range(14)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "v.nii.gz").write_bytes((ct_table.parent / "st0/se0/v.nii.gz").read_bytes())
    table = write_table(tmp_path / "in" / "t.csv", ("series_uid", "nifti_path"), [*rows, ("ok", "v.nii.gz")])
    with pytest.raises(PartialFailure):
        run(table, tmp_path / "out", runs["ct"], tmp_path / "c", on_error="skip")
    report = read_features(tmp_path / "out").info["invalid_report"]["all"]
    assert report["count"] == 14
    assert len(report["examples"]) == 10


def test_bad_input_costs_no_good_output(damaged: Path, ct_table: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    run(ct_table, tmp_path / "out", runs["ct"], tmp_path / "c")
    before = arrays_of(tmp_path / "out")
    with pytest.raises(DataError):
        run(damaged, tmp_path / "out", runs["ct"], tmp_path / "c")
    assert arrays_of(tmp_path / "out") == before
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_a_file_that_goes_bad_after_it_was_cached_is_noticed(
    ct_table: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "v.nii.gz"
    path.write_bytes((ct_table.parent / "st0/se0/v.nii.gz").read_bytes())
    table = write_table(tmp_path / "in" / "t.csv", ("series_uid", "nifti_path"), [("a", "v.nii.gz")])
    run(table, tmp_path / "out", runs["ct"], tmp_path / "c")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError):
        run(table, tmp_path / "out", runs["ct"], tmp_path / "c")


# --- interruptions and several processes -----------------------------------------------------------------------------


def test_r16_an_interrupted_run_redoes_only_what_is_missing(
    prostate_tree: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    undisturbed = run(prostate_tree, tmp_path / "whole", runs["prostate"], tmp_path / "c1")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    request = ExtractRequest(
        prostate_tree, tmp_path / "cut", model=runs["prostate"], cache=tmp_path / "c2", device="cpu"
    )
    with pytest.raises(KeyboardInterrupt):
        extract(request, progress=stop)
    assert not (tmp_path / "cut" / "features").exists()
    again = extract(request).facts
    assert 0 < again["forward_passes"] < undisturbed["forward_passes"]
    assert again["forward_passes"] + again["cache_hits"] == undisturbed["forward_passes"]
    ours, theirs = (read_features(tmp_path / name).part("all") for name in ("cut", "whole"))
    assert ours.rows == theirs.rows
    np.testing.assert_allclose(ours.embeddings_RP, theirs.embeddings_RP, atol=1e-6)


def command(source: Path, out: Path, model: Path, cache: Path, *words: str) -> list[str]:
    options = ["--model", str(model), "--out", str(out), "--cache", str(cache), "--device", "cpu"]
    return [sys.executable, "-m", "medssl_cli", "extract", str(source), *options, *words]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_r16_a_killed_run_finishes_with_the_same_output(
    prostate_tree: Path, runs: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    run(prostate_tree, tmp_path / "whole", runs["prostate"], tmp_path / "c1")
    words = command(prostate_tree, tmp_path / "cut", runs["prostate"], tmp_path / "c2")
    process = subprocess.Popen(words, env=ONE_CORE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and FeatureCache(tmp_path / "c2").info().entries == 0:
        time.sleep(0.002)
    process.send_signal(number)
    code = process.wait(60)
    assert code in {signal.SIGKILL: (-9, 0), signal.SIGTERM: (75, 0), signal.SIGINT: (75, 0)}[number]
    done = FeatureCache(tmp_path / "c2").info().entries
    again = run(prostate_tree, tmp_path / "cut", runs["prostate"], tmp_path / "c2")
    assert again["forward_passes"] == 12 * (6 - done)
    assert not list((tmp_path / "cut").glob(".tmp-*"))
    ours, theirs = (read_features(tmp_path / name).part("all") for name in ("cut", "whole"))
    assert ours.rows == theirs.rows
    np.testing.assert_allclose(ours.embeddings_RP, theirs.embeddings_RP, atol=1e-6)


@pytest.mark.slow
def test_w23_two_processes_compute_each_picture_once(pictures: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    run(pictures, tmp_path / "one", runs["pictures"], tmp_path / "c1")
    write_picture(pictures / "test" / "b" / "odd.png", seed=99)  # 13 pictures do not divide by two
    try:
        words = command(pictures, tmp_path / "two", runs["pictures"], tmp_path / "c2", "--gpus", "2", "--json")
        answer = subprocess.run(words, env=ONE_CORE, capture_output=True, text=True, timeout=300, check=True)
        info = json.loads(answer.stdout)
        assert (info["forward_passes"], info["cache_hits"]) == (13, 0)
        assert FeatureCache(tmp_path / "c2").info().entries == 13
        run(pictures, tmp_path / "same", runs["pictures"], tmp_path / "c3")
    finally:
        (pictures / "test" / "b" / "odd.png").unlink()
    two, same = read_features(tmp_path / "two"), read_features(tmp_path / "same")
    for name in ("train", "val", "test"):
        ids = [row.case_id for row in two.part(name).rows]
        assert len(set(ids)) == len(ids)
        assert two.part(name).rows == same.part(name).rows
        np.testing.assert_allclose(two.part(name).embeddings_RP, same.part(name).embeddings_RP, atol=1e-6)


@pytest.mark.slow
def test_w23_one_bad_case_stops_all_processes_with_one_error(
    damaged: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    words = command(damaged, tmp_path / "out", runs["ct"], tmp_path / "c", "--gpus", "2")
    answer = subprocess.run(words, env=ONE_CORE, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 3
    assert answer.stderr.count("error:") == 1
    words = [*words, "--on-error", "skip"]
    answer = subprocess.run(words, env=ONE_CORE, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 4
    assert read_features(tmp_path / "out").part("all").case_ids == ("st2__se0", "st2__se1", "st3__se0", "st3__se1")


@pytest.mark.slow
def test_several_processes_for_one_case_are_refused(ct_table: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    words = command(ct_table.parent / "st0/se0/v.nii.gz", tmp_path / "out", runs["ct"], tmp_path / "c", "--gpus", "2")
    answer = subprocess.run(words, env=ONE_CORE, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 2
    assert "--gpus" in answer.stderr


@pytest.mark.slow
def test_r17_two_commands_fill_one_cache(prostate_tree: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    both = [
        subprocess.Popen(command(prostate_tree, tmp_path / name, runs["prostate"], tmp_path / "c"), env=ONE_CORE,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in ("a", "b")
    ]  # fmt: skip
    assert [process.wait(120) for process in both] == [0, 0]
    assert FeatureCache(tmp_path / "c").info().entries == 6
    assert arrays_of(tmp_path / "a") == arrays_of(tmp_path / "b")


def test_r17_a_second_command_on_one_folder_is_refused(
    prostate_tree: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    from medssl_cli.core.run import locked

    with locked(tmp_path / "out", "output folder"), pytest.raises(ConfigError) as caught:
        run(prostate_tree, tmp_path / "out", runs["prostate"], tmp_path / "c")
    assert caught.value.code == "folder_locked"


@pytest.mark.slow
def test_r18_memory_does_not_grow_with_the_number_of_cases(
    ct_table: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for n in range(200):
        path = tmp_path / "in" / f"{n}.nii"
        path.parent.mkdir(exist_ok=True)
        voxels = rng.integers(-1000, 1000, (64, 64, 40)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1, 5, 1])), path)
        rows.append((f"s{n}", path.name))
    script = (
        "import sys, resource\nsys.argv = ['medssl', *sys.argv[1:]]\n"
        "from medssl_cli.app import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('RSS', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    used = {}
    for count in (20, 200):
        table = write_table(tmp_path / "in" / f"t{count}.csv", ("series_uid", "nifti_path"), rows[:count])
        words = command(
            table, tmp_path / f"out{count}", runs["ct"], tmp_path / f"c{count}", "--pool", "none", "resize=16"
        )
        answer = subprocess.run(
            [sys.executable, "-c", script, *words[3:]], env=ONE_CORE, capture_output=True, text=True, check=True
        )
        used[count] = int(answer.stdout.rsplit("RSS ", 1)[1]) / 1024
    assert used[200] < used[20] + 20, used  # MB; the volumes alone are 63 MB


# --- in memory -------------------------------------------------------------------------------------------------------


def test_features_in_memory_equal_those_on_disk(
    prostate_tree: Path, splits: Path, runs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    run(prostate_tree, tmp_path, runs["prostate"], cache, splits=splits, targets=("label",))
    backbone = opened(runs["prostate"])
    whole = read_cohort(prostate_tree, backbone, splits=splits)
    cohort = replace(whole, parts={name: whole.parts[name] for name in ("train", "test")})
    embedder = Embedder(backbone, ExtractConfig(), FeatureCache(cache))
    source = find_labels(cohort, None, ("label",), "mean")
    held, failed = features_of(cohort, embedder, pool="mean", source=source)
    assert failed == []
    stored = read_features(tmp_path)
    assert held.names == ("train", "test")
    for name in held.names:
        np.testing.assert_array_equal(held.part(name).embeddings_RP, stored.part(name).embeddings_RP)
        np.testing.assert_array_equal(held.part(name).labels_RC, stored.part(name).labels_RC)
        assert held.part(name).rows == stored.part(name).rows
        assert held.part(name).facts == stored.part(name).facts
        assert held.info["splits"][name] == stored.info["splits"][name]
    assert held.info["extraction"] == stored.info["extraction"]


def test_a_part_that_is_not_asked_for_is_not_looked_at(
    prostate_tree: Path, splits: Path, runs: dict[str, Path]
) -> None:
    backbone = opened(runs["prostate"])
    whole = read_cohort(prostate_tree, backbone, splits=splits)
    cohort = replace(whole, parts={"val": whole.parts["val"]})
    embedder = Embedder(backbone, ExtractConfig())
    found, _ = features_of(cohort, embedder, pool="mean", source=find_labels(cohort, None, (), "mean"))
    assert embedder.forward_passes == 12 * len(cohort.parts["val"])
    with pytest.raises(DataError):
        found.part("test")


def test_hidden_sequences_change_the_vectors(prostate_tree: Path, runs: dict[str, Path]) -> None:
    backbone = opened(runs["prostate"])
    cohort = read_cohort(prostate_tree, backbone)
    embedder = Embedder(backbone, ExtractConfig(max_slices=1))
    every, t2_only = (
        [found.slices_ND for _, _, found in vectors_of(cohort.cases, embedder, 1, shown)]
        for shown in (None, ("ax_t2wi",))
    )
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(every, t2_only, strict=True))
