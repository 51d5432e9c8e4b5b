"""Phantom cohorts on disk: same seed same bytes, safe to interrupt, never over another's results."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from medssl_cli.core.errors import ConfigError
from medssl_cli.core.run import locked
from medssl_cli.data.images import read_volume
from medssl_cli.data.manifest import case_ids, read_table_cases
from medssl_cli.services.phantom import LABEL_COLUMNS, TASKS, make_phantom


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def labels_of(out: Path) -> list[dict[str, str]]:
    with (out / "labels.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tree") / "out"
    make_phantom("prostate", out, cases=4, seed=3)
    return out


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dicom") / "out"
    make_phantom("prostate-dicom", out, cases=4, seed=3)
    return out


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("heads") / "out"
    make_phantom("head-ct", out, cases=4, seed=3)
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "out"
    make_phantom("ct-pet", out, cases=4, seed=3)
    return out


@pytest.mark.parametrize("task", list(TASKS))
def test_same_seed_same_bytes(task: str, tree: Path, dicom: Path, heads: Path, pairs: Path, tmp_path: Path) -> None:
    make_phantom(task, tmp_path / "again", cases=4, seed=3)
    ours = {"prostate": tree, "prostate-dicom": dicom, "head-ct": heads, "ct-pet": pairs}[task]
    assert digests(tmp_path / "again") == digests(ours)


def test_other_seed_other_images(tree: Path, tmp_path: Path) -> None:
    make_phantom("prostate", tmp_path / "other", cases=1, seed=4)
    ours, theirs = digests(tree), digests(tmp_path / "other")
    shared = [name for name in theirs if name in ours and name.startswith("PT-") and "lesion" not in name]
    assert len(shared) >= 4
    assert all(ours[name] != theirs[name] for name in shared)


def test_fewer_cases_are_the_first_ones(tree: Path, tmp_path: Path) -> None:
    make_phantom("prostate", tmp_path / "few", cases=3, seed=3)
    few = {name: digest for name, digest in digests(tmp_path / "few").items() if name.startswith("PT-")}
    assert few.items() <= digests(tree).items()


def test_case_tree_has_images_and_masks(tree: Path) -> None:
    rows = labels_of(tree)
    folders = sorted(path.name for path in tree.iterdir() if path.is_dir())
    assert folders == sorted(row["case_id"] for row in rows)
    for row in rows:
        names = {path.name for path in (tree / row["case_id"]).iterdir()}
        assert names >= {"ax_t2wi.nii.gz", "ax_dwi_b1400.nii.gz", "roi_Prostate.nii.gz", "lesion.nii.gz"}
        lesion = np.asarray(nib.load(tree / row["case_id"] / "lesion.nii.gz").dataobj)
        assert bool(lesion.any()) == (row["label"] == "1")
    assert sum(not (tree / row["case_id"] / "ax_adc.nii.gz").exists() for row in rows) == 1


def test_labels_can_be_joined_in_every_way(dicom: Path, tree: Path) -> None:
    rows = labels_of(dicom)
    assert rows == labels_of(tree)
    assert tuple(rows[0]) == LABEL_COLUMNS
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in dicom.glob("PT-*/**/*") if path.is_file()]
    studies = {(h.PatientID, h.StudyDate, h.StudyInstanceUID) for h in headers}
    assert {(row["patient_id"], row["study_date"], row["study_uid"]) for row in rows} == studies
    for row in rows:
        several = sum(other["patient_id"] == row["patient_id"] for other in rows) > 1
        assert row["case_id"] == (f"{row['patient_id']}_{row['study_date']}" if several else row["patient_id"])
    assert sum(row["case_id"] != row["patient_id"] for row in rows) == 2


def test_masks_beside_dicom_equal_those_of_the_case_tree(dicom: Path, tree: Path) -> None:
    for row in labels_of(dicom):
        for name in ("roi_Prostate.nii.gz", "lesion.nii.gz"):
            beside, inside = dicom / "masks" / row["case_id"] / name, tree / row["case_id"] / name
            assert beside.read_bytes() == inside.read_bytes()


def test_one_dicom_study_lacks_its_adc(dicom: Path) -> None:
    without = []
    for study in dicom.glob("PT-*/*"):
        files = [path for path in study.rglob("*") if path.is_file()]
        names = {pydicom.dcmread(path, stop_before_pixels=True).SeriesDescription for path in files}
        if not any("ADC" in name or "Apparent" in name for name in names):
            without.append(study)
    assert len(without) == 1


def test_result_file_holds_no_clock(tree: Path) -> None:
    result = json.loads((tree / "phantom.json").read_text(encoding="utf-8"))
    assert (result["started_at"], result["elapsed_s"]) == (None, None)
    assert "same bytes" in result["reason"]
    assert result["n_cases"] == 4
    assert list(result["incomplete"].values()) == [["ax_adc"]]


# --- head CT ---------------------------------------------------------------------------------------------------------


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_series_table_has_the_columns_of_the_specification(heads: Path) -> None:
    rows = table(heads / "series.csv")
    kinds = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
    ids = ["rel_dir", "patient_id", "study_uid", "series_uid", "nifti_path"]
    assert list(rows[0])[:11] == [*ids, "label_any", *(f"label_{kind}" for kind in kinds)]
    assert len(rows) == 5  # the fourth study has two series
    assert len({row["study_uid"] for row in rows}) == 4
    assert len({row["patient_id"] for row in rows}) == 3
    for row in rows:
        assert int(row["label_any"]) == max(int(row[f"label_{kind}"]) for kind in kinds)
        assert row["nifti_path"] == f"{row['rel_dir']}/ct.nii.gz"


def test_head_is_read_as_hounsfield_units_by_nibabel_and_by_us(heads: Path) -> None:
    for row in table(heads / "series.csv"):
        image = nib.load(heads / row["nifti_path"])
        hu = image.get_fdata()
        assert image.get_data_dtype() == np.int16
        assert -2000 <= hu.min() <= -990
        assert 900 < hu.max() < 2000
        np.testing.assert_array_equal(read_volume(heads / row["nifti_path"]).array.T, hu)
        assert "".join(nib.aff2axcodes(image.affine)) == row["orientation"]
        mask = nib.load(heads / row["mask_path"])
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert mask.shape == image.shape
        shown = sorted(set(np.unique(np.asarray(mask.dataobj))) - {0})
        labels = [row[name] for name in row if name.startswith("label_")][1:]
        assert shown == [value for value, label in enumerate(labels, start=1) if label == "1"]


def test_slice_table_counts_from_the_feet_along_the_superior_axis(heads: Path) -> None:
    slices = table(heads / "slices.csv")
    assert list(slices[0])[:4] == ["patient_id", "study_uid", "series_uid", "slice_index"]
    for row in table(heads / "series.csv"):
        mine = [line for line in slices if line["series_uid"] == row["series_uid"]]
        mask = nib.as_closest_canonical(nib.load(heads / row["mask_path"]))  # RAS: the last axis runs upwards
        shown = np.asarray(mask.dataobj) > 0
        assert [int(line["slice_index"]) for line in mine] == list(range(shown.shape[2]))
        positive = [line["label_any"] == "1" for line in mine]
        assert not any(p and not s for p, s in zip(positive, shown.any((0, 1)), strict=True))
        assert max(positive) == (row["label_any"] == "1")


def test_masks_of_heads_are_no_cases(heads: Path) -> None:
    cases = read_table_cases(heads / "series.csv", target="label_any")
    assert len(cases) == 5
    assert all(case.sequences["image"].path.name == "ct.nii.gz" for case in cases)
    assert "masks" not in case_ids(heads)


class Stop:
    """Progress that is interrupted after the second case."""

    def __call__(self, done: int, total: int, case_id: str) -> None:
        if done == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("task", ["prostate", "ct-pet", pytest.param("head-ct", marks=pytest.mark.slow)])
def test_r16_interrupted_phantom_goes_on_and_repeats_nothing(
    task: str, tree: Path, heads: Path, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make_phantom(task, out, cases=4, seed=3, progress=Stop())
    (out / ".tmp-PT-0001-left").mkdir()
    finished = {path: path.stat().st_mtime_ns for kind in ("nii.gz", "png") for path in out.rglob(f"*.{kind}")}
    assert finished
    make_phantom(task, out, cases=4, seed=3)
    assert digests(out) == digests({"prostate": tree, "head-ct": heads, "ct-pet": pairs}[task])
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert not list(out.glob(".tmp-*"))


def test_other_settings_are_refused_and_overwrite_replaces(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_phantom("prostate", out, cases=1, seed=0)
    before = digests(out)
    with pytest.raises(ConfigError, match="--overwrite") as refused:
        make_phantom("prostate", out, cases=1, seed=1)
    assert refused.value.code == "out_not_empty"
    assert digests(out) == before
    make_phantom("prostate", out, cases=1, seed=1, overwrite=True)
    make_phantom("prostate", tmp_path / "fresh", cases=1, seed=1)
    assert digests(out) == digests(tmp_path / "fresh")


def test_overwrite_mends_a_damaged_case(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_phantom("prostate", out, cases=1)
    before = digests(out)
    next(out.rglob("ax_t2wi.nii.gz")).write_bytes(b"")
    make_phantom("prostate", out, cases=1, overwrite=True)
    assert digests(out) == before


def test_r17_second_writer_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_phantom("prostate", out, cases=1)
    with locked(out, "phantom"), pytest.raises(ConfigError) as refused:
        make_phantom("prostate", out, cases=1)
    assert refused.value.code == "folder_locked"
    before = digests(out)
    with locked(out, "phantom"), pytest.raises(ConfigError) as refused:
        make_phantom("prostate", out, cases=1, seed=1, overwrite=True)
    assert refused.value.code == "folder_locked"
    assert digests(out) == before


def test_overwrite_spares_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="more than old results"):
        make_phantom("prostate", Path(), cases=1, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_pairs_have_one_name_in_all_three_folders_and_a_row_in_the_table(pairs: Path) -> None:
    names = [{path.name for path in (pairs / folder).iterdir()} for folder in ("CT", "PET", "masks")]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 24
    with (pairs / "slices.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["file"] for row in rows} == names[0]
    for row in rows:
        mask = np.asarray(Image.open(pairs / "masks" / row["file"]))
        assert set(np.unique(mask)) <= {0, 255}
        assert int((mask > 0).sum()) == int(row["tumour_pixels"])


def test_unknown_task_lists_what_exists(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        make_phantom("prostat", tmp_path / "out")
    assert refused.value.where == "available: prostate, prostate-dicom, head-ct, ct-pet"
    assert "did you mean prostate?" in refused.value.fix
    assert not (tmp_path / "out").exists()


def test_all_wrong_options_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        make_phantom("prostate", tmp_path / "out", cases=0, seed=-1, size="huge")
    assert refused.value.where.splitlines() == [
        "--cases 0: from 1 to 60000",
        "--seed -1: 0 or more",
        "--size huge: one of small, full",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_full_size_has_clinical_matrices(tmp_path: Path) -> None:
    make_phantom("prostate", tmp_path / "out", cases=1, size="full")
    image = nib.load(next((tmp_path / "out").rglob("ax_t2wi.nii.gz")))
    assert image.shape == (320, 320, 24)
    assert image.header.get_data_dtype() == np.int16
