"""Cases with their label maps: each is found by place and stem, and whoever lacks one is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import write_volume
from medssl_cli.data.label_maps import LabelSpec
from medssl_cli.data.labelled_cases import (
    described_spec,
    find_label_cases,
    find_label_pictures,
    holds_labelled_pictures,
    label_stems,
)
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.data.store import build_store

SHAPE = (3, 6, 8)


def volume(path: Path, value: int = 0, channels: int = 0) -> Path:
    array = np.arange(144, dtype=np.int16).reshape(SHAPE) + value
    write_volume(path, Volume(np.stack([array] * channels) if channels else array, np.eye(4)))
    return path


def mask(path: Path, value: int = 1) -> Path:
    label = np.zeros(SHAPE, np.uint8)
    label[1, 2:4, 3:5] = value
    write_volume(path, Volume(label, np.eye(4)))
    return path


def describe(root: Path, **values: object) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(values), encoding="utf-8")
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("007", "008"):
        volume(tmp_path / "tree" / name / "t2.nii.gz", len(name))
        mask(tmp_path / "tree" / name / "lesion.nii.gz")
    return tmp_path / "tree"


def rois(cases: list[Case], root: Path) -> dict[str, str]:
    return {case.case_id: "" if case.roi is None else case.roi.relative_to(root).as_posix() for case in cases}


# --- volumes ---------------------------------------------------------------------------------------------------------


def test_a_case_tree_names_the_stem(tree: Path) -> None:
    cases = find_label_cases(tree, "auto", ("t2",), "lesion", split="train")
    assert rois(cases, tree) == {"007": "007/lesion.nii.gz", "008": "008/lesion.nii.gz"}
    assert {case.split for case in cases} == {"train"}
    store = build_store(cases, ("t2",), PreprocessConfig(), tree.parent / "cache", kind="labels")
    assert store.label_values(0).tolist() == [0, 1]


def test_a_stem_that_no_case_has_tells_the_nearest(tree: Path) -> None:
    with pytest.raises(DataError) as error:
        find_label_cases(tree, "cases", ("t2",), "leison")
    assert error.value.code == "label_missing"
    assert str(error.value.what) == "No case has a label map 'leison' (did you mean 'lesion'?)."
    assert error.value.where.endswith("tree: there are lesion, t2")
    assert label_stems(tree) == ["lesion", "t2"]


def test_every_case_without_a_label_map_is_named(tree: Path) -> None:
    for name in ("001", "002"):
        volume(tree / name / "t2.nii.gz")
    with pytest.raises(DataError) as error:
        find_label_cases(tree, "cases", ("t2",), "lesion")
    assert error.value.code == "label_missing"
    assert "2 of 4 cases" in error.value.what
    assert error.value.where == "'001', '002': there is no 'lesion'"
    faults: list[str] = []
    cases = find_label_cases(tree, "cases", ("t2",), "lesion", on_fault=lambda name, _: faults.append(name))
    assert ([case.case_id for case in cases], faults) == (["007", "008"], ["001", "002"])
    loose = find_label_cases(tree, "cases", ("t2",), "lesion", require=False)
    assert rois(loose, tree)["001"] == ""
    (tree.parent / "ids.csv").write_text("patient_id\n007\n", encoding="utf-8")
    assert len(find_label_cases(tree, "cases", ("t2",), "lesion", split_csv=tree.parent / "ids.csv")) == 1


def test_a_label_map_needs_a_name_and_a_layout(tree: Path) -> None:
    with pytest.raises(ConfigError, match="no name"):
        find_label_cases(tree, "cases", ("t2",), "")
    (tree / "table.csv").write_text("path\n007/t2.nii.gz\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="tree of cases"):
        find_label_cases(tree / "table.csv", "auto", ("t2",), "lesion")


def test_a_template_names_images_and_labels_alike(tmp_path: Path) -> None:
    volume(tmp_path / "set/t2/a.nii.gz")
    mask(tmp_path / "set/gland/a.nii.gz")
    cases = find_label_cases(tmp_path / "set", "auto", ("t2",), "gland", template="{sequence}/{subject}.nii.gz")
    assert rois(cases, tmp_path / "set") == {"a": "gland/a.nii.gz"}


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    root = describe(
        tmp_path / "Dataset005",
        channel_names={"0": "T2"},
        labels={"background": 0, "PZ": 1, "TZ": 2, "ignore": 3},
        file_ending=".nii.gz",
    )
    for name in ("p1", "p2"):
        volume(root / f"imagesTr/{name}_0000.nii.gz")
        mask(root / f"labelsTr/{name}.nii.gz", 2)
    volume(root / "imagesTs/p9_0000.nii.gz")
    return root


def test_nnunet_tells_cases_and_classes(nnunet: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        cases = find_label_cases(nnunet, "auto", ("t2",), "")
    assert rois(cases, nnunet) == {"p1": "labelsTr/p1.nii.gz", "p2": "labelsTr/p2.nii.gz"}
    assert "1 test case without a label map: 'p9'" in caplog.messages
    assert described_spec(nnunet) == LabelSpec(("background", "PZ", "TZ"), {0: 0, 1: 1, 2: 2}, (3,))
    (nnunet / "labelsTr/p2.nii.gz").unlink()
    with pytest.raises(DataError) as error:
        find_label_cases(nnunet, "auto", ("t2",), "")
    assert error.value.where == "'p2'"


def test_nnunet_with_test_labels_keeps_the_test_cases(nnunet: Path) -> None:
    mask(nnunet / "labelsTs/p9.nii.gz")
    cases = find_label_cases(nnunet, "nnunet", ("t2",), "lesion")
    assert [(case.case_id, case.split) for case in cases] == [("p1", "train"), ("p2", "train"), ("p9", "test")]


def test_decathlon_tells_cases_classes_and_modalities(tmp_path: Path) -> None:
    root = describe(
        tmp_path / "Task05",
        modality={"0": "T2", "1": "ADC"},
        labels={"0": "background", "1": "PZ", "2": "TZ"},
        training=[{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        test=["./imagesTs/b.nii.gz"],
    )
    volume(root / "imagesTr/a.nii.gz", channels=2)
    volume(root / "imagesTs/b.nii.gz", channels=2)
    mask(root / "labelsTr/a.nii.gz", 2)
    cases = find_label_cases(root, "auto", ("t2", "adc"), "any")
    assert rois(cases, root) == {"a": "labelsTr/a.nii.gz"}
    assert cases[0].sequences["adc"].volume_index == 1
    store = build_store(cases, ("t2", "adc"), PreprocessConfig(), tmp_path / "cache", kind="labels")
    spec = described_spec(root)
    assert spec is not None
    assert spec.classes_of(store.read_labels(0, 0, 1)).max() == spec.classes.index("TZ")


@pytest.mark.parametrize(
    ("labels", "told"), [({"background": 0, "whole": [1, 2]}, "region"), ([1], "no mapping"), ({"a": "b"}, "'a': 'b'")]
)
def test_a_description_with_unusable_labels_is_named(tmp_path: Path, labels: object, told: str) -> None:
    root = describe(tmp_path / "set", labels=labels)
    with pytest.raises(DataError) as error:
        described_spec(root)
    assert "dataset.json" in error.value.where
    assert told in error.value.where


def test_without_a_description_nothing_is_told(tree: Path) -> None:
    assert described_spec(tree) is None
    assert described_spec(describe(tree / "x", name="y")) is None


# --- pictures --------------------------------------------------------------------------------------------------------


def png(path: Path, value: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 9), value, np.uint8)).save(path)
    return path


def pairs(root: Path, **settings: object) -> dict[str, str]:
    return rois(find_label_pictures(root, **settings), root)  # type: ignore[arg-type]


def test_w09_a_path_with_images_in_it_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "images_v2" / "my_images"
    png(root / "images" / "a_images.png")
    png(root / "labels" / "a_images.png")
    png(tmp_path / "images_v2" / "my_labels" / "labels" / "a_labels.png")  # where a replaced path would lead
    assert pairs(root) == {"images/a_images.png": "labels/a_images.png"}


def test_w38_only_pictures_count(tmp_path: Path) -> None:
    png(tmp_path / "images/a.png")
    png(tmp_path / "labels/a.png")
    for name in ("images/Thumbs.db", "images/notes.txt", "images/.hidden.png", "labels/a.txt", "images/.ipynb/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert pairs(tmp_path) == {"images/a.png": "labels/a.png"}


def test_a_label_map_may_have_another_type_or_add_to_the_stem(tmp_path: Path) -> None:
    for picture, label in (
        ("a.jpg", "a.png"),
        ("b.png", "b_1stHO.png"),
        ("c.png", "C_mask.tif"),
        ("d.png", "d.npy"),
        ("e.png", "e.nii.gz"),
        ("f.b.png", "f.b.png"),  # the stem ends at the last dot: W24
        ("f.c.png", "f.c.png"),
        ("21_training.tif", "21_manual1.gif"),
    ):
        png(tmp_path / "images" / picture)
        (tmp_path / "masks").mkdir(exist_ok=True)
        (tmp_path / "masks" / label).write_bytes(b"not read here")
    assert {Path(a).name: Path(b).name for a, b in pairs(tmp_path).items()} == {
        "a.jpg": "a.png",
        "b.png": "b_1stHO.png",
        "c.png": "C_mask.tif",
        "d.png": "d.npy",
        "e.png": "e.nii.gz",
        "f.b.png": "f.b.png",
        "f.c.png": "f.c.png",
        "21_training.tif": "21_manual1.gif",
    }


@pytest.mark.parametrize(
    ("picture", "label", "split"),
    [
        ("set_a/training/images/1.png", "set_a/training/labels/1.png", "train"),
        ("test/images/1.png", "test/masks/1.png", "test"),
        ("images/val/1.png", "labels/val/1.png", "val"),
        ("set/Validation/Images/1.png", "set/Validation/Labels/1.png", "val"),
        ("images/1.png", "gt/1.png", ""),
    ],
)
def test_folders_tell_the_split(tmp_path: Path, picture: str, label: str, split: str) -> None:
    png(tmp_path / picture)
    png(tmp_path / label)
    (case,) = find_label_pictures(tmp_path)
    assert (case.case_id, case.split, case.roi) == (picture, split, tmp_path / label)
    assert holds_labelled_pictures(tmp_path)
    assert find_label_pictures(tmp_path, split="train")[0].split == "train"


def test_the_field_of_view_of_drive_is_no_label(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("images", "mask", "1st_manual"):
        png(tmp_path / "training" / folder / "21.png")
    with caplog.at_level("INFO"):
        assert pairs(tmp_path) == {"training/images/21.png": "training/1st_manual/21.png"}
    assert "labels are taken from 1st_manual, not from mask" in caplog.text
    assert pairs(tmp_path, label="mask") == {"training/images/21.png": "training/mask/21.png"}


def test_pictures_without_labels_are_named_and_test_sets_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    png(tmp_path / "train/images/a.png")
    png(tmp_path / "train/labels/a.png")
    png(tmp_path / "test/images/t.png")
    with caplog.at_level("INFO"):
        assert pairs(tmp_path) == {"train/images/a.png": "train/labels/a.png"}
    assert "1 picture without a folder of labels: 'test/images/t.png'" in caplog.messages
    png(tmp_path / "train/images/b.png")
    with pytest.raises(DataError) as error:
        pairs(tmp_path)
    assert (error.value.code, error.value.where) == ("label_missing", "'train/images/b.png'")
    assert len(find_label_pictures(tmp_path, on_fault=lambda *_: None)) == 1
    assert len(find_label_pictures(tmp_path, require=False)) == 3


def test_two_label_maps_or_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("images/a.png", "labels/a_mask.png", "labels/a_seg.png"):
        png(tmp_path / name)
    with pytest.raises(DataError, match=r"belong to a.png") as error:
        pairs(tmp_path)
    assert error.value.code == "label_ambiguous"
    png(tmp_path / "labels/a.png")
    assert pairs(tmp_path) == {"images/a.png": "labels/a.png"}  # the equal stem is meant
    png(tmp_path / "images/a.jpg")
    with pytest.raises(DataError, match="one name"):
        pairs(tmp_path)


def test_nnunet_of_pictures(tmp_path: Path) -> None:
    root = describe(tmp_path / "set", channel_names={"0": "R"}, labels={"background": 0, "road": 1}, file_ending=".png")
    png(root / "imagesTr/r_01_0000.png")
    png(root / "labelsTr/r_01.png")
    png(root / "imagesTs/r_02_0000.png")
    assert holds_labelled_pictures(root)
    (case,) = find_label_pictures(root)
    assert (case.case_id, case.split, case.roi) == ("imagesTr/r_01_0000.png", "train", root / "labelsTr/r_01.png")
    png(root / "imagesTr/r_01_0001.png")
    with pytest.raises(DataError, match="several files"):
        find_label_pictures(root)


def test_lists_choose_pictures_and_patients(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("P1_a", "P1_b", "P2_a"):
        png(root / f"images/{name}.png")
        png(root / f"labels/{name}.png")
    ids = tmp_path / "train.csv"
    ids.write_text("image,group\nP1_a.png,P1\nimages/P2_a.png,P2\nlabels/P1_b.png,P1\n", encoding="utf-8")
    cases = find_label_pictures(root, split_csv=ids)
    assert [(case.case_id, case.patient_id) for case in cases] == [("images/P1_a.png", "P1"), ("images/P2_a.png", "P2")]
    grouped = find_label_pictures(root, group_pattern=r"(P\d+)_")
    assert [case.patient_id for case in grouped] == ["P1", "P1", "P2"]
    ids.write_text("image\nP1_c.png\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        find_label_pictures(root, split_csv=ids)
    assert error.value.code == "id_unknown"
    assert "P1_c.png" in error.value.where


@pytest.mark.parametrize("link", ["images/x.png", "labels/x.png"])
def test_r13_links_out_of_the_tree_are_refused(tmp_path: Path, link: str) -> None:
    root = tmp_path / "set"
    outside = png(tmp_path / "secret.png")
    for name in ("images/x.png", "labels/x.png"):
        if name != link:
            png(root / name)
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(outside)
    with pytest.raises(DataError) as error:
        find_label_pictures(root)
    assert error.value.code == "path_escapes"


def test_a_tree_without_labels_is_told(tmp_path: Path) -> None:
    png(tmp_path / "images/a.png")
    assert not holds_labelled_pictures(tmp_path)
    for settings, told in (({}, "no folder images beside"), ({"label": "vessels"}, "'vessels'")):
        with pytest.raises(DataError) as error:
            find_label_pictures(tmp_path, **settings)  # type: ignore[arg-type]
        assert told in error.value.where
    with pytest.raises(DataError, match="no pictures"):
        find_label_pictures(tmp_path / "absent")


def test_real_vessels_by_two_observers(real_data: Path) -> None:
    root = real_data / "chase_db1_vessels"
    cases = find_label_pictures(root, group_pattern=r"Image_(\d+)[LR]")
    assert len(cases) == 16
    assert len({case.patient_id for case in cases}) == 8
    assert all(case.roi is not None and case.roi.parent.name == "manual1" for case in cases)
    second = find_label_pictures(root, label="manual2")
    assert rois(second, root)["images/Image_01L.jpg"] == "manual2/Image_01L_2ndHO.png"
