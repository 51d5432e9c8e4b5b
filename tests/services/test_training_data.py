"""From a data root to cases: ids, leaks, missing sequences, paths; all before a voxel is read."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medssl_cli.core.config import changed_keys
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data.datasets import DataConfig, ImageDataset, SliceDataset, collate, prepare_store
from medssl_cli.data.images import read_volume, write_volume
from medssl_cli.data.views import CropsConfig, MultiCrop
from medssl_cli.services.training_data import TrainingData, build_dataset, read_training_data


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


def test_no_root_is_wrong_usage() -> None:
    with pytest.raises(ConfigError, match="No data was named"):
        read_training_data(DataConfig())


# --- series tables ---------------------------------------------------------------------------------------------------


def write_ct(path: Path, *, shape: tuple[int, int, int] = (6, 24, 20), seed: int = 0, padding: int = -1000) -> Path:
    """A small CT: air or padding around soft tissue of 0 to 100 HU with a bone of 900 HU, axial slices of 3 mm."""
    array = np.full(shape, padding, np.int16)
    tissue = np.random.default_rng(seed).integers(0, 100, shape)
    array[:, 4:-4, 4:-4] = tissue[:, 4:-4, 4:-4]
    array[:, 8:10, 8:10] = 900
    write_volume(path, Volume(array, np.diag([0.8, 0.8, 3.0, 1.0])))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Five series of three patients, of different sizes; relative paths."""
    rows = ["patient_id,study_uid,series_uid,nifti_path,label_any"]
    for i, patient in enumerate(("p1", "p1", "p2", "p2", "p3")):
        write_ct(tmp_path / f"nifti/{i}.nii.gz", shape=(6, 24 + 4 * i, 20 + 2 * i), seed=i)
        rows.append(f"{patient},st{i // 2},se{i},nifti/{i}.nii.gz,{i % 2}")
    return write(tmp_path / "series.csv", "\n".join(rows) + "\n")


def test_a_table_is_read_as_volumes_of_one_sequence(table: Path) -> None:
    data = read_training_data(config_of(table))
    assert (data.kind, data.layout) == ("volumes", "table")
    assert [case.case_id for case in data.cases] == [f"st{i // 2}__se{i}" for i in range(5)]
    assert (data.config.mri_sequences, data.config.as_pictures) == (("image",), True)
    assert DataConfig.model_validate(data.config.model_dump()).mri_sequences == ("image",)  # config.yaml of the run
    named = read_training_data(config_of(table, mri_sequences="ct"))
    assert list(named.cases[0].sequences) == ["ct"]
    assert named.config.as_pictures is None
    with pytest.raises(ConfigError, match="volume of one sequence"):
        read_training_data(config_of(table, mri_sequences="ct,pet"))


def test_missing_files_of_a_table_are_named_all_at_once(table: Path) -> None:
    (table.parent / "nifti/1.nii.gz").unlink()
    (table.parent / "nifti/3.nii.gz").rename(table.parent / "nifti/3.mha")
    text = table.read_text().replace("3.nii.gz", "3.mha").replace("nifti/4.nii.gz", "nifti")
    table.write_text(text)
    with pytest.raises(DataError, match="3 of 5 files") as caught:
        read_training_data(config_of(table))
    for part in ("nifti/1.nii.gz: there is no such file", "3.mha: it is none of", "nifti: it is no file"):
        assert part in caught.value.where
    data = read_training_data(config_of(table, on_error="skip"))
    assert [case.case_id for case in data.cases] == ["st0__se0", "st1__se2"]
    assert {failure[0] for failure in data.unreadable} == {"st0__se1", "st1__se3", "st2__se4"}


def test_r11_split_rows_patients_and_studies_select_rows(table: Path) -> None:
    header, *rows = table.read_text().splitlines()
    by_rows = write(table.parent / "s/a.csv", "\n".join([header, rows[0], rows[4]]) + "\n")
    by_patient = write(table.parent / "s/b.csv", "patient_id\np2\n")
    by_study = write(table.parent / "s/c.txt", "st2\n")
    for path, expected in ((by_rows, [0, 4]), (by_patient, [2, 3]), (by_study, [4])):
        data = read_training_data(config_of(table, split_csv=str(path)))
        assert [int(case.case_id[-1]) for case in data.cases] == expected
    with pytest.raises(DataError, match="1 of 1 ids have no row") as caught:
        read_training_data(config_of(table, split_csv=str(write(table.parent / "s/d.csv", "patient_id\np22\n"))))
    assert "did you mean 'p2'" in caught.value.where


def test_r12_a_table_has_the_leak_gates_of_trees(table: Path) -> None:
    header, *rows = table.read_text().splitlines()
    train = write(table.parent / "s/train.csv", "\n".join([header, rows[0], rows[2], rows[3]]) + "\n")
    val = write(table.parent / "s/val.csv", "\n".join([header, rows[4]]) + "\n")
    assert len(read_training_data(config_of(table, split_csv=str(train))).cases) == 3
    val.write_text("\n".join([header, rows[1]]) + "\n")  # another series of p1
    with pytest.raises(DataError, match="share patients") as caught:
        read_training_data(config_of(table, split_csv=str(train)))
    assert "patient p1" in caught.value.where
    val.write_text("\n".join([header, rows[4]]) + "\n")
    shutil.copy(table.parent / "nifti/0.nii.gz", table.parent / "nifti/4.nii.gz")
    with pytest.raises(DataError, match="under two names"):
        read_training_data(config_of(table, split_csv=str(train)))


def test_r12_a_split_table_named_as_data_is_compared_with_its_siblings(table: Path) -> None:
    header, *rows = table.read_text().splitlines()
    train = write(table.parent / "train.csv", "\n".join([header, *rows[:2]]) + "\n")
    write(table.parent / "test.csv", "\n".join([header, *rows[2:]]) + "\n")
    assert len(read_training_data(config_of(train)).cases) == 2
    write(table.parent / "test.csv", "\n".join([header, *rows[1:]]) + "\n")
    with pytest.raises(DataError) as caught:
        read_training_data(config_of(train))
    assert caught.value.code == "split_leak"


def test_r12_a_column_split_is_obeyed(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    header, *rows = table.read_text().splitlines()
    splits = ("train", "train", "VAL", "val", "test")
    text = "\n".join([f"{header},split", *(f"{row},{split}" for row, split in zip(rows, splits, strict=True))])
    table.write_text(text + "\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_training_data(config_of(table)).cases) == 2
    assert "2 cases of the split train are used; left out: 1 of test, 2 of val" in caplog.text
    assert len(read_training_data(config_of(table, split="VAL")).cases) == 2
    table.write_text(text.replace("p2,st1,se3", "p1,st1,se3") + "\n")
    with pytest.raises(DataError) as caught:
        read_training_data(config_of(table))
    assert caught.value.code == "split_leak"


@pytest.mark.parametrize("bad", ["../x.nii.gz", "/etc/passwd", "nifti/../../x.nii.gz"])
def test_r13_paths_of_a_table_stay_inside(table: Path, bad: str) -> None:
    table.write_text(f"path\n{bad}\n")
    with pytest.raises(DataError) as caught:
        read_training_data(config_of(table))
    assert caught.value.code == "path_escapes"


def test_a_table_of_pictures_and_one_of_both(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    np.save(tmp_path / "3.npy", np.zeros((8, 8, 3), np.float32))
    np.save(tmp_path / "4.npy", np.zeros((8, 9, 10), np.float32))
    table = write(tmp_path / "t.csv", "id,image\n" + "".join(f"{i},{i}.png\n" for i in range(3)) + "3,3.npy\n")
    data = read_training_data(config_of(table))
    assert (data.kind, len(data.cases), data.config.as_pictures) == ("images", 4, None)
    mixed = write(tmp_path / "m.csv", "id,image\n0,0.png\n4,4.npy\n")
    with pytest.raises(DataError, match="pictures or volumes, not both") as caught:
        read_training_data(config_of(mixed))
    assert "0.png is of images, 4.npy is of volumes" in caught.value.where


def test_arrays_of_three_axes_follow_the_rest_of_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "thin.npy", rng.integers(-9, 9, (3, 12, 10)))
    np.save(tmp_path / "thick.npy", rng.integers(-9, 9, (5, 12, 10)))
    table = write(tmp_path / "t.csv", "id,path\n0,thin.npy\n1,thick.npy\n")
    with caplog.at_level(logging.WARNING):
        assert read_training_data(config_of(table)).kind == "volumes"
    assert caplog.text.count("tell no geometry") == 1
    alone = write(tmp_path / "a.csv", "id,path\n0,thin.npy\n")
    assert read_training_data(config_of(alone)).kind == "images"
    assert read_training_data(config_of(alone, kind="volumes")).kind == "volumes"


# --- windows ---------------------------------------------------------------------------------------------------------

WINDOWS = {"brain": [0, 80], "subdural": [-20, 180], "bone": [-800, 2000]}


def dataset_of(data: TrainingData, cache: Path, seed: int = 0) -> SliceDataset | ImageDataset:
    return build_dataset(prepare_store(data.cases, data.config, cache, kind=data.kind), data.config, seed)


def test_windows_become_channels_of_a_plain_picture(table: Path, tmp_path: Path) -> None:
    data = read_training_data(config_of(table, windows_hu=WINDOWS, spatial_size=32, random_slices=True))
    dataset = dataset_of(data, tmp_path / "cache")
    assert (dataset.sequences, dataset.n_sequences, dataset.channels) == (None, 1, 3)
    sample = dataset[(3, 0)]
    stored = read_volume(data.cases[0].sequences["image"].path).reoriented("RAS").array[sample.index].astype(float)
    top, left, height, width = sample.window
    cut = stored[top : top + height, left : left + width]
    expected = np.stack([np.clip((cut - low) / (high - low), 0, 1) for low, high in WINDOWS.values()])
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(expected)[None], sample.image_SHW.shape[1:], mode="bilinear", align_corners=False
    )[0]
    torch.testing.assert_close(sample.image_SHW.double(), resized, atol=1e-5, rtol=0)
    assert sample.available_S.tolist() == [True, True, True]
    reordered = {name: WINDOWS[name] for name in ("bone", "brain", "subdural")}
    other = config_of(table, windows_hu=reordered)
    assert changed_keys(other.model_dump(mode="json"), data.config.model_dump(mode="json"))  # seen on resume


def test_tables_of_several_sizes_make_one_batch(table: Path, tmp_path: Path) -> None:
    data = read_training_data(config_of(table, windows_hu=WINDOWS, spatial_size=64))
    dataset = dataset_of(data, tmp_path / "cache")
    batch = collate([dataset[(i, i)] for i in range(5)])
    assert batch.images_BSHW.shape[:2] == (5, 3)
    assert len({tuple(size) for size in batch.sizes_B2.tolist()}) > 1
    for image, (height, width) in zip(batch.images_BSHW, batch.sizes_B2.tolist(), strict=True):
        assert image[:, height:].abs().sum() == image[:, :, width:].abs().sum() == 0
    assert batch.available_BS.all()
    assert MultiCrop(CropsConfig(global_crops_size=32, local_crops_size=16), 8, 1)(batch, 0).global_VSHW.shape == (
        *(10, 3, 32, 32),
    )


def test_windows_leave_the_store_alone(table: Path, tmp_path: Path) -> None:
    stores = []
    for windows in (None, WINDOWS, {"one": [-1000, 1000]}):
        data = read_training_data(config_of(table, windows_hu=windows))
        stores.append(prepare_store(data.cases, data.config, tmp_path / "cache", kind="volumes"))
    assert len({store.digest for store in stores}) == 1
    assert stores[0].facts(0).dtype == np.int16


def test_one_window_of_a_case_tree_keeps_its_sequence(tmp_path: Path) -> None:
    for i in range(2):
        write_ct(tmp_path / f"tree/P{i}/ct.nii.gz", seed=i, padding=-3024)
    values = {"mri_sequences": "ct", "preprocess": {"window_hu": [-1000, 1000]}, "spatial_size": 24}
    data = read_training_data(config_of(tmp_path / "tree", **values))
    dataset = dataset_of(data, tmp_path / "cache")
    assert (dataset.sequences, dataset.n_sequences, dataset.channels) == (("ct",), 1, 1)
    image = dataset[(0, 0)].image_SHW[0]
    assert image.min() == 0  # padding of -3024 is clipped
    assert image.max() == pytest.approx(0.95)  # bone of 900 HU
    plain = read_training_data(config_of(tmp_path / "tree", **values, as_pictures=True))
    assert dataset_of(plain, tmp_path / "cache").sequences is None


def test_pictures_of_several_sequences_are_refused(prostate_tree: Path, prepared_cache: Path) -> None:
    data = read_training_data(config_of(prostate_tree, as_pictures=True))
    with pytest.raises(ConfigError, match="volumes of one sequence"):
        dataset_of(data, prepared_cache)


def test_ct_of_eight_bits_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    for i in range(2):
        grey = Volume(rng.integers(0, 256, (5, 16, 16)).astype(np.uint8), np.eye(4))
        write_volume(tmp_path / f"t/{i}.nii.gz", grey)
    table = write(tmp_path / "t/t.csv", "path\n0.nii.gz\n1.nii.gz\n")
    for values in ({"windows_hu": WINDOWS}, {"preprocess": {"window_hu": [-1000, 1000]}}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            dataset_of(read_training_data(config_of(table, **values)), tmp_path / "cache")
        assert "ct_not_hu" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        dataset_of(read_training_data(config_of(table, windows_hu={"brain": [0, 80]})), tmp_path / "cache")
    assert "ct_not_hu" not in caplog.text


def test_random_axes_of_a_table_only_where_the_spacing_allows(
    table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cube = np.random.default_rng(0).integers(-9, 9, (20, 20, 20))
    np.save(table.parent / "nifti/cube.npy", cube)
    table.write_text(table.read_text() + "p4,st4,se9,nifti/cube.npy,0\n")
    data = read_training_data(config_of(table, random_axes=True, spatial_size=16))
    with caplog.at_level(logging.WARNING):
        dataset = dataset_of(data, tmp_path / "cache")
    assert "coronal and sagittal slices are left out in 5 of 6 cases" in caplog.text
    axes = {case: {dataset[(position, case)].axis for position in range(24)} for case in (0, 5)}
    assert axes == {0: {0}, 5: {0, 1, 2}}
    values = {"random_axes": True, "spatial_size": 16, "preprocess": {"resample_mm": [1, 1, 1]}}
    resampled = dataset_of(read_training_data(config_of(table, **values)), tmp_path / "cache")
    assert {resampled[(position, 0)].axis for position in range(24)} == {0, 1, 2}


# --- modalities and other layouts ------------------------------------------------------------------------------------


def test_v02_the_folder_of_a_modality_is_the_tree(tmp_path: Path) -> None:
    for folder in ("Silt-Lamp", "Fundus"):
        for i in range(2):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "Silt-Lamp/notes.txt").write_text("not a picture")
    data = read_training_data(config_of(tmp_path, modality="slit lamp"))
    assert [case.case_id for case in data.cases] == ["0.png", "1.png"]
    assert data.cases[0].sequences["image"].path == tmp_path / "Silt-Lamp/0.png"
    assert len(read_training_data(config_of(tmp_path)).cases) == 4


def test_w38_a_corrupt_picture_at_the_last_index_is_listed_and_skipped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "z.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(DataError) as caught:
        dataset_of(read_training_data(config_of(tmp_path)), tmp_path / "cache")
    assert "z.png" in caught.value.where
    data = read_training_data(config_of(tmp_path, on_error="skip"))
    store = prepare_store(data.cases, data.config, tmp_path / "cache", kind="images")
    assert (len(data.cases), len(store)) == (4, 3)
    assert [failure[0] for failure in store.failures] == ["z.png"]


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    root = tmp_path / "Dataset001_Ct"
    for i in range(3):
        write_ct(root / f"imagesTr/c{i}_0000.nii.gz", seed=i)
        inside = np.zeros((6, 24, 20), np.uint8)
        inside[2 + i, 8:12, 8:12] = 1 + i
        write_volume(root / f"labelsTr/c{i}.nii.gz", Volume(inside, np.diag([0.8, 0.8, 3.0, 1.0])))
    write_ct(root / "imagesTs/c9_0000.nii.gz", seed=9)
    write(root / "dataset.json", '{"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}')
    return root


def test_a_layout_names_its_own_channels(nnunet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = read_training_data(config_of(nnunet, spatial_size=16))
    assert "sequences: ct, as the layout nnunet names them" in caplog.text
    assert "left out: 1 of test" in caplog.text
    assert (data.layout, data.config.mri_sequences, len(data.cases)) == ("nnunet", ("ct",), 3)
    dataset = dataset_of(data, tmp_path / "cache")
    assert [dataset[(0, case)].index for case in range(3)] == [2, 3, 4]  # where the label is, whatever its class
    assert dataset[(0, 0)].roi_HW is not None
    assert [case.case_id for case in read_training_data(config_of(nnunet, split="TEST")).cases] == ["c9"]
    bare = read_training_data(config_of(nnunet, roi="", mri_sequences="0000"))
    assert bare.cases[0].roi is None
    assert list(bare.cases[0].sequences) == ["0000"]
    with pytest.raises(DataError, match="none of the sequences"):
        read_training_data(config_of(nnunet, mri_sequences="ax_t2wi"))


def test_r12_lists_of_a_layout_are_held_apart(nnunet: Path) -> None:
    train = write(nnunet.parent / "s/train.csv", "patient_id\nc0\nc1\n")
    val = write(nnunet.parent / "s/val.csv", "patient_id\nc2\n")
    assert len(read_training_data(config_of(nnunet, split_csv=str(train))).cases) == 2
    val.write_text("patient_id\nc1\n")
    with pytest.raises(DataError) as caught:
        read_training_data(config_of(nnunet, split_csv=str(train)))
    assert caught.value.code == "split_leak"


def test_a_decathlon_file_that_is_missing_is_named(tmp_path: Path) -> None:
    write_ct(tmp_path / "imagesTr/a.nii.gz")
    text = '{"modality": {"0": "CT"}, "training": [{"image": "imagesTr/a.nii.gz"}, {"image": "imagesTr/b.nii.gz"}]}'
    write(tmp_path / "dataset.json", text)
    with pytest.raises(DataError, match="1 of 2 files") as caught:
        read_training_data(config_of(tmp_path))
    assert "b.nii.gz" in caught.value.where
    assert len(read_training_data(config_of(tmp_path, on_error="skip")).cases) == 1


def test_a_template_with_lists(tmp_path: Path) -> None:
    for seed, name in enumerate(("A/P1", "A/P2", "B/P1")):
        write_ct(tmp_path / name / "ct.nii.gz", seed=seed)
    write(tmp_path / "splits/train.txt", "A/P1\nB/P1\n")
    write(tmp_path / "splits/val.txt", "A/P2\n")
    values = {"template": "{relative}/{sequence}.nii.gz", "mri_sequences": "ct"}
    assert [c.case_id for c in read_training_data(config_of(tmp_path, **values)).cases] == ["A/P1", "B/P1"]
    assert [c.case_id for c in read_training_data(config_of(tmp_path, split="VAL", **values)).cases] == ["A/P2"]


# --- real images -----------------------------------------------------------------------------------------------------


def test_real_ct_as_tree_and_as_table(real_data: Path, tmp_path: Path) -> None:
    root = real_data / "sts_ct_pet_mr_volumes"
    names = [path.name for path in sorted(root.glob("STS_*"))][:2]
    split = write(tmp_path / "two.csv", "patient_id\n" + "\n".join(names) + "\n")
    values = {"split_csv": str(split), "spatial_size": 64}
    tree = {"mri_sequences": "CT_image", "roi": "CT_mask", "preprocess": {"window_hu": [-160, 240]}}
    data = read_training_data(config_of(root, **values, **tree))
    dataset = dataset_of(data, tmp_path / "cache")
    sample = dataset[(0, 0)]
    assert sample.roi_HW is not None
    assert sample.roi_HW.any()
    stored = read_volume(root / names[0] / "CT_image.nii.gz").reoriented("RAS").array[sample.index]
    top, left, height, width = sample.window
    cut = np.clip((stored[top : top + height, left : left + width].astype(float) + 160) / 400, 0, 1)
    assert sample.image_SHW.shape[1:] == cut.shape
    np.testing.assert_allclose(sample.image_SHW[0], cut, atol=1e-5)
    assert float(sample.image_SHW.mean()) == pytest.approx(cut.mean(), abs=0.02)
    rows = [f"{name},{name}/CT_image.nii.gz" for name in names]
    for name in names:
        (tmp_path / name).symlink_to(root / name)
    table = write(tmp_path / "t.csv", "patient_id,path\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError) as caught:  # a link out of the folder of the table
        read_training_data(config_of(table))
    assert caught.value.code == "path_escapes"
    for name in names:
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        shutil.copy(root / name / "CT_image.nii.gz", tmp_path / name)
    data = read_training_data(config_of(table, windows_hu=WINDOWS, spatial_size=64))
    pictures = dataset_of(data, tmp_path / "cache")
    assert pictures[(0, 0)].image_SHW.shape[0] == 3
    assert 0.05 < float(pictures[(0, 0)].image_SHW[2].mean()) < 0.95


def test_real_fundus_pictures_of_a_modality(real_data: Path) -> None:
    data = read_training_data(config_of(real_data / "fundus_dr_grading/images", modality="Fundus"))
    assert (data.kind, len(data.cases), data.config.modality) == ("images", 376, "fundus")


def test_real_prostate_as_a_table_of_volumes(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "prostate3t_t2"
    paths = sorted(path.relative_to(folder) for path in (folder / "nifti").glob("*.nii.gz"))[:3]
    for path in paths:
        write(tmp_path / path.name, (folder / path).read_bytes())
    table = write(tmp_path / "t.csv", "path\n" + "".join(f"{path.name}\n" for path in paths))
    data = read_training_data(config_of(table, spatial_size=64))
    dataset = dataset_of(data, tmp_path / "cache")
    assert (len(data.cases), dataset.sequences, dataset.channels) == (len(paths), None, 1)
    assert 0.5 < float(dataset[(0, 0)].image_SHW.max()) <= 1
