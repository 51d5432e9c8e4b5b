"""Label maps: what values mean is said once, and a value without a meaning never becomes background."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import read_volume, write_volume
from medssl_cli.data.label_maps import (
    LabelSpec,
    read_label_picture,
    spec_of_names,
    spec_of_values,
    whole_values,
)


def test_values_become_class_indices_and_ignored_ones_255() -> None:
    spec = LabelSpec(("background", "zone", "lesion"), {0: 0, 5: 1, 2: 2}, (7,))
    given = np.array([[0, 5, 2], [7, 2, 0]], np.int16)
    assert spec.classes_of(given).tolist() == [[0, 1, 2], [255, 2, 0]]
    assert spec.classes_of(given).dtype == np.uint8
    assert spec.outputs == 3
    assert spec.describe() == "0 background, 2 lesion, 5 zone, 7 ignored"


def test_a_value_of_no_class_is_named_with_number_and_first_place() -> None:
    spec = LabelSpec(("background", "lesion"), {0: 0, 1: 1})
    array = np.zeros((2, 4, 5), np.uint8)
    array[1, 2, 3] = array[1, 3, 4] = 9
    with pytest.raises(DataError) as error:
        spec.classes_of(array, "a.nii.gz")
    assert error.value.code == "label_values"
    assert error.value.where == "a.nii.gz: 9 in 2 voxels, the first at (3, 2, 1); known are 0 background, 1 lesion"


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.array([[0, 0.5]], np.float32), "0.5 in 1 pixel, the first at (1, 0)"),
        (np.array([[0, -1]], np.int16), "-1 in"),
        (np.array([[300, 0]], np.uint16), "300 in"),
        (np.array([[np.nan, 0]]), "nan in"),
        (np.array([[np.inf, 0]]), "inf in"),
    ],
)
def test_only_whole_numbers_of_a_byte_are_labels(array: np.ndarray, told: str) -> None:
    with pytest.raises(DataError) as error:
        whole_values(array)
    assert error.value.code == "label_values"
    assert told in error.value.where


def test_a_mask_scaled_by_its_header_is_whole(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.array([[[0, 255]], [[255, 0]]], np.uint8), np.eye(4))
    image.header.set_slope_inter(1 / 255, 0)
    (tmp_path / "m.nii").write_bytes(image.to_bytes())
    loaded = nib.load(tmp_path / "m.nii").get_fdata()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(whole_values(read_volume(tmp_path / "m.nii").array), np.rint(loaded).T)
    assert whole_values(read_volume(tmp_path / "m.nii").array).max() == 1


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "PZ": 1, "TZ": 2},
        {"background": "0", "TZ": "2", "PZ": "1"},
        {"0": "background", "1": "PZ", "2": "TZ"},
        {"PZ": 1, "TZ": 2},
    ],
)
def test_both_spellings_of_dataset_json_are_read(labels: dict[str, object]) -> None:
    assert spec_of_names(labels) == LabelSpec(("background", "PZ", "TZ"), {0: 0, 1: 1, 2: 2})


def test_gaps_are_closed_and_ignore_is_no_class() -> None:
    spec = spec_of_names({"background": 0, "edema": 2, "core": 4, "ignore": 5})
    assert spec == LabelSpec(("background", "edema", "core"), {0: 0, 2: 1, 4: 2}, (5,))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ({"background": 0, "whole": [1, 2], "core": [2]}, "region"),
        ({"background": 0, "a": 1, "b": 1}, "twice"),
        ({"0": "background", "1": "a", "2": "a"}, "twice"),
        ({"background": 0}, "background"),
        ({"background": 0, "a": 1.5}, "1.5"),
        ({"background": 0, "a": 256}, "256"),
        ({"background": 0, "a": None}, "None"),
        ({"background": 0, "a": True}, "True"),
        ({"background": 0, **{f"s{n}": n for n in range(1, 70)}}, "69 structures"),
        ({}, "{}"),
    ],
)
def test_labels_that_cannot_be_trained_are_refused_with_the_reason(labels: dict[str, object], told: str) -> None:
    with pytest.raises(DataError) as error:
        spec_of_names(labels)
    assert told in error.value.where


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=4) | st.sampled_from(["0", "1", "background", "ignore"]),
        st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=4) | st.lists(st.integers()),
        max_size=5,
    )
)
def test_r21_any_labels_are_read_or_refused(labels: dict[str, object]) -> None:
    try:
        spec = spec_of_names(labels)
    except DataError:
        return
    assert spec.classes_of(np.array(list(spec.values))).tolist() == list(spec.values.values())


def test_classes_are_discovered_from_values(caplog: pytest.LogCaptureFixture) -> None:
    assert spec_of_values([0, 3, 1]) == LabelSpec(("background", "class_1", "class_3"), {0: 0, 1: 1, 3: 2})
    assert spec_of_values([0, 4]) == LabelSpec(("background", "class_1"), {0: 0, 4: 1})
    assert spec_of_values([0, 2], ("gland", "lesion")).values == {0: 0, 1: 1, 2: 2}  # absent here is a class still
    with caplog.at_level(logging.INFO):
        assert spec_of_values([0, 255], ("vessel",)) == LabelSpec(("background", "vessel"), {0: 0, 255: 1})
    assert caplog.messages == ["label maps hold 0 and 255: 255 is vessel"]


def test_a_single_structure_is_called_as_its_file() -> None:
    assert spec_of_values([0, 3], label="roi_Prostate") == LabelSpec(("background", "roi_Prostate"), {0: 0, 3: 1})
    assert spec_of_values([0, 1, 2], label="zones").classes == ("background", "class_1", "class_2")
    assert spec_of_values([0, 1], ("gland",), label="roi_Prostate").classes == ("background", "gland")


def test_values_can_be_joined_and_ignored_by_name() -> None:
    spec = spec_of_values([0, 2, 3, 255], ("lesion=2+3", "ignore=255"))
    assert spec.classes_of(np.array([[0, 2, 3, 255]])).tolist() == [[0, 1, 1, 255]]
    assert spec.classes == ("background", "lesion")
    spec = spec_of_values([0, 2, 254, 255], ("gland", "ignore=254+255", "lesion"))
    assert spec.classes == ("background", "gland", "lesion")
    assert spec.classes_of(np.array([[0, 1, 2, 254, 255]])).tolist() == [[0, 1, 2, 255, 255]]


@pytest.mark.parametrize(
    ("found", "names", "told"),
    [
        ([0, 2], ("lesion",), "2 in some pixels; known are 0 background, 1 lesion"),
        ([0, 1, 255], ("lesion",), "255"),
        ([0, 1, 2, 3], ("a", "b"), "3"),
        ([0, 4], ("lesion=2+3",), "4"),
    ],
)
def test_values_beyond_the_names_are_refused(found: list[int], names: tuple[str, ...], told: str) -> None:
    with pytest.raises(DataError) as error:
        spec_of_values(found, names)
    assert error.value.code == "label_values"
    assert told in error.value.where


def test_empty_and_overfull_label_maps_are_refused() -> None:
    with pytest.raises(DataError) as empty:
        spec_of_values([0])
    assert empty.value.code == "label_empty"
    with pytest.raises(DataError, match="too many values"):
        spec_of_values(range(100))


@pytest.mark.parametrize(
    "names", [("a", "a"), ("background",), ("",), ("a=1", "b"), ("a=1", "b=1"), ("a=0",), ("ignore=3",), ("a=1", "a=2")]
)
def test_names_that_say_nothing_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        spec_of_values([0, 1], names)


@pytest.mark.parametrize(
    ("classes", "values", "ignored"),
    [
        (("background",), {0: 0}, ()),
        (("lesion", "background"), {0: 0, 1: 1}, ()),
        (("background", "a"), {0: 0}, ()),
        (("background", "a"), {0: 0, 1: 1}, (1,)),
        (("background", "a"), {0: 0, 256: 1}, ()),
    ],
)
def test_a_spec_is_whole(classes: tuple[str, ...], values: dict[int, int], ignored: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needed|lie between|two meanings"):
        LabelSpec(classes, values, ignored)


# --- pictures --------------------------------------------------------------------------------------------------------


def discovered(paths: Iterable[Path], names: Sequence[str] = ()) -> LabelSpec:
    """Classes by the values of files."""
    found = [
        whole_values(read_volume(path).array) if path.name.endswith(".nii.gz") else read_label_picture(path)
        for path in paths
    ]
    return spec_of_values({int(value) for array in found for value in np.unique(array)}, names)


CLASSES = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)


def test_w08_a_palette_keeps_its_indices(tmp_path: Path) -> None:
    image = Image.fromarray(CLASSES, mode="P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "p.png")
    grey = np.asarray(Image.open(tmp_path / "p.png").convert("RGB").convert("L"))
    assert sorted(set(grey.ravel().tolist())) == [0, 29, 76, 150]  # what a reader by way of colours would take
    np.testing.assert_array_equal(read_label_picture(tmp_path / "p.png"), CLASSES)
    assert discovered([tmp_path / "p.png"]).classes == ("background", "class_1", "class_2", "class_3")


def test_every_plain_format_gives_the_same_values(tmp_path: Path) -> None:
    Image.fromarray(CLASSES).save(tmp_path / "a.png")
    Image.fromarray(np.stack([CLASSES] * 3, axis=-1)).save(tmp_path / "b.png")
    Image.fromarray(np.dstack([CLASSES] * 3 + [np.full_like(CLASSES, 255)])).save(tmp_path / "c.png")
    Image.fromarray(CLASSES.astype(np.uint16)).save(tmp_path / "d.png")
    Image.fromarray(CLASSES).save(tmp_path / "e.tif")
    Image.fromarray(CLASSES).save(tmp_path / "f.bmp")
    np.save(tmp_path / "g.npy", CLASSES.astype(np.int64))
    np.save(tmp_path / "h.npy", CLASSES.astype(np.float64))
    write_volume(tmp_path / "i.nii.gz", Volume(CLASSES[None], np.eye(4)))
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(read_label_picture(path), CLASSES, err_msg=path.name)


def test_masks_of_one_bit_hold_0_and_1(tmp_path: Path) -> None:
    mask = CLASSES > 1
    Image.fromarray(mask).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", mask)
    for name in ("a.png", "b.npy"):
        np.testing.assert_array_equal(read_label_picture(tmp_path / name), mask)


def test_coloured_and_damaged_label_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([CLASSES, CLASSES, CLASSES + 1])).save(tmp_path / "colour.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    write_volume(tmp_path / "thick.nii.gz", Volume(np.zeros((2, 3, 3), np.uint8), np.eye(4)))
    for name, code in (
        ("colour.png", "label_colour"),
        ("bad.png", "image_unreadable"),
        ("absent.png", "file_missing"),
        ("thick.nii.gz", "label_picture"),
    ):
        with pytest.raises(DataError) as error:
            read_label_picture(tmp_path / name)
        assert error.value.code == code
        assert name in error.value.where


def test_a_mask_saved_as_jpeg_is_refused(tmp_path: Path) -> None:
    y, x = np.mgrid[:40, :40]
    Image.fromarray((((y - 20) ** 2 + (x - 20) ** 2 < 150) * 255).astype(np.uint8)).save(tmp_path / "m.jpg")
    with pytest.raises(DataError):
        discovered([tmp_path / "m.jpg"], ("vessel",))


def test_real_vessels_of_one_bit(real_data: Path) -> None:
    paths = sorted((real_data / "chase_db1_vessels" / "manual1").glob("*.png"))[:2]
    spec = discovered(paths, ("vessel",))
    assert spec == LabelSpec(("background", "vessel"), {0: 0, 1: 1})
    share = spec.classes_of(read_label_picture(paths[0])).mean()
    assert share == pytest.approx(np.asarray(Image.open(paths[0]), dtype=bool).mean())
    assert 0.03 < share < 0.2


def test_real_lesion_grades(real_data: Path) -> None:
    paths = sorted((real_data / "picai_labels_subset" / "lesion_masks_human_expert").glob("*.nii.gz"))
    found = {int(v) for path in paths for v in np.unique(np.asanyarray(nib.load(path).dataobj))}  # type: ignore[attr-defined]
    spec = discovered(paths)
    assert sorted(spec.values) == sorted(found)
    grades = sorted(found - {0})
    lesion = discovered(paths, (f"lesion={'+'.join(map(str, grades))}",))
    assert lesion.classes == ("background", "lesion")
    with pytest.raises(DataError):
        discovered(paths, ("lesion",))
