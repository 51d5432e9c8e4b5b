"""From a data root to cases: ids, leaks, missing sequences, paths; all before a voxel is read."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.data.datasets import DataConfig
from medssl_cli.services.training_data import read_training_data


def config_of(root: Path, **values: Any) -> DataConfig:
    return DataConfig.model_validate({"root": str(root), **values})


@pytest.fixture
def tree(tmp_path: Path, prostate_tree: Path) -> Path:
    """A tree of our own, to be changed."""
    return Path(shutil.copytree(prostate_tree, tmp_path / "tree"))


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfid\r\n007\r\n\r\n12\r\n",  # byte-order mark, CRLF, a blank line
        "patient_id,note\n007,a\n12,b\n",
        "name\n12\n007\n12\n",  # an alias, and one id twice
        "# made by hand\ncase_id\n 007 \n12\n",
    ],
)
def test_r11_t22_ids_are_text_however_they_are_written(tree: Path, text: str | bytes) -> None:
    (tree / "PT-0000").rename(tree / "007")
    (tree / "PT-0003").rename(tree / "12")
    (tree / "labels.csv").unlink()
    data = read_training_data(config_of(tree, split_csv=str(write(tree / "split/train.csv", text))))
    assert [case.case_id for case in data.cases] == ["007", "12"]


def test_r11_an_id_without_a_folder_names_the_nearest(tree: Path) -> None:
    (tree / "PT-0000").rename(tree / "007")
    split = write(tree / "split/train.csv", "patient_id\n7\n")
    with pytest.raises(DataError, match="1 of 1 ids have no folder") as caught:
        read_training_data(config_of(tree, split_csv=str(split)))
    assert "did you mean '007'?" in caught.value.where


@pytest.mark.parametrize("name", ["../tree/PT-0000", "/etc", "..", "PT-0000/../PT-0000"])
def test_r13_ids_stay_below_the_root(tree: Path, name: str) -> None:
    split = write(tree.parent / "train.csv", f"patient_id\n{name}\n")
    with pytest.raises(DataError) as caught:
        read_training_data(config_of(tree, split_csv=str(split)))
    assert caught.value.code == "path_escapes"


def test_r13_a_link_out_of_the_root_is_refused(tree: Path, prostate_tree: Path) -> None:
    (tree / "PT-0000/ax_t2wi.nii.gz").unlink()
    (tree / "PT-0000/ax_t2wi.nii.gz").symlink_to(prostate_tree / "PT-0000/ax_t2wi.nii.gz")
    with pytest.raises(DataError) as caught:
        read_training_data(config_of(tree))
    assert caught.value.code == "path_escapes"


def test_the_split_digest_knows_ids_alone(tree: Path) -> None:
    one = write(tree.parent / "one.csv", "id\nPT-0000\nPT-0003\n")
    other = write(tree.parent / "other.csv", "patient_id\nPT-0003\nPT-0000\n")
    digests = {read_training_data(config_of(tree, split_csv=str(path))).split_digest for path in (one, other)}
    assert len(digests) == 1
    assert read_training_data(config_of(tree)).split_digest not in digests


# --- leaks -----------------------------------------------------------------------------------------------------------


def test_r12_a_patient_on_two_sides_is_refused(tree: Path) -> None:
    """Two studies of one patient, as labels.csv tells."""
    train = write(tree / "split/train.csv", "patient_id\nPT-0000\nPT-0001_20230106\n")
    write(tree / "split/val.csv", "patient_id\nPT-0001_20240215\n")
    with pytest.raises(DataError) as caught:
        read_training_data(config_of(tree, split_csv=str(train)))
    assert caught.value.code == "split_leak"
    assert "patient PT-0001: train (PT-0001_20230106) and val (PT-0001_20240215)" in caught.value.where


def test_r12_one_case_in_two_lists_is_refused_even_if_it_is_not_on_this_disk(tree: Path) -> None:
    train = write(tree / "split/train.csv", "patient_id\nPT-0000\nPT-0003\n")
    write(tree / "split/test.csv", "patient_id\nPT-9999\nPT-0003\n")
    with pytest.raises(DataError, match="splits share patients") as caught:
        read_training_data(config_of(tree, split_csv=str(train)))
    assert "PT-0003" in caught.value.where


def test_r12_one_image_under_two_names_is_refused(tree: Path) -> None:
    shutil.copytree(tree / "PT-0000", tree / "ZZ-0000")
    train = write(tree / "split/train.csv", "patient_id\nPT-0000\nPT-0003\n")
    write(tree / "split/val.csv", "patient_id\nZZ-0000\n")
    with pytest.raises(DataError, match="same images under two names") as caught:
        read_training_data(config_of(tree, split_csv=str(train)))
    assert "ZZ-0000" in caught.value.where


def test_a_sibling_list_of_cases_elsewhere_is_no_fault(tree: Path) -> None:
    train = write(tree / "split/train.csv", "patient_id\nPT-0000\n")
    write(tree / "split/val.csv", "patient_id\nPT-9999\n")
    assert len(read_training_data(config_of(tree, split_csv=str(train))).cases) == 1


@pytest.fixture
def image_tree(tmp_path: Path) -> Path:
    """Two pictures to train on, one to validate, two to test."""
    root = tmp_path / "images"
    for i, name in enumerate(("train/a/0.png", "train/b/1.png", "val/a/2.png", "test/a/3.png", "test/b/4.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(root / name)
    return root


def test_r12_an_image_tree_is_trained_on_its_train_folder_alone(
    image_tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data = read_training_data(config_of(image_tree))
    assert [case.case_id for case in data.cases] == ["train/a/0.png", "train/b/1.png"]
    assert "2 pictures of the split train are used; left out: 2 of test, 1 of val" in caplog.text
    tested = read_training_data(config_of(image_tree, split="TEST"))
    assert [case.case_id for case in tested.cases] == ["test/a/3.png", "test/b/4.png"]
    assert data.split_digest == read_training_data(config_of(image_tree, split="train")).split_digest


def test_r12_a_table_of_ids_counts_before_the_folders(image_tree: Path) -> None:
    table = write(image_tree.parent / "ids.csv", "id\nval/a/2.png\ntrain/a/0.png\n")
    data = read_training_data(config_of(image_tree, split_csv=str(table)))
    assert [case.case_id for case in data.cases] == ["train/a/0.png", "val/a/2.png"]


def test_r12_one_picture_in_two_split_folders_is_a_leak(image_tree: Path) -> None:
    shutil.copy(image_tree / "test/a/3.png", image_tree / "train/b/9.png")
    with pytest.raises(DataError, match="same images under two names") as caught:
        read_training_data(config_of(image_tree))
    assert caught.value.code == "split_leak"


def test_r12_a_picture_outside_the_split_folders_is_left_out_and_counted(
    image_tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(image_tree / "train/a", image_tree / "more")
    with caplog.at_level(logging.WARNING):
        data = read_training_data(config_of(image_tree))
    assert len(data.cases) == 2
    assert "1 in no split folder" in caplog.text


def test_r12_a_split_without_a_picture_is_refused(image_tree: Path) -> None:
    shutil.rmtree(image_tree / "val")
    with pytest.raises(DataError, match="No picture is of the split val") as caught:
        read_training_data(config_of(image_tree, split="VAL"))
    assert "2 of test, 2 of train" in caught.value.where
    shutil.move(image_tree / "test", image_tree / "one")
    shutil.move(image_tree / "train", image_tree / "two")
    assert len(read_training_data(config_of(image_tree)).cases) == 4


# --- sequences -------------------------------------------------------------------------------------------------------


def test_cases_without_any_sequence_are_named(tree: Path) -> None:
    for name in ("PT-0003", "PT-0004"):
        for path in (tree / name).glob("ax_*"):
            path.unlink()
    with pytest.raises(DataError, match="2 of 6 cases have none of the sequences") as caught:
        read_training_data(config_of(tree))
    assert "'PT-0003', 'PT-0004'" in caught.value.where
    data = read_training_data(config_of(tree, on_error="skip"))
    assert len(data.cases) == 4
    assert [failure[0] for failure in data.unreadable] == ["PT-0003", "PT-0004"]


def test_a_sequence_that_no_case_has_is_refused(tree: Path) -> None:
    with pytest.raises(DataError, match="No case has the sequence ax_adcc"):
        read_training_data(config_of(tree, mri_sequences=["ax_t2wi", "ax_adcc"], on_error="skip"))
    with pytest.raises(DataError, match="6 of 6 cases have none of the sequences"):
        read_training_data(config_of(tree, mri_sequences=["t2"], on_error="skip"))


def test_a_sequence_that_some_cases_lack_is_told(prostate_tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        read_training_data(config_of(prostate_tree))
    assert "ax_adc is absent in 1 of 6 cases: 'PT-0002'." in caplog.text


def test_no_root_and_a_table_are_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No data was named"):
        read_training_data(DataConfig())
    with pytest.raises(ConfigError, match="series table"):
        read_training_data(config_of(write(tmp_path / "series.csv", "path\na.nii\n")))
